"""Runs that end before their time: the log says why, and the first error is the one to tell."""

from __future__ import annotations

import errno
import os

import pytest

from lepton_fed.errors import RunError
from lepton_fed.runs.events import EventLog, read_events
from lepton_fed.runs.folder import RunFolder, list_runs
from lepton_fed.simulations.sequential import simulate

CASES = [
    (RunError, OSError(errno.ENOSPC, "full"), "LF5209"),
    (KeyboardInterrupt, KeyboardInterrupt(), "LF5211"),
    (ZeroDivisionError, ZeroDivisionError(), "LF5212"),
]


def failing(error, at):
    """Write checkpoints up to a round; then fail where the disk would."""
    write, fsync = RunFolder.write_checkpoint, os.fsync

    def raising(_):
        raise error

    def written(self, number, *given):
        os.fsync = raising if number == at else fsync
        try:
            write(self, number, *given)
        finally:
            os.fsync = fsync

    return written


@pytest.mark.parametrize(("kind", "error", "code"), CASES)
def test_the_log_says_why(load, tmp_path, monkeypatch, kind, error, code):
    monkeypatch.setattr(RunFolder, "write_checkpoint", failing(error, at=2))
    with pytest.raises(kind):
        simulate(load())
    (folder,) = list_runs(tmp_path / "runs")
    last = read_events(folder.events)[-1]
    assert (last["event"], last["code"]) == ("run.failed", code)
    names = [path.name for path in (folder.path / "checkpoints").iterdir()]
    assert names == ["round-0001.safetensors"]
    assert folder.read_summary() is None


@pytest.mark.parametrize(("kind", "error", "code"), CASES)
def test_a_log_that_cannot_say_it_does_not_hide_the_first_error(
    load, tmp_path, monkeypatch, kind, error, code
):
    emit = EventLog.emit

    def full(self, event, **fields):
        if event == "run.failed":
            monkeypatch.setattr(os, "fsync", _no_space)
            raise RunError(())
        emit(self, event, **fields)

    monkeypatch.setattr(RunFolder, "write_checkpoint", failing(error, at=2))
    monkeypatch.setattr(EventLog, "emit", full)
    with pytest.raises(kind) as caught:
        simulate(load())
    if isinstance(caught.value, RunError):
        assert caught.value.code == code
    (folder,) = list_runs(tmp_path / "runs")
    assert read_events(folder.events)[-1]["event"] == "model.evaluated"


def test_a_summary_that_cannot_be_written_leaves_the_run_unfinished(load, tmp_path, monkeypatch):
    def full(self, summary):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(RunFolder, "write_summary", full)
    with pytest.raises(OSError, match="full"):
        simulate(load())
    (folder,) = list_runs(tmp_path / "runs")
    assert read_events(folder.events)[-1]["code"] == "LF5401"


def _no_space(_):
    raise OSError(errno.ENOSPC, "full")
