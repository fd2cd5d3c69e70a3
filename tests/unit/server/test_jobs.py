"""Jobs reach the one coordinator that works on a state folder, and are done once."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lepton_fed.core.digests import canonical_json
from lepton_fed.errors import Problem, Refused, RunError
from lepton_fed.runs.files import write_atomic
from lepton_fed.runs.folder import RunFolder
from lepton_fed.server import service as module
from lepton_fed.server.jobs import Job, Jobs
from lepton_fed.server.ongoing import Ongoing, OngoingRun
from lepton_fed.server.service import Service, _Turn, _turns, _work


def test_a_job_is_given_done_and_its_result_handed_back(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)
    seen = []

    def work() -> None:
        while not seen:
            for path, job in Jobs(tmp_path).waiting():
                seen.append(job)
                jobs.done(path, {"version": 3})

    with jobs.owned():
        worker = threading.Thread(target=work)
        worker.start()
        assert jobs.give(Job("push", "/bundle"), 30) == {"version": 3}
        worker.join()
    assert seen == [Job("push", "/bundle")]
    assert list((tmp_path / "jobs").iterdir()) == []


def test_a_second_coordinator_on_the_folder_is_refused(tmp_path: Path) -> None:
    with Jobs(tmp_path).owned():
        with pytest.raises(Refused) as refused, Jobs(tmp_path).owned():
            pass
        assert refused.value.code == "LF4215"
    with Jobs(tmp_path).owned():
        pass


def test_without_a_coordinator_nothing_is_left_waiting(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(RunError) as failed:
            Jobs(tmp_path).give(Job("push", "/bundle"), 30)
        assert failed.value.code == "LF5013"
        with Jobs(tmp_path).owned():
            pass  # and none now, though there was one
    assert list((tmp_path / "jobs").iterdir()) == []


def test_a_job_that_takes_too_long_is_taken_back(tmp_path: Path) -> None:
    with Jobs(tmp_path).owned():
        with pytest.raises(RunError) as failed:
            Jobs(tmp_path).give(Job("run", "/conf.yaml"), 0.1)
        assert failed.value.code == "LF5014"
        assert list(Jobs(tmp_path).waiting()) == []


def test_jobs_come_in_the_order_they_were_given_and_nonsense_is_removed(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)
    with jobs.owned():
        folder = tmp_path / "jobs"
        (folder / "2.job").write_text('{"kind":"push","path":"/second"}')
        (folder / "1.job").write_text('{"kind":"run","path":"/first"}')
        (folder / "0.job").write_text('{"kind":"shell","path":"rm -r"}')
        assert [job.path for _, job in jobs.waiting()] == ["/first", "/second"]
        assert not (folder / "0.job").exists()


class Killed(BaseException):
    """The process is gone: nothing after it runs, not even what handles errors."""


class Coordinator:
    """A coordinator whose runs are one question to the sites, and a summary.

    Args:
        state: Its state folder.
        asked: Names of the runs that asked the sites; shared by all its starts.
        fails: Whether its runs end of something that only a person can mend.
    """

    def __init__(self, state: Path, asked: list[str], fails: bool) -> None:
        self.jobs, self.ongoing = Jobs(state), Ongoing(state)
        self.monitor = SimpleNamespace(failed=lambda code: None)
        self.channel = nullcontext
        self._runs, self._asked, self._fails = state / "runs", asked, fails

    def run(self, turn: _Turn, grid: object) -> Any:
        folder = turn.folder or RunFolder.create(self._runs, "task", "conf: true\n")
        self.ongoing.begin(OngoingRun(str(folder.path), turn.job, "conf"))
        if not (folder.path / "summary.json").exists():
            self._asked.append(folder.name)
            if self._fails:
                raise RunError(Problem("LF5005", "too many sites refused"))
            write_atomic(folder.path / "summary.json", b"{}")
        Service._end(self, turn)  # type: ignore[arg-type]
        return SimpleNamespace(folder=folder)


class Stopped(threading.Event):
    """A stop that comes when the service has looked for jobs and found nothing more."""

    def wait(self, timeout: float | None = None) -> bool:
        self.set()
        return True


class Federation:
    """A coordinator that is killed and started again, and somebody who gave it a job."""

    def __init__(self, state: Path, fails: bool) -> None:
        self.state, self.fails = state, fails
        self.asked: list[str] = []
        self.results: list[dict[str, Any]] = []
        self.job = state / "jobs" / "1.job"
        self.job.parent.mkdir(parents=True)
        finished = RunFolder.create(state / "runs", "task", "conf: true\n")
        Ongoing(state).begin(OngoingRun(str(finished.path), "", "conf"))
        Ongoing(state).end()
        write_atomic(self.job, canonical_json(Job("run", "/conf.yaml")))

    def start(self) -> None:
        coordinator: Any = Coordinator(self.state, self.asked, self.fails)
        loaded: Any = SimpleNamespace(conf=None)
        turns = _turns(coordinator, loaded, once=False, new=False, resume="")
        _work(coordinator, turns, once=False, told=lambda finished: None, stop=Stopped())

    def take(self) -> None:
        if self.job.with_suffix(".result").exists():
            self.results.append(Jobs(self.state)._take(self.job))


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[str]]:
    """Put a point before and after each write to the disk; kill at one of them."""

    def put(at: int) -> list[str]:
        monkeypatch.undo()
        monkeypatch.setattr(module, "load_conf", lambda *given, **more: None)
        monkeypatch.setattr(module, "run_digest_of_conf", lambda conf: "conf")
        names: list[str] = []

        def point(name: str) -> None:
            if at and len(names) >= at:  # what a dead process would do in its `finally`
                raise Killed
            names.append(name)
            if len(names) == at:
                raise Killed

        def around(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(path: Any, *given: Any, **more: Any) -> Any:
                said = f"{name} {getattr(path, 'suffix', '')}"
                point(f"before {said}")
                result = function(path, *given, **more)
                point(f"after {said}")
                return result

            return wrapped

        monkeypatch.setattr(Path, "replace", around("rename", Path.replace))
        monkeypatch.setattr(Path, "unlink", around("unlink", Path.unlink))
        monkeypatch.setattr(os, "fsync", around("sync", os.fsync))
        return names

    return put


@pytest.mark.parametrize("fails", [False, True], ids=["ends well", "fails"])
@pytest.mark.parametrize("early", [False, True], ids=["taken late", "taken early"])
def test_a_job_of_a_coordinator_that_is_killed_anywhere_is_run_once_and_told_once(
    tmp_path: Path, watch: Callable[[int], list[str]], fails: bool, early: bool
) -> None:
    undisturbed = Federation(tmp_path / "0", fails)
    names = watch(0)
    undisturbed.start()
    assert {"after rename .partial", "after unlink .job", "after unlink .json"} <= set(names)
    for at in range(1, len(names) + 1):
        watch(0)
        trial = Federation(tmp_path / str(at), fails)
        watch(at)
        with pytest.raises(Killed):
            trial.start()
        watch(0)
        if early:
            trial.take()
        before = len(trial.asked)
        told = bool(trial.results)
        trial.start()
        trial.start()
        trial.take()
        where = f"killed at point {at}, {names[at - 1]}"
        assert len(set(trial.asked)) == 1, where
        assert len(trial.results) == 1, where
        assert ("error" in trial.results[0]) == fails, where
        if told:
            assert len(trial.asked) == before, f"{where}: gone on with after its failure was told"
        assert not trial.job.exists(), where
        assert Ongoing(trial.state).run() is None, where


def test_a_result_is_not_left_for_somebody_who_gave_up(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)
    with jobs.owned():
        jobs.done("1.job", {"version": 3})
        assert list((tmp_path / "jobs").iterdir()) == []
