"""From a target to noise: what a plan says of itself, and which schedules are offered instead."""

from __future__ import annotations

import math

import pytest

from lepton_fed.errors import TaskError
from lepton_fed.privacy.dp.accounting import epsilon_of
from lepton_fed.privacy.dp.planning import (
    NoisePlan,
    better_plans,
    epsilon_curve,
    plan_for,
    steps_a_round,
)
from lepton_fed.privacy.dp.sampling import PoissonSampler, sampler_of

DELTA = 1e-5


def test_noise_over_signal_is_in_units_of_the_clipping_norm():
    plan = NoisePlan(PoissonSampler(1000, 50), steps=4, noise_multiplier=2.0)
    assert plan.step_noise == 2.0 / 50
    assert plan.run_noise(25) == pytest.approx(2.0 / 50 / math.sqrt(4 * 25))
    assert plan.rows_a_round == pytest.approx(200)
    few = NoisePlan(PoissonSampler(10, 50), steps=4, noise_multiplier=2.0)
    assert few.step_noise == 2.0 / 10, "no batch is larger than all rows"


@pytest.mark.parametrize("name", ["poisson", "shuffled", "full"])
def test_a_plan_spends_its_target_in_the_last_round_and_not_before(name):
    sampler = sampler_of(name, 500, 50)
    plan = plan_for(sampler, 10, 30, epsilon=2.0, delta=DELTA)
    curve = epsilon_curve(plan, 30, DELTA)
    assert [number for number, _ in curve] == [1, 2, 5, 10, 20, 30]
    epsilons = [epsilon for _, epsilon in curve]
    assert epsilons == sorted(epsilons)
    assert 1.98 < epsilons[-1] <= 2.0
    assert epsilons[0] == epsilon_of([plan.round_event], DELTA)


@pytest.mark.parametrize(("rounds", "shown"), [(1, [1]), (2, [1, 2]), (7, [1, 2, 5, 7])])
def test_the_curve_ends_with_the_run(rounds, shown):
    plan = NoisePlan(PoissonSampler(500, 50), steps=1, noise_multiplier=3.0)
    assert [number for number, _ in epsilon_curve(plan, rounds, DELTA)] == shown


@pytest.mark.parametrize("name", ["poisson", "shuffled"])
def test_better_schedules_cost_the_same_and_lose_less_to_the_noise(name):
    rounds = 20
    plan = plan_for(sampler_of(name, 144, 8), 18, rounds, epsilon=8.0, delta=DELTA)
    found = better_plans(plan, rounds, epsilon=8.0, delta=DELTA)
    assert found
    for other in found:
        assert other.run_noise(rounds) < 0.98 * plan.run_noise(rounds)
        assert other.sampler.rate > plan.sampler.rate
        assert other.steps >= plan.steps
        assert 7.9 < epsilon_of([other.round_event.times(rounds)], DELTA) <= 8.0
    assert found[0].run_noise(rounds) == min(other.run_noise(rounds) for other in found)


def test_a_schedule_that_is_as_good_is_left_alone():
    plan = plan_for(PoissonSampler(400, 200), 50, 20, epsilon=1.0, delta=DELTA)
    assert better_plans(plan, 20, epsilon=1.0, delta=DELTA) == []


def test_a_schedule_that_cannot_be_planned_is_not_offered():
    # One step of one round stays within this; hundreds cannot.
    target = {"epsilon": 0.0005, "delta": DELTA}
    plan = plan_for(PoissonSampler(1000, 2), 1, 1, **target)
    assert better_plans(plan, 1, **target) == []


@pytest.mark.parametrize(
    ("epochs", "steps", "expected"), [(3, None, 30), (None, None, 10), (None, 7, 7)]
)
def test_steps_are_counted_by_the_sampler_s_epochs(epochs, steps, expected):
    assert steps_a_round(PoissonSampler(100, 10), epochs, steps) == expected


def test_a_delta_that_lets_a_row_out_whole_is_refused():
    with pytest.raises(TaskError) as caught:
        plan_for(PoissonSampler(100, 10), 10, 1, epsilon=1.0, delta=0.01)
    assert caught.value.code == "LF3307"
