"""Jobs reach the one coordinator that works on a state folder."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from lepton_fed.errors import Refused, RunError
from lepton_fed.server.jobs import Job, Jobs


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
