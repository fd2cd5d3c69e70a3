"""Coordinator and three sites as processes, with secure aggregation: masked vectors alone."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from lepton_fed.clients.receipts import Receipts
from lepton_fed.simulations.sequential import simulate
from tests.e2e.federation import SITES, Deployment, deployed

PLAIN = ("privacy.record.enabled=false", "privacy.outside_epsilon=[]", "rounds.count=3")


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A coordinator and sites that have finished a run of masked rounds."""
    with deployed(tmp_path_factory.mktemp("masked"), *PLAIN, secure=True) as found:
        found.wait_for_event("run.finished")
        yield found


def test_it_prints_the_run_digest_of_the_simulation(federation: Deployment, tmp_path: Path) -> None:
    conf = dataclasses.replace(federation.simulation.conf, runs=str(tmp_path))
    simulated = simulate(dataclasses.replace(federation.simulation, conf=conf))
    end = federation.wait_for_event("run.finished")
    assert end["digest"] == simulated.summary.digest
    assert end["metrics"] == simulated.summary.metrics


def test_nothing_of_one_site_is_in_the_record(federation: Deployment) -> None:
    events = federation.events()
    accepted = [event for event in events if event["event"] == "reply.accepted"]
    assert len(accepted) == 4 * len(SITES)  # three rounds, and the last evaluation
    assert all(event["norm"] is None and event["epsilon"] is None for event in accepted)
    assert not [event for event in events if event["event"] == "reply.refused"]
    (run,) = federation.root.glob("runs/*")
    metrics = (run / "metrics.csv").read_text()
    assert not [site for site in SITES if site in metrics]
    assert not list((run / "masked").iterdir()), "nothing is left of rounds that are over"


def test_the_adverts_of_a_round_come_with_the_one_before(federation: Deployment) -> None:
    """Four trips a round: a site gives receipts of four phases, and one more advert in all."""
    said = [line for name in SITES for line in federation.said(name).splitlines()]
    assert not [line for line in said if "LF45" in line]
    for site in SITES:
        receipts = Receipts(federation.root / "state" / site / "receipts").read()
        phases = [receipt.numbers["phase"].split(",")[0] for receipt in receipts]
        assert phases == ["share", "mask", "confirm", "reveal"] * 4


def test_receipts_say_in_words_what_left(federation: Deployment) -> None:
    _, mask, _, reveal, *_ = Receipts(federation.root / "state" / "north" / "receipts").read()
    record = mask.vectors["masked"]
    assert record.bytes == 4 * record.elements > 4 * 4810
    assert record.norm_after > 0
    assert mask.numbers["masked with"] == "east, north, south"
    assert mask.numbers["clip"] == "100"
    assert "nobody can read it alone" in mask.numbers["masked vector"]
    assert "inside the masked vector" in mask.numbers["weight"]
    assert reveal.numbers["signed by"] == "east, north, south"
    assert "of the keys of 0" in reveal.numbers["shares"]


def test_no_vector_in_clear_stays_at_a_site(federation: Deployment) -> None:
    for site in SITES:
        assert not list((federation.root / "state" / site / "masked").glob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["supernode", "site"])
def test_a_site_that_is_killed_in_a_round_costs_that_round_at_most(
    tmp_path: Path, victim: str
) -> None:
    found = Deployment(tmp_path, *PLAIN, "rounds.count=8", secure=True)
    conf = yaml.safe_load((tmp_path / "server.yaml").read_text())
    (tmp_path / "server.yaml").write_text(yaml.safe_dump(conf | {"patience": 1.0}))
    try:
        for who in ("coordinator", *SITES):
            found.start(who)
        found.wait_for_event("secagg.formed", round=3)
        process = found.processes["south"]
        if victim == "site":
            process.kill()
            process.wait()
            found.start("south")
        else:
            os.kill(_supernode_of(process.pid), signal.SIGKILL)
        found.wait_for_event("run.finished")
        closed = [event for event in found.events() if event["event"] == "round.closed"]
        assert [event["round"] for event in closed] == list(range(1, 9))
        used = [event["round"] for event in closed if event["sites"]]
        assert len(used) >= 6
        assert all(event["sites"] == sorted(SITES) for event in closed if event["sites"])
    finally:
        found.stop()


def _supernode_of(parent: int) -> int:
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0")
            about = (entry / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(about[1]) == parent and any(b"supernode" in word for word in command):
            return int(entry.name)
    raise AssertionError("no SuperNode")


def test_a_coordinator_that_is_killed_in_a_masked_round_ends_as_an_undisturbed_one(
    federation: Deployment, tmp_path: Path
) -> None:
    undisturbed = federation.wait_for_event("run.finished")
    with deployed(tmp_path, *PLAIN, secure=True) as found:
        for number in (1, 2, 3):
            found.wait_for_event("secagg.formed", round=number)
            found.processes["coordinator"].kill()
            found.processes["coordinator"].wait()
            found.start("coordinator")
        assert found.wait_for_event("run.finished")["digest"] == undisturbed["digest"]
        assert not [e for e in found.events() if e["event"] == "secagg.abandoned"]
