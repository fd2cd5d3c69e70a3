"""Rounds of two federations in turn, so that a machine that drifts drifts for both."""

from __future__ import annotations

import socket
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["Turns", "Waiting"]


class Turns:
    """Lets another process do one round after another, and hears how long each took.

    Args:
        address: Where the other process connects to, a path for a Unix socket.
        limit_s: Longest wait for it.
    """

    def __init__(self, address: Path, limit_s: float = 300.0) -> None:
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.settimeout(limit_s)
        self._listening.bind(str(address))
        self._listening.listen(1)
        self._limit_s = limit_s
        self._line: socket.socket | None = None

    def __enter__(self) -> Self:
        """Return this."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let go of the other process."""
        self._listening.close()
        if self._line is not None:
            self._line.close()

    def wait(self) -> None:
        """Wait until the other process is ready for its first round."""
        self._line, _ = self._listening.accept()
        self._line.settimeout(self._limit_s)

    def take(self) -> float:
        """Let the other process do a round and return the seconds that it took.

        Raises:
            ConnectionError: The other process ended instead.
        """
        if self._line is None:
            self.wait()
        assert self._line is not None  # noqa: S101 - wait sets it
        self._line.sendall(b".")
        told = b""
        while not told.endswith(b"\n"):
            found = self._line.recv(64)
            if not found:
                raise ConnectionError("a federation ended in the middle of a round")
            told += found
        return float(told)


class Waiting:
    """The other end of :class:`Turns`.

    Args:
        address: That of the turns.
    """

    def __init__(self, address: Path) -> None:
        self._line = socket.socket(socket.AF_UNIX)
        self._line.connect(str(address))

    def wait(self) -> None:
        """Wait until it is this process's turn."""
        if not self._line.recv(1):
            raise ConnectionError("nobody gives turns any more")

    def done(self, seconds: float) -> None:
        """Tell how long a round took."""
        self._line.sendall(f"{seconds}\n".encode())

    def close(self) -> None:
        """Take no more turns."""
        self._line.close()
