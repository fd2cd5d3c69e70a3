"""What one record can change of a step, noise off: at most the clipping norm.

Where sites share the noise it is added to whole numbers, so what counts there is what one record
changes of the rounded sum: the clipping norm, and a step of the grid in each coordinate.

The step is the training function's own, with noise zero and every row in the batch. A record's
contribution is the difference of the sums with it and without it, so that a row that is not clipped
shows wherever in the batch it stands. Weights and records are what a coordinator that chooses the
first, and an owner of the second, could come up with: all scales that float32 has, and mixtures.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lepton_fed.audit.canaries import made_up_targets
from lepton_fed.audit.received import MaskedSum
from lepton_fed.clients.one_step import OneStep
from lepton_fed.config.agreement import Agreement
from lepton_fed.core.layout import Layout, Vector
from lepton_fed.core.norms import clipped
from lepton_fed.errors import RunError
from lepton_fed.models.build import write_local, write_vector
from lepton_fed.privacy.dp.entropy import Entropy
from lepton_fed.privacy.dp.sampling import PoissonSampler
from lepton_fed.strategies.base import PlainSite
from lepton_fed.training.kit import TaskKit
from lepton_fed.training.local import LocalRows, Moment, PrivateTraining, train

__all__ = ["Contribution", "largest_contribution"]

_ROUNDING = 1e-5  # what a clipped gradient may exceed the norm by: its factor is rounded
_CPU = torch.device("cpu")
_SCALES = (1e-30, 1e-6, 1.0, 1.0, 1.0, 1e3, 1e10, 1e19, 3e37)
_WEIGHT_SCALES = (0.0, 1e-4, 1.0, 1e3, 1e18)


@dataclass(frozen=True)
class Contribution:
    """The largest contribution of a record that was found.

    Args:
        norm: Its Euclidean norm over the clipping norm.
        tried: How many contributions were measured.
        record: Which kind of record it was.
        weights: Which kind of weights the model had.
        rounded: The most that a record moved the rounded sum, over what is accounted for; None
            where nothing is rounded.
    """

    norm: float
    tried: int
    record: str
    weights: str
    rounded: float | None = None


@dataclass(frozen=True)
class _Ring:
    """How the sites of a run round the steps that they share noise for.

    Args:
        sums: How a step is encoded.
        moves: The most that a record may move the sum before it is rounded, in the update's unit.
        bound: Norm to which a site clips its update.
        rate: The site's learning rate.
        divisor: What the sum is divided by.
    """

    sums: MaskedSum
    moves: float
    bound: float
    rate: float
    divisor: int

    @classmethod
    def of(cls, kit: TaskKit, agreement: Agreement) -> _Ring:
        """Return that of a run."""
        training = kit.task.training
        moves = training.learning_rate * agreement.privacy.record.clip / training.batch_size
        sums = MaskedSum(agreement, kit.layout)
        bound = agreement.task.aggregation.norm_bound
        return cls(sums, moves, bound, training.learning_rate, training.batch_size)

    def rounded(self, step: OneStep, layout: Layout) -> npt.NDArray[np.int64]:
        """Return a step as a site encodes it, noise off, in steps of the grid."""
        delta, norm = clipped(step.delta(layout, self.rate, self.divisor), self.bound)
        # What is not finite is refused by the site that it is made at.
        return self.sums.noiseless(delta if np.isfinite(norm) else np.zeros_like(delta))

    def share_of_allowed(self, change: npt.NDArray[np.int64]) -> float:
        """Return what a record changed of the rounded sum, over what is accounted for."""
        allowed = self.moves / self.sums.grid * (1 + _ROUNDING) + math.sqrt(change.size)
        return float(np.linalg.norm(change.astype(np.float64))) / allowed


def largest_contribution(
    kit: TaskKit, agreement: Agreement, draws: np.random.Generator, trained: Vector | None = None
) -> Contribution:
    """Measure the contributions of many records and return the largest.

    Args:
        kit: The kit of the run's task.
        agreement: The run's clipping norm and engine, and how its sums are encoded.
        draws: Makes records and weights up.
        trained: Weights of the run's final model, if it has one, ``[layout.size]`` float32.
    """
    kit = replace(kit, model=_without_dropout(kit.model))
    ring = _Ring.of(kit, agreement) if agreement.privacy.record.is_shared else None
    largest, tried = Contribution(0.0, 0, "", ""), 0
    rounded = 0.0 if ring else None
    for weights, vector in _weights(kit, draws, trained):
        inputs, kinds = _records(kit.shape, draws)
        targets = made_up_targets(kit.task, len(inputs), draws)
        every = np.arange(len(inputs))
        take = partial(_step, kit, agreement, vector)
        whole = take(inputs, targets)
        for one in every:
            rest = every != one
            alone, others = take(inputs[~rest], targets[~rest]), take(inputs[rest], targets[rest])
            for with_it, without in ((alone, None), (whole, others)):
                tried += 1
                norm = _moved(kit, agreement, with_it, without)
                if norm > largest.norm:
                    largest = Contribution(norm, tried, kinds[one], weights)
                if ring is not None and rounded is not None:
                    change = ring.rounded(with_it, kit.layout)
                    if without is not None:
                        change = change - ring.rounded(without, kit.layout)
                    rounded = max(rounded, ring.share_of_allowed(change))
    return replace(largest, tried=tried, rounded=rounded)


def _moved(kit: TaskKit, agreement: Agreement, with_it: OneStep, without: OneStep | None) -> float:
    """Return the norm of what a record adds to the sum, over the clipping norm."""
    change = with_it.delta(kit.layout, 1.0, 1)
    if without is not None:
        change -= without.delta(kit.layout, 1.0, 1)
    norm = float(np.linalg.norm(change)) / agreement.privacy.record.clip
    # A sum that is not finite tells of the record whatever the noise is.
    return norm if np.isfinite(norm) else np.inf


def _without_dropout(model: nn.Module) -> nn.Module:
    """Return a copy that drops nothing: what others draw would pass for a record's contribution."""
    other = copy.deepcopy(model)
    for module in other.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return other


def _weights(
    kit: TaskKit, draws: np.random.Generator, trained: Vector | None
) -> Iterator[tuple[str, Vector]]:
    yield "as initialised", kit.initial
    if trained is not None:
        yield "as trained", trained
    for scale in _WEIGHT_SCALES:
        random = draws.standard_normal(kit.layout.size, np.float32)
        yield f"random, times {scale:g}", random * np.float32(scale)


def _records(
    shape: tuple[int, ...], draws: np.random.Generator
) -> tuple[npt.NDArray[np.float32], list[str]]:
    """Return records of every scale, and what they are."""
    rows = [draws.standard_normal(shape, np.float32).clip(-10, 10) * np.float32(s) for s in _SCALES]
    kinds = [f"random, times {scale:g}" for scale in _SCALES]
    lone = np.zeros(shape, np.float32)
    lone.flat[int(draws.integers(lone.size))] = 1e15
    rows += [np.zeros(shape, np.float32), np.ones(shape, np.float32), lone]
    kinds += ["all zero", "all one", "one number of 1e15"]
    return np.stack(rows), kinds


def _step(
    kit: TaskKit,
    agreement: Agreement,
    weights: Vector,
    inputs: npt.NDArray[np.float32],
    targets: npt.NDArray[np.generic],
) -> OneStep:
    """Return a step of all these records as the training function makes it, without noise."""
    record = agreement.privacy.record
    training = replace(kit.task.training, epochs=None, steps=1)
    write_vector(kit.model, kit.layout, weights)
    write_local(kit.model, kit.initial_local)
    step = OneStep.of(kit.model)
    try:
        train(
            kit.model,
            kit.layout,
            LocalRows(torch.from_numpy(inputs), torch.from_numpy(targets)),
            replace(kit.task, training=training),
            PlainSite(),
            None,
            Moment(0, 1, 1, "audit"),
            devices=[_CPU],
            private=PrivateTraining(
                record.clip,
                0.0,
                Entropy.from_system(),
                PoissonSampler(len(inputs), training.batch_size, given_rate=1.0),
                engine=record.engine,
                most_records=record.most_records,
                other_noise=step,
            ),
        )
    except RunError:  # such weights follow from a sum that is not finite: that is the finding
        if not step.sums:
            raise
    return step
