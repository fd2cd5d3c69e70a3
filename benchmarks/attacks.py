"""Attacks on what a coordinator receives of a site: membership inference and gradient inversion.

Run it as `python -m benchmarks.attacks`. What is attacked is made by the project's own training and
masking. Beside each protection stands the same attack without it, which must succeed: an attack
that never does shows nothing.
"""

from __future__ import annotations

import math
import time

import numpy as np

from benchmarks import inversion, membership
from benchmarks.received import DELTA, Recipe, as_masked, images, kit_of, update
from lepton_fed.core.layout import Vector

__all__ = ["Summed", "main", "most_true_positives"]

EPSILONS = (0.5, 1.0, 2.0)
CANDIDATES, WRONG = 400, 0.2
TARGETS, SHADOWS = 80, 64
STEPS, RATE = 30, 2.0
OTHERS = 9
_FPR = 0.01


def most_true_positives(epsilon: float) -> float:
    """Return the largest true positive rate at 1 % false ones that (epsilon, delta)-DP allows."""
    return math.exp(epsilon) * _FPR + DELTA


class Summed:
    """From a site's update to its mean with those of nine others, of which nobody knows which.

    Args:
        pool: Updates of other sites, ``[sites, size]``.
        seed: Of which nine.
    """

    def __init__(self, pool: np.ndarray, seed: int = 1) -> None:
        self._pool = pool
        self._draws = np.random.default_rng(seed)

    def __call__(self, vector: Vector) -> Vector:
        """Return the mean."""
        others = self._pool[self._draws.choice(len(self._pool), OTHERS, replace=False)]
        return np.asarray((vector + others.sum(axis=0)) / (OTHERS + 1), np.float32)


def main() -> None:
    """Attack, and print what came of it."""
    started = time.process_time()
    _membership()
    _inversion()
    print(f"\n{time.process_time() - started:.0f} CPU seconds")


def _membership() -> None:
    everything = images(1797, WRONG)
    rows = everything.take(np.arange(CANDIDATES))
    plain = Recipe(STEPS, RATE)
    draws = np.random.default_rng(5)
    kit = kit_of("linear")
    rest = np.arange(CANDIDATES, len(everything.targets))
    pool = np.stack(
        [
            update(kit, everything.take(draws.choice(rest, 200, replace=False)), plain)
            for _ in range(30)
        ]
    )
    print("| update | true positives at 1 % false (95 %) | at most | AUC |\n|---|---|---|---|")
    for name, recipe, received, epsilon in (
        ("plain", plain, None, None),
        ("masked", plain, as_masked, None),
        ("mean of 10 sites", plain, Summed(pool), None),
        *((f"DP, epsilon {e:g}", Recipe(STEPS, RATE, e), None, e) for e in EPSILONS),
        ("planted fault: epsilon 1, no noise", Recipe(STEPS, RATE, 1.0, True), None, 1.0),
    ):
        found = membership.attack(
            rows, recipe, targets=TARGETS, shadows=SHADOWS,
            received=received or (lambda vector: vector),
        )  # fmt: skip
        bound = "" if epsilon is None else f"{most_true_positives(epsilon):.2%}"
        interval = f"{found.tpr:.2%} ({found.low:.2%} to {found.high:.2%})"
        print(f"| {name} | {interval} | {bound} | {found.auc:.3f} |", flush=True)


def _inversion() -> None:
    pool = images(1797)
    plain = Recipe(1, 0.1)
    kit = kit_of("mlp", hidden=[64], activation="tanh")
    others = np.stack([update(kit, pool.take(np.array([row])), plain) for row in range(30)])
    print("\n| update | images | division | Geiping et al. | class mean |\n|---|---|---|---|---|")
    for batch in (1, 4):
        for name, recipe, received in (
            ("plain", plain, None),
            ("masked", plain, as_masked),
            ("mean of 10 sites", plain, Summed(others)),
            ("DP, epsilon 8", Recipe(1, 0.1, 8.0), None),
            ("planted fault: epsilon 8, no noise", Recipe(1, 0.1, 8.0, True), None),
        ):
            found = inversion.attack(
                pool, batch, 8, recipe=recipe, received=received or (lambda vector: vector)
            )
            print(
                f"| {name} | {batch} | {found.analytic:.1f} | {found.optimised:.1f} "
                f"| {found.guess:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
