"""The event log of a run: one JSON object a line, each carrying the hash of the one before.

A changed, removed or inserted line breaks the chain, and :func:`read_events` says where. Lines cut
off at the end are found by the hash of the last one, which the run's summary holds. While a run has
no summary, a last line without its line end is one that a crash cut off: nobody was told of it, so
it counts as not written.

Who writes a log holds a lock on it for as long. That keeps a second writer out, and tells a run
that goes on from one whose process is gone.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any

from lepton_fed.core.digests import canonical_json
from lepton_fed.errors import Problem, Refused, RunError
from lepton_fed.runs.files import append, reading, writing

__all__ = ["Event", "EventLog", "GrowingLog", "Listener", "is_written", "read_events"]

Event = Mapping[str, Any]
Listener = Callable[[Event], None]

_GENESIS = hashlib.sha256(b"lepton-fed events 1").hexdigest()
_LOOKS = 20  # at a lock that is held: who only asks about it holds it for a moment
_LOOK_S = 0.005


def utc_now() -> str:
    """Return the present UTC time, ISO 8601 with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class EventLog:
    """Appends events to a run's file and tells them to listeners.

    Args:
        path: File; made when missing. An existing one is verified and continued; a last line that
            a crash cut off is removed first.
        listeners: Called with each event after it was written: progress views, log lines. One that
            can no longer be told (OSError) is left out from then on.
        clock: Returns the time that goes into an event.

    Raises:
        Refused: The existing file is changed.
        RunError: It cannot be read or written; LF5220, another process writes it.
    """

    def __init__(
        self,
        path: Path,
        listeners: tuple[Listener, ...] = (),
        clock: Callable[[], str] = utc_now,
    ) -> None:
        self._path = path
        self._listeners = list(listeners)
        self._clock = clock
        self._head = _GENESIS
        with writing(path):
            self._file = path.open("ab", buffering=0)
        try:
            _lock(self._file, path)
            with reading(path):
                content = path.read_bytes()
            whole = _without_cut_line(content)
            for event in _events(whole, path):
                self._head = _hash(event)
            if len(whole) < len(content):
                with writing(path):
                    self._file.truncate(len(whole))
        except BaseException:
            self._file.close()
            raise

    @property
    def head(self) -> str:
        """Return the hash of the last event."""
        return self._head

    def emit(self, event: str, **fields: object) -> None:
        """Append an event.

        Args:
            event: Its name, for example ``round.closed``.
            fields: Plain data; never a tensor, a path to data, or a secret.

        Raises:
            RunError: It cannot be written; the file ends with the event before.
        """
        record = {**fields, "event": event, "time": self._clock(), "previous": self._head}
        line = canonical_json(record)
        head = hashlib.sha256(line).hexdigest()
        with writing(self._path):
            append(self._file, line + b"\n")
        self._head = head
        for listener in tuple(self._listeners):
            try:
                listener(record)
            except OSError:  # who only watches must not end the run
                self._listeners.remove(listener)

    def sync(self) -> None:
        """Have the disk hold what was written.

        Raises:
            RunError: It cannot be synced.
        """
        with writing(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and close the file.

        Raises:
            RunError: It cannot be synced; it is closed all the same.
        """
        with writing(self._path), self._file:
            os.fsync(self._file.fileno())


def read_events(path: Path, head: str = "") -> list[Event]:
    """Return the events of a file, after checking its chain.

    Args:
        path: The file.
        head: Hash of its last line, as a run's summary holds it; empty when there is none yet. Only
            then may a crash have cut the last line off.

    Raises:
        Refused: There is no file, a line is not JSON or does not follow from the one before, or the
            last is another.
        RunError: The file cannot be read.
    """
    with reading(path):
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
    events = _events(content if head else _without_cut_line(content), path)
    if head and (not events or _hash(events[-1]) != head):
        raise Refused(
            Problem(
                "LF4302",
                "the event log does not end as the run's summary says: lines are missing or added",
                where=str(path),
                remedy="do not rely on this run's record",
            )
        )
    return events


class GrowingLog:
    """Reads a log that is still written, a piece at a time.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0
        self._lines = 0
        self._head = _GENESIS

    def take(self) -> list[Event]:
        """Return the events that were written since the last time; half a line waits for the rest.

        Raises:
            Refused: A line is not JSON or does not follow from the one before, or lines that were
                read before are gone.
            RunError: The file cannot be read.
        """
        with reading(self._path):
            try:
                file = self._path.open("rb")
            except FileNotFoundError:
                return []  # it comes with the first event
            with file:
                if os.fstat(file.fileno()).st_size < self._read:
                    raise _changed(self._path, self._lines)
                file.seek(self._read)
                content = _without_cut_line(file.read())
        events = _events(content, self._path, self._head, self._lines + 1)
        self._read += len(content)
        self._lines += len(events)
        if events:
            self._head = _hash(events[-1])
        return events


def is_written(path: Path) -> bool:
    """Return whether a process has this log open to write to it.

    Args:
        path: The file; nobody writes one that is not there.

    Raises:
        RunError: It cannot be read.
    """
    with reading(path):
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return False
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False


def _lock(file: FileIO, path: Path) -> None:
    """Lock a log until it is closed."""
    with writing(path):
        for _ in range(_LOOKS):
            with suppress(BlockingIOError):
                return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            time.sleep(_LOOK_S)
    raise RunError(
        Problem("LF5220", "another process writes this run's event log", where=str(path),
                remedy="the run goes on: `lepton-fed runs follow` shows it; end it first")
    )  # fmt: skip


def _changed(path: Path, line: int) -> Refused:
    return Refused(
        Problem("LF4301", "the event log was changed: this line does not follow from the one "
                "before", where=f"{path}:{line}", remedy="do not rely on this run's record")
    )  # fmt: skip


def _events(content: bytes, path: Path, last: str = _GENESIS, first: int = 1) -> list[Event]:
    """Return the events of a file's content, each of which follows from the one before."""
    events: list[Event] = []
    for number, line in enumerate(content.splitlines(keepends=True), start=first):
        try:
            record = json.loads(line)
            follows = record["previous"] == last and canonical_json(record) + b"\n" == line
        except (ValueError, KeyError, TypeError, RecursionError):
            follows = False
        if not follows:
            raise _changed(path, number)
        events.append(record)
        last = _hash(record)
    return events


def _without_cut_line(content: bytes) -> bytes:
    return content[: content.rfind(b"\n") + 1]


def _hash(record: Event) -> str:
    return hashlib.sha256(canonical_json(dict(record))).hexdigest()
