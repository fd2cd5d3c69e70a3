"""The exported model against the trained one, on inputs that fit, before anything is written."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import nn

from lepton_fed.core.task import Task
from lepton_fed.errors import Problem, TaskError
from lepton_fed.export.inference import InferenceError, Session
from lepton_fed.export.interface import INPUT
from lepton_fed.export.manifest import Parity, ParityCheck
from lepton_fed.export.onnx import check_examples, reference_outputs

__all__ = ["BATCHES", "RELATIVE_TOLERANCE", "check_parity"]

BATCHES = (1, 2, 7, 32)
RELATIVE_TOLERANCE = 1e-5


def check_parity(
    model: bytes,
    module: nn.Module,
    task: Task,
    examples: npt.NDArray[np.generic],
    batches: Sequence[int] = BATCHES,
    *,
    real: bool = True,
) -> Parity:
    """Run both models on the same rows at several batch sizes and compare.

    Both run on the CPU in float32, ONNX Runtime on one thread. The tolerance is 1e-5 of the
    largest output, and never below 1e-5: logits of 50 differ by more than logits of 0.5. Each
    batch goes on in the rows where the one before it stopped, from the start again at the end.

    Args:
        model: The exported file.
        module: What was exported, in eval mode.
        task: What was learned.
        examples: Real inputs as read, ``[rows, *example shape]``, at least one row.
        batches: Batch sizes.
        real: Whether the examples are real, or drawn from the contract.

    Returns:
        The differences found; all are within tolerance.

    Raises:
        TaskError: LF3204, the examples do not fit the task; LF3206, the file does not run;
            LF3207, it answers otherwise than the trained model.
    """
    check_examples(examples, task)
    try:
        session = Session(model)
    except InferenceError as error:
        raise _does_not_run(error) from error
    checks, problems, start = [], [], 0
    for batch in batches:
        rows = np.arange(start, start + batch) % len(examples)
        start += batch
        check = _compare(session, module, task, examples[rows])
        checks.append(check)
        if not check.difference <= check.tolerance:  # also true of NaN
            problems.append(
                Problem(
                    code="LF3207",
                    what=f"at batch size {batch} the exported model and the trained one differ by "
                    f"{check.difference:.3g}, tolerance {check.tolerance:.3g}",
                    where="export",
                    remedy="nothing was written; report it with the task: the exporter translated "
                    "an operator of the model wrongly",
                )
            )
    if problems:
        raise TaskError(problems)
    used = min(start, len(examples))
    kind = "real" if real else "drawn"
    origin = "" if real else ", from the contract"
    what = f"{used} {kind} rows in turn" if used > 1 else f"1 {kind} row"
    return Parity(inputs=what + origin, checks=checks)


def _compare(
    session: Session, module: nn.Module, task: Task, inputs: npt.NDArray[np.generic]
) -> ParityCheck:
    expected = reference_outputs(module, task, inputs)
    try:
        answered = session.run(INPUT, inputs)
    except InferenceError as error:
        raise _does_not_run(error) from error
    tolerance = RELATIVE_TOLERANCE * max(1.0, float(np.abs(expected).max()))
    if answered.shape != expected.shape:  # numpy would stretch one over the other
        raise _does_not_run(
            InferenceError(f"it answers {answered.shape} where PyTorch answers {expected.shape}")
        )
    difference = float(np.abs(answered.astype(np.float64) - expected).max())
    return ParityCheck(batch=len(inputs), difference=difference, tolerance=tolerance)


def _does_not_run(error: InferenceError) -> TaskError:
    return TaskError(
        Problem(
            code="LF3206",
            what=f"ONNX Runtime cannot run the exported model: {error}",
            where="export",
            remedy="nothing was written; use layers that opset 20 has, or a newer onnxruntime",
        )
    )
