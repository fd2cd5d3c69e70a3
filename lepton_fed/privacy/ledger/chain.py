"""The file of a ledger: entries in SQLite, each chained to the one before by its hash.

SQLite makes a commit whole or nothing and syncs it (``synchronous=EXTRA``: file, journal and
folder) before it returns. Its triggers refuse changes of what is written, against mistakes; against
everything else the chain is the check: each entry's canonical JSON holds its number and the hash of
the one before. Nothing is held open between two transactions, so that several processes may share
a file, and one that is put back from a backup is the one that is read.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import sqlite3
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lepton_fed.core.decode import strict_json
from lepton_fed.core.digests import canonical_json
from lepton_fed.errors import Problem, Refused

__all__ = [
    "GENESIS",
    "Chain",
    "Entry",
    "Head",
    "Transaction",
    "aside_of",
    "changed",
    "entry_hash",
    "followed",
    "give_name",
]

GENESIS = hashlib.sha256(b"lepton-fed ledger 2").hexdigest()
"""What the first entry is chained to."""

_TABLES = {
    "entries": "CREATE TABLE entries (number INTEGER PRIMARY KEY, body BLOB NOT NULL, "
    "hash TEXT NOT NULL) STRICT",
    "rows": "CREATE TABLE rows (digest TEXT PRIMARY KEY, hashes BLOB NOT NULL) STRICT",
}
_TRIGGERS = {
    f"no_{verb.lower()}_of_{table}": f"CREATE TRIGGER no_{verb.lower()}_of_{table} BEFORE {verb} "
    f"ON {table} BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END"
    for table in _TABLES
    for verb in ("UPDATE", "DELETE")
}
_SCHEMA = {**_TABLES, **_TRIGGERS}
_SIZES = ("page_count", "page_size")
_PATIENCE_S = 60.0  # another process may be computing an epsilon in its transaction
_LOCKED = {"SQLITE_BUSY", "SQLITE_LOCKED"}
_DAMAGED = {"SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_ERROR", "SQLITE_SCHEMA", "SQLITE_MISMATCH"}


@dataclass(frozen=True)
class Head:
    """Where a ledger stands: enough to tell later that a copy is older.

    Args:
        number: Number of the last entry, from 1; 0 of a ledger without any.
        hash: Its hash, 64 hexadecimal digits.
    """

    number: int
    hash: str


@dataclass(frozen=True)
class Entry:
    """One entry.

    Args:
        number: Place in the ledger, from 1.
        hash: SHA-256 of its canonical JSON.
        body: What it says: ``kind``, ``number``, ``previous``, ``time``, and by its kind more.
    """

    number: int
    hash: str
    body: Mapping[str, Any]


def entry_hash(body: Mapping[str, Any]) -> str:
    """Return the hash of an entry: SHA-256 over its canonical JSON."""
    return hashlib.sha256(canonical_json(dict(body))).hexdigest()


def followed(before: Head, body: object) -> Entry:
    """Return the entry that an object is, if it follows from the one before.

    Raises:
        ValueError: It does not.
    """
    if not isinstance(body, dict):
        raise ValueError("it is no object")
    if body.get("number") != before.number + 1 or body.get("previous") != before.hash:
        raise ValueError("it does not follow from the entry before")
    return Entry(before.number + 1, entry_hash(body), body)


def changed(path: Path, number: int) -> Refused:
    """Return the refusal of a ledger in which an entry is not what was written."""
    return Refused(
        Problem("LF4204", f"the ledger was changed: entry {number} is not there, is malformed, or "
                "does not follow from the one before", where=str(path),
                remedy="restore the newest backup; training stops until the ledger is whole")
    )  # fmt: skip


class Transaction:
    """What may be done with a ledger's file while nobody else writes to it.

    Args:
        connection: In a transaction.
        path: Its file.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection = connection
        self._path = path

    def head(self) -> Head:
        """Return where the ledger stands, without checking the chain."""
        row = self._connection.execute(
            "SELECT number, hash FROM entries ORDER BY number DESC LIMIT 1"
        ).fetchone()
        return Head(*row) if row else Head(0, GENESIS)

    def after(self, head: Head) -> Iterator[Entry]:
        """Yield the entries after one that is known, each after it was checked.

        Args:
            head: The last that is known.

        Raises:
            Refused: LF4204, the known one is another now, or one does not follow.
        """
        if head.number:
            known = self._connection.execute(
                "SELECT hash, body FROM entries WHERE number = ?", (head.number,)
            ).fetchone()
            if known is None or known[0] != head.hash or _hashed(known[1]) != head.hash:
                raise changed(self._path, head.number)
        rows = self._connection.execute(
            "SELECT number, body, hash FROM entries WHERE number > ? ORDER BY number",
            (head.number,),
        )
        for number, content, said in rows:
            try:
                entry = followed(head, strict_json(bytes(content)))
                whole = (number, said) == (entry.number, entry.hash) and _hashed(content) == said
            except (TypeError, ValueError):
                whole = False
            if not whole:
                raise changed(self._path, head.number + 1)
            head = Head(entry.number, entry.hash)
            yield entry

    def append(self, head: Head, fields: Mapping[str, Any]) -> Entry:
        """Write an entry; it counts once the transaction is over.

        Args:
            head: The last entry.
            fields: What it says, ``kind`` and ``time`` among it.
        """
        body = {**fields, "number": head.number + 1, "previous": head.hash}
        entry = Entry(head.number + 1, entry_hash(body), body)
        self._connection.execute(
            "INSERT INTO entries VALUES (?, ?, ?)", (entry.number, canonical_json(body), entry.hash)
        )
        return entry

    def add_rows(self, hashes: bytes) -> str:
        """Keep the keyed hashes of rows; return the digest they are found by."""
        digest = hashlib.sha256(hashes).hexdigest()
        self._connection.execute("INSERT OR IGNORE INTO rows VALUES (?, ?)", (digest, hashes))
        return digest

    def rows(self, digest: str) -> bytes:
        """Return the keyed hashes of rows.

        Raises:
            Refused: LF4204, they are not there or were changed.
        """
        row = self._connection.execute(
            "SELECT hashes FROM rows WHERE digest = ?", (digest,)
        ).fetchone()
        if row is None or hashlib.sha256(row[0]).hexdigest() != digest:
            raise Refused(
                Problem("LF4204", "the ledger was changed: the hashes of a data set's rows are not "
                        "those that were written", where=str(self._path),
                        remedy="restore the newest backup")
            )  # fmt: skip
        return bytes(row[0])


class Chain:
    """The file.

    Args:
        path: Where it is or will be.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def exists(self) -> bool:
        """Return whether there is a file with something in it.

        Raises:
            Refused: LF4206, what is there is no plain file, or cannot be looked at.
        """
        try:
            found = self.path.lstat()
        except FileNotFoundError:
            return False
        except OSError as error:
            raise self._unopened(str(error.strerror)) from error
        if not stat.S_ISREG(found.st_mode):
            raise self._unopened("it is a link, a folder or something else that is no plain file")
        return found.st_size > 0

    def make(self, fields: Mapping[str, Any]) -> None:
        """Make the file with its first entry, unless it is there.

        It gets its name only when it is whole: a kill leaves no ledger, or one.

        Args:
            fields: What the first entry says.

        Raises:
            Refused: LF4202 or LF4206, it cannot be written.
        """
        if self.exists:
            return
        aside = Chain(aside_of(self.path))
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # SQLite would make it readable to others.
            os.close(os.open(aside.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            try:
                with aside._connected(write=True) as connection:
                    for statement in _SCHEMA.values():
                        connection.execute(statement)
                    Transaction(connection, aside.path).append(Head(0, GENESIS), fields)
            except BaseException:
                aside.path.unlink(missing_ok=True)
                raise
            give_name(aside.path, self.path)
        except OSError as error:
            raise self._unopened(str(error.strerror)) from error

    @contextmanager
    def reading(self, *, thoroughly: bool = False) -> Iterator[Transaction]:
        """Read, while nobody writes.

        Args:
            thoroughly: Look at the structure of the whole file too.

        Raises:
            Refused: LF4203 to LF4206, it cannot be read, or is no ledger.
        """
        with self._connected(write=False) as connection:
            self._check(connection, thoroughly)
            yield Transaction(connection, self.path)

    @contextmanager
    def writing(self) -> Iterator[Transaction]:
        """Read and write: all of it is on the disk afterwards, or after an error nothing.

        Raises:
            Refused: LF4202, it cannot be written; LF4203 to LF4206 as for reading.
        """
        with self._connected(write=True) as connection:
            self._check(connection, thoroughly=False)
            yield Transaction(connection, self.path)

    def head(self) -> Head:
        """Return where the ledger stands, without checking the chain; of no file, the beginning.

        Raises:
            Refused: LF4203 to LF4206, it cannot be read.
        """
        if not self.exists:
            return Head(0, GENESIS)
        with self.reading() as transaction:
            return transaction.head()

    @contextmanager
    def _connected(self, *, write: bool) -> Iterator[sqlite3.Connection]:
        connection: sqlite3.Connection | None = None
        try:
            connection = sqlite3.connect(self.path, isolation_level=None, timeout=_PATIENCE_S)
            for pragma in ("journal_mode=DELETE", "synchronous=EXTRA", "trusted_schema=OFF"):
                connection.execute(f"PRAGMA {pragma}").fetchall()
            connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            yield connection
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise self._refusal(error, write) from error
        finally:
            if connection is not None:
                with suppress(sqlite3.Error):
                    if connection.in_transaction:
                        connection.execute("ROLLBACK")
                connection.close()

    def _check(self, connection: sqlite3.Connection, thoroughly: bool) -> None:
        found = dict(
            connection.execute("SELECT name, sql FROM sqlite_schema WHERE sql IS NOT NULL")
        )
        pages, page = (connection.execute(f"PRAGMA {name}").fetchone()[0] for name in _SIZES)
        whole = found == _SCHEMA and pages * page == self.path.stat().st_size
        if whole and thoroughly:
            whole = connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        if not whole:
            raise self._damaged()

    def _refusal(self, error: sqlite3.Error, write: bool) -> Refused:
        name = str(getattr(error, "sqlite_errorname", "") or "SQLITE_CORRUPT")
        kind = "_".join(name.split("_")[:2])
        if kind in _LOCKED:
            return Refused(
                Problem("LF4203", "another process has been writing to this ledger for "
                        f"{_PATIENCE_S:g} s", where=str(self.path),
                        remedy="see what hangs, and end it")
            )  # fmt: skip
        if kind in _DAMAGED or isinstance(error, sqlite3.ProgrammingError):
            return self._damaged()
        if kind == "SQLITE_CANTOPEN" or not write:
            return self._unopened(str(error))
        return Refused(
            Problem("LF4202", f"the ledger cannot be written: {error}", where=str(self.path),
                    remedy="free disk space; the next round tries again")
        )  # fmt: skip

    def _damaged(self) -> Refused:
        return Refused(
            Problem("LF4204", "the ledger was changed: this is no whole ledger any more",
                    where=str(self.path),
                    remedy="restore the newest backup; training stops until the ledger is whole")
        )  # fmt: skip

    def _unopened(self, why: str) -> Refused:
        return Refused(
            Problem("LF4206", f"the ledger cannot be opened: {why}", where=str(self.path),
                    remedy="make it a plain file that this site may write")
        )  # fmt: skip


def _hashed(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def aside_of(path: Path) -> Path:
    """Return a name beside a file, for what is not whole yet; nobody can foresee it."""
    return path.parent / f".{secrets.token_hex(8)}.partial"


def give_name(aside: Path, path: Path) -> None:
    """Give a whole file its name, durably, unless another process was faster.

    Raises:
        OSError: It cannot be done.
    """
    try:
        with suppress(FileExistsError):
            os.link(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
