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
from dp_accounting import dp_event, pld
from scipy import stats

from lepton_fed.errors import RunError, TaskError
from lepton_fed.privacy.dp import accounting
from lepton_fed.privacy.dp.accounting import (
    OrderedGaussian,
    SampledGaussian,
    epsilon_of,
    event_of,
    guarantee_of,
    noise_multiplier_for,
)
from lepton_fed.privacy.dp.entropy import Entropy
from lepton_fed.privacy.dp.sampling import SAMPLERS, OrderedSampler, PoissonSampler, sampler_of

DELTA = 1e-5

# Noise, sampling rate, steps, delta; epsilon by PLD at grid 1e-4, and a proven lower bound.
TABLE = [
    (1.1, 256 / 60000, 3515, 1e-5, 1.133745, 0.958),
    (0.7, 0.001, 10000, 1e-5, 1.245044, 0.753),
    (2.0, 64 / 1437, 1000, 1e-5, 3.244814, 3.195),
    (8.0, 0.25, 400, 1e-5, 2.592070, 2.572),
    (20.0, 1.0, 100, 1e-5, 1.993091, 1.988),
    (0.5, 0.01, 1000, 1e-5, 13.360826, 13.31),
    (10.0, 0.01, 100, 1e-6, 0.034408, 0.0294),
    (0.35, 0.05, 500, 1e-5, 107.275060, 107.25),
]


MIXED = 4.822359
"""By PLD at grid 1e-4; that takes half a minute."""


def close_and_never_below(found, fine):
    return fine - 1e-6 <= found <= 1.005 * fine  # half of what is promised; nothing is tiny


@pytest.mark.parametrize(("noise", "rate", "steps", "delta", "fine", "lower"), TABLE)
def test_epsilon_is_near_the_fine_one_and_never_below_it(noise, rate, steps, delta, fine, lower):
    found = epsilon_of([SampledGaussian(noise, rate, steps)], delta)
    assert close_and_never_below(found, fine)
    assert found >= lower


def test_fifty_different_rounds_cost_what_the_fine_grid_says():
    rounds = [SampledGaussian(1.0 + 0.02 * n, 0.02 + 0.001 * n, 20) for n in range(50)]
    assert close_and_never_below(epsilon_of(rounds, DELTA), MIXED)


def test_the_table_s_fine_numbers_are_those_of_dp_accounting():
    accountant = pld.PLDAccountant(value_discretization_interval=1e-4)
    accountant.compose(dp_event.PoissonSampledDpEvent(0.01, dp_event.GaussianDpEvent(10.0)), 100)
    assert accountant.get_epsilon(1e-6) == pytest.approx(0.034408, abs=1e-6)


@pytest.mark.parametrize(
    ("noise", "rate", "steps"),
    [(10.0, 0.001, 100_000), (3.0, 0.002, 5000), (20.0, 0.05, 500)],
)
def test_the_grid_is_finer_where_a_step_s_losses_are_small(noise, rate, steps):
    """At a grid of 1e-3 the first of these is told at three times its cost."""
    event = SampledGaussian(noise, rate, steps)
    told = guarantee_of([event], DELTA)
    assert told.grid < 1e-3
    accountant = pld.PLDAccountant(value_discretization_interval=told.grid / 5)
    gaussian = dp_event.GaussianDpEvent(noise)
    accountant.compose(dp_event.PoissonSampledDpEvent(rate, gaussian), steps)
    finer = accountant.get_epsilon(DELTA)
    assert finer - 1e-6 <= told.epsilon <= 1.01 * finer


def test_a_guarantee_says_what_its_number_depends_on():
    event = SampledGaussian(1.1, 256 / 60000, 3515)
    told = guarantee_of([event], DELTA)
    assert told.epsilon == epsilon_of([event], DELTA)
    assert (told.delta, told.adjacency, told.samplers) == (DELTA, "add-or-remove-one", ("poisson",))
    assert told.grid == 1e-3
    assert told.replace_one == pytest.approx(1.93, abs=0.005)
    assert told.rdp == pytest.approx(1.281, abs=0.001)
    # One event in an order, and the whole holds only with the record's place kept.
    both = guarantee_of([event, OrderedGaussian(5.0, 0.1, 10, 1, "full")], DELTA)
    assert both.adjacency == "zero-out-one"
    assert both.samplers == ("full", "poisson")
    assert both.epsilon > told.epsilon


def test_to_replace_a_record_in_an_order_is_twice_the_distance():
    ordered = OrderedGaussian(4.0, 0.1, 10, 1, "shuffled")
    closer = OrderedGaussian(2.0, 0.1, 10, 1, "shuffled")
    twice = guarantee_of([ordered], DELTA).replace_one
    assert twice == pytest.approx(epsilon_of([closer], DELTA), rel=1e-9)


def test_no_noise_and_no_steps_have_a_guarantee_too():
    assert guarantee_of([SampledGaussian(0.0, 0.1, 3)], DELTA).epsilon == math.inf
    nothing = guarantee_of([OrderedGaussian(0.0, 0.1, 0, 0, "full")], DELTA)
    assert (nothing.epsilon, nothing.replace_one, nothing.rdp) == (0, 0, 0)
    assert nothing.samplers == ()


@pytest.mark.parametrize("rdp", [0.5, math.nan])
def test_a_renyi_bound_below_pld_is_a_fault(rdp, monkeypatch):
    monkeypatch.setattr(accounting, "_rdp", lambda merged, delta: rdp)
    with pytest.raises(RunError) as caught:
        guarantee_of([SampledGaussian(2.0, 64 / 1437, 1000)], DELTA)
    assert caught.value.problems[0].code == "LF3310"


@pytest.mark.parametrize(("noise", "rate", "steps", "delta", "fine", "lower"), TABLE)
def test_renyi_agrees_with_pld_in_every_case(noise, rate, steps, delta, fine, lower):
    told = guarantee_of([SampledGaussian(noise, rate, steps)], delta)
    assert told.rdp >= told.epsilon


def lower_bound_of_shuffling(noise, batches, delta):
    """Chua et al. 2024, section 4: the event that the largest of the batches' sums is over a line.

    The record is in one of ``batches``; each sum is a Gaussian around 1 more than without it, in
    whichever the record is, and around 2 more for the neighbour.
    """
    line = np.linspace(-1, 2 + 12 * noise, 4000)
    others = (batches - 1) * stats.norm.logcdf(line / noise)
    one = -np.expm1(stats.norm.logcdf((line - 2) / noise) + others)
    other = -np.expm1(stats.norm.logcdf((line - 1) / noise) + others)
    low, high = 0.0, 80.0
    for _ in range(80):
        middle = (low + high) / 2
        fits = (one - math.exp(middle) * other).max() <= delta
        low, high = (low, middle) if fits else (middle, high)
    return low


@pytest.mark.parametrize(
    ("noise", "proven"), [(0.4, 13.21), (0.5, 9.997), (0.6, 7.99), (0.8, 5.24), (1.0, 2.88)]
)
@pytest.mark.parametrize("order", ["shuffled", "full"])
def test_an_order_is_never_told_below_what_shuffling_is_proven_to_cost(noise, proven, order):
    sampler = OrderedSampler(rows=64_000, expected_batch=64, order=order)
    assert sampler.steps_per_epoch == 1000
    told = epsilon_of([sampler.event(noise, 1000)], DELTA)
    lower = lower_bound_of_shuffling(noise, 1000, DELTA)
    assert lower == pytest.approx(proven, rel=2e-3)
    assert told >= lower
    # The same batches told as a Poisson sample would be far below.
    poisson = PoissonSampler(rows=64_000, expected_batch=64).event(noise, 1000)
    assert epsilon_of([poisson], DELTA) < 0.6 * lower


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
    noise = noise_multiplier_for(epsilon, DELTA, SampledGaussian(1.0, rate, steps))
    assert epsilon_of([SampledGaussian(noise, rate, steps)], DELTA) <= epsilon
    # A tenth of a percent less noise costs more than the target.
    assert epsilon_of([SampledGaussian(noise / 1.0011, rate, steps)], DELTA) > epsilon


@pytest.mark.parametrize(("noise", "steps"), [(1.0, 50), (0.5, 25), (0.1, 1)])
def test_little_noise_on_all_records_costs_what_one_gaussian_does(noise, steps):
    std = noise / math.sqrt(steps)
    found = epsilon_of([SampledGaussian(noise, 1.0, steps)], DELTA)

    def delta_at(epsilon):  # Balle and Wang, ICML 2018, theorem 8
        near, far = 0.5 / std - epsilon * std, -0.5 / std - epsilon * std
        return stats.norm.cdf(near) - math.exp(epsilon + stats.norm.logcdf(far))

    assert delta_at(found) <= DELTA < delta_at(0.999 * found)


@pytest.mark.parametrize("order", ["shuffled", "full"])
def test_noise_for_an_order_is_made_for_its_passes(order):
    run = OrderedSampler(rows=100, expected_batch=30, order=order).event(1.0, 6).times(5)
    assert (run.steps, run.passes) == (30, 10), "each round begins a pass"
    noise = noise_multiplier_for(3.0, DELTA, run)
    assert 2.99 < epsilon_of([SampledGaussian(noise, 1.0, 10)], DELTA) <= 3.0


def test_more_steps_and_a_smaller_target_take_more_noise():
    noises = [
        noise_multiplier_for(e, DELTA, SampledGaussian(1.0, 0.05, 100)) for e in (2.0, 1.0, 0.5)
    ]
    assert noises == sorted(noises)
    assert len(set(noises)) == 3
    longer = [
        noise_multiplier_for(1.0, DELTA, SampledGaussian(1.0, 0.05, steps)) for steps in (50, 200)
    ]
    assert longer == sorted(longer)
    assert len(set(longer)) == 2


def test_a_target_that_no_noise_reaches_is_refused():
    with pytest.raises(TaskError) as caught:
        noise_multiplier_for(1e-6, 1e-9, SampledGaussian(1.0, 1.0, 10_000))
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


@pytest.mark.parametrize("order", ["shuffled", "full"])
@pytest.mark.parametrize(("rows", "batch"), [(10, 3), (9, 3), (5, 8), (1, 1)])
def test_a_pass_takes_every_record_once_whatever_the_order(order, rows, batch):
    sampler = OrderedSampler(rows, batch, order)
    batches = list(sampler.batches(3 * sampler.steps_per_epoch, Entropy(bytes(32))))
    for each in range(3):
        whole = np.concatenate(batches[each * sampler.steps_per_epoch :][: sampler.steps_per_epoch])
        assert sorted(whole) == list(range(rows))
    assert max(map(len, batches)) == min(batch, rows)


@pytest.mark.parametrize("order", ["shuffled", "full"])
@pytest.mark.parametrize("steps", [0, 1, 3, 4, 5, 8, 30])
def test_no_record_is_in_more_steps_than_the_event_says(order, steps):
    sampler = OrderedSampler(100, 30, order)
    batches = list(sampler.batches(steps, Entropy(bytes(32))))
    event = sampler.event(1.0, steps)
    found = np.bincount(np.concatenate([np.empty(0, int), *batches]), minlength=100)
    assert (event.steps, event.passes) == (len(batches), found.max())
    assert (event.sampler, event.sampling_rate) == (order, 0.3)


def test_only_a_shuffled_order_is_drawn_and_each_pass_anew():
    def passes(order, key):
        sampler = OrderedSampler(200, 50, order)
        drawn = np.concatenate(list(sampler.batches(8, Entropy(key))))
        return drawn[:200].tolist(), drawn[200:].tolist()

    one, two = passes("shuffled", bytes(32))
    other, _ = passes("shuffled", bytes(31) + b"1")
    assert list(range(200)) not in (one, two, other)
    assert one != two
    assert one != other
    assert passes("full", bytes(32)) == (list(range(200)), list(range(200)))


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_sampler_of_a_name_emits_events_of_that_name(name):
    assert sampler_of(name, 100, 10).event(1.0, 5).sampler == name


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


@pytest.mark.parametrize("bend", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("cliff", [0.0, 1.4])
def test_the_noise_that_a_target_takes_is_found_in_few_looks(bend, cliff):
    """Each look takes a PLD: on a curve, and on one that is infinite below a cliff."""
    looks = []

    def cost(noise):
        looks.append(noise)
        return math.inf if noise < cliff else noise**-bend + 0.2 / noise**3

    found = accounting._narrowed(1.0, 2.0, cost(1.5), cost)
    assert cost(found) <= cost(1.5) < cost(found / 1.001001)
    assert len(looks) <= 12
