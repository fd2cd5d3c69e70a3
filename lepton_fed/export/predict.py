"""Use a verified bundle: rows in, classes or numbers out, with ONNX Runtime and without torch."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from lepton_fed.errors import BundleRefused, Problem, RunError, TaskError
from lepton_fed.export.bundle import VerifiedBundle
from lepton_fed.export.inference import InferenceError, Session
from lepton_fed.export.interface import INPUT
from lepton_fed.export.manifest import ONNX
from lepton_fed.runs.files import write_atomic

__all__ = [
    "ClassPredictions",
    "NumberPredictions",
    "Predictions",
    "check_output",
    "predict",
    "write_predictions",
]

_OUTPUT_REMEDY = "name another file, in a writable folder with room for it"
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")


@dataclass(frozen=True)
class ClassPredictions:
    """The class of each row.

    Args:
        classes: Names of the classes, in the order of the model's outputs.
        codes: The most probable class of each row: its place in ``classes``, int64 ``[rows]``.
        probabilities: Float32 ``[rows, classes]``; each row sums to 1. The softmax of the model's
            logits, not calibrated.
    """

    classes: list[str]
    codes: npt.NDArray[np.int64]
    probabilities: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.codes)


@dataclass(frozen=True)
class NumberPredictions:
    """The number predicted for each row.

    Args:
        values: Float32 ``[rows]``, in the unit of the target.
    """

    values: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.values)


Predictions: TypeAlias = ClassPredictions | NumberPredictions


def predict(
    bundle: VerifiedBundle,
    inputs: npt.NDArray[np.generic],
    batch_size: int = 256,
    *,
    threads: int = 1,
) -> Predictions:
    """Return the model's predictions.

    Args:
        bundle: The model.
        inputs: Rows as read, ``[rows, *example shape]`` in the contract's dtype.
        batch_size: Rows given to the model at a time; bounds memory, does not change the result
            beyond the last bits.
        threads: CPU threads.

    Raises:
        BundleRefused: LF4117, the model is signed but cannot run, or answers in another shape than
            its task says.
        TaskError: LF3221, the model gives NaN or infinity for a row.
        ValueError: ``inputs`` do not fit the contract, which the reader of the rows should have
            said, or ``batch_size`` is not positive.
    """
    contract = bundle.task.data
    if inputs.dtype != contract.dtype or inputs.shape[1:] != contract.example_shape:
        raise ValueError(
            f"inputs are {inputs.dtype} {inputs.shape[1:]}, the contract says {contract.dtype} "
            f"{contract.example_shape}"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, not {batch_size}")
    width = (bundle.task.outputs,) if contract.target.kind == "classes" else ()
    outputs = np.empty((len(inputs), *width), dtype=np.float32)
    try:
        session = Session(bundle.onnx, threads=threads)
        for start in range(0, len(inputs), batch_size):
            batch = inputs[start : start + batch_size]
            answer = session.run(INPUT, batch)
            if answer.shape != (len(batch), *width) or answer.dtype != np.float32:
                raise InferenceError(
                    f"it answers {answer.dtype} {list(answer.shape)} for {len(batch)} rows"
                )
            outputs[start : start + len(batch)] = answer
    except InferenceError as error:
        raise BundleRefused(
            Problem(
                code="LF4117",
                what=f"the model cannot be used: {error}",
                where=str(bundle.folder / ONNX),
                remedy="ask the coordinator for a bundle that is exported anew",
            )
        ) from error
    _refuse_undefined(outputs)
    if contract.target.kind == "number":
        return NumberPredictions(outputs)
    probabilities = _softmax(outputs)
    return ClassPredictions(
        classes=list(contract.target.classes),
        codes=outputs.argmax(axis=1).astype(np.int64),
        probabilities=probabilities,
    )


def check_output(path: Path, sources: Iterable[Path] = ()) -> Path:
    """Return the file that predictions would be written to, or refuse it.

    Args:
        path: Where the predictions are to go. A link stands for what it leads to.
        sources: Files and folders that were read for them; neither they nor what lies in them is
            replaced.

    Raises:
        TaskError: LF3222, it is no plain file, or is or lies in a source.
    """
    target = Path(os.path.realpath(path))
    if os.path.lexists(path) and not os.path.isfile(target):
        raise _no_output(path, "this is no plain file, so it is not replaced")
    for source in sources:
        if Path(os.path.realpath(source)) in (target, *target.parents):
            raise _no_output(path, f"this would change {source}, which is read")
    return target


def write_predictions(predictions: Predictions, path: Path) -> None:
    """Write predictions as CSV (UTF-8), whole or not at all; an older file is replaced.

    For classes the columns are ``row``, ``class``, ``probability`` (of that class), and one
    ``probability_NAME`` a class; for a number ``row`` and ``value``. Rows count from 1.

    Spreadsheets run a cell that begins with ``=``, ``+``, ``-``, ``@`` or a control character as a
    formula, and class names come from somebody else. Such a name gets an apostrophe in front,
    unless it is a plain number (``-1`` is a common class and harmless).

    Args:
        predictions: What :func:`predict` returned.
        path: The file.

    Raises:
        TaskError: LF3222, the file cannot be written, or what is there is no plain file.
    """
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(_table(predictions))
    target = check_output(path)
    try:
        write_atomic(target, text.getvalue().encode())
    except RunError as error:
        what = replace(error.problems[0], code="LF3222", where=str(path), remedy=_OUTPUT_REMEDY)
        raise TaskError(what) from error


def _no_output(path: Path, what: str) -> TaskError:
    return TaskError(Problem("LF3222", what, where=str(path), remedy=_OUTPUT_REMEDY))


def _table(predictions: Predictions) -> Iterator[list[str]]:
    if isinstance(predictions, NumberPredictions):
        yield ["row", "value"]
        for number, value in enumerate(predictions.values, start=1):
            yield [str(number), str(value)]
        return
    yield ["row", "class", "probability", *(f"probability_{c}" for c in predictions.classes)]
    names = [_harmless(name) for name in predictions.classes]
    rows = zip(predictions.codes, predictions.probabilities, strict=True)
    for number, (code, probabilities) in enumerate(rows, start=1):
        shown = [str(p) for p in probabilities]  # a float32's own shortest decimal
        yield [str(number), names[code], shown[code], *shown]


def _harmless(name: str) -> str:
    if not name.startswith(_FORMULA_STARTS):
        return name
    try:
        float(name)
    except ValueError:
        return f"'{name}"
    return name


def _softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return row-wise probabilities; the largest logit is taken off first, so nothing overflows."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True, initial=-np.inf)
    weights = np.exp(shifted)
    probabilities: npt.NDArray[np.float64] = weights / weights.sum(axis=1, keepdims=True)
    return probabilities.astype(np.float32)


def _refuse_undefined(outputs: npt.NDArray[np.float32]) -> None:
    """Refuse NaN: the largest of a row with NaN in it would be a class like any other."""
    undefined = ~np.isfinite(outputs).all(axis=tuple(range(1, outputs.ndim)))
    if undefined.any():
        rows = np.flatnonzero(undefined) + 1
        shown = ", ".join(str(row) for row in rows[:5]) + (", ..." if len(rows) > 5 else "")
        raise TaskError(
            Problem(
                code="LF3221",
                what=f"the model gives NaN or infinity for {len(rows)} of {len(outputs)} rows "
                f"(row {shown})",
                remedy="look for missing or extreme numbers in these rows",
            )
        )
