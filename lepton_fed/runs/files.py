"""Files that are whole or not there: written aside, synced, renamed, or appended to as a whole.

What the operating system refuses becomes a :class:`RunError` that names the file.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from lepton_fed.errors import Problem, RunError

__all__ = [
    "PARTIAL",
    "append",
    "read_about",
    "read_tensors",
    "reading",
    "replacing",
    "sweep",
    "write_atomic",
    "write_tensors",
    "writing",
]

PARTIAL = ".*.partial"
"""Pattern of the names of files that are being written."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file that cannot be written.

    Args:
        path: The file.

    Raises:
        RunError: LF5209, in place of an OSError raised inside.
    """
    try:
        yield
    except OSError as error:
        raise RunError(
            Problem("LF5209", f"this cannot be written: {error.strerror or error}",
                    where=str(path), remedy="free disk space or mend the folder, then run again")
        ) from error  # fmt: skip


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Name the file that cannot be read.

    Args:
        path: The file.

    Raises:
        RunError: LF5210, in place of an OSError raised inside.
    """
    try:
        yield
    except OSError as error:
        raise RunError(
            Problem("LF5210", f"this cannot be read: {error.strerror or error}",
                    where=str(path), remedy="look at the path, its rights and its disk")
        ) from error  # fmt: skip


def write_atomic(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Replace a file by ``content``; after a crash it holds the old or the new, nothing between.

    Args:
        path: The file.
        content: Its new content.
        mode: Its rights, less those that the umask takes.

    Raises:
        RunError: It cannot be written; what was there is there still.
    """
    with replacing(path, mode) as file:
        file.write(content)


@contextmanager
def replacing(path: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Yield a file that takes the place of another once it is whole; see :func:`write_atomic`.

    Args:
        path: The file.
        mode: Its rights, less those that the umask takes.

    Raises:
        RunError: It cannot be written; what was there is there still.
    """
    # A name that nobody can foresee: in a folder that others write to, a link could lie in wait.
    aside = path.parent / f".{secrets.token_hex(8)}.partial"
    with writing(path):
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            with open(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def sweep(*folders: Path) -> None:
    """Remove what killed processes had begun to write; nobody may write there meanwhile.

    Args:
        folders: Folders to look in, not below; one that is not there holds nothing.

    Raises:
        RunError: LF5209, something cannot be removed.
    """
    for folder in folders:
        with writing(folder):
            for partial in folder.glob(PARTIAL):
                partial.unlink(missing_ok=True)


def append(file: FileIO, content: bytes) -> None:
    """Append all of ``content`` to an unbuffered file, or nothing.

    Args:
        file: Open for appending.
        content: What comes at its end.

    Raises:
        OSError: It cannot be written.
    """
    before = os.fstat(file.fileno()).st_size
    rest = memoryview(content)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except BaseException:  # an interrupt too must not leave half a line
        with suppress(OSError):
            file.truncate(before)
        raise


def write_tensors(
    path: Path,
    tensors: Mapping[str, npt.NDArray[np.generic]],
    about: Mapping[str, str],
    mode: int = 0o666,
) -> None:
    """Write arrays as safetensors, atomically, each from where it is: no copy of it is made.

    Args:
        path: The file.
        tensors: Arrays by name, boolean or of whole or floating-point numbers.
        about: Text that goes with them.
        mode: The file's rights, less those that the umask takes.

    Raises:
        RunError: It cannot be written.
        TypeError: An array is of another type.
    """
    whole = {
        name: np.asarray(value, value.dtype.newbyteorder("<"), order="C")
        for name, value in tensors.items()
    }
    # The widest come first, so that each begins at a multiple of its width.
    names = sorted(whole, key=lambda name: (-whole[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(about.items()))} if about else {}
    end = 0
    for name in names:
        array, begin = whole[name], end
        end += array.nbytes
        header[name] = {
            "dtype": _dtype_name(array.dtype),
            "shape": list(array.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path, mode) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(whole[name].reshape(-1).view(np.uint8).data)


def _dtype_name(dtype: np.dtype[Any]) -> str:
    if dtype == np.bool_:
        return "BOOL"
    if dtype.kind not in "fiu" or dtype.itemsize > 8:
        raise TypeError(f"arrays of {dtype} have no safetensors type")
    return f"{dtype.kind.upper()}{8 * dtype.itemsize}"


def read_about(path: Path) -> dict[str, str]:
    """Return the text that goes with the arrays of a safetensors file; they are not read.

    Raises:
        RunError: It cannot be read.
        ValueError: It is no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with reading(path), safe_open(path, framework="numpy") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def read_tensors(path: Path) -> tuple[dict[str, npt.NDArray[np.generic]], dict[str, str]]:
    """Return the arrays of a safetensors file and the text that goes with them.

    Raises:
        RunError: It cannot be read.
        ValueError: It is no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with reading(path), safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(str(error)) from error
