"""Do the rows fit the contract? All that is wrong is said at once, with row and column."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lepton_fed.core.task import Column, DataContract, Target
from lepton_fed.data.dataset import Dataset
from lepton_fed.data.findings import Findings, Places

__all__ = ["check", "target_dtype"]

# Images are looked at in blocks: a mask over all of a large set would take a quarter of its memory.
_BLOCK_ELEMENTS = 1 << 22

Bools = npt.NDArray[np.bool_]
Values = npt.NDArray[Any]  # the dtype has been checked by then


def target_dtype(target: Target) -> np.dtype[np.generic]:
    """Return the dtype of targets in memory: int64 codes of classes, or float32 numbers."""
    return np.dtype(np.int64 if target.kind == "classes" else np.float32)


def check(
    dataset: Dataset,
    contract: DataContract,
    *,
    where: str,
    with_target: bool = True,
    lines: Sequence[int] | None = None,
) -> None:
    """Check rows against the contract.

    Args:
        dataset: Rows as a reader made them.
        contract: What they must look like; one that a valid conf holds.
        where: Names the source of the rows in the error.
        with_target: Whether the rows must have targets; without, they must have none.
        lines: Line of each row in its file, from 1, where the source is a text file.

    Raises:
        DataError: The rows do not fit; every kind of misfit in every column is listed, with the
            first row (from 1) or line where it is met.
    """
    findings = Findings(where)
    _check_form(dataset, contract, with_target, findings)
    findings.refuse()
    places = Places(lines)
    if contract.kind == "image":
        _check_pixels(dataset.inputs, findings, places)
    else:
        for position, column in enumerate(contract.columns):
            _check_column(dataset.inputs[:, position], column, findings, places)
    if with_target:
        _check_targets(dataset.targets, contract.target, findings, places)
    findings.refuse()


def _check_form(
    dataset: Dataset, contract: DataContract, with_target: bool, findings: Findings
) -> None:
    inputs, targets = dataset.inputs, dataset.targets
    # A reader that is not ours may hand out anything under these names.
    arrays: dict[str, object] = {"inputs": inputs, "targets": targets}
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            findings.note("LF2032", f"{name} are a {type(array).__name__}, not a numpy array")
    if findings.problems():
        return
    shape = contract.example_shape
    if inputs.shape[1:] != shape:
        findings.note(
            "LF2030",
            f"one example has shape {list(inputs.shape[1:])}, the contract says {list(shape)}",
        )
    if inputs.dtype != np.dtype(contract.dtype):
        findings.note("LF2031", f"inputs are {inputs.dtype}, the contract says {contract.dtype}")
    if not len(inputs):
        findings.note("LF2013", "there are no rows")
    wanted = target_dtype(contract.target)
    if targets.dtype != wanted:
        findings.note("LF2031", f"targets are {targets.dtype}, they must be {wanted}")
    expected = (len(inputs) if with_target else 0,)
    if targets.shape != expected:
        findings.note(
            "LF2032", f"targets have shape {list(targets.shape)}, expected is {list(expected)}"
        )


def _check_pixels(inputs: Values, findings: Findings, places: Places) -> None:
    if inputs.dtype.kind != "f":
        return
    flat = inputs.reshape(len(inputs), -1)
    nan, infinite = np.zeros((2, len(flat)), dtype=np.bool_)
    step = max(1, _BLOCK_ELEMENTS // flat.shape[1])
    for start in range(0, len(flat), step):
        block = flat[start : start + step]
        if not np.isfinite(block).all():
            nan[start : start + step] = np.isnan(block).any(axis=1)
            infinite[start : start + step] = np.isinf(block).any(axis=1)

    def pixel(row: int, test: Callable[[Values], Bools]) -> str:
        bad = test(inputs[row])
        return str([int(place) for place in np.argwhere(bad)[0]])

    findings.note_rows(
        "LF2034",
        nan,
        lambda row: f"the pixel at {pixel(row, np.isnan)} is NaN",
        places=places,
    )
    findings.note_rows(
        "LF2035",
        infinite,
        lambda row: f"the pixel at {pixel(row, np.isinf)} is infinite",
        places=places,
    )


def _check_column(values: Values, column: Column, findings: Findings, places: Places) -> None:
    if column.kind == "category":
        findings.note_rows(
            "LF2037",
            ~_is_code(values, len(column.values)),
            lambda row: f"{values[row]} is not the code of a category",
            places=places,
            remedy=f"codes go from 0 to {len(column.values) - 1}, in the order of `values`",
            column=column.name,
        )
        return
    if column.fill is None:
        findings.note_rows(
            "LF2033",
            np.isnan(values),
            lambda row: "a number is missing and the contract has no `fill` for this column",
            places=places,
            remedy="complete the data, or agree on a `fill` and an `impute` step",
            column=column.name,
        )
    findings.note_rows(
        "LF2035",
        np.isinf(values),
        lambda row: "the number is infinite, or too large for float32",
        places=places,
        column=column.name,
    )
    _check_bounds(values, column.minimum, column.maximum, column.name, findings, places)


def _check_targets(values: Values, target: Target, findings: Findings, places: Places) -> None:
    if target.kind == "classes":
        findings.note_rows(
            "LF2038",
            ~_is_code(values, len(target.classes)),
            lambda row: f"{values[row]} is not the code of a class",
            places=places,
            remedy=f"codes go from 0 to {len(target.classes) - 1}, in the order of `classes`",
            column=target.name,
        )
        return
    findings.note_rows(
        "LF2039",
        ~np.isfinite(values),
        lambda row: f"the target is {values[row]}",
        places=places,
        column=target.name,
    )
    _check_bounds(values, target.minimum, target.maximum, target.name, findings, places)


def _check_bounds(
    values: Values,
    low: float | None,
    high: float | None,
    column: str,
    findings: Findings,
    places: Places,
) -> None:
    with np.errstate(over="ignore"):  # a bound beyond float32 is an infinite one
        lowest = np.float32(-np.inf if low is None else low)
        highest = np.float32(np.inf if high is None else high)
    findings.note_rows(
        "LF2036",
        np.isfinite(values) & ((values < lowest) | (values > highest)),
        lambda row: f"{values[row]} is outside the contract's bounds, {lowest} to {highest}",
        places=places,
        column=column,
    )


def _is_code(values: Values, count: int) -> Bools:
    """Return where ``values`` are whole numbers in [0, count); NaN is none."""
    is_code: Bools = (values >= 0) & (values < count) & (values == np.floor(values))
    return is_code
