"""What a person sees of a run while it goes on: a progress line, or one log line an event."""

from __future__ import annotations

import json
from collections.abc import Mapping
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

from lepton_fed.runs.events import Event

__all__ = ["LineView", "ProgressView", "headline", "view_for"]

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

    def __call__(self, event: Event) -> None:
        """Show what an event changes."""
        name = event["event"]
        if name == "run.started":
            self._progress.update(self._task, total=event["rounds"])
        elif name == "round.closed":
            self._progress.update(
                self._task, completed=event["round"], sites=f"{len(event['sites'])} sites"
            )
        elif name == "reply.accepted" and event.get("epsilon") is not None:
            self._epsilon = max(self._epsilon, float(event["epsilon"]))
            self._progress.update(self._task, epsilon=f"epsilon {self._epsilon:.2f}")
        elif name == "model.evaluated":
            self._progress.update(self._task, metric=headline(event["metrics"]))
        elif name in ("run.finished", "run.failed"):
            self._progress.stop()
        elif name in ("reply.refused", "counts.refused"):
            self._console.print(
                f"round {event['round']}: {event['site']}: {event['why']} ({event['code']})",
                style="yellow",
                markup=False,
                highlight=False,
            )
        elif name == "round.below_quorum":
            self._console.print(
                f"round {event['round']}: {event['usable']} usable updates, quorum "
                f"{event['quorum']}; the model stays as it was",
                style="yellow",
                highlight=False,
            )
        elif name == "round.model_not_finite":
            self._console.print(
                f"round {event['round']}: the strategy made NaN or infinities; the model stays as "
                "it was",
                style="yellow",
                highlight=False,
            )


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
    for name in _SHOWN_FIRST:
        if name in metrics:
            return f"{name} {metrics[name]:.3f}"
    return ""
