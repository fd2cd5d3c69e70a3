"""Runs in real processes that meet a full disk, a reader who leaves, Ctrl-C or kill -9."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lepton_fed.runs.events import EventLog, read_events

SIMULATE = [
    sys.executable, "-m", "lepton_fed", "simulate", "privacy.record.enabled=false",
    "privacy.secure_aggregation.enabled=false", "task.model={name: linear}",
]  # fmt: skip


@pytest.fixture
def project(tmp_path: Path) -> Path:
    subprocess.run([sys.executable, "-m", "lepton_fed", "init"], cwd=tmp_path, check=True,
                   capture_output=True)  # fmt: skip
    return tmp_path


def run_of(project: Path) -> Path:
    (folder,) = project.glob("runs/*")
    return folder


def state_of(project: Path) -> str:
    words = [sys.executable, "-m", "lepton_fed", "runs", "list", "--json"]
    listed = subprocess.run(words, cwd=project, capture_output=True, check=True).stdout
    (row,) = json.loads(listed)
    return str(row["state"])


def small_files(limit: int) -> Callable[[], None]:
    """Let no file of a process grow beyond so many bytes: a full disk that needs no root."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


@pytest.mark.parametrize(
    ("limit", "culprit"), [(2000, "round-0001.safetensors"), (6000, "events.jsonl")]
)
def test_a_full_disk_ends_a_run_with_one_screen_and_a_whole_record(
    project: Path, limit: int, culprit: str
) -> None:
    done = subprocess.run(
        [*SIMULATE, "rounds.count=9"], cwd=project, preexec_fn=small_files(limit),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 5, done.stderr
    screen = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    assert screen[0].endswith(culprit)
    assert "File too large [LF5209]" in screen[1]
    assert "free disk space" in screen[2]
    folder = run_of(project)
    assert list(folder.rglob("*.partial")) == []
    events = read_events(folder / "events.jsonl")
    assert (folder / "events.jsonl").read_bytes().endswith(b"\n")
    if culprit != "events.jsonl":
        assert (events[-1]["event"], events[-1]["code"]) == ("run.failed", "LF5209")
    failed = events[-1]["event"] == "run.failed"  # there may be no room for that line either
    assert state_of(project) == ("failed" if failed else "interrupted")


@pytest.mark.parametrize("closed", ["2>&1 | head -1", "2>&- | head -1", ">&-", ">&- 2>&-"])
def test_nobody_who_watches_can_end_a_run(project: Path, closed: str) -> None:
    words = " ".join(f"'{word}'" for word in [*SIMULATE, "rounds.count=2"])
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {words} {closed}"], cwd=project, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert state_of(project) == "finished"


def stopped(project: Path, how: signal.Signals) -> tuple[int, str]:
    """Start a long run and stop it as soon as its first round is closed."""
    process: Any = subprocess.Popen(
        # Few enough rounds to end by themselves if nothing stops them; and a parent that ignores
        # Ctrl-C, as a shell does for what it runs in the background, must not hand that down.
        [*SIMULATE, "rounds.count=1000"], cwd=project, stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    with process:
        for line in process.stderr:
            if '"round.closed"' in line:
                break
        os.kill(process.pid, how)
        rest = process.stderr.read()
    return process.returncode, rest


def test_ctrl_c_is_written_down(project: Path) -> None:
    code, told = stopped(project, signal.SIGINT)
    assert code == 130
    assert told.endswith("interrupted\n")
    last = read_events(run_of(project) / "events.jsonl")[-1]
    assert (last["event"], last["code"]) == ("run.failed", "LF5211")
    assert list(run_of(project).rglob("*.partial")) == []


def test_a_killed_runs_log_is_read_and_continued(project: Path) -> None:
    code, _ = stopped(project, signal.SIGKILL)
    assert code == -signal.SIGKILL
    path = run_of(project) / "events.jsonl"
    with path.open("ab") as file:
        file.write(b'{"cohort":["east","no')  # where the next line was cut off
    words = [sys.executable, "-m", "lepton_fed", "runs", "show", "last"]
    shown = subprocess.run(words, cwd=project, capture_output=True, text=True, check=True).stdout
    assert ": interrupted, " in shown
    events = read_events(path)
    log = EventLog(path)
    log.close()
    assert path.read_bytes().count(b"\n") == len(events)
    assert path.read_bytes().endswith(b"\n")
