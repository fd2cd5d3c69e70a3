"""The process that trains: what it prints, how it dies, and what is kept when it does."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lepton_fed.clients.own_rows import OwnRows
from lepton_fed.clients.site import Site
from lepton_fed.clients.training_child import TrainingChild
from lepton_fed.config.schema import Budget, Privacy, RecordPrivacy, Source
from lepton_fed.core.exchange import MODEL
from lepton_fed.core.task import Column, DataContract
from lepton_fed.data.dataset import Dataset
from lepton_fed.errors import LeptonError, RunError
from lepton_fed.strategies.base import DELTA, PlainSite
from lepton_fed.training.kit import build_kit
from tests.unit.clients.conftest import TASK, agreement_for, ask_for

LONG_S = 120.0


@pytest.fixture
def child_of():
    """Start children that are ended with the test."""
    children = []

    def start(conf, command=None):
        children.append(TrainingChild(conf, command))
        return children[-1]

    yield start
    for child in children:
        child.close()


def gone(pid):
    """Return whether a process ends soon."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state in "ZX":
            return True
        time.sleep(0.05)
    return False


def in_this_process(conf, agreement, ask):
    training, held_out = OwnRows(conf).split(agreement)
    kit = build_kit(agreement.task, agreement.seed)
    cpu = [torch.device("cpu")]
    folder = Path(conf.state)
    site = Site(
        "north", kit, PlainSite(), training, held_out, agreement, devices=cpu, folder=folder
    )
    return site.answer(ask)


@pytest.mark.usefixtures("plugins_installed")
def test_a_child_answers_as_a_site_does_whatever_its_plug_ins_print_and_reads_rows_once(
    conf, child_of, plugins_installed
):
    noisy = replace(conf, source=replace(conf.source, reader="noisy"))
    child = child_of(noisy)
    first = agreement_for(strategy="unruly")
    child.begin(first)
    plugins_installed.write_text("print")
    for number in (1, 2):
        ask = ask_for(first, number, evaluate=True)
        reply = child.answer("north", ask, LONG_S)
        assert reply.refusal is None
        assert reply.update.layout == ask.layout
        if number == 1:
            expected = in_this_process(conf, first, ask)
            assert reply.update.vectors[DELTA].tobytes() == expected.update.vectors[DELTA].tobytes()
            assert reply.update.norms == expected.update.norms
            assert np.array_equal(reply.counts, expected.counts)
    assert not plugins_installed.exists(), "it printed on standard output in the middle of it"
    second = agreement_for("run-2", seed=6)
    child.begin(second)
    assert child.answer("north", ask_for(second), LONG_S).update is not None
    stale = child.answer("north", ask_for(first, 3), LONG_S)
    assert stale.refusal.code == "LF4501", "one run at a time"
    reads = Path(f"{noisy.source.path}.reads")
    assert reads.read_text() == "read\n", "over rounds and runs"
    plugins_installed.write_text("read")
    third = agreement_for("run-3", strategy="unruly")
    child.begin(third)
    assert child.answer("north", ask_for(third), LONG_S).refusal.code == "LF5301"
    assert child.answer("north", ask_for(third), LONG_S).update is not None, "no byte was lost"


def test_a_child_says_what_its_open_ledger_has_left_now(conf, child_of):
    child = child_of(replace(conf, budget=Budget(epsilon=6.0)))
    plain = agreement_for()
    child.begin(plain)
    assert child.budget_left() is None, "no ledger is kept without DP"
    private = agreement_for("run-2", privacy=Privacy(RecordPrivacy(enabled=True, epsilon=3.0)))
    child.begin(private)
    left = child.budget_left()
    assert 3.0 <= left < 3.02, "what the run may cost is set aside"
    assert child.answer("north", ask_for(private), LONG_S).refusal is None
    child.begin(private)
    assert child.budget_left() == left


def test_training_that_takes_too_long_is_killed_with_all_it_started(
    conf, child_of, plugins_installed
):
    child = child_of(conf)
    agreement = agreement_for(strategy="unruly")
    child.begin(agreement)
    plugins_installed.write_text("hang")
    began = time.monotonic()
    with pytest.raises(RunError) as caught:
        child.answer("north", ask_for(agreement), 2.0)
    assert caught.value.code == "LF5310"
    assert time.monotonic() - began < 20
    pids = plugins_installed.with_suffix(".pids").read_text().split()
    assert [gone(pid) for pid in pids] == [True, True]
    child.begin(agreement)
    assert child.answer("north", ask_for(agreement, 2), LONG_S).update is not None


@pytest.mark.parametrize("word", ["kill", "crash"])
def test_a_child_that_dies_is_an_error_and_the_next_ask_finds_a_new_one(
    conf, child_of, plugins_installed, word
):
    child = child_of(conf)
    agreement = agreement_for(strategy="unruly")
    child.begin(agreement)
    plugins_installed.write_text(word)
    with pytest.raises(RunError) as caught:
        child.answer("north", ask_for(agreement), LONG_S)
    assert caught.value.code == "LF5311"
    child.begin(agreement)
    assert child.answer("north", ask_for(agreement), LONG_S).update is not None


def test_closing_ends_a_child_in_the_middle_of_an_answer_and_for_good(
    conf, child_of, plugins_installed
):
    child = child_of(conf)
    agreement = agreement_for(strategy="unruly")
    child.begin(agreement)
    plugins_installed.write_text("hang")
    codes = []

    def ask():
        with pytest.raises(RunError) as caught:
            child.answer("north", ask_for(agreement), LONG_S)
        codes.append(caught.value.code)

    asking = threading.Thread(target=ask)
    asking.start()
    pids = plugins_installed.with_suffix(".pids")
    while not pids.exists() or len(pids.read_text().split()) < 2:
        time.sleep(0.05)
    began = time.monotonic()
    child.close()
    asking.join(10)
    assert (codes, asking.is_alive()) == (["LF5311"], False)
    assert time.monotonic() - began < 8
    assert all(gone(pid) for pid in pids.read_text().split())
    with pytest.raises(RunError) as caught:
        child.begin(agreement)
    assert caught.value.code == "LF5313"


PARENT = """
    import sys, pathlib
    sys.path.insert(0, {tests!r})
    from lepton_fed.clients.training_child import TrainingChild
    from lepton_fed.core.decode import decode, strict_json
    from lepton_fed.config.schema import ClientConf
    from tests.unit.clients.conftest import agreement_for, ask_for

    child = TrainingChild(decode(ClientConf, strict_json(pathlib.Path({conf!r}).read_bytes())))
    agreement = agreement_for(strategy="unruly")
    child.begin(agreement)
    pathlib.Path({order!r}).write_text("hang")
    child.answer("north", ask_for(agreement), 600)
"""


def test_a_child_ends_when_its_parent_is_killed(conf, tmp_path, plugins_installed):
    from lepton_fed.core.digests import canonical_json

    (tmp_path / "conf.json").write_bytes(canonical_json(conf))
    words = {
        "tests": str(Path(__file__).parents[3]),
        "conf": str(tmp_path / "conf.json"),
        "order": str(plugins_installed),
    }
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(PARENT.format(**words))])
    try:
        pids = plugins_installed.with_suffix(".pids")
        until = time.monotonic() + LONG_S
        while (not pids.exists() or len(pids.read_text().split()) < 2) and time.monotonic() < until:
            time.sleep(0.05)
        trainer, helper = pids.read_text().split()
        assert parent.poll() is None
    finally:
        parent.kill()
        parent.wait()
    assert gone(trainer), "in the middle of a round"
    os.kill(int(helper), 9)


ECHO = """
    import sys
    from lepton_fed.clients.frames import read_frame, write_frame

    READY = {"layout": "l", "vectors": ["delta"], "size": 1, "counts": 1}
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while True:
        head, arrays = read_frame(source)
        said = {"refusal": None, "epsilon": None, "noise_multiplier": None}
        said |= {"counts": False, "again": False}
        said["update"] = {"layout": "l", "weight": 1.0, "norms": {}}
        write_frame(sink, {"ready": READY, **said}, {f"vector/{n}": a for n, a in arrays.items()})
"""
DEAF = "import time; time.sleep(600)"
GARBLED = "import os, time; os.write(1, b'hello, hello, hello'); time.sleep(600)"
LIAR = "import os, time; os.write(1, b'\\xff' * 100); time.sleep(600)"


def python(code):
    return [sys.executable, "-c", textwrap.dedent(code)]


def test_frames_larger_than_any_pipe_go_both_ways(conf, child_of):
    child = child_of(conf, python(ECHO))
    agreement = agreement_for()
    child.begin(agreement)
    large = np.arange(30_000_000, dtype=np.float32)
    ask = ask_for(agreement, vectors={MODEL: large, "c": large[:7]})
    reply = child.answer("north", ask, LONG_S)
    assert reply.update.vectors[MODEL].tobytes() == large.tobytes()
    assert np.array_equal(reply.update.vectors["c"], large[:7])


def test_a_child_that_reads_nothing_is_killed_at_the_limit(conf, child_of, monkeypatch):
    monkeypatch.setattr("lepton_fed.clients.training_child._BEGIN_S", 1.0)
    child = child_of(replace(conf, source=Source("x" * 10_000_000)), python(DEAF))
    with pytest.raises(RunError) as caught:
        child.begin(agreement_for())
    assert caught.value.code == "LF5310"


class Hung:
    """Takes a process for hung at the look of that number; notes what it was asked."""

    def __init__(self, looks):
        self.left, self.asked = looks, []

    def __call__(self, group, looks):
        self.asked.append(looks)
        return self

    def hung(self):
        self.left -= 1
        return self.left == 0


def test_a_child_that_hangs_is_killed_long_before_its_time_is_up(conf, monkeypatch):
    monkeypatch.setattr("lepton_fed.clients.training_child._LOOK_S", 0.01)
    watch = Hung(3)
    child = TrainingChild(conf, python(DEAF), watch=watch)
    with pytest.raises(RunError) as caught:
        child.begin(agreement_for())
    assert caught.value.code == "LF5314"
    assert watch.asked == [300], "a reader may wait for others"
    child.close()


def test_an_answer_is_watched_more_closely_than_the_reading_of_rows(conf, child_of):
    watch = Hung(-1)
    child = TrainingChild(conf, python(ECHO), watch=watch)
    agreement = agreement_for()
    child.begin(agreement)
    child.answer("north", ask_for(agreement), LONG_S)
    assert watch.asked == [300, 300, 60]
    child.close()


def test_a_child_that_another_may_do_better_than_is_replaced(conf, child_of):
    failed = '{"code": "LF5301", "what": "it failed"}'
    child = child_of(conf, python(ECHO.replace('"refusal": None', f'"refusal": {failed}')))
    agreement = agreement_for()
    pids = []
    for _ in range(3):
        child.begin(agreement)
        pids.append(child._process.pid)
        assert child.answer("north", ask_for(agreement), LONG_S).refusal.code == "LF5301"
    assert pids[0] == pids[1] != pids[2]
    assert gone(pids[0])


def test_a_child_that_cannot_begin_for_no_good_reason_is_replaced(conf, child_of):
    failed = '"problems": [{"code": "LF5301", "what": "it could not begin"}], "ready"'
    child = child_of(conf, python(ECHO.replace('"ready"', failed)))
    for _ in range(2):
        with pytest.raises(LeptonError) as caught:
            child.begin(agreement_for())
        assert caught.value.code == "LF5301"
        assert child._process is None


@pytest.mark.parametrize("code", [GARBLED, LIAR])
def test_bytes_that_are_no_frame_end_the_child(conf, child_of, code):
    child = child_of(conf, python(code))
    with pytest.raises(RunError) as caught:
        child.begin(agreement_for())
    assert caught.value.code == "LF5311"


def test_what_the_data_does_not_allow_comes_back_by_its_code_and_the_child_goes_on(conf, child_of):
    child = child_of(conf)
    columns = [*TASK.data.columns, Column("c")]
    wider = replace(TASK, data=DataContract(columns=columns, target=TASK.data.target))
    with pytest.raises(LeptonError) as caught:
        child.begin(agreement_for(task=wider))
    assert caught.value.code.startswith("LF20")
    pid = child._process.pid
    agreement = agreement_for()
    child.begin(agreement)
    assert child.answer("north", ask_for(agreement), LONG_S).update is not None
    assert child._process.pid == pid


def test_rows_are_split_as_a_simulation_splits_them(conf):
    from lepton_fed.core.seeds import generator
    from lepton_fed.data.partitioners import split_held_out

    agreement = agreement_for(seed=9)
    own = OwnRows(conf)
    rows = own.read(TASK.data)
    draws = generator(9, "held-out", site="north")
    expected = split_held_out(np.arange(50), conf.held_out, draws, rows.targets)
    for found, numbers in zip(own.split(agreement), expected, strict=True):
        assert isinstance(found, Dataset)
        assert found.inputs.tobytes() == rows.inputs[numbers].tobytes()
        assert found.targets.tobytes() == rows.targets[numbers].tobytes()
    other, _ = own.split(agreement_for(seed=10))
    assert other.digest != own.split(agreement)[0].digest


def test_a_data_set_is_what_the_owner_names_and_nothing_the_coordinator_picks(conf, tmp_path):
    own = OwnRows(conf)
    identity = own.identity
    own.split(agreement_for(seed=1))
    swapped = DataContract(columns=[Column("b"), Column("a")], target=TASK.data.target)
    own.split(agreement_for(seed=2, task=replace(TASK, data=swapped)))
    assert own.identity == identity == OwnRows(conf).identity
    moved = tmp_path / "moved.npz"
    moved.write_bytes(Path(conf.source.path).read_bytes())
    assert OwnRows(replace(conf, source=Source("npz", str(moved)))).identity == identity
    moved.write_bytes(moved.read_bytes() + b"x")
    assert OwnRows(replace(conf, source=Source("npz", str(moved)))).identity != identity
    assert OwnRows(replace(conf, source=Source("csv", conf.source.path))).identity != identity
    folder = tmp_path / "folder"
    (folder / "below").mkdir(parents=True)
    (folder / "below" / "rows").write_text("1")
    before = OwnRows(replace(conf, source=Source("idx", str(folder)))).identity
    (folder / "below" / "rows").rename(folder / "below" / "others")
    assert OwnRows(replace(conf, source=Source("idx", str(folder)))).identity != before


def test_a_child_that_was_started_before_it_is_needed_is_the_one_that_answers(conf, child_of):
    child = child_of(conf, python(ECHO))
    child.warm()
    pid = child._process.pid
    child.warm()
    assert child._process.pid == pid
    agreement = agreement_for()
    child.begin(agreement)
    assert child.answer("north", ask_for(agreement), LONG_S).update is not None
    assert child._process.pid == pid
    child._process.kill()
    child._process.wait()
    child.warm()
    assert child._process.pid != pid
    child.begin(agreement)
    assert child.answer("north", ask_for(agreement), LONG_S).update is not None
