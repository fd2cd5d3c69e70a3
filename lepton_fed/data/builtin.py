"""The small public data sets that come with scikit-learn: for demos, tests and first steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from sklearn import datasets

from lepton_fed.core.task import Column, DataContract, Target
from lepton_fed.data.dataset import Dataset
from lepton_fed.data.findings import Findings, nearest
from lepton_fed.errors import Problem, TaskError, quoted

__all__ = [
    "BUILTIN",
    "breast_cancer",
    "builtin_contract",
    "builtin_inputs",
    "diabetes",
    "digits",
    "wine",
]

BUILTIN = ("digits", "breast_cancer", "wine", "diabetes")


@dataclass(frozen=True)
class _Builtin:
    """One set as it ships: ``inputs`` [rows, columns] or [rows, 1, 8, 8], ``targets`` [rows]."""

    name: str
    kind: Literal["image", "table"]
    inputs: npt.NDArray[np.float64]
    columns: tuple[str, ...]
    targets: npt.NDArray[Any]  # int64 codes or float64 numbers
    target: str
    classes: tuple[str, ...]


def digits(contract: DataContract, path: str, with_target: bool) -> Dataset:
    """Return 1797 handwritten digits, ``[1, 8, 8]``, grey values 0 to 16, ten classes.

    Args:
        contract: What the rows must look like; float32 or uint8, classes in any order.
        path: Must be empty; the data comes with the program.
        with_target: Whether targets are wanted.

    Raises:
        DataError: The contract asks for something that this set does not have.
        TaskError: A path is given.
    """
    return _read(_load("digits"), contract, path, with_target)


def breast_cancer(contract: DataContract, path: str, with_target: bool) -> Dataset:
    """Return 569 tumours, 30 measured columns, malignant or benign; arguments as :func:`digits`.

    Raises:
        DataError: The contract asks for something that this set does not have.
        TaskError: A path is given.
    """
    return _read(_load("breast_cancer"), contract, path, with_target)


def wine(contract: DataContract, path: str, with_target: bool) -> Dataset:
    """Return 178 wines, 13 measured columns, three growers; arguments as :func:`digits`.

    Raises:
        DataError: The contract asks for something that this set does not have.
        TaskError: A path is given.
    """
    return _read(_load("wine"), contract, path, with_target)


def diabetes(contract: DataContract, path: str, with_target: bool) -> Dataset:
    """Return 442 patients, 10 columns, progression after a year; arguments as :func:`digits`.

    Raises:
        DataError: The contract asks for something that this set does not have.
        TaskError: A path is given.
    """
    return _read(_load("diabetes"), contract, path, with_target)


def builtin_contract(name: str) -> DataContract:
    """Return the full contract of a built-in set, ready to be written into a conf file.

    Mean and standard deviation are those of the whole set, rounded to three significant digits.
    The set is public, so they are too.

    Args:
        name: One of :data:`BUILTIN`.

    Raises:
        KeyError: There is no such set.
    """
    if name not in BUILTIN:
        raise KeyError(name)
    held = _load(name)
    target = Target("classes" if held.classes else "number", held.target, list(held.classes))
    if held.kind == "image":
        return DataContract("image", list(held.inputs.shape[1:]), target=target)
    means, stds = held.inputs.mean(axis=0), held.inputs.std(axis=0)
    return DataContract(
        "table",
        columns=[
            Column(column, mean=float(f"{mean:.3g}"), std=float(f"{std:.3g}"))
            for column, mean, std in zip(held.columns, means, stds, strict=True)
        ],
        target=target,
    )


def builtin_inputs(name: str) -> npt.NDArray[np.float64]:
    """Return all inputs of a set, ``[rows, ...]``, every column of it.

    Args:
        name: One of :data:`BUILTIN`.
    """
    return _load(name).inputs


def _load(name: str) -> _Builtin:
    if name == "digits":
        bunch = datasets.load_digits()
        images = bunch.images[:, np.newaxis]
        classes = tuple(str(digit) for digit in bunch.target_names)
        return _Builtin(name, "image", images, (), bunch.target, "digit", classes)
    loaders = {
        "breast_cancer": (datasets.load_breast_cancer, "diagnosis"),
        "wine": (datasets.load_wine, "grower"),
        "diabetes": (datasets.load_diabetes, "progression"),
    }
    loader, target = loaders[name]
    bunch = loader()
    columns = tuple(str(column) for column in bunch.feature_names)
    classes = tuple(str(each) for each in bunch.get("target_names", ()))
    return _Builtin(name, "table", bunch.data, columns, bunch.target, target, classes)


def _read(held: _Builtin, contract: DataContract, path: str, with_target: bool) -> Dataset:
    if path:
        raise TaskError(
            Problem(
                "LF3104",
                f"{quoted(path)} is given, but {held.name} comes with the program",
                key="path",
                remedy="leave the path out, or name another reader",
            )
        )
    findings = Findings(f"built-in {held.name}")
    if contract.kind != held.kind:
        findings.note("LF2020", f"this is a set of {held.kind}s, the contract says {contract.kind}")
        findings.refuse()
    dtype = np.dtype(contract.dtype)
    if held.kind == "table":
        inputs = held.inputs[:, _places(contract.columns, held, findings)].astype(dtype)
    else:
        inputs = held.inputs.astype(dtype)  # exact: whole numbers from 0 to 16
    targets = _targets(held, contract.target, findings)
    findings.refuse()
    return Dataset(inputs, targets if with_target else targets[:0])


def _places(columns: Sequence[Column], held: _Builtin, findings: Findings) -> list[int]:
    for column in columns:
        if column.name not in held.columns:
            findings.note(
                "LF2008",
                f"there is no column {quoted(column.name)}",
                column=column.name,
                remedy=nearest(column.name, held.columns),
            )
        elif column.kind != "number":
            findings.note("LF2020", "the column holds numbers, not categories", column=column.name)
    return [
        held.columns.index(column.name) if column.name in held.columns else 0 for column in columns
    ]


def _targets(
    held: _Builtin, target: Target, findings: Findings
) -> npt.NDArray[np.int64] | npt.NDArray[np.float32]:
    if not held.classes:
        if target.kind != "number":
            findings.note("LF2020", "the target is a number, the contract asks for classes")
        return held.targets.astype(np.float32)
    if target.kind != "classes":
        findings.note("LF2020", "the target is a class, the contract asks for a number")
        return held.targets.astype(np.int64)
    odd = sorted(set(target.classes).symmetric_difference(held.classes))
    if odd:
        absent = "the contract lacks" if odd[0] in held.classes else "no row is of"
        findings.note(
            "LF2012",
            f"{absent} the class {quoted(odd[0])}",
            remedy=f"the classes are {', '.join(quoted(name) for name in held.classes)}",
        )
    places = {name: code for code, name in enumerate(target.classes)}
    code_of_class = np.array([places.get(name, -1) for name in held.classes], dtype=np.int64)
    targets: npt.NDArray[np.int64] = code_of_class[held.targets]
    return targets
