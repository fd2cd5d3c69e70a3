"""The update of a round of one plain step: the step itself, not what the weights show of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from lepton_fed.core.layout import Layout, Vector
from lepton_fed.strategies.base import PlainSite

__all__ = ["OneStep"]


@dataclass(frozen=True)
class OneStep(PlainSite):
    """Keeps the gradient of a step, for a site whose noise is added to its update.

    A difference of weights is rounded to their last digit. The coordinator chooses the weights: of
    large ones that digit is larger than all that a record may move, and whether a coordinate is
    rounded up or down can depend on one record. What noise is to cover must not pass through them.

    Args:
        gradients: What the step was given, by name of the tensor.
    """

    gradients: dict[str, Tensor] = field(default_factory=dict)

    def gradient(self, memory: object, name: str, parameter: Tensor, gradient: Tensor) -> Tensor:
        """Keep the gradient and leave it as it is."""
        del memory, parameter
        self.gradients[name] = gradient.detach()
        return gradient

    def delta(self, layout: Layout, learning_rate: float) -> Vector:
        """Return what plain SGD adds to the weights, ``[layout.size]`` float32.

        Args:
            layout: Layout of the model.
            learning_rate: Of the step.
        """
        vector = layout.gather({n: g.cpu().numpy() for n, g in self.gradients.items()})
        vector *= -learning_rate
        return vector
