"""Coordinator and three sites as processes, in whose sum each site has its share of the noise."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from lepton_fed.clients.receipts import Receipts
from lepton_fed.clients.whole_part import whole_part
from tests.e2e.federation import SITES, Deployment, deployed

SHARED = (
    "privacy.record.enabled=false", "privacy.outside_epsilon=[]", "rounds.count=2",
    "rounds.evaluate=false", "privacy.client.enabled=true", "privacy.client.epsilon=20",
    "privacy.client.honest=3", "privacy.client.quantile=0.5",
)  # fmt: skip


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A coordinator and sites that have finished a run with client-level DP."""
    with deployed(tmp_path_factory.mktemp("client"), *SHARED, secure=True) as found:
        found.wait_for_event("run.finished")
        # It is written after the last line of the log.
        found.wait_for("a summary", lambda: list(found.root.glob("runs/*/summary.json")))
        yield found


def test_the_record_says_what_a_site_s_part_costs_and_against_whom_it_holds(
    federation: Deployment,
) -> None:
    (planned,) = [e for e in federation.events() if e["event"] == "client_dp.planned"]
    assert 19 < planned["epsilon"] <= 20
    assert (planned["noise"], planned["honest"], planned["cohort"]) == ("shared", 3, 3)
    closed = [e["sites"] for e in federation.events() if e["event"] == "round.closed"]
    assert closed == [sorted(SITES)] * 2
    (run,) = federation.root.glob("runs/*")
    client = json.loads((run / "summary.json").read_text())["client"]
    assert client["against"] == planned["against"]
    assert "while 3 sites of a sum add their share" in client["against"]


def test_the_receipt_of_each_masked_vector_says_it_too(federation: Deployment) -> None:
    closed = [e["clip"] for e in federation.events() if e["event"] == "round.closed"]
    for site in SITES:
        receipts = Receipts(federation.root / "state" / site / "receipts").read()
        masked = [r for r in receipts if r.numbers["phase"].startswith("mask")]
        assert len(masked) == 2
        for receipt, norm in zip(masked, (1.0, closed[0]), strict=True):
            assert receipt.numbers["clip"] == f"{norm:g}"
            said = receipt.numbers["client-level DP"]
            assert f"updates of norm {norm:g} and on how many were longer" in said
            assert (
                "this site's whole part in the run: epsilon" in receipt.numbers["client-level DP"]
            )
            assert receipt.vectors["masked"].norm_after <= norm
    assert closed[0] != 1.0
    (run,) = federation.root.glob("runs/*")
    client = json.loads((run / "summary.json").read_text())["client"]
    assert (client["quantile"], client["last_clip"]) == (0.5, closed[1])


def test_each_site_can_add_up_what_its_runs_cost_it(federation: Deployment) -> None:
    (planned,) = [e for e in federation.events() if e["event"] == "client_dp.planned"]
    for site in SITES:
        found = whole_part(Receipts(federation.root / "state" / site / "receipts").read())
        (run,) = found.runs
        assert (run.rounds, run.epsilon, run.delta) == (2, planned["epsilon"], planned["delta"])
        assert run.against == planned["against"]
        assert (found.epsilon, found.uncovered) == (run.epsilon, 0)
