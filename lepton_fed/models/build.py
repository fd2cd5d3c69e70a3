"""From a task to a model, and between a model and its flat vector."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from lepton_fed.config import plugins
from lepton_fed.core.layout import Layout, Rule, Vector
from lepton_fed.core.task import ModelSpec, Task
from lepton_fed.errors import LeptonError, Problem, TaskError
from lepton_fed.models.private_layers import private_layers

__all__ = [
    "build_model",
    "frozen_buffers",
    "layout_of",
    "local_tensors",
    "read_vector",
    "write_local",
    "write_vector",
]

_LARGEST = 500_000_000  # beyond it an update is gigabytes a round: train an adapter instead
_EXPLAIN = "lepton-fed config explain task.model.arguments shows what it takes"
# What torch's allocator says before the number of bytes.
_ALLOCATOR = re.compile(r"^\[enforce fail at .*DefaultCPUAllocator: ")
# Integers as wide as an element: how numpy sees the bytes of a type that it lacks.
_SAME_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def build_model(task: Task, shape: tuple[int, ...], seed: int) -> nn.Module:
    """Build a task's model and initialise it from ``seed``.

    Module constructors draw from torch's global generator and take no other; it is put aside,
    seeded, and put back, so that nothing outside sees the difference. The model is built on torch's
    meta device first, where tensors have a shape and no memory, so that one that is too large is
    refused before anything is allocated.

    Args:
        task: The task.
        shape: Shape of one example after preprocessing.
        seed: Seed of the initial weights.

    Returns:
        A module from ``[batch, *shape]`` to ``[batch, task.outputs]`` on the CPU, float32.

    Raises:
        ConfError: The model is not installed or an argument does not fit its signature.
        TaskError: The model refuses its arguments, does not fit into memory, is no torch module, is
            too large to train in full, or a pattern of the task matches none of its tensors.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            outline = _outline(task, shape, seed)
            if outline is not None:
                _check_size(outline)
            built = _construct(task, shape, seed)
        except (ValueError, RuntimeError, MemoryError) as error:
            what = _ALLOCATOR.sub("", (str(error).splitlines() or ["not enough memory"])[0])
            raise TaskError(
                Problem("LF3001", what, key="task.model.arguments", remedy=_EXPLAIN)
            ) from error
    _check_size(built)
    return built


def _outline(task: Task, shape: tuple[int, ...], seed: int) -> nn.Module | None:
    """Return the model without memory behind its tensors; None if it cannot be built so.

    Raises:
        ValueError: No machine could build it.
    """
    try:
        # A model that loads weights is told that they go nowhere.
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            return _construct(task, shape, seed)
    except LeptonError:
        raise
    except Exception as error:
        if isinstance(error, (TypeError, RuntimeError)) and "overflow" in str(error).lower():
            raise ValueError("a tensor of the model has more bytes than can be counted") from error
        return None  # building it in earnest tells what is wrong, if anything is


def _construct(task: Task, shape: tuple[int, ...], seed: int) -> nn.Module:
    torch.default_generator.manual_seed(seed)
    built = plugins.call(
        "models",
        task.model.name,
        task.model.arguments,
        key="task.model.arguments",
        shape=shape,
        outputs=task.outputs,
    )
    if not isinstance(built, nn.Module):
        what = f"model {task.model.name!r} is not a torch module"
        raise TaskError(Problem("LF3002", what, key="task.model.name"))
    if task.model.fix:
        built = private_layers(built)
    _apply_rules(built, task.model)
    return built


def _check_size(model: nn.Module) -> None:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if trained > _LARGEST:
        raise TaskError(
            Problem(
                "LF3003",
                f"the model has {trained:,} trainable parameters; the limit is {_LARGEST:,}",
                key="task.model.arguments",
                remedy="freeze the base and train an adapter (LoRA), or take a smaller model",
            )
        )


def _apply_rules(model: nn.Module, spec: ModelSpec) -> None:
    parameters = [name for name, _ in model.named_parameters()]
    buffers = [name for name, _ in _buffers(model)]
    for key, patterns, names in (
        ("frozen", spec.frozen, parameters),
        ("local", spec.local, [*parameters, *buffers]),
    ):
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

    What matches ``spec.local`` is local. Of the rest, trainable parameters are shared and all else
    is frozen, buffers that a checkpoint holds included, but for the running statistics of
    normalisation layers: training changes those, so they are local, which keeps their element type
    and lets them never meet an average. A model that changes another buffer in training must be
    given a pattern for it.

    Args:
        model: The model.
        spec: Which tensors the task makes local.

    Raises:
        TaskError: A shared tensor is not float32, a local one is of a type that numpy lacks, or
            nothing is shared.
    """
    statistics = _running_statistics(model)
    ruled: list[tuple[str, Rule, torch.Tensor]] = [
        (name, "shared" if parameter.requires_grad else "frozen", parameter.detach())
        for name, parameter in model.named_parameters()
    ]
    ruled += [(n, "local" if n in statistics else "frozen", b) for n, b in _buffers(model)]
    entries: list[tuple[str, Rule, npt.NDArray[np.generic]]] = []
    dtypes: dict[str, str] = {}
    for name, rule, tensor in ruled:
        local = any(fnmatchcase(name, pattern) for pattern in spec.local)
        try:
            value = tensor.cpu().numpy()
        except TypeError:  # bfloat16 and the like
            value = tensor.cpu().view(_SAME_WIDTH[tensor.element_size()]).numpy()
            dtypes[name] = str(tensor.dtype).removeprefix("torch.")
        entries.append((name, "local" if local else rule, value))
    try:
        layout = Layout.of(entries, dtypes)
    except ValueError as error:
        raise TaskError(Problem("LF3005", str(error), key="task.model")) from error
    if layout.size == 0:
        raise TaskError(
            Problem("LF3006", "the model shares no tensor, so there is nothing to train together",
                    key="task.model", remedy="make fewer tensors local or frozen")
        )  # fmt: skip
    return layout


def _buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the buffers that a checkpoint of the model holds."""
    state = model.state_dict()
    return ((name, buffer) for name, buffer in model.named_buffers() if name in state)


def _running_statistics(model: nn.Module) -> set[str]:
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, _NormBase)
        for name, _ in module.named_buffers(recurse=False)
    }


def read_vector(model: nn.Module, layout: Layout) -> Vector:
    """Return the model's shared tensors as one vector, ``[layout.size]`` float32 (one copy).

    No other tensor is touched: a frozen base on a GPU stays there.
    """
    shared = {entry.name for entry in layout.of_rule("shared")}
    return layout.gather(
        {n: p.detach().cpu().numpy() for n, p in model.named_parameters() if n in shared}
    )


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


def frozen_buffers(model: nn.Module, layout: Layout) -> dict[str, npt.NDArray[np.generic]]:
    """Return copies of the buffers that no training may change, by name."""
    frozen = {entry.name for entry in layout.of_rule("frozen")}
    found = {name: value for name, value in _buffers(model) if name in frozen}
    # numpy has no bfloat16; float32 holds every value of it.
    return {n: (v.float() if v.dtype == torch.bfloat16 else v).cpu().numpy().copy()
            for n, v in found.items()}  # fmt: skip


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
    if tensor.device.type == "cpu" and tensor.dtype != torch.bfloat16:
        # Through numpy: a vector as received is read-only, which torch cannot wrap.
        np.copyto(tensor.detach().numpy(), value)
    else:
        tensor.data.copy_(torch.from_numpy(value.copy()))
