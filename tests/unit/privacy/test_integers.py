"""Integer samplers against their exact mass, by a slow sampler and by counting."""

from __future__ import annotations

import math
import random
from decimal import Context
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from lepton_fed.privacy.dp import integers
from lepton_fed.privacy.dp.discrete_gaussian import DiscreteGaussian, discrete_gaussian
from lepton_fed.privacy.dp.entropy import Entropy
from lepton_fed.privacy.dp.integers import IntegerSampler
from lepton_fed.privacy.dp.skellam import Poisson, skellam

KEY = bytes(range(32))
SAMPLES = 400_000


def agrees(samples, low, mass):
    """Chi-square of samples against ``mass[k]`` of ``low + k``; rare ones are put together."""
    counts = np.bincount(samples - low, minlength=mass.size)[: mass.size].astype(float)
    assert counts.sum() == samples.size  # nothing beyond
    expected = mass / mass.sum() * samples.size
    cells, observed, hoped, wanted = [], 0.0, 0.0, []
    for seen, hope in zip(counts, expected, strict=True):
        observed, hoped = observed + seen, hoped + hope
        if hoped >= 20:
            cells.append(observed)
            wanted.append(hoped)
            observed = hoped = 0.0
    cells[-1] += observed
    wanted[-1] += hoped
    return stats.chisquare(cells, wanted).pvalue > 1e-4


def gaussian_mass(sigma, reach):
    at = np.arange(-reach, reach + 1, dtype=float)
    return np.exp(-(at**2) / (2 * sigma**2))


class Exact:
    """Canonne, Kamath, Steinke 2020, algorithms 1 to 3, in fractions: nothing is rounded."""

    def __init__(self, sigma, seed):
        self.variance = Fraction(sigma) ** 2
        self.scale = math.floor(sigma) + 1
        self.random = random.Random(seed)  # noqa: S311

    def below(self, count):
        return self.random.randrange(count)

    def bernoulli(self, probability):
        return self.below(probability.denominator) < probability.numerator

    def bernoulli_exp(self, gamma):
        while gamma > 1:
            if not self.bernoulli_exp(Fraction(1)):
                return False
            gamma -= 1
        k = 1
        while self.bernoulli(gamma / k):
            k += 1
        return k % 2 == 1

    def laplace(self):
        while True:
            remainder = self.below(self.scale)
            if not self.bernoulli_exp(Fraction(remainder, self.scale)):
                continue
            whole = 0
            while self.bernoulli_exp(Fraction(1)):
                whole += 1
            size, minus = remainder + self.scale * whole, self.below(2)
            if not (minus and size == 0):
                return -size if minus else size

    def sample(self):
        while True:
            at = self.laplace()
            off = abs(at) - self.variance / self.scale
            if self.bernoulli_exp(off**2 / (2 * self.variance)):
                return at


@pytest.mark.parametrize("sigma", [0.25, 0.5, 1.0, 2.7, 20.0, 63.9, 64.1, 200.0])
def test_discrete_gaussian_samples_have_the_exact_mass(sigma):
    samples = discrete_gaussian(sigma, SAMPLES, Entropy(KEY))
    reach = math.ceil(13 * sigma)
    assert agrees(samples, -reach, gaussian_mass(sigma, reach))


def test_the_slow_exact_sampler_draws_from_the_same_distribution():
    slow = Exact(3.3, 5)
    samples = np.array([slow.sample() for _ in range(20_000)])
    assert agrees(samples, -43, gaussian_mass(3.3, 43))
    fast = discrete_gaussian(3.3, 20_000, Entropy(KEY))
    low = min(samples.min(), fast.min())
    table = np.stack([np.bincount(x - low, minlength=40) for x in (samples, fast)])
    table = table[:, table.sum(axis=0) >= 20]
    assert stats.chi2_contingency(table).pvalue > 1e-4


@pytest.mark.parametrize("sigma", [1e3, 1e6, 1e9, 2.0**40])
def test_wide_discrete_gaussians_look_like_the_continuous_one(sigma):
    samples = discrete_gaussian(sigma, SAMPLES, Entropy(KEY)).astype(float)
    assert stats.kstest(samples / sigma, "norm").pvalue > 1e-4
    assert samples.var() == pytest.approx(sigma**2, rel=5 * math.sqrt(2 / SAMPLES))
    beyond = np.count_nonzero(np.abs(samples) > 3.5 * sigma)
    hoped = SAMPLES * 2 * stats.norm.sf(3.5)
    assert abs(beyond - hoped) < 5 * math.sqrt(hoped)


def test_the_low_bits_of_wide_samples_are_even():
    low = discrete_gaussian(1e6, SAMPLES, Entropy(KEY)) & 0xFF
    assert stats.chisquare(np.bincount(low, minlength=256)).pvalue > 1e-4


@pytest.mark.parametrize("variance", [2.0**-6, 0.25, 1.0, 7.3, 400.0, 9000.0])
def test_skellam_samples_have_the_exact_mass(variance):
    samples = skellam(variance, SAMPLES, Entropy(KEY))
    reach = math.ceil(13 * math.sqrt(variance)) + 40
    mass = stats.skellam.pmf(np.arange(-reach, reach + 1), variance / 2, variance / 2)
    assert agrees(samples, -reach, mass)


@pytest.mark.parametrize("mean", [0.0078125, 0.5, 3.0, 15.5, 100.25, 4000.0, 9000.0, 1e6])
def test_the_poisson_mass_is_that_of_scipy_and_of_decimal_arithmetic(mean):
    density = Poisson(mean)
    width = min(density.high - density.low, 4000)
    near = np.unique(
        np.clip(np.arange(width) + max(density.low, int(mean) - width // 2), 0, density.high)
    )
    found = density.log_mass(near.astype(float))
    np.testing.assert_allclose(found, stats.poisson.logpmf(near, mean), rtol=1e-7, atol=1e-7)
    context = Context(prec=60)
    for at in {*near[:: max(1, near.size // 25)].tolist(), density.low, density.high}:
        exact = float(density.exact_log_mass(at, context))
        assert density.log_mass(np.array([float(at)]))[0] == pytest.approx(exact, abs=2.0**-43)


@pytest.mark.parametrize("mean", [2.0**20, 2.0**40 + 0.5, 2.0**49])
def test_the_poisson_mass_keeps_its_digits_far_out(mean):
    density = Poisson(mean)
    context = Context(prec=80)
    for at in (density.low, density.mode - 1000, density.mode, density.mode + 3, density.high):
        exact = float(density.exact_log_mass(at, context))
        assert density.log_mass(np.array([float(at)]))[0] == pytest.approx(exact, abs=2.0**-42)


def test_both_formulas_of_a_factorial_agree_where_they_meet():
    context = Context(prec=60)
    below, above = (Poisson(1000.0).exact_log_mass(at, context) for at in (1000, 1001))
    step = context.subtract(above, below)
    expected = context.ln(context.divide(1000, 1001))
    assert abs(float(context.subtract(step, expected))) < 1e-50


@pytest.mark.parametrize("density", [DiscreteGaussian(0.7), DiscreteGaussian(300.0), Poisson(1e5)])
def test_comparisons_in_decimal_arithmetic_decide_as_double_precision_does(density):
    quick = IntegerSampler(density).draw(2000, Entropy(KEY))
    careful = IntegerSampler(density, doubt=2.0**-8).draw(2000, Entropy(KEY))
    np.testing.assert_array_equal(quick, careful)


def test_a_comparison_takes_further_bits_until_it_is_decided(monkeypatch):
    sampler = IntegerSampler(DiscreteGaussian(300.0))
    block, value = 700, int(sampler._starts[700]) + 1
    exact = Context(prec=120).exp(DiscreteGaussian(300.0).exact_log_mass(value, Context(prec=120)))
    probability = Fraction(exact) * Fraction(sampler._scale)
    probability *= Fraction(1 << sampler._width_bits, sampler._weights[block])
    bits = math.floor(probability * 2**192)
    first, further = bits >> 128, [bits >> 64 & (2**64 - 1), bits & (2**64 - 1)]

    class Words:
        def __init__(self, last):
            self.left = [*further[:1], last]

        def words(self, count):
            assert count == 1
            return np.array([self.left.pop(0)], dtype=np.uint64)

    assert not sampler._decide(len(sampler._weights), 0, 0, Words(0))  # what proposes nothing
    assert sampler._decide(block, value, first, Words(max(0, further[1] - 10**9)))
    assert not sampler._decide(block, value, first, Words(further[1] + 10**9))


def test_proposals_sum_to_the_whole_word_and_never_exceed_one():
    for density in (DiscreteGaussian(0.5), DiscreteGaussian(777.0), Poisson(3e4), Poisson(2.0)):
        sampler = IntegerSampler(density)
        columns = sampler._columns
        total = dict.fromkeys(range(columns), 0)
        for column, (threshold, alias) in enumerate(
            zip(sampler._thresholds.tolist(), sampler._aliases.tolist(), strict=True)
        ):
            total[column] += threshold
            total[alias] += 2**64 // columns - threshold
        assert [total[i] for i in range(len(sampler._weights))] == sampler._weights
        assert sum(total.values()) == 2**64
        width = 1 << sampler._width_bits
        everything = sampler._starts[: len(sampler._weights), None] + np.arange(width)
        kept = density.log_mass(everything.astype(float))
        assert (kept + sampler._bounds[: len(sampler._weights), None]).max() <= 0


def test_what_is_cut_off_is_as_little_as_is_said():
    for sigma in (0.125, 1.0, 50.0):
        density = DiscreteGaussian(sigma)
        beyond = 2 * sum(
            math.exp(-((density.high + k) ** 2) / (2 * sigma**2)) for k in range(1, 500)
        )
        whole = sum(math.exp(-(k**2) / (2 * sigma**2)) for k in range(-700, 701))
        assert beyond / whole < density.tail < 2.0**-120
    for mean in (0.01, 1.0, 80.0, 5000.0):
        density = Poisson(mean)
        beyond = stats.poisson.sf(density.high, mean) + stats.poisson.cdf(density.low - 1, mean)
        assert beyond < density.tail


def test_the_same_key_gives_the_same_samples_and_another_one_others():
    one, same, other = (discrete_gaussian(1e4, 1000, Entropy(key)) for key in (KEY, KEY, bytes(32)))
    np.testing.assert_array_equal(one, same)
    assert np.count_nonzero(one == other) < 10


def test_no_samples_are_no_samples():
    assert discrete_gaussian(3.0, 0, Entropy(KEY)).shape == (0,)
    assert discrete_gaussian(3.0, 1, Entropy(KEY)).dtype == np.int64


@pytest.mark.parametrize("sigma", [0.0, -1.0, 2.0**41, math.inf, math.nan, 0.1])
def test_a_parameter_out_of_range_is_refused(sigma):
    with pytest.raises(ValueError):
        discrete_gaussian(sigma, 1, Entropy(KEY))
    with pytest.raises(ValueError):
        skellam(sigma * abs(sigma) if sigma != 0.1 else 0.01, 1, Entropy(KEY))


def test_a_doubt_below_the_error_of_double_precision_is_refused():
    with pytest.raises(ValueError, match="doubt"):
        IntegerSampler(DiscreteGaussian(1.0), doubt=integers.DOUBT / 2)
    with pytest.raises(ValueError, match="mean"):
        Poisson(2.0**60)


def test_more_digits_than_pi_has_here_are_not_made_up():
    with pytest.raises(ArithmeticError):
        Poisson(10.0).exact_log_mass(3, Context(prec=100))
