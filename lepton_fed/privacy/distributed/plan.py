"""How much noise, on which grid, in how many bits: what all parties agree on before round 1.

A sum of ``n`` rotated updates has, in each coordinate, a standard deviation of at most

    s = sqrt((m C)**2 / B + n g**2 / 4 + n sigma**2)

(``m`` protected units of norm ``C`` at most in a sum, ``B`` the rotation's block, ``g`` the grid,
``sigma`` the deviation of a site's share). The ring of ``b`` bits has to hold ``k = 4`` of them to
either side, ``2 k s / g <= 2**b``, and the finest grid with which it does is taken. About one
coordinate in 16 000 then wraps, by ``8 s``, which adds less than half a percent to the variance of
the sum. Wrapping is post-processing: it costs accuracy, never privacy.

In units of the grid nothing depends on ``C``: neither the noise of a share nor the length of what
it hides. So a plan costs what it costs whatever ``C`` is, to the last bit, and sites that went by
different norms would hide each other's updates all the same.

Each share is calibrated to ``h`` honest sites: its variance is ``sigma_h**2 / h``, so that any
``h`` shares have the variance that was accounted for, whatever the others send. Sites must not let
a sum be opened that has fewer than ``h`` of them in it.

References:
    P. Kairouz, Z. Liu, T. Steinke, ICML 2021, arXiv:2102.06387, section 5 (choice of the grid).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from lepton_fed.errors import Problem, TaskError
from lepton_fed.privacy.distributed.accounting import (
    ADJACENCY,
    DiscreteGaussianShares,
    Shares,
    SkellamShares,
)
from lepton_fed.privacy.distributed.rotation import block_of
from lepton_fed.privacy.distributed.rounding import BETA, squared_norm_limit
from lepton_fed.privacy.dp.accounting import SampledGaussian
from lepton_fed.privacy.dp.skellam import LARGEST_VARIANCE

__all__ = [
    "DEVIATIONS",
    "Noise",
    "SharesPlan",
    "least_noise",
    "plan_shares",
]

Noise = Literal["discrete-gaussian", "skellam"]

DEVIATIONS = 4.0
"""Standard deviations of a sum's coordinate that fit into half the ring."""

_LARGEST_NOISE = 1e6
_TOLERANCE = 1e-4  # relative, of the noise multiplier
_FEWEST_BITS, _MOST_BITS = 8, 32  # of more, rotated coordinates could pass 2**40
_SMALLEST_SHARE = 0.5  # in units of the grid; less hides nothing
_NO_RATIO = 1e-8  # a logarithm of a ratio that no ledger shows


@dataclass(frozen=True)
class SharesPlan:
    """Shares of noise in a ring.

    Args:
        sites: Sites in a sum, at most; public.
        honest: Sites whose shares count; at least so many are in every sum that is opened.
        size: Coordinates of an update.
        clip: Largest norm of a site's update.
        noise_multiplier: Deviation of the noise of ``honest`` shares, over ``clip``.
        bits: Size of the ring in bits.
        noise: Distribution of a share.
        beta: Probability, at most, with which a rounding is thrown away.

    Raises:
        ValueError: A number is out of range, or shares of Skellam noise are beyond what is drawn.
        TaskError: The ring is too small for the noise of so many sites (LF3320).
    """

    sites: int
    honest: int
    size: int
    clip: float
    noise_multiplier: float
    bits: int
    noise: Noise = "discrete-gaussian"
    beta: float = BETA

    def __post_init__(self) -> None:
        if not 1 <= self.honest <= self.sites or self.size < 1:
            raise ValueError(f"{self.honest} honest of {self.sites} sites, {self.size} coordinates")
        if not (0 < self.clip < math.inf and 0 < self.noise_multiplier < math.inf):
            raise ValueError(f"clip {self.clip}, noise multiplier {self.noise_multiplier}")
        if not _FEWEST_BITS <= self.bits <= _MOST_BITS or not 0 <= self.beta < 1:
            raise ValueError(f"a ring of {self.bits} bits, beta {self.beta}")
        if self._ring_room <= 0 or self.share_sigma < _SMALLEST_SHARE:
            raise TaskError(_too_small(self.bits, self.sites))
        if self.noise == "skellam" and self.share_sigma**2 > LARGEST_VARIANCE:
            raise ValueError(f"Skellam shares in a ring of {self.bits} bits: at most 28")

    @property
    def block(self) -> int:
        """Return the rotation's block, in coordinates."""
        return block_of(self.size)

    @property
    def padded(self) -> int:
        """Return the coordinates that are sent."""
        return self.size + -self.size % self.block

    @property
    def share_deviation(self) -> float:
        """Return the standard deviation of one share, in the update's own units."""
        return self.noise_multiplier * self.clip / math.sqrt(self.honest)

    @property
    def mean_deviation(self) -> float:
        """Return the deviation of the noise on the mean of all sites' updates, in a coordinate."""
        return self.share_deviation / math.sqrt(self.sites)

    @property
    def grid(self) -> float:
        """Return the distance of two neighbours of the grid: the finest that fits the ring."""
        return self.clip * self._relative_grid

    @property
    def share_sigma(self) -> float:
        """Return the parameter of one share, in units of the grid."""
        return self.noise_multiplier / math.sqrt(self.honest) / self._relative_grid

    @property
    def sum_deviation(self) -> float:
        """Return the bound of a sum's deviation in a coordinate, in units of the grid."""
        return math.sqrt(self._ring_room + self.sites / 4)

    @property
    def norm_limit(self) -> int:
        """Return the largest squared norm of a site's rounded update, in grid units squared."""
        return squared_norm_limit(1.0 / self._relative_grid, self.padded, self.beta)

    @property
    def squared_sensitivity(self) -> float:
        """Return the square of the norm by which one site moves the sum, in units of the grid.

        It is the limit that its rounded update is held to.
        """
        return float(self.norm_limit)

    @property
    def adjacency(self) -> str:
        """Return the name of the neighbouring relation."""
        return ADJACENCY

    def cost(self, rounds: int) -> Shares:
        """Return what ``rounds`` sums cost, to be asked for epsilon."""
        kind = DiscreteGaussianShares if self.noise == "discrete-gaussian" else SkellamShares
        return kind(self.share_sigma, self.honest, self.squared_sensitivity, self.padded, rounds)

    def event(self, rounds: int) -> SampledGaussian:
        """Return the continuous Gaussian that ``rounds`` sums are post-processing of.

        It can be composed with everything else that a ledger has. A sample of sites is not
        credited: the coordinator knows who takes part.

        Args:
            rounds: How many sums are released.

        Returns:
            The event. What it leaves out adds less than 1e-7 to epsilon and 1e-20 to delta, far
            below the grid of the privacy loss.

        Raises:
            ValueError: The noise is Skellam, of which nothing like it is known.
            TaskError: Shares are so small that the sum is not close to a Gaussian (LF3320).
        """
        cost = self.cost(rounds)
        if not isinstance(cost, DiscreteGaussianShares):
            raise ValueError("Skellam noise is accounted for by its Rényi divergences only")
        noise, ratio = cost.dominating_gaussian()
        if ratio > _NO_RATIO:
            raise TaskError(_too_small(self.bits, self.sites))
        return SampledGaussian(noise, 1.0, rounds)

    @cached_property
    def _relative_grid(self) -> float:
        """Return the grid over the clip."""
        share = self.noise_multiplier**2 / self.honest
        variance = self.sites**2 / self.block + self.sites * share
        return math.sqrt(variance / self._ring_room)

    @property
    def _ring_room(self) -> float:
        """Return what signal and noise may have of the variance that fits, in grid units."""
        return (2.0**self.bits / (2 * DEVIATIONS)) ** 2 - self.sites / 4


def plan_shares(
    *,
    epsilon: float,
    delta: float,
    rounds: int,
    sites: int,
    honest: int,
    size: int,
    clip: float,
    bits: int = 20,
    noise: Noise = "discrete-gaussian",
) -> SharesPlan:
    """Return the plan with the least noise that keeps all rounds within epsilon.

    Args:
        epsilon: Of all rounds together.
        delta: Delta of the guarantee, in (0, 1).
        rounds: How many sums are released.
        sites: Sites in a sum, at most.
        honest: Sites whose shares count.
        size: Coordinates of an update.
        clip: Largest norm of a site's update.
        bits: Size of the ring in bits.
        noise: Distribution of a share.

    Raises:
        ValueError: A number is out of range.
        TaskError: The ring is too small for so many sites (LF3320), or no amount of noise stays
            within epsilon in it (LF3321).

    Example:
        >>> plan = plan_shares(
        ...     epsilon=8, delta=1e-5, rounds=50, sites=100, honest=70, size=20_000, clip=1.0
        ... )
        >>> f"{plan.noise_multiplier:.2f} {plan.mean_deviation:.3f} {plan.grid:.1e}"
        '4.24 0.051 4.1e-05'
        >>> f"{plan.cost(50).epsilon(1e-5):.2f} {plan.adjacency}"
        '8.00 zero-out-one-site'
    """
    if not (0 < epsilon < math.inf and 0 < delta < 1) or rounds < 1:
        raise ValueError(f"epsilon {epsilon} at delta {delta} over {rounds} rounds")

    def plan(multiplier: float) -> SharesPlan:
        return SharesPlan(sites, honest, size, clip, multiplier, bits, noise=noise)

    def cost(multiplier: float) -> float:
        try:
            return plan(multiplier).cost(rounds).epsilon(delta)
        except TaskError:
            # A share that is too small for the grid; more noise makes it larger, up to a limit.
            if multiplier >= _LARGEST_NOISE:
                raise
            return math.inf

    found = least_noise(cost, epsilon)
    if found is None:
        raise TaskError(
            Problem(
                "LF3321",
                f"no amount of noise keeps {rounds} rounds of {size} coordinates in a ring of "
                f"{bits} bits within epsilon {epsilon:g} at delta {delta:g}",
                remedy="more bits, fewer rounds, or a larger epsilon",
            )
        )
    return plan(found)


def least_noise(cost: Callable[[float], float], epsilon: float) -> float | None:
    """Return the smallest noise multiplier that costs at most epsilon; None if there is none.

    Args:
        cost: From a noise multiplier to the epsilon of a run.
        epsilon: The target.
    """
    high = 1e-2
    while cost(high) > epsilon:
        if high >= _LARGEST_NOISE:
            return None
        high = min(2 * high, _LARGEST_NOISE)
    low = high / 2
    while high / low > 1 + _TOLERANCE:
        middle = math.sqrt(low * high)
        if cost(middle) > epsilon:
            low = middle
        else:
            high = middle
    return high


def _too_small(bits: int, sites: int) -> Problem:
    return Problem(
        "LF3320",
        f"a ring of {bits} bits has no room for shares of noise of {sites} sites",
        remedy="more bits, or fewer sites",
    )
