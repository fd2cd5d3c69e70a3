"""Gradient inversion: a record out of what was received.

Two attacks. Of one record, the gradient of a linear layer's weights is that of its bias times the
layer's input, so a division gives the input exactly (L. T. Phong et al.: Privacy-Preserving Deep
Learning via Additively Homomorphic Encryption. IEEE TIFS 13(5), 2018, section III). In general,
made-up records are moved until their gradient points where the update does (J. Geiping et al.:
Inverting Gradients. NeurIPS 2020. arXiv:2003.14053): cosine distance and, of images, total
variation, Adam on signed gradients, labels known to the attacker.

Who has no update at all can guess the mean of the class: an attack that does no better has found
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lepton_fed.core.layout import Vector
from lepton_fed.models.build import write_local, write_vector
from lepton_fed.training.kit import TaskKit
from lepton_fed.training.local import LocalRows, record_losses

__all__ = ["class_means", "divided", "error_of", "matched"]

_STEPS = 300
_RATE = 0.1
_VARIATION = 1e-3
_MOST_PERMUTED = 6

Records = npt.NDArray[np.float64]


def class_means(kit: TaskKit, rows: LocalRows) -> Records:
    """Return the mean of the records of each class, ``[task.outputs, *shape]``.

    Of a class that nobody has, and where a number is predicted, it is the mean of all.

    Args:
        kit: The task's kit.
        rows: Prepared rows that are not attacked.
    """
    inputs, targets = rows.inputs.double().numpy(), rows.targets.numpy()
    everywhere = inputs.mean(axis=0)
    means = np.stack([everywhere] * kit.task.outputs)
    if kit.task.data.target.kind == "classes":
        for code in np.unique(targets):
            means[code] = inputs[targets == code].mean(axis=0)
    return means


def divided(kit: TaskKit, update: Vector, bounds: tuple[float, float]) -> Records | None:
    """Return the record that a division of gradients gives; None without a first linear layer.

    Args:
        kit: The task's kit.
        update: What was received, ``[layout.size]``.
        bounds: Smallest and largest number of an input.

    Returns:
        ``[*shape]``.
    """
    views = kit.layout.views(update)
    name = _first_linear(kit)
    if f"{name}.weight" not in views or f"{name}.bias" not in views:
        return None
    weight, bias = views[f"{name}.weight"], views[f"{name}.bias"]
    unit = int(np.abs(bias).argmax())
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        found = np.nan_to_num(weight[unit].astype(np.float64) / bias[unit])
    return np.asarray(found.clip(*bounds).reshape(kit.shape))


def matched(
    kit: TaskKit,
    update: Vector,
    targets: torch.Tensor,
    bounds: tuple[float, float],
    draws: np.random.Generator,
) -> Records:
    """Return records whose gradient points where the update does (Geiping et al.).

    Args:
        kit: The task's kit; the model is the one the site began with.
        update: What was received, ``[layout.size]``: the gradient's opposite, at any scale.
        targets: Of the records, ``[records]``.
        bounds: Smallest and largest number of an input.
        draws: Where the records begin.

    Returns:
        ``[records, *shape]``.

    Raises:
        RuntimeError: The model has no gradient with respect to its inputs.
    """
    model = kit.model.eval()
    write_vector(model, kit.layout, kit.initial)
    write_local(model, kit.initial_local)
    low, high = bounds
    begun = low + (high - low) * draws.random((len(targets), *kit.shape), np.float32)
    inputs = torch.from_numpy(begun.astype(np.float32)).requires_grad_()
    views = kit.layout.views(np.nan_to_num(-update).astype(np.float32))
    parameters = dict(model.named_parameters())
    wanted = torch.cat([torch.from_numpy(view.copy()).flatten() for view in views.values()])
    losses = record_losses(kit.task)
    optimiser = torch.optim.Adam([inputs], lr=_RATE * (high - low))
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, _STEPS)
    for _ in range(_STEPS):
        loss = losses(model(inputs), targets).mean()
        made = torch.autograd.grad(loss, [parameters[name] for name in views], create_graph=True)
        flat = torch.cat([gradient.flatten() for gradient in made])
        distance = 1.0 - nn.functional.cosine_similarity(flat, wanted, dim=0)
        (slope,) = torch.autograd.grad(distance + _VARIATION * _variation(kit, inputs), [inputs])
        inputs.grad = slope.sign()
        optimiser.step()
        fall.step()
        with torch.no_grad():
            inputs.clamp_(low, high)
    return np.asarray(inputs.detach().double().numpy())


def error_of(found: Records, true: Records) -> float:
    """Return the root mean square error of records, mean over them, best assignment.

    Args:
        found: ``[records, ...]``.
        true: ``[records, ...]``, the same shape.
    """
    count = len(true)
    table = [[math.sqrt(float(np.mean((a - b) ** 2))) for b in true] for a in found]
    orders: Sequence[Sequence[int]] = [range(count)]
    if count <= _MOST_PERMUTED:
        orders = list(permutations(range(count)))
    return min(sum(table[i][j] for i, j in enumerate(order)) / count for order in orders)


def _first_linear(kit: TaskKit) -> str:
    """Return the name of the layer that every number of a record goes into; empty without one."""
    for name, module in kit.model.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            whole = isinstance(module, nn.Linear) and module.in_features == math.prod(kit.shape)
            return name if whole else ""
    return ""


def _variation(kit: TaskKit, inputs: torch.Tensor) -> torch.Tensor | float:
    """Return how much neighbouring pixels differ; 0 of what is no image."""
    if kit.task.data.kind != "image" or inputs.dim() != 4:
        return 0.0
    return inputs.diff(dim=2).abs().mean() + inputs.diff(dim=3).abs().mean()
