"""What exactness costs: the ring sum of updates against a float64 running sum of the same.

Run it as `python -m benchmarks.aggregation`.
"""

from __future__ import annotations

import functools

import numpy as np

from benchmarks.timing import in_turn
from lepton_fed.core.ring import RingEncoding, RingSum

SITES = 10
SIZES = (10_000, 1_000_000, 10_000_000)


def ring_mean(updates: list[np.ndarray], weights: list[float]) -> np.ndarray:
    """Return the weighted mean by the ring."""
    plan = RingEncoding.plan(cohort=len(updates), coordinate_bound=1e4, weight_bound=1000.0)
    total = RingSum(plan, updates[0].size)
    for update, weight in zip(updates, weights, strict=True):
        total.add(update, weight)
    return total.mean()


def float_mean(updates: list[np.ndarray], weights: list[float]) -> np.ndarray:
    """Return the weighted mean in double precision."""
    total = np.zeros(updates[0].size)
    for update, weight in zip(updates, weights, strict=True):
        total += update.astype(np.float64) * weight
    return total / sum(weights)


def main() -> None:
    """Print a table: seconds to add ten updates, and the ratio."""
    print(f"{SITES} updates, one thread; ratio ring / float64, median (smallest to largest)")
    print(f"{'parameters':>12} {'ring s':>9} {'float64 s':>10} {'ratio':>22} {'ns/param':>9}")
    for size in SIZES:
        generator = np.random.default_rng(1)
        updates = [generator.standard_normal(size, dtype=np.float32) for _ in range(SITES)]
        weights = [float(w) for w in generator.integers(1, 1000, SITES)]
        ring = functools.partial(ring_mean, updates, weights)
        floats = functools.partial(float_mean, updates, weights)
        difference = float(np.abs(ring() - floats()).max())
        ours, floor, (low, middle, high) = in_turn(ring, floats, repeats=5)
        each = ours / SITES / size * 1e9
        print(
            f"{size:>12,} {ours:>9.4f} {floor:>10.4f} {middle:>8.2f} ({low:.2f} to {high:.2f})"
            f" {each:>9.2f}   largest difference {difference:.1e}"
        )


if __name__ == "__main__":
    main()
