"""A trained model as one ONNX file: preprocessing inside, batch axis free, no notes of the tool."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import nn

from lepton_fed.core.task import Task
from lepton_fed.errors import Problem, TaskError
from lepton_fed.export.interface import INPUT, complaints, output_name

__all__ = ["OPSET", "check_examples", "export_onnx", "reference_outputs"]

OPSET = 20

_MAX_ONNX_BYTES = 2**31 - 2**20  # a protocol buffer ends at 2 GiB; the graph needs its share
_TRACED_ROWS = 3

# Known noise of the exporter, by logger and a part of the message: operators of an optional package
# that no task needs, and a note on its own telemetry beside an error that is raised anyway.
_NOISE = {
    "torch.onnx._internal.exporter._registration": "torchvision is not installed",
    "torch.export._trace": "is unsupported.",
}
# Warnings that no caller can act on: deprecations inside torch and onnxscript, and the weights that
# recurrent layers keep a second time (the comparison on real inputs shows it does no harm).
_KNOWN_WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    (r".*LeafSpec.*", FutureWarning),
    (r".*_check_is_size.*", FutureWarning),
    (r"The tensor attributes? .*_flat_weights.*", UserWarning),
)


def export_onnx(module: nn.Module, task: Task, examples: npt.NDArray[np.generic]) -> bytes:
    """Return the ONNX file of a model.

    The exporter freezes the batch axis of some layers, without a word, when its example has one
    row. So it is never given one row, and the file is held to a free batch axis afterwards.
    Local variables, source lines and paths that the exporter writes beside each node are removed:
    they say nothing about the model and something about the machine.

    Args:
        module: Preprocessing and model in one, on the CPU, in eval mode:
            ``[batch, *example shape]`` as read to ``[batch, classes]``, or to ``[batch]`` or
            ``[batch, 1]`` for a number.
        task: What was learned.
        examples: Real inputs as read, ``[rows, *example shape]`` in the contract's dtype, at least
            one row.

    Returns:
        The file: opset 20, input ``inputs``, output ``logits`` or ``value``.

    Raises:
        TaskError: LF3201, the exporter cannot follow the model; LF3202, the file is not what the
            task describes (a frozen batch axis, for one); LF3203, the file breaks the ONNX
            standard; LF3204, examples or outputs do not fit the task; LF3205, the model is too
            large for one file.
    """
    check_examples(examples, task)
    reference_outputs(module, task, examples[:1])
    size = sum(t.nbytes for t in [*module.parameters(), *module.buffers()])
    if size > _MAX_ONNX_BYTES:
        raise _failed(
            "LF3205",
            f"the model's {size} bytes do not fit into one ONNX file of at most 2 GiB",
            "train a smaller model",
        )
    rows = np.resize(examples, (_TRACED_ROWS, *examples.shape[1:]))  # repeats what there is
    model = _strip(_trace(module, task, torch.tensor(rows)))
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise _failed(
            "LF3203", f"the exported file breaks the ONNX standard: {error}", _REPORT
        ) from error
    wrong = complaints(model, task)
    if wrong:
        raise TaskError(
            [Problem("LF3202", f"the exported model is not usable: {w}", "export", remedy=_REPORT)
             for w in wrong]
        )  # fmt: skip
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def reference_outputs(
    module: nn.Module, task: Task, inputs: npt.NDArray[np.generic]
) -> npt.NDArray[np.float32]:
    """Return what PyTorch answers, in the shape that the exported model answers in.

    Args:
        module: As for :func:`export_onnx`.
        task: What was learned.
        inputs: ``[batch, *example shape]`` in the contract's dtype.

    Returns:
        Float32, ``[batch, classes]`` or ``[batch]``.

    Raises:
        TaskError: LF3204, the output is not of that shape, or not finite.
        ValueError: ``module`` is in training mode, a mistake of the caller.
    """
    if any(part.training for part in module.modules()):
        raise ValueError("call module.eval() before an export")
    with torch.inference_mode():
        output = module(torch.tensor(inputs)).float()
    batch = len(inputs)
    if task.data.target.kind == "number" and output.shape == (batch, 1):
        output = output.squeeze(1)
    expected = (batch, task.outputs) if task.data.target.kind == "classes" else (batch,)
    if output.shape != expected:
        raise _failed(
            "LF3204",
            f"the model gives {list(output.shape)} for {batch} rows, not {list(expected)}",
            "make the classes of the target and the width of the model agree",
        )
    if not bool(torch.isfinite(output).all()):
        raise _failed(
            "LF3204",
            "the model gives NaN or infinity for real inputs",
            "the training diverged: lower training.learning_rate, or set max_gradient_norm",
        )
    answer: npt.NDArray[np.float32] = output.numpy()
    return answer


def check_examples(examples: npt.NDArray[np.generic], task: Task) -> None:
    """Hold example inputs to the contract's shape and dtype.

    Raises:
        TaskError: LF3204, they do not fit, or there is none.
    """
    contract = task.data
    if examples.dtype != contract.dtype or examples.shape[1:] != contract.example_shape:
        raise _failed(
            "LF3204",
            f"the example inputs are {examples.dtype} {list(examples.shape[1:])}, the contract "
            f"says {contract.dtype} {list(contract.example_shape)}",
            "read them with the task's own contract",
        )
    if not len(examples):
        raise _failed(
            "LF3204", "there is no example input", "an export needs at least one real row"
        )


def _trace(module: nn.Module, task: Task, rows: torch.Tensor) -> onnx.ModelProto:
    if task.data.target.kind == "number":
        module = nn.Sequential(module, nn.Flatten(0)).eval()  # [batch, 1] or [batch] to [batch]
    try:
        with _quiet():
            program = torch.onnx.export(
                module,
                (rows,),
                dynamo=True,
                opset_version=OPSET,
                external_data=False,
                verbose=False,
                input_names=[INPUT],
                output_names=[output_name(task)],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )
    except torch.onnx.OnnxExporterError as error:
        cause = error.__cause__ or error
        reason = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
        raise _failed(
            "LF3201",
            f"the exporter cannot follow the model: {reason}",
            "write the model without branches on the values of tensors or on the batch size",
        ) from error
    if program is None:  # only the exporter that was replaced in 2025 returns nothing
        raise _failed("LF3201", "the exporter returned nothing", "pip install 'torch>=2.7'")
    return program.model_proto


def _strip(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model without notes of the exporter and without inferred shapes.

    Shapes are inferred again by whoever needs them; left in, they contradict the graph as soon as
    a tool changes it (quantisation does).
    """
    graph = model.graph
    for noted in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        noted.ClearField("metadata_props")
        noted.ClearField("doc_string")
    graph.ClearField("value_info")
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's known noise; everything else is still said, and nothing stays set."""

    def worth_saying(record: logging.LogRecord) -> bool:
        return _NOISE[record.name] not in record.getMessage()

    for name in _NOISE:
        logging.getLogger(name).addFilter(worth_saying)
    try:
        with warnings.catch_warnings():
            for message, category in _KNOWN_WARNINGS:
                warnings.filterwarnings("ignore", message=message, category=category)
            yield
    finally:
        for name in _NOISE:
            logging.getLogger(name).removeFilter(worth_saying)


_REPORT = "this is a fault of the exporter or of the model's code; report it with the task"


def _failed(code: str, what: str, remedy: str) -> TaskError:
    return TaskError(Problem(code=code, what=what, where="export", remedy=remedy))
