"""Membership inference and gradient inversion: they work without a protection, and not with it."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import attacks
from benchmarks.received import DELTA, Recipe, as_masked, images, kit_of, update
from lepton_fed.audit.membership import Membership, most_true_positives

pytestmark = pytest.mark.slow

STEPS, RATE = 30, 2.0


def told(recipe: Recipe, *, models: int = 64, masked: bool = False) -> Membership:
    return attacks.told(
        images(400, wrong=0.2),
        recipe,
        models=models,
        received=as_masked if masked else (lambda vector: vector),
    )


def test_members_are_told_from_an_update_without_protection() -> None:
    found = told(Recipe(STEPS, RATE))
    assert found.low > 0.05
    assert found.auc > 0.7


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 2.0])
def test_dp_keeps_members_as_hidden_as_epsilon_says(epsilon: float) -> None:
    assert told(Recipe(STEPS, RATE, epsilon)).high <= most_true_positives(epsilon, DELTA)


def test_clipping_without_the_noise_that_is_claimed_breaks_the_bound() -> None:
    found = told(Recipe(STEPS, RATE, 1.0, noiseless=True))
    assert found.low > most_true_positives(1.0, DELTA)


def test_a_masked_vector_tells_nothing_of_members() -> None:
    found = told(Recipe(STEPS, RATE), masked=True)
    assert found.low <= 0.01
    assert abs(found.auc - 0.5) < 0.03


def rebuilt(recipe: Recipe, received: object = None, trials: int = 5) -> attacks.Inversion:
    given = received if callable(received) else (lambda vector: vector)
    return attacks.rebuilt(images(1797), 1, trials, recipe=recipe, received=given)


PLAIN = Recipe(1, 0.1)


@pytest.mark.parametrize("recipe", [PLAIN, Recipe(1, 0.1, 8.0, noiseless=True)])
def test_an_image_is_rebuilt_from_an_update_without_protection(recipe: Recipe) -> None:
    found = rebuilt(recipe)
    assert found.division < 1e-3
    assert found.matching < found.guess / 3


def test_a_noised_update_gives_no_better_image_than_the_class_mean() -> None:
    found = rebuilt(Recipe(1, 0.1, 8.0))
    assert min(found.division, found.matching) >= found.guess


def test_a_masked_update_gives_no_better_image_than_the_class_mean() -> None:
    found = rebuilt(PLAIN, as_masked)
    assert min(found.division, found.matching) >= found.guess


def test_the_sum_of_ten_sites_gives_no_better_image_than_the_class_mean() -> None:
    pool, kit = images(1797), kit_of("mlp", hidden=[64], activation="tanh")
    others = np.stack([update(kit, pool.take(np.array([row])), PLAIN) for row in range(30)])
    found = rebuilt(PLAIN, attacks.Summed(others), trials=16)
    assert min(found.division, found.matching) >= found.guess
