"""The ring's mean against the plain weighted mean in double precision, at the size of a model."""

from __future__ import annotations

import numpy as np
import pytest

from lepton_fed.core.ring import RingEncoding, RingSum


@pytest.mark.parametrize("scale", [1e-6, 1e-2, 1.0, 300.0])
@pytest.mark.parametrize("weight_bound", [1.0, 5000.0])
@pytest.mark.parametrize("bits", [48, 64])
def test_the_mean_is_the_weighted_mean_in_double_precision(
    scale: float, weight_bound: float, bits: int
) -> None:
    rng = np.random.default_rng(7)
    size, sites = 70_001, 9
    updates = [(rng.normal(size=size) * scale).astype(np.float32) for _ in range(sites)]
    weights = rng.uniform(0.02, 1.0, size=sites) * weight_bound
    encoding = RingEncoding.plan(
        cohort=sites, coordinate_bound=1e4, weight_bound=weight_bound, bits=bits
    )
    total = RingSum(encoding, size)
    for update, weight in zip(updates, weights, strict=True):
        total.add(update, float(weight))

    expected = np.average(np.asarray(updates, dtype=np.float64), axis=0, weights=weights)

    bound = encoding.error_bound(sites, float(weights.sum() / weight_bound))
    largest = float(np.abs(updates).max())
    # Beside the ring's own bound: weights are rounded to 2**-40 of theirs, and the oracle rounds.
    allowed = bound + largest * (sites * 2.0**-40 / (weights.sum() / weight_bound) + 2.0**-48)
    assert np.abs(total.mean() - expected).max() <= allowed
    assert total.saturated == 0


def test_the_mean_of_a_default_task_keeps_more_digits_than_the_model_has() -> None:
    """Bound 1e4, ten sites: the ring's grid is finer than float32 sees beside a weight of 0.01."""
    encoding = RingEncoding.plan(cohort=10, coordinate_bound=1e4, weight_bound=1.0)
    assert encoding.error_bound(10, 10.0) < 0.01 * 2.0**-24
