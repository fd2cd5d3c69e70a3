"""The noise of a step of DP-SGD: made on the CPU, from the site's own entropy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lepton_fed.privacy.dp.entropy import Entropy
from lepton_fed.privacy.factorisation.noise import CorrelatedNoise

__all__ = ["CorrelatedSteps", "IndependentSteps", "StepNoise", "add_noise"]


class StepNoise(Protocol):
    """Adds the noise of one step after another."""

    def add(self, sums: Sequence[Tensor]) -> None:
        """Add the noise of the next step to the sums of clipped gradients, in place.

        Args:
            sums: One tensor a parameter, float64, of any shape, all steps in the same order.
        """


@dataclass(frozen=True)
class IndependentSteps:
    """Fresh Gaussian noise in each step (DP-SGD).

    Args:
        std: Standard deviation of the noise; 0 for none.
        entropy: Where it comes from.
    """

    std: float
    entropy: Entropy

    def add(self, sums: Sequence[Tensor]) -> None:
        """Add the noise of the next step, in place."""
        for total in sums:
            add_noise(total, self.std, self.entropy)


@dataclass(frozen=True)
class CorrelatedSteps:
    """Noise of which a step takes back some of the steps before (DP-FTRL).

    Args:
        stream: The noise of all parameters together, step by step.
    """

    stream: CorrelatedNoise

    def add(self, sums: Sequence[Tensor]) -> None:
        """Add the noise of the next step, in place.

        Raises:
            ValueError: All planned steps have had theirs, or the gradient has another size.
        """
        if sum(total.numel() for total in sums) != self.stream.size:
            raise ValueError(f"the noise is for {self.stream.size} coordinates")
        noise = torch.from_numpy(self.stream.next()).to(sums[0].device)
        parts = torch.split(noise, [total.numel() for total in sums])
        for total, part in zip(sums, parts, strict=True):
            total.add_(part.view(total.shape))


def add_noise(total: Tensor, std: float, entropy: Entropy) -> None:
    """Add Gaussian noise to a tensor, in place; on the CPU without a copy.

    Args:
        total: float32 or float64, of any shape, on any device.
        std: Standard deviation of the noise.
        entropy: Where the noise comes from.
    """
    if total.device.type == "cpu" and total.is_contiguous():
        entropy.add_normal(total.numpy(), std)
        return
    noise = torch.zeros(total.shape, dtype=torch.float32)
    entropy.add_normal(noise.numpy(), std)
    total.add_(noise.to(total.device))
