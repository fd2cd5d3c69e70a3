"""What a strategy is: a rule for the site and a rule for the server, in one file.

Both are pure. The site rule is hooks into local training: each is a function of tensors, so that
the same rule runs in a loop at a real site and stacked over hundreds of simulated ones. The server
rule turns what the sites sent into the next model, and says whether the sum is enough for it
(``needs = "sum"``: works with secure aggregation) or whether it must see single updates (``needs =
"each"``).

Strategies are composed of these two parts and found by name through the entry point group
``lepton_fed.strategies``; docs/explanation/strategies.md shows how the well-known ones fit.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import numpy.typing as npt

from lepton_fed.core.layout import Vector

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "DELTA",
    "Each",
    "Means",
    "Needs",
    "PlainSite",
    "ServerRule",
    "ServerState",
    "SiteRule",
    "SiteState",
    "Stateless",
    "Strategy",
    "Sum",
]

DELTA = "delta"
"""Name of the vector every update carries: new minus received model."""

Needs = Literal["sum", "each"]
Tensors = Mapping[str, "Tensor"]
SiteState = Mapping[str, Vector]
ServerState = Mapping[str, npt.NDArray[np.generic]]


class Means(Mapping[str, npt.NDArray[np.float64]]):
    """Weighted means that are made where they are read: whole by name, or a slice at a time."""

    @abstractmethod
    def read(self, vector: str, part: slice) -> npt.NDArray[np.float64]:
        """Return a slice of the mean of one vector, float64."""


@dataclass(frozen=True)
class Sum:
    """What a round amounts to when only the sum is known.

    Args:
        round_number: Round, from 1.
        mean: Weighted mean of each named vector, ``[size]`` float64; of securely aggregated updates
            it is made anew whenever it is asked for, and :meth:`read` needs less memory.
        contributors: Names of the sites in it, sorted.
        weight: Their total weight, as quantised; times the mean it is the sum.
        sites: Number of sites of the run, selected or not.
    """

    round_number: int
    mean: Mapping[str, npt.NDArray[np.float64]]
    contributors: tuple[str, ...]
    weight: float
    sites: int

    def read(self, vector: str, part: slice) -> npt.NDArray[np.float64]:
        """Return a slice of the mean of one vector, float64."""
        if isinstance(self.mean, Means):
            return self.mean.read(vector, part)
        return self.mean[vector][part]


class Each(Protocol):
    """A round whose single updates can be read, by slices, from where they were spilled."""

    @property
    def round_number(self) -> int:
        """Return the round, from 1."""

    @property
    def contributors(self) -> tuple[str, ...]:
        """Return the names of the sites, sorted."""

    def weight(self, site: str) -> float:
        """Return a site's weight."""

    def read(self, site: str, vector: str, part: slice) -> Vector:
        """Return a slice of one site's vector, float32."""


class SiteRule(Protocol):
    """Hooks of local training. ``memory`` is whatever :meth:`begin` returned for this round."""

    @property
    def vectors(self) -> Sequence[str]:
        """Return the names of the vectors an update carries, :data:`DELTA` first."""

    def begin(self, start: Tensors, received: Mapping[str, Vector], state: SiteState) -> object:
        """Start a round.

        Args:
            start: The shared tensors as received, by name; not to be changed.
            received: What the server rule sends beside the model.
            state: What this site kept from its last round; empty at first.
        """

    def loss(self, memory: object, parameters: Tensors) -> Tensor | None:
        """Return a scalar that is added to the mean loss of a step, or None.

        It must not depend on rows: under record-level DP it is added after clipping and noise.
        """

    def gradient(self, memory: object, name: str, parameter: Tensor, gradient: Tensor) -> Tensor:
        """Return the gradient a step uses for one tensor (after clipping and noise).

        Args:
            memory: From :meth:`begin`.
            name: Name of the tensor.
            parameter: Its present value.
            gradient: Its gradient, same shape; may be changed in place and returned.
        """

    def update(
        self, memory: object, delta: Vector, steps: int, learning_rate: float
    ) -> tuple[Mapping[str, Vector], SiteState]:
        """Return the vectors to send and the state to keep.

        Args:
            memory: From :meth:`begin`.
            delta: New minus received model, ``[size]`` float32.
            steps: Optimiser steps taken.
            learning_rate: Learning rate of the last step.
        """


class ServerRule(Protocol):
    """From what the sites sent to the next model."""

    @property
    def needs(self) -> Needs:
        """Return ``sum`` or ``each``."""

    def init(self, model: Vector) -> ServerState:
        """Return the state before the first round: named arrays, so that a checkpoint holds it."""

    def sends(self, state: ServerState) -> Mapping[str, Vector]:
        """Return the vectors that go to the sites beside the model."""

    def step(
        self, state: ServerState, model: Vector, aggregate: Sum | Each
    ) -> tuple[ServerState, Vector]:
        """Return the next state and model.

        Args:
            state: Present state.
            model: Present model, ``[size]`` float32; not to be changed.
            aggregate: A :class:`Sum` or an :class:`Each`, as :attr:`needs` says.
        """


@dataclass(frozen=True)
class Strategy:
    """A strategy: both halves, and the name they go by.

    Args:
        name: Name for logs and records.
        site: What sites do.
        server: What the coordinator does.
        linear: Whether the server rule takes a :class:`Sum` too, and makes the same of it, although
            it asks for single updates where it can have them.
    """

    name: str
    site: SiteRule
    server: ServerRule
    linear: bool = False

    @property
    def sum_is_enough(self) -> bool:
        """Return whether the strategy goes with secure aggregation of all sites together."""
        return self.server.needs == "sum" or self.linear


@dataclass(frozen=True)
class Stateless:
    """The part of a server rule that keeps nothing between rounds and sends only the model."""

    def init(self, model: Vector) -> ServerState:
        """Return no state."""
        del model
        return {}

    def sends(self, state: ServerState) -> Mapping[str, Vector]:
        """Send nothing beside the model."""
        del state
        return {}


@dataclass(frozen=True)
class PlainSite:
    """The site half that changes nothing: local training as the task says, send the difference."""

    vectors: Sequence[str] = (DELTA,)

    def begin(self, start: Tensors, received: Mapping[str, Vector], state: SiteState) -> object:
        """Remember nothing."""
        del start, received, state
        return None

    def loss(self, memory: object, parameters: Tensors) -> Tensor | None:
        """Add nothing to the loss."""
        del memory, parameters
        return None

    def gradient(self, memory: object, name: str, parameter: Tensor, gradient: Tensor) -> Tensor:
        """Leave the gradient as it is."""
        del memory, name, parameter
        return gradient

    def update(
        self, memory: object, delta: Vector, steps: int, learning_rate: float
    ) -> tuple[Mapping[str, Vector], SiteState]:
        """Send the difference, keep nothing."""
        del memory, steps, learning_rate
        return {DELTA: delta}, {}
