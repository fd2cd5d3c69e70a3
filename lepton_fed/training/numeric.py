"""The task's numeric settings, set for the length of a call and put back after it.

Thread count, memory layout and kernels change the last bits of a result, so they belong to the task
and are set by the training function, never by an engine or a site.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lepton_fed.core.task import Numeric
from lepton_fed.errors import Problem, TaskError

__all__ = ["arranged", "autocast", "numeric_settings"]

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def numeric_settings(numeric: Numeric, device: torch.device) -> Iterator[None]:
    """Set threads and deterministic kernels, and put back what was there.

    Args:
        numeric: The task's settings.
        device: Where the computation runs.

    Raises:
        TaskError: ``precision: bf16`` on a GPU that has none.
    """
    if numeric.precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise TaskError(
            Problem("LF3303", "this GPU has no bf16", key="task.numeric.precision",
                    remedy="task.numeric.precision: float32")
        )  # fmt: skip
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    if numeric.deterministic and device.type == "cuda":
        os.environ.setdefault(_CUBLAS, ":4096:8")  # read when cuBLAS starts
    torch.set_num_threads(numeric.threads)
    torch.use_deterministic_algorithms(numeric.deterministic)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


def autocast(numeric: Numeric, device: torch.device) -> torch.autocast:
    """Return the autocast context of forward and loss; it does nothing at float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=numeric.precision == "bf16")


def arranged(model: nn.Module, inputs: Tensor, numeric: Numeric) -> Tensor:
    """Return image inputs in the task's memory layout and put the model's kernels in it too.

    Args:
        model: The model; changed in place.
        inputs: ``[rows, ...]``; only ``[rows, channels, height, width]`` is laid out anew.
        numeric: The task's settings.
    """
    if numeric.memory_format == "contiguous" or inputs.dim() != 4:
        return inputs.contiguous()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return inputs.contiguous(memory_format=torch.channels_last)
