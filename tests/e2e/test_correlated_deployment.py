"""Coordinator and three sites as processes, with noise that is correlated over steps."""

from __future__ import annotations

import json

import pytest

from lepton_fed.clients.receipts import Receipts
from lepton_fed.privacy.dp.accounting import epsilon_of
from lepton_fed.privacy.dp.events import event_of
from tests.e2e.federation import SITES, deployed
from tests.ledger_entries import charges_in, entries_in

FTRL = (
    "privacy.record.enabled=true", "privacy.record.epsilon=6", "privacy.record.mechanism=dp_ftrl",
    "privacy.record.sampler=full", "privacy.outside_epsilon=[]", "rounds.count=60",
    "rounds.evaluate=false",
)  # fmt: skip


@pytest.mark.slow
def test_a_killed_site_goes_on_with_the_same_mechanism(tmp_path_factory) -> None:
    with deployed(tmp_path_factory.mktemp("correlated"), *FTRL) as federation:
        federation.wait_for_event("round.closed", round=2)
        process = federation.processes[SITES[0]]
        process.kill()
        process.wait()
        federation.start(SITES[0])
        federation.wait_for_event("run.finished")
        (run,) = federation.root.glob("runs/*")
        summary = json.loads((run / "summary.json").read_text())
        assert (summary["mechanism"], summary["sampler"]) == ("dp_ftrl", "full")
        for site, told in zip(sorted(SITES), summary["sites"], strict=True):
            state = federation.root / "state" / site
            charged = [event_of(body["event"]) for body in charges_in(state)]
            noted = [body["round"] for body in entries_in(state, "answered")]
            assert noted == sorted(set(noted))
            assert len(noted) >= (3 if site == SITES[0] else 5)
            # Whatever was aborted, and wherever: what left is paid for, once.
            steps = charged[0].steps
            ends = [event.end for event in charged if event.steps]
            assert ends == [steps * (number + 1) for number in range(len(noted))]
            assert told["epsilon"] == epsilon_of(charged, 1e-5) <= 6
            receipts = Receipts(state / "receipts").read()
            assert any(
                "correlated noise (dp_ftrl)" in receipt.numbers.get("epsilon holds for", "")
                for receipt in receipts
            )
