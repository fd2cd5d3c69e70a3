"""Receipts: what left the building in a round, written and synced before it leaves.

A receipt is one JSON file that a person can read. Each carries the hash of the one before, so that
one that was changed or taken away shows. What the coordinator chose of it (the run's name, the
round) is cut to size first: nothing that it sends makes a receipt that cannot be read again. Nor
can it fill the disk: what has left before has its receipt, and of refusals so many are written.
docs/reference/receipts.md is the format in words.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from lepton_fed.core.decode import decode, strict_json
from lepton_fed.core.digests import canonical_json
from lepton_fed.core.exchange import Ask, PhaseAsk, PhaseReply, Reply, legible
from lepton_fed.core.layout import Vector
from lepton_fed.core.norms import euclidean_norm
from lepton_fed.errors import Problem, Refused
from lepton_fed.runs.files import reading, write_atomic, writing

__all__ = ["Receipt", "Receipts", "VectorRecord", "receipt_of", "receipt_of_phase"]

_log = logging.getLogger("lepton_fed.site")

_GENESIS = hashlib.sha256(b"lepton-fed receipts 1").hexdigest()
_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
_FILE = re.compile(r"[0-9]{8}-.*\.json")
_MOST_ROUNDS = 1_000_000
_LONGEST_RUN = 128
_LONGEST_DIGEST = 64
_MOST_REFUSALS = 32  # a round: three attempts of five phases, twice over, leave less
_KNOWN_AFTER_RESTART = 1024  # receipts that a process reads when it starts: some 20 rounds of them


@dataclass(frozen=True)
class VectorRecord:
    """A vector that left.

    Args:
        elements: How many numbers it has.
        bytes: How many bytes.
        norm_before: Its Euclidean norm before it was clipped.
        norm_after: Its norm as it left.
        sha256: SHA-256 of its bytes: little-endian float32, or the packed words of a masked one.
    """

    elements: int
    bytes: int
    norm_before: float
    norm_after: float
    sha256: str


@dataclass(frozen=True)
class Receipt:
    """What left in answer to one ask.

    Args:
        time: When, UTC.
        site: Name of the site.
        coordinator: Words of the coordinator's key.
        address: Where it went.
        run: Name of the run.
        round: Round, from 1; 0 when a round was asked for that no run has.
        task: Digest of the task.
        policy: Digest of the policy in force.
        agreement: Digest of what was agreed to.
        vectors: The update's vectors, by name.
        numbers: What else left, by name, in words.
        refusal: Code of the refusal, when that is what left; else empty.
        ledger: Where the ledger stood in a run with record-level DP, signed; else empty.
        previous: SHA-256 of the receipt before.
    """

    time: str
    site: str
    coordinator: str
    address: str
    run: str
    round: int
    task: str
    policy: str
    agreement: str
    vectors: dict[str, VectorRecord] = field(default_factory=dict)
    numbers: dict[str, str] = field(default_factory=dict)
    refusal: str = ""
    ledger: str = ""
    previous: str = ""


def receipt_of(
    reply: Reply,
    ask: Ask,
    about: Mapping[str, str],
    terms: str = "",
    client: Mapping[str, str] | None = None,
    *,
    noised: bool = False,
) -> Receipt:
    """Return the receipt of a reply.

    Args:
        reply: What is about to leave.
        ask: What it answers.
        about: The fields that do not follow from them: time, site, coordinator, address, run,
            task, policy.
        terms: What the run's epsilon depends on, in words; empty without record-level DP.
        client: What client-level DP protects of the update, by name; None without.
        noised: Whether the run has an epsilon, which then does not cover some of the numbers.

    Returns:
        The receipt, without the hash of the one before; :meth:`Receipts.write` adds that.
    """
    vectors: dict[str, VectorRecord] = {}
    numbers: dict[str, str] = {}
    outside: list[str] = []
    if reply.update is not None:
        for name, vector in reply.update.vectors.items():
            vectors[name] = _record(vector, reply.update.norms.get(name))
        numbers["weight"] = _exact(reply.update.weight)
        numbers |= client or {}
    if reply.counts is not None:
        numbers["evaluation"] = f"{len(reply.counts)} counts on held-out rows"
        outside.append("evaluation")
    if reply.epsilon is not None:
        numbers["epsilon"] = _exact(reply.epsilon)
        outside.append("epsilon (the row count shows in it)")
        if terms:
            numbers["epsilon holds for"] = terms
    if reply.noise_multiplier is not None:
        numbers["noise multiplier"] = _exact(reply.noise_multiplier)
        outside.append("noise multiplier (the row count shows in it)")
    if noised and outside:
        numbers["outside epsilon"] = ", ".join(outside)
    if reply.again:
        numbers["sent again"] = "the stored answer to the same ask; nothing was trained"
    return Receipt(
        **{**about, "run": legible(about["run"], _LONGEST_RUN)},
        round=ask.round_number if 1 <= ask.round_number <= _MOST_ROUNDS else 0,
        agreement=legible(ask.agreement, _LONGEST_DIGEST),
        vectors=vectors,
        numbers=numbers,
        refusal=reply.refusal.code if reply.refusal else "",
    )


def receipt_of_phase(reply: PhaseReply, asked: PhaseAsk, about: Mapping[str, str]) -> Receipt:
    """Return the receipt of an answer to a phase of secure aggregation.

    Args:
        reply: What is about to leave.
        asked: What it answers.
        about: As for :func:`receipt_of`.

    Returns:
        The receipt, without the hash of the one before.
    """
    vectors: dict[str, VectorRecord] = {}
    if reply.masked is not None:
        content = reply.masked[:]
        before, after = reply.norms
        digest = hashlib.sha256(content.data).hexdigest()
        vectors["masked"] = VectorRecord(reply.words, content.size, before, after, digest)
    ask, numbers = asked.ask, {"phase": f"{asked.phase}, attempt {asked.attempt}"}
    if reply.body:
        # So that a message has the receipt of an equal one, and of no other.
        digest = hashlib.sha256(reply.body).hexdigest()
        numbers["message"] = f"{len(reply.body)} bytes, SHA-256 {digest}"
    return Receipt(
        **{**about, "run": legible(about["run"], _LONGEST_RUN)},
        round=ask.round_number if 1 <= ask.round_number <= _MOST_ROUNDS else 0,
        agreement=legible(ask.agreement, _LONGEST_DIGEST),
        vectors=vectors,
        numbers={**numbers, **reply.notes},
        refusal=reply.refusal.code if reply.refusal else "",
    )


def _exact(number: float) -> str:
    """Return a number with every digit that left."""
    return repr(float(number))


def _record(vector: Vector, before: float | None) -> VectorRecord:
    content = np.ascontiguousarray(vector, "<f4")
    norm = euclidean_norm(content)
    digest = hashlib.sha256(content.tobytes()).hexdigest()
    return VectorRecord(
        content.size, content.nbytes, norm if before is None else before, norm, digest
    )


class Receipts:
    """A site's receipts; one process at a time may write them.

    Args:
        folder: Where they are; made with the first.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._last: tuple[int, str] | None = None
        self._known: dict[str, Path] = {}
        self._refusals: Counter[tuple[str, int]] = Counter()

    def write(self, receipt: Receipt) -> Path | None:
        """Write a receipt and sync it, unless there is one; nothing may leave before.

        What left first is what leaves again, so an equal receipt is not written twice. After 32
        refusals of a run's round one of which nothing but a code leaves has none.

        Args:
            receipt: What is about to leave.

        Returns:
            The file, that of the equal receipt if there is one; None for none: then nothing but
            the refusal's code may leave.

        Raises:
            Refused: LF4642, it could not be read again.
            RunError: It cannot be written.
        """
        self._make_folder()
        number, head = self._last or self._look()
        run = receipt.run if _RUN.fullmatch(receipt.run) else "run"
        path = self._folder / f"{number + 1:08d}-{run}-round-{receipt.round:04d}.json"
        if not _FILE.fullmatch(path.name):  # it would not be found again
            raise _unreadable(path)
        content = _content(replace(receipt, previous=head), path)
        known, where = self._known.get(_told(receipt)), f"round {receipt.round} of {receipt.run}"
        if known is not None:
            _log.info("receipt.there %s: what leaves again is in %s", where, known.name)
            return known
        if _is_bare(receipt) and self._refusals[_round(receipt)] >= _MOST_REFUSALS:
            _log.warning("receipt.none %s: too many refusals; the code alone leaves", where)
            return None
        self._last = None  # should it fail, it may be there all the same
        write_atomic(path, content)
        self._last = number + 1, hashlib.sha256(content).hexdigest()
        self._note(receipt, path)
        return path

    def head(self) -> str:
        """Return the SHA-256 of the last receipt; of no receipt, what the first is chained to.

        Who notes it down sees later whether receipts were taken off the end.

        Raises:
            RunError: The receipt cannot be read.
        """
        return self._head(self._files())

    def newest_first(self) -> Iterator[Receipt]:
        """Yield the receipts, the newest first; their chain is not checked.

        Raises:
            Refused: LF4641, one is malformed.
            RunError: One cannot be read.
        """
        for path in reversed(self._files()):
            with reading(path):
                content = path.read_bytes()
            try:
                receipt = _receipt(content)
            except ValueError:
                raise _changed(path) from None
            yield receipt

    def read(self) -> list[Receipt]:
        """Return all receipts, the oldest first, after checking their chain.

        Raises:
            Refused: LF4641, one was changed or is missing.
            RunError: One cannot be read.
        """
        previous, found = _GENESIS, []
        for path in self._files():
            with reading(path):
                content = path.read_bytes()
            try:
                receipt = _receipt(content)
            except ValueError:
                raise _changed(path) from None
            if receipt.previous != previous:
                raise _changed(path)
            previous = hashlib.sha256(content).hexdigest()
            found.append(receipt)
        return found

    def _look(self) -> tuple[int, str]:
        """Find out on disk where the chain is, and what its newest receipts are of."""
        files = self._files()
        self._known.clear()
        self._refusals.clear()
        for path in files[-_KNOWN_AFTER_RESTART:]:
            with reading(path):
                content = path.read_bytes()
            try:
                self._note(_receipt(content), path)
            except ValueError:
                continue  # it counts for nothing; read() says that it was changed
        self._last = int(files[-1].name[:8]) if files else 0, self._head(files)
        return self._last

    def _note(self, receipt: Receipt, path: Path) -> None:
        self._known[_told(receipt)] = path
        self._refusals[_round(receipt)] += _is_bare(receipt)

    def _head(self, known: list[Path]) -> str:
        return _hash(known[-1]) if known else _GENESIS

    def _make_folder(self) -> None:
        """Make the folder so that it is there after a power cut too."""
        with writing(self._folder):
            if self._folder.is_dir():
                return
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            parent = os.open(self._folder.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(parent)
            finally:
                os.close(parent)

    def _files(self) -> list[Path]:
        with reading(self._folder):
            entries = os.listdir(self._folder) if self._folder.is_dir() else []
        return sorted(self._folder / name for name in entries if _FILE.fullmatch(name))


def _told(receipt: Receipt) -> str:
    """Return the digest of what a receipt says of what left, whenever that was."""
    return hashlib.sha256(canonical_json(replace(receipt, time="", previous=""))).hexdigest()


def _round(receipt: Receipt) -> tuple[str, int]:
    return receipt.run, receipt.round


def _is_bare(receipt: Receipt) -> bool:
    """Return whether nothing but a refusal has left."""
    return bool(receipt.refusal) and not receipt.vectors and receipt.numbers.keys() <= {"phase"}


def _hash(path: Path) -> str:
    with reading(path):
        return hashlib.sha256(path.read_bytes()).hexdigest()


def _receipt(content: bytes) -> Receipt:
    """Return the receipt in a file; those of before there was a head in them have none.

    Raises:
        ValueError: It is no receipt.
    """
    value = strict_json(content)
    return decode(Receipt, {"ledger": "", **value} if isinstance(value, dict) else value)


def _content(receipt: Receipt, path: Path) -> bytes:
    """Return the bytes of a receipt's file, after reading them as they will be read."""
    try:
        content = canonical_json(receipt) + b"\n"
        readable = _receipt(content) == receipt
    except ValueError:
        readable = False
    if not readable:
        raise _unreadable(path)
    return content


def _unreadable(path: Path) -> Refused:
    return Refused(
        Problem("LF4642", "no receipt can be written of this, so nothing leaves", where=str(path),
                remedy="look in the site's log for what was asked and answered")
    )  # fmt: skip


def _changed(path: Path) -> Refused:
    return Refused(
        Problem("LF4641", "this receipt is malformed or does not follow from the one before: one "
                "of the two was changed, or one between them is missing", where=str(path),
                remedy="compare with a backup; do not rely on the receipts from here on")
    )  # fmt: skip
