"""DP-FedAvg with a trusted coordinator: what is released, what it costs, where the norm goes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, pld

from lepton_fed.privacy.central.clipping import AdaptiveClip, FixedClip, sum_noise_multiplier
from lepton_fed.privacy.central.mechanism import ADJACENCY, CentralSum, event, sampled_sites
from lepton_fed.privacy.dp.accounting import epsilon_of, noise_multiplier_for
from lepton_fed.privacy.dp.entropy import Entropy

KEY = bytes(range(32))


def norms(round_number, sites=100, median=3.0):
    random = np.random.default_rng(round_number)
    return median * np.exp(0.7 * random.standard_normal(sites))


@pytest.mark.parametrize("start", [0.1, 10.0])
@pytest.mark.parametrize(("quantile", "target"), [(0.5, 3.0), (0.8, 3.0 * math.exp(0.7 * 0.8416))])
def test_the_norm_reaches_its_quantile_from_far_away_in_60_rounds(start, quantile, target):
    entropy = Entropy(KEY)
    clip = AdaptiveClip(start * target, 100, quantile)
    path = []
    for round_number in range(60):
        within = int(np.count_nonzero(norms(round_number) <= clip.norm))
        clip = clip.step(within, 100, entropy)
        path.append(clip.norm)
    if quantile == 0.5:
        assert path[-1] == pytest.approx(target, rel=0.1)
    # At other quantiles a single round is noisier; the mean of the last ten is within a tenth.
    assert np.mean(path[-10:]) == pytest.approx(target, rel=0.1)
    moves = np.diff([start * target, *path[:10]])
    assert (moves > 0).all() if start < 1 else (moves < 0).all()


def test_one_step_is_the_papers_rule():
    clip = AdaptiveClip(2.0, 50, 0.5, rate=0.2, count_deviation=1e-3)
    assert AdaptiveClip(2.0, 50).pace == 0.2
    for within, updates in ((50, 50), (0, 50), (25, 50), (30, 40)):
        found = clip.step(within, updates, Entropy(KEY)).norm
        fraction = (within - updates / 2) / 50 + 0.5
        assert found == pytest.approx(2.0 * math.exp(-0.2 * (fraction - 0.5)), rel=1e-4)


def test_the_noise_on_the_count_is_as_large_as_is_said():
    clip = AdaptiveClip(1.0, 200, 0.5, rate=1.0, count_deviation=7.0)
    entropy = Entropy(KEY)
    fractions = [0.5 - math.log(clip.step(100, 200, entropy).norm) for _ in range(4000)]
    assert np.std(fractions) * 200 == pytest.approx(7.0, rel=0.05)
    assert np.mean(fractions) == pytest.approx(0.5, abs=0.003)


def test_noise_is_split_so_that_sum_and_count_cost_what_one_mechanism_costs():
    both = 1.3
    rest = sum_noise_multiplier(both, 5.0)
    assert rest > both
    # Sensitivities scaled to one, the precisions of a joint Gaussian mechanism add up.
    assert rest**-2 + (5.0 / 0.5) ** -2 == pytest.approx(both**-2)
    assert AdaptiveClip(1.0, 100).sum_noise_multiplier(both) == rest
    assert FixedClip(1.0).sum_noise_multiplier(both) == both
    with pytest.raises(ValueError, match="above half"):
        sum_noise_multiplier(10.0, 5.0)


def test_the_mean_has_the_clipped_updates_and_the_planned_noise():
    size = 40_000
    updates = np.random.default_rng(1).standard_normal((6, size))
    updates *= np.array([[0.5], [1.0], [3.0], [0.0], [2.0], [50.0]]) / np.linalg.norm(
        updates, axis=1, keepdims=True
    )
    total = CentralSum(size, FixedClip(2.0), 1.5, expected=8.0)
    for update in updates:
        total.add(update)
    assert (total.updates, total.within) == (6, 4)
    mean, following = total.release(Entropy(KEY))
    expected = sum(row * min(1, 2.0 / max(np.linalg.norm(row), 1e-9)) for row in updates) / 8
    off = mean - expected
    planned = 1.5 * 2.0 / 8
    assert off.std() == pytest.approx(planned, rel=0.02)
    assert abs(off.mean()) < 5 * planned / math.sqrt(size)
    assert following == FixedClip(2.0)


def test_adaptive_clipping_puts_more_noise_on_the_sum():
    size = 40_000
    total = CentralSum(size, AdaptiveClip(2.0, 20), 1.5, expected=20.0)
    for _ in range(20):
        total.add(np.zeros(size, dtype=np.float32))
    mean, following = total.release(Entropy(KEY))
    planned = sum_noise_multiplier(1.5, 1.0) * 2.0 / 20
    assert planned > 1.4 * 1.5 * 2.0 / 20
    assert mean.std() == pytest.approx(planned, rel=0.02)
    assert following.norm < 2.0  # all updates were within it


def test_one_site_moves_the_sum_by_no_more_than_the_noise_is_made_for():
    size = 1000
    for update in (np.full(size, 1e3), np.eye(1, size)[0] * 1e9, np.full(size, 0.4999e-9)):
        total = CentralSum(size, FixedClip(1.0), 1.0, expected=1.0)
        total.add(update)
        moved = math.sqrt(sum(int(value) ** 2 for value in total._total))
        assert moved <= total.sigma  # at noise multiplier 1 sigma is the sensitivity
        assert total.sigma * total.grid < 1 + 2e-6


def test_noise_is_made_for_what_rounding_adds_to_many_coordinates():
    many, one = (CentralSum(size, FixedClip(1.0), 2.0, 1.0).sigma for size in (1_000_000, 1))
    assert many - one == pytest.approx(2.0 * (1000 - 1) / 2, rel=1e-6)


def test_an_update_at_the_norm_is_within_it():
    total = CentralSum(2, FixedClip(5.0), 1.0, expected=1.0)
    total.add(np.array([3.0, 4.0]))
    assert total.within == 1
    total.add(np.array([3.0, 4.001]))
    assert total.within == 1


def test_a_sum_is_empty_after_it_was_released():
    total = CentralSum(10, FixedClip(1.0), 1e-3, expected=1.0)
    total.add(np.ones(10))
    entropy = Entropy(KEY)
    first, _ = total.release(entropy)
    again, _ = total.release(entropy)
    assert np.abs(first).max() > 0.3
    assert np.abs(again).max() < 0.01
    assert (total.updates, total.within) == (0, 0)


def test_rounds_cost_what_privacy_loss_distributions_say():
    accountant = pld.PLDAccountant(value_discretization_interval=1e-4)
    accountant.compose(PoissonSampledDpEvent(0.1, GaussianDpEvent(2.0)), 60)
    fine = accountant.get_epsilon(1e-5)
    found = epsilon_of([event(2.0, 0.1, 60)], 1e-5)
    assert fine <= found < 1.01 * fine
    assert ADJACENCY == "add-or-remove-one-site"


@pytest.mark.parametrize(
    ("sites", "epsilon", "deviation"), [(10, 1, 1.03), (10, 8, 0.27), (50, 3, 0.13)]
)
def test_noise_on_the_mean_is_at_most_what_renyi_divergences_ask_for(sites, epsilon, deviation):
    noise = noise_multiplier_for(epsilon, sites**-1.1, event(1.0, 1.0, 50))
    assert 0.6 * deviation < noise / sites <= 1.01 * deviation


def test_sites_are_sampled_independently():
    entropy = Entropy(KEY)
    drawn = [sampled_sites(50, 0.2, entropy) for _ in range(2000)]
    counts = np.array([sites.size for sites in drawn])
    assert counts.mean() == pytest.approx(10, abs=0.3)
    assert counts.var() == pytest.approx(8, rel=0.15)
    each = np.bincount(np.concatenate(drawn), minlength=50)
    assert np.abs(each - 400).max() < 5 * math.sqrt(320)
    assert sampled_sites(5, 1.0, entropy).tolist() == [0, 1, 2, 3, 4]


def test_what_is_no_update_is_refused_and_leaves_the_sum_alone():
    total = CentralSum(20_000, FixedClip(1.0), 1.0, expected=1.0)
    for bad in (math.nan, math.inf):
        update = np.zeros(20_000)
        update[-1] = bad
        with pytest.raises(ValueError, match="finite"):
            total.add(update)
    with pytest.raises(ValueError, match="shape"):
        total.add(np.zeros(3))
    assert total.updates == 0
    assert not total._total.any()


def test_numbers_out_of_range_are_refused():
    for norm in (0.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="clipping norm"):
            FixedClip(norm)
        with pytest.raises(ValueError, match="clipping norm"):
            AdaptiveClip(norm, 10)
    for wrong in ((1.0, 10, 0.0), (1.0, 10, 0.5, -0.1), (1.0, 0), (1.0, 10, 0.5, 0.2, -1.0)):
        with pytest.raises(ValueError):
            AdaptiveClip(*wrong)
    with pytest.raises(ValueError, match="of 3"):
        AdaptiveClip(1.0, 10).step(4, 3, Entropy(KEY))
    for size, noise, expected in ((0, 1.0, 1.0), (1, 1.0, 0.0), (1, 1e9, 1.0)):
        with pytest.raises(ValueError):
            CentralSum(size, FixedClip(1.0), noise, expected)
