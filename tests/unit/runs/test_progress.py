from __future__ import annotations

import json
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from lepton_fed.runs.progress import LineView, ProgressView, headline, view_for


def event(name: str, **fields: Any) -> dict[str, Any]:
    return {**fields, "event": name, "time": "2026-01-01T00:00:00Z", "previous": "0" * 64}


RUN = [
    event("run.started", rounds=5, run="r"),
    event("round.started", round=1, rounds=5, cohort=["a", "b"]),
    event("reply.accepted", round=1, site="a", bytes=8, norm=0.5, epsilon=0.75),
    event("reply.accepted", round=1, site="b", bytes=8, norm=0.5, epsilon=0.5),
    event("reply.accepted", round=1, site="c", bytes=8, norm=0.5, epsilon=None),
    event("model.evaluated", round=0, metrics={"loss": 0.9, "accuracy": 0.8125}, sites=["a"]),
    event("round.closed", round=1, rounds=5, sites=["a", "b"], model="m", digest="d"),
]


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def terminal() -> tuple[Console, StringIO]:
    stream = StringIO()
    return Console(file=stream, force_terminal=True, width=140, color_system=None), stream


def last_line(events: list[dict[str, Any]]) -> str:
    """What the progress line shows in the end."""
    console, stream = terminal()
    with ProgressView(console) as view:
        for each in events:
            view(each)
    return [line for line in stream.getvalue().splitlines() if "round" in line][-1]


def test_a_line_view_writes_one_json_object_an_event() -> None:
    stream = StringIO()
    with LineView(stream) as view:
        for each in RUN:
            view(each)
        view(event("reply.refused", why='two\nlines "quoted"\u2028', site="ä"))
    lines = stream.getvalue().split("\n")
    assert lines.pop() == ""
    found = [json.loads(line) for line in lines]
    assert [each["event"] for each in found] == [
        *(each["event"] for each in RUN),
        "reply.refused",
    ]
    assert found[-1]["why"] == 'two\nlines "quoted"\u2028'
    assert found[2] == {k: v for k, v in RUN[2].items() if k != "previous"}


def test_a_log_line_begins_with_time_and_event() -> None:
    stream = StringIO()
    LineView(stream)(RUN[0])
    assert stream.getvalue().startswith('{"time":"2026-01-01T00:00:00Z","event":"run.started",')


def test_a_log_line_is_there_at_once() -> None:
    class Buffered(StringIO):
        flushed = 0

        def flush(self) -> None:
            self.flushed += 1

    stream = Buffered()
    LineView(stream)(RUN[0])
    assert stream.flushed == 1


def test_a_progress_line_shows_round_sites_metric_and_epsilon() -> None:
    last = last_line(RUN)
    assert last.lstrip("\r\x1b[2K").startswith("round 1/5")
    assert "2 sites" in last
    assert "accuracy 0.812" in last
    assert "epsilon 0.75" in last  # the largest of any site


def test_a_progress_line_goes_away_when_the_run_is_over() -> None:
    console, stream = terminal()
    with ProgressView(console) as view:
        for each in RUN:
            view(each)
        shown = stream.getvalue()
    after = stream.getvalue()[len(shown) :]
    assert "\x1b[2K" in after  # erases the line
    assert "\x1b[?25h" in after  # and shows the cursor again


def test_the_cursor_comes_back_when_a_run_fails() -> None:
    console, stream = terminal()

    def interrupted() -> None:
        with ProgressView(console) as view:
            view(RUN[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert stream.getvalue().rindex("\x1b[?25h") > stream.getvalue().rindex("\x1b[?25l")


@pytest.mark.parametrize("name", ["reply.refused", "counts.refused"])
def test_a_refused_reply_is_said_above_the_progress_line(name: str) -> None:
    console, stream = terminal()
    with ProgressView(console) as view:
        view(RUN[0])
        view(event(name, round=2, site="b", code="LF4405", why="vector '[red]delta[/]' holds NaN"))
    text = "round 2: b: vector '[red]delta[/]' holds NaN (LF4405)"
    assert text in stream.getvalue()


def test_a_round_below_its_quorum_is_said() -> None:
    console, stream = terminal()
    with ProgressView(console) as view:
        view(event("round.below_quorum", round=3, usable=1, quorum=2))
    assert "round 3: 1 usable updates, quorum 2; the model stays as it was" in stream.getvalue()


@pytest.mark.parametrize(
    ("quantile", "text"),
    [
        (None, "a mean of 9 updates clipped to 0.5"),
        (0.8, "updates clipped to 0.5 at first, and then to the 0.8 quantile of their norms"),
    ],
)
def test_what_client_level_dp_takes_is_said(quantile: float | None, text: str) -> None:
    console, stream = terminal()
    planned = {"epsilon": 8.0, "mean_deviation": 0.1, "cohort": 9, "clip": 0.5}
    with ProgressView(console) as view:
        view(event("client_dp.planned", **planned, quantile=quantile))
    said = " ".join(stream.getvalue().split())
    assert text in said
    assert ("quantile" in said) is (quantile is not None)


def test_a_changed_roster_is_said() -> None:
    console, stream = terminal()
    with ProgressView(console) as view:
        view(event("roster.changed", version=4, removed=[], renewed=["b"], added=["c", "d"]))
    assert "roster version 4: new keys of b; from the next run on c, d" in stream.getvalue()


def test_a_model_that_is_not_finite_is_said() -> None:
    console, stream = terminal()
    with ProgressView(console) as view:
        view(event("round.model_not_finite", round=4))
    text = "round 4: the strategy made NaN or infinities; the model stays as it was"
    assert text in stream.getvalue()


class Broken(StringIO):
    """A stream that takes one line, and then nobody reads."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error, self.asked = error, 0

    def write(self, text: str) -> int:
        self.asked += 1
        if self.asked > 1:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(28, "full"), ValueError("closed")])
def test_a_line_view_goes_silent_when_nobody_takes_its_lines(error: Exception) -> None:
    stream = Broken(error)
    with LineView(stream) as view:
        for each in RUN:
            view(each)
    assert stream.asked == 2
    assert len(stream.getvalue().splitlines()) == 1


def test_a_stream_that_is_not_there_takes_nothing() -> None:
    with view_for(None) as view:
        for each in RUN:
            view(each)
    assert isinstance(view, LineView)


def test_an_event_that_is_not_shown_changes_nothing() -> None:
    unshown = [
        event("run.finished", digest="d", metrics={"accuracy": 1.0}, seconds=1.0),
        event("something.new", round=4, sites=[], epsilon=9.0),
    ]
    assert last_line(RUN + unshown) == last_line(RUN)


def test_a_terminal_gets_a_progress_line_and_a_pipe_log_lines() -> None:
    assert isinstance(view_for(Terminal()), ProgressView)
    assert isinstance(view_for(StringIO()), LineView)


@pytest.mark.parametrize(
    ("metrics", "text"),
    [
        ({"loss": 1.0, "accuracy": 0.5}, "accuracy 0.500"),
        ({"loss": 0.25, "mae": 2, "r2": 0.125}, "r2 0.125"),
        ({"loss": 0.25}, "loss 0.250"),
        ({"macro_f1": 1.0}, ""),
        ({}, ""),
    ],
)
def test_one_metric_stands_for_all(metrics: dict[str, float], text: str) -> None:
    assert headline(metrics) == text
