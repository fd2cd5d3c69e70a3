"""From a task to a model, and between a model and its flat vector."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lepton_fed.config import plugins
from lepton_fed.core.layout import Layout, Rule, Vector
from lepton_fed.core.task import ModelSpec, Task
from lepton_fed.errors import Problem, TaskError

__all__ = [
    "build_model",
    "layout_of",
    "local_tensors",
    "read_vector",
    "write_local",
    "write_vector",
]

_LARGEST = 500_000_000  # beyond it an update is gigabytes a round: train an adapter instead


def build_model(task: Task, shape: tuple[int, ...], seed: int) -> nn.Module:
    """Build a task's model and initialise it from ``seed``.

    Module constructors draw from torch's global generator and take no other; it is put aside,
    seeded, and put back, so that nothing outside sees the difference.

    Args:
        task: The task.
        shape: Shape of one example after preprocessing.
        seed: Seed of the initial weights.

    Returns:
        A module from ``[batch, *shape]`` to ``[batch, task.outputs]`` on the CPU, float32.

    Raises:
        ConfError: The model is not installed or an argument does not fit its signature.
        TaskError: The model refuses its arguments, or is too large to train in full.
    """
    key = "task.model"
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            built = plugins.call(
                "models",
                task.model.name,
                task.model.arguments,
                key=f"{key}.arguments",
                shape=shape,
                outputs=task.outputs,
            )
        except ValueError as error:
            raise TaskError(
                Problem("LF3001", str(error), key=f"{key}.arguments", remedy=_EXPLAIN)
            ) from error
    if not isinstance(built, nn.Module):
        raise TaskError(
            Problem("LF3002", f"model {task.model.name!r} is not a torch module", key=f"{key}.name")
        )
    _apply_rules(built, task.model)
    trained = sum(p.numel() for p in built.parameters() if p.requires_grad)
    if trained > _LARGEST:
        raise TaskError(
            Problem(
                "LF3003",
                f"the model has {trained:,} trainable parameters; the limit is {_LARGEST:,}",
                key=f"{key}.arguments",
                remedy="freeze the base and train an adapter (LoRA), or take a smaller model",
            )
        )
    return built


_EXPLAIN = "lepton-fed config explain task.model.arguments shows what it takes"


def _apply_rules(model: nn.Module, spec: ModelSpec) -> None:
    names = [name for name, _ in model.named_parameters()]
    for key, patterns in (("frozen", spec.frozen), ("local", spec.local)):
        for index, pattern in enumerate(patterns):
            if not any(fnmatchcase(name, pattern) for name in names):
                raise TaskError(
                    Problem(
                        "LF3004",
                        f"pattern {pattern!r} matches no tensor of the model",
                        key=f"task.model.{key}[{index}]",
                        remedy=f"its tensors are {', '.join(names[:12])}",
                    )
                )
    for name, parameter in model.named_parameters():
        if any(fnmatchcase(name, pattern) for pattern in spec.frozen):
            parameter.requires_grad_(False)


def layout_of(model: nn.Module, spec: ModelSpec) -> Layout:
    """Return the layout of a model.

    Trainable parameters are shared; those that match ``spec.local`` are local; parameters that are
    not trained are frozen. A buffer is local when it is a running statistic (training changes it),
    so that it keeps its element type and never meets an average.

    Args:
        model: The model.
        spec: Which tensors the task makes local.

    Raises:
        TaskError: A shared tensor is not float32, or nothing is shared.
    """
    entries: list[tuple[str, Rule, npt.NDArray[np.generic]]] = []
    for name, parameter in model.named_parameters():
        rule: Rule = "shared" if parameter.requires_grad else "frozen"
        if any(fnmatchcase(name, pattern) for pattern in spec.local):
            rule = "local"
        entries.append((name, rule, parameter.detach().cpu().numpy()))
    state = model.state_dict()
    buffers = [name for name, _ in model.named_buffers() if name in state]
    entries += [(name, "local", state[name].cpu().numpy()) for name in buffers]
    try:
        layout = Layout.of(entries)
    except ValueError as error:
        raise TaskError(Problem("LF3005", str(error), key="task.model")) from error
    if layout.size == 0:
        raise TaskError(
            Problem("LF3006", "the model shares no tensor, so there is nothing to train together",
                    key="task.model", remedy="make fewer tensors local or frozen")
        )  # fmt: skip
    return layout


def read_vector(model: nn.Module, layout: Layout) -> Vector:
    """Return the model's shared tensors as one vector, ``[layout.size]`` float32 (one copy)."""
    return layout.gather({name: p.detach().cpu().numpy() for name, p in model.named_parameters()})


def write_vector(model: nn.Module, layout: Layout, vector: Vector) -> None:
    """Set the model's shared tensors from a vector (one copy).

    Args:
        model: The model, on any device and in any memory format.
        layout: Its layout.
        vector: ``[layout.size]`` float32.

    Raises:
        ValueError: The vector has another length.
    """
    parameters = dict(model.named_parameters())
    for name, view in layout.views(vector).items():
        _assign(parameters[name], view)


def local_tensors(model: nn.Module, layout: Layout) -> dict[str, npt.NDArray[np.generic]]:
    """Return copies of the tensors that stay at their site, by name."""
    state = model.state_dict()
    return {e.name: state[e.name].cpu().numpy().copy() for e in layout.of_rule("local")}


def write_local(model: nn.Module, values: Mapping[str, npt.NDArray[np.generic]]) -> None:
    """Set tensors that stay at their site.

    Args:
        model: The model.
        values: As :func:`local_tensors` returned them.
    """
    state = model.state_dict()
    for name, value in values.items():
        _assign(state[name], value)


def _assign(tensor: torch.Tensor, value: npt.NDArray[np.generic]) -> None:
    if tensor.device.type == "cpu":
        # Through numpy: a vector as received is read-only, which torch cannot wrap.
        np.copyto(tensor.detach().numpy(), value)
    else:
        tensor.data.copy_(torch.from_numpy(value.copy()))
