"""Federated averaging.

    model <- model + server_learning_rate * sum_k (w_k / sum w) * delta_k

H. B. McMahan, E. Moore, D. Ramage, S. Hampson, B. Aguera y Arcas: Communication-Efficient Learning
of Deep Networks from Decentralized Data. AISTATS 2017. arXiv:1602.05629.

Use it first. It drifts when sites are very different and take many local steps: then try FedProx or
fewer local steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np

from lepton_fed.core.layout import Vector
from lepton_fed.core.settings import Setting
from lepton_fed.strategies.base import (
    DELTA,
    Each,
    Needs,
    PlainSite,
    ServerState,
    Stateless,
    Strategy,
    Sum,
)

__all__ = ["AddMean", "ServerLearningRate", "fedavg"]

_SLICE = 1 << 14

ServerLearningRate = Annotated[
    float, Setting("Factor on the mean update; 1 averages the sites' models.", above=0)
]


@dataclass(frozen=True)
class AddMean(Stateless):
    """Add the weighted mean of the sites' differences to the model.

    Args:
        learning_rate: Factor on the mean; 1 averages the sites' models.
    """

    learning_rate: float = 1.0
    needs: Needs = "sum"

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"server learning rate must be positive, not {self.learning_rate}")

    def step(
        self, state: ServerState, model: Vector, aggregate: Sum | Each
    ) -> tuple[ServerState, Vector]:
        """Return the model moved by the mean; arithmetic in double precision, rounded once."""
        if not isinstance(aggregate, Sum):
            raise TypeError("federated averaging works on a sum")
        moved = np.empty_like(model)
        with np.errstate(over="ignore"):  # the round loop drops a model that is not finite
            for start in range(0, model.size, _SLICE):  # of a large model, no wide copy is made
                part = slice(start, start + _SLICE)
                mean = aggregate.read(DELTA, part)
                moved[part] = model[part].astype(np.float64) + self.learning_rate * mean
        return state, moved


def fedavg(server_learning_rate: ServerLearningRate = 1.0) -> Strategy:
    """Return federated averaging.

    Args:
        server_learning_rate: Factor on the mean update; 1 averages the sites' models.

    Raises:
        ValueError: The factor is not positive and finite.
    """
    return Strategy("fedavg", PlainSite(), AddMean(server_learning_rate))
