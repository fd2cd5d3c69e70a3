"""Shares of noise through plan, site and coordinator."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from lepton_fed.core.ring import RingEncoding, RingSum
from lepton_fed.errors import TaskError
from lepton_fed.privacy.distributed.accounting import epsilon_of_gaussian
from lepton_fed.privacy.distributed.plan import SharesPlan, plan_shares
from lepton_fed.privacy.distributed.rotation import Rotation
from lepton_fed.privacy.distributed.rounding import squared_norm
from lepton_fed.privacy.distributed.shares import NoisySum
from lepton_fed.privacy.dp.accounting import epsilon_of
from lepton_fed.privacy.dp.entropy import Entropy
from lepton_fed.privacy.secagg.vector import MaskedLayout

SIZE = 6000


def noisy(plan, round_number=1):
    return NoisySum(plan, Rotation.of_round(9, round_number, plan.size))


def entropy(site):
    return Entropy(bytes([site + 1]) * 32)


def updates(sites, size=SIZE, norm=1.0):
    some = np.random.default_rng(3).standard_normal((sites, size))
    return some * (norm / np.linalg.norm(some, axis=1, keepdims=True))


@pytest.mark.parametrize("noise", ["discrete-gaussian", "skellam"])
def test_the_sum_in_the_ring_is_updates_plus_noise_exactly(noise):
    plan = SharesPlan(5, 4, SIZE, 1.0, 3.0, 20, noise=noise)
    ends = noisy(plan)
    total = np.zeros(plan.padded, dtype=np.uint64)
    plain = np.zeros(plan.padded, dtype=np.int64)
    for site, update in enumerate(updates(5)):
        words = ends.encode(update, entropy(site))
        assert words.dtype == np.uint64
        assert int(words.max()) < 2**20
        total += words
        again = entropy(site)
        plain += ends.quantised(update, again) + ends.share(again)
    half = 2**19
    np.testing.assert_array_equal(ends.from_ring(total), (plain + half) % 2**20 - half)
    assert np.mean(ends.from_ring(total) != plain) < 2e-4
    exactly = ends.rotation.undo(ends.from_ring(total) * plan.grid)
    np.testing.assert_array_equal(ends.decode(total), exactly)


@pytest.mark.parametrize("noise", ["discrete-gaussian", "skellam"])
@pytest.mark.parametrize(("sites", "honest"), [(6, 6), (9, 6), (6, 1)])
def test_the_shares_of_the_honest_have_the_planned_variance(sites, honest, noise):
    size = 60_000
    plan = SharesPlan(sites, honest, size, 2.0, 1.5, 24, noise=noise)
    ends = noisy(plan)
    total = sum(ends.share(entropy(site)) for site in range(honest)) * plan.grid
    planned = plan.noise_multiplier * plan.clip
    assert total.var() == pytest.approx(planned**2, rel=6 * math.sqrt(2 / size))
    assert stats.kstest(total / planned, "norm").pvalue > 1e-4


def test_the_coordinator_gets_the_sum_with_the_planned_noise():
    plan = plan_shares(
        epsilon=5, delta=1e-5, rounds=10, sites=8, honest=6, size=SIZE, clip=1.0, bits=20
    )
    ends = noisy(plan)
    some = updates(8)
    total = np.zeros(plan.padded, dtype=np.uint64)
    for site, update in enumerate(some):
        total += ends.encode(update, entropy(site))
    off = ends.decode(total) - some.sum(axis=0)
    planned = plan.noise_multiplier * math.sqrt(8 / 6)
    assert off.std() == pytest.approx(planned, rel=0.05)
    assert plan.mean_deviation == pytest.approx(planned / 8)
    assert abs(off.mean()) < 5 * planned / math.sqrt(SIZE)


def test_hardly_a_coordinate_wraps():
    plan = SharesPlan(4, 4, 100_000, 1.0, 2.0, 12)
    ends = noisy(plan)
    wrapped = sum(
        ends.quantised(update, entropy(site)) + ends.share(entropy(site))
        for site, update in enumerate(updates(4, 100_000))
    )
    assert np.mean(np.abs(wrapped) >= 2**11) < 2e-4
    assert np.abs(wrapped).max() > 0.8 * 2**11  # and the ring is used
    assert wrapped.std() <= plan.sum_deviation * 1.02


def test_long_updates_are_clipped_and_short_ones_are_not():
    plan = SharesPlan(3, 3, SIZE, 1.0, 1.0, 24)
    ends = noisy(plan)
    for norm, left in ((0.0, 0.0), (0.3, 0.3), (1.0, 1.0), (40.0, 1.0)):
        update = updates(1, norm=norm)[0]
        units = ends.quantised(update, entropy(0))
        assert squared_norm(units) <= plan.norm_limit
        assert np.linalg.norm(units * plan.grid) == pytest.approx(left, abs=0.003)


def test_one_site_moves_the_sum_by_no_more_than_is_accounted_for():
    plan = SharesPlan(3, 3, SIZE, 1.0, 1.0, 10)  # a coarse grid, where rounding matters
    ends = noisy(plan)
    spikes = np.zeros(SIZE)
    spikes[0] = 1e6
    for update in (updates(1, norm=5.0)[0], spikes, np.full(SIZE, 0.1)):
        moved = squared_norm(ends.quantised(update, entropy(1)))
        assert moved <= plan.squared_sensitivity
        assert moved * plan.grid**2 > 1  # rounding did lengthen it


@pytest.mark.parametrize("noise", ["discrete-gaussian", "skellam"])
def test_a_plan_costs_its_epsilon_and_hardly_less(noise):
    plan = plan_shares(
        epsilon=2.0,
        delta=1e-6,
        rounds=30,
        sites=12,
        honest=8,
        size=50_000,
        clip=0.7,
        bits=22,
        noise=noise,
    )
    assert 0.999 * 2.0 < plan.cost(30).epsilon(1e-6) <= 2.0
    assert plan.cost(31).epsilon(1e-6) > 2.0


def test_an_event_says_what_the_rounds_cost_and_only_that():
    plan = plan_shares(epsilon=2, delta=1e-5, rounds=20, sites=10, honest=8, size=SIZE, clip=1.0)
    assert epsilon_of([plan.event(20)], 1e-5) == pytest.approx(2.0, rel=2e-3)
    with pytest.raises(ValueError, match="Skellam"):
        SharesPlan(3, 3, SIZE, 1.0, 1.0, 20, noise="skellam").event(1)
    with pytest.raises(TaskError, match="LF3320"):
        SharesPlan(250, 250, SIZE, 1.0, 1.0, 9).event(1)


def test_fewer_honest_sites_mean_larger_shares():
    def with_honest(honest):
        return plan_shares(
            epsilon=3, delta=1e-5, rounds=50, sites=10, honest=honest, size=SIZE, clip=1.0
        )

    all_of_them, some = with_honest(10), with_honest(7)
    assert some.noise_multiplier == pytest.approx(all_of_them.noise_multiplier, rel=1e-3)
    assert some.share_deviation**2 / all_of_them.share_deviation**2 == pytest.approx(
        10 / 7, rel=2e-3
    )
    assert 2 * 4 * some.sum_deviation == pytest.approx(2**20, rel=1e-9)


@pytest.mark.parametrize(("size", "bits"), [(20_000, 16), (10_000_000, 20)])
def test_20_bits_do_for_10_million_coordinates_and_fewer_for_fewer(size, bits):
    def noise(bits):
        return plan_shares(
            epsilon=least,
            delta=1e-5,
            rounds=50,
            sites=10,
            honest=10,
            size=size,
            clip=1.0,
            bits=bits,
        ).noise_multiplier

    least = epsilon_of_gaussian(10 / math.sqrt(50), 1e-5)
    assert noise(bits) < 10 * 1.01
    assert noise(bits - 2) > 10 * 1.01


def test_what_cannot_be_is_refused_by_name():
    common = {"delta": 1e-5, "rounds": 50, "sites": 10, "honest": 10, "size": 10_000_000}
    with pytest.raises(TaskError, match="LF3321"):
        plan_shares(epsilon=0.5, clip=1.0, bits=12, **common)
    with pytest.raises(TaskError, match="LF3320"):
        SharesPlan(1000, 1000, 100, 1.0, 1.0, 8)
    with pytest.raises(TaskError, match="LF3320"):
        plan_shares(
            epsilon=1, delta=1e-5, rounds=1, sites=5000, honest=5000, size=10, clip=1.0, bits=8
        )


@pytest.mark.parametrize(
    "wrong",
    [
        {"honest": 0},
        {"honest": 4},
        {"size": 0},
        {"clip": 0.0},
        {"noise_multiplier": math.nan},
        {"bits": 7},
        {"bits": 33},
        {"bits": 32, "noise": "skellam"},
        {"beta": 1.0},
    ],
)
def test_a_plan_out_of_range_is_refused(wrong):
    good = {
        "sites": 3, "honest": 3, "size": 10, "clip": 1.0, "noise_multiplier": 1.0, "bits": 20
    }  # fmt: skip
    SharesPlan(**good)
    with pytest.raises(ValueError):
        SharesPlan(**{**good, **wrong})


def test_a_target_out_of_range_is_refused():
    good = {"sites": 3, "honest": 3, "size": 10, "clip": 1.0}
    for epsilon, delta, rounds in ((0.0, 0.1, 1), (1.0, 0.0, 1), (1.0, 1.0, 1), (1.0, 0.1, 0)):
        with pytest.raises(ValueError, match="epsilon"):
            plan_shares(epsilon=epsilon, delta=delta, rounds=rounds, **good)


def test_updates_that_are_no_updates_are_refused():
    ends = noisy(SharesPlan(3, 3, SIZE, 1.0, 1.0, 20))
    for bad, kind in ((math.nan, "f4"), (math.inf, "f4"), (-math.inf, "f8"), (1e200, "f8")):
        update = np.zeros(SIZE, dtype=kind)
        update[-1] = bad
        with pytest.raises(ValueError, match="finite"):
            ends.encode(update, entropy(0))
    with pytest.raises(ValueError, match="shape"):
        ends.encode(np.zeros(SIZE + 1), entropy(0))
    with pytest.raises(ValueError, match="rotation"):
        NoisySum(ends.plan, Rotation.of_round(1, 1, SIZE + 1))


def test_ring_sums_and_masked_vectors_carry_shares_unchanged():
    plan = SharesPlan(4, 4, SIZE, 1.0, 2.0, 24)
    ends = noisy(plan)
    encoding = RingEncoding(32, 0, 2.0**30, 1.0, 4)
    layout = MaskedLayout(encoding, ("update",), plan.padded)
    ring, masked = RingSum(encoding, plan.padded), np.zeros(layout.words, dtype=np.uint32)
    plain = np.zeros(plan.padded, dtype=np.int64)
    for site, update in enumerate(updates(4)):
        units = ends.from_ring(ends.encode(update, entropy(site)))
        ring.add(units.astype(np.float64), 1.0)
        words, saturated = layout.encode({"update": units.astype(np.float64)}, 1.0)
        assert saturated == 0
        masked += words
        plain += units
    np.testing.assert_array_equal(ring.sum(), plain)
    opened = layout.open(masked)
    assert opened.replies == 4
    expected = ends.decode(plain.view(np.uint64))
    np.testing.assert_array_equal(ends.decode(opened.vectors["update"].astype(np.uint64)), expected)
