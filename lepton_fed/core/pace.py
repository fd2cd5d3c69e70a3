"""How long a round may take: from what sites took before and what is sent, with one knob.

A site is late when it takes ``patience`` times as long as is expected of the round. What is
expected is the median of what the sites of the cohort took in the round before, more when more is
sent. In the first round nothing is known, so that half of the cohort sets the pace: once that many
updates have come, the others have ``patience`` times as long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_high

__all__ = ["Deadline", "Pace"]

_LEAST_S = 20.0  # below that, a busy machine or a slow line is no sign of a lost site
_BLIND_S = 3600.0
_SLOW_BYTES_PER_S = 1e6


@dataclass(frozen=True)
class Deadline:
    """Tells when to give up those who have not answered.

    Args:
        patience: How many times the expected time is waited.
        asked: How many sites were asked.
        expected_s: Seconds that are expected; None when nothing is known yet.
        transfer_s: Seconds that model and update take on a slow line.
    """

    patience: float
    asked: int
    expected_s: float | None = None
    transfer_s: float = 0.0

    def passed(self, elapsed_s: float, answered_s: Sequence[float], refused: int = 0) -> bool:
        """Return whether who has not answered yet is late.

        Args:
            elapsed_s: Seconds since the sites were asked.
            answered_s: Seconds after which each usable reply came.
            refused: How many sites answered without being of use.

        Example:
            >>> deadline = Deadline(patience=3, asked=3)
            >>> deadline.passed(100, [40]), deadline.passed(130, [40, 41])
            (False, True)
        """
        return elapsed_s > self.allowed_s(answered_s, refused)

    @property
    def limit_s(self) -> float:
        """Return the seconds after which every site is late; 0 when that is not known yet."""
        return 0.0 if self.expected_s is None else self.allowed_s(())

    def allowed_s(self, answered_s: Sequence[float], refused: int = 0) -> float:
        """Return the seconds that may pass in all; see :meth:`passed`."""
        expected = self.expected_s
        if expected is None:
            half = 2 * len(answered_s) >= self.asked - refused > 0
            expected = median_high(answered_s) if answered_s and half else _BLIND_S
        return self.patience * max(expected, self.transfer_s, _LEAST_S)


class Pace:
    """Learns what sites take.

    Args:
        patience: How many times the expected time is waited.
    """

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self._took_s: dict[str, float] = {}

    def deadline(self, cohort: Sequence[str], sent_bytes: int) -> Deadline:
        """Return the deadline of a round.

        Args:
            cohort: Names of the sites that are asked.
            sent_bytes: Bytes of the model; an update is taken to be as large.
        """
        known = [self._took_s[site] for site in cohort if site in self._took_s]
        expected = median_high(known) if 2 * len(known) >= len(cohort) and known else None
        transfer = 2 * sent_bytes / _SLOW_BYTES_PER_S
        return Deadline(self.patience, len(cohort), expected, transfer)

    def note(self, site: str, seconds: float) -> None:
        """Learn what a site took; of a late one, how long it was waited for."""
        self._took_s[site] = seconds
