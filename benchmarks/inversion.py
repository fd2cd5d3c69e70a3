"""Gradient inversion on what a coordinator receives: images out of an update.

Two attacks. Of one record, the gradient of a linear layer's weights is that of its bias times the
layer's input, so a division gives the input exactly (L. T. Phong et al., IEEE TIFS 13(5), 2018,
section III). Of several, made-up images are moved until their gradient points where the update
does (J. Geiping et al.: Inverting Gradients. NeurIPS 2020. arXiv:2003.14053): cosine distance and
total variation, Adam on signed gradients, labels known to the attacker.

The measure is the peak signal-to-noise ratio. Who has no update at all can guess the mean image of
the class: an attack that does no better has found nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks.received import Images, Recipe, kit_of, update
from lepton_fed.core.layout import Vector
from lepton_fed.models.build import write_vector

__all__ = ["Inversion", "attack", "class_means"]

_HIDDEN = 64
_STEPS = 300
_RATE = 0.1
_VARIATION = 1e-3
_MOST_PERMUTED = 6
_EXACT = 120.0  # decibels: what float32 gives


@dataclass(frozen=True)
class Inversion:
    """How well images were rebuilt, medians over trials, in decibels.

    Args:
        analytic: By division.
        optimised: By Geiping et al.
        guess: By guessing the class mean.
    """

    analytic: float
    optimised: float
    guess: float


def attack(
    pool: Images,
    batch: int,
    trials: int,
    *,
    recipe: Recipe,
    received: Callable[[Vector], Vector] = lambda vector: vector,
    seed: int = 1,
) -> Inversion:
    """Attack the updates of sites that took one step on a few images.

    Args:
        pool: Images; those that are not attacked make the class means.
        batch: Images of a site.
        trials: Sites that are attacked.
        recipe: How the site trains; one step.
        received: From a site's update to what the coordinator can read of it.
        seed: Of who is attacked.
    """
    draws = np.random.default_rng(seed)
    kit = kit_of("mlp", hidden=[_HIDDEN], activation="tanh")
    means = class_means(pool)
    analytic, optimised, guess = [], [], []
    for number in range(trials):
        rows = pool.take(draws.choice(len(pool.targets), batch, replace=False))
        left = received(update(kit, rows, recipe, number))
        gradient = -left / recipe.learning_rate
        views = kit.layout.views(gradient)
        weights = [name for name in views if name.endswith("weight")]
        first, bias = views[weights[0]], views[weights[0].replace("weight", "bias")]
        unit = int(np.abs(bias).argmax())
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            divided = np.nan_to_num(first[unit] / bias[unit]).clip(0, 1)
        analytic.append(max(_decibels(divided, one) for one in rows.inputs))
        write_vector(kit.model, kit.layout, kit.initial)
        rebuilt = _optimised(kit.model, gradient, rows.targets, kit.shape, number)
        optimised.append(_best(rebuilt, rows.inputs))
        pairs = zip(rows.targets, rows.inputs, strict=True)
        guess.append(float(np.mean([_decibels(means[label], one) for label, one in pairs])))
    return Inversion(
        float(np.median(analytic)), float(np.median(optimised)), float(np.median(guess))
    )  # fmt: skip


def class_means(pool: Images) -> np.ndarray:
    """Return the mean image of each class, ``[classes, 64]``."""
    return np.stack([pool.inputs[pool.targets == c].mean(axis=0) for c in range(10)])


def _optimised(
    model: nn.Module, gradient: Vector, labels: np.ndarray, shape: tuple[int, ...], seed: int
) -> np.ndarray:
    """Return images whose gradient points where the update does, ``[batch, 64]``."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(len(labels), *shape, generator=generator, requires_grad=True)
    wanted = torch.from_numpy(np.nan_to_num(gradient))
    targets = torch.from_numpy(labels)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam([images], lr=_RATE)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, _STEPS)
    for _ in range(_STEPS):
        loss = functional.cross_entropy(model(images), targets)
        made = torch.cat(
            [g.flatten() for g in torch.autograd.grad(loss, parameters, create_graph=True)]
        )
        square = images.view(-1, 8, 8)
        variation = square.diff(dim=1).abs().mean() + square.diff(dim=2).abs().mean()
        distance = 1.0 - functional.cosine_similarity(made, wanted, dim=0)
        (slope,) = torch.autograd.grad(distance + _VARIATION * variation, [images])
        images.grad = slope.sign()
        optimiser.step()
        fall.step()
        with torch.no_grad():
            images.clamp_(0, 1)
    return images.detach().numpy().reshape(len(labels), -1)


def _best(rebuilt: np.ndarray, true: np.ndarray) -> float:
    """Return the mean quality under the best assignment of rebuilt images to true ones."""
    table = np.array([[_decibels(a, b) for b in true] for a in rebuilt])
    count = len(true)
    orders = permutations(range(count)) if count <= _MOST_PERMUTED else [tuple(range(count))]
    return float(max(np.mean([table[i, j] for i, j in enumerate(order)]) for order in orders))


def _decibels(found: np.ndarray, true: np.ndarray) -> float:
    error = float(np.mean((np.asarray(found, np.float64) - true) ** 2))
    return min(_EXACT, -10.0 * math.log10(max(error, 1e-30)))
