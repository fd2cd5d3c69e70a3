"""What an exported model looks like from outside: one input, one output, nothing hidden.

Held to when a model is exported, and again when a bundle is read: a signature says who made the
file, not that it is the model the task describes. Needs onnx, not torch.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]
from onnx.external_data_helper import uses_external_data

from lepton_fed.core.task import Task
from lepton_fed.errors import quoted
from lepton_fed.identity.signature import VerifiedBytes

__all__ = ["INPUT", "complaints", "output_name", "parse"]

INPUT = "inputs"

_ELEMENT = {"float32": onnx.TensorProto.FLOAT, "uint8": onnx.TensorProto.UINT8}
_STANDARD = ("", "ai.onnx")


def output_name(task: Task) -> str:
    """Return the name of the model's output: ``logits`` for classes, ``value`` for a number."""
    return "logits" if task.data.target.kind == "classes" else "value"


def parse(data: VerifiedBytes) -> onnx.ModelProto:
    """Return the ONNX model that ``data`` holds.

    Raises:
        ValueError: ``data`` is not an ONNX model.
    """
    try:
        return onnx.load_model_from_string(data)
    except DecodeError:
        raise ValueError("not an ONNX file") from None


def complaints(model: onnx.ModelProto, task: Task) -> list[str]:
    """Return what is wrong with the outside of a model for ``task``.

    The input is ``inputs``, ``[batch, *example shape]`` in the contract's dtype. The output is
    ``logits``, float32 ``[batch, classes]``, or ``value``, float32 ``[batch]``. The batch axis is
    free on both. The file is whole: all weights inside, standard operators only.

    Args:
        model: The model.
        task: What it should be a model of.

    Returns:
        Sentences; none when all is well.
    """
    # Old files repeat their initializers among the inputs; those are no inputs to a caller.
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    contract = task.data
    width = [task.outputs] if contract.target.kind == "classes" else []
    found = [
        *_port("input", inputs, INPUT, _ELEMENT[contract.dtype], list(contract.example_shape)),
        *_port("output", model.graph.output, output_name(task), _ELEMENT["float32"], width),
    ]
    foreign = sorted({o.domain for o in model.opset_import if o.domain not in _STANDARD})
    if foreign:
        found.append(f"it needs operators outside the ONNX standard: {quoted(', '.join(foreign))}")
    if any(uses_external_data(tensor) for tensor in _tensors(model)):
        found.append("it refers to weights outside the file")
    return found


def _port(
    side: str, values: list[onnx.ValueInfoProto], name: str, element: int, shape: list[int]
) -> list[str]:
    names = [value.name for value in values]
    if names != [name]:
        return [f"its {side}s are {quoted(', '.join(names))}, not one named {name!r}"]
    tensor = values[0].type.tensor_type
    found = []
    if tensor.elem_type != element:
        dtype = onnx.TensorProto.DataType.Name(element).lower()
        found.append(f"the element type of {name!r} is not {dtype}")
    axes = list(tensor.shape.dim)
    if not axes or not axes[0].dim_param:
        size = axes[0].dim_value if axes else "missing"
        found.append(f"the batch axis of {name!r} is {size}, not free")
    fixed = [axis.dim_value for axis in axes[1:]]
    if fixed != shape:
        found.append(f"one example of {name!r} has shape {fixed}, not {shape}")
    return found


def _tensors(message: Message) -> Iterator[onnx.TensorProto]:
    """Yield every tensor, also in subgraphs, functions and attributes.

    Protocol buffers are nested at most 100 deep when parsed, which bounds the recursion.
    """
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for item in [value] if isinstance(value, Message) else value:
            if isinstance(item, onnx.TensorProto):
                yield item
            else:
                yield from _tensors(item)
