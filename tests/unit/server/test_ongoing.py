"""What a start does when it cannot be said which run was interrupted: nothing, unless told to."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lepton_fed.core.digests import canonical_json
from lepton_fed.errors import Refused
from lepton_fed.runs.folder import RunFolder
from lepton_fed.server import service as module
from lepton_fed.server.jobs import Jobs
from lepton_fed.server.ongoing import Ongoing, OngoingRun
from lepton_fed.server.service import _turns


class State:
    def __init__(self, path: Path) -> None:
        self.path, self.ongoing = path, Ongoing(path)
        self.runs = path / "runs"
        self.folder = RunFolder.create(self.runs, "task", "conf: true\n")

    def begin(self, job: str = "") -> OngoingRun:
        run = OngoingRun(str(self.folder.path), job, "conf")
        self.ongoing.begin(run)
        return run

    def turns(self, *, new: bool = False, resume: str = "") -> list[Any]:
        service: Any = SimpleNamespace(ongoing=self.ongoing, jobs=Jobs(self.path))
        loaded: Any = SimpleNamespace(conf=SimpleNamespace(runs=str(self.runs)))
        return _turns(service, loaded, once=False, new=new, resume=resume)


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> State:
    monkeypatch.setattr(module, "load_conf", lambda *given, **more: None)
    monkeypatch.setattr(module, "run_digest_of_conf", lambda conf: "conf")
    return State(tmp_path)


def spoil(state: State, how: str) -> None:
    if how == "not mounted":
        state.begin()
        state.runs.rename(state.path / "away")
        return
    state.begin()
    if how.startswith("done"):
        state.ongoing.end()
    name = "done.json" if how.startswith("done") else "ongoing.json"
    path = state.path / name
    content = {"zeroed": bytes(80), "empty": b"", "cut": path.read_bytes()[:20]}
    path.write_bytes(content[how.split()[-1]])


HOW = ["not mounted", "ongoing zeroed", "ongoing empty", "ongoing cut", "done zeroed", "done empty"]


@pytest.mark.parametrize("how", HOW)
def test_no_run_is_begun_while_what_was_done_cannot_be_said(state: State, how: str) -> None:
    spoil(state, how)
    with pytest.raises(Refused) as refused:
        state.turns()
    (problem,) = refused.value.problems
    assert problem.code == "LF4218"
    assert problem.where.endswith("done.json" if how.startswith("done") else "ongoing.json")
    assert "--new" in problem.remedy
    assert [turn.folder for turn in state.turns(new=True)] == [None]


def test_a_folder_that_is_there_again_is_gone_on_with(state: State) -> None:
    spoil(state, "not mounted")
    (state.path / "away").rename(state.runs)
    assert [turn.folder for turn in state.turns()] == [state.folder]


@pytest.mark.parametrize("how", ["ongoing zeroed", "ongoing empty"])
def test_a_run_that_is_named_is_gone_on_with_all_the_same(state: State, how: str) -> None:
    spoil(state, how)
    assert [turn.folder for turn in state.turns(resume=state.folder.name)] == [state.folder]


def test_a_job_s_run_that_is_named_is_gone_on_with_as_the_job_s(state: State) -> None:
    state.begin("1.job")
    (turn,) = state.turns(resume=state.folder.name)
    assert (turn.folder, turn.job) == (state.folder, "1.job")


def test_what_an_earlier_version_wrote_is_read(state: State) -> None:
    said = {"folder": str(state.folder.path), "job": "", "conf": "conf"}
    (state.path / "ongoing.json").write_bytes(canonical_json(said))
    assert state.ongoing.run() == OngoingRun(**said)


def test_without_the_files_nothing_was_done(state: State) -> None:
    assert state.ongoing.run() is None
    assert state.ongoing.done() is None
    assert [turn.folder for turn in state.turns()] == [None]
