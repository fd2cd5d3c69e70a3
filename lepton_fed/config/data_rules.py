"""Contradictions in a data contract: tables, images and targets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lepton_fed.core.task import Column, DataContract, Target, Task
from lepton_fed.errors import Problem

__all__ = ["data_problems", "distinct"]

_LARGEST = (2 - 2.0**-23) * 2.0**127  # the largest and the smallest normal float32
_SMALLEST = 2.0**-126


def data_problems(task: Task) -> Iterator[Problem]:
    """Yield the contradictions in a task's data contract; keys are relative to the task."""
    yield from _target(task.data.target)
    yield from _table(task.data) if task.data.kind == "table" else _image(task.data)
    if task.augmentation and task.data.kind != "image":
        yield Problem(
            "LF1060",
            "augmentation changes images; this contract is a table",
            key="augmentation",
            remedy="leave it out",
        )


def _target(target: Target) -> Iterator[Problem]:
    key = "data.target"
    if not target.name:
        yield Problem("LF1061", "the target has no name", key=f"{key}.name", remedy="name it")
    if target.kind == "number":
        if target.classes:
            yield Problem(
                "LF1061",
                "a target that is a number has no classes",
                key=f"{key}.classes",
                remedy="leave them out, or set target.kind to classes",
            )
        yield from _range(target.minimum, target.maximum, key, "LF1061")
        for name in ("minimum", "maximum"):
            value = getattr(target, name)
            if value is not None and abs(value) > _LARGEST:
                what = f"{name} {value:g} is beyond what a float32 target can be"
                yield Problem("LF1061", what, key=f"{key}.{name}", remedy=f"at most {_LARGEST:g}")
        return
    yield from distinct(target.classes, f"{key}.classes", "LF1061", "class")
    if len(set(target.classes)) < 2:
        yield Problem(
            "LF1061",
            f"a target of classes needs two or more; it has {len(set(target.classes))}",
            key=f"{key}.classes",
            remedy="name the classes, or set target.kind to number",
        )
    for name in ("minimum", "maximum"):
        if getattr(target, name) is not None:
            yield Problem(
                "LF1061",
                f"classes have no {name}",
                key=f"{key}.{name}",
                remedy="leave it out, or set target.kind to number",
            )


def _image(contract: DataContract) -> Iterator[Problem]:
    if len(contract.shape) != 3:
        yield Problem(
            "LF1062",
            f"an image has three axes; the shape is {contract.shape}",
            key="data.shape",
            remedy="write [channels, height, width], for example [1, 28, 28]",
        )
    for index, size in enumerate(contract.shape):
        if size < 1:
            what = f"an axis of an image cannot have the size {size}"
            yield Problem("LF1062", what, key=f"data.shape[{index}]", remedy="at least 1")
    if contract.columns:
        yield Problem(
            "LF1062",
            "images have no columns",
            key="data.columns",
            remedy="leave them out, or set data.kind to table",
        )


def _table(contract: DataContract) -> Iterator[Problem]:
    names = [column.name for column in contract.columns]
    if not names:
        yield Problem(
            "LF1063",
            "a table needs columns",
            key="data.columns",
            remedy="list them: - name: age, and so on; or set data.kind to image",
        )
    elif contract.shape and contract.shape != [len(names)]:
        yield Problem(
            "LF1063",
            f"the shape {contract.shape} is not that of {len(names)} columns",
            key="data.shape",
            remedy=f"leave it out, or write [{len(names)}]",
        )
    if contract.dtype != "float32":
        yield Problem(
            "LF1063",
            f"tables are float32, not {contract.dtype}",
            key="data.dtype",
            remedy="leave it out",
        )
    yield from distinct(names, "data.columns", "LF1063", "column")
    if contract.target.name in names:
        index = names.index(contract.target.name)
        yield Problem(
            "LF1063",
            f"column {contract.target.name!r} is the target: the model would see it",
            key=f"data.columns[{index}].name",
            remedy="leave it out of the columns",
        )
    for index, column in enumerate(contract.columns):
        yield from _column(column, f"data.columns[{index}]")


def _column(column: Column, key: str) -> Iterator[Problem]:
    if column.kind == "number":
        if column.values:
            yield Problem(
                "LF1064",
                f"column {column.name!r} is a number and has no values to choose from",
                key=f"{key}.values",
                remedy="leave them out, or set kind to category",
            )
        yield from _range(column.minimum, column.maximum, key, "LF1064")
        yield from _fill(column, key)
        yield from _constants(column, key)
        return
    if not column.values:
        yield Problem(
            "LF1064",
            f"column {column.name!r} is a category without values",
            key=f"{key}.values",
            remedy="list its words: values: [yes, no]",
        )
    yield from distinct(column.values, f"{key}.values", "LF1064", "value")
    plain = Column(column.name)
    for name in ("mean", "std", "fill", "minimum", "maximum"):
        if getattr(column, name) != getattr(plain, name):
            yield Problem(
                "LF1064",
                f"{name} means nothing for {column.name!r}, which is a category",
                key=f"{key}.{name}",
                remedy="leave it out, or set kind to number",
            )


def _fill(column: Column, key: str) -> Iterator[Problem]:
    fill, low, high = column.fill, column.minimum, column.maximum
    if fill is None:
        return
    wrong = ""
    if low is not None and fill < low:
        wrong = f"below the minimum {low:g}"
    elif high is not None and fill > high:
        wrong = f"above the maximum {high:g}"
    if wrong:
        yield Problem(
            "LF1064",
            f"the fill value {fill:g} is {wrong}",
            key=f"{key}.fill",
            remedy="choose one that the contract admits, or correct the bound",
        )


def _constants(column: Column, key: str) -> Iterator[Problem]:
    for name in ("mean", "std", "fill"):
        value = getattr(column, name)
        if value is not None and abs(value) > _LARGEST:
            what = f"{value:g} is infinite as float32, in which the model computes"
            yield Problem("LF1064", what, key=f"{key}.{name}", remedy=f"at most {_LARGEST:g}")
    if column.std < _SMALLEST:
        what = f"{column.std:g} is too small for float32, in which the model computes"
        yield Problem("LF1064", what, key=f"{key}.std", remedy=f"at least {_SMALLEST:g}")


def _range(low: float | None, high: float | None, key: str, code: str) -> Iterator[Problem]:
    if low is not None and high is not None and not low < high:
        yield Problem(
            code,
            f"the minimum {low:g} is not below the maximum {high:g}",
            key=f"{key}.minimum",
            remedy="correct one of them",
        )


def distinct(names: Sequence[str], key: str, code: str, noun: str) -> Iterator[Problem]:
    """Yield a problem for every name that is empty or stands in the list again.

    Args:
        names: The list.
        key: Its dotted key.
        code: Code of the problems.
        noun: What the names are names of.
    """
    seen: set[str] = set()
    for index, name in enumerate(names):
        if not name:
            what, remedy = f"a {noun} has an empty name", "name it"
            yield Problem(code, what, key=f"{key}[{index}]", remedy=remedy)
        elif name in seen:
            what, remedy = f"{noun} {name!r} stands here more than once", "name it once"
            yield Problem(code, what, key=f"{key}[{index}]", remedy=remedy)
        seen.add(name)
