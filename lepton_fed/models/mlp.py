"""Multi-layer perceptron over the flattened example."""

from __future__ import annotations

import math
from typing import Literal

from torch import nn

__all__ = ["mlp"]

_ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


def mlp(
    shape: tuple[int, ...],
    outputs: int,
    hidden: list[int] | None = None,
    activation: Literal["relu", "tanh", "gelu"] = "relu",
) -> nn.Module:
    """Return a multi-layer perceptron.

    Args:
        shape: Shape of one example after preprocessing.
        outputs: Width of the output: the number of classes, or 1.
        hidden: Widths of the hidden layers; one of 64 when left out.
        activation: relu, tanh (bounded activations suit DP-SGD: Papernot et al., AAAI 2021) or
            gelu.

    Returns:
        A module from ``[batch, *shape]`` to ``[batch, outputs]``, float32.

    Raises:
        ValueError: A width is not positive.
    """
    widths = [64] if hidden is None else hidden
    if any(width < 1 for width in widths):
        raise ValueError(f"hidden widths must be positive, not {widths}")
    layers: list[nn.Module] = [nn.Flatten()]
    size = math.prod(shape)
    for width in widths:
        layers += [nn.Linear(size, width), _ACTIVATIONS[activation]()]
        size = width
    return nn.Sequential(*layers, nn.Linear(size, outputs))
