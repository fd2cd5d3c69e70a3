"""The norm that updates are clipped to: fixed, or one that follows a quantile of their norms.

Adaptive clipping releases, beside the sum, how many updates were within the norm, with noise of its
own, and moves the norm until a fraction ``quantile`` of them is::

    b = (number of norms at most C, noised) / m
    C <- C exp(-rate (b - quantile))

More updates within the norm than wanted make it smaller. Sum and count are released together, as
one Gaussian mechanism. Each update sends ``b - 1/2``, so the count has sensitivity 1/2; with noise
of deviation ``s`` on it, the sum needs the multiplier ``(z**-2 - (2 s)**-2)**-0.5`` for both to
cost what ``z`` alone costs.

References:
    G. Andrew, O. Thakkar, H. B. McMahan, S. Ramaswamy, "Differentially Private Learning with
    Adaptive Clipping", NeurIPS 2021, arXiv:1905.03871, algorithm 1, theorem 1 and section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from lepton_fed.privacy.dp.discrete_gaussian import discrete_gaussian
from lepton_fed.privacy.dp.entropy import Entropy

__all__ = ["AdaptiveClip", "FixedClip", "sum_noise_multiplier"]

_SMALLEST, _LARGEST = 2.0**-60, 2.0**60
_COUNT_GRID = 1 << 20  # halves become multiples of 2**-21: noise far finer than what it hides


def sum_noise_multiplier(noise_multiplier: float, count_deviation: float) -> float:
    """Return the sum's noise multiplier when a count is released beside it.

    Args:
        noise_multiplier: Of sum and count together.
        count_deviation: Standard deviation of the noise on the count, in updates.

    Raises:
        ValueError: The count alone costs more than both may.
    """
    if not (0 < noise_multiplier < 2 * count_deviation):
        raise ValueError(
            f"noise of {count_deviation:g} on a count leaves nothing of a noise multiplier of "
            f"{noise_multiplier:g}: it has to be above half of that"
        )
    rest: float = (noise_multiplier**-2 - (2 * count_deviation) ** -2) ** -0.5
    return rest


@dataclass(frozen=True)
class FixedClip:
    """A norm that stays.

    Args:
        norm: Largest norm of an update.

    Raises:
        ValueError: It is not positive and finite.
    """

    norm: float

    def __post_init__(self) -> None:
        if not _SMALLEST <= self.norm <= _LARGEST:
            raise ValueError(f"a clipping norm of {self.norm}")

    def sum_noise_multiplier(self, noise_multiplier: float) -> float:
        """Return the sum's noise multiplier: all of it."""
        return noise_multiplier

    def step(self, within: int, updates: int, entropy: Entropy) -> FixedClip:
        """Return the norm of the next round: the same."""
        return self


@dataclass(frozen=True)
class AdaptiveClip:
    """A norm that follows a quantile of the updates' norms.

    Args:
        norm: Largest norm of an update in this round.
        expected: Updates that are expected in a round, a public number.
        quantile: Fraction of the updates that shall be within the norm.
        rate: Change of the norm's logarithm for a fraction of one. Where none is given, so much
            that the norm can shrink and grow by 10 % in a round at least: 0.2 at the median, as in
            the paper, and more at other quantiles, which would take hundreds of rounds otherwise.
        count_deviation: Standard deviation of the noise on the count; a twentieth of ``expected``
            where none is given, as in the paper.

    Raises:
        ValueError: A number is out of range.
    """

    norm: float
    expected: float
    quantile: float = 0.5
    rate: float = 0.0
    count_deviation: float = 0.0

    def __post_init__(self) -> None:
        FixedClip(self.norm)
        if not (0 < self.quantile < 1 and 0 <= self.rate <= 10):
            raise ValueError(f"quantile {self.quantile}, rate {self.rate}")
        if not (1 <= self.expected < math.inf and 0 <= self.count_deviation < math.inf):
            raise ValueError(f"{self.expected} updates, noise of {self.count_deviation} on them")

    @property
    def pace(self) -> float:
        """Return the rate that is used."""
        return self.rate or 0.1 / min(self.quantile, 1 - self.quantile)

    @property
    def deviation(self) -> float:
        """Return the standard deviation of the noise on the count, in updates."""
        return self.count_deviation or self.expected / 20

    def sum_noise_multiplier(self, noise_multiplier: float) -> float:
        """Return what the count leaves for the sum.

        Raises:
            ValueError: Nothing.
        """
        return sum_noise_multiplier(noise_multiplier, self.deviation)

    def step(self, within: int, updates: int, entropy: Entropy) -> AdaptiveClip:
        """Return the norm of the next round.

        Args:
            within: Updates whose norm was at most this round's.
            updates: Updates of the round.
            entropy: The coordinator's own.

        Returns:
            The same, with another norm. It is public: noised here.

        Raises:
            ValueError: More updates are within the norm than there are.
        """
        if not 0 <= within <= updates:
            raise ValueError(f"{within} of {updates} updates")
        # Each update sends b - 1/2, in units of 1 / (2 grid): then an absent one sends nothing.
        total = (2 * within - updates) * _COUNT_GRID
        sigma = self.deviation * 2 * _COUNT_GRID
        total += int(discrete_gaussian(sigma, 1, entropy)[0])
        fraction = total / (2 * _COUNT_GRID) / self.expected + 0.5
        moved = self.norm * math.exp(-self.pace * (fraction - self.quantile))
        return replace(self, norm=min(max(moved, _SMALLEST), _LARGEST))
