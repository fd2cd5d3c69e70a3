"""What became of the site's one connection, in plain words, out of the SuperNode's own log."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path

__all__ = ["ConnectionNews", "why_unreachable"]

_PROBE_S = 5.0
_MOST_READ = 1024 * 1024
_SAID = (  # the SuperNode's words, in the order in which a line is held against them
    ("SSL/TLS handshake error", "tls"),
    ("Connection attempt failed", "down"),
    ("Failed to activate SuperNode", "twice"),
    ("Connection successful", "up"),
    ("SuperNode ID:", "up"),
)

_log = logging.getLogger("lepton_fed.site")


class ConnectionNews:
    """Follows the SuperNode's log and says once what changed.

    Args:
        path: The log.
        address: Address and port of the coordinator.
        why: Tells why the coordinator cannot be reached; empty when it can.
    """

    def __init__(self, path: Path, address: str, why: Callable[[str], str] | None = None) -> None:
        self._path = path
        self._address = address
        self._why = why or why_unreachable
        self._offset = 0
        self._last = ""

    def look(self) -> None:
        """Read what is new in the log; never raises."""
        try:
            with self._path.open("rb") as file:
                if os.fstat(file.fileno()).st_size < self._offset:
                    self._offset = 0  # another file than before
                file.seek(self._offset)
                content = file.read(_MOST_READ)
        except OSError:
            return
        whole = content[: content.rfind(b"\n") + 1]
        if not whole and len(content) == _MOST_READ:
            whole = content  # no line is that long
        self._offset += len(whole)
        for line in whole.decode(errors="replace").splitlines():
            state = next((state for words, state in _SAID if words in line), "")
            if state and state != self._last and not (state == "down" and self._last == "tls"):
                self._last = state
                self._say(state)

    def _say(self, state: str) -> None:
        if state == "up":
            _log.info("connection.up connected to the coordinator at %s", self._address)
        elif state == "tls":
            _log.error(
                "connection.failed the coordinator at %s does not show a certificate of the "
                "authority in `ca`; ask for its ca.crt, and look at this machine's clock",
                self._address,
            )
        elif state == "twice":
            _log.warning(
                "connection.refused the coordinator at %s did not let this site in: its roster "
                "lacks the site's node key, or it takes the site for connected still, which ends "
                "within a minute",
                self._address,
            )
        else:
            reason = self._why(self._address) or "it does not answer as a coordinator does"
            _log.error(
                "connection.failed cannot reach the coordinator at %s: %s; trying on",
                self._address,
                reason,
            )


def why_unreachable(address: str) -> str:
    """Return why nothing answers at an address; empty when something does.

    Args:
        address: Host and port, ``fed.example.org:9092`` or ``[::1]:9092``.
    """
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_S):
            return ""
    except OSError as error:
        return error.strerror or str(error) or type(error).__name__
