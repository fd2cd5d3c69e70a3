"""Files that are whole or not there: written aside, synced, renamed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

__all__ = ["read_tensors", "write_atomic", "write_tensors"]


def write_atomic(path: Path, content: bytes) -> None:
    """Replace a file by ``content``; after a crash it holds the old or the new, nothing between.

    Args:
        path: The file.
        content: Its new content.
    """
    aside = path.with_name(f".{path.name}.partial")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_tensors(
    path: Path, tensors: Mapping[str, npt.NDArray[np.generic]], about: Mapping[str, str]
) -> None:
    """Write arrays as safetensors, atomically.

    Args:
        path: The file.
        tensors: Arrays by name.
        about: Text that goes with them.
    """
    from safetensors.numpy import save

    whole = {name: np.asarray(value, order="C") for name, value in tensors.items()}
    write_atomic(path, save(whole, metadata=dict(about)))


def read_tensors(path: Path) -> tuple[dict[str, npt.NDArray[np.generic]], dict[str, str]]:
    """Return the arrays of a safetensors file and the text that goes with them.

    Raises:
        ValueError: It is no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(str(error)) from error
