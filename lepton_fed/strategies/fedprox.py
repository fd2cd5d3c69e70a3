"""FedProx: federated averaging with a pull of each site towards the model it received.

    local loss <- local loss + mu/2 * ||w - w_received||^2

T. Li, A. K. Sahu, M. Zaheer, M. Sanjabi, A. Talwalkar, V. Smith: Federated Optimization in
Heterogeneous Networks. MLSys 2020. arXiv:1812.06127.

Use it when sites differ and take many local steps. With one local step it is federated averaging.

The term depends on no row, so it is written as its gradient, mu * (w - w_received): a step costs
one multiply-add instead of a second graph, and under DP-SGD it needs neither clipping nor noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, cast

from lepton_fed.core.layout import Vector
from lepton_fed.core.settings import Setting
from lepton_fed.strategies.base import PlainSite, SiteState, Strategy, Tensors
from lepton_fed.strategies.fedavg import AddMean, ServerLearningRate

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ProximalSite", "fedprox"]

Mu = Annotated[float, Setting("Strength of the pull towards the received model.", at_least=0)]


@dataclass(frozen=True)
class ProximalSite(PlainSite):
    """Local training with the proximal term.

    Args:
        mu: Strength of the pull; 0 is federated averaging.
    """

    mu: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.mu < float("inf"):
            raise ValueError(f"mu must be finite and not negative, not {self.mu}")

    def begin(self, start: Tensors, received: Mapping[str, Vector], state: SiteState) -> object:
        """Remember the model as received."""
        del received, state
        return start

    def gradient(self, memory: object, name: str, parameter: Tensor, gradient: Tensor) -> Tensor:
        """Add mu * (parameter - start)."""
        start = cast(Tensors, memory)[name]
        return gradient.add_(parameter.detach() - start, alpha=self.mu)


def fedprox(mu: Mu = 0.01, server_learning_rate: ServerLearningRate = 1.0) -> Strategy:
    """Return FedProx.

    Args:
        mu: Strength of the pull towards the received model; 0 is federated averaging.
        server_learning_rate: Factor on the mean update.

    Raises:
        ValueError: ``mu`` is negative, the factor is not positive, or one is not finite.
    """
    return Strategy("fedprox", ProximalSite(mu=mu), AddMean(server_learning_rate))
