"""Logistic and linear regression: one affine map of the flattened example."""

from __future__ import annotations

import math

from torch import nn

__all__ = ["linear"]


def linear(shape: tuple[int, ...], outputs: int) -> nn.Module:
    """Return logistic regression (classes) or linear regression (a number).

    Args:
        shape: Shape of one example after preprocessing.
        outputs: Width of the output: the number of classes, or 1.

    Returns:
        A module from ``[batch, *shape]`` to ``[batch, outputs]``, float32.
    """
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), outputs))
