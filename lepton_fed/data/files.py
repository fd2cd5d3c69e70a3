"""Files at a site: opened for reading only, never written, never expanded without bound."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from lepton_fed.errors import DataError, Problem

__all__ = ["Readable", "existing_file", "fill", "refuse_expansion", "unreadable"]

# Measured data compresses a few times, images of large empty areas some 50 times; beyond that, and
# beyond what any machine has to spare, an archive is an attack on memory or a mistake.
_MAX_EXPANSION = 200
_ALWAYS_ADMITTED_BYTES = 1 << 28
_PIECE_BYTES = 1 << 20


class Readable(Protocol):
    """A binary stream, compressed or not."""

    def read(self, size: int, /) -> bytes:
        """Return at most ``size`` bytes, none at the end."""


def existing_file(path: str | Path) -> Path:
    """Return the path of a file that exists and holds at least one byte.

    Args:
        path: As the conf gives it; ``~`` stands for the home folder.

    Raises:
        DataError: There is no such file, it is a folder or cannot be looked at, or it is empty.
    """
    try:
        file = Path(path).expanduser()
        if not str(path):
            raise DataError(
                Problem("LF2001", "the reader needs a file and none is given", remedy="give a path")
            )
        if file.is_dir():
            raise DataError(
                Problem("LF2002", "this is a folder; a file is needed", where=str(path))
            )
        size = file.stat().st_size
    except (OSError, RuntimeError, ValueError) as error:
        raise unreadable(path, error) from error
    if not size:
        raise DataError(Problem("LF2003", "the file is empty", where=str(path)))
    return file


def fill(stream: Readable, view: memoryview) -> int:
    """Read until ``view`` (bytes) is full or the stream ends; return the number of bytes read."""
    filled = 0
    while filled < len(view):
        piece = stream.read(min(len(view) - filled, _PIECE_BYTES))
        if not piece:
            break
        view[filled : filled + len(piece)] = piece
        filled += len(piece)
    return filled


def unreadable(path: str | Path, error: Exception) -> DataError:
    """Return the error for a file that the operating system does not let us read."""
    if isinstance(error, FileNotFoundError):
        remedy = "" if Path(path).is_absolute() else f"relative paths start from {Path.cwd()}"
        return DataError(Problem("LF2001", "there is no such file", str(path), remedy=remedy))
    remedy = ""
    if isinstance(error, PermissionError):
        remedy = "give the account that runs this the right to read it"
    reason = getattr(error, "strerror", None) or str(error)
    what = f"the file cannot be read: {reason}"
    return DataError(Problem("LF2002", what, str(path), remedy=remedy))


def refuse_expansion(file: Path, claimed_bytes: int) -> None:
    """Refuse a compressed file that claims to expand beyond reason, before memory is taken.

    Args:
        file: The compressed file.
        claimed_bytes: Its size after expansion, as its own header claims.

    Raises:
        DataError: The claim is more than 256 MiB and more than 200 times the file.
    """
    size = file.stat().st_size
    if claimed_bytes > max(_ALWAYS_ADMITTED_BYTES, _MAX_EXPANSION * size):
        raise DataError(
            Problem(
                "LF2019",
                f"{size} compressed bytes claim to expand to {claimed_bytes}",
                where=str(file),
                remedy="if the content is meant, store it without compression",
            )
        )
