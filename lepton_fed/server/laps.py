"""What the parts of a round take: select, exchange, aggregate, checkpoint."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["PHASES", "Laps"]

PHASES = ("select", "exchange", "aggregate", "checkpoint")
"""Parts of a round, in order: waiting for sites and choosing the cohort; from the first ask to the
last reply, which is added as it comes; the strategy's step; writing the checkpoint."""


class Laps:
    """A stop watch for the parts of one round after another.

    Args:
        clock: Tells seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last = clock()
        self._seconds: dict[str, float] = {}

    def start(self) -> None:
        """Begin a round."""
        self._last = self._clock()
        self._seconds = dict.fromkeys(PHASES, 0.0)

    def done(self, phase: str) -> None:
        """Say that a part is over; the next one begins."""
        now = self._clock()
        self._seconds[phase] += now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each part of the round so far, to the millisecond."""
        return {phase: round(seconds, 3) for phase, seconds in self._seconds.items()}
