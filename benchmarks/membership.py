"""Membership inference on what a coordinator receives: LiRA.

N. Carlini et al.: Membership Inference Attacks From First Principles. IEEE S&P 2022.
arXiv:2112.03570. Shadow models are trained with and without each candidate; how confident they are
about it gives two Gaussians, and the score of a candidate is the log ratio of their densities at
the confidence of the attacked model. Models are linear, so that all shadow models are one batched
matrix product a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from benchmarks.received import CLASSES, CLIP, Images, Recipe, kit_of, update
from lepton_fed.core.layout import Vector

__all__ = ["Membership", "attack", "shadow_models"]

_FPR = 0.01
_Z = 1.96
_LEAST = 1e-4

Included = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.float64]
Received = Callable[[Vector], Vector]


@dataclass(frozen=True)
class Membership:
    """How well members are told from others.

    Args:
        tpr: True positive rate at a false positive rate of 1 %.
        low: Lower end of its 95 % confidence interval, which has the threshold's chance in it.
        high: Upper end.
        auc: Area under the curve.
        members: Members that were guessed about.
    """

    tpr: float
    low: float
    high: float
    auc: float
    members: int


def attack(
    candidates: Images,
    recipe: Recipe,
    *,
    targets: int,
    shadows: int,
    received: Received = lambda vector: vector,
    shadow_recipe: Recipe | None = None,
    seed: int = 1,
) -> Membership:
    """Attack that many trainings, each with every candidate in it with probability one half.

    Args:
        candidates: Whose membership is guessed.
        recipe: How the attacked sites train.
        targets: How many trainings are attacked.
        shadows: How many shadow models there are.
        received: From a site's update to what the coordinator can read of it.
        shadow_recipe: What the attacker takes the training to be; the truth when None.
        seed: Of who is in which training.
    """
    draws = np.random.default_rng(seed)
    known = draws.random((shadows, len(candidates.targets))) < 0.5
    kit = kit_of("linear")
    start = _weights(kit.initial)
    trained = shadow_models(candidates, known, shadow_recipe or recipe, seed)
    changes = [received(_vector(weights)) for weights in trained - start]
    confident = _confidence(start + torch.stack([_weights(c) for c in changes]), candidates)
    scores, truth = [], []
    for number in range(targets):
        inside = draws.random(len(candidates.targets)) < 0.5
        left = received(update(kit, candidates.take(np.flatnonzero(inside)), recipe, number))
        found = _confidence((start + _weights(left))[None], candidates)[0]
        scores.append(_ratio(found, confident, known))
        truth.append(inside)
    return _told(np.stack(scores), np.stack(truth))


def shadow_models(
    candidates: Images, included: Included, recipe: Recipe, seed: int
) -> torch.Tensor:
    """Train linear models, all at once, as the project's training trains one.

    Args:
        candidates: The rows.
        included: ``[models, rows]``: which are in which.
        recipe: How they are trained.
        seed: Of noise, which nobody has to fear here.

    Returns:
        Weights, the bias in the last column, ``[models, classes, 65]`` float32.
    """
    generator = torch.Generator().manual_seed(seed)
    start = _weights(kit_of("linear").initial)
    inside = torch.from_numpy(included.astype(np.float32))
    inputs = _with_one(candidates)
    hot = functional.one_hot(torch.from_numpy(candidates.targets), CLASSES).float()
    norms = inputs.norm(dim=1)
    weights = start.expand(len(included), -1, -1).clone()
    batch = inside.sum(dim=1)[:, None, None]
    std = recipe.noise_multiplier * CLIP
    for _ in range(recipe.steps):
        residual = torch.softmax(inputs @ weights.transpose(1, 2), dim=2) - hot
        factors = inside
        if recipe.epsilon is not None:
            factors = inside * (CLIP / (residual.norm(dim=2) * norms)).clamp(max=1.0)
        total = (residual * factors[:, :, None]).transpose(1, 2) @ inputs
        noise = torch.randn(total.shape, generator=generator) * std
        weights -= recipe.learning_rate * (total + noise) / batch
    return weights


def _weights(vector: Vector) -> torch.Tensor:
    """Return a linear model's vector as a matrix, the bias in its last column."""
    weight, bias = np.split(vector, [-CLASSES])
    return torch.from_numpy(np.column_stack([weight.reshape(CLASSES, -1), bias]))


def _vector(weights: torch.Tensor) -> Vector:
    return torch.cat([weights[:, :-1].flatten(), weights[:, -1]]).numpy()


def _with_one(candidates: Images) -> torch.Tensor:
    inputs = torch.from_numpy(candidates.inputs)
    return torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1)


def _confidence(weights: torch.Tensor, candidates: Images) -> Numbers:
    """Return log(p / (1 - p)) of each candidate's label under each model, ``[models, rows]``."""
    logits = (_with_one(candidates) @ weights.transpose(1, 2)).double()
    labels = torch.from_numpy(candidates.targets)[None, :, None].expand(len(weights), -1, 1)
    own = logits.gather(2, labels).squeeze(2)
    others = logits.scatter(2, labels, -torch.inf).logsumexp(dim=2)
    return np.asarray((own - others).clamp(-1e6, 1e6).numpy())


def _ratio(found: Numbers, confident: Numbers, known: Included) -> Numbers:
    """Return how much likelier each candidate's confidence is with it in, ``[rows]``."""
    densities = []
    for inside in (known, ~known):
        count = inside.sum(axis=0)
        mean = (confident * inside).sum(axis=0) / count
        spread = np.sqrt((((confident - mean) * inside) ** 2).sum(axis=0) / count) + _LEAST
        densities.append(-0.5 * ((found - mean) / spread) ** 2 - np.log(spread))
    return np.asarray(densities[0] - densities[1])


def _told(scores: Numbers, truth: Included) -> Membership:
    """Return how well scores tell members, over all trainings."""
    members, others = scores[truth], scores[~truth]
    threshold = np.quantile(others, 1.0 - _FPR)
    tpr = float((members > threshold).mean())
    # The threshold is a quantile of a sample: its own chance moves the rate as much again.
    slope = max(1.0, tpr / _FPR)
    error = math.hypot(
        math.sqrt(max(tpr * (1 - tpr), _FPR) / len(members)),
        slope * math.sqrt(_FPR * (1 - _FPR) / len(others)),
    )
    order = np.argsort(np.concatenate([others, members]))
    ranks = np.empty(len(order))
    ranks[order] = np.arange(1, len(order) + 1)
    wins = ranks[len(others) :].sum() - len(members) * (len(members) + 1) / 2
    return Membership(
        tpr, max(0.0, tpr - _Z * error), min(1.0, tpr + _Z * error),
        float(wins / (len(members) * len(others))), len(members),
    )  # fmt: skip
