"""Standard streams that do not decide how a command ends.

A reader who leaves (``| head -1``), a stream that is closed (``2>&-``) and a log on a full disk are
no failure of a run. Results that are lost for another reason than a reader who left are one.
"""

from __future__ import annotations

import os
import sys
from io import BufferedWriter, FileIO, TextIOWrapper
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = ["reader_left", "steady_streams"]


class _Outlet(FileIO):
    """A descriptor that takes everything, also when nobody is there to take it from it.

    Args:
        descriptor: An open one; stays open.
        ignored: The errors that nobody is told of. Any other is raised once.
    """

    def __init__(self, descriptor: int, ignored: type[OSError]) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._ignored = ignored
        self.broken = False

    def write(self, content: ReadableBuffer, /) -> int:
        """Write what can be written; return how many bytes need not be written again."""
        if not self.broken:
            try:
                return super().write(content)
            except OSError as error:
                self.broken = True
                if not isinstance(error, self._ignored):
                    raise
        return memoryview(content).nbytes


def steady_streams() -> None:
    """Replace ``sys.stdout`` and ``sys.stderr`` by streams that outlive their readers.

    Results lost to anything but a reader who left (a full disk) still raise an OSError; what goes
    to stderr is told to whoever listens.
    """
    sys.stdout = _steady(sys.stdout, 1, BrokenPipeError)
    sys.stderr = _steady(sys.stderr, 2, OSError)


def reader_left() -> bool:
    """Return whether whoever read ``sys.stdout`` is known to have left."""
    outlet = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return isinstance(outlet, _Outlet) and outlet.broken


def _steady(stream: TextIO | None, descriptor: int, ignored: type[OSError]) -> TextIO:
    if stream is None:
        # It was closed. Left free, its number would go to a file of the run, and what a library
        # writes to stdout by number would end up in there.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        if nowhere != descriptor:
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
        return open(descriptor, "w", encoding="utf-8", closefd=False)
    return TextIOWrapper(
        BufferedWriter(_Outlet(descriptor, ignored)),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=descriptor == 2 or stream.isatty(),
    )
