"""A site's policy against what a coordinator offers, hostile offers included."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import datetime

import numpy as np
import pytest

from lepton_fed.clients.policy import allows_task, filtered, judge, policy_digest, within_hours
from lepton_fed.config.agreement import Agreement
from lepton_fed.config.schema import (
    AggregationFloor,
    Budget,
    ClientFloor,
    ClientPrivacy,
    Policy,
    Privacy,
    PrivacyFloor,
    RecordPrivacy,
    SecureAggregation,
    StrategyConf,
)
from lepton_fed.core.exchange import Reply, Update
from lepton_fed.core.task import Aggregation, ModelSpec, Task, TrainingSpec

BUDGET = Budget(epsilon=8.0)
FLOOR = PrivacyFloor(True, 4.0, 1e-5, AggregationFloor(required=False))
POLICY = Policy(
    models=["mlp"],
    rounds=10,
    epochs=2,
    steps=50,
    batch_size=64,
    seconds_per_round=60.0,
    hours=["18:00-06:00"],
    privacy=FLOOR,
)
RECORD = RecordPrivacy(enabled=True, epsilon=4.0, delta=1e-5)
OFFER = Agreement("run-1", Task(), StrategyConf(), 10, 1, Privacy(RECORD))
ROWS = Task(aggregation=Aggregation("rows", 9.0))
ENDLESS = 10**5000
HALF = "\ud800"


def training(**changes):
    return replace(OFFER, task=Task(training=replace(TrainingSpec(), **changes)))


def record(**changes):
    return replace(OFFER, privacy=Privacy(replace(RECORD, **changes)))


def judged(agreement=OFFER, policy=POLICY, budget=BUDGET):
    return [problem.code for problem in judge(policy, budget, agreement)]


def test_a_run_at_every_bound_of_the_policy_is_allowed():
    assert judged() == []
    at_bounds = training(epochs=2, batch_size=64)
    assert judged(at_bounds) == []
    assert judged(training(epochs=None, steps=50)) == []


@pytest.mark.parametrize(
    ("agreement", "code", "key"),
    [
        (replace(OFFER, task=Task(model=ModelSpec("cnn"))), "LF4601", "policy.tasks"),
        (replace(OFFER, task=Task(model=ModelSpec("MLP"))), "LF4601", "policy.tasks"),
        (replace(OFFER, strategy=StrategyConf("flower")), "LF4602", "policy.strategies"),
        (replace(OFFER, rounds=11), "LF4603", "policy.rounds"),
        (replace(OFFER, rounds=0), "LF4603", "policy.rounds"),
        (replace(OFFER, rounds=-1), "LF4603", "policy.rounds"),
        (training(epochs=3), "LF4603", "policy.epochs"),
        (training(epochs=0), "LF4603", "policy.epochs"),
        (training(epochs=None, steps=51), "LF4603", "policy.steps"),
        (training(epochs=None, steps=None), "LF4603", "policy.steps"),
        (training(epochs=1, steps=51), "LF4603", "policy.steps"),
        (training(batch_size=65), "LF4603", "policy.batch_size"),
        (training(batch_size=-64), "LF4603", "policy.batch_size"),
        (record(enabled=False), "LF4606", "policy.privacy.record"),
        (record(epsilon=4.001), "LF4607", "policy.privacy.epsilon"),
        (record(epsilon=0.0), "LF4607", "policy.privacy.epsilon"),
        (record(epsilon=-1.0), "LF4607", "policy.privacy.epsilon"),
        (record(delta=1.1e-5), "LF4607", "policy.privacy.delta"),
        (record(delta=0.0), "LF4607", "policy.privacy.delta"),
        (record(clip=0.0), "LF4607", ""),
        (record(randomness="insecure_seeded"), "LF4618", ""),
        (record(randomness=""), "LF4618", ""),
        (record(clip=math.inf), "LF4607", ""),
        (record(clip=1e-45), "LF4607", ""),  # in float32 its noise would be none
        (record(clip=1e38), "LF4607", ""),  # noise does not hide that a sum is infinite
        (record(mechanism="dp_ftrl"), "LF4622", "privacy.record.sampler"),
        (record(mechanism="dp_ftrl", sampler="full", band=0), "LF4622", ""),
        (record(mechanism="dp_ftrl", sampler="full", band=10**40), "LF4622", ""),
        (record(band=8), "LF4622", "privacy.record.band"),
        (record(mechanism="none"), "LF4622", ""),
        (record(engine="ghost"), "LF4607", ""),
        (record(engine="none"), "LF4607", ""),
        (record(most_records=0), "LF4607", ""),
        (record(most_records=-1), "LF4607", ""),
        (replace(OFFER, task=ROWS), "LF4609", "policy.leaves"),
        (replace(OFFER, privacy=Privacy(RECORD, ["evaluation"])), "LF4609", "policy.leaves"),
    ],
)  # fmt: skip
def test_each_bound_is_refused_by_its_own_code_and_names_the_owner_s_key(agreement, code, key):
    problems = judge(POLICY, BUDGET, agreement)
    assert {problem.code for problem in problems} - {"LF4610"} == {code}
    assert key in {problem.key for problem in problems}


def test_epsilon_above_the_budget_is_refused_though_the_floor_allows_it():
    assert judged(budget=Budget(epsilon=3.9)) == ["LF4608"]
    assert "LF4608" in judged(budget=Budget())


def test_numbers_that_the_policy_lets_out_may_leave():
    open_handed = replace(POLICY, leaves=["evaluation", "rows"])
    outside = replace(OFFER, task=ROWS, privacy=Privacy(RECORD, ["evaluation"]))
    assert judged(outside, open_handed) == []
    assert judged(replace(outside, privacy=Privacy(RECORD, ["rows", "names"])), open_handed) == [
        "LF4609"
    ]


def test_without_dp_the_run_is_allowed_only_where_the_owner_says_so():
    relaxed = replace(POLICY, privacy=replace(FLOOR, record=False, epsilon=0.0))
    assert judged(record(enabled=False), relaxed, Budget()) == []
    assert judged(OFFER, relaxed) == ["LF4607"], "epsilon 0 of the floor allows no run with DP"


def test_an_empty_policy_allows_nothing_and_says_so_in_a_sentence():
    problems = judge(Policy(), Budget(), OFFER)
    assert problems[0].what == "this site's policy allows no task"
    assert {p.code for p in problems} >= {"LF4601", "LF4603", "LF4604", "LF4605", "LF4608"}
    assert not allows_task(Policy(), Task().digest, "mlp")


@pytest.mark.parametrize(
    ("missing", "code"),
    [
        ({"models": []}, "LF4601"),
        ({"strategies": []}, "LF4602"),
        ({"rounds": 0}, "LF4603"),
        ({"epochs": 0}, "LF4603"),
        ({"batch_size": 0}, "LF4603"),
        ({"seconds_per_round": 0.0}, "LF4604"),
        ({"seconds_per_round": math.nan}, "LF4604"),
        ({"hours": []}, "LF4605"),
        ({"privacy": replace(FLOOR, epsilon=0.0)}, "LF4607"),
    ],
)
def test_a_policy_that_leaves_out_one_permission_refuses(missing, code):
    assert judged(policy=replace(POLICY, **missing)) == [code]


def test_all_reasons_are_given_at_once():
    offer = replace(training(epochs=9, batch_size=999), rounds=99, strategy=StrategyConf("x"))
    codes = judged(replace(offer, privacy=Privacy(replace(RECORD, epsilon=99.0))))
    assert codes == ["LF4602", "LF4603", "LF4603", "LF4603", "LF4607", "LF4608"]


def nested(depth):
    found: object = 0
    for _ in range(depth):
        found = [found]
    return found


HOSTILE = [
    record(epsilon=math.nan),
    record(epsilon=math.inf),
    record(epsilon=-math.inf),
    record(epsilon=ENDLESS),
    record(delta=math.nan),
    record(delta=math.inf),
    record(delta=-ENDLESS),
    record(clip=math.nan),
    record(clip=-1.0),
    record(clip=ENDLESS),
    replace(OFFER, rounds=ENDLESS),
    replace(OFFER, rounds=-ENDLESS),
    replace(OFFER, seed=ENDLESS),
    training(steps=ENDLESS),
    training(epochs=ENDLESS),
    training(epochs=None, steps=None),
    training(batch_size=ENDLESS),
    training(learning_rate=math.nan),
    replace(OFFER, run=HALF),
    replace(OFFER, strategy=StrategyConf("fedavg", {"x": nested(100_000)})),
    replace(OFFER, strategy=StrategyConf("fedavg", {"x": {1, 2}})),
    replace(OFFER, strategy=StrategyConf("\x1b[2J" * 10_000)),
    replace(OFFER, task=Task(name=HALF)),
    replace(OFFER, task=Task(model=ModelSpec("\x1b[2J\n" + HALF))),
    replace(OFFER, task=Task(model=ModelSpec("mlp", {"x": math.inf}))),
    replace(OFFER, privacy=Privacy(RECORD, ["\x1b[2J" + HALF] * 10_000)),
]


@pytest.mark.parametrize("agreement", HOSTILE, ids=range(len(HOSTILE)))
def test_no_value_of_an_offer_makes_the_judge_fail_and_each_is_refused(agreement):
    problems = judge(POLICY, BUDGET, agreement)
    assert problems
    assert len(problems) < 10
    for problem in problems:
        assert problem.what.isprintable()
        assert len(problem.what) < 200
        problem.what.encode()


def test_an_infinite_epsilon_is_refused_even_by_an_owner_who_wrote_no_bound():
    boundless = replace(POLICY, privacy=replace(FLOOR, epsilon=math.inf))
    assert judged(record(epsilon=math.inf), boundless, Budget(epsilon=math.inf)) == [
        "LF4610",
        "LF4607",
    ]


def test_a_task_is_allowed_by_its_digest_or_the_first_twelve_digits_and_no_fewer():
    digest = Task().digest
    for known, allowed in (
        (digest, True),
        (digest[:12], True),
        (digest[:11], False),
        ("", False),
        (digest + "0", False),
        ("0" * 12, False),
    ):
        assert allows_task(replace(POLICY, models=[], tasks=[known]), digest, "mlp") is allowed
    only = replace(POLICY, models=[], tasks=[digest[:12]])
    assert judged(policy=only) == []
    assert judged(training(learning_rate=0.2), only) == ["LF4601"], "another task"
    assert not allows_task(only, "", "mlp"), "a task without a digest"


@pytest.mark.parametrize(
    ("span", "inside", "outside"),
    [
        ("08:00-18:00", ["08:00", "12:00", "17:59:59"], ["07:59:59", "18:00", "00:00"]),
        ("18:00-06:00", ["18:00", "23:59", "00:00", "05:59"], ["06:00", "12:00", "17:59"]),
        ("00:00-24:00", ["00:00", "12:00", "23:59:59"], []),
        ("22:30-24:00", ["22:30", "23:59"], ["00:00", "22:29"]),
        ("09:00-09:00", [], ["08:59", "09:00", "09:01"]),
        ("always", [], ["00:00", "12:00"]),
        ("", [], ["00:00", "12:00"]),
    ],
)
def test_training_begins_within_the_hours_only_over_midnight_too(span, inside, outside):
    policy = replace(POLICY, hours=[span])
    for clock in inside:
        assert within_hours(policy, datetime.fromisoformat(f"2026-01-05 {clock}")), clock
    for clock in outside:
        assert not within_hours(policy, datetime.fromisoformat(f"2026-01-05 {clock}")), clock


def test_any_of_several_spans_will_do_and_none_is_never():
    policy = replace(POLICY, hours=["always", "01:00-02:00", "12:00-13:00"])
    assert within_hours(policy, datetime.fromisoformat("2026-01-05 12:30"))
    assert not within_hours(policy, datetime.fromisoformat("2026-01-05 03:00"))
    assert not within_hours(Policy(), datetime.fromisoformat("2026-01-05 12:30"))


def test_numbers_that_may_not_leave_are_taken_out_of_a_reply_and_the_rest_stays():
    update = Update("l", {}, 1.0)
    reply = Reply("north", update, np.ones(2), epsilon=1.0, noise_multiplier=2.0)
    closed = filtered(Policy(), reply)
    assert (closed.counts, closed.epsilon, closed.noise_multiplier) == (None, None, None)
    assert closed.update is update
    some = filtered(Policy(leaves=["evaluation"]), reply)
    assert (some.counts is reply.counts, some.epsilon) == (True, None)
    assert filtered(Policy(leaves=["evaluation", "epsilon"]), reply) == reply


def test_the_digest_of_a_policy_changes_with_every_permission_and_the_budget():
    changes = [
        {"rounds": 11}, {"leaves": ["rows"]}, {"hours": []}, {"roster": "follow"},
        {"privacy": replace(FLOOR, epsilon=0.0)},
    ]  # fmt: skip
    digests = {policy_digest(replace(POLICY, **change), BUDGET) for change in changes}
    digests |= {policy_digest(POLICY, BUDGET), policy_digest(POLICY, Budget(9.0))}
    assert len(digests) == len(changes) + 2
    assert policy_digest(POLICY, BUDGET) == policy_digest(replace(POLICY), BUDGET)


def masked(cohort=5, **changes):
    secure = SecureAggregation(**{"enabled": True, **changes})
    return replace(OFFER, privacy=Privacy(RECORD, [], secure), cohort=cohort)


def demanding(**changes):
    floor = replace(AggregationFloor(), **changes)
    return replace(POLICY, privacy=replace(FLOOR, secure_aggregation=floor))


def test_a_site_whose_updates_leave_masked_only_refuses_a_plain_run():
    (problem,) = judge(demanding(), BUDGET, OFFER)
    assert problem.code == "LF4611"
    assert problem.key == "policy.privacy.secure_aggregation.required"
    assert judged(policy=demanding(required=False)) == []
    assert AggregationFloor().required, "the default"


def test_a_masked_run_at_every_bound_of_the_policy_is_allowed():
    assert judged(masked(), demanding()) == []
    at_bounds = demanding(min_cohort=5, threshold=0.8, post_quantum=True)
    assert judged(masked(min_cohort=5, threshold=0.8, post_quantum=True), at_bounds) == []
    assert judged(masked(min_cohort=9, threshold=1.0, post_quantum=True), at_bounds) == []


@pytest.mark.parametrize(
    ("asked", "floor", "key"),
    [
        ({"min_cohort": 4}, {"min_cohort": 5}, "min_cohort"),
        ({"min_cohort": 2}, {}, "min_cohort"),
        ({"min_cohort": -ENDLESS}, {}, "min_cohort"),
        ({"threshold": 0.6}, {}, "threshold"),
        ({"threshold": 0.79}, {"threshold": 0.8}, "threshold"),
        ({"threshold": 0.0}, {}, "threshold"),
        ({"threshold": 1.01}, {}, "threshold"),
        ({"threshold": math.inf}, {}, "threshold"),
        ({"threshold": math.nan}, {}, "threshold"),
        ({}, {"post_quantum": True}, "post_quantum"),
        ({"bits": 15}, {}, ""),
        ({"bits": 65}, {}, ""),
        ({"bits": -ENDLESS}, {}, ""),
        ({"cohort": 2}, {}, ""),
        ({"cohort": 0}, {}, ""),
        ({"cohort": ENDLESS}, {}, ""),
    ],
)
def test_a_masked_run_below_the_owners_floor_is_refused(asked, floor, key):
    problems = judge(demanding(**floor), BUDGET, masked(**asked))
    found = [problem for problem in problems if problem.code == "LF4612"]
    assert [problem.key for problem in found] == [
        f"policy.privacy.secure_aggregation.{key}" if key else ""
    ]
    assert {problem.code for problem in problems} <= {"LF4612", "LF4610"}


def test_in_a_plain_run_no_bound_of_masked_ones_counts():
    lax = masked(enabled=False, min_cohort=0, threshold=math.inf, bits=0)
    assert set(judged(lax, demanding(required=False))) <= {"LF4610"}
    assert judged(masked(enabled=False, min_cohort=0, bits=0), demanding(required=False)) == []


DEMANDING = replace(
    POLICY, privacy=replace(FLOOR, honest=0.7, client=ClientFloor(epsilon=8.0, delta=1e-5))
)
TRUSTING = replace(
    DEMANDING,
    privacy=replace(
        DEMANDING.privacy, client=replace(DEMANDING.privacy.client, trust_coordinator=True)
    ),
)
MASKED = SecureAggregation(enabled=True, bits=24)


def client(secure=MASKED, cohort=10, **changes):
    given = ClientPrivacy(**{"enabled": True, "epsilon": 8.0, "honest": 7, **changes})
    return replace(OFFER, privacy=Privacy(RECORD, [], secure, given), cohort=cohort)


def test_client_level_dp_that_the_owner_demands_is_allowed_and_its_absence_is_not():
    assert judged(client(), DEMANDING) == []
    assert judged(OFFER, DEMANDING) == ["LF4631"]
    assert judged(client(enabled=False, honest=0), DEMANDING) == ["LF4631"]
    assert judged(client(noise="coordinator", honest=0), TRUSTING) == []


def test_who_demands_none_takes_any_that_is_sound():
    assert judged(client(epsilon=90.0)) == []
    assert judged(client(noise="coordinator", honest=0)) == []


@pytest.mark.parametrize(
    ("agreement", "code", "key"),
    [
        (client(epsilon=8.1), "LF4631", "client.epsilon"),
        (client(epsilon=0.0), "LF4631", "client.epsilon"),
        (client(epsilon=math.nan), "LF4631", "client.epsilon"),
        (client(epsilon=ENDLESS), "LF4631", "client.epsilon"),
        (client(delta=2e-5), "LF4631", "client.delta"),
        (client(delta=-1e-5), "LF4631", "client.delta"),
        (client(noise="coordinator", honest=0), "LF4631", "client.trust_coordinator"),
        (client(noise="somebody", honest=0), "LF4631", "client.trust_coordinator"),
        (client(honest=8), "LF4621", "honest"),
        (client(honest=0, secure=replace(MASKED, threshold=0.8)), "LF4621", "honest"),
        (client(honest=ENDLESS, cohort=ENDLESS), "LF4630", ""),
        (client(honest=11), "LF4630", "privacy.client.honest"),
        (client(clip=1e6), "LF4630", "privacy.client.clip"),
        (client(clip=math.nan), "LF4630", "privacy.client.clip"),
        (client(mechanism="laplace"), "LF4630", "privacy.secure_aggregation.bits"),
        (client(replace(MASKED, enabled=False)), "LF4630", "privacy.secure_aggregation.enabled"),
    ],
)  # fmt: skip
def test_client_level_dp_that_is_less_than_the_owner_asks_is_refused(agreement, code, key):
    problems = judge(DEMANDING, BUDGET, agreement)
    assert (code, key) in {(p.code, p.key.removeprefix("policy.privacy.")) for p in problems}


def test_numbers_outside_epsilon_are_held_against_the_policy_under_client_level_dp_too():
    bare = replace(POLICY, privacy=replace(FLOOR, record=False))
    given = ClientPrivacy(enabled=True, noise="coordinator")
    offer = replace(OFFER, privacy=Privacy(RecordPrivacy(), ["evaluation"], client=given))
    assert judged(offer, bare) == ["LF4609"]
    assert judged(offer, replace(bare, leaves=["evaluation"])) == []
