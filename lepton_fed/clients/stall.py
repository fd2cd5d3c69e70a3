"""Whether a process still does anything: one that uses no CPU time look after look is hung.

It may be stopped, deadlocked, or waiting for a disk or a GPU that is gone; from outside all of
these look alike, and all of them differ from a slow one. Looks are counted, not seconds: a machine
that slept for an hour wakes with a healthy child, which nobody has looked at meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

__all__ = ["StallWatch", "cpu_ticks"]

_PROC = Path("/proc")
_GROUP, _USED = 2, slice(11, 13)  # of the fields after the command: pgrp; utime and stime
_LEAST_TICKS = 5  # 0.05 s: a thread that only looks whether its parent lives uses less in a minute


class StallWatch:
    """Counts looks at which a group of processes has done next to nothing.

    Args:
        group: Its process group.
        looks: So many in a row mean that it is hung.
        ticks: From a process group to the CPU time of each of its processes; another in tests.
    """

    def __init__(
        self, group: int, looks: int, ticks: Callable[[int], dict[int, int]] | None = None
    ) -> None:
        self._group = group
        self._looks = looks
        self._ticks = ticks or cpu_ticks
        self._since: dict[int, int] = {}
        self._idle = 0

    def hung(self) -> bool:
        """Look once more, and return whether it is hung; never where /proc does not tell."""
        now = self._ticks(self._group)
        same = now.keys() == self._since.keys()
        if not now or not same or sum(now.values()) - sum(self._since.values()) >= _LEAST_TICKS:
            self._since, self._idle = now, 0
        else:
            self._idle += 1
        return self._idle >= self._looks


def cpu_ticks(group: int) -> dict[int, int]:
    """Return the clock ticks that each process of a group has used, with its threads.

    Args:
        group: The process group.
    """
    found: dict[int, int] = {}
    with suppress(OSError):  # no such file system
        for entry in _PROC.iterdir():
            if not entry.name.isdigit():
                continue
            with suppress(OSError, IndexError, ValueError):  # it ended meanwhile
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[_GROUP]) == group:
                    found[int(entry.name)] = sum(map(int, fields[_USED]))
    return found
