"""Conditional rounding: unbiased, and never longer than its limit."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_fed.privacy.distributed.rounding import (
    BETA,
    conditionally_rounded,
    squared_norm,
    squared_norm_limit,
)
from lepton_fed.privacy.dp.entropy import Entropy

KEY = bytes(range(32))


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 3000), norm=st.floats(0.1, 1e4), beta=st.sampled_from([0.0, 0.1, BETA]))
def test_the_norm_is_never_above_its_limit(size, norm, beta):
    values = np.random.default_rng(size).standard_normal(size)
    values *= norm / np.linalg.norm(values)
    limit = squared_norm_limit(norm, size, beta)
    rounded = conditionally_rounded(values, limit, Entropy(KEY))
    assert sum(int(value) ** 2 for value in rounded) <= limit
    assert np.abs(rounded - values).max() < 1


def test_without_the_limit_roundings_are_longer():
    values = np.full(100, 0.5)
    limit = 50
    entropy = Entropy(KEY)
    free = [squared_norm(conditionally_rounded(values, 10**6, entropy)) for _ in range(200)]
    held = [squared_norm(conditionally_rounded(values, limit, entropy)) for _ in range(200)]
    assert max(free) > limit >= max(held)


def test_rounding_is_unbiased():
    values = np.array([0.25, -0.25, 3.9, -7.5, 2.0, 0.0])
    entropy = Entropy(KEY)
    limit = squared_norm_limit(float(np.linalg.norm(values)), 6, 0.0)
    mean = np.mean([conditionally_rounded(values, limit, entropy) for _ in range(20_000)], axis=0)
    np.testing.assert_allclose(mean, values, atol=5 * 0.5 / math.sqrt(20_000))


def test_at_most_beta_of_the_roundings_are_thrown_away():
    values = np.full(400, 0.5)  # the worst case: each coordinate is halfway
    clip = float(np.linalg.norm(values))
    for beta in (0.2, BETA):
        limit = squared_norm_limit(clip, 400, beta)
        norms = [
            squared_norm(conditionally_rounded(values, 10**6, Entropy(bytes([i]) * 32)))
            for i in range(200)
        ]
        assert np.mean([norm > limit for norm in norms]) <= beta


def test_the_limit_is_the_smaller_of_both_bounds():
    assert squared_norm_limit(10.0, 4, 0.0) == 144
    assert squared_norm_limit(1.0, 1, BETA) == math.floor(1 + 0.25 + 1.5)
    assert squared_norm_limit(1000.0, 10_000, BETA) == 1_000_000 + 2_500 + 1_050
    assert squared_norm_limit(1000.0, 1, 1e-300) == 1001**2


@given(st.lists(st.integers(-(2**40) + 1, 2**40 - 1), min_size=1, max_size=50))
def test_squared_norms_are_exact(numbers):
    expected = sum(number**2 for number in numbers)
    assert squared_norm(np.array(numbers, dtype=np.int64)) == expected


def test_squared_norms_of_many_slices_do_not_overflow():
    assert squared_norm(np.full(50_000, 2**40 - 1, dtype=np.int64)) == 50_000 * (2**40 - 1) ** 2
    assert squared_norm(np.zeros(0, dtype=np.int64)) == 0


def test_what_cannot_be_rounded_within_the_limit_is_refused():
    with pytest.raises(ValueError, match="within the limit"):
        conditionally_rounded(np.full(4, 10.0), 300, Entropy(KEY))
    for bad in (math.nan, math.inf, 2.0**40):
        with pytest.raises(ValueError, match="not finite"):
            conditionally_rounded(np.array([1.0, bad]), 10, Entropy(KEY))
    with pytest.raises(ValueError, match="beyond"):
        squared_norm(np.array([2**40]))
    for clip, dimension, beta in ((0.0, 1, 0.5), (1.0, 0, 0.5), (1.0, 1, 1.0), (math.inf, 1, 0.5)):
        with pytest.raises(ValueError, match="clip"):
            squared_norm_limit(clip, dimension, beta)
