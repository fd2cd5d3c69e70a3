from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from io import StringIO
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from lepton_fed.errors import Refused
from lepton_fed.runs.progress import LineView, ProgressView, follow

if TYPE_CHECKING:
    from tests.unit.runs.conftest import Written

Make = Callable[[], "Written"]


def waits(*steps: Callable[[], Any]) -> Callable[[], None]:
    """Return a wait in which the run goes on, a step each time; one more would never end."""
    going: Iterator[Callable[[], Any]] = iter(steps)
    return lambda: next(going)() and None


def lines(stream: StringIO) -> list[str]:
    return [json.loads(line)["event"] for line in stream.getvalue().splitlines()]


def test_past_and_coming_events_are_shown_until_the_run_is_finished(written: Make) -> None:
    run, stream = written().started().round(1), StringIO()
    steps = (
        lambda: run.accepted(1, "north").closed(1),
        lambda: None,
        lambda: run.emit("run.finished", digest="d", metrics={}, seconds=1.0),
        run.close,
    )
    assert follow(run.folder, LineView(stream), waits(*steps)) == "finished"
    assert lines(stream) == [event["event"] for event in run.told]
    assert len(run.told) == 5


def test_half_a_line_is_shown_once_it_is_whole(written: Make) -> None:
    run, stream = written().started(), StringIO()
    whole = run.folder.events.read_bytes()
    seen: list[list[str]] = []

    def half() -> None:
        run.round(1)
        content = run.folder.events.read_bytes()
        with run.folder.events.open("r+b") as file:
            file.truncate(len(whole) + 20)
        seen.append(lines(stream))
        rest.append(content[len(whole) + 20 :])

    def other_half() -> None:
        seen.append(lines(stream))
        with run.folder.events.open("ab") as file:
            file.write(rest[0])

    rest: list[bytes] = []
    assert follow(run.folder, LineView(stream), waits(half, other_half, run.close)) == "interrupted"
    assert seen == [["run.started"], ["run.started"]]
    assert lines(stream) == ["run.started", "round.started"]


@pytest.mark.parametrize(
    ("last", "state"), [("run.failed", "failed"), ("round.below_quorum", "interrupted")]
)
def test_a_run_that_ended_before_its_time_is_told_by_its_last_event(
    written: Make, last: str, state: str
) -> None:
    run = written().started().emit(last, code="LF5004", round=1, usable=1, quorum=2)
    assert follow(run.folder, LineView(StringIO()), waits(run.close)) == state


def test_a_failure_that_was_resumed_from_is_not_the_end(written: Make) -> None:
    run = written().started().emit("run.failed", code="LF5209").close().open()
    stream = StringIO()
    steps = (lambda: run.emit("run.resumed", round=0), lambda: run.round(1), run.close)
    assert follow(run.folder, LineView(stream), waits(*steps)) == "interrupted"
    assert lines(stream)[-1] == "round.started"


def test_a_run_that_is_over_is_not_waited_for(written: Make) -> None:
    run = written().started().emit("run.failed", code="LF5004").close()
    assert follow(run.folder, LineView(StringIO()), waits()) == "failed"


def test_a_log_that_is_changed_meanwhile_is_refused(written: Make) -> None:
    run = written().started().round(1)

    def change() -> None:
        with run.folder.events.open("ab") as file:
            file.write(b'{"event":"run.finished"}\n')

    with pytest.raises(Refused, match="LF4301"):
        follow(run.folder, LineView(StringIO()), waits(change))


def test_a_terminal_gets_what_was_before_in_short_and_what_comes_in_full(written: Make) -> None:
    run = written().started().round(1)
    for site in ("north", "east"):
        run.refused(1, site, "LF4405", "NaN of before")
    run.closed(1, ("south",))
    stream = StringIO()
    console = Console(file=stream, force_terminal=True, width=120, color_system=None)
    with ProgressView(console) as view:
        steps = (lambda: run.refused(2, "east", "LF4405", "NaN of now"), run.close)
        assert follow(run.folder, view, waits(*steps)) == "interrupted"
    shown = stream.getvalue()
    assert "refused so far: 2; lepton-fed runs show says which" in shown
    assert "of before" not in shown
    assert "round 2: east: NaN of now (LF4405)" in shown
    assert "round 1/5" in shown
