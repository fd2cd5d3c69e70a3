"""Memory that a message took goes back to the system when the message is gone.

Messages pass through in parts of some megabytes, each worked on by whichever thread is free. Left
alone, a coordinator that holds few parts at a time looks as large as several models: the web
framework leaves each part in a cycle of objects, and Python looks for cycles rarely in a process
that has imported much; and the C library has a heap for each thread, which keeps what was freed.
"""

from __future__ import annotations

import ctypes
import gc
import platform
from collections.abc import Callable

__all__ = ["LARGE_BYTES", "Sweeper", "give_large_blocks_back", "settle"]

LARGE_BYTES = 256 * 1024
"""Blocks from this size on are mapped one by one, and unmapped when they are freed."""

_SWEEP_BYTES = 32 * 1024 * 1024
_M_MMAP_THRESHOLD = -3  # malloc.h; once it is set, the C library no longer raises it by itself


def give_large_blocks_back() -> bool:
    """Let this process return each large block as it is freed; return whether it can.

    Only of GNU's C library there is a heap for each thread and a way to say this.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES))


def settle() -> None:
    """Take what this process holds now for lasting: to look for cycles is cheap from here on."""
    gc.collect()
    gc.freeze()


class Sweeper:
    """Looks for cycles each time so many bytes have passed.

    Args:
        every: How many.
        sweep: Looks for cycles.
    """

    def __init__(self, every: int = _SWEEP_BYTES, sweep: Callable[[], object] = gc.collect) -> None:
        self._every = every
        self._sweep = sweep
        self._passed = 0

    def passed(self, size: int) -> None:
        """Count bytes that came or went."""
        self._passed += size
        if self._passed >= self._every:
            self._passed = 0
            self._sweep()
