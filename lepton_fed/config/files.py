"""Reading a conf file's text, with an error for everything that can be wrong with a file."""

from __future__ import annotations

from pathlib import Path

from lepton_fed.errors import ConfError, Problem

__all__ = ["read_text"]

_LARGEST_BYTES = 1 << 20
_INIT = "write a new one with `lepton-fed init`"


def read_text(path: str | Path) -> str:
    """Return the text of a conf file; a byte order mark is dropped.

    Args:
        path: The file.

    Raises:
        ConfError: It is missing, a directory, unreadable, larger than 1 MiB or not UTF-8.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(_LARGEST_BYTES + 1)
    except FileNotFoundError as error:
        raise _error("LF1001", "there is no such file", path, _INIT) from error
    except IsADirectoryError as error:
        remedy = "name a file in it, for example conf/simulation.yaml"
        raise _error("LF1001", "this is a directory, not a file", path, remedy) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        what = f"the file cannot be read: {reason}"
        raise _error("LF1001", what, path, "look at its name and permissions") from error
    if len(content) > _LARGEST_BYTES:
        remedy = f"a conf is a few kilobytes; is this the right file? {_INIT}"
        raise _error("LF1004", "the file is larger than 1 MiB", path, remedy)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[: error.start]
        line, column = before.count(b"\n") + 1, error.start - (before.rfind(b"\n") + 1) + 1
        what = f"not UTF-8: byte 0x{content[error.start]:02x} at byte {column} of the line"
        raise _error("LF1003", what, f"{path}:{line}:{column}", "save the file as UTF-8") from error


def _error(code: str, what: str, where: str | Path, remedy: str) -> ConfError:
    return ConfError(Problem(code, what, str(where), remedy=remedy))
