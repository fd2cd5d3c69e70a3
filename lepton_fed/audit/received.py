"""What a coordinator receives of a round under secure aggregation: a sum, and what it makes of it.

Sites encode by their own code, noise included, and the coordinator decodes by its own. Masks are
left out: modulo the ring's size they cancel in the sum to the last bit, so that nothing of them is
in what is opened.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lepton_fed.clients.encoded import Encoder
from lepton_fed.config.agreement import Agreement
from lepton_fed.config.schema import StrategyConf
from lepton_fed.core.exchange import Ask, Reply
from lepton_fed.core.layout import Layout
from lepton_fed.privacy.client import client_noise
from lepton_fed.privacy.masked_plan import Shape, masked_layout
from lepton_fed.privacy.secagg.masks import Words
from lepton_fed.server.groups import GroupSum
from lepton_fed.server.intake import MaskedIntake
from lepton_fed.strategies.base import DELTA, Sum
from lepton_fed.strategies.build import build_strategy

__all__ = ["MaskedSum"]


class MaskedSum:
    """Both ends of the sums of a run, without masks.

    Args:
        agreement: What the sites agreed to.
        layout: Layout of the model.
        vectors: Names of the vectors of an update.

    Raises:
        LeptonError: The sum cannot be made as the agreement wants it.
    """

    def __init__(
        self, agreement: Agreement, layout: Layout, vectors: Sequence[str] = (DELTA,)
    ) -> None:
        self._agreement = agreement
        self._model = layout
        self._encoder = Encoder(agreement, layout.size)
        client = client_noise(agreement, layout.size)
        # Noise of the coordinator's own it adds later, to what it has received.
        self._client = client if client and client.shares else None
        shape = Shape(layout.digest, tuple(vectors), layout.size, 0)
        self._layout = masked_layout(agreement, shape, train=True, evaluate=False)

    @property
    def grid(self) -> float:
        """Return the distance of two neighbouring points of the grid, in the update's unit."""
        return self._layout.encoding.grid

    def encode(self, ask: Ask, reply: Reply) -> Words:
        """Return what a site masks, its share of the noise included: drawn anew each time."""
        return self._encoder.encode(self._layout, ask, self._encoder.in_round(ask), reply).words

    def steps(self, words: Words) -> npt.NDArray[np.int64]:
        """Return the first vector in words, one site's or a sum's, in steps of the grid.

        Args:
            words: Ring words.

        Returns:
            ``[layout.size]`` int64.
        """
        first = words[: self._model.size].astype(np.uint64) & self._layout.encoding.mask
        return self._layout.encoding.signed(first)

    def noiseless(self, delta: npt.NDArray[np.floating]) -> npt.NDArray[np.int64]:
        """Return an update on the grid without noise, ``[layout.size]`` int64: never released."""
        words, _ = self._layout.encode({DELTA: delta}, self._layout.encoding.weight_bound)
        return self.steps(words)

    def mean(self, number: int, words: Sequence[Words]) -> npt.NDArray[np.float64]:
        """Return the mean that the coordinator has of what several sites masked.

        Args:
            number: Round, from 1.
            words: Of each site.

        Returns:
            Of the model's update, ``[layout.size]`` float64.
        """
        total = words[0].copy()
        for others in words[1:]:
            total += others  # wraps as the ring does
        total &= total.dtype.type(self._layout.encoding.mask)
        opened = self._layout.open(total)
        names = tuple(f"site-{at}" for at in range(len(words)))
        intake = MaskedIntake(
            build_strategy(StrategyConf()), self._model, self._layout.encoding, number,
            len(words), Path(), [GroupSum(1, names, opened, 0)], self._client,
        )  # fmt: skip
        aggregate = intake.aggregate()
        if not isinstance(aggregate, Sum):
            raise TypeError("a sum is enough for plain averaging")
        return aggregate.mean[DELTA]
