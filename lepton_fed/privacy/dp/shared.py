"""One noise for the sum of all sites: each adds its share, whole numbers in the ring of the sum.

With the noise of record-level DP added once in the sum, and not once at each site, ten sites train
as accurately as one that held all the rows. What it takes is that the coordinator sees the sum
alone (secure aggregation), and that a site sends nothing that only its own share covers: so it is
one step a round, from the weights that all have (FedSGD), and everything that follows a gradient
(momentum, averages, another learning rate) happens to the sum, at the coordinator.

A site clips the gradient of each record, adds them up, rounds the sum to the grid of the ring and
adds a discrete Gaussian of ``1 / sqrt(h)`` of the standard deviation that the sum is to have, where
``h`` is the number of sites that are counted on. It holds against the coordinator together with all
other sites, as long as ``h`` of those in the sum add their share; the site opens no sum of fewer.

The update is the step itself: a difference of weights would be rounded to their last digit, which
whoever chooses the weights can make larger than all that a record may move.

One record moves the clipped sum by at most ``clip``. Rounding to the nearest point of the grid can
add one step to each coordinate, so in steps of the grid ``s = clip / divisor / grid + sqrt(size)``
bounds what one record does to the rounded sum; the standard deviation of the noise is the noise
multiplier times ``s``. The sum of ``h`` discrete Gaussians of this size is a discrete Gaussian but
for a divergence below ``10 * h * exp(-pi**2 * share**2)`` (Kairouz, Liu, Steinke, section 3), and
its privacy loss is that of the continuous one on a fine grid: a share below :data:`LEAST_SHARE` is
refused.

References:
    P. Kairouz, Z. Liu, T. Steinke: The Distributed Discrete Gaussian Mechanism for Federated
    Learning with Secure Aggregation. ICML 2021. arXiv:2102.06387, sections 3 and 4.
    B. McMahan et al.: Communication-Efficient Learning of Deep Networks from Decentralized Data.
    AISTATS 2017, section 2 (FedSGD).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from lepton_fed.config.agreement import Agreement
from lepton_fed.config.privacy_rules import shared_problems
from lepton_fed.config.schema import Privacy
from lepton_fed.errors import Problem, Refused
from lepton_fed.privacy.dp.accounting import (
    LARGEST_NOISE,
    SampledGaussian,
    epsilon_of,
    noise_multiplier_for,
)
from lepton_fed.privacy.secagg.member import Rules

__all__ = [
    "LEAST_NOISE",
    "LEAST_SHARE",
    "SharedNoise",
    "honest_of",
    "noise_to_agree_on",
    "shared_noise",
]

LEAST_SHARE = 100.0
"""Smallest standard deviation of a share, in steps of the grid."""

LEAST_NOISE = 0.05
"""Smallest noise multiplier: less costs far beyond any epsilon, and takes long to account for."""

# A step has no noise yet, so nothing of it may depend on where float32 ends: one that makes weights
# infinite is refused, and whoever chose weights and learning rate would learn of a record by it.
_LEAST_MOVE, _LARGEST_MOVE = 1e-20, 1e12
_SLACK = 1e-6  # of epsilon: another machine's arithmetic may differ in the last digits
_TAIL = 10.0  # standard deviations of the sum's noise for which the ring has room


@dataclass(frozen=True)
class SharedNoise:
    """The noise of a sum.

    Args:
        noise_multiplier: Standard deviation of the sum's noise over what one record moves.
        sampling_rate: Probability with which each record is in a round's step, in (0, 1].
        honest: Number of sites counted on.
        moves: Euclidean norm by which one record moves the sum before it is rounded.
        size: Number of coordinates.
    """

    noise_multiplier: float
    sampling_rate: float
    honest: int
    moves: float
    size: int

    @property
    def event(self) -> SampledGaussian:
        """Return what one round costs a record."""
        return SampledGaussian(self.noise_multiplier, self.sampling_rate, 1)

    def share_std(self, grid: float) -> float:
        """Return the standard deviation of one site's share, in steps of the grid.

        Args:
            grid: Distance of two neighbouring points of it.
        """
        sensitivity = self.moves / grid + math.sqrt(self.size)
        return self.noise_multiplier * sensitivity / math.sqrt(self.honest)

    def room(self, grid: float, cohort: int) -> float:
        """Return how far the noise may bring the mean of a sum's coordinate, at most.

        Args:
            grid: Distance of two neighbouring points of the grid.
            cohort: Largest number of sites in the sum.

        Returns:
            Ten standard deviations of the sum's noise over ``cohort``, in the update's unit.
        """
        return _TAIL * self.share_std(grid) * grid / math.sqrt(cohort)


def honest_of(agreement: Agreement) -> int:
    """Return how many sites of a sum are counted on to add their share.

    Args:
        agreement: What was agreed to.
    """
    secure = agreement.privacy.secure_aggregation
    least = Rules(secure.min_cohort, secure.threshold).least(agreement.cohort)
    return agreement.privacy.record.honest or least


def noise_to_agree_on(privacy: Privacy, rounds: int) -> float:
    """Return the noise multiplier that a run with shared noise takes; 0 for any other.

    Args:
        privacy: What is protected.
        rounds: Rounds of the run, a step each.

    Raises:
        TaskError: LF3301, no reasonable amount of noise reaches the target.
    """
    record = privacy.record
    if not record.is_shared or record.sampling_rate is None:
        return 0.0
    target = record.epsilon * (1.0 - _SLACK)
    return noise_multiplier_for(
        target, record.delta, SampledGaussian(1.0, record.sampling_rate, rounds)
    )


def shared_noise(agreement: Agreement, size: int) -> SharedNoise | None:
    """Return the noise that sites share in each round of a run; None when they do not.

    Args:
        agreement: What was agreed to.
        size: Number of coordinates of an update.

    Raises:
        Refused: LF4620, it is not sound: it costs more than the epsilon that is said, or the
            shares would not hold what they are to.
    """
    record, task = agreement.privacy.record, agreement.task
    if not record.is_shared:
        return None
    rate, noise = record.sampling_rate, agreement.noise_multiplier
    if rate is None or not (0 < rate <= 1 and LEAST_NOISE <= noise <= LARGEST_NOISE):
        raise _unsound(f"a noise multiplier of {noise:g} and a sampling rate of {rate}")
    problem = next(shared_problems(task, agreement.privacy, agreement.cohort), None)
    if problem is not None:
        raise Refused(replace(problem, code="LF4620"))
    cost = epsilon_of([SampledGaussian(noise, rate, agreement.rounds)], record.delta)
    if not cost <= record.epsilon:
        raise _unsound(f"the run costs epsilon {cost:.4g}, and {record.epsilon:g} is said")
    training = task.training
    moves = training.learning_rate * record.clip / training.batch_size
    if not _LEAST_MOVE <= moves <= _LARGEST_MOVE:
        raise Refused(
            Problem("LF4620", f"shared noise: a record moves the sum by {moves:.3g}, which is not "
                    f"from {_LEAST_MOVE:g} to {_LARGEST_MOVE:g}", key="task.training.learning_rate",
                    remedy="it is the learning rate times privacy.record.clip over the batch size")
        )  # fmt: skip
    return SharedNoise(noise, rate, honest_of(agreement), moves, size)


def _unsound(why: str) -> Refused:
    return Refused(Problem("LF4620", f"shared noise: {why}", key="privacy.record.noise"))
