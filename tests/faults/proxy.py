"""A TCP line between a site and its coordinator that can be cut in the ways that lines are cut."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from typing import Literal

__all__ = ["Line"]

State = Literal["whole", "silent", "refusing"]
_CHUNK = 65536
_LOOK_S = 0.1


class Line:
    """Carries bytes between a port of its own and another, until it is cut.

    ``silent`` is a pulled cable or a firewall that drops: nothing comes any more, and nobody says
    so. ``refusing`` is a router that answers with a reset: every connection ends at once.

    Args:
        port: Where it leads, on 127.0.0.1.
    """

    def __init__(self, port: int) -> None:
        self._to = port
        self._state: State = "whole"
        self._ends: list[socket.socket] = []
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def is_cut(self) -> bool:
        """Return whether it is."""
        return self._state != "whole"

    def cut(self, how: State) -> None:
        """Cut it."""
        self._state = how
        if how == "refusing":
            self._drop()

    def heal(self) -> None:
        """Carry new connections; those of before are dead, as after a change of address."""
        self._drop()
        self._state = "whole"

    def close(self) -> None:
        """Let go of everything."""
        self._closed.set()
        self._listener.close()
        self._drop()

    def _drop(self) -> None:
        with self._lock:
            ends, self._ends = self._ends, []
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self._state == "refusing":
                near.close()
                continue
            try:
                far = socket.create_connection(("127.0.0.1", self._to), timeout=5)
                far.settimeout(None)
            except OSError:
                near.close()
                continue
            with self._lock:
                self._ends += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while content := source.recv(_CHUNK):
                while self._state == "silent" and not self._closed.wait(_LOOK_S):
                    pass
                sink.sendall(content)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
