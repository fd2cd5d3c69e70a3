"""What shares of discrete noise cost, against exact losses and other accountants."""

from __future__ import annotations

import math

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, pld, rdp
from dp_accounting.pld import privacy_loss_distribution
from scipy import stats

from lepton_fed.privacy.distributed import accounting
from lepton_fed.privacy.distributed.accounting import (
    DiscreteGaussianShares,
    SkellamShares,
    epsilon_of_gaussian,
    epsilon_of_renyi,
    epsilon_of_zcdp,
)
from lepton_fed.privacy.distributed.plan import SharesPlan

DELTA = 1e-5
SIZES = (20_000, 1_660_000, 10_000_000)
INFLATION = {  # by bits, one number for each size: epsilon over that of the continuous Gaussian
    12: (1.88, 25.9, 107),
    14: (1.07, 4.1, 12.6),
    16: (1.005, 1.32, 2.45),
    18: (1.000, 1.022, 1.13),
    20: (1.000, 1.001, 1.008),
    24: (1.000, 1.000, 1.000),
}


def plan(size, bits, sites=10, noise="discrete-gaussian"):
    return SharesPlan(sites, sites, size, 1.0, 10.0, bits, noise=noise)


@pytest.mark.parametrize(("bits", "inflations"), INFLATION.items())
@pytest.mark.parametrize("sites", [10, 100])
def test_the_price_of_quantisation_by_renyi_divergences(bits, inflations, sites):
    continuous = epsilon_of_zcdp(50 * 0.5 / 10**2, DELTA)
    assert continuous == pytest.approx(3.19, abs=0.005)
    for size, inflation in zip(SIZES, inflations, strict=True):
        shares = plan(size, bits, sites).cost(50)
        assert epsilon_of_zcdp(shares.zcdp(), DELTA) / continuous == pytest.approx(
            inflation, rel=0.02
        )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("sites", [10, 100, 1000])
def test_at_20_bits_epsilon_is_within_1_percent_of_the_continuous_mechanism(size, sites):
    exact = epsilon_of_gaussian(10 / math.sqrt(50), DELTA)
    assert exact <= plan(size, 20, sites).cost(50).epsilon(DELTA) < 1.01 * exact
    renyi = epsilon_of_zcdp(50 * 0.5 / 10**2, DELTA)
    skellam = plan(size, 20, sites, "skellam").cost(50).epsilon(DELTA)
    assert renyi < skellam < 1.01 * renyi


def test_the_best_bound_is_below_that_of_renyi_divergences():
    shares = plan(1_660_000, 20).cost(50)
    assert shares.epsilon(DELTA) < 0.93 * epsilon_of_zcdp(shares.zcdp(), DELTA)


@pytest.mark.parametrize(("noise", "rounds"), [(1.0, 1), (10.0, 50), (0.7, 3), (50.0, 10)])
def test_epsilon_of_gaussians_is_that_of_privacy_loss_distributions(noise, rounds):
    accountant = pld.PLDAccountant(value_discretization_interval=1e-4)
    accountant.compose(GaussianDpEvent(noise), rounds)
    upper = accountant.get_epsilon(DELTA)
    found = epsilon_of_gaussian(noise / math.sqrt(rounds), DELTA)
    assert upper - max(0.002, 0.002 * upper) <= found <= upper * (1 + 1e-6)


def test_epsilon_of_renyi_divergences_is_that_of_dp_accounting():
    orders = np.arange(2, 200, dtype=float)
    accountant = rdp.RdpAccountant(orders)
    accountant.compose(GaussianDpEvent(5.0), 30)
    mine = epsilon_of_renyi(orders, 30 * orders / (2 * 5.0**2), DELTA)
    assert mine == pytest.approx(accountant.get_epsilon(DELTA), rel=1e-9)


def exact_delta(mass, shift, epsilon):
    """Hockey-stick divergence of integer noise and the same noise shifted, the larger way round."""
    moved = np.roll(mass, shift)
    moved[:shift] = 0
    kept = mass.copy()
    return max(
        np.maximum(kept - math.exp(epsilon) * moved, 0).sum(),
        np.maximum(moved - math.exp(epsilon) * kept, 0).sum(),
    )


def exact_epsilon(mass, shift, delta):
    low, high = 0.0, 200.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if exact_delta(mass, shift, middle) > delta else (low, middle)
    return high


def discrete(sigma, reach):
    mass = np.exp(-(np.arange(-reach, reach + 1.0) ** 2) / (2 * sigma**2))
    return mass / mass.sum()


@pytest.mark.parametrize(
    ("sigma", "shares", "shift"),
    [(1.0, 1, 1), (0.5, 4, 1), (3.0, 2, 2), (8.0, 5, 6), (30.0, 1, 30)],
)
def test_no_bound_is_below_the_exact_loss_of_summed_shares(sigma, shares, shift):
    reach = math.ceil(14 * sigma)
    mass = one = discrete(sigma, reach)
    for _ in range(shares - 1):
        mass = np.convolve(mass, one)
    mass = np.pad(mass, shift + 50)
    exact = exact_epsilon(mass, shift, DELTA)
    found = DiscreteGaussianShares(sigma, shares, shift**2, 1).epsilon(DELTA)
    assert exact <= found
    if shares * sigma**2 > 500:
        assert found < 1.01 * exact


@pytest.mark.parametrize(("variance", "shift"), [(4.0, 1), (50.0, 3), (900.0, 20)])
def test_no_skellam_bound_is_below_the_exact_loss(variance, shift):
    reach = math.ceil(16 * math.sqrt(variance)) + 40
    mass = stats.skellam.pmf(np.arange(-reach, reach + 1), variance / 2, variance / 2)
    exact = exact_epsilon(mass, shift, DELTA)
    found = SkellamShares(math.sqrt(variance), 1, shift**2, 1).epsilon(DELTA)
    assert exact <= found < (1.3 if variance > 10 else 1.7) * exact


@pytest.mark.parametrize(("variance", "shift"), [(4.0, 1), (50.0, 3), (900.0, 20)])
def test_no_skellam_divergence_is_below_the_exact_one(variance, shift):
    reach = math.ceil(9 * math.sqrt(variance)) + 20
    at = np.arange(-reach, reach + 1)
    log_mass = stats.skellam.logpmf(at, variance / 2, variance / 2)
    log_moved = stats.skellam.logpmf(at - shift, variance / 2, variance / 2)
    for order in (2, 3, 8):
        exact = math.log(np.exp(order * log_mass + (1 - order) * log_moved).sum()) / (order - 1)
        found = SkellamShares(math.sqrt(variance), 1, shift**2, 1).renyi(order)
        assert exact <= found < (1.1 if variance > 10 else 2.0) * exact


def test_a_discrete_gaussian_agrees_with_dp_accounting():
    loss = privacy_loss_distribution.from_discrete_gaussian_mechanism(
        20.0, sensitivity=10, value_discretization_interval=1e-4
    )
    for rounds in (1, 10):
        theirs = loss.self_compose(rounds).get_epsilon_for_delta(DELTA)
        mine = DiscreteGaussianShares(20.0, 1, 100, 1, rounds).epsilon(DELTA)
        assert mine == pytest.approx(theirs, rel=0.01)


def test_domination_holds_mass_by_mass():
    """The sum of shares against the rounded continuous Gaussian, integrated numerically."""
    sigma, shares = 2.0, 3
    mass = one = discrete(sigma, 60)
    for _ in range(shares - 1):
        mass = np.convolve(mass, one)
    mechanism = DiscreteGaussianShares(sigma, shares, 1, 1)
    noise, ratio = mechanism.dominating_gaussian()
    lost = shares * sigma**2 - noise**2
    x, step = np.linspace(-40, 40, 80_001, retstep=True)
    weight = np.exp(-(x**2) / (2 * noise**2)) / (noise * math.sqrt(2 * math.pi)) * step
    at = np.arange(-60, 61)
    kernel = np.exp(-((at[:, None] - x) ** 2) / (2 * lost))
    rounded = (kernel / kernel.sum(axis=0)) @ weight
    middle = mass[mass.size // 2 - 12 : mass.size // 2 + 13]
    off = np.log(middle / rounded[48:73])
    assert np.abs(off).max() < ratio + 1e-9
    assert ratio < 1e-6


def test_concentrated_dp_of_few_small_shares_is_that_of_the_theorem():
    tau = 10 * (
        math.exp(-2 * math.pi**2 * 0.36 * 1 / 2)
        + math.exp(-2 * math.pi**2 * 0.36 * 2 / 3)
        + math.exp(-2 * math.pi**2 * 0.36 * 3 / 4)
    )
    for dimension in (1, 100):
        first = math.sqrt(9 / (4 * 0.36) + tau * dimension / 2)
        second = 3 / (2 * 0.6) + tau * math.sqrt(dimension)
        found = DiscreteGaussianShares(0.6, 4, 9, dimension, 7).zcdp()
        assert found == pytest.approx(7 * min(first, second) ** 2 / 2, rel=1e-12)


def test_skellam_divergences_are_those_of_the_theorem():
    assert SkellamShares(2.0, 1, 1, 1).renyi(2) == pytest.approx(0.25 + 9 / 64)
    assert SkellamShares(0.5, 1, 1, 1, 3).renyi(2) == pytest.approx(3 * (4 + 6))
    many = SkellamShares(10.0, 4, 16, 9).renyi(5)  # D1 is sqrt(9 * 16)
    assert many == pytest.approx(5 * 16 / 800 + (9 * 16 + 6 * 12) / (4 * 400**2))


@pytest.mark.parametrize("variance", [0.25, 0.3, 0.5])
def test_sums_over_shifted_integers_differ_by_the_ratio(variance):
    at = np.arange(-40, 41.0)
    sums = [np.exp(-((at - x) ** 2) / (2 * variance)).sum() for x in np.linspace(0, 1, 201)]
    ratio = math.log(max(sums) / min(sums))
    assert ratio <= accounting._log_ratio(variance) == pytest.approx(ratio, rel=0.01)


def test_shares_that_are_too_small_for_domination_still_have_a_bound():
    shares = DiscreteGaussianShares(0.5, 2, 1, 10)
    assert shares.dominating_gaussian() == (0.0, math.inf)
    assert 0 < shares.epsilon(DELTA) < math.inf
    smaller = DiscreteGaussianShares(0.49, 2, 1, 10)  # the theorem needs 1/2
    assert smaller.zcdp() == smaller.epsilon(DELTA) == math.inf
    assert DiscreteGaussianShares(0.49, 1, 1, 10).epsilon(DELTA) < math.inf


def test_epsilon_grows_with_rounds_and_shrinks_with_shares():
    for kind in (DiscreteGaussianShares, SkellamShares):
        epsilons = [kind(50.0, 5, 100**2, 1000, rounds).epsilon(DELTA) for rounds in (0, 1, 2, 20)]
        assert epsilons[0] == 0
        assert epsilons == sorted(set(epsilons))
        more = kind(50.0, 10, 100**2, 1000, 20).epsilon(DELTA)
        assert more < epsilons[-1]


def test_the_samples_own_error_is_added_to_delta():
    shares = DiscreteGaussianShares(1e4, 100, 1e8, 10_000_000, 1000)
    assert math.isfinite(shares.epsilon(1e-5))
    assert shares.epsilon(1e-40) == math.inf


def test_extremes_of_the_gaussian():
    assert epsilon_of_gaussian(1e6, 0.5) == 0
    assert epsilon_of_gaussian(1e-4, 1e-5) == math.inf
    assert epsilon_of_gaussian(0.05, 1e-5) == pytest.approx(283.6, rel=0.01)


@pytest.mark.parametrize("kind", [DiscreteGaussianShares, SkellamShares])
@pytest.mark.parametrize(
    "wrong",
    [(0.0, 1, 1.0, 1), (1.0, 0, 1.0, 1), (1.0, 1, 0.0, 1), (1.0, 1, 1.0, 0), (1.0, 1, 1.0, 1, -1)],
)
def test_no_such_mechanism(kind, wrong):
    with pytest.raises(ValueError, match="no such mechanism"):
        kind(*wrong)
