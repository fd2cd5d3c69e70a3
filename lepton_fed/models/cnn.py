"""Convolutional network with group normalisation.

GroupNorm (Wu and He, ECCV 2018) instead of batch normalisation: its statistics are of one example
alone, so it has a per-example gradient (DP-SGD needs one) and no running averages that differ
between sites.
"""

from __future__ import annotations

import math

from torch import nn

__all__ = ["cnn"]


def cnn(
    shape: tuple[int, ...],
    outputs: int,
    channels: list[int] | None = None,
    hidden: int = 0,
    groups: int = 8,
) -> nn.Module:
    """Return blocks of convolution, GroupNorm, ReLU and max-pooling, and a linear head.

    Args:
        shape: ``(channels, height, width)`` of one example after preprocessing.
        outputs: Width of the output: the number of classes, or 1.
        channels: Channels of the blocks; 16 and 32 when left out. Each block halves height and
            width.
        hidden: Width of a hidden layer before the head; 0 for none.
        groups: Groups of a GroupNorm; capped by the channels of its block.

    Returns:
        A module from ``[batch, *shape]`` to ``[batch, outputs]``, float32.

    Raises:
        ValueError: The example is not an image, is too small for the blocks, or a width or number
            of groups does not fit.
    """
    widths = [16, 32] if channels is None else channels
    if len(shape) != 3:
        raise ValueError(
            f"cnn takes images (channels, height, width), not examples of shape {shape}"
        )
    depth, height, width = shape
    if not widths or any(n < 1 for n in widths) or hidden < 0 or groups < 1:
        raise ValueError("channels and groups must be positive, hidden not negative")
    if min(height, width) >> len(widths) < 1:
        raise ValueError(f"{len(widths)} blocks shrink an image of {height}x{width} to nothing")
    layers: list[nn.Module] = []
    for channel in widths:
        if channel % min(groups, channel):
            raise ValueError(f"{channel} channels do not divide into {groups} groups")
        layers += [
            nn.Conv2d(depth, channel, kernel_size=3, padding=1),
            nn.GroupNorm(min(groups, channel), channel),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
        depth = channel
    size = math.prod((depth, height >> len(widths), width >> len(widths)))
    layers.append(nn.Flatten())
    if hidden:
        layers += [nn.Linear(size, hidden), nn.ReLU()]
        size = hidden
    return nn.Sequential(*layers, nn.Linear(size, outputs))
