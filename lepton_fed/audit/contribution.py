"""What one record can change of a step, noise off: at most the clipping norm.

The step is the training function's own, with noise zero and every row in the batch. A record's
contribution is the difference of the sums with it and without it, so that a row that is not clipped
shows wherever in the batch it stands. Weights and records are what a coordinator that chooses the
first, and an owner of the second, could come up with: all scales that float32 has, and mixtures.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lepton_fed.audit.canaries import Watch, made_up_targets
from lepton_fed.config.schema import RecordPrivacy
from lepton_fed.core.layout import Vector
from lepton_fed.errors import RunError
from lepton_fed.models.build import write_local, write_vector
from lepton_fed.privacy.dp.entropy import Entropy
from lepton_fed.privacy.dp.sampling import PoissonSampler
from lepton_fed.training.kit import TaskKit
from lepton_fed.training.local import LocalRows, Moment, PrivateTraining, train

__all__ = ["Contribution", "largest_contribution"]

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
    """

    norm: float
    tried: int
    record: str
    weights: str


def largest_contribution(
    kit: TaskKit, record: RecordPrivacy, draws: np.random.Generator, trained: Vector | None = None
) -> Contribution:
    """Measure the contributions of many records and return the largest.

    Args:
        kit: The kit of the run's task.
        record: The run's clipping norm and engine.
        draws: Makes records and weights up.
        trained: Weights of the run's final model, if it has one, ``[layout.size]`` float32.
    """
    kit = replace(kit, model=_without_dropout(kit.model))
    largest, tried = Contribution(0.0, 0, "", ""), 0
    for weights, vector in _weights(kit, draws, trained):
        inputs, kinds = _records(kit.shape, draws)
        targets = made_up_targets(kit.task, len(inputs), draws)
        every = np.arange(len(inputs))
        whole = _sum(kit, record, vector, inputs, targets)
        for one in every:
            rest = every != one
            alone = _sum(kit, record, vector, inputs[~rest], targets[~rest])
            others = _sum(kit, record, vector, inputs[rest], targets[rest])
            for change in (alone, whole - others):
                tried += 1
                norm = float(np.linalg.norm(change)) / record.clip
                # A sum that is not finite tells of the record whatever the noise is.
                norm = norm if np.isfinite(norm) else np.inf
                if norm > largest.norm:
                    largest = Contribution(norm, tried, kinds[one], weights)
    return replace(largest, tried=tried)


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


def _sum(
    kit: TaskKit,
    record: RecordPrivacy,
    weights: Vector,
    inputs: npt.NDArray[np.float32],
    targets: npt.NDArray[np.generic],
) -> npt.NDArray[np.float64]:
    """Return the sum of a step's clipped gradients as the training function makes it."""
    training = replace(kit.task.training, epochs=None, steps=1, batch_size=len(inputs))
    write_vector(kit.model, kit.layout, weights)
    write_local(kit.model, kit.initial_local)
    watch = Watch()
    shared = {entry.name for entry in kit.layout.of_rule("shared")}
    parameters = {n: p.detach() for n, p in kit.model.named_parameters() if n in shared}
    try:
        train(
            kit.model,
            kit.layout,
            LocalRows(torch.from_numpy(inputs), torch.from_numpy(targets)),
            replace(kit.task, training=training),
            watch,
            watch.begin(parameters, {}, {}),
            Moment(0, 1, 1, "audit"),
            devices=[_CPU],
            private=PrivateTraining(
                record.clip,
                0.0,
                Entropy.from_system(),
                PoissonSampler(len(inputs), len(inputs)),
                engine=record.engine,
                most_records=record.most_records,
            ),
        )
    except RunError:  # such weights follow from a sum that is not finite: that is the finding
        if not watch.steps:
            raise
    (gradient,) = watch.steps
    return gradient * len(inputs)
