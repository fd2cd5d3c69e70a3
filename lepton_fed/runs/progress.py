"""What a person sees of a run while it goes on: a progress line, or one log line an event."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from lepton_fed.runs.events import Event, GrowingLog, is_written, read_events
from lepton_fed.runs.folder import RunFolder
from lepton_fed.runs.status import State, end_of

__all__ = ["LineView", "ProgressView", "follow", "headline", "headline_name", "view_for"]

_SHOWN_FIRST = ("accuracy", "r2", "mae", "loss")
_CHAIN = ("previous", "time", "event")


class LineView:
    """Writes one JSON object a line for each event: for log collectors and pipes.

    It goes silent when nobody takes its lines any more: a run does not end because a pipe did.

    Args:
        stream: Where to; None, as ``sys.stderr`` of a process without one, for nowhere.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def __enter__(self) -> LineView:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def catch_up(self, events: Sequence[Event]) -> None:
        """Write what happened before anybody watched."""
        for event in events:
            self(event)

    def __call__(self, event: Event) -> None:
        """Write an event."""
        if self._stream is None:
            return
        fields = {key: value for key, value in event.items() if key not in _CHAIN}
        line = {"time": event["time"], "event": event["event"], **fields}
        text = json.dumps(line, separators=(",", ":"), ensure_ascii=False) + "\n"
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # a ValueError when it was closed
            self._stream = None


class ProgressView:
    """Shows round, sites, metric, epsilon and time left on a terminal.

    Args:
        console: The terminal.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[sites]}"),
            TextColumn("{task.fields[metric]}"),
            TextColumn("{task.fields[epsilon]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task(
            "round", total=None, sites="", metric="", epsilon="", start=True
        )
        self._epsilon = 0.0

    def __enter__(self) -> ProgressView:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def catch_up(self, events: Sequence[Event]) -> None:
        """Show what happened before anybody watched: where the run is, and no line for each."""
        for event in events:
            self._move(event)
        refused = sum(event["event"] in ("reply.refused", "counts.refused") for event in events)
        if refused:
            self._say(f"refused so far: {refused}; lepton-fed runs show says which")

    def __call__(self, event: Event) -> None:
        """Show what an event changes, and say what a person should know of."""
        self._move(event)
        note = _NOTES.get(event["event"])
        if note is not None:
            self._say(note(event))

    def _move(self, event: Event) -> None:
        name = event["event"]
        if name == "run.started":  # a coordinator's second run begins anew
            self._epsilon = 0.0
            self._progress.reset(self._task, total=event["rounds"], sites="", metric="", epsilon="")
            self._progress.start()
        elif name == "run.resumed":
            self._progress.start()
        elif name == "round.closed":
            self._progress.update(
                self._task,
                total=event["rounds"],
                completed=event["round"],
                sites=f"{len(event['sites'])} sites",
            )
        elif name == "reply.accepted" and event.get("epsilon") is not None:
            self._epsilon = max(self._epsilon, float(event["epsilon"]))
            self._progress.update(self._task, epsilon=f"epsilon {self._epsilon:.2f}")
        elif name == "model.evaluated":
            self._progress.update(self._task, metric=headline(event["metrics"]))
        elif name in ("run.finished", "run.failed"):
            self._progress.stop()

    def _say(self, line: str) -> None:
        self._console.print(line, style="yellow", markup=False, highlight=False)


def _roster(event: Event) -> str:
    """Return in words what a new roster changes."""
    kinds = {"removed": "removed", "renewed": "new keys of", "added": "from the next run on"}
    parts = [f"{words} {', '.join(event[kind])}" for kind, words in kinds.items() if event[kind]]
    return f"roster version {event['version']}: {'; '.join(parts)}"


def _followed(event: Event) -> str:
    """Return in words what the norm follows that updates are clipped to; empty where it stays."""
    quantile = event.get("quantile")
    return f" at first, and then to the {quantile:g} quantile of their norms" if quantile else ""


_NOTES: Mapping[str, Callable[[Event], str]] = {
    "sites.awaited": lambda e: f"waiting for {', '.join(e['sites'])}",
    "roster.changed": _roster,
    "site.refused": lambda e: f"offer: {e['site']}: {e['why']} ({e['code']})",
    "reply.refused": lambda e: f"round {e['round']}: {e['site']}: {e['why']} ({e['code']})",
    "counts.refused": lambda e: f"round {e['round']}: {e['site']}: {e['why']} ({e['code']})",
    "reply.late": lambda e: (
        f"round {e['round']}: {e['site']}: its reply of round {e['asked_in_round']} came too late"
    ),
    "secagg.planned": lambda e: (
        f"updates are masked: {e['bits']}-bit ring, grid {e['grid']:.1e}, at most "
        f"{e['most_bits_lost_to_weight']:g} bits lost to weights, {e['bytes']:,} bytes an update"
    ),
    "client_dp.planned": lambda e: (
        f"a site's whole part costs epsilon {e['epsilon']:.3g}: noise of {e['mean_deviation']:.2g} "
        f"on each coordinate of a mean of {e['cohort']} updates clipped to {e['clip']:g}"
        f"{_followed(e)}"
    ),
    "secagg.abandoned": lambda e: f"round {e['round']}: no sum could be made: {e['why']}",
    "secagg.counts_refused": lambda e: f"round {e['round']}: counts: {e['why']} ({e['code']})",
    "round.below_quorum": lambda e: (
        f"round {e['round']}: {e['usable']} usable updates, quorum {e['quorum']}; the model stays "
        "as it was"
    ),
    "round.model_not_finite": lambda e: (
        f"round {e['round']}: the strategy made NaN or infinities; the model stays as it was"
    ),
    "run.resumed": lambda e: f"resumed after round {e['round']}",
}


def follow(run: RunFolder, view: ProgressView | LineView, wait: Callable[[], None]) -> State:
    """Show a run's events as they are written, until nobody writes them any more.

    Args:
        run: Its folder.
        view: Shows them; those of before first, together.
        wait: Waits until it is worth another look.

    Returns:
        How it ended: finished, failed or interrupted.

    Raises:
        Refused: The event log was changed.
        RunError: It cannot be read.
    """
    summary = run.read_summary()
    if summary is not None:
        read_events(run.events, summary.events)
    log = GrowingLog(run.events)
    seen: list[Event] = []
    watched = False
    while True:
        # Asked first: when nobody writes, what is read next is all there is.
        written = is_written(run.events)
        events = log.take()
        if watched:
            for event in events:
                view(event)
        else:
            view.catch_up(events)
        watched = True
        seen += events
        if not written:
            return end_of(seen)
        wait()


def view_for(stream: TextIO | None) -> ProgressView | LineView:
    """Return a progress line for a terminal, log lines for anything else.

    Args:
        stream: Where to; None for nowhere.
    """
    if stream is not None and stream.isatty():
        return ProgressView(Console(file=stream))
    return LineView(stream)


def headline(metrics: Mapping[str, float]) -> str:
    """Return the one metric that stands for all, as text; empty without any."""
    name = headline_name(metrics)
    return f"{name} {metrics[name]:.3f}" if name else ""


def headline_name(metrics: Mapping[str, float]) -> str:
    """Return the name of the one metric that stands for all; empty without any."""
    return next((name for name in _SHOWN_FIRST if name in metrics), "")
