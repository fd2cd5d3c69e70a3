"""Client-level DP of a run: the noise that is agreed on, what it costs, and whom it holds against.

What is protected is a site's whole part in a run: all that it sends could be zeros, in every round,
and nobody could tell. Neighbours differ by that (zero-out-one-site); who takes part is public, and
nothing is gained from sampling sites. The noise is added to the sum of the updates, each clipped:

``shared``: by the sites, each a share, in the ring of the masked sum
(:mod:`lepton_fed.privacy.distributed`); the coordinator never has a sum without it.
``coordinator``: by the coordinator (:mod:`lepton_fed.privacy.central`), who is trusted to.

Each round releases one sum at most: a site answers a round once, with one vector, and reveals one
sum that holds it. So a run costs what its rounds cost, and a site checks that before the first.

The norm that updates are clipped to may follow a quantile of their norms
(:mod:`lepton_fed.privacy.clipping`). Then a vector has one coordinate more, the coordinator tells
each round's norm in its ask, and the cost is that of the longer vector: it does not depend on the
norm, so a site that takes whatever it is told loses nothing but accuracy. Of a masked sum all sites
have been told the same: what they were asked is part of what they mask under.

References:
    P. Kairouz, Z. Liu, T. Steinke, ICML 2021, arXiv:2102.06387.
    N. Agarwal, P. Kairouz, Z. Liu, NeurIPS 2021, arXiv:2110.04995.
    H. B. McMahan, D. Ramage, K. Talwar, L. Zhang, ICLR 2018, arXiv:1710.06963.
    G. Andrew, O. Thakkar, H. B. McMahan, S. Ramaswamy, NeurIPS 2021, arXiv:1905.03871.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from lepton_fed.config.agreement import Agreement
from lepton_fed.config.privacy_rules import LEAST_CLIP, client_problems
from lepton_fed.core.layout import Vector
from lepton_fed.errors import LeptonError, Problem, Refused, TaskError
from lepton_fed.privacy import clipping
from lepton_fed.privacy.central.mechanism import GRID_BITS
from lepton_fed.privacy.distributed.accounting import ADJACENCY, DiscreteGaussianShares
from lepton_fed.privacy.distributed.plan import (
    Noise,
    SharesPlan,
    least_noise,
    plan_shares,
)
from lepton_fed.privacy.distributed.rotation import Rotation
from lepton_fed.privacy.distributed.shares import NoisySum
from lepton_fed.privacy.secagg.member import Rules

__all__ = [
    "CLAIM_AGAINST",
    "CLAIM_DELTA",
    "CLAIM_EPSILON",
    "ClientNoise",
    "client_noise",
    "honest_sites",
    "least_clip",
    "noise_of_round",
    "with_client_noise",
]

CLAIM_EPSILON = "client-level epsilon"
CLAIM_DELTA = "client-level delta"
CLAIM_AGAINST = "client-level DP holds against"
"""What a receipt says of a run's client-level DP, beside the sentence; by name."""

_SLACK = 1e-6  # of epsilon: another machine's arithmetic may differ in the last digits
_LEAST_NOISE, _LARGEST_NOISE = 0.01, 1e6
_LARGEST_CENTRAL = 512.0  # on the finest grid it is drawn with a deviation of 2**39 steps
_LARGEST_CLIP = 2.0**60
_MOST_ROUNDS, _MOST_SITES = 1_000_000, 1_000_000


@dataclass(frozen=True)
class ClientNoise:
    """The noise of a run's sums.

    Args:
        source: Who adds it.
        mechanism: Its distribution.
        clip: Largest norm of an update: in every round, or in one of them where it moves.
        quantile: Which quantile of the updates' norms it follows; None where it stays.
        most: Largest norm that it comes to.
        size: Coordinates of an update.
        noise_multiplier: Standard deviation of the noise that is counted on, over
            :attr:`sensitivity`.
        honest: Sites that are counted on to add a share; 0 where the coordinator adds the noise.
        epsilon: What all rounds cost a site, at most.
        delta: Delta of the guarantee.
        seed: Seed of the run; rotations come from it.
        shares: How sites share the noise; None where the coordinator adds it.
        masked: Whether the coordinator reads sums alone.
    """

    source: Literal["coordinator", "shared"]
    mechanism: str
    clip: float
    quantile: float | None
    most: float
    size: int
    noise_multiplier: float
    honest: int
    epsilon: float
    delta: float
    seed: int
    shares: SharesPlan | None
    masked: bool

    @property
    def coordinates(self) -> int:
        """Return the coordinates of what a site adds to the sum."""
        return _coordinates(self.size, self.quantile)

    @property
    def sensitivity(self) -> float:
        """Return the largest norm of what a site adds to the sum."""
        return self.clip if self.quantile is None else clipping.joint_norm(self.clip)

    @property
    def site_bound(self) -> float:
        """Return the norm to which a site clips its own update.

        A coordinator that reads single updates clips them itself where the norm moves: it counts
        those that were longer.
        """
        return self.clip if self.quantile is None or self.masked else self.most

    @property
    def adjacency(self) -> str:
        """Return the name of the neighbouring relation."""
        return ADJACENCY

    @property
    def against(self) -> str:
        """Return in words whom it holds against."""
        if self.shares is not None:
            return (
                "the coordinator, the other sites and whoever has the model, while "
                f"{self.honest} sites of a sum add their share"
            )
        reads = "sums without noise" if self.masked else "single updates"
        return (
            "the other sites and whoever has the model; not against the coordinator, which reads "
            f"{reads} and is trusted to add the noise"
        )

    @property
    def notes(self) -> dict[str, str]:
        """Return what a receipt of an update says of it, by name."""
        return {
            "client-level DP": self.terms,
            CLAIM_EPSILON: repr(float(self.epsilon)),
            CLAIM_DELTA: repr(float(self.delta)),
            CLAIM_AGAINST: self.against,
        }

    @property
    def terms(self) -> str:
        """Return in words what is protected, and at which price."""
        return (
            f"this site's whole part in the run: epsilon {self.epsilon:.4g} at delta "
            f"{self.delta:g} for all rounds, {self.adjacency}, noise multiplier "
            f"{self.noise_multiplier:.4g} on updates of norm {self.clip:g}{self._followed}"
        )

    @property
    def _followed(self) -> str:
        """Return in words what moves the norm; empty where nothing does."""
        if self.quantile is None:
            return ""
        return (
            f" and on how many were longer, {clipping.COUNT_COST:g} times that norm together; the "
            f"norm follows the {self.quantile:g} quantile of theirs"
        )

    def mean_deviation(self, sites: int) -> float:
        """Return the standard deviation of the noise on the mean of so many updates.

        Args:
            sites: How many are in the sum.

        Returns:
            Of each coordinate, in the update's unit.
        """
        whole = self.noise_multiplier * self.sensitivity
        if self.shares is None:
            return whole / sites
        return whole / math.sqrt(self.honest * sites)

    def fraction_deviation(self, sites: int) -> float:
        """Return the standard deviation of the noise on the fraction of updates within the norm.

        Args:
            sites: How many are in the sum.
        """
        return self.mean_deviation(sites) / clipping.unit(self.clip)

    def in_round(self, clip: float) -> ClientNoise:
        """Return the noise of a round in which updates are clipped to this norm.

        It costs the same: in units of its own grid no mechanism here knows the norm.

        Args:
            clip: The norm.
        """
        now = replace(self, clip=clip)
        if self.shares is None:
            return now
        return replace(now, shares=replace(self.shares, clip=now.sensitivity))

    def vector(self, update: Vector, *, over: bool) -> Vector:
        """Return what a site adds to the sum, before it is on a grid and without noise.

        Args:
            update: ``[size]`` float32, finite.
            over: Whether its norm was above :attr:`clip` before anybody clipped it.

        Returns:
            ``[coordinates]`` float32: the update, and where the norm moves a number that counts it.
        """
        if self.quantile is None:
            return update
        return clipping.counted(update, self.clip, over=over)

    def read(
        self, mean: npt.NDArray[np.float64], sites: int, step: float = 0.0
    ) -> tuple[npt.NDArray[np.float64], float]:
        """Return the mean update, and the norm of the next round; both may be shown.

        Args:
            mean: ``[coordinates]`` float64, noised.
            sites: How many are in it.
            step: Distance of two neighbours of the grid, where that is not made for the norm.

        Returns:
            ``[size]`` float64, and a norm.
        """
        if self.quantile is None:
            return mean, self.clip
        within = clipping.fraction_within(float(mean[-1]), self.clip)
        least = least_clip(step, self.coordinates)
        return mean[:-1], clipping.moved(
            self.clip,
            within,
            self.quantile,
            deviation=self.fraction_deviation(sites),
            least=least,
            most=self.most,
        )

    def noisy_sum(self, round_number: int) -> NoisySum:
        """Return both ends of a round's sum.

        Args:
            round_number: Round, from 1.

        Raises:
            ValueError: The coordinator adds the noise.
        """
        if self.shares is None:
            raise ValueError("sites share no noise in this run")
        rotation = Rotation.of_round(self.seed, round_number, self.shares.size)
        return NoisySum(self.shares, rotation)


def least_clip(step: float, coordinates: int) -> float:
    """Return the smallest norm on a grid that does not become finer with it.

    The number that counts an update is exact down to there, and rounding of all coordinates makes
    the noise larger by a half at most.

    Args:
        step: Distance of two neighbours of the grid; 0 for a grid that does.
        coordinates: Of what a site adds to the sum.
    """
    return max(LEAST_CLIP, step * max(clipping.UNIT_STEPS, math.sqrt(coordinates)))


def noise_of_round(client: ClientNoise | None, clip: float, *, train: bool) -> ClientNoise | None:
    """Return the noise of the round that an ask is for; None where there is none.

    Args:
        client: The run's; None without client-level DP.
        clip: The norm that the ask tells; 0 for none.
        train: Whether the round trains.

    Raises:
        Refused: LF4519, the norm is out of bounds, or one is told where none moves.
    """
    if client is None or client.quantile is None or not train:
        if clip != 0:
            raise _no_norm(clip, "none moves in this round")
        return client if train else None
    if not LEAST_CLIP <= clip <= client.most:  # NaN compares false
        raise _no_norm(clip, f"it has to be from {LEAST_CLIP:.2g} to {client.most:g}")
    return client.in_round(clip)


def honest_sites(agreement: Agreement) -> int:
    """Return how many sites of a sum are counted on to add their share; 0 where none shares.

    Args:
        agreement: What was agreed to.
    """
    client, secure = agreement.privacy.client, agreement.privacy.secure_aggregation
    if not client.is_shared:
        return 0
    return client.honest or Rules(secure.min_cohort, secure.threshold).least(agreement.cohort)


def with_client_noise(agreement: Agreement, size: int) -> Agreement:
    """Return what is agreed to together with the noise multiplier of client-level DP.

    Args:
        agreement: Everything else; the same comes back without client-level DP.
        size: Coordinates of an update.

    Raises:
        TaskError: LF1080, it does not go with the rest; LF3320, LF3321 or LF3341, no amount of
            noise stays within epsilon, or none in this ring.
    """
    client = agreement.privacy.client
    if not client.enabled:
        return agreement
    coordinates = _coordinates(size, client.quantile)
    problem = next(client_problems(agreement.task, agreement.privacy, agreement.cohort), None)
    if problem is not None:
        raise TaskError(problem)
    target = client.epsilon * (1.0 - _SLACK)
    if not client.is_shared:
        rounds, delta = agreement.rounds, client.delta
        found = least_noise(lambda noise: _central_cost(noise, coordinates, rounds, delta), target)
        if found is None or found > _LARGEST_CENTRAL:
            raise TaskError(
                Problem("LF3341", f"no amount of noise keeps {rounds} rounds within client-level "
                        f"epsilon {client.epsilon:g} at delta {delta:g}",
                        key="privacy.client.epsilon", remedy="fewer rounds, or a larger epsilon")
            )  # fmt: skip
        return replace(agreement, client_noise=found)
    plan = plan_shares(
        epsilon=target,
        delta=client.delta,
        rounds=agreement.rounds,
        sites=agreement.cohort,
        honest=honest_sites(agreement),
        size=coordinates,
        clip=1.0,  # it costs the same at any
        bits=agreement.privacy.secure_aggregation.bits,
        noise=_distribution(client.mechanism),
    )
    return replace(agreement, client_noise=plan.noise_multiplier)


def client_noise(agreement: Agreement, size: int) -> ClientNoise | None:
    """Return the noise of a run's sums; None without client-level DP.

    Args:
        agreement: What was agreed to.
        size: Coordinates of an update; it matters where sites share the noise.

    Returns:
        That of the first round: see :func:`noise_of_round`.

    Raises:
        Refused: LF4630, it is not sound: it costs more than the epsilon that is said, or comes with
            something that it does not cover.
    """
    client, noise = agreement.privacy.client, agreement.client_noise
    if not client.enabled:
        return None
    problem = next(client_problems(agreement.task, agreement.privacy, agreement.cohort), None)
    if problem is not None:
        raise Refused(replace(problem, code="LF4630"))
    most = _LARGEST_NOISE if client.is_shared else _LARGEST_CENTRAL
    fits = _LEAST_NOISE <= noise <= most and 0 < client.delta < 1 and client.clip <= _LARGEST_CLIP
    if not (fits and 1 <= agreement.rounds <= _MOST_ROUNDS and agreement.cohort <= _MOST_SITES):
        raise _unsound("no run has such noise, such a delta or norm, so many rounds or sites")
    secure, honest, plan = agreement.privacy.secure_aggregation, 0, None
    coordinates = _coordinates(size, client.quantile)
    try:
        if client.is_shared:
            honest = honest_sites(agreement)
            plan = SharesPlan(
                agreement.cohort,
                honest,
                coordinates,
                1.0,  # it costs the same at any
                noise,
                secure.bits,
                noise=_distribution(client.mechanism),
            )
            cost = _cost_of_shares(plan, agreement.rounds, client.delta)
        else:
            cost = _central_cost(noise, coordinates, agreement.rounds, client.delta)
    except (LeptonError, ValueError, OverflowError) as error:
        raise _unsound(str(error)) from None
    if not cost <= client.epsilon:
        raise _unsound(f"the run costs epsilon {cost:.4g}, which is more than is said")
    return ClientNoise(
        client.noise,
        client.mechanism,
        client.clip,
        client.quantile,
        min(agreement.task.aggregation.norm_bound, _LARGEST_CLIP),
        size,
        noise,
        honest,
        cost,
        client.delta,
        agreement.seed,
        plan,
        secure.enabled,
    ).in_round(client.clip)


@lru_cache(maxsize=16)
def _cost_of_shares(plan: SharesPlan, rounds: int, delta: float) -> float:
    """Return the epsilon of a run; asked for again in every phase of every round."""
    return plan.cost(rounds).epsilon(delta)


def _central_cost(noise: float, size: int, rounds: int, delta: float) -> float:
    """Return the epsilon of a run whose sums have all their noise from one hand, on a fine grid."""
    units = math.ldexp(1.0, GRID_BITS)
    return DiscreteGaussianShares(noise * units, 1, units**2, size, rounds).epsilon(delta)


def _distribution(mechanism: str) -> Noise:
    return "skellam" if mechanism == "skellam" else "discrete-gaussian"


def _coordinates(size: int, quantile: float | None) -> int:
    """Return the coordinates of an update, and one that counts it where the norm moves."""
    return size + (quantile is not None)


def _no_norm(clip: float, why: str) -> Refused:
    return Refused(
        Problem("LF4519", f"updates are to be clipped to {clip:g}: {why}", key="privacy.client")
    )


def _unsound(why: str) -> Refused:
    return Refused(Problem("LF4630", f"client-level DP: {why}", key="privacy.client"))
