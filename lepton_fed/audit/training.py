"""The run's training once more, on made-up rows with canaries, watched from inside.

A site is built as in any run, from the run's task, clipping norm, noise, sampling rate and steps,
and asked for its rounds. What it says of epsilon is the claim that is audited; what its training
steps did to the canaries is what the claim is held against.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from lepton_fed.audit.canaries import CANARIES, Watch, canaried_kit, canaried_rows
from lepton_fed.audit.mechanism import Mechanism, composed, exact_rate
from lepton_fed.audit.shares import HonestSum
from lepton_fed.clients.site import Site
from lepton_fed.config.agreement import Agreement
from lepton_fed.config.schema import Privacy, SecureAggregation, StrategyConf
from lepton_fed.core.exchange import MODEL, Ask
from lepton_fed.data.dataset import Dataset
from lepton_fed.errors import Problem, RunError
from lepton_fed.privacy.dp.entropy import Entropy
from lepton_fed.privacy.dp.shared import shared_noise
from lepton_fed.privacy.factorisation.mechanism import BandedMechanism, FixedOrder
from lepton_fed.privacy.factorisation.toeplitz import square_root
from lepton_fed.strategies.base import DELTA, PlainSite
from lepton_fed.training.kit import TaskKit
from lepton_fed.training.local import LocalRows, Moment, PrivateTraining, train
from lepton_fed.training.noise import plan_noise

__all__ = ["Watched", "rehearse"]

_CPU = torch.device("cpu")
_MOST_SILENT = 50  # steps without noise: each shows exactly which canaries it took
_LARGEST_DELTA = 0.5  # times one over the rows: a site refuses more


@dataclass(frozen=True)
class Watched:
    """What was seen of a training.

    Args:
        included: ``[canaries]``: which canaries were among the rows.
        noised: ``[steps, canaries]``: what each step gave each canary's weight, over the clipping
            norm: the noise, and 1 where the canary was in the step.
        silent: As ``noised``, of a training without noise.
        mechanism: What was to be done.
        noise: Standard deviation that the noise is to have, over the clipping norm.
        claimed: Epsilon the site says its records have spent.
        delta: Delta of that epsilon.
        shares: ``[sites, steps]``: root mean square, over the clipping norm, of what each site's
            share gave canaries that are in no site's data; ``[0, 0]`` where sites share no noise.
        undone: ``[steps, canaries]``: of noise that is correlated over steps, ``noised`` with the
            correlation undone; of a canary that was not in the data that is fresh noise.
        elsewhere: As ``fresh``, of some elements of each of the run's own tensors, ``[steps,
            elements]`` by name: no record moves them here.
    """

    included: npt.NDArray[np.bool_]
    noised: npt.NDArray[np.float64]
    silent: npt.NDArray[np.float64]
    mechanism: Mechanism
    noise: float
    claimed: float
    delta: float
    shares: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))
    undone: npt.NDArray[np.float64] | None = None
    elsewhere: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)

    @property
    def fresh(self) -> npt.NDArray[np.float64]:
        """Return what has noise of its own in each step, of the configured noise multiplier."""
        return self.noised if self.undone is None else self.undone


def rehearse(
    kit: TaskKit,
    run: Agreement,
    mechanism: Mechanism,
    folder: Path,
    *,
    canaries: int = 1000,
    honest: int = 0,
) -> Watched:
    """Train as the run did, on made-up rows with canaries, and keep what was seen.

    Args:
        kit: The kit of the run's task.
        run: The run's clipping norm, delta, engine, and how its sums are made.
        mechanism: What to do in how many rounds.
        folder: Receives the ledger of this training.
        canaries: How many; each is among the rows with probability one half.
        honest: How many sites add a share of the noise; 0 where each adds all of it.

    Raises:
        RunError: LF5231, the site refused to train or answered without an update.
        LeptonError: The task does not go with record-level DP.
    """  # fmt: skip
    draws = np.random.default_rng()  # of the operating system: which canaries are in is a secret
    included = draws.random(canaries) < 0.5
    shared = run.privacy.record.is_shared
    if shared:  # rate and divisor are the run's, whatever a site holds
        batch, rows = kit.task.training.batch_size, canaries
    else:
        batch, rows = _sizes(mechanism.rate, canaries)
        mechanism = replace(mechanism, rate=batch / rows)
    training = replace(
        kit.task.training, epochs=None, steps=mechanism.steps, batch_size=batch
    )  # fmt: skip
    task = replace(kit.task, training=training, augmentation=[])
    audited = canaried_kit(kit, task, canaries)
    record = replace(
        run.privacy.record, sampler=mechanism.sampler, band=mechanism.band or None,
        delta=min(run.privacy.record.delta, _LARGEST_DELTA / rows),
    )  # fmt: skip
    # A little more, so that rounding does not let the plan take more noise than the run had.
    target = 1.0001 * composed(mechanism, record.delta)
    record = replace(record, epsilon=target)
    secure = run.privacy.secure_aggregation if shared else SecureAggregation()
    agreement = Agreement(
        "audit", task, StrategyConf(), mechanism.rounds, 1, Privacy(record, [], secure),
        run.cohort if shared else 1, mechanism.noise_multiplier if shared else 0.0,
    )  # fmt: skip
    data = canaried_rows(kit, included, rows, draws)
    watch = Watch((CANARIES,))
    ring = HonestSum(agreement, audited, included, honest) if shared else None
    site = Site(
        "audit", audited, PlainSite() if ring else watch, data, data.take(np.arange(0)), agreement,
        devices=[_CPU], folder=folder,
    )  # fmt: skip
    try:
        claimed = _rounds(site, audited, agreement, ring)
    finally:
        site.close()
    silent = _of_canaries(_silent(audited, agreement, data), batch, record.clip)
    if ring is not None:
        return Watched(
            included, np.stack(ring.canaries), silent, mechanism,
            ring.noise(mechanism.noise_multiplier), claimed, record.delta, np.array(ring.shares).T,
            elsewhere={name: np.stack(steps) for name, steps in ring.others.items()},
        )  # fmt: skip
    noised = _of_canaries(watch.steps, batch, record.clip)
    noise = mechanism.noise_multiplier
    elsewhere = {n: _of_canaries(steps, batch, record.clip) for n, steps in watch.others.items()}
    undone = None
    if isinstance(order := plan_noise(audited, record, rows, agreement.rounds).sampler, FixedOrder):
        undone = _whitened(noised, order.mechanism)
        elsewhere = {name: _whitened(one, order.mechanism) for name, one in elsewhere.items()}
    return Watched(
        included, noised, silent, mechanism, noise, claimed, record.delta, undone=undone,
        elsewhere=elsewhere,
    )  # fmt: skip


def _sizes(rate: float, canaries: int) -> tuple[int, int]:
    """Return batch and rows that have the sampling rate and room for the canaries."""
    exact = exact_rate(rate)
    times = math.ceil(canaries / exact.denominator)
    return exact.numerator * times, exact.denominator * times


def _rounds(site: Site, kit: TaskKit, agreement: Agreement, ring: HonestSum | None) -> float:
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
        delta = ring.add(ask, reply) if ring else reply.update.vectors[DELTA]
        model = model + delta
        claimed = reply.epsilon
    return claimed


def _silent(kit: TaskKit, agreement: Agreement, data: Dataset) -> Sequence[npt.NDArray[np.float64]]:
    """Return what steps without noise gave the canaries: who was in which, and how much of it.

    The sampler is the one that the site plans.
    """
    watch = Watch((CANARIES,))
    record, rounds = agreement.privacy.record, agreement.rounds
    rows = LocalRows(torch.from_numpy(data.inputs), torch.from_numpy(data.targets))
    plan = plan_noise(kit, record, len(data), rounds, shared_noise(agreement, kit.layout.size))
    training = replace(kit.task.training, steps=min(_MOST_SILENT, plan.steps * rounds))
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
            plan.sampler,
            engine=record.engine,
            most_records=record.most_records,
        ),
    )
    return watch.steps


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
