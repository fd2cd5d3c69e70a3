"""Everything a party builds once from a task: preprocessing, model, layout and metrics plan.

Coordinator and sites build the same kit from the same task and seed; that they did is checked by
digest.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lepton_fed.core.layout import Layout, Vector
from lepton_fed.core.metrics import MetricsPlan
from lepton_fed.core.seeds import derive_seed
from lepton_fed.core.task import Task
from lepton_fed.data.augmentation import build_augmentation
from lepton_fed.data.dataset import Dataset
from lepton_fed.data.preprocessing import build_preprocessing
from lepton_fed.errors import DataError, Problem
from lepton_fed.models.build import (
    build_model,
    frozen_buffers,
    layout_of,
    local_tensors,
    read_vector,
    write_local,
    write_vector,
)
from lepton_fed.models.private_layers import plain_layers
from lepton_fed.training.local import Augment, LocalRows
from lepton_fed.training.numeric import numeric_settings

__all__ = ["TaskKit", "build_kit"]


@dataclass(frozen=True)
class TaskKit:
    """What a task amounts to on this machine.

    Args:
        task: The task.
        preprocessing: From rows as read to the model's inputs.
        shape: Shape of one of those inputs.
        augment: Random changes of training images; None when there are none.
        model: The model, on the CPU; its weights are scratch space.
        layout: The model's layout.
        plan: What is counted in an evaluation.
        initial: The model before the first round, ``[layout.size]`` float32.
        initial_local: Tensors that stay at their site, as they are before its first round.
        frozen_buffers: Buffers that no training may change.
    """

    task: Task
    preprocessing: nn.Sequential
    shape: tuple[int, ...]
    augment: Augment | None
    model: nn.Module
    layout: Layout
    plan: MetricsPlan
    initial: Vector
    initial_local: Mapping[str, npt.NDArray[np.generic]]
    frozen_buffers: Mapping[str, npt.NDArray[np.generic]]
    _copies: dict[torch.device, nn.Module] = field(default_factory=dict, repr=False, compare=False)

    @property
    def noised_size(self) -> int:
        """Return the coordinates of a gradient: all that is trained, also what stays at a site."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def model_on(self, device: torch.device) -> nn.Module:
        """Return the scratch model of a device: :attr:`model` itself, or a copy made once."""
        if device.type == "cpu":
            return self.model
        if device not in self._copies:
            self._copies[device] = copy.deepcopy(self.model).to(device)
        return self._copies[device]

    def prepare(self, data: Dataset, device: torch.device) -> LocalRows:
        """Preprocess rows and put them on a device.

        Args:
            data: Rows as read; checked against the contract.
            device: Where they are trained on.

        Raises:
            DataError: A row is not finite after preprocessing.
        """
        cpu = torch.device("cpu")
        with numeric_settings(self.task.numeric, cpu), torch.no_grad():
            inputs = self.preprocessing(torch.from_numpy(np.ascontiguousarray(data.inputs)))
        broken = int((~inputs.flatten(1).isfinite().all(dim=1)).sum())
        if broken:
            raise DataError(
                Problem(
                    "LF2040",
                    f"preprocessing makes NaN or infinity of {broken} of {len(inputs)} rows",
                    key="task.preprocessing",
                    remedy="check the constants of its steps; impute missing numbers",
                )
            )
        targets = torch.from_numpy(np.ascontiguousarray(data.targets))
        return LocalRows(inputs.to(device), targets.to(device))

    def predictor(self, vector: Vector) -> nn.Sequential:
        """Return preprocessing and model as one module, for export.

        Args:
            vector: Weights, ``[layout.size]`` float32.

        Returns:
            An evaluation-mode module from rows as read to logits ``[batch, classes]`` or values
            ``[batch]``, of torch's own layers where record-level DP had others.

        Raises:
            TaskError: A layer for record-level DP has no other that answers the same.
        """
        write_vector(self.model, self.layout, vector)
        write_local(self.model, self.initial_local)
        model = self.model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        parts = [self.preprocessing, plain_layers(model)]
        if self.task.data.target.kind == "number":
            parts.append(nn.Flatten(0))
        return nn.Sequential(*parts).eval()


def build_kit(task: Task, seed: int) -> TaskKit:
    """Build a task's kit.

    Args:
        task: The task.
        seed: Seed of the run; gives the initial weights.

    Raises:
        ConfError: A name or argument in the task is wrong.
        TaskError: The task cannot be trained as written.
    """
    preprocessing, shape = build_preprocessing(task)
    model = build_model(task, shape, derive_seed(seed, "init"))
    layout = layout_of(model, task.model)
    return TaskKit(
        task=task,
        preprocessing=preprocessing,
        shape=shape,
        augment=build_augmentation(task) if task.augmentation else None,
        model=model,
        layout=layout,
        plan=MetricsPlan.of(task),
        initial=read_vector(model, layout),
        initial_local=local_tensors(model, layout),
        frozen_buffers=frozen_buffers(model, layout),
    )
