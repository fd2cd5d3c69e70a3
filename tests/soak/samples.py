"""What processes and files take, round by round, and whether that grows."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

__all__ = ["Bound", "Sample", "Series", "measured", "size_of"]

_YOUNG = 8  # rounds of a process before it counts: it imports, connects and fills its caches
_SETTLED = 20  # rounds after which what still grows is no filling of pools any more
_MIB = 1024 * 1024


@dataclass(frozen=True)
class Sample:
    """One look at one thing.

    Args:
        round_number: The newest closed round.
        process: The process; 0 for what is no process's.
        value: What it took.
    """

    round_number: int
    process: int
    value: float


@dataclass(frozen=True)
class Bound:
    """What still counts as flat.

    Args:
        share: Growth allowed as a share of what there was.
        more: Growth allowed beside it, in the series' own unit.
        leak: Growth allowed to a process that lives for the whole run, in the same unit; None for
            as much as that. It is worked out from shorter lives, so that counts of a few need more.
    """

    share: float
    more: float
    leak: float | None = None

    def over(self, before: float) -> float:
        """Return the largest growth that is allowed over what there was."""
        return self.share * before + self.more


class Series:
    """The samples of one thing.

    Args:
        bound: What counts as flat.
        rounds: Rounds of the run.
    """

    def __init__(self, bound: Bound, rounds: int) -> None:
        self._bound = bound
        self._rounds = rounds
        self._samples: list[Sample] = []
        self._born: dict[int, int] = {}

    def add(self, sample: Sample) -> None:
        """Take a sample, unless it is of a process that was only just started."""
        born = self._born.setdefault(sample.process, sample.round_number)
        if sample.process == 0 or sample.round_number - born >= _YOUNG:
            self._samples.append(sample)

    def rows(self) -> list[tuple[int, int, float]]:
        """Return round, process and value of each sample."""
        return [(s.round_number, s.process, s.value) for s in self._samples]

    def quarters(self) -> tuple[float, float, float, float]:
        """Return the median of each quarter of the run; NaN for one without samples."""
        values: list[list[float]] = [[], [], [], []]
        for sample in self._samples:
            quarter = min(3, 4 * sample.round_number // max(1, self._rounds))
            values[quarter].append(sample.value)
        one, two, three, four = (median(each) if each else float("nan") for each in values)
        return one, two, three, four

    def slope(self) -> float:
        """Return the growth a round within the life of a process, all lives taken together.

        A process that is killed begins small again: what it leaks shows between its own samples
        only.
        """
        by_process: dict[int, list[Sample]] = {}
        for sample in self._samples:
            if sample.process == 0 or sample.round_number - self._born[sample.process] >= _SETTLED:
                by_process.setdefault(sample.process, []).append(sample)
        products = squares = 0.0
        for samples in by_process.values():
            middle = sum(s.round_number for s in samples) / len(samples)
            mean = sum(s.value for s in samples) / len(samples)
            products += sum((s.round_number - middle) * (s.value - mean) for s in samples)
            squares += sum((s.round_number - middle) ** 2 for s in samples)
        return products / squares if squares else 0.0

    def complaints(self) -> list[str]:
        """Return how it grows; empty when it is flat."""
        found = []
        _, second, _, last = self.quarters()
        if not last <= second + self._bound.over(second):  # also when there is no sample
            found.append(f"{second:.1f} in the second quarter, {last:.1f} in the last")
        by_run, leak = self.slope() * self._rounds, self._bound.leak
        if by_run > (self._bound.over(second) if leak is None else leak):
            found.append(f"a process that lives for the whole run grows by {by_run:.1f}")
        return found


def measured(pid: int) -> dict[str, float] | None:
    """Return memory (MiB), open files and threads of a process; None when it is gone."""
    with suppress(OSError, KeyError, ValueError):
        lines = (Path("/proc") / str(pid) / "status").read_text().splitlines()
        status = dict(line.split(":", 1) for line in lines)
        return {
            "memory": float(status["VmRSS"].split()[0]) / 1024,
            "files": float(len(os.listdir(f"/proc/{pid}/fd"))),
            "threads": float(status["Threads"]),
        }
    return None


def size_of(paths: Callable[[], Sequence[Path]]) -> float:
    """Return the MiB of files, without those that are gone by the time they are looked at."""
    total = 0
    for path in paths():
        with suppress(OSError):
            total += path.stat().st_size
    return total / _MIB
