"""What would spend a budget twice: changed ledgers, full disks, and kill -9 at the worst moment."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys

import pytest

from lepton_fed.core.digests import canonical_json
from lepton_fed.errors import BudgetExceeded, Refused
from lepton_fed.privacy.dp.accounting import SampledGaussian, epsilon_of
from lepton_fed.privacy.ledger import Ledger

DATASET = "d" * 64
EVENTS = [SampledGaussian(1.0, 0.05, steps) for steps in (20, 11, 30)]
DELTA = 1e-5


def opened(path, epsilon=50.0):
    return Ledger(path, dataset=DATASET, epsilon=epsilon, delta=DELTA)


def charge(ledger, event):
    return ledger.charge(event, {"run": "r", "round": 1, "task": "t"})


def spent(path):
    ledger = opened(path)
    try:
        return ledger.spent
    finally:
        ledger.close()


def cost(events):
    return epsilon_of(events, DELTA)


@pytest.fixture
def path(tmp_path):
    """A ledger of three lines."""
    path = tmp_path / "ledger.jsonl"
    ledger = opened(path)
    for event in EVENTS:
        charge(ledger, event)
    ledger.close()
    return path


def refusal(path):
    before = path.read_bytes()
    with pytest.raises(Refused) as caught:
        opened(path)
    assert path.read_bytes() == before, "what is found changed is evidence: it stays as it is"
    (problem,) = caught.value.problems
    return problem


def test_a_flip_of_any_byte_is_found(path):
    whole = path.read_bytes()
    truth = spent(path)
    unnoticed = []
    for place in range(len(whole)):
        for mask in (0x01, 0x20):
            changed = bytearray(whole)
            changed[place] ^= mask
            path.write_bytes(changed)
            try:
                opened(path).close()
            except Refused:
                continue
            unnoticed.append((place, mask))
    assert not unnoticed
    path.write_bytes(whole)
    assert spent(path) == truth


def rehashed(line, **changes):
    """A line changed by somebody who does not forget its own hash."""
    record = {**json.loads(line), **changes}
    record.pop("hash")
    record["hash"] = hashlib.sha256(canonical_json(record)).hexdigest()
    return canonical_json(record) + b"\n"


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        (lambda one, two, three: one + three, 2),
        (lambda one, two, three: two + three, 1),
        (lambda one, two, three: one + three + two, 2),
        (lambda one, two, three: one + two + two + three, 3),
        (lambda one, two, three: one + two + three + three, 4),
        (lambda one, two, three: one + two + b"\n" + three, 3),
        (lambda one, two, three: one + b"{}\n" + two + three, 2),
        (lambda one, two, three: one + b"[]\n" + two + three, 2),
        (lambda one, two, three: one + b"null\n" + two + three, 2),
        (lambda one, two, three: b"\xff\xfe\n" + one + two + three, 1),
        (lambda one, two, three: one + b" " + two + three, 2),
        (lambda one, two, three: one.replace(b"\n", b"\r\n") + two + three, 1),
        (lambda one, two, three: one + rehashed(two, steps=1) + three, 3),
        (lambda one, two, three: one + two + rehashed(three, steps=-40), 3),
        (lambda one, two, three: one + two + rehashed(three, sampling_rate=0.0), 3),
        (lambda one, two, three: one + two + rehashed(three, noise_multiplier="much"), 3),
        (lambda one, two, three: one + two + rehashed(three, noise_multiplier=10**400), 3),
        (lambda one, two, three: one + two + rehashed(three, sampler="shuffled"), 3),
        (lambda one, two, three: one + two + rehashed(three, adjacency="replace-one"), 3),
        (lambda one, two, three: one + two + rehashed(three, previous="0" * 64), 3),
    ],
)
def test_lines_that_are_missing_moved_doubled_or_made_up_are_found(path, changed, line):
    path.write_bytes(changed(*path.read_bytes().splitlines(keepends=True)))
    problem = refusal(path)
    assert problem.code == "LF4204"
    assert problem.where == f"{path}:{line}"


def test_a_line_of_another_data_set_is_found_though_its_hashes_fit(path):
    one, two, three = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(one + two + rehashed(three, dataset="e" * 64))
    problem = refusal(path)
    assert (problem.code, problem.where) == ("LF4205", f"{path}:3")


def test_a_last_line_cut_off_anywhere_is_dropped_and_the_others_stand(path):
    one, two, three = path.read_bytes().splitlines(keepends=True)
    for kept in range(1, len(three) - 1):
        path.write_bytes(one + two + three[:kept])
        assert spent(path) == cost(EVENTS[:2])
        assert path.read_bytes() == one + two


def test_a_last_line_that_only_lacks_its_end_counts(path):
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    ledger = opened(path)
    assert ledger.spent == cost(EVENTS)
    assert path.read_bytes() == whole
    charge(ledger, EVENTS[0])
    ledger.close()
    assert spent(path) == cost([*EVENTS, EVENTS[0]])


def test_the_ledger_goes_on_after_a_line_that_was_cut_off(path):
    path.write_bytes(path.read_bytes() + b'{"about":{"ro')
    ledger = opened(path)
    charge(ledger, EVENTS[1])
    ledger.close()
    assert spent(path) == cost([*EVENTS, EVENTS[1]])


def fail(code):
    def broken(*given):
        raise OSError(code, os.strerror(code))

    return broken


def half(file, content, write=os.write):
    """Write a part, then run out of space."""
    write(file, bytes(content)[:40])
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("call", "broken", "counted"),
    [
        ("write", fail(errno.ENOSPC), False),
        ("write", half, False),
        # The line is in the file: it may have reached the disk, so it counts from then on.
        ("fsync", fail(errno.EIO), True),
    ],
)
def test_a_charge_that_cannot_be_written_is_refused_for_good(
    path, monkeypatch, call, broken, counted
):
    ledger = opened(path)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, broken)
        with pytest.raises(Refused) as caught:
            charge(ledger, EVENTS[0])
    assert caught.value.code == "LF4202"
    assert not isinstance(caught.value, BudgetExceeded)
    # The disk has room again, but what the file holds is not what the process believes.
    after = path.read_bytes()
    with pytest.raises(Refused, match="LF4202"):
        charge(ledger, EVENTS[0])
    assert path.read_bytes() == after
    ledger.close()
    expected = cost([*EVENTS, EVENTS[0]]) if counted else cost(EVENTS)
    assert spent(path) == expected
    again = opened(path)
    charge(again, EVENTS[1])
    again.close()
    assert spent(path) > expected


def test_a_short_write_is_completed(path, monkeypatch):
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, content: write(file, bytes(content)[:7]))
        ledger = opened(path)
        charge(ledger, EVENTS[1])
        ledger.close()
    assert spent(path) == cost([*EVENTS, EVENTS[1]])


def test_a_symbolic_link_is_not_followed(path, tmp_path):
    link = tmp_path / "link.jsonl"
    link.symlink_to(path)
    with pytest.raises(Refused) as caught:
        opened(link)
    assert caught.value.code == "LF4206"
    link.unlink()
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(Refused):
        opened(link)
    assert not (tmp_path / "nowhere").exists()


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "file" / "ledger.jsonl"):
        with pytest.raises(Refused) as caught:
            opened(path)
        assert (caught.value.code, caught.value.problems[0].where) == ("LF4206", str(path))


def test_a_ledger_put_in_place_of_an_open_one_is_not_charged(path, tmp_path):
    """What was locked and read is what is written, whatever the path names by then."""
    ledger = opened(path)
    path.rename(tmp_path / "aside")
    path.touch()
    charge(ledger, EVENTS[0])
    ledger.close()
    assert path.read_bytes() == b""
    assert spent(tmp_path / "aside") == cost([*EVENTS, EVENTS[0]])


_SITE = """
import os, signal, sys
from pathlib import Path
from lepton_fed.privacy import ledger as module
from lepton_fed.privacy.dp.accounting import SampledGaussian
from lepton_fed.privacy.ledger import Ledger

module.epsilon_of = lambda events, delta: 1.0  # within the budget, and at once
moment = sys.argv[2]
ledger = Ledger(Path(sys.argv[1]), dataset="d" * 64, epsilon=50.0, delta=1e-5)
write, fsync = os.write, os.fsync
def die(*given):
    os.kill(os.getpid(), signal.SIGKILL)
def torn(file, content):
    write(file, bytes(content)[:60])
    die()
if moment == "before the write":
    os.write = die
if moment == "in the write":
    os.write = torn
if moment == "before the sync":
    os.fsync = die
ledger.charge(SampledGaussian(1.0, 0.05, 7), {"run": "r", "round": 4, "task": "t"})
if moment == "before the training":
    die()
print("trained", flush=True)
die()
"""


@pytest.mark.parametrize(
    ("moment", "counted", "trained"),
    [
        ("before the write", False, False),
        ("in the write", False, False),
        ("before the sync", True, False),
        ("before the training", True, False),
        ("after the training", True, True),
    ],
)
def test_a_kill_may_count_too_much_and_never_too_little(path, moment, counted, trained):
    done = subprocess.run(
        [sys.executable, "-c", _SITE, path, moment], capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.stdout == ("trained\n" if trained else "")
    events = [*EVENTS, SampledGaussian(1.0, 0.05, 7)] if counted else EVENTS
    assert counted or not trained
    assert spent(path) == cost(events)
