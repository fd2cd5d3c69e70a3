"""What became of the site's one connection, in plain words, out of the SuperNode's own log."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

from lepton_fed.clients.first_contact import reach
from lepton_fed.errors import RunError
from lepton_fed.flower.supernode import REFUSED_SIGNATURE

__all__ = ["ConnectionNews", "why_refused", "why_unreachable"]

_PROBE_S = 5.0
_MOST_READ = 1024 * 1024
_ODD = 3  # so often it answers us, and still the SuperNode cannot connect
_SAID = (  # the SuperNode's words, in the order in which a line is held against them
    ("SSL/TLS handshake error", "down"),
    ("Connection attempt failed", "down"),
    ("Failed to activate SuperNode", "twice"),
    (REFUSED_SIGNATURE, "refused"),
    ("Connection successful", "up"),
    # A call that was tried again and then answered with a refusal is followed by no such word.
    ("Received successfully", "up"),
    ("Sent successfully", "up"),
    ("SuperNode ID:", "up"),
)

_ERROR = re.compile(r"[A-Za-z_][\w.]*(Error|Exception): ")

_log = logging.getLogger("lepton_fed.site")


class ConnectionNews:
    """Follows the SuperNode's log and says once what changed.

    Args:
        path: The log.
        address: Address and port of the coordinator.
        why: Tells why the coordinator cannot be reached; empty when it can.
        refused: Tells what may be the reason when it refuses the site's signature.
    """

    def __init__(
        self, path: Path, address: str, why: Callable[[], str], refused: Callable[[], str]
    ) -> None:
        self._path = path
        self._address = address
        self._why = why
        self._refused = refused
        self._offset = 0
        self._last = ""
        self._odd = 0
        self._error = ""

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
            self._error = line if _ERROR.match(line) else self._error
            state = next((state for words, state in _SAID if words in line), "")
            self._odd = 0 if state == "up" else self._odd
            if state and state != self._last:
                self._say(state)

    def ended(self) -> str:
        """Take note that the SuperNode ended: its coming back is news.

        Returns:
            The exception that it ended of, as its log told it; empty when it told of none.
        """
        error, self._error = self._error, ""
        if self._last == "up":
            self._last = ""
        return error

    def _say(self, state: str) -> None:
        why = ""
        if state == "down":
            why = self._why()
            self._odd = 0 if why else self._odd + 1
            if not why and self._odd < _ODD:
                return  # it came up between the SuperNode's look and ours
            why = why or "the coordinator answers, but not the SuperNode; supernode.log says more"
        self._last, self._odd = state, 0
        if state == "up":
            _log.info("connection.up connected to the coordinator at %s", self._address)
        elif state == "down":
            _log.error("connection.failed %s (%s); trying on", why, self._address)
        elif state == "refused":
            _log.error(
                "connection.refused the coordinator at %s does not accept this site's signature: "
                "%s; trying on",
                self._address,
                self._refused(),
            )
        else:
            _log.warning(
                "connection.refused the coordinator at %s did not let this site in: its roster "
                "lacks the site's node key, or it takes the site for connected still, which ends "
                "within half a minute; trying on",
                self._address,
            )


def why_unreachable(address: str, ca: Path) -> str:
    """Return why the coordinator cannot be reached; empty when it can.

    Args:
        address: Host and port, ``fed.example.org:9092`` or ``[::1]:9092``.
        ca: Certificate of the authority that must have signed the coordinator's, PEM.
    """
    try:
        reach(address, ca, wait_s=_PROBE_S)
    except RunError as error:
        return _in_words(error)
    return ""


def why_refused(address: str, ca: Path) -> str:
    """Return why the coordinator may refuse a signature: clocks first, then keys.

    Args:
        address: Host and port of the coordinator.
        ca: Certificate of the authority that must have signed the coordinator's, PEM.
    """
    try:
        reach(address, ca, wait_s=_PROBE_S).check_clock()
    except RunError as error:
        return _in_words(error)
    return (
        "it was set up anew and lets the sites in again, or its roster lacks the site's node key; "
        "the clocks agree"
    )


def _in_words(error: RunError) -> str:
    problem = error.problems[0]
    return f"{problem.what}; {problem.remedy}" if problem.remedy else problem.what
