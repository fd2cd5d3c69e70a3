"""Frames between a site's worker and its training child: plain JSON and plain numbers, no objects.

A frame is the length of its head in eight bytes, the head as JSON, then the arrays that the head
lists, raw and little-endian.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from lepton_fed.core.decode import strict_json

__all__ = ["Arrays", "read_frame", "write_frame"]

Arrays = Mapping[str, npt.NDArray[np.floating]]

_LENGTH_BYTES = 8
_MOST_HEAD = 16 * 1024 * 1024
_MOST_BYTES = 64 * 1024**3
_TYPES = {"float32": "<f4", "float64": "<f8"}


def write_frame(stream: IO[bytes], head: Mapping[str, Any], arrays: Arrays | None = None) -> None:
    """Write a frame.

    Args:
        stream: Where to.
        head: Plain data.
        arrays: Flat float32 or float64 arrays, by name.
    """
    listed = {name: [a.dtype.name, a.size] for name, a in (arrays or {}).items()}
    content = json.dumps({**head, "arrays": listed}).encode()
    stream.write(len(content).to_bytes(_LENGTH_BYTES, "little"))
    stream.write(content)
    for array in (arrays or {}).values():
        stream.write(np.ascontiguousarray(array, _TYPES[array.dtype.name]).data.cast("B"))
    stream.flush()


def read_frame(stream: IO[bytes]) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """Read a frame.

    Raises:
        EOFError: The other end is gone.
        ValueError: This is no frame.
    """
    length = int.from_bytes(_read(stream, _LENGTH_BYTES), "little")
    if length > _MOST_HEAD:
        raise ValueError("the head is too long")
    head = strict_json(_read(stream, length))
    if not isinstance(head, dict) or not isinstance(head.get("arrays"), dict):
        raise ValueError("the head is no object that lists arrays")
    arrays = {}
    for name, (kind, size) in head.pop("arrays").items():
        dtype = np.dtype(_TYPES[kind])
        if not 0 <= size * dtype.itemsize <= _MOST_BYTES:
            raise ValueError("an array is too long")
        arrays[str(name)] = np.frombuffer(_read(stream, size * dtype.itemsize), dtype)
    return head, arrays


def _read(stream: IO[bytes], size: int) -> bytes:
    content = stream.read(size)
    if len(content) < size:
        raise EOFError
    return content
