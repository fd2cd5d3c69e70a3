"""Coordinator and three sites as separate processes: TLS, node authentication, seals, push."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lepton_fed.clients.receipts import Receipts
from lepton_fed.simulations.sequential import simulate
from tests.e2e.federation import SITES, Deployment, deployed, lepton

PLAIN = ("privacy.record.enabled=false", "rounds.count=3")


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A coordinator and sites that have finished a run without DP."""
    with deployed(tmp_path_factory.mktemp("federation"), *PLAIN) as found:
        found.wait_for_event("run.finished")
        yield found


@pytest.fixture(scope="module")
def pushed(federation: Deployment) -> Path:
    """The run's bundle, version 1, in use at every site."""
    lepton("export", "last", cwd=federation.root)
    (bundle,) = federation.root.glob("runs/*/bundle")
    told = json.loads(push(federation, bundle))
    assert {name: site["in_force"] for name, site in told["sites"].items()} == dict.fromkeys(
        SITES, 1
    )
    return bundle


def push(federation: Deployment, bundle: Path, code: int = 0) -> str:
    return lepton(
        "push", str(bundle), "--conf", "server.yaml", "--json", cwd=federation.root, code=code
    ).stdout


def predict(federation: Deployment, site: str) -> tuple[str, str]:
    """Return what predict says and writes at a site, on the first rows of all sites."""
    rows = np.load(federation.root / "north.npz")["inputs"][:20]
    np.savez(federation.root / "new.npz", inputs=rows)
    words = ["predict", "--conf", f"{site}.yaml", "--input", "new.npz", "--output", f"{site}.csv"]
    said = lepton(*words, cwd=federation.root).stdout
    return said, (federation.root / f"{site}.csv").read_text()


def test_a_deployment_prints_the_run_digest_of_the_simulation(
    federation: Deployment, tmp_path: Path
) -> None:
    conf = dataclasses.replace(federation.simulation.conf, runs=str(tmp_path))
    simulated = simulate(dataclasses.replace(federation.simulation, conf=conf))
    end = federation.wait_for_event("run.finished")
    assert end["digest"] == simulated.summary.digest
    assert end["metrics"]["accuracy"] == simulated.summary.metrics["accuracy"]


def test_every_line_of_the_record_names_sites_and_a_round_is_one_trip(
    federation: Deployment,
) -> None:
    events = federation.events()
    accepted = [event for event in events if event["event"] == "reply.accepted"]
    assert sorted((e["round"], e["site"]) for e in accepted) == sorted(
        (number, site) for number in (1, 2, 3) for site in SITES
    )
    evaluated = [event["round"] for event in events if event["event"] == "model.evaluated"]
    assert evaluated == [0, 1, 2, 3]  # each rode on the round after it, the last by itself


def test_each_site_keeps_a_receipt_of_everything_that_left(federation: Deployment) -> None:
    sent = {(e["round"], e["site"]) for e in federation.events() if e["event"] == "reply.accepted"}
    for site in SITES:
        found = Receipts(federation.root / "state" / site / "receipts").read()
        with_update = [receipt for receipt in found if receipt.vectors]
        assert {(receipt.round, site) for receipt in with_update} == {
            one for one in sent if one[1] == site
        }
        assert all(receipt.vectors["delta"].elements == 4810 for receipt in with_update)
        told = lepton("receipts", "--conf", f"{site}.yaml", "--number", "1", cwd=federation.root)
        for word in ("delta: 4,810 numbers", "before clipping", "evaluation", "coordinator "):
            assert word in told.stdout


def test_a_pushed_bundle_is_in_use_at_each_site(federation: Deployment, pushed: Path) -> None:
    answers = [predict(federation, site) for site in SITES]
    assert all("verified    version 1" in said for said, _ in answers)
    assert len({written for _, written in answers}) == 1
    assert len(answers[0][1].splitlines()) == 21


def test_a_push_that_was_done_sends_nothing_again(federation: Deployment, pushed: Path) -> None:
    told = json.loads(push(federation, pushed))
    assert [site["bytes_sent"] for site in told["sites"].values()] == [0, 0, 0]


def test_a_changed_bundle_is_refused_and_the_version_in_use_stays(
    federation: Deployment, pushed: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(pushed, changed)
    model = bytearray((changed / "model.onnx").read_bytes())
    model[len(model) // 2] ^= 1
    (changed / "model.onnx").write_bytes(model)
    assert "LF4112" in push(federation, changed, code=4)
    assert "version 1" in predict(federation, "north")[0]


def test_a_bundle_under_another_key_is_refused(
    federation: Deployment, pushed: Path, tmp_path: Path
) -> None:
    lepton("keys", "coordinator", cwd=tmp_path)
    other = tmp_path / "other"
    words = ["export", "last", "--key", str(tmp_path / "keys" / "coordinator.pem")]
    lepton(*words, "--out", str(other), "--version", "9", cwd=federation.root)
    assert "LF4104" in push(federation, other, code=4)


def test_an_older_version_is_refused_by_the_sites(
    federation: Deployment, pushed: Path, tmp_path: Path
) -> None:
    newer = tmp_path / "newer"
    lepton("export", "last", "--out", str(newer), "--version", "12", cwd=federation.root)
    push(federation, newer)
    assert "version 12" in predict(federation, "east")[0]
    told = json.loads(push(federation, pushed, code=4))
    assert {site["refusal"]["code"] for site in told["sites"].values()} == {"LF4126"}
    assert "version 12" in predict(federation, "east")[0]


def test_runs_come_one_after_another_and_repeat_to_the_bit(federation: Deployment) -> None:
    first = federation.wait_for_event("run.finished")
    words = ["runs", "submit", "--conf", "server.yaml", *PLAIN, "--json"]
    told = json.loads(lepton(*words, cwd=federation.root).stdout)
    summary = json.loads((federation.root / told["folder"] / "summary.json").read_text())
    assert summary["digest"] == first["digest"]
    assert summary["run"] != first.get("run")
    refused = lepton(
        "runs", "submit", "--conf", "server.yaml", *PLAIN, "rounds.count=101",
        cwd=federation.root, code=5,
    )  # fmt: skip
    assert "LF5005" in refused.stderr  # every site's policy allows 100 rounds
    assert {e["code"] for e in federation.events() if e["event"] == "site.refused"} == {"LF4603"}


def test_a_second_coordinator_on_the_state_folder_is_refused(federation: Deployment) -> None:
    done = lepton("server", "--conf", "server.yaml", "--once", cwd=federation.root, code=4)
    assert "LF4215" in done.stderr


def test_a_second_client_of_a_site_is_refused(federation: Deployment) -> None:
    done = lepton("client", "--conf", "north.yaml", cwd=federation.root, code=4)
    assert "LF4513" in done.stderr


def test_the_checks_before_the_first_contact_find_all_well(federation: Deployment) -> None:
    for conf in ("north.yaml", "server.yaml"):
        told = json.loads(lepton("check", "--conf", conf, "--json", cwd=federation.root).stdout)
        assert told["ok"], told
