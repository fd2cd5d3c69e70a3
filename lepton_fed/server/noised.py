"""Sums of a round under client-level DP: what leaves them is noised.

Where sites share the noise it is in the masked sum already, and all that is left is to decode it.
Where the coordinator adds it, the sum is there without noise for a moment: here and in the files of
the round, nowhere else, and never in a log.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lepton_fed.core.ring import RingEncoding
from lepton_fed.privacy.central.clipping import FixedClip
from lepton_fed.privacy.central.mechanism import CentralSum
from lepton_fed.privacy.client import ClientNoise
from lepton_fed.privacy.dp.entropy import Entropy
from lepton_fed.server.groups import GroupSum
from lepton_fed.strategies.base import DELTA

__all__ = ["central_sum", "masked_mean"]


def central_sum(client: ClientNoise, size: int, step: float = 0.0) -> CentralSum:
    """Return an empty sum that the coordinator adds noise to.

    Args:
        client: The noise.
        size: Coordinates of an update.
        step: Distance of two neighbours of the grid; 0 for the finest.
    """
    # Who is in a sum is public, so it is divided by how many they are: nothing is expected.
    return CentralSum(size, FixedClip(client.clip), client.noise_multiplier, 1.0, step)


def masked_mean(
    client: ClientNoise, encoding: RingEncoding, number: int, size: int, group: GroupSum
) -> npt.NDArray[np.float64]:
    """Return the noised mean of the updates in a masked sum.

    Args:
        client: The noise.
        encoding: How coordinates were encoded, where the coordinator adds the noise.
        number: Round, from 1.
        size: Coordinates of an update.
        group: The sum.

    Returns:
        ``[size]`` float64.
    """
    opened = group.opened
    words = opened.vectors[DELTA].astype(np.uint64)
    if client.shares is not None:
        return client.noisy_sum(number).decode(words) / opened.replies
    total = central_sum(client, size, encoding.grid)
    total.add_sum(encoding.signed(words), opened.replies)
    return total.released_sum(Entropy.from_system()) / opened.replies
