"""A site's agent in a masked run: which messages it answers, what it writes down, what it says."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

from lepton_fed.clients import supervisor
from lepton_fed.clients.agent import Agent
from lepton_fed.clients.receipts import Receipts
from lepton_fed.config.schema import (
    AggregationFloor,
    Privacy,
    PrivacyFloor,
    RecordPrivacy,
    SecureAggregation,
)
from lepton_fed.core.digests import canonical_json
from lepton_fed.core.exchange import Offer, PhaseAsk, Reply, Update, ask_digest
from lepton_fed.errors import DataError, Problem
from lepton_fed.identity.keys import load_private_key
from lepton_fed.identity.roster import enrol, write_roster
from lepton_fed.privacy.masked_plan import Shape, context_of, masked_layout, roster_digest
from lepton_fed.privacy.secagg.member import Member, Rules
from lepton_fed.privacy.secagg.messages import Advert
from lepton_fed.privacy.secagg.requests import (
    AdvertReply,
    AdvertRequest,
    MaskRequest,
    ShareReply,
    ShareRequest,
    packed_body,
    read_body,
)
from lepton_fed.strategies.base import DELTA
from lepton_fed.training.kit import build_kit
from tests.unit.clients.conftest import TASK, agreement_for, ask_for

NAMES = ("east", "north", "west")
NOON = datetime.fromisoformat("2026-01-05 12:00")
KIT = build_kit(TASK, 5)
BOUND = TASK.aggregation.norm_bound
SHAPE = Shape(KIT.layout.digest, (DELTA,), KIT.layout.size, KIT.plan.size)
PRIVATE = "patient 4711 in /home/owner/rows.npz"


class StandIn:
    """A training child without a process."""

    def __init__(self, error=None):
        self.error, self.asked = error, []

    def begin(self, agreement):
        return SHAPE

    def answer(self, site, ask, limit_s):
        self.asked.append(ask)
        if self.error:
            raise self.error
        delta = np.full(SHAPE.size, 0.25, np.float32)
        update = Update(SHAPE.layout, {DELTA: delta}, 1.0, {DELTA: 3 * BOUND})
        return Reply(site, update, np.ones(SHAPE.counts), epsilon=0.5)

    def close(self):
        """Do nothing."""


class Run:
    """A run with three sites, of which one is an agent's."""

    def __init__(self, conf, parties, **privacy):
        secure = SecureAggregation(enabled=True, **privacy)
        self.agreement = replace(
            agreement_for(privacy=Privacy(secure_aggregation=secure)), cohort=3
        )
        self.conf, self.parties = conf, parties
        for name in ("east", "west"):
            parties.roster = enrol(parties.roster, parties.another(name))
        write_roster(parties.folder / "roster.json", parties.roster, parties.coordinator)
        self.keys = {member.name: member.key for member in parties.roster.sites}
        self.digest = roster_digest(self.keys)
        layout = masked_layout(self.agreement, SHAPE, train=True, evaluate=True)
        self.words = layout.words
        self.context = context_of(self.agreement, SHAPE, layout, self.digest, serial=1, attempt=1)
        self.child = StandIn()
        self.others = {
            name: Member(
                name, load_private_key(parties.folder / f"{name}.pem"), self.keys, Rules(3, 2 / 3)
            )
            for name in ("east", "west")
        }

    def agent(self, child=None, conf=None, now=NOON):
        parties = self.parties
        return Agent(
            conf or self.conf, parties.key, parties.node_key, parties.coordinator.public_key(),
            child or self.child, lambda: now,
        )  # fmt: skip

    def offered(self, **named):
        found = self.agent(**named)
        reply = found.offered(Offer(canonical_json(self.agreement), self.parties.signed()))
        assert reply.refusal is None
        return found

    def asked(self, phase, request, attempt=1, **changes):
        ask = ask_for(self.agreement, evaluate=True, **changes)
        return PhaseAsk(phase, attempt, packed_body(request), ask)

    def adverts(self, site):
        reply = site.phased(self.asked("advertise", AdvertRequest(self.digest)))
        own = read_body(AdvertReply, reply.body).advert
        found = {n: member.advertise(self.context) for n, member in self.others.items()}
        wires = {name: advert.wire() for name, advert in found.items()} | {"north": own}
        return [wires[name] for name in NAMES]

    def share(self, site):
        """Bring the round to the masks; return what the site is asked then."""
        adverts = self.adverts(site)
        asked = self.asked("share", ShareRequest(self.digest, adverts, 2))
        reply = site.phased(asked)
        assert reply.refusal is None
        assert len(read_body(ShareReply, reply.body).envelopes) == 3
        envelopes = []
        for member in self.others.values():
            subject = ask_digest(asked.ask)
            made = member.share(self.context, [Advert.parse(a) for a in adverts], 2, subject)
            envelopes.append(made[1].wire())
        return self.asked("mask", MaskRequest(self.digest, envelopes, list(NAMES)))

    def receipts(self):
        return Receipts(Path(self.conf.state) / "receipts").read()


@pytest.fixture
def run(conf, parties):
    return Run(conf, parties)


def test_in_a_masked_run_no_update_leaves_as_it_is(run):
    site = run.offered()
    for train in (True, False):
        reply = site.asked(ask_for(run.agreement, train=train, evaluate=True))
        assert reply.refusal.code == "LF4518"
        assert (reply.update, reply.counts, reply.epsilon) == (None, None, None)
    assert run.child.asked == []
    assert [receipt.refusal for receipt in run.receipts()] == ["LF4518"], "said once, it is said"
    again = run.agent().asked(ask_for(run.agreement))
    assert again.refusal.code == "LF4518", "after a restart too"


@pytest.mark.parametrize("phase", ["advertise", "share", "mask", "confirm", "reveal"])
def test_in_a_plain_run_no_phase_is_answered(conf, parties, phase):
    run = Run(conf, parties)
    run.agreement = agreement_for()
    site = run.offered()
    reply = site.phased(run.asked(phase, AdvertRequest(run.digest)))
    assert (reply.refusal.code, reply.body, reply.masked) == ("LF4518", b"", None)
    assert not (Path(conf.state) / "masked").exists()


def test_a_phase_of_a_run_that_nobody_agreed_to_is_refused_without_a_receipt(run):
    reply = run.agent().phased(run.asked("advertise", AdvertRequest(run.digest)))
    assert reply.refusal.code == "LF4501"
    assert not (Path(run.conf.state) / "receipts").exists()


def test_what_leaves_in_each_phase_is_written_down_in_plain_words(run):
    site = run.offered()
    mask = run.share(site)
    reply = site.phased(mask)
    assert reply.refusal is None
    share, masked = run.receipts()  # of an advert, which says nothing of the rows, there is none
    message = share.numbers["message"]
    assert re.fullmatch("[0-9]+ bytes, SHA-256 [0-9a-f]{64}", message)
    assert share.numbers == {
        "message": message,
        "phase": "share, attempt 1",
        "cohort": "east, north, west",
        "threshold": "2 of 3 sites",
        "envelopes": "2, sealed, each for one other site of the cohort",
    }
    assert share.vectors == {}
    vector = masked.vectors["masked"]
    packed = reply.masked[:].tobytes()
    assert (vector.elements, vector.bytes) == (run.words, 4 * run.words)
    assert vector.sha256 == hashlib.sha256(packed).hexdigest()
    assert (vector.norm_before, vector.norm_after) == (3 * BOUND, BOUND)
    assert masked.numbers["phase"] == "mask, attempt 1"
    assert masked.numbers["masked with"] == "east, north, west"
    assert "nobody can read it alone" in masked.numbers["masked vector"]
    assert masked.numbers["evaluation"] == "inside the masked vector"
    assert "outside epsilon" not in masked.numbers, "there is none"
    assert masked.numbers["clip"] == f"{BOUND:g}"
    assert (masked.run, masked.round, masked.site) == ("run-1", 1, "north")


def test_under_dp_counts_inside_the_masked_vector_are_written_down_as_outside_epsilon(run):
    privacy = replace(
        run.agreement.privacy,
        record=RecordPrivacy(enabled=True, epsilon=1.0),
        outside_epsilon=["evaluation"],
    )
    run.agreement = replace(run.agreement, privacy=privacy)
    layout = masked_layout(run.agreement, SHAPE, train=True, evaluate=True)
    run.context = context_of(run.agreement, SHAPE, layout, run.digest, serial=1, attempt=1)
    site = run.offered()
    assert site.phased(run.share(site)).refusal is None
    assert run.receipts()[-1].numbers["outside epsilon"] == "evaluation"


def test_counts_that_may_not_leave_are_not_in_the_masked_vector_either(run, conf):
    conf = replace(conf, policy=replace(conf.policy, leaves=[]))
    site = run.offered(conf=conf)
    site.phased(run.share(site))
    assert "evaluation" not in run.receipts()[-1].numbers


def test_nothing_leaves_when_the_receipt_cannot_be_written(run):
    site = run.offered()
    mask = run.share(site)
    receipts = Path(run.conf.state, "receipts")
    receipts.rename(receipts.with_name("elsewhere"))
    receipts.write_text("a file where a folder should be")
    reply = site.phased(mask)
    assert reply.refusal.code.startswith("LF52")
    assert (reply.body, reply.masked) == (b"", None)
    receipts.unlink()
    receipts.with_name("elsewhere").rename(receipts)
    assert run.agent().phased(mask).masked is not None, "the same vector leaves when it can"
    assert len(run.child.asked) == 1


def test_of_a_failure_only_a_code_leaves(run):
    child = StandIn(DataError(Problem("LF2001", PRIVATE, where=PRIVATE)))
    site = run.offered(child=child)
    asked = run.asked("share", ShareRequest(run.digest, run.adverts(site), 2))
    reply = site.phased(asked)
    assert reply.refusal.code == "LF2001"
    assert "4711" not in str(reply.refusal)
    assert run.receipts()[-1].refusal == "LF2001"
    assert run.receipts()[-1].vectors == {}


def test_outside_its_hours_a_site_masks_nothing(run, conf):
    conf = replace(conf, policy=replace(conf.policy, hours=["18:00-06:00"]))
    site = run.offered(conf=conf)
    reply = site.phased(run.asked("share", ShareRequest(run.digest, run.adverts(site), 2)))
    assert reply.refusal.code == "LF4605"
    assert run.child.asked == []


def test_the_coordinator_is_told_in_words_what_it_said_wrong(run):
    site = run.offered()
    reply = site.phased(run.asked("advertise", AdvertRequest("0" * 64)))
    assert reply.refusal.code == "LF4515"
    assert "another roster" in reply.refusal.what
    reply = site.phased(run.asked("share", ShareRequest(run.digest, run.adverts(site), 1)))
    assert (reply.refusal.code, reply.accused) == ("LF4514", "")
    assert "threshold" in reply.refusal.what


def test_the_owners_limit_of_rounds_is_held_over_restarts(run, conf):
    floor = PrivacyFloor(False, 3.0, secure_aggregation=AggregationFloor(False, rounds_per_hour=0))
    conf = replace(conf, policy=replace(conf.policy, privacy=floor))
    site = run.offered(conf=conf)
    asked = run.asked("share", ShareRequest(run.digest, run.adverts(site), 2))
    for one in (site, run.agent(conf=conf)):
        assert one.phased(asked).refusal.code == "LF4516"
    assert run.child.asked == []


def test_a_state_that_was_tampered_with_ends_in_a_code(run):
    site = run.offered()
    mask = run.share(site)
    (state,) = (Path(run.conf.state) / "masked").glob("*.json")
    said = json.loads(state.read_text())
    del said["member"]["closed"]
    state.write_text(json.dumps(said))
    reply = run.agent().phased(mask)
    assert (reply.refusal.code, reply.masked) == ("LF4517", None)
    assert str(run.conf.state) not in reply.refusal.what


def test_what_leaves_again_leaves_no_second_receipt_and_is_the_same(run):
    site = run.offered()
    mask = run.share(site)
    first = site.phased(mask)
    for one in (site, site, run.agent()):
        again = one.phased(mask)
        assert again.masked[:].tobytes() == first.masked[:].tobytes()
    assert [receipt.numbers["phase"] for receipt in run.receipts()] == [
        "share, attempt 1", "mask, attempt 1"
    ]  # fmt: skip


def test_a_coordinator_that_asks_in_vain_fills_no_disk_and_gets_a_bare_code(run):
    site = run.offered()
    mask = run.share(site)
    written = len(run.receipts())
    for attempt in range(100, 150):
        reply = site.phased(replace(mask, attempt=attempt))
        assert reply.refusal.code == "LF4514"
        assert ("at most 16 attempts" in reply.refusal.what) == (attempt < 132)
    assert (reply.body, reply.masked, reply.accused) == (b"", None, "")
    assert reply.refusal.what == "refused by the site"
    assert len(run.receipts()) == written + 32
    assert site.phased(mask).masked is not None, "an answer leaves, with its receipt"
    assert run.receipts()[-1].vectors


def test_what_was_left_open_long_ago_is_closed_when_a_site_starts_and_when_it_is_asked(run):
    site = run.offered()
    run.share(site)
    folder = Path(run.conf.state) / "masked"
    before = {path: path.read_bytes() for path in folder.iterdir()}

    def put_back(now):
        for path, content in before.items():
            path.write_bytes(content)
            os.utime(path, (now - 8 * 24 * 3600,) * 2)

    put_back(time.time())
    supervisor._sweep(Path(run.conf.state))
    (state,) = folder.iterdir()
    assert json.loads(state.read_text())["member"]["closed"] == 1
    put_back(NOON.timestamp())
    reply = site.phased(run.asked("advertise", AdvertRequest(run.digest)))
    assert "round 1 is closed" in reply.refusal.what
    assert list(folder.iterdir()) == [state]
