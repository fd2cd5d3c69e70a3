"""How much a node may leave with the SuperLink: about twice what it was asked with."""

from __future__ import annotations

import threading
from dataclasses import dataclass

__all__ = ["Quota"]

_TIMES = 2  # an update, and control variates or the like
_SMALL_BYTES = 16 * 1024 * 1024  # heads, metrics, statistics
_TRIES = 3  # of announcing an answer, over a line that breaks, with the largest tree there is


@dataclass
class _Node:
    asks: int = 0
    room: int = 0
    used: int = 0
    parts: int = 0


class Quota:
    """Counts by node what was asked, and what came; used by several threads.

    Args:
        most_parts: Largest number of parts of one answer.
    """

    def __init__(self, most_parts: int = 4096) -> None:
        self.most_parts = most_parts
        self._lock = threading.Lock()
        self._nodes: dict[int, _Node] = {}

    def ask(self, node: int, size: int) -> None:
        """Expect an answer.

        Args:
            node: Is asked.
            size: Bytes of the arrays that are sent.
        """
        with self._lock:
            held = self._nodes.setdefault(node, _Node())
            held.asks += 1
            held.room += _TIMES * size + _SMALL_BYTES
            held.parts = _TRIES * self.most_parts

    def end(self, node: int, size: int) -> None:
        """Expect that answer no longer: it was read, or it is dropped."""
        with self._lock:
            held = self._nodes[node]
            held.asks -= 1
            held.room -= _TIMES * size + _SMALL_BYTES
            held.used = max(held.used - _TIMES * size - _SMALL_BYTES, 0) if held.asks else 0

    def may_announce(self, node: int, parts: int) -> bool:
        """Return whether a node may announce an answer of so many parts.

        A late answer may be announced too: it is how the coordinator hears that a site is free.
        """
        with self._lock:
            held = self._nodes.get(node)
            return held is not None and parts <= min(self.most_parts, held.parts)

    def announce(self, node: int, parts: int) -> None:
        """Count the parts of an answer that a node announced."""
        with self._lock:
            held = self._nodes.get(node)
            if held is not None:
                held.parts -= parts

    def has_room(self, node: int) -> bool:
        """Return whether a node may store one more part."""
        with self._lock:
            held = self._nodes.get(node)
            return held is not None and held.used < held.room

    def store(self, node: int, size: int) -> None:
        """Count a part that was stored, in bytes."""
        with self._lock:
            held = self._nodes.get(node)
            if held is not None:
                held.used += size
