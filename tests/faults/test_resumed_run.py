"""A run whose coordinator is killed again and again ends as an undisturbed one does."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.e2e.federation import SITES, Deployment, deployed, lepton
from tests.faults.rows import Fault, Rounds, fault

RUN = (
    "privacy.record.enabled=false",
    "rounds.count=8",
    "rounds.quorum=3",
)
Moment = dict[str, object]
PLAIN: tuple[Moment, ...] = (
    {"event": "run.started"},
    {"event": "round.started", "round": 2},
    {"event": "reply.accepted", "round": 3},
    {"event": "round.closed", "round": 4},
    {"event": "reply.accepted", "round": 6},
    {"event": "round.closed", "round": 8},
)
MASKED: tuple[Moment, ...] = (
    {"event": "run.started"},
    {"event": "secagg.formed", "round": 2},
    {"event": "secagg.opened", "round": 3},
    {"event": "round.closed", "round": 4},
    {"event": "secagg.formed", "round": 6},
    {"event": "round.closed", "round": 8},
)
LOOK_S = 0.01


def kill_at(federation: Deployment, moment: Moment) -> None:
    """Kill the coordinator as soon as it has written an event; start it again."""
    process = federation.processes["coordinator"]
    until = time.monotonic() + 120
    while not any(moment.items() <= event.items() for event in written(federation.root)):
        assert process.poll() is None, federation.said("coordinator")
        assert time.monotonic() < until, federation.said("coordinator")
        time.sleep(LOOK_S)
    process.kill()
    process.wait()
    federation.start("coordinator")


def written(root: Path) -> list[Moment]:
    """Return the events of the run so far; the last line may be half."""
    found = []
    for path in (root / "runs").glob("*/events.jsonl"):
        found += [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    return found


@fault(
    name="the coordinator is killed six times in a run of eight rounds",
    where="coordinator",
    sees="coordinator: `run.resumed` each time; `lepton-fed runs show`: one run, finished",
    lost="nothing: run digest, model and metrics are those of an undisturbed run",
    normal_s=60,
    rounds=("masked", "plain"),
)
@pytest.mark.parametrize("kind", ["masked", "plain"])
def test_a_run_that_was_killed_at_six_moments_ends_as_an_undisturbed_one(
    tmp_path: Path, rows: tuple[Fault, ...], kind: Rounds
) -> None:
    del rows
    moments = MASKED if kind == "masked" else PLAIN
    with deployed(tmp_path, *RUN, secure=kind == "masked") as federation:
        for moment in moments:
            kill_at(federation, moment)
        disturbed = federation.wait_for_event("run.finished")
        resumed = [event["round"] for event in written(tmp_path) if event["event"] == "run.resumed"]
        assert len(resumed) >= len(moments) - 1, "the last kill may come when all is written"
        assert resumed == sorted(resumed)
        words = ["runs", "submit", "--conf", "server.yaml", *RUN, "--json"]
        told = json.loads(lepton(*words, cwd=tmp_path).stdout)
        undisturbed = json.loads((tmp_path / told["folder"] / "summary.json").read_text())
        (other,) = set((tmp_path / "runs").iterdir()) - {tmp_path / told["folder"]}
        summary = json.loads((other / "summary.json").read_text())
        for key in ("digest", "model", "metrics", "error_bounds", "parameters", "rounds"):
            assert summary[key] == undisturbed[key], key
        assert disturbed["digest"] == undisturbed["digest"]
        rounds = {site["name"]: site["rounds"] for site in summary["sites"]}
        assert rounds == dict.fromkeys(SITES, 8)
        assert rows_of(other) == rows_of(tmp_path / told["folder"])


def rows_of(run: Path) -> list[str]:
    """Return the metrics of a run; within a round, sites answer in any order."""
    return sorted((run / "metrics.csv").read_text().splitlines())
