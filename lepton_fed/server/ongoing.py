"""Which run a coordinator is in the middle of, so that the next start goes on with it.

Two small files in the state folder: ``ongoing.json`` names the run from its folder's making to its
summary; ``done.json`` says which run of a conf is finished, so that a service that is started again
by the system does not run the same conf a second time, at the cost of every site's budget. For the
same reason no run is begun while one of them cannot be relied on: a person says that, with --new.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lepton_fed.config.schema import ServerConf
from lepton_fed.core.decode import decode, strict_json
from lepton_fed.core.digests import canonical_json, digest_of
from lepton_fed.errors import Problem, Refused
from lepton_fed.runs.files import reading, write_atomic, writing
from lepton_fed.runs.folder import RunFolder

__all__ = ["Ongoing", "OngoingRun", "run_digest_of_conf"]


@dataclass(frozen=True)
class OngoingRun:
    """The run in progress.

    Args:
        folder: Its folder, absolute.
        job: Name of the job that asked for it; empty for the conf's own run.
        conf: :func:`run_digest_of_conf` of its conf.
        result: What the job's giver is still to be told of the run, which is over; None before.
    """

    folder: str
    job: str
    conf: str
    result: dict[str, Any] | None = None


class Ongoing:
    """What a coordinator does, for its next start.

    Args:
        state: The coordinator's state folder.
    """

    def __init__(self, state: Path) -> None:
        self._ongoing = state / "ongoing.json"
        self._done = state / "done.json"

    def begin(self, run: OngoingRun) -> None:
        """Write down that a run has begun.

        Raises:
            RunError: It cannot be written.
        """
        write_atomic(self._ongoing, canonical_json(run) + b"\n")

    def answer(self, job: str, result: Mapping[str, Any]) -> None:
        """Write down that a job's run is over, and what its giver is to be told.

        From here on no start goes on with the run or does the job again.

        Args:
            job: Name of the job; of one whose run never began there is nothing to write.
            result: What its giver is to be told.

        Raises:
            RunError: It cannot be written.
        """
        run = _read(self._ongoing)
        if run and run.job == job:
            self.begin(replace(run, result=dict(result)))

    def end(self, job: str = "") -> None:
        """Write down that it is finished.

        Args:
            job: Name of the job that asked for it; empty for the conf's own run.

        Raises:
            RunError: It cannot be written.
        """
        run = _read(self._ongoing)
        if run is None or run.job != job:
            return
        if not run.job:
            write_atomic(self._done, canonical_json(run) + b"\n")
        with writing(self._ongoing):
            self._ongoing.unlink(missing_ok=True)

    def run(self) -> OngoingRun | None:
        """Return the run that was begun and is not finished; None without one.

        Raises:
            Refused: LF4218, the file does not say which, or the run's folder is not there.
            RunError: The file cannot be read.
        """
        found = _read(self._ongoing)
        if found and found.result is None:
            conf = RunFolder(Path(found.folder)).conf
            with reading(conf):
                there = conf.is_file()
            if not there:
                raise _unreliable(self._ongoing, f"the run's folder {found.folder} is not there")
        return found

    def done(self) -> OngoingRun | None:
        """Return the last finished run of the conf; None without one.

        Raises:
            Refused: LF4218, the file does not say which.
            RunError: The file cannot be read.
        """
        return _read(self._done)


def run_digest_of_conf(conf: ServerConf) -> str:
    """Return a digest of what a conf runs, whatever else it says."""
    said = [conf.task, conf.strategy, conf.rounds, conf.privacy, conf.seed]
    return digest_of("lepton-fed conf of a run 1", said)


def _read(path: Path) -> OngoingRun | None:
    with reading(path):
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
    try:
        said = strict_json(content)
        # Files of earlier versions have no result.
        return decode(OngoingRun, {"result": None, **said} if isinstance(said, dict) else said)
    except ValueError as error:
        raise _unreliable(path, f"it is broken: {error}") from None


def _unreliable(path: Path, why: str) -> Refused:
    return Refused(
        Problem("LF4218", f"which run was in progress or is finished cannot be said: {why}",
                where=str(path), remedy="mount or restore what is missing; or go on with a run "
                "that you name: --resume RUN; or begin anew, at the cost of every site's budget: "
                "--new")
    )  # fmt: skip
