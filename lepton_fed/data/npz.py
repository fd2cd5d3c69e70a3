"""Arrays out of a NumPy archive, from a file that nobody vouches for."""

from __future__ import annotations

import ast
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from lepton_fed.data.files import fill, refuse_expansion, unreadable
from lepton_fed.data.findings import Findings, nearest
from lepton_fed.errors import DataError, Problem, quoted

__all__ = ["read_npz"]

_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # what numpy itself writes
_PLAIN_TYPE = re.compile(r"[<>|=]?[biufcSUO]\d{0,9}")
_LARGEST_HEADER = 10_000
# Everything that zipfile and the parsing of a header raise on bytes that only look like an archive.
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    struct.error,
    OSError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
)


def read_npz(file: Path, names: Sequence[str]) -> list[npt.NDArray[np.generic]]:
    """Return arrays of an archive, by name.

    Nothing is unpickled: an array of Python objects is refused before it is looked at.

    Args:
        file: A file that exists.
        names: Names of the arrays, as given to ``numpy.savez``.

    Raises:
        DataError: The archive is damaged or expands beyond reason, lacks an array, or holds one of
            Python objects.
    """
    try:
        raw = file.open("rb")
    except OSError as error:
        raise unreadable(file, error) from error
    with raw:
        try:
            with zipfile.ZipFile(raw) as archive:
                return _arrays(archive, names, file)
        except _DAMAGE as error:
            raise DataError(
                Problem(
                    "LF2014",
                    f"the archive is damaged or not one of numpy's: {quoted(error)}",
                    where=str(file),
                    remedy="write it with numpy.savez or numpy.savez_compressed",
                )
            ) from error


def _arrays(
    archive: zipfile.ZipFile, names: Sequence[str], file: Path
) -> list[npt.NDArray[np.generic]]:
    members = {
        info.filename.removesuffix(".npy"): info
        for info in archive.infolist()
        if info.filename.endswith(".npy")
    }
    findings = Findings(str(file))
    for name in dict.fromkeys(names):
        if name not in members:
            findings.note(
                "LF2016",
                f"there is no array {quoted(name)}",
                column=name,
                remedy=nearest(name, members),
            )
    findings.refuse()
    return [_array(archive, members[name], file, name) for name in names]


def _array(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, file: Path, name: str
) -> npt.NDArray[np.generic]:
    if info.compress_type not in _METHODS:
        raise NotImplementedError(f"compression method {info.compress_type}")
    refuse_expansion(file, info.file_size)
    with archive.open(info) as stream:
        dtype, shape, fortran = _header(stream)
        if dtype.hasobject:
            raise DataError(
                Problem(
                    "LF2015",
                    f"the array {quoted(name)} holds Python objects; reading it could run code",
                    where=str(file),
                    remedy="write it with a numeric dtype, or words with a `U` dtype",
                )
            )
        if not math.prod(shape):
            raise DataError(
                Problem(
                    "LF2013",
                    f"there are no rows in the array {quoted(name)} of shape {list(shape)}",
                    where=str(file),
                )
            )
        length = math.prod(shape) * dtype.itemsize
        # The header decides how much memory is taken, so it is held to the size of the member.
        if stream.tell() + length != info.file_size:
            raise ValueError(f"{name} does not have the size its header promises")
        buffer = np.empty(length, dtype=np.uint8)
        if fill(stream, buffer.data) < length:  # zipfile compares the checksum at the last byte
            raise ValueError(f"{name} does not have the size its header promises")
    return buffer.view(dtype).reshape(shape, order="F" if fortran else "C")


def _header(stream: IO[bytes]) -> tuple[np.dtype[np.generic], tuple[int, ...], bool]:
    """Return dtype, shape and whether the order is Fortran's, from the head of an ``.npy`` member.

    Numpy's own parser warns, guesses and repairs; on a file that nobody vouches for, one strict
    form is enough.
    """
    magic = stream.read(8)
    widths = {b"\x93NUMPY\1\0": 2, b"\x93NUMPY\2\0": 4, b"\x93NUMPY\3\0": 4}
    if magic not in widths:
        raise ValueError("it does not begin as an array does")
    size = int.from_bytes(stream.read(widths[magic]), "little")
    if size > _LARGEST_HEADER:
        raise ValueError(f"a header of {size} bytes")
    try:
        fields = ast.literal_eval(stream.read(size).decode("latin-1").strip())
    except (MemoryError, RecursionError, SyntaxError) as error:
        raise ValueError("its header is not a Python literal") from error
    if not isinstance(fields, dict) or set(fields) != {"descr", "fortran_order", "shape"}:
        raise ValueError("its header lacks a field")
    descr, shape, fortran = fields["descr"], fields["shape"], fields["fortran_order"]
    if not isinstance(descr, str) or not _PLAIN_TYPE.fullmatch(descr):
        raise ValueError(f"no contract has elements of the type {descr}")
    if not isinstance(shape, tuple) or any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"{shape} is not a shape")
    return np.dtype(descr), shape, bool(fortran)
