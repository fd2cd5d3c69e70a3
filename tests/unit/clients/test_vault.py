"""What a site keeps of secure aggregation: private, synced before it counts, never guessed."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import numpy as np
import pytest

from lepton_fed.clients import vault as vault_module
from lepton_fed.clients.vault import FileVault, MemoryVault, Remembered, StoredVector, prune
from lepton_fed.core.exchange import PhaseAsk
from lepton_fed.errors import LeptonError, Problem, Refused, RunError
from lepton_fed.privacy.secagg.member import State
from lepton_fed.privacy.secagg.state import Coming
from lepton_fed.runs import files
from tests.unit.server.masked_world import Line, MaskedWorld

RUN = "a" * 64
STATE = State(Coming(2, 1, ["00", "11", "22"]), 1, 1, 3, ["a", "b"], 2, seed_shares={"a": "ff"})
ABOUT = StoredVector(2, "b" * 64, 3.5, 1.0, {"weight": "inside"})
WORDS = np.arange(7, dtype=np.uint32)
OPEN = State(
    Coming(3, 1, ["5ec2e7"]), 1, 2, 3, ["a", "b"], 2, ["5ec2e7"], 2,
    envelopes=[{"sealed": "5ec2e7"}], seed_shares={"a": "5ec2e7"}, mask_shares={"b": "5ec2e7"},
)  # fmt: skip
DAY = 24 * 3600.0
NOW = time.time()  # files are written by the clock of the system


@pytest.fixture(params=["memory", "files"])
def vault(request, tmp_path):
    return MemoryVault() if request.param == "memory" else FileVault(tmp_path / "masked", RUN)


@pytest.fixture
def filed(tmp_path):
    """Return a vault with everything in it."""
    found = FileVault(tmp_path / "state" / "masked", RUN)
    found.remember(Remembered(STATE, [1.5]))
    found.store(WORDS, ABOUT)
    return found


def paths(folder):
    return {path.suffix: path for path in folder.iterdir()}


def test_a_new_vault_holds_nothing(vault):
    assert vault.recall() == Remembered()
    assert vault.stored() is None
    vault.clear()


def test_what_was_kept_comes_back_and_the_words_are_the_callers(vault):
    vault.remember(Remembered(STATE, [1.5, 2.0]))
    vault.store(WORDS.copy(), ABOUT)
    assert vault.recall() == Remembered(STATE, [1.5, 2.0])
    assert vault.stored() == ABOUT
    words = vault.words()
    assert words.dtype == np.uint32
    words += 1
    np.testing.assert_array_equal(vault.words(), WORDS)
    vault.store(WORDS[:3].copy(), ABOUT)
    assert vault.words().size == 3, "in the place of the one before"
    vault.clear()
    assert vault.stored() is None
    assert vault.recall().member == STATE


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
def test_another_process_finds_the_very_same_words(tmp_path, dtype):
    words = np.array([0, 1, np.iinfo(dtype).max], dtype)
    FileVault(tmp_path, RUN).store(words, ABOUT)
    found = FileVault(tmp_path, RUN).words()
    assert (found.dtype, found.tobytes()) == (words.dtype, words.tobytes())
    assert FileVault(tmp_path, "c" * 64).stored() is None, "each run has its own"


def test_only_the_owner_can_read_it(filed, tmp_path):
    folder = tmp_path / "state" / "masked"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    filed.remember(Remembered())  # and so is what takes its place
    assert stat.S_IMODE(paths(folder)[".json"].stat().st_mode) == 0o600


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"\xff", b'{"begun": [], "member": {}}'])
def test_a_state_that_cannot_be_read_is_refused_and_left_as_it_is(filed, tmp_path, content):
    path = paths(tmp_path / "state" / "masked")[".json"]
    path.write_bytes(content)
    with pytest.raises(Refused, match="LF4517"):
        filed.recall()
    assert path.read_bytes() == content


def test_a_state_with_a_field_too_many_or_of_another_type_is_refused(filed, tmp_path):
    path = paths(tmp_path / "state" / "masked")[".json"]
    whole = path.read_bytes()
    for old, new in (
        (b'"begun"', b'"begin"'),
        (b'"closed":1', b'"closed":"1"'),
        (b'{"begun"', b'{"more":1,"begun"'),
        (b'"closed":1', b'"closed":1e999'),
    ):
        assert old in whole
        path.write_bytes(whole.replace(old, new, 1))
        with pytest.raises(Refused, match="LF4517"):
            filed.recall()


@pytest.mark.parametrize("spoil", ["cut", "empty", "no words", "nothing about it"])
def test_of_a_broken_vector_nothing_is_used(filed, tmp_path, spoil):
    path = paths(tmp_path / "state" / "masked")[".safetensors"]
    arrays, about = files.read_tensors(path)
    if spoil == "no words":
        files.write_tensors(path, {}, about)
    elif spoil == "nothing about it":
        files.write_tensors(path, arrays, {})
    else:
        path.write_bytes(path.read_bytes()[:-2] if spoil == "cut" else b"")
    if spoil == "no words":
        assert filed.stored() == ABOUT
    else:
        assert filed.stored() is None
    if spoil != "nothing about it":
        with pytest.raises(Refused, match="LF4517"):
            filed.words()


def test_vectors_of_runs_long_over_are_removed_and_what_was_revealed_is_not(tmp_path):
    for number in range(20):
        one = FileVault(tmp_path, f"{number:064x}")
        one.remember(Remembered(STATE))
        one.store(WORDS, ABOUT)
    (tmp_path / ".0123.partial").write_bytes(b"half")
    FileVault(tmp_path, f"{19:064x}").prune(NOW)
    assert len(list(tmp_path.glob("*.json"))) == 20
    assert len(list(tmp_path.glob("*.safetensors"))) == 17, "this run's, and 16 others"
    assert not list(tmp_path.glob(".*.partial"))
    assert FileVault(tmp_path, f"{19:064x}").stored() == ABOUT
    assert FileVault(tmp_path, f"{0:064x}").stored() is None
    FileVault(tmp_path / "none yet", RUN).prune(NOW)


def aged(folder, days):
    """Make what is in a folder as old as that, counted back from now."""
    for path in folder.iterdir():
        os.utime(path, (NOW - days * DAY, NOW - days * DAY))


def begun(folder, number):
    """Return the vault of a run that has begun a round, with secrets and a vector."""
    one = FileVault(folder, f"{number:064x}")
    one.remember(Remembered(OPEN, [1.5]))
    one.store(WORDS, ABOUT)
    return one


def test_a_round_that_nobody_went_on_with_for_a_week_is_closed_and_its_secrets_go(tmp_path):
    one = begun(tmp_path, 1)
    aged(tmp_path, 6.9)
    one.prune(NOW)
    assert (one.recall(), one.stored()) == (Remembered(OPEN, [1.5]), ABOUT)
    aged(tmp_path, 7.1)
    for run in (RUN, f"{1:064x}"):  # whichever is asked for, its own too
        FileVault(tmp_path, run).prune(NOW)
        assert one.recall() == Remembered(State(closed=2)), "what refuses a replay, and no more"
        assert one.stored() is None
    (left,) = tmp_path.iterdir()
    assert b"5ec2e7" not in left.read_bytes()
    written = left.stat().st_mtime_ns
    aged(tmp_path, 30)
    one.prune(NOW)
    assert left.stat().st_mtime_ns < written, "it is not written again"


def test_of_a_closed_round_the_answer_goes_too(tmp_path):
    one = FileVault(tmp_path, RUN)
    one.remember(Remembered(State(Coming(3, 1, ["5ec2e7"]), 2, 2, 1, seed_shares={"a": "ff"})))
    aged(tmp_path, 8)
    prune(tmp_path, NOW)
    assert one.recall() == Remembered(State(closed=2))


def test_an_old_vector_goes_whatever_is_known_of_its_run(tmp_path):
    one = begun(tmp_path, 1)
    aged(tmp_path, 8)
    one.remember(Remembered(OPEN))
    os.utime(paths(tmp_path)[".json"], (NOW, NOW))
    one.prune(NOW)
    assert (one.stored(), one.recall()) == (None, Remembered(OPEN))


def test_a_broken_state_is_left_to_a_person_however_old_it_is(tmp_path):
    one = begun(tmp_path, 1)
    paths(tmp_path)[".json"].write_bytes(b"{")
    aged(tmp_path, 400)
    one.prune(NOW)
    assert paths(tmp_path)[".json"].read_bytes() == b"{"


def test_a_process_killed_while_it_prunes_leaves_no_vector_that_the_site_forgot(
    tmp_path, monkeypatch
):
    """A vector without what is known of its round would be refused for good."""

    def killed(path, content, mode):
        raise KeyboardInterrupt

    one = begun(tmp_path, 1)
    aged(tmp_path, 8)
    os.utime(paths(tmp_path)[".safetensors"], (NOW - 6 * DAY,) * 2)  # it trained for long
    with monkeypatch.context() as patch:
        patch.setattr(vault_module, "write_atomic", killed)
        with pytest.raises(KeyboardInterrupt):
            one.prune(NOW)
    assert one.stored() is None
    one.prune(NOW)
    assert one.recall() == Remembered(State(closed=2))


def test_of_runs_that_nothing_was_shared_in_so_many_are_kept_and_all_others(tmp_path):
    """A coordinator can offer run after run and ask each for an advert."""
    for number in range(60):
        one = begun(tmp_path, number) if number < 20 else FileVault(tmp_path, f"{number:064x}")
        if number >= 20:
            one.remember(Remembered(State(Coming(1, 1, ["5ec2e7"]))))
        os.utime(tmp_path / f"{number:064x}.json", (NOW - 100 + number, NOW - 100 + number))
    unfinished = FileVault(tmp_path, f"{25:064x}")  # killed before its state knew of the vector
    unfinished.store(WORDS, ABOUT)
    FileVault(tmp_path, f"{30:064x}").prune(NOW)
    left = sorted(int(path.stem, 16) for path in tmp_path.glob("*.json"))
    assert left == [*range(20), 30, *range(44, 60)]
    assert unfinished.stored() is None


# --- with the site


@pytest.fixture
def written(monkeypatch):
    """Return what was synced and put in place, in order."""
    found, replace = [], Path.replace

    def moved(source, target):
        found.append(Path(target).suffix)
        return replace(source, target)

    monkeypatch.setattr(files.os, "fsync", lambda _: found.append("sync"))
    monkeypatch.setattr(Path, "replace", moved)
    return found


class Watched(Line):
    """Notes what a site wrote before each of its answers left."""

    written: list[str]
    before: dict[str, list[str]]

    def phase(self, asks, deadline=None, answer_bytes=0):
        for name, asked in asks.items():
            self.written.clear()
            reply = self.world.take(name, asked)
            self.before.setdefault(asked.phase, list(self.written))
            yield reply


def test_all_is_synced_and_in_place_before_an_answer_leaves(tmp_path, written):
    world = MaskedWorld(tmp_path, tuple("abc"), on_disk=True)
    line = Watched(world)
    line.written, line.before = written, {}
    (group,) = world.sums(line)
    world.require_sum(group)
    state, vector = ["sync", ".json", "sync"], ["sync", ".safetensors", "sync"]
    assert line.before == {
        "advertise": ["sync", *state],  # and the folder that they are in, when it is made
        "share": [*vector, *state],
        "mask": state,
        "confirm": state,
        "reveal": state,
    }


@pytest.mark.parametrize("phase", ["advertise", "share", "mask", "confirm", "reveal"])
def test_nothing_leaves_when_it_cannot_be_kept(tmp_path, monkeypatch, phase):
    world = MaskedWorld(tmp_path, tuple("abc"), on_disk=True)
    refused = []

    def full(self, now):
        raise RunError(Problem("LF5209", "the disk is full"))

    class Full(Line):
        def phase(self, asks, deadline=None, answer_bytes=0):
            for name, asked in asks.items():
                if asked.phase == phase and name == "b":
                    with monkeypatch.context() as patch:
                        patch.setattr(FileVault, "remember", full)
                        with pytest.raises(LeptonError, match="LF5209"):
                            world.site(name).take(asked)
                    refused.append(name)
                yield world.take(name, asked)  # there is room again

    (group,) = world.sums(Full(world))
    world.require_sum(group)
    assert refused == ["b"]
    assert group.names == tuple("abc")
    assert set(world.answered.values()) == {1}


def test_a_site_that_was_killed_while_it_trained_begins_the_round_again(tmp_path):
    world = MaskedWorld(tmp_path, tuple("abc"), on_disk=True)
    died = []

    class Died(BaseException):
        pass

    def dying(name, ask, trained=world.trained):
        if name == "b" and not died:
            died.append(name)
            raise Died
        return trained(name, ask)

    world.trained = dying

    class Killing(Line):
        def phase(self, asks, deadline=None, answer_bytes=0):
            for name, asked in asks.items():
                assert isinstance(asked, PhaseAsk)
                try:
                    yield world.take(name, asked)
                except Died:
                    yield world.take(name, asked)

    (group,) = world.sums(Killing(world))
    world.require_sum(group)
    assert (died, group.names) == (["b"], tuple("abc"))


def test_rounds_of_other_runs_are_told_as_long_as_they_are_recent(tmp_path):
    one, other, broken = (FileVault(tmp_path / "masked", name) for name in ("one", "other", "bad"))
    one.remember(Remembered(begun=[10.0]))
    other.remember(Remembered(begun=[20.0, 30.0]))
    assert one.elsewhere(0.0) == [20.0, 30.0]
    assert one.elsewhere(25.0) == [30.0]
    assert other.elsewhere(0.0) == [10.0]
    assert MemoryVault().elsewhere(0.0) == []
    broken.remember(Remembered())
    (tmp_path / "masked" / "bad.json").write_bytes(b"{")
    os.utime(tmp_path / "masked" / "bad.json", (40.0, 40.0))
    for name in ("one", "other"):
        os.utime(tmp_path / "masked" / f"{name}.json", (35.0, 35.0))
    assert one.elsewhere(37.0) == [40.0], "a broken one counts as one"
