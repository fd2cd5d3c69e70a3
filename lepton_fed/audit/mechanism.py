"""What a site of a run does in its rounds, and what that costs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from lepton_fed.audit.claims import Claims
from lepton_fed.privacy.dp.accounting import guarantee_of, noise_multiplier_for
from lepton_fed.privacy.dp.events import (
    CorrelatedGaussian,
    Event,
    OrderedGaussian,
    SampledGaussian,
)
from lepton_fed.privacy.dp.planning import fixed_order
from lepton_fed.privacy.dp.sampling import Sampler, sampler_of
from lepton_fed.privacy.factorisation.mechanism import FixedOrder
from lepton_fed.training.kit import build_kit
from lepton_fed.training.local import steps_of

__all__ = ["Mechanism", "composed", "exact_rate", "mechanism_of"]

_LEAST_STEPS, _MOST_STEPS = 20, 300
_MOST_ROUNDS = 30
_MOST_ROWS = 4000
_ROWS = 1000  # of a site of which only the coordinator's record is at hand


@dataclass(frozen=True)
class Mechanism:
    """What a site of the run did in each of its rounds.

    Args:
        noise_multiplier: Noise standard deviation over the clipping norm.
        rate: Probability with which a record is in a step; of an order, a batch over the rows.
        steps: Steps of a round.
        rounds: Rounds of the run.
        sampler: What draws the batches: ``poisson``, ``shuffled`` or ``full``.
        band: Over how many steps noise is correlated, at most; 0 where each has fresh noise.
    """

    noise_multiplier: float
    rate: float
    steps: int
    rounds: int
    sampler: Literal["poisson", "shuffled", "full"]
    band: int = 0

    @property
    def steps_a_pass(self) -> int:
        """Return in how many steps an order comes to its end."""
        return math.ceil(1 / exact_rate(self.rate))

    @property
    def passes(self) -> int:
        """Return the passes that a round begins: a record is in one step of each."""
        return math.ceil(self.steps / self.steps_a_pass)

    @property
    def event(self) -> Event:
        """Return what is charged for a round."""
        noise, rate, steps = self.noise_multiplier, self.rate, self.steps
        if self.band:
            planned = steps * self.rounds
            band = min(self.band, planned)
            return CorrelatedGaussian(noise, rate, steps, 0, planned, self.steps_a_pass, band)
        if self.sampler == "poisson":
            return SampledGaussian(noise, rate, steps)
        return OrderedGaussian(noise, rate, steps, self.passes, self.sampler)

    def shortened(self) -> Mechanism:
        """Return one with steps enough to measure noise and not more than can be waited for."""
        if _LEAST_STEPS <= self.rounds * self.steps <= _MOST_STEPS:
            return self
        rounds = min(self.rounds, _MOST_ROUNDS)
        steps = min(self.steps, max(1, _MOST_STEPS // rounds))
        return replace(
            self, steps=steps, rounds=max(rounds, math.ceil(_LEAST_STEPS / steps))
        )  # fmt: skip


def mechanism_of(claims: Claims) -> Mechanism:
    """Return what the site with the least noise did in a round, as its ledger has it.

    Where no ledger is at hand it is what a site of 1000 rows would have done.

    Args:
        claims: The run's.
    """
    # One without steps was a round that had been charged before.
    charged = [event for site in claims.sites for event in site.charged or () if event.steps]
    if charged:
        least = min(charged, key=lambda event: event.noise_multiplier)
        return Mechanism(
            least.noise_multiplier,
            least.sampling_rate,
            least.steps,
            claims.agreement.rounds,
            claims.record.sampler,
            least.band if isinstance(least, CorrelatedGaussian) else 0,
        )
    agreement, record = claims.agreement, claims.record
    training, rounds = agreement.task.training, agreement.rounds
    if record.is_shared:
        rate = record.sampling_rate or 1.0
        return Mechanism(agreement.noise_multiplier, rate, 1, rounds, record.sampler)
    sampler: Sampler = sampler_of(record.sampler, _ROWS, training.batch_size)
    if record.is_correlated:
        sampler = fixed_order(
            _ROWS, training.batch_size, training.epochs, training.steps, rounds,
            size=build_kit(agreement.task, agreement.seed).noised_size, band=record.band,
        )  # fmt: skip
    steps = steps_of(training, _ROWS, sampler)
    run = sampler.event(1.0, steps).times(rounds)
    noise = noise_multiplier_for(record.epsilon, record.delta, run)
    band = sampler.band if isinstance(sampler, FixedOrder) else 0
    return Mechanism(noise, sampler.rate, steps, rounds, record.sampler, band)


def composed(mechanism: Mechanism, delta: float) -> float:
    """Return the epsilon of all rounds, composed at once by Google's dp-accounting (PLD).

    It is asked directly and not through the accountant that is audited.

    Args:
        mechanism: What was done.
        delta: Delta of the guarantee.
    """
    import dp_accounting
    from dp_accounting import pld

    charged = mechanism.event.times(mechanism.rounds)
    grid = guarantee_of([charged], delta).grid  # whichever it is, the result is an upper bound
    accountant = pld.PLDAccountant(value_discretization_interval=grid)
    event = dp_accounting.GaussianDpEvent(mechanism.noise_multiplier)
    times = mechanism.steps
    if mechanism.band:  # all steps of all rounds are one
        accountant.compose(event)
        return float(accountant.get_epsilon(delta))
    if mechanism.sampler != "poisson":  # an order: no sampling counts
        times = mechanism.passes
    elif mechanism.rate < 1.0:
        event = dp_accounting.PoissonSampledDpEvent(mechanism.rate, event)
    accountant.compose(event, mechanism.rounds * times)
    return float(accountant.get_epsilon(delta))


def exact_rate(rate: float) -> Fraction:
    """Return a sampling rate as batch over rows, of no more rows than are worth making up."""
    exact = Fraction(min(1.0, rate)).limit_denominator(_MOST_ROWS)
    return exact or Fraction(1, _MOST_ROWS)
