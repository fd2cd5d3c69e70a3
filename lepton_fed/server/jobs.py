"""What the coordinator is given to do while it runs: a folder of jobs, and their results.

`lepton-fed push` and `lepton-fed runs submit` write a job into the state folder; the coordinator
takes one after another and writes the result beside it. Whoever may write to the folder may give
jobs: that is the coordinator's own account. No port is opened for it.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lepton_fed.core.decode import decode, strict_json
from lepton_fed.core.digests import canonical_json
from lepton_fed.errors import Problem, Refused, RunError
from lepton_fed.runs.files import reading, write_atomic, writing

__all__ = ["Job", "Jobs"]

_LOCK = "lock"
_LOOK_S = 0.2
_AWAY_S = 120.0
_STALE_S = 86400.0


@dataclass(frozen=True)
class Job:
    """Something to do.

    Args:
        kind: push (a bundle) or run (a conf).
        path: The bundle's folder, or the conf as a file, absolute.
    """

    kind: Literal["push", "run"]
    path: str


class Jobs:
    """The jobs of one coordinator.

    Args:
        state: The coordinator's state folder.
    """

    def __init__(self, state: Path) -> None:
        self._state = state
        self._folder = state / "jobs"

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Be the one coordinator on this state folder.

        Raises:
            Refused: LF4215, another is.
            RunError: The folder cannot be written.
        """
        with writing(self._folder):
            self._state.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._folder.mkdir(mode=0o700, exist_ok=True)
            descriptor = os.open(self._state / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise Refused(
                    Problem("LF4215", "another coordinator works on this state folder",
                            where=str(self._state), key="state",
                            remedy="stop it first, or give this one a folder of its own")
                ) from None  # fmt: skip
            self._drop_stale()
            yield
        finally:
            os.close(descriptor)

    def _drop_stale(self) -> None:
        """Remove the results that nobody took: whoever waited was killed."""
        with writing(self._folder):
            for result in self._folder.glob("*.result"):
                if time.time() - result.stat().st_mtime > _STALE_S:
                    result.unlink(missing_ok=True)

    def give(self, job: Job, wait_s: float) -> dict[str, Any]:
        """Give the running coordinator a job and wait for its result.

        Args:
            job: The job.
            wait_s: Seconds after which it is given up.

        Raises:
            RunError: LF5013, no coordinator runs on this state folder; LF5014, it did not finish
                the job in time.
        """
        self._require_running()
        seen = time.monotonic()
        name = f"{time.time_ns():020d}-{secrets.token_hex(4)}"
        path, result = self._folder / f"{name}.job", self._folder / f"{name}.result"
        write_atomic(path, canonical_json(job))
        until = time.monotonic() + wait_s
        while not result.exists():
            if time.monotonic() >= until:
                path.unlink(missing_ok=True)
                raise RunError(
                    Problem("LF5014", f"the coordinator did not finish this in {wait_s:g} s",
                            where=str(self._state), remedy="look at its log; give it more --wait")
                )  # fmt: skip
            if self._is_running():
                seen = time.monotonic()
            elif time.monotonic() - seen > _AWAY_S:  # longer than the system takes to restart it
                path.unlink(missing_ok=True)
                raise self._not_running()
            time.sleep(_LOOK_S)
        return self._take(path)

    def _take(self, path: Path) -> dict[str, Any]:
        """Take the result of a job."""
        result = path.with_suffix(".result")
        with reading(result):
            content = result.read_bytes()
        path.unlink(missing_ok=True)  # first: a job without a result is one to do
        result.unlink(missing_ok=True)
        found = strict_json(content)
        if not isinstance(found, dict):
            raise TypeError("a result is an object")
        return found

    def conf_file(self) -> Path:
        """Return a new name for the conf of a run that is given.

        Raises:
            RunError: LF5013, no coordinator runs on this state folder.
        """
        self._require_running()
        return self._folder / f"{secrets.token_hex(8)}.yaml"

    def waiting(self) -> Iterator[tuple[str, Job]]:
        """Yield name and content of the jobs that wait, the oldest first; remove what is none.

        One that has a result was done by a coordinator that was killed before it removed the job.
        """
        for path in sorted(self._folder.glob("*.job")):
            if path.with_suffix(".result").exists():
                path.unlink(missing_ok=True)
                continue
            try:
                job = decode(Job, strict_json(path.read_bytes()))
            except (ValueError, OSError):
                path.unlink(missing_ok=True)
                continue
            yield path.name, job

    def done(self, name: str, result: Mapping[str, Any]) -> None:
        """Write a job's result for whoever waits for it; who gave up has taken the job back."""
        path = self._folder / name
        if path.exists():
            write_atomic(path.with_suffix(".result"), canonical_json(dict(result)))
            path.unlink(missing_ok=True)

    def _require_running(self) -> None:
        if not self._is_running():
            raise self._not_running()

    def _is_running(self) -> bool:
        """Return whether a coordinator holds the lock."""
        try:
            descriptor = os.open(self._state / _LOCK, os.O_RDWR)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(descriptor)
        return False

    def _not_running(self) -> RunError:
        return RunError(
            Problem("LF5013", "no coordinator runs on this state folder", where=str(self._state),
                    key="state", remedy="start it: lepton-fed server --conf conf/server.yaml")
        )  # fmt: skip
