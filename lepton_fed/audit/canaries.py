"""Canaries: records whose gradient has a place of its own, so that what happens to them shows.

They are gradient-space (Dirac) canaries (M. Nasr et al.: Tight Auditing of Differentially Private
Machine Learning. USENIX Security 2023). The audited model is the run's own with one linear layer
beside it that has a weight for each canary and pushes an output by what is then subtracted again:
the outputs are those of the run's model, the gradient of a canary is that of its weight, and large
enough to be clipped to the clipping norm. No other record ever touches that weight. What training
makes of it goes through the same sampler, engine, noise, optimiser and accountant as all else.

Nor does any record move the rest of the model: the gradients of its outputs are damped on their way
there. So what a step gives the run's own tensors is noise alone, and each has to have it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lepton_fed.core.layout import Vector
from lepton_fed.core.task import ModelSpec, Task
from lepton_fed.data.dataset import Dataset
from lepton_fed.models.build import frozen_buffers, layout_of, local_tensors, read_vector
from lepton_fed.strategies.base import DELTA, SiteState, Tensors
from lepton_fed.training.kit import TaskKit

__all__ = [
    "CANARIES",
    "LEADING",
    "Canaried",
    "Watch",
    "canaried_kit",
    "canaried_rows",
    "made_up_targets",
    "some_of",
]

LEADING = 64
"""So many first elements of a tensor are always kept: see :func:`some_of`."""

CANARIES = "canaries.weight"
"""Name of the tensor with a weight for each canary."""

_PUSH = 1e6  # times the rest of a canary's gradient: of the clipped one nothing else is left
_DAMPED = 1e-9  # a thousand clipped records are less than a thousandth of any noise
_MOST_ELEMENTS = 256  # of each of the run's own tensors, that are kept of a step
_FAR = 1e3  # a canary's target, of a task that predicts a number: always on the same side


class Canaried(nn.Module):
    """A model, and beside it a weight for each canary.

    Args:
        model: From ``[batch, *shape]`` to ``[batch, outputs]``.
        shape: Shape of one of its inputs.
        outputs: Width of its last layer.
        canaries: How many.

    Inputs are ``[batch, prod(shape) + canaries]``: a record, flat, and a 1 where it is a canary.
    """

    first: Tensor

    def __init__(
        self, model: nn.Module, shape: tuple[int, ...], outputs: int, canaries: int
    ) -> None:
        super().__init__()
        self.model = model
        self._shape = shape
        with torch.device("meta"):  # drawing weights would move torch's global generator
            self.canaries = nn.Linear(canaries, 1, bias=False)
        self.canaries.weight = nn.Parameter(torch.zeros(1, canaries))
        self.register_buffer("first", torch.eye(1, outputs), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the model's outputs; their gradient reaches the canaries' weights too."""
        width = math.prod(self._shape)
        outputs: Tensor = self.model(inputs[:, :width].reshape(-1, *self._shape))
        pushed = self.canaries(_PUSH * inputs[:, width:])
        silent = outputs.detach() + _DAMPED * (outputs - outputs.detach())
        whole: Tensor = silent + (pushed - pushed.detach()) * self.first
        return whole


@dataclass
class Watch:
    """A strategy's site half that changes nothing and keeps what each step was given.

    Args:
        names: Tensors whose gradients are kept whole.
        steps: Of each step the gradients, ``[elements]`` float64, clipped, summed, noised and
            divided by the expected batch.
        others: The same of some elements of each other tensor that is shared, by name.
    """

    names: Sequence[str] = ()
    steps: list[npt.NDArray[np.float64]] = field(default_factory=list)
    others: dict[str, list[npt.NDArray[np.float64]]] = field(default_factory=dict)
    vectors: Sequence[str] = (DELTA,)
    _parts: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)

    def begin(self, start: Tensors, received: Mapping[str, Vector], state: SiteState) -> object:
        """Remember which tensors are kept whole."""
        del received, state
        return [name for name in start if name in self.names]

    def loss(self, memory: object, parameters: Tensors) -> Tensor | None:
        """Add nothing to the loss."""
        del memory, parameters
        return None

    def gradient(self, memory: object, name: str, parameter: Tensor, gradient: Tensor) -> Tensor:
        """Keep the gradient, and leave it as it is."""
        del parameter
        wanted = memory if isinstance(memory, list) else []
        flat = gradient.detach().flatten().double().cpu().numpy()
        if name not in wanted:
            self.others.setdefault(name, []).append(flat[some_of(flat.size)])
            return gradient
        self._parts[name] = flat
        if len(self._parts) == len(wanted):
            self.steps.append(np.concatenate([self._parts[each] for each in wanted]))
            self._parts.clear()
        return gradient

    def update(
        self, memory: object, delta: Vector, steps: int, learning_rate: float
    ) -> tuple[Mapping[str, Vector], SiteState]:
        """Send the difference, keep nothing."""
        del memory, steps, learning_rate
        return {DELTA: delta}, {}


def some_of(size: int) -> npt.NDArray[np.int64]:
    """Return which elements of a tensor are kept: the first ones, and others evenly spread.

    Args:
        size: Elements of the tensor.

    Returns:
        ``[elements]``, rising; of two tensors the first :data:`LEADING` are the same.
    """
    spread = np.linspace(0, size - 1, min(size, _MOST_ELEMENTS)).round().astype(np.int64)
    return np.union1d(np.arange(min(size, LEADING)), spread)


def canaried_kit(kit: TaskKit, task: Task, canaries: int) -> TaskKit:
    """Return a task's kit with canaries beside its model.

    Args:
        kit: The kit of the run's task; its model becomes a part of the new one.
        task: The task to train: the run's, with the audit's own batches and steps.
        canaries: How many.
    """
    model = Canaried(kit.model, kit.shape, task.outputs, canaries)
    # The canaries' weights are shared, whatever the run's patterns say of its own tensors.
    local = [name for name, _ in kit.model.named_parameters()] + [
        name for name, _ in kit.model.named_buffers()
    ]
    patterns = kit.task.model.local
    kept = [f"model.{n}" for n in local if any(fnmatchcase(n, p) for p in patterns)]
    layout = layout_of(model, ModelSpec(local=kept))
    return replace(
        kit,
        task=task,
        preprocessing=nn.Sequential(),
        shape=(math.prod(kit.shape) + canaries,),
        augment=None,
        model=model,
        layout=layout,
        initial=read_vector(model, layout),
        initial_local=local_tensors(model, layout),
        frozen_buffers=frozen_buffers(model, layout),
        _copies={},
    )


def canaried_rows(
    kit: TaskKit, included: npt.NDArray[np.bool_], rows: int, draws: np.random.Generator
) -> Dataset:
    """Return made-up rows among which are the included canaries.

    Args:
        kit: The kit of the run's task.
        included: ``[canaries]``: which are in.
        rows: How many rows, canaries among them.
        draws: Makes the others up.

    Returns:
        Inputs ``[rows, prod(shape) + canaries]`` float32, in an order that says nothing.
    """
    inside = np.flatnonzero(included)
    width = math.prod(kit.shape)
    inputs = np.zeros((rows, width + len(included)), np.float32)
    inputs[:, :width] = draws.standard_normal((rows, width), np.float32)
    targets = made_up_targets(kit.task, rows, draws)
    inputs[np.arange(len(inside)), width + inside] = 1.0
    targets[: len(inside)] = 0 if targets.dtype == np.int64 else _FAR
    order = draws.permutation(rows)
    return Dataset(inputs[order], targets[order])


def made_up_targets(task: Task, rows: int, draws: np.random.Generator) -> npt.NDArray[np.generic]:
    """Return random targets, ``[rows]``: int64 class codes or float32 numbers."""
    if task.data.target.kind == "classes":
        return draws.integers(0, task.outputs, rows)
    return draws.standard_normal(rows, np.float32)
