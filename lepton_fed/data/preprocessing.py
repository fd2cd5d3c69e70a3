"""Preprocessing as torch modules: one arithmetic for training, the exported model and serving.

Steps are deterministic and hold constants only: those the conf gives and those of the contract.
Nothing is learnt from rows, so nothing about rows can leave with them. Constants are buffers that
``state_dict`` leaves out: they are part of the task, never of an update.

============  ======  =====================================================================
step          for     what it does
============  ======  =====================================================================
impute        table   puts the column's ``fill`` where a number is missing; must come first
standardise   table   (number - ``mean``) / ``std``, constants of the contract
one_hot       table   turns the code of a category into one column for each of its words
scale         both    divides by ``by``
clip          both    cuts at ``low`` and ``high``, either of which may be left out
unit_norm     both    divides the example by its Euclidean norm; one of zeros stays as it is
normalise     image   (pixel - ``mean``) / ``std``, lists of one number a channel
============  ======  =====================================================================

In a table only numbers are changed by standardise, scale and clip, wherever they stand: codes and
the columns of one_hot stay as they are. ``one_hot`` keeps the order of the columns and puts those
of a category in its place: (age, ward of 3 words, weight) becomes (age, ward 0, ward 1, ward 2,
weight). ``unit_norm`` takes the whole example as it comes, so that with record-level DP the size of
a gradient does not depend on how bright a picture is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from lepton_fed.core.settings import Setting
from lepton_fed.core.task import Column, DataContract, Task
from lepton_fed.data.findings import nearest
from lepton_fed.data.steps import Arguments
from lepton_fed.errors import Problem, TaskError, capped, quoted

__all__ = ["build_preprocessing"]


@dataclass(frozen=True)
class _Feature:
    """One column of a table between two steps; ``code`` is only used by one_hot's own columns."""

    column: Column
    role: Literal["number", "code", "indicator"]
    code: int = 0


@dataclass(frozen=True)
class _Layout:
    """What goes from one step to the next: the shape of an example, and a table's features."""

    shape: tuple[int, ...]
    features: tuple[_Feature, ...] = ()

    def each(self, of_number: Callable[[Column], float], otherwise: float) -> torch.Tensor:
        """Return one constant for each feature: ``of_number`` for numbers, float32 [features]."""
        return torch.tensor(
            [
                of_number(feature.column) if feature.role == "number" else otherwise
                for feature in self.features
            ],
            dtype=torch.float32,
        )

    def constant(self, value: float, otherwise: float) -> torch.Tensor:
        """Return ``value`` for all pixels (a scalar), or for the numbers of a table."""
        if not self.features:
            return torch.tensor(value, dtype=torch.float32)
        return self.each(lambda _: value, otherwise)


class _Cast(nn.Module):
    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return batch.to(torch.float32)


class _Impute(nn.Module):
    fill: torch.Tensor

    def __init__(self, fill: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("fill", fill, persistent=False)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return torch.where(torch.isnan(batch), self.fill, batch)


class _Affine(nn.Module):
    """(x - shift) / scale, which leaves x as it is to the last bit for shift 0 and scale 1."""

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self, shift: torch.Tensor, scale: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("shift", shift, persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return (batch - self.shift) / self.scale


class _Clip(nn.Module):
    low: torch.Tensor
    high: torch.Tensor

    def __init__(self, low: torch.Tensor, high: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("low", low, persistent=False)
        self.register_buffer("high", high, persistent=False)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return torch.minimum(torch.maximum(batch, self.low), self.high)


class _UnitNorm(nn.Module):
    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        axes = list(range(1, batch.ndim))
        largest = batch.abs().amax(axes, keepdim=True)
        scaled = batch / torch.where(largest > 0, largest, torch.ones_like(largest))
        norms = scaled.square().sum(axes, keepdim=True).sqrt()  # of numbers up to 1: no overflow
        return scaled / torch.where(norms > 0, norms, torch.ones_like(norms))


class _OneHot(nn.Module):
    """Copies each source column to its places, and compares the copies of codes with their code."""

    source: torch.Tensor
    code: torch.Tensor
    compared: torch.Tensor

    def __init__(self, source: Iterable[int], features: Iterable[_Feature]) -> None:
        super().__init__()
        new = list(features)
        self.register_buffer("source", torch.tensor(list(source)), persistent=False)
        codes = torch.tensor([float(feature.code) for feature in new])
        self.register_buffer("code", codes, persistent=False)
        compared = torch.tensor([feature.role == "indicator" for feature in new])
        self.register_buffer("compared", compared, persistent=False)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        spread = torch.index_select(batch, 1, self.source)
        return torch.where(self.compared, (spread == self.code).to(torch.float32), spread)


def build_preprocessing(task: Task) -> tuple[nn.Sequential, tuple[int, ...]]:
    """Build the steps before the model.

    The result takes a batch as read (uint8 or float32, ``[n, *example_shape]``; missing numbers are
    NaN) and gives float32 ``[n, *shape]``. It has no parameters and an empty ``state_dict``, and
    exports to ONNX together with the model.

    Args:
        task: The task, its contract as a valid conf holds it.

    Returns:
        The steps, and the shape of one example after them.

    Raises:
        TaskError: A step is unknown, has wrong arguments or does not fit the contract, or the
            contract needs a step that is not there; all problems are listed.
    """
    problems: list[Problem] = []
    layout = _as_read(task.data)
    modules: OrderedDict[str, nn.Module] = OrderedDict(cast=_Cast())
    for position, step in enumerate(task.preprocessing):
        key = f"task.preprocessing[{position}]"
        arguments = Arguments(step.arguments, f"{key}.arguments", problems)
        known = _STEPS[task.data.kind]
        if step.step not in known:
            problems.append(_unknown(step.step, task.data.kind, f"{key}.step"))
            continue
        module, layout = known[step.step](arguments, layout)
        arguments.close()
        modules[f"{position}_{step.step}"] = module
    problems += _order(task) + _needs(task)
    if problems:
        raise TaskError(capped(problems, "LF3149"))
    return nn.Sequential(modules), layout.shape


def _as_read(contract: DataContract) -> _Layout:
    if contract.kind == "image":
        return _Layout(contract.example_shape)
    features = tuple(
        _Feature(column, "number" if column.kind == "number" else "code")
        for column in contract.columns
    )
    return _Layout((len(features),), features)


def _impute(arguments: Arguments, layout: _Layout) -> tuple[nn.Module, _Layout]:
    # Where the contract has no fill, NaN stays NaN: it then shows in the output, instead of
    # passing for a number that nobody agreed on.
    nan = float("nan")
    fill = layout.each(lambda column: nan if column.fill is None else column.fill, nan)
    return _Impute(fill), layout


def _standardise(arguments: Arguments, layout: _Layout) -> tuple[nn.Module, _Layout]:
    means = layout.each(lambda column: column.mean, 0.0)
    stds = layout.each(lambda column: column.std, 1.0)
    usable = torch.isfinite(means) & torch.isfinite(stds) & (stds > 0)
    for feature, fits in zip(layout.features, usable.tolist(), strict=True):
        if not fits:
            column = feature.column
            arguments.refuse(
                "LF3111",
                f"mean {column.mean:g} and std {column.std:g} of the column "
                f"{quoted(column.name)} cannot be used in float32",
                remedy="give the column in another unit",
            )
    return _Affine(means, stds), layout


def _one_hot(arguments: Arguments, layout: _Layout) -> tuple[nn.Module, _Layout]:
    spread = [
        (source, each) for source, feature in enumerate(layout.features) for each in _words(feature)
    ]
    features = tuple(feature for _, feature in spread)
    module = _OneHot((source for source, _ in spread), features)
    return module, _Layout((len(features),), features)


def _words(feature: _Feature) -> list[_Feature]:
    """Return the features that one_hot makes of one."""
    if feature.role != "code":
        return [feature]
    return [
        replace(feature, role="indicator", code=code) for code in range(len(feature.column.values))
    ]


def _scale(arguments: Arguments, layout: _Layout) -> tuple[nn.Module, _Layout]:
    by = arguments.number("by", Setting("What numbers are divided by.", above=0))
    return _Affine(torch.zeros(()), layout.constant(by, 1.0)), layout


def _clip(arguments: Arguments, layout: _Layout) -> tuple[nn.Module, _Layout]:
    infinity = float("inf")
    ends = {
        name: arguments.number(name, Setting("Where numbers are cut."))
        for name in ("low", "high")
        if arguments.has(name)
    }
    low, high = ends.get("low", -infinity), ends.get("high", infinity)
    if not ends:
        arguments.refuse("LF3103", "neither `low` nor `high` is given")
    if low >= high:
        arguments.refuse("LF3104", f"low is {low:g}, not below high, {high:g}", name="low")
    lows = layout.constant(low, -infinity)
    return _Clip(lows, layout.constant(high, infinity)), layout


def _normalise(arguments: Arguments, layout: _Layout) -> tuple[nn.Module, _Layout]:
    channels = layout.shape[0]
    means = arguments.numbers("mean", channels, Setting("Mean of each channel."))
    stds = arguments.numbers("std", channels, Setting("Deviation of each channel.", above=0))
    shift, scale = (torch.tensor(values).reshape(-1, 1, 1) for values in (means, stds))
    return _Affine(shift, scale), layout


def _unit_norm(arguments: Arguments, layout: _Layout) -> tuple[nn.Module, _Layout]:
    return _UnitNorm(), layout


_ONCE = ("impute", "standardise", "one_hot", "unit_norm", "normalise")

_Builder = Callable[[Arguments, _Layout], tuple[nn.Module, _Layout]]

_STEPS: dict[str, dict[str, _Builder]] = {
    "table": {
        "impute": _impute,
        "standardise": _standardise,
        "one_hot": _one_hot,
        "scale": _scale,
        "clip": _clip,
        "unit_norm": _unit_norm,
    },
    "image": {"scale": _scale, "clip": _clip, "unit_norm": _unit_norm, "normalise": _normalise},
}


def _unknown(name: str, kind: str, key: str) -> Problem:
    other = "image" if kind == "table" else "table"
    if name in _STEPS[other]:
        what, code = f"the step {quoted(name)} is for {other}s; this task has {kind}s", "LF3105"
    else:
        what, code = f"there is no step {quoted(name)}", "LF3101"
    return Problem(code, what, key=key, remedy=nearest(name, _STEPS[kind]))


def _order(task: Task) -> list[Problem]:
    """Return what is wrong with the order of the steps."""
    problems = []
    names = [step.step for step in task.preprocessing]
    for position, name in enumerate(names):
        key = f"task.preprocessing[{position}].step"
        if (
            name in ("impute", "standardise", "one_hot", "unit_norm", "normalise")
            and name in names[:position]
        ):
            problems.append(Problem("LF3106", f"{name} is there twice", key=key))
        elif name == "impute" and position:
            problems.append(
                Problem(
                    "LF3106",
                    "impute comes after other steps, but `fill` is in the units of the file",
                    key=key,
                    remedy="make it the first step",
                )
            )
    return problems


def _needs(task: Task) -> list[Problem]:
    """Return the steps that the contract calls for and that are not there, or the reverse."""
    names = {step.step for step in task.preprocessing}
    columns = task.data.columns if task.data.kind == "table" else []
    categories = [column.name for column in columns if column.kind == "category"]
    filled = [column.name for column in columns if column.fill is not None]
    problems = []
    if categories and "one_hot" not in names:
        what = (
            f"the column {quoted(categories[0])} holds categories; as numbers, codes mean nothing"
        )
        problems.append(
            Problem("LF3107", what, key="task.preprocessing", remedy="add the step one_hot")
        )
    if filled and "impute" not in names:
        what = f"the column {quoted(filled[0])} may lack numbers, and nothing puts its `fill` there"
        problems.append(
            Problem("LF3108", what, key="task.preprocessing", remedy="make impute the first step")
        )
    if columns and "impute" in names and not filled:
        problems.append(
            Problem(
                "LF3108",
                "no column has a `fill`, so impute has nothing to do",
                key="task.preprocessing",
                remedy="give a column its `fill`, or take the step out",
            )
        )
    if columns and "one_hot" in names and not categories:
        problems.append(
            Problem(
                "LF3107",
                "no column holds categories, so one_hot has nothing to do",
                key="task.preprocessing",
                remedy="take the step out",
            )
        )
    return problems
