"""ONNX Runtime on the CPU, from bytes, quiet and repeatable: one way to open a model and run it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as _state

__all__ = ["InferenceError", "Session"]

_FATAL = 4

# The runtime's exceptions have no base of their own; each is a direct child of Exception.
_RUNTIME_ERRORS = (
    _state.EPFail,
    _state.EngineError,
    _state.Fail,
    _state.InvalidArgument,
    _state.InvalidGraph,
    _state.InvalidProtobuf,
    _state.ModelLoaded,
    _state.NoModel,
    _state.NoSuchFile,
    _state.NotImplemented,
    _state.RuntimeException,
    MemoryError,
    RuntimeError,
    ValueError,
)


class InferenceError(Exception):
    """ONNX Runtime cannot open or run a model; the caller knows what that means for its user."""


class Session:
    """A model that is ready to run.

    Args:
        model: An ONNX file's bytes. From bytes, no path in the model is ever followed.
        threads: CPU threads inside one operator.

    Raises:
        InferenceError: The bytes are not a model that can run.
    """

    def __init__(self, model: bytes, *, threads: int = 1) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.use_deterministic_compute = True
        options.log_severity_level = _FATAL  # every error is raised; none is also written to stderr
        try:
            self._session = onnxruntime.InferenceSession(
                model, sess_options=options, providers=["CPUExecutionProvider"]
            )
        except _RUNTIME_ERRORS as error:
            raise InferenceError(_first_line(error)) from error

    def run(self, name: str, inputs: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """Return the model's only output for one batch.

        Args:
            name: Name of the input.
            inputs: ``[batch, *shape]`` in the dtype of the input.

        Raises:
            InferenceError: The model cannot run on this batch, or gives no array.
        """
        try:
            outputs = self._session.run(None, {name: np.ascontiguousarray(inputs)})
        except _RUNTIME_ERRORS as error:
            raise InferenceError(_first_line(error)) from error
        if len(outputs) != 1 or not isinstance(outputs[0], np.ndarray):
            raise InferenceError("the model does not return one array")
        return outputs[0]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
