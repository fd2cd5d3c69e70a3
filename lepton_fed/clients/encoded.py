"""What a site masks of a round: its update on the grid of the ring, with its share of the noise.

It is the last that happens to an update before masks hide it, and masks cancel in the sum: what is
made here, added up over the sites, is what the coordinator opens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lepton_fed.config.agreement import Agreement
from lepton_fed.core.exchange import Ask, Reply
from lepton_fed.errors import Problem, RunError
from lepton_fed.privacy.client import ClientNoise, client_noise, noise_of_round
from lepton_fed.privacy.dp.discrete_gaussian import discrete_gaussian
from lepton_fed.privacy.dp.entropy import Entropy
from lepton_fed.privacy.dp.integers import Integers
from lepton_fed.privacy.dp.shared import shared_noise
from lepton_fed.privacy.secagg.masks import Words
from lepton_fed.privacy.secagg.vector import MaskedLayout

__all__ = ["Encoded", "Encoder"]


@dataclass(frozen=True)
class Encoded:
    """What a site masks.

    Args:
        words: Ring words, ``[layout.words]``.
        norm: Largest norm of the update's vectors, before the site clipped them.
        bound: What they were clipped to.
        notes: What the site's receipt says of it, by name.
    """

    words: Words
    norm: float
    bound: float
    notes: dict[str, str]


class Encoder:
    """Encodes a site's replies in a run with secure aggregation.

    Args:
        agreement: What the site agreed to.
        size: Coordinates of an update.

    Raises:
        Refused: LF4620, the shared noise is not sound; LF4630, client-level DP is not.
    """

    def __init__(self, agreement: Agreement, size: int) -> None:
        self._agreement = agreement
        self._noise = shared_noise(agreement, size)
        self._client = client_noise(agreement, size)

    @property
    def honest(self) -> int:
        """Return how many sites of a sum are counted on to add a share; 0 where none does."""
        record, client = self._noise, self._client
        return max(record.honest if record else 0, client.honest if client else 0)

    @property
    def adds_share(self) -> bool:
        """Return whether what is encoded has a share of noise in it."""
        return self._noise is not None or bool(self._client and self._client.shares)

    def in_round(self, ask: Ask) -> ClientNoise | None:
        """Return client-level DP as it is in the round of an ask; None where there is none.

        Args:
            ask: What is asked.

        Raises:
            Refused: LF4519, the norm that it tells is out of bounds, or none moves.
        """
        return noise_of_round(self._client, ask.clip, train=ask.train)

    def encode(
        self, layout: MaskedLayout, ask: Ask, client: ClientNoise | None, reply: Reply
    ) -> Encoded:
        """Return what is masked; noise is drawn anew each time.

        Args:
            layout: Where everything lies in it.
            ask: What was asked.
            client: What :meth:`in_round` says of it.
            reply: What the site trained or counted.

        Raises:
            RunError: LF5312, the update cannot be encoded.
        """
        vectors: dict[str, npt.NDArray[np.floating] | npt.NDArray[np.uint64]] = {}
        weight, norms = layout.encoding.weight_bound, {}
        if reply.update is not None:
            vectors |= reply.update.vectors
            weight = reply.update.weight
            norms = dict(reply.update.norms)
        counts, notes = np.zeros(layout.counts), {}
        # Who may not send counts adds none, nor who has none that are finite: one such would spoil
        # the sum of all. How many there are belongs to the layout.
        if reply.counts is not None and np.isfinite(reply.counts).all():
            counts, notes["evaluation"] = reply.counts, "inside the masked vector"
            if self._agreement.privacy.is_noised:
                notes["outside epsilon"] = "evaluation"
        try:
            noise = self._share_of_noise(layout, notes) if ask.train else None
            if reply.update is not None and client:
                notes |= client.notes
                for name, vector in reply.update.vectors.items():
                    # Only here is it known: what comes from training is clipped already.
                    joint = client.vector(vector, over=norms[name] > client.clip)
                    vectors[name] = joint
                    if client.shares:
                        ends = client.noisy_sum(ask.round_number)
                        vectors[name] = ends.encode(joint, Entropy.from_system())
            words, _ = layout.encode(vectors, weight, counts, noise)
        except ValueError as error:
            raise RunError(Problem("LF5312", f"the update cannot be masked: {error}")) from None
        bound = client.site_bound if client else self._agreement.task.aggregation.norm_bound
        notes["clip"] = f"{bound:g}"
        if ask.train:
            lost = layout.encoding.bits_lost_to_weight(weight)
            notes["weight"] = f"inside the masked vector; {lost:.1f} bits are lost to it"
        return Encoded(words, max(norms.values(), default=0.0), bound, notes)

    def _share_of_noise(
        self, layout: MaskedLayout, notes: dict[str, str]
    ) -> Callable[[int], Integers] | None:
        """Return what draws this site's share of the sum's noise; None when nothing is shared."""
        noise = self._noise
        if noise is None:
            return None
        std, entropy = noise.share_std(layout.encoding.grid), Entropy.from_system()
        notes["noise"] = (
            f"this site's share: the sum has the whole noise, multiplier "
            f"{noise.noise_multiplier:.4g}, while {noise.honest} sites in it add theirs"
        )
        return lambda count: discrete_gaussian(std, count, entropy)
