from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from lepton_fed.cli import app
from lepton_fed.cli import runs as command
from lepton_fed.runs.events import EventLog
from lepton_fed.runs.folder import RunFolder


def run(*words: str, columns: int = 80) -> Result:
    return CliRunner().invoke(app, ["runs", *words], env={"COLUMNS": str(columns)})


def clock(minutes: float) -> Callable[[], str]:
    """A clock that stands at so many minutes ago."""
    then = datetime.now(UTC) - timedelta(minutes=minutes)
    return lambda: then.isoformat(timespec="milliseconds")


def make(
    name: str, *events: tuple[str, dict[str, Any]], minutes: float = 3.5, close: bool = True
) -> EventLog:
    folder = RunFolder(Path("runs") / name)
    folder.path.mkdir(parents=True)
    folder.conf.write_text("kind: simulation\n")
    log = EventLog(folder.events, clock=clock(minutes))
    for event, fields in events:
        log.emit(event, **fields)
    if close:
        log.close()
    return log


STARTED = ("run.started", {"rounds": 50, "sites": ["east", "north"]})
ROUND = ("round.started", {"round": 1, "rounds": 50, "cohort": ["east", "north"], "absent": []})
ACCEPTED = (
    "reply.accepted",
    {"round": 1, "site": "east", "bytes": 20480, "norm": 1.0, "epsilon": 0.25},
)
CLOSED = (
    "round.closed",
    {"round": 1, "rounds": 50, "sites": ["east"], "model": "m", "digest": "ab" * 32,
     "seconds": {}, "sent_bytes": 2 * 1024**2},
)  # fmt: skip
EVALUATED = ("model.evaluated", {"round": 1, "sites": ["east"], "metrics": {"accuracy": 0.5}})


def refused(number: int) -> tuple[str, dict[str, Any]]:
    why = f"[red]why[/] {number}"
    return ("reply.refused", {"round": number, "site": "north", "code": "LF4405", "why": why})


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("columns", [80, 120])
def test_each_run_takes_one_line_of_the_list_and_fits(columns: int) -> None:
    make("20261120T234531Z-digits-0001", STARTED, ROUND, ("run.failed", {"code": "LF5004"}))
    make("20261120T234532Z-digits-0002", STARTED, ROUND, CLOSED, EVALUATED)
    log = make("20261120T234533Z-digits-0003", STARTED, ROUND, CLOSED, EVALUATED, close=False)
    make("20261120T234534Z-digits-0004", STARTED)
    changed = Path("runs/20261120T234534Z-digits-0004/events.jsonl")
    changed.write_text(changed.read_text() * 2)
    make("20261120T234535Z-digits-0005")
    result = run("list", columns=columns)
    log.close()
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines() if "digits" in line]
    assert lines == [
        ["20261120T234531Z-digits-0001", "failed", "0/50", "2", "0", "s"],
        ["20261120T234532Z-digits-0002", "interrupted", "1/50", "2", "0.500", "0", "s", "abababab"],
        ["20261120T234533Z-digits-0003", "running", "1/50", "2", "0.500", "3", "min", "abababab"],
        ["20261120T234534Z-digits-0004", "damaged", "-", "-", "-"],
        ["20261120T234535Z-digits-0005", "interrupted", "-", "-", "-"],
    ]
    (heading,) = (line for line in result.stdout.splitlines() if " state " in line)
    assert heading.split() == ["run", "state", "round", "sites", "accuracy", "took", "digest"]
    assert all(len(line) <= columns for line in result.stdout.splitlines())


def test_without_room_for_them_the_last_columns_are_left_out_and_the_others_stay_whole() -> None:
    make("20261120T234532Z-a-long-name-0002", STARTED, ROUND, CLOSED, EVALUATED)
    other = ("model.evaluated", {"round": 1, "sites": ["east"], "metrics": {"r2": 0.5}})
    make("20261120T234533Z-a-long-name-0003", STARTED, ROUND, CLOSED, other)
    lines = run("list").stdout.splitlines()
    (line,) = (line for line in lines if "0003" in line)
    assert line.split() == [
        "20261120T234533Z-a-long-name-0003", "interrupted", "1/50", "2", "r2", "0.500", "0", "s"
    ]  # fmt: skip
    (line,) = (line for line in run("list", columns=74).stdout.splitlines() if "0003" in line)
    assert line.split()[-1] == "0.500"
    wide = run("list", columns=120).stdout
    assert re.search(r"0002 .* accuracy 0\.500 .*abababab", wide)
    assert re.search(r"0003 .* r2 0\.500 .*abababab", wide)


def test_the_json_of_a_list_has_what_the_table_has_no_room_for() -> None:
    make("20261120T234531Z-digits-0001", STARTED, ROUND, ("run.failed", {"code": "LF5004"}))
    events = Path("runs/20261120T234531Z-digits-0001/events.jsonl").read_text().splitlines()
    (row,) = json.loads(run("list", "--json").stdout)
    assert row == {
        "run": "20261120T234531Z-digits-0001", "state": "failed", "code": "LF5004", "round": 0,
        "rounds": 50, "sites": 2, "metrics": {}, "began": json.loads(events[0])["time"],
        "seconds": 0.0, "digest": "", "exported": False,
    }  # fmt: skip


@pytest.mark.parametrize("columns", [80, 120])
def test_a_running_run_shows_its_sites_and_whom_it_waits_for(columns: int) -> None:
    agreed = {"site": "east", "version": "0.1.0", "budget_left": 6.125}
    log = make(
        "20261120T234533Z-digits-0003", ("site.agreed", agreed), STARTED, ROUND, ACCEPTED,
        refused(1), CLOSED, (ROUND[0], ROUND[1] | {"round": 2}), close=False,
    )  # fmt: skip
    result = run("show", "last", columns=columns)
    log.close()
    assert result.exit_code == 0, result.output
    lines = [line.strip() for line in result.stdout.splitlines() if line.strip()]
    assert lines[0] == (
        "20261120T234533Z-digits-0003: running, 1 of 50 rounds; 7 events, chain whole"
    )
    assert re.fullmatch(r"began       .* UTC, 3 min ago; took 3 min so far", lines[1])
    assert re.fullmatch(r"last event  .* UTC, 3 min ago", lines[2])
    assert lines[3] == "waits for   east, north"
    east, north = lines[7:9]
    assert re.fullmatch(r"east +1/50 +[-\d:, ]+ min ago +0\.1\.0 +0\.25 +6\.12 +20\.0 KiB", east), (
        east
    )
    assert re.fullmatch(r"north +0/50 +[-\d:, ]+ min ago +- +- +- +0 B", north), north
    assert lines[9:] == [
        "north: refused 1 time; last refused: round 1: [red]why[/] 1 (LF4405)",
        "bytes       2.0 MiB sent, 20.0 KiB received",
        "round 1: north: [red]why[/] 1 (LF4405)",
    ]
    assert all(len(line) <= columns for line in result.stdout.splitlines())


def test_the_newest_refusals_are_shown_and_all_of_them_when_asked_for() -> None:
    make("20261120T234533Z-digits-0003", STARTED, *(refused(n) for n in range(1, 31)))
    lines = [line for line in run("show", "last").stdout.splitlines() if "why" in line]
    assert [line.split(":")[0] for line in lines[1:]] == [f"round {n}" for n in range(11, 31)]
    shown = run("show", "last").stdout
    assert "30 refusals, the newest 20 of them; --all prints all" in shown
    everything = run("show", "last", "--all").stdout
    assert everything.count("round 1: north: [red]why[/] 1 (LF4405)") == 1
    assert "--all" not in everything
    assert len(json.loads(run("show", "last", "--json").stdout)["refused"]) == 30


def test_a_run_that_refused_an_offer_says_so_without_a_round() -> None:
    refusal = {"site": "north", "code": "LF4603", "why": "rounds: 50 asked for"}
    make("20261120T234533Z-digits-0003", ("site.refused", refusal), STARTED)
    shown = run("show", "last").stdout
    assert "offer: north: rounds: 50 asked for (LF4603)" in shown
    last = "last refused: the offer of the run: rounds: 50 asked for (LF4603)"
    assert f"north: refused 1 time; {last}" in shown


def test_following_a_run_prints_its_events_as_json_lines_and_exits_as_the_run_ended() -> None:
    make("20261120T234531Z-digits-0001", STARTED, ROUND, ("run.failed", {"code": "LF5004"}))
    result = run("follow")
    assert result.exit_code == 5
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert [event["event"] for event in events] == ["run.started", "round.started", "run.failed"]
    assert "the run is failed" in result.stderr
    make("20261120T234532Z-digits-0002", STARTED)
    assert run("follow").exit_code == 5
    finished = ("run.finished", {"digest": "d", "metrics": {}, "seconds": 1.0})
    make("20261120T234533Z-digits-0003", STARTED, finished)
    result = run("follow")
    assert (result.exit_code, result.stderr) == (0, "")
    assert run("follow", "0001").exit_code == 5
    assert run("follow", "none").exit_code == 5


def test_following_a_run_that_goes_on_waits_for_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    log = make("20261120T234533Z-digits-0003", STARTED, close=False)
    waited: list[float] = []

    def goes_on(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 1:
            log.emit("round.started", round=1, rounds=50, cohort=[])
        elif len(waited) == 2:
            log.emit("run.finished", digest="d", metrics={}, seconds=1.0)
            log.close()

    monkeypatch.setattr(command.time, "sleep", goes_on)
    result = run("follow", "--json")
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 3
    assert waited == [0.2, 0.2]


def test_ctrl_c_ends_the_view_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    log = make("20261120T234533Z-digits-0003", STARTED, close=False)

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command.time, "sleep", interrupt)
    result = run("follow")
    log.close()
    assert (result.exit_code, result.stderr) == (130, "")


def test_a_view_that_nobody_reads_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    log = make("20261120T234533Z-digits-0003", STARTED, close=False)
    monkeypatch.setattr(command, "reader_left", lambda: True)
    assert run("follow").exit_code == 0
    log.close()


def test_a_changed_log_is_not_followed() -> None:
    make("20261120T234533Z-digits-0003", STARTED, ROUND)
    path = Path("runs/20261120T234533Z-digits-0003/events.jsonl")
    path.write_bytes(path.read_bytes().replace(b'"rounds":50', b'"rounds":51', 1))
    result = run("follow")
    assert result.exit_code == 4
    assert "LF4301" in result.stderr


def test_a_terminal_gets_a_progress_line_and_how_it_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Terminal(StringIO):
        def isatty(self) -> bool:
            return True

    finished = ("run.finished", {"digest": "d", "metrics": {}, "seconds": 1.0})
    make("20261120T234533Z-digits-0003", STARTED, ROUND, ACCEPTED, CLOSED, finished)
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    command.follow("last", Path("runs"), as_json=False)
    shown = screen.getvalue()
    assert shown.startswith("follows 20261120T234533Z-digits-0003; Ctrl-C ends the view")
    assert "1 of 50 rounds; 5 events, chain whole" in shown
    assert "{" not in shown
