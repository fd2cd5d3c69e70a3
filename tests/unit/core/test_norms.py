"""Clipping to a norm brings no two vectors further apart: a record moves no more than before it."""

from __future__ import annotations

import numpy as np
import pytest

from lepton_fed.core.norms import clipped, euclidean_norm

BOUND = 1e4


@pytest.mark.parametrize("beyond", [2e-7, 1e-6, 3e-6])
@pytest.mark.parametrize("within", [1e-9, 5e-7, 2e-6])
def test_there_is_no_step_at_the_bound(within: float, beyond: float) -> None:
    direction = np.random.default_rng(0).normal(size=1000)
    direction *= BOUND / np.linalg.norm(direction)
    one, other = ((direction * (1 + r)).astype(np.float32) for r in (-within, beyond))
    (near, _), (far, norm) = clipped(one, BOUND), clipped(other, BOUND)
    assert norm == euclidean_norm(other) > BOUND >= euclidean_norm(far)
    apart = np.linalg.norm(far.astype(np.float64) - near)
    rounding = 2 * 2.0**-24 * BOUND
    assert apart <= np.linalg.norm(other.astype(np.float64) - one) + rounding


@pytest.mark.parametrize("bound", [2.0**-60, 1e-7, 1e-6, 1e-3])
@pytest.mark.parametrize("size", [1e20, 3e37, 3e38])
def test_what_is_too_long_by_more_than_float32_can_say_is_clipped_too(
    bound: float, size: float
) -> None:
    """By a factor that is no normal float32 number: rounded to one, it would be another factor."""
    short, norm = clipped(np.full(100, size / 10, np.float32), bound)
    assert norm == pytest.approx(size)
    assert short.dtype == np.float32
    assert bound * (1 - 2e-6) <= euclidean_norm(short) <= bound
