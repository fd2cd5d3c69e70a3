"""The IDX format of the MNIST family, plain or gzipped.

A file is two zero bytes, a type code, the number of dimensions, each dimension as a big-endian
unsigned 32-bit number, then the elements in row-major order, big-endian, and nothing after them.

References:
    Y. LeCun, C. Cortes, C. J. C. Burges. The MNIST database of handwritten digits (1998).
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from io import BufferedReader
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lepton_fed.data.files import fill, refuse_expansion, unreadable
from lepton_fed.errors import DataError, Problem

__all__ = ["read_idx"]

_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_MAX_DIMENSIONS = 4
_Stream = BufferedReader | gzip.GzipFile
_GZIP_MAGIC = b"\x1f\x8b"


def read_idx(file: Path) -> npt.NDArray[np.generic]:
    """Return the array in an IDX file.

    Args:
        file: A file that exists; whether it is gzipped is told by its first bytes.

    Returns:
        The array, in the machine's byte order: uint8, int8, int16, int32, float32 or float64.

    Raises:
        DataError: The file is not IDX, is shorter or longer than its header says, or is damaged.
    """
    try:
        with file.open("rb") as raw:
            compressed = raw.read(2) == _GZIP_MAGIC
            raw.seek(0)
            if not compressed:
                return _parse(raw, file, compressed)
            with gzip.GzipFile(fileobj=raw) as expanded:
                return _parse(expanded, file, compressed)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            Problem("LF2018", f"the gzip stream is damaged: {error}", where=str(file))
        ) from error
    except OSError as error:
        raise unreadable(file, error) from error


def _parse(stream: _Stream, file: Path, compressed: bool) -> npt.NDArray[np.generic]:
    dtype, shape = _header(stream, file)
    length = math.prod(shape) * dtype.itemsize
    if not length:
        raise DataError(Problem("LF2013", f"there are no rows in {list(shape)}", where=str(file)))
    claim = f"its header promises {list(shape)} elements, {length} bytes"
    if compressed:
        refuse_expansion(file, length)
    else:
        present = file.stat().st_size - stream.tell()
        if present != length:
            raise _mismatch(file, f"{claim}, but {present} follow")
    buffer = np.empty(length, dtype=np.uint8)
    filled = fill(stream, buffer.data)
    if filled < length:
        raise _mismatch(file, f"{claim}, but only {filled} follow")
    if stream.read(1):
        raise _mismatch(file, f"{claim}, but more follow")
    return buffer.view(dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)


def _header(stream: _Stream, file: Path) -> tuple[np.dtype[np.generic], tuple[int, ...]]:
    magic = stream.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0":
        raise _not_idx(file, f"it begins with {magic.hex(' ') or 'nothing'}")
    code, dimensions = magic[2], magic[3]
    if code not in _TYPES:
        raise _not_idx(file, f"it has no type with the code 0x{code:02x}")
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise _not_idx(file, f"{dimensions} dimensions are not between 1 and {_MAX_DIMENSIONS}")
    packed = stream.read(4 * dimensions)
    if len(packed) < 4 * dimensions:
        raise _mismatch(file, "the file ends within its header")
    return np.dtype(_TYPES[code]), struct.unpack(f">{dimensions}I", packed)


def _not_idx(file: Path, why: str) -> DataError:
    return DataError(
        Problem(
            "LF2017",
            f"this is not an IDX file: {why}",
            where=str(file),
            remedy="an IDX file begins with 00 00, a type code and the number of dimensions",
        )
    )


def _mismatch(file: Path, what: str) -> DataError:
    return DataError(
        Problem(
            "LF2018", what, where=str(file), remedy="fetch the file again; it was cut or joined"
        )
    )
