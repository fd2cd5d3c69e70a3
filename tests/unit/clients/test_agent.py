"""What a site says to offers, asks and pushes: what was allowed, with a receipt, or a code."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from lepton_fed.clients import agent as agent_module
from lepton_fed.clients.agent import Agent
from lepton_fed.clients.receipts import Receipts
from lepton_fed.config.schema import Policy, StrategyConf
from lepton_fed.core.digests import canonical_json
from lepton_fed.core.exchange import Offer, PushStep, Reply, Update
from lepton_fed.errors import BudgetExceeded, DataError, Problem, RunError
from lepton_fed.identity.keys import generate_key, load_private_key
from lepton_fed.identity.pinned import PinnedRoster
from lepton_fed.identity.roster import enrol, remove, roster_file
from lepton_fed.strategies.base import DELTA
from tests.unit.clients.conftest import ALLOWED, TASK, agreement_for, ask_for

PRIVATE = "patient 4711 in /home/owner/rows.npz"
NOON = datetime.fromisoformat("2026-01-05 12:00")


class StandIn:
    """A training child without a process.

    Args:
        error: Raised in the place of an answer, or of getting ready.
    """

    def __init__(self, error=None, at="answer"):
        self.error, self.at = error, at
        self.begun, self.asked, self.limits = [], [], []
        self.closed = False
        self.reply = Reply(
            "north",
            Update("l", {DELTA: np.array([3, 4], np.float32)}, 1.0, {DELTA: 50.0}),
            counts=np.ones(3),
            epsilon=0.5,
            noise_multiplier=1.5,
        )

    def begin(self, agreement):
        if self.error and self.at == "begin":
            raise self.error
        self.begun.append(agreement)

    def budget_left(self):
        assert self.begun, "begin comes first"
        if self.error and self.at == "budget":
            raise self.error
        return 2.25

    def answer(self, site, ask, limit_s):
        assert self.begun, "begin comes first"
        self.asked.append(ask)
        self.limits.append(limit_s)
        if self.error and self.at == "answer":
            raise self.error
        return replace(self.reply, site=site)

    def close(self):
        self.closed = True


@pytest.fixture
def build(conf, parties):
    """Build agents with a stand-in for training."""

    def one(child=None, now=NOON, conf=conf, **keys):
        keys = {"identity": parties.key, "node_key": parties.node_key, **keys}
        coordinator = parties.coordinator.public_key()
        built = Agent(
            conf,
            keys["identity"],
            keys["node_key"],
            coordinator,
            child or StandIn(),
            lambda: now,
        )
        built.child = built._child
        return built

    return one


@pytest.fixture
def offer(parties):
    """Make offers as the coordinator does."""

    def one(agreement=None, roster=None):
        content = canonical_json(agreement or agreement_for())
        return Offer(content, parties.signed(roster))

    return one


def allowing(conf, **changes):
    return replace(conf, policy=replace(conf.policy, **changes))


def kept(conf):
    return sorted(path.name for path in (Path(conf.state) / "agreements").glob("*"))


def test_an_allowed_offer_is_agreed_to_and_kept(build, offer, conf):
    site, agreement = build(), agreement_for()
    reply = site.offered(offer())
    assert (reply.agreement, reply.refusal) == (agreement.digest, None)
    assert site.child.begun == [agreement]
    assert kept(conf) == [f"{agreement.digest}.json"]


def test_a_site_says_its_version_whether_it_takes_part_or_not(build, offer, conf):
    assert build().offered(offer()).version == version("lepton-fed")
    refusal = build(conf=allowing(conf, models=[])).offered(offer())
    assert (refusal.refusal.code, refusal.version) == ("LF4601", version("lepton-fed"))


def test_what_is_left_of_the_budget_leaves_only_if_the_policy_says_so(
    build, offer, conf, caplog, monkeypatch
):
    monkeypatch.setattr(logging.getLogger("lepton_fed"), "propagate", True)
    caplog.set_level(logging.INFO, "lepton_fed.site")
    for leaves in ([], ["evaluation", "epsilon", "rows"]):
        assert build(conf=allowing(conf, leaves=leaves)).offered(offer()).budget_left is None
    assert "budget" not in caplog.text
    assert build(conf=allowing(conf, leaves=["budget"])).offered(offer()).budget_left == 2.25
    assert "budget_left=2.25" in caplog.text
    refused = build(conf=allowing(conf, leaves=["budget"], models=[])).offered(offer())
    assert refused.budget_left is None


def test_a_child_that_dies_before_it_says_what_is_left_agrees_to_nothing(build, offer, conf):
    child = StandIn(RunError(Problem("LF5311", "died")), at="budget")
    reply = build(child, conf=allowing(conf, leaves=["budget"])).offered(offer())
    assert (reply.agreement, reply.refusal.code) == ("", "LF5311")


def test_a_round_is_trained_within_the_policy_s_time_and_leaves_with_a_receipt(build, offer, conf):
    site, ask = build(), ask_for(agreement_for())
    site.offered(offer())
    reply = site.asked(ask)
    assert reply.refusal is None
    assert np.array_equal(reply.update.vectors[DELTA], [3, 4])
    assert (site.child.asked, site.child.limits) == ([ask], [300.0])
    (receipt,) = Receipts(Path(conf.state) / "receipts").read()
    assert (receipt.run, receipt.round, receipt.site) == ("run-1", 1, "north")
    assert (receipt.task, receipt.agreement) == (TASK.digest, agreement_for().digest)
    vector = receipt.vectors[DELTA]
    assert (vector.norm_before, vector.norm_after) == (50.0, 5.0)
    assert vector.sha256 == hashlib.sha256(np.array([3, 4], "<f4").tobytes()).hexdigest()
    assert set(receipt.numbers) == {
        "weight", "evaluation", "epsilon", "epsilon holds for", "noise multiplier",
    }  # fmt: skip


def test_nothing_leaves_when_the_receipt_cannot_be_written(build, offer, conf, caplog):
    site = build()
    site.offered(offer())
    Path(conf.state, "receipts").write_text("a file where a folder should be")
    reply = site.asked(ask_for(agreement_for()))
    assert reply.refusal.code.startswith("LF52")
    assert (reply.update, reply.counts, reply.epsilon) == (None, None, None)
    assert str(conf.state) not in reply.refusal.what
    assert str(conf.state) in caplog.text, "the owner reads where"


@pytest.mark.parametrize(
    ("leaves", "counts", "epsilon"),
    [([], False, False), (["evaluation"], True, False), (["epsilon"], False, True)],
)
def test_numbers_leave_only_if_the_policy_lists_them_and_receipts_say_so(
    build, offer, conf, leaves, counts, epsilon
):
    site = build(conf=allowing(conf, leaves=leaves))
    site.offered(offer())
    reply = site.asked(ask_for(agreement_for()))
    assert (reply.counts is not None, reply.epsilon is not None) == (counts, epsilon)
    assert (reply.noise_multiplier is not None) == epsilon
    (receipt,) = Receipts(Path(conf.state) / "receipts").read()
    assert ("evaluation" in receipt.numbers, "epsilon" in receipt.numbers) == (counts, epsilon)


def trained(**changes):
    return replace(TASK, training=replace(TASK.training, **changes))


@pytest.mark.parametrize(
    ("changes", "code", "word"),
    [
        ({"rounds": 11}, "LF4603", "rounds"),
        ({"rounds": 0}, "LF4603", "rounds"),
        ({"strategy": StrategyConf("flower")}, "LF4602", "strategy"),
        ({"task": replace(TASK, model=replace(TASK.model, name="mlp"))}, "LF4601", "model"),
        (
            {"task": replace(TASK, training=replace(TASK.training, batch_size=65))},
            "LF4603",
            "batch",
        ),
        ({"task": replace(TASK, training=replace(TASK.training, epochs=6))}, "LF4603", "epochs"),
    ],
)
def test_an_offer_outside_the_policy_is_refused_with_the_reason_at_both_ends(
    build, offer, conf, caplog, changes, code, word
):
    site = build()
    reply = site.offered(offer(replace(agreement_for(), **changes)))
    assert (reply.agreement, reply.refusal.code) == ("", code)
    assert word in reply.refusal.what
    assert (word in caplog.text, code in caplog.text, "run-1" in caplog.text) == (True, True, True)
    assert (site.child.begun, kept(conf)) == ([], [])


def test_an_empty_policy_allows_nothing(build, offer, conf):
    site = build(conf=replace(conf, policy=Policy()))
    reply = site.offered(offer())
    assert reply.refusal.code == "LF4601"
    assert "record-level DP" in reply.refusal.what, "all reasons at once"
    assert site.child.begun == []


@pytest.mark.parametrize(
    "task",
    [
        replace(TASK, metrics=["accuracy", "accuracy"]),
        replace(TASK, metrics=["r2"]),
        replace(TASK, name="../../etc"),
        replace(TASK, model=replace(TASK.model, name="nowhere")),
        replace(TASK, training=replace(TASK.training, steps=3)),
    ],
)
def test_a_task_that_contradicts_itself_is_refused_before_anything_is_built(
    build, offer, conf, task
):
    site = build(conf=allowing(conf, models=["linear", "nowhere"], steps=10))
    reply = site.offered(offer(agreement_for(task=task)))
    assert reply.refusal.code.startswith("LF1")
    assert site.child.begun == []


def edited(**changes):
    return json.dumps({**json.loads(canonical_json(agreement_for())), **changes}).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"\xff",
        b"x" * (1024 * 1024 + 1),
        edited(code="import os"),
        edited(rounds="3"),
        edited(rounds=3.5),
        edited(seed=float("nan")),
        edited(task={}),
        b"[" * 100_000,
    ],
)
def test_what_is_no_agreement_is_refused(build, parties, conf, content):
    site = build()
    reply = site.offered(Offer(content, parties.signed()))
    assert reply.refusal.code == "LF4511"
    assert (site.child.begun, kept(conf)) == ([], [])


def test_a_site_that_is_not_on_the_roster_with_its_own_keys_takes_no_part(build, offer, parties):
    north = parties.member()
    other = parties.another("other")
    for wrong in ({"identity": load_private_key(parties.folder / "other.pem")},
                  {"node_key": other.node_key}):  # fmt: skip
        site = build(**wrong)
        assert site.offered(offer()).refusal.code == "LF4512"
        assert site.child.begun == []
    follow = replace(build()._conf.policy, roster="follow")
    without = remove(parties.roster, "north")
    site = build(conf=replace(build()._conf, policy=follow))
    assert site.offered(offer(roster=without)).refusal.code == "LF4512"
    back = enrol(without, north)
    assert site.offered(offer(roster=back)).refusal is None


def test_a_changed_roster_waits_for_a_person_and_needs_no_restart(build, offer, parties, conf):
    site = build()
    newer = enrol(parties.roster, parties.another("south"))
    refusal = site.offered(offer(roster=newer)).refusal
    assert refusal.code == "LF4176"
    assert site.child.begun == []
    coordinator = parties.coordinator.public_key()
    pinned = PinnedRoster(Path(conf.roster), Path(conf.state), coordinator, False)
    pinned.accept(pinned.offered())
    assert site.offered(offer(roster=newer)).refusal is None
    assert site.offered(offer()).refusal.code == "LF4175", "an older one is never taken again"


def test_a_roster_that_another_key_signed_is_refused_without_a_word_of_this_machine(
    build, parties, conf
):
    generate_key(parties.folder / "impostor.pem")
    impostor = load_private_key(parties.folder / "impostor.pem")
    forged = roster_file(enrol(parties.roster, parties.another("south")), impostor)
    for content in (forged, b"", b"{}"):
        reply = build().offered(Offer(canonical_json(agreement_for()), content))
        assert reply.refusal.code in ("LF4166", "LF4167")
        assert str(parties.folder) not in reply.refusal.what


@pytest.mark.parametrize(
    "digest", ["0" * 64, "", "../../north", "x" * 64, agreement_for("run-2").digest]
)
def test_an_ask_for_a_run_that_was_not_agreed_to_is_refused(build, offer, digest):
    site = build()
    site.offered(offer())
    reply = site.asked(replace(ask_for(agreement_for()), agreement=digest))
    assert reply.refusal.code == "LF4501"
    assert site.child.asked == []


def test_a_site_that_was_restarted_goes_on_with_the_run(build, offer):
    build().offered(offer())
    site, ask = build(), ask_for(agreement_for(), 2)
    assert site.asked(ask).refusal is None
    assert site.child.begun == [agreement_for()]


def test_agreements_of_runs_long_over_are_forgotten_and_one_that_is_offered_anew_is_kept(
    build, offer, conf, monkeypatch
):
    monkeypatch.setattr(agent_module, "_MOST_AGREED", 3)
    one = build()
    runs = [agreement_for(run=f"run-{number}") for number in range(5)]
    for agreement in [*runs[:3], runs[0], *runs[3:]]:
        assert one.offered(offer(agreement)).refusal is None
    assert kept(conf) == sorted(f"{runs[number].digest}.json" for number in (0, 3, 4))
    for site in (one, build()):
        for number, agreement in enumerate(runs):
            refusal = site.asked(ask_for(agreement)).refusal
            assert (refusal is None) == (number in (0, 3, 4))


def test_a_run_is_judged_again_after_a_restart(build, offer, conf):
    build().offered(offer())
    site = build(conf=allowing(conf, rounds=2))
    assert site.asked(ask_for(agreement_for())).refusal.code == "LF4603"
    assert site.child.begun == []


def test_a_kept_agreement_that_was_changed_is_not_taken(build, offer, conf):
    build().offered(offer())
    path = Path(conf.state) / "agreements" / f"{agreement_for().digest}.json"
    path.write_bytes(canonical_json(agreement_for(rounds=4)))
    site = build()
    assert site.asked(ask_for(agreement_for())).refusal.code == "LF4501"
    path.write_bytes(b"{")
    assert site.asked(ask_for(agreement_for())).refusal.code == "LF4511"
    assert site.child.begun == []


def test_outside_its_hours_a_site_does_not_train_but_may_evaluate(build, offer, conf):
    site = build(conf=allowing(conf, hours=["18:00-06:00"]))
    assert site.offered(offer()).refusal is None, "the run may begin tonight"
    refusal = site.asked(ask_for(agreement_for())).refusal
    assert (refusal.code, site.child.asked) == ("LF4605", [])
    assert "hours" in refusal.what
    assert site.asked(ask_for(agreement_for(), train=False, evaluate=True)).refusal is None
    at_night = build(conf=site._conf, now=datetime.fromisoformat("2026-01-05 03:00"))
    assert at_night.asked(ask_for(agreement_for())).refusal is None


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError(Problem("LF2017", PRIVATE, PRIVATE, PRIVATE, PRIVATE)), "LF2017"),
        (BudgetExceeded(Problem("LF4207", PRIVATE)), "LF4207"),
        (RunError(Problem("LF5311", PRIVATE)), "LF5311"),
        (RunError([Problem("LF5999", PRIVATE), Problem("LF4601", PRIVATE)]), "LF5999"),
    ],
)
@pytest.mark.parametrize("at", ["begin", "answer"])
def test_of_a_failure_only_a_code_leaves_and_the_log_says_it_all(
    build, offer, caplog, error, code, at
):
    site = build(StandIn(error, at))
    with caplog.at_level(logging.WARNING, "lepton_fed.site"):
        agreed = site.offered(offer())
        reply = agreed if at == "begin" else site.asked(ask_for(agreement_for(), 2))
    assert reply.refusal.code == code
    assert "4711" not in repr(reply)
    assert PRIVATE in caplog.text
    assert "run-1" in caplog.text
    assert at == "begin" or "round 2" in caplog.text


def test_a_refusal_of_the_child_leaves_as_a_code_and_has_a_receipt(build, offer, conf):
    site = build()
    site.offered(offer())
    site.child.reply = Reply("north", refusal=Problem("LF5101", PRIVATE), epsilon=1.0)
    reply = site.asked(ask_for(agreement_for()))
    assert (reply.refusal.code, reply.epsilon) == ("LF5101", 1.0)
    assert "4711" not in repr(reply)
    (receipt,) = Receipts(Path(conf.state) / "receipts").read()
    assert (receipt.refusal, receipt.vectors) == ("LF5101", {})
    assert "epsilon" in receipt.numbers


def test_a_push_goes_to_the_store_and_is_answered_in_words_of_the_bundle(build, conf):
    reply = build().pushed(PushStep("begin", "0" * 64, b"{}", b"no"))
    assert reply.refusal.code == "LF4121"
    assert str(conf.state) not in reply.refusal.what


def test_a_site_without_a_roster_says_so_before_the_first_contact(build, conf):
    from lepton_fed.errors import Refused

    Path(conf.roster).unlink()
    with pytest.raises(Refused):
        build()


def test_closing_ends_what_trains(build):
    site = build()
    site.close()
    assert site.child.closed


def test_a_log_line_holds_no_control_characters_of_the_coordinator_s(build, offer, caplog):
    build().offered(offer(agreement_for("run\x1b[2J\n", rounds=99)))
    assert "\x1b" not in caplog.text
    assert "run?[2J?" in caplog.text


def test_sentences_of_every_code_that_leave_in_full_are_about_the_policy():
    sayable = agent_module._SAYABLE
    assert not {code for code in sayable if code.startswith(("LF2", "LF3", "LF52"))}


def test_the_floor_is_held_for_runs_with_dp(build, offer, conf):
    from lepton_fed.config.schema import Privacy, RecordPrivacy

    floor = replace(conf.policy.privacy, record=True, epsilon=2.0)
    site = build(conf=allowing(conf, privacy=floor))
    assert site.offered(offer()).refusal.code == "LF4606"
    for epsilon, code in ((2.5, "LF4607"), (2.0, None)):
        privacy = Privacy(RecordPrivacy(True, epsilon=epsilon, delta=1e-5))
        refusal = site.offered(offer(agreement_for(privacy=privacy))).refusal
        assert (refusal and refusal.code) == code
    assert ALLOWED.privacy.epsilon == 3.0


def test_the_shorter_of_the_owner_s_and_the_coordinator_s_time_holds(build, offer, conf):
    site, agreement = build(conf=allowing(conf, seconds_per_round=60.0)), agreement_for()
    site.offered(offer())
    for number, limit_s in enumerate((0.0, 20.0, 600.0, float("nan"), -1.0), start=1):
        site.asked(replace(ask_for(agreement, round_number=number), limit_s=limit_s))
    assert site.child.limits == [60.0, 20.0, 60.0, 60.0, 60.0]


def test_asks_for_runs_that_nobody_agreed_to_leave_no_receipts(build, conf):
    site = build()
    assert site.asked(ask_for(agreement_for())).refusal.code == "LF4501"
    assert not Receipts(Path(conf.state) / "receipts").read()


def test_a_receipt_says_that_an_answer_was_sent_again(build, offer, conf):
    site = build()
    site.offered(offer())
    site.child.reply = replace(site.child.reply, again=True)
    site.asked(ask_for(agreement_for()))
    (receipt,) = Receipts(Path(conf.state) / "receipts").read()
    assert "nothing was trained" in receipt.numbers["sent again"]


@pytest.mark.parametrize("number", range(len(agent_module._KINDS)))
def test_each_sentence_for_the_coordinator_is_said_of_its_own_code(number):
    code, what = agent_module._KINDS[number]
    said = agent_module._public([Problem(code.ljust(6, "9"), PRIVATE)])
    assert said.what == what
