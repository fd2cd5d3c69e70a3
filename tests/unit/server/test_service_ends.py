"""What ends the coordinator's service and what it stays for, so that a new start is worth it."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lepton_fed.errors import LeptonError, Problem, Refused, RunError
from lepton_fed.server import service as module
from lepton_fed.server.jobs import Job
from lepton_fed.server.service import _Turn, _work

BROKEN = ["LF5017", "LF5018", "LF5019", "LF5209", "LF5210", "LF5220"]
ABSENT = ["LF5001", "LF5004"]
A_PERSONS = ["LF5002", "LF5003", "LF5005"]


class Stopped(threading.Event):
    """A stop that comes when the service has looked for jobs and found nothing more."""

    def wait(self, timeout: float | None = None) -> bool:
        self.set()
        return True


class FailingService:
    """A service whose runs and pushes end of one error."""

    def __init__(self, error: LeptonError, jobs: dict[str, Job]) -> None:
        self.error = error
        self.results: dict[str, Any] = {}
        self.ended: list[str] = []
        self.told: list[str] = []
        self.jobs = SimpleNamespace(waiting=lambda: list(jobs.items()), done=self._done)
        self.ongoing = SimpleNamespace(answer=lambda *said: None, end=self.ended.append)
        self.monitor = SimpleNamespace(failed=self.told.append)

    def _done(self, name: str, result: dict[str, Any]) -> None:
        self.results[name] = result

    @contextmanager
    def channel(self):
        yield None

    def run(self, turn: _Turn, grid: object) -> None:
        raise self.error

    def push(self, path: Path, grid: object) -> None:
        raise self.error


def error_of(code: str) -> LeptonError:
    return RunError(Problem(code, "it failed"))


def work(service: FailingService, turns: list[_Turn], *, once: bool = False) -> None:
    _work(service, turns, once=once, told=lambda finished: None, stop=Stopped())


def a_turn(job: str = "") -> _Turn:
    return _Turn(SimpleNamespace(conf=None, located=lambda problem: problem), job=job)


@pytest.mark.parametrize("code", BROKEN + ABSENT)
def test_what_a_new_start_may_mend_ends_the_service(code: str) -> None:
    service = FailingService(error_of(code), {})
    with pytest.raises(RunError) as failed:
        work(service, [a_turn()])
    assert (failed.value.code, failed.value.exit_code) == (code, 5)
    assert service.ended == [], "the run is gone on with"


@pytest.mark.parametrize("code", A_PERSONS)
def test_what_only_a_person_can_mend_is_told_and_the_service_stays(code: str) -> None:
    service = FailingService(error_of(code), {})
    work(service, [a_turn()])
    assert service.told == [code]


def test_a_refusal_is_told_and_the_service_stays() -> None:
    service = FailingService(Refused(Problem("LF4216", "too few")), {})
    work(service, [a_turn()])
    assert service.told == ["LF4216"]


@pytest.mark.parametrize("code", A_PERSONS + BROKEN)
def test_with_once_every_error_ends_it(code: str) -> None:
    with pytest.raises(RunError):
        work(FailingService(error_of(code), {}), [a_turn()], once=True)


@pytest.mark.parametrize("code", BROKEN)
@pytest.mark.parametrize("kind", ["run", "push"])
def test_a_job_that_a_broken_disk_interrupts_waits_for_the_next_start(
    code: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "load_conf", lambda *arguments, **more: a_turn().loaded)
    service = FailingService(error_of(code), {"1.job": Job(kind, "/a/path")})
    with pytest.raises(RunError):
        work(service, [])
    assert service.results == {}
    assert service.ended == []


def test_a_run_of_a_job_that_was_interrupted_waits_for_the_next_start_again() -> None:
    service = FailingService(error_of("LF5018"), {})
    with pytest.raises(RunError):
        work(service, [a_turn("1.job")])
    assert (service.results, service.ended) == ({}, [])


@pytest.mark.parametrize("code", ABSENT + A_PERSONS)
def test_whoever_gave_a_job_is_told_what_it_ended_of(
    code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "load_conf", lambda *arguments, **more: a_turn().loaded)
    service = FailingService(error_of(code), {"1.job": Job("run", "/a/conf.yaml")})
    work(service, [])
    assert service.results["1.job"]["error"]["problems"][0]["code"] == code
    assert service.ended == ["1.job"]
