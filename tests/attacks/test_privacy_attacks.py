"""Membership inference and gradient inversion: they work without a protection, and not with it."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import inversion, membership
from benchmarks.attacks import Summed, most_true_positives
from benchmarks.received import Recipe, as_masked, images, kit_of, update

pytestmark = pytest.mark.slow

STEPS, RATE = 30, 2.0


def told(recipe: Recipe, *, targets: int = 80, masked: bool = False) -> membership.Membership:
    return membership.attack(
        images(400, wrong=0.2),
        recipe,
        targets=targets,
        shadows=64,
        received=as_masked if masked else (lambda vector: vector),
    )


def test_the_shadow_models_are_trained_as_the_project_trains() -> None:
    rows = images(120, wrong=0.2)
    inside = np.random.default_rng(3).random((2, 120)) < 0.5
    recipe = Recipe(5, RATE, 1.0, noiseless=True)
    shadows = membership.shadow_models(rows, inside, recipe, 1).numpy()
    kit = kit_of("linear")
    for weights, included in zip(shadows, inside, strict=True):
        vector = kit.initial + update(kit, rows.take(np.flatnonzero(included)), recipe)
        np.testing.assert_allclose(weights[:, :-1].ravel(), vector[:-10], atol=1e-6)
        np.testing.assert_allclose(weights[:, -1], vector[-10:], atol=1e-6)


def test_members_are_told_from_an_update_without_protection() -> None:
    found = told(Recipe(STEPS, RATE), targets=20)
    assert found.low > 0.05
    assert found.auc > 0.7


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 2.0])
def test_dp_keeps_members_as_hidden_as_epsilon_says(epsilon: float) -> None:
    assert told(Recipe(STEPS, RATE, epsilon)).high <= most_true_positives(epsilon)


def test_clipping_without_the_noise_that_is_claimed_breaks_the_bound() -> None:
    found = told(Recipe(STEPS, RATE, 1.0, noiseless=True), targets=20)
    assert found.low > most_true_positives(1.0)


def test_a_masked_vector_tells_nothing_of_members() -> None:
    found = told(Recipe(STEPS, RATE), masked=True)
    assert found.low <= 0.01 <= found.high
    assert abs(found.auc - 0.5) < 0.02


def rebuilt(recipe: Recipe, received: object = None) -> inversion.Inversion:
    given = received if callable(received) else (lambda vector: vector)
    return inversion.attack(images(1797), 1, 5, recipe=recipe, received=given)


PLAIN = Recipe(1, 0.1)


@pytest.mark.parametrize("recipe", [PLAIN, Recipe(1, 0.1, 8.0, noiseless=True)])
def test_an_image_is_rebuilt_from_an_update_without_protection(recipe: Recipe) -> None:
    found = rebuilt(recipe)
    assert found.analytic > 60
    assert found.optimised > found.guess + 10


def test_a_noised_update_gives_no_better_image_than_the_class_mean() -> None:
    found = rebuilt(Recipe(1, 0.1, 8.0))
    assert max(found.analytic, found.optimised) <= found.guess


def test_a_masked_update_gives_no_better_image_than_the_class_mean() -> None:
    found = rebuilt(PLAIN, as_masked)
    assert max(found.analytic, found.optimised) <= found.guess


def test_the_sum_of_ten_sites_gives_no_better_image_than_the_class_mean() -> None:
    pool, kit = images(1797), kit_of("mlp", hidden=[64], activation="tanh")
    others = np.stack([update(kit, pool.take(np.array([row])), PLAIN) for row in range(30)])
    found = rebuilt(PLAIN, Summed(others))
    assert max(found.analytic, found.optimised) <= found.guess
