"""The sum of as many shares of noise as are counted on: what holds against everybody else.

The claim of shared noise is about the coordinator together with all but ``honest`` sites: they know
what they sent, take it off the sum, and see what the honest sites sent. So exactly that many sites
are rehearsed. One of them trains, with the canaries among its rows. The others send zeros and their
shares: what their rows would add is known to the worst attacker, who takes that off as well, and
each site rounds by itself, so it changes nothing of the rest.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from lepton_fed.audit.canaries import CANARIES, some_of
from lepton_fed.audit.received import MaskedSum
from lepton_fed.config.agreement import Agreement
from lepton_fed.core.exchange import Ask, Reply
from lepton_fed.core.layout import Vector
from lepton_fed.strategies.base import DELTA
from lepton_fed.training.kit import TaskKit

__all__ = ["HonestSum"]


class HonestSum:
    """Adds what the honest sites send, and keeps what is seen of the canaries in it.

    Args:
        agreement: What the rehearsal's sites agreed to.
        kit: The kit with canaries.
        included: ``[canaries]``: which are among the rows of the site that trains.
        honest: How many sites there are.

    Raises:
        LeptonError: Such a sum cannot be made.
    """

    def __init__(
        self, agreement: Agreement, kit: TaskKit, included: npt.NDArray[np.bool_], honest: int
    ) -> None:
        self._sums = MaskedSum(agreement, kit.layout)
        training = kit.task.training
        self._moves = (
            training.learning_rate * agreement.privacy.record.clip / training.batch_size
        )  # fmt: skip
        self._size = kit.layout.size
        self._honest = honest
        (entry,) = (e for e in kit.layout.of_rule("shared") if e.name == CANARIES)
        self._canaries = slice(entry.offset, entry.offset + entry.size)
        self._others = {
            entry.name: entry.offset + some_of(entry.size)
            for entry in kit.layout.of_rule("shared")
            if entry.name != CANARIES
        }
        self._absent = ~included
        self.others: dict[str, list[npt.NDArray[np.float64]]] = {n: [] for n in self._others}
        self.canaries: list[npt.NDArray[np.float64]] = []
        self.shares: list[list[float]] = []

    def noise(self, noise_multiplier: float) -> float:
        """Return the standard deviation that the sum is to have, over the clipping norm.

        The noise multiplier is over what one record moves: the clipping norm, and a step of the
        grid in each coordinate, by which rounding can lengthen that.

        Args:
            noise_multiplier: The run's.
        """
        return noise_multiplier * (1.0 + math.sqrt(self._size) * self._sums.grid / self._moves)

    def add(self, ask: Ask, reply: Reply) -> Vector:
        """Add up a round and return the mean as the coordinator decodes it, float32.

        Args:
            ask: What the sites were asked.
            reply: What the site that trains answered, with an update.
        """
        if reply.update is None:
            raise ValueError("a reply without an update")
        nothing = {DELTA: np.zeros(self._size, np.float32)}
        silent = replace(reply, update=replace(reply.update, vectors=nothing, norms={}))
        words = [
            self._sums.encode(ask, reply if at == 0 else silent) for at in range(self._honest)
        ]  # fmt: skip
        steps = [self._sums.steps(each)[self._canaries][self._absent] for each in words]
        scale = self._sums.grid / self._moves
        self.shares.append([scale * _root_mean_square(each) for each in steps])
        mean = self._sums.mean(ask.round_number, words)
        # A canary's own gradient is negative: the step that follows it is not.
        self.canaries.append(self._honest * mean[self._canaries] / self._moves)
        for name, some in self._others.items():
            self.others[name].append(self._honest * mean[some] / self._moves)
        return mean.astype(np.float32)


def _root_mean_square(steps: npt.NDArray[np.int64]) -> float:
    return float(np.sqrt(np.mean(steps.astype(np.float64) ** 2)))
