"""DP-FedAvg with a trusted coordinator: what is released, and that the noise is made for it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lepton_fed.privacy.central.mechanism import CentralSum
from lepton_fed.privacy.dp.accounting import SampledGaussian, noise_multiplier_for
from lepton_fed.privacy.dp.entropy import Entropy

KEY = bytes(range(32))


def test_the_mean_has_the_clipped_updates_and_the_planned_noise():
    size = 40_000
    updates = np.random.default_rng(1).standard_normal((6, size))
    updates *= np.array([[0.5], [1.0], [3.0], [0.0], [2.0], [50.0]]) / np.linalg.norm(
        updates, axis=1, keepdims=True
    )
    total = CentralSum(size, 2.0, 1.5)
    for update in updates:
        total.add(update)
    assert total.updates == 6
    released = total.released_sum(Entropy(KEY))
    expected = sum(row * min(1, 2.0 / max(np.linalg.norm(row), 1e-9)) for row in updates)
    off = released - expected
    planned = 1.5 * 2.0
    assert off.std() == pytest.approx(planned, rel=0.02)
    assert abs(off.mean()) < 5 * planned / math.sqrt(size)


def test_one_site_moves_the_sum_by_no_more_than_the_noise_is_made_for():
    size = 1000
    for update in (np.full(size, 1e3), np.eye(1, size)[0] * 1e9, np.full(size, 0.4999e-9)):
        total = CentralSum(size, 1.0, 1.0)
        total.add(update)
        moved = math.sqrt(sum(int(value) ** 2 for value in total._total))
        assert moved <= total.sigma  # at noise multiplier 1 sigma is the sensitivity
        assert total.sigma * total.grid < 1 + 2e-6


def test_noise_is_made_for_what_rounding_adds_to_many_coordinates():
    many, one = (CentralSum(size, 1.0, 2.0).sigma for size in (1_000_000, 1))
    assert many - one == pytest.approx(2.0 * (1000 - 1) / 2, rel=1e-6)


def test_a_sum_is_empty_after_it_was_released():
    total = CentralSum(10, 1.0, 1e-3)
    total.add(np.ones(10))
    entropy = Entropy(KEY)
    first, again = total.released_sum(entropy), total.released_sum(entropy)
    assert np.abs(first).max() > 0.3
    assert np.abs(again).max() < 0.01
    assert total.updates == 0


@pytest.mark.parametrize(
    ("sites", "epsilon", "deviation"), [(10, 1, 1.03), (10, 8, 0.27), (50, 3, 0.13)]
)
def test_noise_on_the_mean_is_at_most_what_renyi_divergences_ask_for(sites, epsilon, deviation):
    noise = noise_multiplier_for(epsilon, sites**-1.1, SampledGaussian(1.0, 1.0, 50))
    assert 0.6 * deviation < noise / sites <= 1.01 * deviation


def test_what_is_no_update_is_refused_and_leaves_the_sum_alone():
    total = CentralSum(20_000, 1.0, 1.0)
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
    for size, clip, noise, step in (
        (0, 1.0, 1.0, 0.0), (1, 0.0, 1.0, 0.0), (1, 2.0**-61, 1.0, 0.0), (1, math.inf, 1.0, 0.0),
        (1, math.nan, 1.0, 0.0), (1, 1.0, 1e9, 0.0), (1, 1.0, math.nan, 0.0), (1, 1.0, 1.0, -1.0),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            CentralSum(size, clip, noise, step)
