"""The site's record of what its records have spent: written and synced before anything leaves.

One file, one JSON object a line. Each line carries its own hash and that of the line before, so a
changed byte, a line missing in between and lines in another order are all found. A round is charged
before it is trained, so a crash may count a round that never left, never miss one that did. The
ledger is opened under a lock: two processes cannot both spend the same budget.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lepton_fed.core.digests import canonical_json
from lepton_fed.errors import BudgetExceeded, Problem, Refused
from lepton_fed.privacy.dp.accounting import Event, epsilon_of, event_of

__all__ = ["Ledger"]

_GENESIS = hashlib.sha256(b"lepton-fed ledger 1").hexdigest()
_ABOUT = ("about", "dataset", "previous")
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW


class Ledger:
    """What one data set has spent, and the most it may spend.

    Args:
        path: File; made when missing, its folder too.
        dataset: Content digest of the data set; a ledger belongs to one.
        epsilon: The budget.
        delta: Delta at which epsilon is counted.

    Raises:
        Refused: The file is changed, truncated in the middle, another data set's, in use, or
            cannot be opened; a symbolic link never is.
    """

    def __init__(self, path: Path, *, dataset: str, epsilon: float, delta: float) -> None:
        self._path = path
        self._dataset = dataset
        self._epsilon = epsilon
        self._delta = delta
        self._events: list[Event] = []
        self._runs: list[str] = []  # of each event
        self._head = _GENESIS
        self._failed = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, _FLAGS, 0o600)
            try:
                self._lock()
                self._replay()
                _sync_folder(path.parent)
            except BaseException:
                self.close()
                raise
        except OSError as error:
            raise Refused(
                Problem("LF4206", f"the ledger cannot be opened: {error.strerror}",
                        where=str(path), remedy="make it a plain file that this site may write")
            ) from error  # fmt: skip

    def close(self) -> None:
        """Let go of the file; a later charge is refused."""
        file, self._file = self._file, -1  # the number may soon be another file's
        if file >= 0:
            os.close(file)

    @property
    def spent(self) -> float:
        """Return the epsilon spent so far."""
        return epsilon_of(self._events, self._delta)

    @property
    def left(self) -> float:
        """Return the epsilon of the budget that is not spent."""
        return max(0.0, self._epsilon - self.spent)

    @property
    def delta(self) -> float:
        """Return the delta at which epsilon is counted."""
        return self._delta

    def of_run(self, run: str) -> list[Event]:
        """Return what was charged for a run, in order.

        Args:
            run: Its name, as ``about`` gave it.
        """
        return [event for event, name in zip(self._events, self._runs, strict=True) if name == run]

    def require(self, event: Event, run: str, rounds: int) -> None:
        """Refuse a run whose rounds do not all fit into what is left.

        Args:
            event: What a round costs.
            run: Name of the run; rounds of it that were charged already are not asked for again.
            rounds: Rounds of the run.

        Raises:
            BudgetExceeded: They do not fit; nothing was written.
        """
        left = max(0, rounds - len(self.of_run(run)))
        after = epsilon_of([*self._events, *([event] * left)], self._delta)
        if not after <= self._epsilon:
            raise BudgetExceeded(
                Problem(
                    "LF4207",
                    f"the run's {rounds} rounds would bring epsilon to {after:.4g}, the budget is "
                    f"{self._epsilon:g} at delta {self._delta:g} ({self.spent:.4g} is spent)",
                    where=str(self._path),
                    key="budget.epsilon",
                    remedy="a larger budget is the data owner's decision; a run with fewer rounds "
                    "or a smaller epsilon is the coordinator's",
                )
            )

    def charge(self, event: Event, about: Mapping[str, str | int]) -> float:
        """Write down what comes next, or refuse it.

        Args:
            event: What is about to be run.
            about: What it is for: run, round, task.

        Returns:
            The epsilon spent once it has been run.

        Raises:
            BudgetExceeded: It would exceed the budget; nothing was written.
            Refused: The ledger cannot be written. Whether the line is on disk then shows only when
                the file is opened again, so every later charge is refused until it is.
        """
        if self._failed:
            raise self._unwritable("an earlier write failed")
        after = epsilon_of([*self._events, event], self._delta)
        if not after <= self._epsilon:
            raise BudgetExceeded(
                Problem(
                    "LF4201",
                    f"this round would bring epsilon to {after:.4g}, the budget is "
                    f"{self._epsilon:g} at delta {self._delta:g} ({self.spent:.4g} is spent)",
                    where=str(self._path),
                    remedy="end the run here; a larger budget is the data owner's decision",
                )
            )
        entry: dict[str, Any] = {
            **event.record(),
            "about": dict(about),
            "dataset": self._dataset,
            "previous": self._head,
        }
        try:
            _write_whole(self._file, _line(entry))
            os.fsync(self._file)
        except OSError as error:
            self._failed = True
            raise self._unwritable(str(error.strerror)) from error
        self._head = _hash(entry)
        self._events.append(event)
        self._runs.append(str(about.get("run", "")))
        return after

    def _unwritable(self, why: str) -> Refused:
        return Refused(
            Problem("LF4202", f"the ledger cannot be written: {why}",
                    where=str(self._path), remedy="free disk space; the next round tries again")
        )  # fmt: skip

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Refused(
                Problem("LF4203", "another process has this ledger open",
                        where=str(self._path), remedy="end it first; one site, one process")
            ) from error  # fmt: skip

    def _replay(self) -> None:
        # From the file that is locked: what the path names may change meanwhile.
        content = os.pread(self._file, os.fstat(self._file).st_size, 0)
        *lines, rest = content.split(b"\n")
        for number, line in enumerate(lines, start=1):
            self._events.append(self._read(line + b"\n", number))
        if not rest:
            return
        if _is_cut_off(rest):
            # Its write never ended, so it was not synced and nothing left on its account.
            os.ftruncate(self._file, len(content) - len(rest))
            return
        # Only its line end is missing; something may have left, so it counts.
        self._events.append(self._read(rest + b"\n", len(lines) + 1))
        _write_whole(self._file, b"\n")

    def _read(self, line: bytes, number: int) -> Event:
        try:
            entry = json.loads(line)
            entry.pop("hash")
            whole = _line(entry) == line and entry["previous"] == self._head
            event = event_of({key: entry[key] for key in entry if key not in _ABOUT})
            dataset = entry["dataset"]
        except (AttributeError, ArithmeticError, KeyError, TypeError, ValueError):
            whole, dataset = False, ""
        if not whole:
            raise Refused(
                Problem(
                    "LF4204",
                    "the ledger was changed: this line does not follow from the one before",
                    where=f"{self._path}:{number}",
                    remedy="restore it from a backup; training stops until it is whole",
                )
            )
        if dataset != self._dataset:
            raise Refused(
                Problem(
                    "LF4205",
                    "this ledger belongs to a data set with other content",
                    where=f"{self._path}:{number}",
                    remedy="give the changed data set a ledger, hence a budget, of its own",
                )
            )
        self._head = _hash(entry)
        self._runs.append(_run_of(entry))
        return event


def _run_of(entry: Mapping[str, Any]) -> str:
    about = entry.get("about")
    return str(about.get("run", "")) if isinstance(about, dict) else ""


def _line(entry: Mapping[str, Any]) -> bytes:
    return canonical_json({**entry, "hash": _hash(entry)}) + b"\n"


def _hash(entry: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(dict(entry))).hexdigest()


def _is_cut_off(rest: bytes) -> bool:
    """Return whether bytes without a line end hold less than a whole object."""
    try:
        json.JSONDecoder().raw_decode(rest.decode(errors="replace"))
    except ValueError:
        return True
    return False


def _write_whole(file: int, content: bytes) -> None:
    written = 0
    while written < len(content):
        written += os.write(file, content[written:])


def _sync_folder(folder: Path) -> None:
    """Make the name of a new file as durable as what is synced into it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
