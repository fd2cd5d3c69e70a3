"""What can be wrong with Flower's SuperLink and its database, told so that somebody can mend it.

Nothing in the database outlives its use: the register is made from the roster at each start, and a
run goes on from its own checkpoints. So a damaged one is named and left alone, never repaired.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import httpx
from sqlalchemy.exc import SQLAlchemyError

from lepton_fed.errors import Problem, RunError
from lepton_fed.flower import compat

__all__ = ["check_database", "telling"]

_WAIT_S = 5.0
_BUSY = ("SQLITE_BUSY", "SQLITE_LOCKED")
_DAMAGED = ("SQLITE_CORRUPT", "SQLITE_NOTADB")
_UNWRITTEN = ("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")


def check_database(path: Path, wait_s: float = _WAIT_S) -> None:
    """Look whether a database can be used, before anything is written to it.

    Args:
        path: SQLite file; a missing one is fine.
        wait_s: Seconds to wait for whoever holds a lock on it.

    Raises:
        RunError: LF5017, it is damaged; LF5018, somebody else holds it locked; LF5209, it cannot be
            read or written.
    """
    if not path.exists():
        return
    try:
        with closing(sqlite3.connect(path, timeout=wait_s, isolation_level=None)) as database:
            database.execute("BEGIN IMMEDIATE")
            try:
                (found,) = database.execute("PRAGMA quick_check(1)").fetchone()
            finally:
                with suppress(sqlite3.Error):  # what went wrong before is what to tell
                    database.execute("ROLLBACK")
    except sqlite3.Error as error:
        raise RunError(_of_sqlite(error, str(path))) from error
    if found != "ok":
        raise RunError(_damaged(str(found).splitlines()[-1], str(path)))


@contextmanager
def telling(where: str = "") -> Iterator[None]:
    """Turn what the SuperLink fails of into an error of lepton-fed; also a decorator.

    Args:
        where: File that is written or read, when it is a file of ours.

    Raises:
        RunError: LF5017, LF5018, LF5019 or LF5209, in place of an error of Flower, of its database,
            of HTTP or of the operating system that is raised inside.
    """
    try:
        yield
    except SQLAlchemyError as error:
        cause = getattr(error, "orig", None)
        if isinstance(cause, sqlite3.Error):
            raise RunError(_of_sqlite(cause, "flower.sqlite in the state folder")) from error
        raise RunError(_failed(error)) from error
    except (httpx.HTTPError, compat.FlowerError) as error:
        raise RunError(_failed(error)) from error
    except OSError as error:
        why = error.strerror or str(error)
        raise RunError(_unwritten(why, where or str(error.filename or ""))) from error


def _of_sqlite(error: sqlite3.Error, where: str) -> Problem:
    name = getattr(error, "sqlite_errorname", "")
    if name.startswith(_BUSY):
        return Problem(
            "LF5018",
            "another process holds the coordinator's database locked",
            where,
            remedy="end it (a backup, a database shell), then start the coordinator again: it goes "
            "on with its run",
        )
    if name.startswith(_DAMAGED):
        return _damaged(str(error), where)
    if name.startswith(_UNWRITTEN):
        return _unwritten(str(error), where)
    return _failed(error, where)


def _damaged(found: str, where: str) -> Problem:
    return Problem(
        "LF5017",
        f"the coordinator's database is damaged: {found}",
        where,
        remedy="look at the disk; then move the file and those beside it (-wal, -shm) away and "
        "start again: the coordinator makes a new one, lets the sites in again, and goes on with "
        "its run",
    )


def _unwritten(why: str, where: str) -> Problem:
    return Problem(
        "LF5209",
        f"this cannot be written: {why}",
        where,
        remedy="free disk space or mend the folder, then run again",
    )


def _failed(error: Exception, where: str = "") -> Problem:
    said = (str(error) or type(error).__name__).splitlines()[0]
    return Problem(
        "LF5019",
        f"Flower's SuperLink failed: {said}",
        where,
        remedy="start the coordinator again: it goes on with its run; if that does not help, look "
        "at the state folder's disk",
    )
