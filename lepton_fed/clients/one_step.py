"""The update of a round of one plain step: the step itself, not what the weights show of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from lepton_fed.core.layout import Layout, Vector

__all__ = ["OneStep"]


@dataclass(frozen=True)
class OneStep:
    """Keeps the sum of a step, for a site whose noise is added to its update, and adds none.

    A difference of weights is rounded to their last digit. The coordinator chooses the weights: of
    large ones that digit is larger than all that a record may move, and whether a coordinate is
    rounded up or down can depend on one record. What noise is to cover must not pass through them;
    nor through float32, of which the last digit of a large sum is more than a part of a record.

    Args:
        names: The trained parameters, in the model's order.
        sums: What the step summed up, in that order.
    """

    names: tuple[str, ...]
    sums: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module) -> OneStep:
        """Return what keeps the step of a model."""
        return cls(tuple(n for n, p in model.named_parameters() if p.requires_grad))

    def add(self, sums: Sequence[Tensor]) -> None:
        """Keep the sums of clipped gradients, and leave them without noise: it comes later."""
        self.sums[:] = [total.clone() for total in sums]

    def delta(self, layout: Layout, learning_rate: float, divisor: int) -> npt.NDArray[np.float64]:
        """Return what plain SGD adds to the weights, ``[layout.size]`` float64.

        Args:
            layout: Layout of the model.
            learning_rate: Of the step.
            divisor: What the sum is divided by.
        """
        vector = np.zeros(layout.size)
        views = layout.views(cast("Vector", vector))
        for name, total in zip(self.names, self.sums, strict=True):
            if name in views:
                views[name][...] = total.cpu().numpy()
        vector *= -learning_rate / divisor
        return vector
