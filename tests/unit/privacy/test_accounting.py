"""What DP-SGD costs, against a table of privacy loss distributions at a ten times finer grid."""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from lepton_fed.errors import TaskError
from lepton_fed.privacy.dp.accounting import (
    OrderedGaussian,
    SampledGaussian,
    epsilon_of,
    event_of,
    noise_multiplier_for,
)
from lepton_fed.privacy.dp.entropy import Entropy
from lepton_fed.privacy.dp.sampling import PoissonSampler

DELTA = 1e-5

# Noise, sampling rate, steps, delta; epsilon by PLD at grid 1e-4, and a proven lower bound.
TABLE = [
    (1.1, 256 / 60000, 3515, 1e-5, 1.134, 0.958),
    (0.7, 0.001, 10000, 1e-5, 1.245, 0.753),
    (2.0, 64 / 1437, 1000, 1e-5, 3.245, 3.195),
    (8.0, 0.25, 400, 1e-5, 2.592, 2.572),
    (20.0, 1.0, 100, 1e-5, 1.993, 1.988),
    (0.5, 0.01, 1000, 1e-5, 13.36, 13.31),
    (10.0, 0.01, 100, 1e-6, 0.0344, 0.0294),
    (0.35, 0.05, 500, 1e-5, 107.3, 107.25),
]


@pytest.mark.parametrize(("noise", "rate", "steps", "delta", "fine", "lower"), TABLE)
def test_epsilon_is_near_the_fine_one_and_never_below_the_proven_bound(
    noise, rate, steps, delta, fine, lower
):
    found = epsilon_of([SampledGaussian(noise, rate, steps)], delta)
    assert abs(found - fine) <= max(0.01 * fine, 0.005)
    assert found >= lower


def test_a_single_gaussian_costs_what_its_formula_says():
    """Balle and Wang, ICML 2018: delta of a Gaussian with sensitivity 1, in closed form."""
    for noise in (0.8, 3.0):
        epsilon = epsilon_of([SampledGaussian(noise, 1.0, 1)], DELTA)
        shift, tilt = 1 / (2 * noise), epsilon * noise
        exact = stats.norm.cdf(shift - tilt) - math.exp(epsilon) * stats.norm.cdf(-shift - tilt)
        assert 0.97 * DELTA <= exact <= DELTA


@pytest.mark.parametrize(
    ("noise", "rate", "steps", "rounds", "truth", "one_round"),
    [
        (1.0, 0.05, 20, 50, 10.99, 1.99),
        (1.0, 0.05, 20, 100, 16.49, 1.99),
        (0.8, 32 / 600, 19, 100, 27.84, 3.50),
    ],
)
def test_rounds_compose_to_what_one_long_run_costs(noise, rate, steps, rounds, truth, one_round):
    event = SampledGaussian(noise, rate, steps)
    together = epsilon_of([event] * rounds, DELTA)
    assert together == epsilon_of([SampledGaussian(noise, rate, steps * rounds)], DELTA)
    assert together == pytest.approx(truth, rel=0.01)
    assert epsilon_of([event], DELTA) == pytest.approx(one_round, rel=0.01)


def test_events_count_in_any_order_and_however_they_are_split():
    one, two = SampledGaussian(1.0, 0.05, 30), SampledGaussian(1.4, 0.02, 40)
    parts = [SampledGaussian(1.0, 0.05, 10), two, SampledGaussian(1.0, 0.05, 20)]
    assert epsilon_of([two, one], DELTA) == epsilon_of([one, two], DELTA)
    assert epsilon_of(parts, DELTA) == epsilon_of([one, two], DELTA)
    assert epsilon_of([one, two], DELTA) > max(epsilon_of([one], DELTA), epsilon_of([two], DELTA))


def test_no_steps_cost_nothing():
    assert epsilon_of([], DELTA) == 0
    assert epsilon_of([SampledGaussian(1.0, 0.1, 0), SampledGaussian(0.0, 0.1, 0)], DELTA) == 0


def test_steps_without_noise_cost_everything():
    quiet = SampledGaussian(0.0, 0.1, 1)
    assert epsilon_of([SampledGaussian(1.0, 0.1, 5), quiet], DELTA) == math.inf


def test_epsilon_grows_with_steps_and_rate_and_falls_with_noise_and_delta():
    def cost(noise=1.0, rate=0.05, steps=50, delta=DELTA):
        return epsilon_of([SampledGaussian(noise, rate, steps)], delta)

    assert cost(steps=51) > cost()
    assert cost(rate=0.06) > cost()
    assert cost(noise=1.1) < cost()
    assert cost(delta=1e-4) < cost()


@pytest.mark.parametrize(
    "numbers",
    [
        (-1.0, 0.1, 1),
        (math.nan, 0.1, 1),
        (math.inf, 0.1, 1),
        (1.0, 0.0, 1),
        (1.0, 1.1, 1),
        (1.0, math.nan, 1),
        (1.0, 0.1, -1),
    ],
)
def test_an_event_that_cannot_have_been_run_is_refused(numbers):
    with pytest.raises(ValueError):
        SampledGaussian(*numbers)


@pytest.mark.parametrize(
    "numbers",
    [
        (-1.0, 0.1, 10, 1, "shuffled"),
        (1.0, 0.0, 10, 1, "shuffled"),
        (1.0, 0.1, -1, -1, "shuffled"),
        (1.0, 0.1, 10, 0, "shuffled"),
        (1.0, 0.1, 10, 11, "full"),
        (1.0, 0.1, 10, 1, "poisson"),
    ],
)
def test_an_order_that_cannot_have_been_run_is_refused(numbers):
    with pytest.raises(ValueError):
        OrderedGaussian(*numbers)


EVENTS = [
    SampledGaussian(1.1, 0.01, 100),
    SampledGaussian(1.1, 1.0, 0),
    OrderedGaussian(0.7, 0.1, 25, 3, "shuffled"),
    OrderedGaussian(0.7, 0.1, 25, 3, "full"),
]


@pytest.mark.parametrize("event", EVENTS)
def test_an_event_comes_back_from_its_record_through_json(event):
    record = json.loads(json.dumps(event.record()))
    assert event_of(record) == event
    assert record["sampler"] == event.sampler
    assert record["adjacency"] == event.adjacency


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 2.0},
        {"steps": True},
        {"steps": "2"},
        {"steps": -1},
        {"passes": 30},
        {"noise_multiplier": "1"},
        {"noise_multiplier": None},
        {"sampling_rate": 1.5},
        {"sampling_rate": 10**400},
        {"sampler": "poisson"},
        {"sampler": ["full"]},
        {"adjacency": "add-or-remove-one"},
        {"more": 1},
    ],
)
def test_a_record_that_is_not_an_event_s_is_refused(change):
    record = EVENTS[2].record()
    with pytest.raises(ValueError):
        event_of({**record, **change})
    for key in record:
        with pytest.raises(ValueError):
            event_of({other: value for other, value in record.items() if other != key})


@pytest.mark.parametrize("sampler", ["shuffled", "full"])
def test_an_order_costs_a_gaussian_a_pass_and_is_never_amplified(sampler):
    ordered = OrderedGaussian(2.0, 0.001, 3000, 3, sampler)
    assert epsilon_of([ordered], DELTA) == epsilon_of([SampledGaussian(2.0, 1.0, 3)], DELTA)
    mixed = [ordered, SampledGaussian(2.0, 0.001, 3000)]
    assert epsilon_of(mixed, DELTA) > epsilon_of([ordered], DELTA)


@pytest.mark.parametrize(
    ("epsilon", "rate", "steps"),
    [(8.0, 0.1, 200), (1.0, 0.05, 300), (0.3, 0.5, 20), (3.0, 1.0, 10), (15.0, 0.2, 10)],
)
def test_calibrated_noise_keeps_the_target_and_wastes_little(epsilon, rate, steps):
    noise = noise_multiplier_for(epsilon, DELTA, rate, steps)
    assert epsilon_of([SampledGaussian(noise, rate, steps)], DELTA) <= epsilon
    # A tenth of a percent less noise costs more than the target.
    assert epsilon_of([SampledGaussian(noise / 1.0011, rate, steps)], DELTA) > epsilon


def test_more_steps_and_a_smaller_target_take_more_noise():
    noises = [noise_multiplier_for(e, DELTA, 0.05, 100) for e in (2.0, 1.0, 0.5)]
    assert noises == sorted(noises)
    assert len(set(noises)) == 3
    longer = [noise_multiplier_for(1.0, DELTA, 0.05, steps) for steps in (50, 200)]
    assert longer == sorted(longer)
    assert len(set(longer)) == 2


def test_a_target_that_no_noise_reaches_is_refused():
    with pytest.raises(TaskError) as caught:
        noise_multiplier_for(1e-6, 1e-9, 1.0, 10_000)
    (problem,) = caught.value.problems
    assert (problem.code, problem.key) == ("LF3301", "privacy.record.epsilon")
    assert "10000 steps" in problem.what


def test_a_sampler_s_rate_and_steps_follow_from_its_rows():
    sampler = PoissonSampler(rows=1000, expected_batch=64)
    assert (sampler.rate, sampler.steps_per_epoch) == (0.064, 16)
    assert sampler.event(1.5, 7) == SampledGaussian(1.5, 0.064, 7)
    everything = PoissonSampler(rows=20, expected_batch=64)
    assert (everything.rate, everything.steps_per_epoch) == (1.0, 1)
    assert PoissonSampler(rows=1000, expected_batch=999).steps_per_epoch == 1


def drawn(sampler, steps, key=bytes(range(32))):
    chosen = np.zeros((steps, sampler.rows), dtype=bool)
    for step, rows in enumerate(sampler.batches(steps, Entropy(key))):
        assert np.array_equal(rows, np.unique(rows)), "each record once, in order"
        chosen[step, rows] = True
    return chosen


def test_every_record_is_in_a_step_with_the_accounted_probability():
    sampler = PoissonSampler(rows=200, expected_batch=13)
    chosen = drawn(sampler, 4000)
    of_each = chosen.sum(axis=0)
    expected = 4000 * sampler.rate
    variance = expected * (1 - sampler.rate)
    statistic = ((of_each - expected) ** 2 / variance).sum()
    assert stats.chi2.cdf(statistic, 200) == pytest.approx(0.5, abs=0.49)
    assert chosen.mean() == pytest.approx(sampler.rate, rel=0.01)


def test_steps_and_records_are_drawn_independently():
    chosen = drawn(PoissonSampler(rows=100, expected_batch=30), 3000).astype(float)
    sizes = chosen.sum(axis=1)
    # Sizes of Poisson samples are binomial: they vary, and do not follow each other.
    assert sizes.var() == pytest.approx(100 * 0.3 * 0.7, rel=0.1)
    assert abs(np.corrcoef(sizes[:-1], sizes[1:])[0, 1]) < 0.06
    of_a_record = [np.corrcoef(chosen[:-1, n], chosen[1:, n])[0, 1] for n in range(100)]
    assert max(map(abs, of_a_record)) < 0.08
    between = np.corrcoef(chosen.T)[np.triu_indices(100, 1)]
    assert np.abs(between).max() < 0.1
    assert between.std() == pytest.approx(1 / math.sqrt(3000), rel=0.1)


def test_a_rate_of_one_takes_every_record_every_time():
    assert drawn(PoissonSampler(rows=30, expected_batch=30), 50).all()


def privacy_sources():
    (root,) = importlib.util.find_spec("lepton_fed.privacy").submodule_search_locations
    return sorted(Path(root).rglob("*.py"))


def names_in(source):
    """Yield every module that is imported and every dotted name that is read."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, (ast.Attribute, ast.Name)):
            yield ast.unparse(node)


def seedable(source):
    """Return the names in a source through which numbers that a seed repeats could come in."""
    of_torch = (
        r"Generator|rand\w*|normal|poisson|multinomial|bernoulli|manual_seed|default_generator"
    )
    of_tensors = r"normal_|uniform_|bernoulli_|exponential_|random_|cauchy_|log_normal_|geometric_"
    return {
        name
        for name in names_in(source)
        if re.fullmatch(r"((np|numpy|torch)\.)?random(\..*)?", name)
        or re.fullmatch(rf"torch\.({of_torch})(\..*)?", name)
        or re.fullmatch(rf".*\.({of_tensors})", name)
    }


def test_nothing_in_the_privacy_room_draws_from_a_generator_that_can_be_seeded():
    sources = privacy_sources()
    assert {"entropy.py", "sampling.py", "engine.py", "ledger.py"} <= {p.name for p in sources}
    found = {str(path): seedable(path.read_text(encoding="utf-8")) for path in sources}
    assert not {path: names for path, names in found.items() if names}


@pytest.mark.parametrize(
    "source",
    [
        "import random",
        "from random import gauss",
        "import numpy.random",
        "from numpy import random",
        "np.random.default_rng()",
        "numpy.random.normal(0, 1)",
        "torch.Generator()",
        "torch.randn(3)",
        "torch.normal(0.0, 1.0, (3,))",
        "from torch import randn",
        "gradient.normal_()",
    ],
)
def test_the_search_for_generators_finds_one(source):
    assert seedable(source)
