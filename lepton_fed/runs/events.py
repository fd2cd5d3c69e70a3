"""The event log of a run: one JSON object a line, each carrying the hash of the one before.

A changed, removed or inserted line breaks the chain, and :func:`read_events` says where. Lines cut
off at the end are found by the hash of the last one, which the run's summary holds.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lepton_fed.core.digests import canonical_json
from lepton_fed.errors import Problem, Refused

__all__ = ["Event", "EventLog", "Listener", "read_events"]

Event = Mapping[str, Any]
Listener = Callable[[Event], None]

_GENESIS = hashlib.sha256(b"lepton-fed events 1").hexdigest()


def utc_now() -> str:
    """Return the present UTC time, ISO 8601 with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class EventLog:
    """Appends events to a run's file and tells them to listeners.

    Args:
        path: File; made when missing. An existing one is verified and continued.
        listeners: Called with each event after it was written: progress views, log lines.
        clock: Returns the time that goes into an event.

    Raises:
        Refused: The existing file is changed.
    """

    def __init__(
        self,
        path: Path,
        listeners: tuple[Listener, ...] = (),
        clock: Callable[[], str] = utc_now,
    ) -> None:
        self._listeners = listeners
        self._clock = clock
        self._head = _GENESIS
        if path.exists():
            for event in read_events(path):
                self._head = _hash(event)
        self._file = path.open("ab")

    @property
    def head(self) -> str:
        """Return the hash of the last event."""
        return self._head

    def emit(self, event: str, **fields: object) -> None:
        """Append an event.

        Args:
            event: Its name, for example ``round.closed``.
            fields: Plain data; never a tensor, a path to data, or a secret.
        """
        record = {**fields, "event": event, "time": self._clock(), "previous": self._head}
        self._file.write(canonical_json(record) + b"\n")
        self._file.flush()
        self._head = _hash(record)
        for listener in self._listeners:
            listener(record)

    def close(self) -> None:
        """Sync and close the file."""
        os.fsync(self._file.fileno())
        self._file.close()


def read_events(path: Path, head: str = "") -> list[Event]:
    """Return the events of a file, after checking its chain.

    Args:
        path: The file.
        head: Hash of its last line, as a run's summary holds it; empty when there is none yet.

    Raises:
        Refused: There is no file, a line is not JSON or does not follow from the one before, or the
            last is another.
    """
    events: list[Event] = []
    last = _GENESIS
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise Refused(
            Problem(
                "LF4302",
                "there is no event log",
                where=str(path),
                remedy="do not rely on this run's record",
            )
        ) from error
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        try:
            record = json.loads(line)
            follows = record["previous"] == last and canonical_json(record) + b"\n" == line
        except (ValueError, KeyError, TypeError, RecursionError):
            follows = False
        if not follows:
            raise Refused(
                Problem(
                    "LF4301",
                    "the event log was changed: this line does not follow from the one before",
                    where=f"{path}:{number}",
                    remedy="do not rely on this run's record",
                )
            )
        events.append(record)
        last = _hash(record)
    if head and last != head:
        raise Refused(
            Problem(
                "LF4302",
                "the event log does not end as the run's summary says: lines are missing or added",
                where=str(path),
                remedy="do not rely on this run's record",
            )
        )
    return events


def _hash(record: Event) -> str:
    return hashlib.sha256(canonical_json(dict(record))).hexdigest()
