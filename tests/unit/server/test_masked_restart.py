"""A round of secure aggregation goes on after a restart of anybody, at any point of it.

Each message and each write of the coordinator is a point at which it is killed; the next one shares
nothing with it but the folder. Sites are started anew for each message, in all of these tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from lepton_fed.config.schema import SecureAggregation
from lepton_fed.core.exchange import PhaseAsk, PhaseReply
from lepton_fed.core.pace import Deadline
from lepton_fed.identity.signature import PrivateKey
from lepton_fed.privacy.secagg.messages import Envelope
from lepton_fed.runs import files
from lepton_fed.server.groups import GroupFiles, GroupSum
from tests.unit.server.masked_world import PHASES, Line, MaskedWorld, failing, lost, silent


class Killed(BaseException):
    """The coordinator is gone."""


class KilledLine(Line):
    """A line on which the coordinator dies before or after one of its messages."""

    point: Callable[[str], None] = staticmethod(lambda name: None)

    def phase(
        self,
        asks: Mapping[str, PhaseAsk],
        deadline: Deadline | None = None,
        answer_bytes: int = 0,
    ) -> Iterator[PhaseReply]:
        self.point("before asking")
        for reply in super().phase(asks, deadline, answer_bytes):
            self.point(f"before the reply of {reply.site}")
            yield reply
            self.point(f"after the reply of {reply.site}")


class Points:
    """Counts the points of a round, and ends it at one of them."""

    def __init__(self, at: int = 0) -> None:
        self.names: list[str] = []
        self.at = at

    def __call__(self, name: str) -> None:
        self.names.append(name)
        if len(self.names) == self.at:
            raise Killed


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[[Points], None]:
    """Put points around every write of the coordinator's; sites write to memory here."""
    replace = Path.replace
    monkeypatch.setattr(files.os, "fsync", lambda _: None)

    def put(points: Points) -> None:
        def moved(source: Path, target: Path) -> Path:
            if not target.name.startswith("group-"):
                return replace(source, target)
            points("before a write")
            found = replace(source, target)
            points("after a write")
            return found

        monkeypatch.setattr(Path, "replace", moved)

    return put


def run(world: MaskedWorld, points: Points, line: KilledLine) -> list[GroupSum]:
    line.point = points  # type: ignore[method-assign]
    return world.sums(line)


FAULTS = {
    "nobody drops out": failing({}),
    "one never trains, one never sends": failing({("a", "share"): silent, ("b", "mask"): silent}),
    "an answer is lost": failing({("a", "mask"): lost, ("c", "reveal"): lost}),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_coordinator_killed_anywhere_goes_on_with_the_same_sites_to_the_same_sum(
    tmp_path: Path, watch: Callable[[Points], None], kind: str
) -> None:
    names = tuple("abcdef") if kind != "nobody drops out" else tuple("abc")

    def made(at: int) -> MaskedWorld:
        return MaskedWorld(tmp_path / str(at), names)

    points = Points()
    watch(points)
    undisturbed = made(0)
    (expected,) = run(undisturbed, points, KilledLine(undisturbed, FAULTS[kind]))
    undisturbed.require_sum(expected)
    assert {"before asking", "before a write", "after the reply of c"} <= set(points.names)
    step = 1 if kind == "nobody drops out" else 3
    for at in range(1, len(points.names) + 1, step):
        world, ends = made(at), Points(at)
        watch(ends)
        first = KilledLine(world, FAULTS[kind])
        with pytest.raises(Killed):
            run(world, ends, first)
        watch(Points())
        second = KilledLine(world, FAULTS[kind])
        (found,) = run(world, Points(), second)
        where = f"killed at point {at}, {ends.names[-1]}"
        assert found.names == expected.names, where
        world.require_sum(found)
        assert set(world.answered.values()) == {1}, where
        assert {asked.attempt for _, asked in first.asked + second.asked} == {1}, where
        assert same_answers(first, second), where


def same_answers(first: Line, second: Line) -> bool:
    """Whether no site gave two different answers to what was asked twice."""
    before = {(a.phase, r.site): (a.body, r) for a, r in first.left if r.refusal is None}
    for asked, reply in second.left:
        body, known = before.get((asked.phase, reply.site), (b"", None))
        if known is None or reply.refusal is not None:
            continue
        if body != asked.body or known.body != reply.body:
            return False
        if octets(known) != octets(reply):
            return False
    return True


def octets(reply: PhaseReply) -> bytes:
    """Return the masked vector as it left; nothing without one."""
    return b"" if reply.masked is None else reply.masked[:].tobytes()


def test_in_groups_too(tmp_path: Path, watch: Callable[[Points], None]) -> None:
    """Also between the files of two groups: no group is left out."""
    names = [f"site-{number:02}" for number in range(16)]
    secure = SecureAggregation(enabled=True, groups=2)
    points = Points()
    watch(points)
    undisturbed = MaskedWorld(tmp_path / "0", names, secure)
    expected = [group.names for group in undisturbed.sums(Line(undisturbed))]
    assert len(points.names) == 2 * 2 * 6, "before each phase but one, and two large files more"
    for at in range(1, len(points.names) + 1):
        world = MaskedWorld(tmp_path / str(at), names, secure)
        watch(Points(at))
        with pytest.raises(Killed):
            world.sums(Line(world))
        watch(Points())
        sums = world.sums(Line(world))
        assert [group.names for group in sums] == expected, f"killed at write {at}"
        for group in sums:
            world.require_sum(group)
        assert set(world.answered.values()) == {1}


@pytest.mark.parametrize("phase", PHASES)
def test_a_round_goes_on_when_all_sites_were_started_anew_before_a_phase(
    tmp_path: Path, phase: str
) -> None:
    """Every request is to a site that was just started; here its answer to the first is lost."""
    world = MaskedWorld(tmp_path, on_disk=True)
    deaf = Line(world, failing({(name, phase): lost for name in world.names}))
    assert world.sums(deaf) == []
    again = Line(world)
    (group,) = world.sums(again)
    world.require_sum(group)
    assert group.names == tuple("abcde")
    assert set(world.answered.values()) == {1}
    assert same_answers(deaf, again)


def test_what_another_process_left_of_an_earlier_round_is_not_gone_on_with(tmp_path: Path) -> None:
    world = MaskedWorld(tmp_path)
    world.sums(Line(world))
    line = Line(world)
    (group,) = world.sums(line, world.ask(2))
    world.require_sum(group, world.ask(2))
    assert {asked.ask.round_number for _, asked in line.asked} == {2}


FILES = ("group-0001.json", "group-0001.envelopes.jsonl", "group-0001.sum.safetensors")


def without_a_line(path: Path) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


def another_shape(path: Path) -> None:
    arrays, about = files.read_tensors(path)
    files.write_tensors(path, {"total": arrays["total"][:-1]}, about)


def of_another_attempt(path: Path) -> None:
    content = path.read_bytes()
    for old in (b'"attempt":1', b'\\"attempt\\":1'):
        content = content.replace(old, old[:-1] + b"2")
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        *((name, lambda path: path.write_bytes(path.read_bytes()[:-3])) for name in FILES),
        *((name, lambda path: path.write_bytes(b"")) for name in FILES),
        *((name, Path.unlink) for name in FILES),
        *((name, of_another_attempt) for name in FILES[1:]),
        (FILES[1], without_a_line),
        (FILES[2], another_shape),
        (FILES[2], lambda path: files.write_tensors(path, {}, files.read_about(path))),
        (FILES[2], lambda path: files.write_tensors(path, files.read_tensors(path)[0], {})),
    ],
)
def test_a_broken_file_costs_the_round_at_most_and_reveals_nothing_new(
    tmp_path: Path, name: str, spoil: Callable[[Path], object]
) -> None:
    world = MaskedWorld(tmp_path)
    first = Line(world, failing({("b", "mask"): silent}))
    (whole,) = world.sums(first)
    folder = world.folder.masked
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    before = (folder / name).read_bytes()
    spoil(folder / name)
    assert not (folder / name).exists() or (folder / name).read_bytes() != before
    assert list(GroupFiles(folder).load(1)) == [] or spoil in (another_shape, without_a_line)
    second = Line(world)
    sums = world.sums(second)
    for group in sums:
        assert group.names == whole.names
        world.require_sum(group)
    assert same_answers(first, second)
    assert second.came("mask", 2) == []


def test_large_files_are_written_once_and_envelopes_not_verified_again(
    tmp_path: Path, watch: Callable[[Points], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    moved = Path.replace
    monkeypatch.setattr(
        Path, "replace", lambda self, to: written.append(to.name) or moved(self, to)
    )
    world = MaskedWorld(tmp_path)
    written.clear()
    deaf = failing({(name, "reveal"): lost for name in world.names})
    assert world.sums(Line(world, deaf)) == []
    assert written == [FILES[0], FILES[1], FILES[0], FILES[2], FILES[0], FILES[0]]

    def verified(*_: object) -> None:
        raise AssertionError("a signature was verified that this coordinator had verified before")

    with monkeypatch.context() as patched:
        patched.setattr(Envelope, "check", verified)
        (group,) = world.sums(Line(world))
    world.require_sum(group)


def test_a_roster_that_changed_meanwhile_begins_another_attempt(tmp_path: Path) -> None:
    """Nothing of the first is signed for it, and each site masks its stored vector anew."""
    world = MaskedWorld(tmp_path, tuple("abcde"))
    assert world.sums(Line(world, failing({(n, "mask"): silent for n in "abcde"}))) == []
    world.roster["f"] = PrivateKey.generate().public_key()
    line = Line(world)
    (group,) = world.sums(line)
    assert group.names == tuple("abcde")
    world.require_sum(group)
    assert {asked.attempt for _, asked in line.asked} == {2}
    assert set(world.answered.values()) == {1}


def test_files_are_written_before_the_phase_that_they_are_of_is_asked(tmp_path: Path) -> None:
    world = MaskedWorld(tmp_path, tuple("abc"))
    seen: dict[str, Any] = {}

    class Looking(Line):
        def phase(self, asks: Any, deadline: Any = None, answer_bytes: int = 0) -> Any:
            loaded = list(GroupFiles(world.folder.masked).load(1))
            phase = next(iter(asks.values())).phase
            seen[phase] = [(each.group.stage, each) for each in loaded]
            return super().phase(asks, deadline, answer_bytes)

    world.sums(Looking(world))
    assert seen.pop("advertise") == []
    for phase, ((stage, saved),) in seen.items():
        assert stage == phase
        assert len(saved.progress.adverts) == 3
        late = phase in ("confirm", "reveal")
        assert list(saved.envelopes) == (list("abc") if phase != "share" else [])
        assert saved.progress.senders == list(saved.envelopes)
        assert saved.progress.survivors == (list("abc") if late else [])
        assert (saved.total is not None) == late
        assert len(saved.progress.confirmations) == (3 if phase == "reveal" else 0)
