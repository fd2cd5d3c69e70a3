"""Attacks on what a coordinator receives of a site: membership inference and gradient inversion.

Run it as `python -m benchmarks.attacks`. What is attacked is made by the project's own training and
masking; the attacks are those of `lepton-fed audit --attacks`, under settings that favour them more
than most runs do. Beside each protection stands the same attack without it, which must succeed: an
attack that never does shows nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.received import (
    CLIP,
    DELTA,
    Images,
    Recipe,
    as_masked,
    images,
    kit_of,
    prepared,
    update,
)
from lepton_fed.audit.inversion import class_means, divided, error_of, matched
from lepton_fed.audit.membership import Membership, confidence, lira, most_true_positives
from lepton_fed.audit.unmixing import Unmixing
from lepton_fed.core.layout import Vector
from lepton_fed.models.build import write_vector

__all__ = ["Inversion", "Summed", "main", "rebuilt", "told"]

EPSILONS = (0.5, 1.0, 2.0)
CANDIDATES, WRONG = 400, 0.2
MODELS = 64
STEPS, RATE = 30, 2.0
OTHERS = 9

Received = Callable[[Vector], Vector]


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


@dataclass(frozen=True)
class Inversion:
    """How well images were rebuilt: root mean square errors, medians over trials.

    Args:
        division: By division.
        matching: By Geiping et al.
        guess: By guessing the class mean.
    """

    division: float
    matching: float
    guess: float


def told(
    candidates: Images,
    recipe: Recipe,
    *,
    models: int = MODELS,
    received: Received = lambda vector: vector,
    seed: int = 1,
) -> Membership:
    """Tell members of trainings, each with every candidate in it with probability one half.

    Args:
        candidates: Whose membership is guessed.
        recipe: How the attacked sites train.
        models: How many trainings there are: each is attacked, the others are shadow models.
        received: From a site's update to what the coordinator can read of it.
        seed: Of who is in which training.
    """
    draws = np.random.default_rng(seed)
    kit, rows = kit_of("linear"), prepared(kit_of("linear"), candidates)
    clip = CLIP if recipe.epsilon is not None else np.inf
    unmixing = Unmixing(
        kit, rows, clip, (recipe.noise_multiplier * CLIP) ** 2 / recipe.steps, draws
    )
    included = draws.random((models, len(rows))) < 0.5
    confidences, shares = [], []
    for number, inside in enumerate(included):
        left = received(update(kit, candidates.take(np.flatnonzero(inside)), recipe, number))
        shares.append(unmixing.shares(left))
        write_vector(kit.model, kit.layout, kit.initial + left)
        with torch.no_grad():
            confidences.append(confidence(kit.model(rows.inputs), rows.targets, kit.task))
    return lira(np.stack([confidences, shares]), included, draws)


def rebuilt(
    pool: Images,
    batch: int,
    trials: int,
    *,
    recipe: Recipe,
    received: Received = lambda vector: vector,
    seed: int = 1,
) -> Inversion:
    """Rebuild images from the updates of sites that took one step on a few of them.

    Args:
        pool: Images; they make the class means too.
        batch: Images of a site.
        trials: Sites that are attacked.
        recipe: How the site trains; one step.
        received: From a site's update to what the coordinator can read of it.
        seed: Of who is attacked.
    """
    draws = np.random.default_rng(seed)
    kit = kit_of("mlp", hidden=[64], activation="tanh")
    means = class_means(kit, prepared(kit, pool))
    errors = []
    for number in range(trials):
        rows = pool.take(draws.choice(len(pool.targets), batch, replace=False))
        left = received(update(kit, rows, recipe, number))
        true = prepared(kit, rows)
        wanted = true.inputs.double().numpy()
        found = matched(kit, left, true.targets, (0.0, 1.0), draws)
        quotient = divided(kit, left, (0.0, 1.0))
        divided_error = np.inf
        if quotient is not None:
            divided_error = min(error_of(quotient[None], one[None]) for one in wanted)
        guesses = [
            error_of(means[[label]], one[None])
            for label, one in zip(rows.targets, wanted, strict=True)
        ]
        errors.append(
            (
                divided_error,
                error_of(found, wanted),
                float(np.mean(guesses)),
            )
        )
    return Inversion(*(float(of) for of in np.median(errors, axis=0)))


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
        found = told(rows, recipe, received=received or (lambda vector: vector))
        bound = "" if epsilon is None else f"{most_true_positives(epsilon, DELTA):.2%}"
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
            found = rebuilt(
                pool, batch, 8, recipe=recipe, received=received or (lambda vector: vector)
            )
            print(
                f"| {name} | {batch} | {found.division:.2g} | {found.matching:.2g} "
                f"| {found.guess:.2g} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
