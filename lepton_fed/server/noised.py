"""Sums of a round under client-level DP: what leaves them is noised.

Where sites share the noise it is in the masked sum already, and all that is left is to decode it.
Where the coordinator adds it, the sum is there without noise for a moment: here and in the files of
the round, nowhere else, and never in a log.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lepton_fed.core.layout import Vector
from lepton_fed.core.ring import RingEncoding
from lepton_fed.privacy.central.mechanism import CentralSum
from lepton_fed.privacy.client import ClientNoise
from lepton_fed.privacy.dp.entropy import Entropy
from lepton_fed.server.groups import GroupSum
from lepton_fed.strategies.base import DELTA

__all__ = ["PlainSum", "masked_mean"]

Means = tuple[npt.NDArray[np.float64], float]


class PlainSum:
    """Plain updates of a round, clipped, counted and added here.

    Args:
        client: The round's noise.
    """

    def __init__(self, client: ClientNoise) -> None:
        self._client = client
        self._sum = central_sum(client)

    def add(self, update: Vector, norm: float) -> None:
        """Add an update.

        Args:
            update: ``[size]`` float32, finite.
            norm: Its norm.
        """
        self._sum.add(self._client.vector(update, over=norm > self._client.clip))

    @property
    def updates(self) -> int:
        """Return how many updates are in the sum."""
        return self._sum.updates

    def mean(self) -> Means:
        """Return the noised mean, ``[size]`` float64, and the next round's norm; it is empty then.

        Who is in a sum is public, so it is divided by how many they are.
        """
        updates = self._sum.updates
        return self._client.read(self._sum.released_sum(Entropy.from_system()) / updates, updates)


def central_sum(client: ClientNoise, step: float = 0.0) -> CentralSum:
    """Return an empty sum that the coordinator adds noise to.

    Args:
        client: The round's noise.
        step: Distance of two neighbours of the grid; 0 for the finest.
    """
    return CentralSum(client.coordinates, client.sensitivity, client.noise_multiplier, step)


def masked_mean(client: ClientNoise, encoding: RingEncoding, number: int, group: GroupSum) -> Means:
    """Return the noised mean of the updates in a masked sum, and the next round's norm.

    Args:
        client: The round's noise.
        encoding: How coordinates were encoded, where the coordinator adds the noise.
        number: Round, from 1.
        group: The sum.

    Returns:
        ``[size]`` float64, and a norm.
    """
    opened = group.opened
    words = opened.vectors[DELTA].astype(np.uint64)
    if client.shares is not None:
        mean = client.noisy_sum(number).decode(words) / opened.replies
        return client.read(mean, opened.replies)
    total = central_sum(client, encoding.grid)
    total.add_sum(encoding.signed(words), opened.replies)
    mean = total.released_sum(Entropy.from_system()) / opened.replies
    return client.read(mean, opened.replies, encoding.grid)
