"""The run's training once more, on made-up rows with canaries, watched from inside.

A site is built as in any run, from the run's task, clipping norm, noise, sampling rate and steps,
and asked for its rounds. What it says of epsilon is the claim that is audited; what its training
steps did to the canaries is what the claim is held against.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from lepton_fed.audit.canaries import CANARIES, Watch, canaried_kit, canaried_rows
from lepton_fed.clients.site import Site
from lepton_fed.config.agreement import Agreement
from lepton_fed.config.schema import Privacy, RecordPrivacy, StrategyConf
from lepton_fed.core.exchange import MODEL, Ask
from lepton_fed.data.dataset import Dataset
from lepton_fed.errors import Problem, RunError
from lepton_fed.privacy.dp.accounting import guarantee_of
from lepton_fed.privacy.dp.entropy import Entropy
from lepton_fed.privacy.dp.events import (
    CorrelatedGaussian,
    Event,
    OrderedGaussian,
    SampledGaussian,
)
from lepton_fed.privacy.dp.planning import fixed_order
from lepton_fed.privacy.dp.sampling import Sampler, sampler_of
from lepton_fed.privacy.factorisation.mechanism import BandedMechanism, FixedOrder
from lepton_fed.privacy.factorisation.toeplitz import square_root
from lepton_fed.strategies.base import DELTA
from lepton_fed.training.kit import TaskKit
from lepton_fed.training.local import LocalRows, Moment, PrivateTraining, train

__all__ = ["Mechanism", "Watched", "composed", "rehearse"]

_CPU = torch.device("cpu")
_LEAST_STEPS, _MOST_STEPS = 20, 300
_MOST_ROUNDS = 30
_MOST_SILENT = 50  # steps without noise: each shows exactly which canaries it took
_MOST_ROWS = 4000
_LARGEST_DELTA = 0.5  # times one over the rows: a site refuses more


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
        return math.ceil(1 / _exact(self.rate))

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


@dataclass(frozen=True)
class Watched:
    """What was seen of a training.

    Args:
        included: ``[canaries]``: which canaries were among the rows.
        noised: ``[steps, canaries]``: what each step gave each canary's weight, over the clipping
            norm: the noise, and 1 where the canary was in the step.
        silent: As ``noised``, of a training without noise.
        mechanism: What was to be done.
        noise_multiplier: What the site says of its noise.
        claimed: Epsilon the site says its records have spent.
        delta: Delta of that epsilon.
        undone: ``[steps, canaries]``: of noise that is correlated over steps, ``noised`` with the
            correlation undone; of a canary that was not in the data that is fresh noise.
    """

    included: npt.NDArray[np.bool_]
    noised: npt.NDArray[np.float64]
    silent: npt.NDArray[np.float64]
    mechanism: Mechanism
    noise_multiplier: float
    claimed: float
    delta: float
    undone: npt.NDArray[np.float64] | None = None

    @property
    def fresh(self) -> npt.NDArray[np.float64]:
        """Return what has noise of its own in each step, of the configured noise multiplier."""
        return self.noised if self.undone is None else self.undone


def rehearse(
    kit: TaskKit, record: RecordPrivacy, mechanism: Mechanism, folder: Path, canaries: int = 1000
) -> Watched:
    """Train as the run did, on made-up rows with canaries, and keep what was seen.

    Args:
        kit: The kit of the run's task.
        record: The run's clipping norm, delta and engine.
        mechanism: What to do in how many rounds.
        folder: Receives the ledger of this training.
        canaries: How many; each is among the rows with probability one half.

    Raises:
        RunError: LF5231, the site refused to train or answered without an update.
        LeptonError: The task does not go with record-level DP.
    """
    draws = np.random.default_rng()  # of the operating system: which canaries are in is a secret
    included = draws.random(canaries) < 0.5
    batch, rows = _sizes(mechanism.rate, canaries)
    mechanism = replace(mechanism, rate=batch / rows)
    training = replace(
        kit.task.training, epochs=None, steps=mechanism.steps, batch_size=batch
    )  # fmt: skip
    task = replace(kit.task, training=training, augmentation=[])
    audited = canaried_kit(kit, task, canaries)
    record = replace(
        record, enabled=True, sampler=mechanism.sampler, band=mechanism.band or None,
        delta=min(record.delta, _LARGEST_DELTA / rows),
    )  # fmt: skip
    # A little more, so that rounding does not let the plan take more noise than the run had.
    target = 1.0001 * composed(mechanism, record.delta)
    agreement = Agreement(
        "audit", task, StrategyConf(), mechanism.rounds, 1,
        Privacy(replace(record, epsilon=target)),
    )  # fmt: skip
    data = canaried_rows(kit, included, rows, draws)
    watch = Watch((CANARIES,))
    site = Site(
        "audit", audited, watch, data, data.take(np.arange(0)), agreement,
        devices=[_CPU], folder=folder,
    )  # fmt: skip
    try:
        claimed = _rounds(site, audited, agreement)
        noise_multiplier = site.noise_multiplier or 0.0
    finally:
        site.close()
    noised = _of_canaries(watch.steps, batch, record.clip)
    order = _order(audited, mechanism, rows) if mechanism.band else None
    return Watched(
        included,
        noised,
        _of_canaries(_silent(audited, record, data, mechanism), batch, record.clip),
        mechanism,
        noise_multiplier,
        claimed,
        record.delta,
        None if order is None else _whitened(noised, order.mechanism),
    )


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


def _sizes(rate: float, canaries: int) -> tuple[int, int]:
    """Return batch and rows that have the sampling rate and room for the canaries."""
    exact = _exact(rate)
    times = math.ceil(canaries / exact.denominator)
    return exact.numerator * times, exact.denominator * times


def _exact(rate: float) -> Fraction:
    """Return the rate as batch over rows, of no more rows than are worth making up."""
    exact = Fraction(min(1.0, rate)).limit_denominator(_MOST_ROWS)
    return exact or Fraction(1, _MOST_ROWS)


def _rounds(site: Site, kit: TaskKit, agreement: Agreement) -> float:
    """Ask a site for all its rounds and return the epsilon it says they cost."""
    model, claimed = kit.initial, 0.0
    for number in range(1, agreement.rounds + 1):
        ask = Ask(agreement.digest, kit.layout.digest, number, True, False, {MODEL: model})
        reply = site.answer(ask)
        if reply.refusal is not None or reply.update is None or reply.epsilon is None:
            code = reply.refusal.code if reply.refusal else "no update"
            raise RunError(
                Problem("LF5231", f"the audit's own training was refused ({code})",
                        where=f"round {number}", remedy="see what the site's log says above")
            )  # fmt: skip
        model = model + reply.update.vectors[DELTA]
        claimed = reply.epsilon
    return claimed


def _silent(
    kit: TaskKit, record: RecordPrivacy, data: Dataset, mechanism: Mechanism
) -> Sequence[npt.NDArray[np.float64]]:
    """Return what steps without noise gave the canaries: who was in which, and how much of it."""
    watch = Watch((CANARIES,))
    rows = LocalRows(torch.from_numpy(data.inputs), torch.from_numpy(data.targets))
    steps = min(_MOST_SILENT, mechanism.steps * mechanism.rounds)
    training = replace(kit.task.training, steps=steps)
    sampler: Sampler = sampler_of(mechanism.sampler, len(data), training.batch_size)
    if mechanism.band:
        sampler = _order(kit, mechanism, len(data))
    train(
        kit.model,
        kit.layout,
        rows,
        replace(kit.task, training=training),
        watch,
        watch.begin({CANARIES: kit.model.get_parameter(CANARIES)}, {}, {}),
        Moment(1, 1, 1, "audit"),
        devices=[_CPU],
        private=PrivateTraining(
            record.clip,
            0.0,
            Entropy.from_system(),
            sampler,
            engine=record.engine,
            most_records=record.most_records,
        ),
    )
    return watch.steps


def _order(kit: TaskKit, mechanism: Mechanism, rows: int) -> FixedOrder:
    """Return the order that a site takes its batches in, with correlated noise."""
    return fixed_order(
        rows, kit.task.training.batch_size, None, mechanism.steps, mechanism.rounds,
        size=kit.noised_size, band=mechanism.band,
    )  # fmt: skip


def _whitened(
    noised: npt.NDArray[np.float64], mechanism: BandedMechanism
) -> npt.NDArray[np.float64]:
    """Return ``C`` times what steps gave, over the sensitivity: of noise, fresh noise."""
    coefficients = square_root(mechanism.band)
    fresh = np.zeros_like(noised)
    for back, coefficient in enumerate(coefficients):
        fresh[back:] += coefficient * noised[: len(noised) - back]
    return fresh / mechanism.sensitivity


def _of_canaries(
    steps: Sequence[npt.NDArray[np.float64]], batch: int, clip: float
) -> npt.NDArray[np.float64]:
    """Return what steps gave the canaries' weights over the clipping norm, ``[steps, canaries]``.

    A canary's own gradient is negative: its target is what its weight pushes towards.
    """
    return -batch / clip * np.stack(steps)
