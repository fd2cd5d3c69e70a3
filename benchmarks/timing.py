"""Two things timed in turn, so that a machine that drifts drifts for both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

__all__ = ["Ratio", "in_turn", "ratios"]

Ratio = tuple[float, float, float]


def in_turn(
    ours: Callable[[], object],
    floor: Callable[[], object],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, float, Ratio]:
    """Time two functions alternately.

    Args:
        ours: The function that is measured.
        floor: What it is held against.
        repeats: Pairs that count; one more pair warms up.
        clock: What is read before and after: wall time, or the process's CPU time where others
            use the machine.

    Returns:
        Median seconds of each, and smallest, median and largest ratio ours/floor, pair by pair.
    """
    ours(), floor()
    pairs = [(_seconds(ours, clock), _seconds(floor, clock)) for _ in range(repeats)]
    return (
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        ratios(pairs),
    )


def ratios(pairs: Sequence[tuple[float, float]]) -> Ratio:
    """Return smallest, median and largest ratio of pairs of seconds."""
    found = sorted(a / b for a, b in pairs)
    return found[0], statistics.median(found), found[-1]


def _seconds(call: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    call()
    return clock() - start
