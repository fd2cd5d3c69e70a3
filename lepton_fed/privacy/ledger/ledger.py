"""The site's record of what its records have spent: written and synced before anything leaves.

A run reserves what all its rounds cost when it is accepted, so that two runs cannot each fit alone
and overspend together. A round is charged before it is trained: a crash may count a round that
never left, never miss one that did. The budget belongs to a name that the owner gives; what a
changed data set of that name spends goes on from there, and a name whose rows are also under
another one counts what they paid there.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lepton_fed.errors import BudgetExceeded, LeptonError, Problem, Refused
from lepton_fed.privacy.dp.accounting import Event
from lepton_fed.privacy.ledger.book import Book, RunAccount, RunName
from lepton_fed.privacy.ledger.chain import GENESIS, Chain, Entry, Head, Transaction, changed
from lepton_fed.privacy.ledger.rows import (
    Hashes,
    KnownRows,
    hashes_in,
    in_common,
    key_name,
    row_key,
)

__all__ = ["HeadKeeper", "Ledger"]


class HeadKeeper(Protocol):
    """A second place, on another disk or machine, that keeps where the ledger stands."""

    @property
    def place(self) -> str:
        """Return what it is called."""

    def read(self) -> Head | None:
        """Return what it keeps; None before the first."""

    def write(self, head: Head) -> None:
        """Keep another head, synced."""


@dataclass(frozen=True)
class _Sight:
    """A content that is new under its name, with the hashes of its rows."""

    key: str
    hashes: Hashes


class Ledger:
    """What the records of a site have spent, and the most that a data set of it may.

    Args:
        path: File; made with the first entry, its folder too.
        dataset: Name of the data set.
        content: Digest of what it holds now.
        epsilon: The budget.
        delta: Delta at which epsilon is counted.
        rows: How rows are known again under another name; None where there is one name only.
        keeper: Keeps the head in a second place.
        noted: Heads that are known from elsewhere, such as receipts.
        now: Tells the time.
        check_heads: Refuse an older copy; False only to look at one, or to accept it.

    Raises:
        Refused: LF4203, another process holds it; LF4204, it was changed; LF4206, it cannot be
            opened, and a symbolic link never is; LF4209, it is an older copy; LF4210, it is gone;
            LF4211, the second place does not say where it stood.
    """

    def __init__(
        self,
        path: Path,
        *,
        dataset: str,
        content: str,
        epsilon: float,
        delta: float,
        rows: KnownRows | None = None,
        keeper: HeadKeeper | None = None,
        noted: Sequence[Head] = (),
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        check_heads: bool = True,
    ) -> None:
        self._chain = Chain(path)
        self._dataset = dataset
        self._content = content
        self._epsilon = epsilon
        self._delta = delta
        self._rows = rows
        self._keeper = keeper
        self._noted = tuple(noted)
        self._now = now
        self._closed = False
        self._book = Book()
        known = self._known_heads()  # first: what another process writes meanwhile is newer
        self._read(thoroughly=True)
        if check_heads:
            self._check_heads(known)

    def close(self) -> None:
        """Write nothing any more."""
        self._closed = True

    @property
    def spent(self) -> float:
        """Return the epsilon that the data set has spent."""
        self._read()
        return self._book.spent(self._dataset, self._delta)

    @property
    def left(self) -> float:
        """Return the epsilon of the budget that is neither spent nor reserved."""
        self._read()
        return max(0.0, self._epsilon - self._book.committed(self._dataset, self._delta))

    @property
    def book(self) -> Book:
        """Return what all entries add up to, as they are now."""
        self._read()
        return self._book

    def entries(self) -> list[Entry]:
        """Return all entries, the oldest first, after checking each."""
        if not self._chain.exists:
            return []
        with self._chain.reading(thoroughly=True) as transaction:
            return list(transaction.after(Head(0, GENESIS)))

    def of_run(self, agreement: str) -> list[Event]:
        """Return what a run was charged, in order.

        Args:
            agreement: Digest of what was agreed to.
        """
        return self._book.of_run(agreement)

    def charged(self, run: RunName) -> list[Event]:
        """Return what a run was charged for this data set, in order.

        Args:
            run: The run.
        """
        self._read()
        return self._book.account(self._dataset, run).charged

    def reserve(self, event: Event, run: RunName, rounds: int) -> None:
        """Set aside what the rest of a run costs, or refuse the run.

        What other runs of the same coordinator have not used is free then: it executes one after
        another. A run that is known goes on where it was.

        Args:
            event: What a round costs.
            run: The run.
            rounds: Rounds of the run.

        Raises:
            BudgetExceeded: LF4207, they do not fit; nothing was written.
            Refused: The ledger is not whole, or cannot be written.
        """
        sight = self._look()
        with self._writing() as transaction:
            self._see(transaction, sight)
            self._free_others(transaction, run)
            account = self._book.account(self._dataset, run)
            if (account.event, account.rounds) != (event, rounds):
                self._append(
                    transaction,
                    "reserved",
                    **self._about(run),
                    event=event.record(),
                    rounds=rounds,
                )
            after = self._book.committed(self._dataset, self._delta)
            if not after <= self._epsilon:
                raise BudgetExceeded(
                    Problem("LF4207", f"the run's {rounds} rounds would bring epsilon to "
                            f"{after:.4g} {self._told()}", where=str(self._chain.path),
                            key="budget.epsilon",
                            remedy="a larger budget is the data owner's decision; a run with "
                            "fewer rounds or a smaller epsilon is the coordinator's")
                )  # fmt: skip

    def charge(self, event: Event, run: RunName, round_number: int, task: str) -> float:
        """Write down what comes next, or refuse it.

        Args:
            event: What is about to be run.
            run: For which run.
            round_number: For which round of it, from 1.
            task: Digest of the task.

        Returns:
            The epsilon spent once it has been run.

        Raises:
            BudgetExceeded: LF4201, with what is reserved for other runs it would exceed the
                budget; nothing was written.
            Refused: The ledger is not whole, or cannot be written. Whether the entry is on disk
                then shows when it is read again; nothing may leave on its account.
        """
        sight = self._look()
        with self._writing() as transaction:
            self._see(transaction, sight)
            self._append(
                transaction,
                "charged",
                **self._about(run),
                event=event.record(),
                round=round_number,
                task=task,
            )
            own = self._book.account(self._dataset, run)
            after = self._book.committed(self._dataset, self._delta, but=own)
            if not after <= self._epsilon:
                raise BudgetExceeded(
                    Problem("LF4201", f"this round would bring epsilon to {after:.4g} "
                            f"{self._told()}", where=str(self._chain.path),
                            remedy="end the run here; a larger budget is the data owner's decision")
                )  # fmt: skip
        return self._book.spent(self._dataset, self._delta)

    def answered(self, agreement: str) -> int:
        """Return the newest round of a run that :meth:`note_answer` was called for, or 0.

        Args:
            agreement: Digest of what was agreed to.
        """
        self._read()
        return self._book.answered(agreement)

    def training(self, agreement: str) -> str:
        """Return the name of the training that :meth:`note_answer` was called for, or nothing.

        Args:
            agreement: Digest of what was agreed to.
        """
        self._read()
        return self._book.training(agreement)

    def note_answer(self, run: RunName, round_number: int, training: str) -> bool:
        """Write down that something is about to leave that was made in a round.

        A later round may depend on it: who went on from a state of before, because a file is gone
        or an older copy, would spend what nobody counts. So would who trains the run a second time
        from another state folder, at the cost of the first.

        Args:
            run: The run.
            round_number: The round.
            training: A name that nobody else has, drawn when its first round was trained.

        Returns:
            Whether it may leave; False where something of the run left from another training.

        Raises:
            Refused: The ledger is not whole, or cannot be written; nothing may leave.
        """
        agreement = run.agreement
        if self.training(agreement) == training and self.answered(agreement) >= round_number:
            return True
        with self._writing() as transaction:
            if self._book.training(agreement) not in ("", training):
                return False
            self._append(
                transaction, "answered", **self._about(run), round=round_number, training=training
            )
        return True

    def release(self, run: str, why: str) -> list[RunAccount]:
        """Free what is reserved for a run still.

        Args:
            run: Its name, or the digest of its agreement.
            why: Is written down.

        Returns:
            The runs of that name with what they had reserved, as it was; empty if none had.
        """
        freed: list[RunAccount] = []
        if not any(self._is_open(account, run) for account in self.book.runs):
            return freed
        with self._writing() as transaction:
            for account in self._book.runs:
                if self._is_open(account, run):
                    freed.append(
                        RunAccount(
                            account.name, account.dataset, account.event,
                            account.rounds, list(account.charges),
                        )
                    )  # fmt: skip
                    self._free(transaction, account, why)
        return freed

    def accept_older_copy(self) -> list[Head]:
        """Write down that the owner takes this copy, although a newer one is known of.

        Returns:
            The heads that it lacks.
        """
        lacking = self._lacking(self._known_heads())
        gone = self._head_is_gone()
        if not (lacking or gone):
            return []
        if self._keeper is not None:
            self._keeper.write(self._book.head)
        with self._writing(unchecked=True) as transaction:
            for head in lacking:
                self._append(
                    transaction, "acknowledged", what="older copy", known=head.number,
                    hash=head.hash,
                )  # fmt: skip
        return lacking

    def _told(self) -> str:
        return (
            f"with what accepted runs have reserved; the budget of {self._dataset!r} is "
            f"{self._epsilon:g} at delta {self._delta:g}"
        )

    def _about(self, run: RunName) -> dict[str, str]:
        return {
            "agreement": run.agreement,
            "content": self._content,
            "coordinator": run.coordinator,
            "dataset": self._dataset,
            "run": run.run,
        }

    def _append(self, transaction: Transaction, kind: str, **fields: Any) -> None:
        time = self._now().isoformat(timespec="seconds")
        self._book.add(transaction.append(self._book.head, {**fields, "kind": kind, "time": time}))

    @contextmanager
    def _writing(self, *, unchecked: bool = False) -> Iterator[Transaction]:
        """Check what others have written meanwhile, write, and keep the new head."""
        if self._closed:
            raise Refused(
                Problem("LF4202", "the ledger cannot be written: it was closed",
                        where=str(self._chain.path), remedy="begin the run again")
            )  # fmt: skip
        try:
            self._make()
            with self._chain.writing() as transaction:
                self._take_in(transaction)
                if not unchecked:
                    self._check_heads(self._known_heads())
                self._name_place(transaction)
                yield transaction
            if self._keeper is not None:
                self._keeper.write(self._book.head)
        except BaseException:
            self._book = Book()  # it may hold what was never written
            with suppress(LeptonError):
                self._read()
            raise

    def _name_place(self, transaction: Transaction) -> None:
        """Write down where the head is kept from now on: it has to be there next time."""
        if self._keeper is None or self._keeper.place in self._book.head_kept_at:
            return
        self._keeper.write(self._book.head)  # first, or a kill in between would lock the site out
        self._append(transaction, "acknowledged", what="head", place=self._keeper.place)

    def _make(self) -> None:
        if self._chain.exists:
            return
        self._refuse_gone()
        time = self._now().isoformat(timespec="seconds")
        self._chain.make({"kind": "opened", "ledger": secrets.token_hex(16), "time": time})

    def _read(self, *, thoroughly: bool = False) -> None:
        if not self._chain.exists:
            self._refuse_gone()
            return
        try:
            with self._chain.reading(thoroughly=thoroughly) as transaction:
                self._take_in(transaction)
        except BaseException:
            self._book = Book()
            raise

    def _refuse_gone(self) -> None:
        if self._book.head.number or (self._rows is not None and self._rows.key.exists()):
            raise Refused(
                Problem("LF4210", "the ledger is gone: this site has kept one",
                        where=str(self._chain.path),
                        remedy="restore the newest backup; training stops until it is there")
            )  # fmt: skip

    def _take_in(self, transaction: Transaction) -> None:
        for entry in transaction.after(self._book.head):
            try:
                self._book.add(entry)
            except (KeyError, TypeError, ValueError):
                raise changed(self._chain.path, entry.number) from None

    def _look(self) -> _Sight | None:
        """Hash the rows if they are new, before anybody has to wait for it."""
        self._read()
        if self._rows is None or self._book.knows(self._dataset, self._content):
            return None
        self._make()
        secret = row_key(self._rows.key, make=not self._book.key)
        if self._book.key not in ("", key_name(secret)):
            raise Refused(
                Problem("LF4210", "this is not the key that the ledger's rows are known again by",
                        where=str(self._rows.key), remedy="restore it from a backup")
            )  # fmt: skip
        return _Sight(key_name(secret), self._rows.hashes(secret))

    def _see(self, transaction: Transaction, sight: _Sight | None) -> None:
        """Write down what the data set holds, and under which names its rows are known."""
        if self._book.knows(self._dataset, self._content):
            return
        about: dict[str, Any] = {"groups": [], "hashes": None, "key": "", "rows": None}
        if sight is not None:
            stored = {
                name: hashes_in(map(transaction.rows, self._book.rows_of(name)))
                for name in self._book.datasets
            }
            own = stored.pop(self._dataset, hashes_in([]))
            new = np.setdiff1d(sight.hashes, own, assume_unique=True)
            about = {
                "groups": [sorted([self._dataset, *them]) for them in in_common(new, stored)],
                "hashes": transaction.add_rows(new.astype("<u8").tobytes()),
                "key": sight.key,
                "rows": len(sight.hashes),
            }
        self._append(transaction, "dataset", dataset=self._dataset, content=self._content, **about)

    def _free_others(self, transaction: Transaction, run: RunName) -> None:
        for account in self._book.runs:
            same = (account.dataset, account.name.agreement) == (self._dataset, run.agreement)
            if account.remaining and run.coordinator == account.name.coordinator and not same:
                self._free(transaction, account, "its coordinator began another run")

    def _free(self, transaction: Transaction, account: RunAccount, why: str) -> None:
        self._append(
            transaction,
            "released",
            agreement=account.name.agreement,
            coordinator=account.name.coordinator,
            dataset=account.dataset,
            rounds=account.remaining,
            run=account.name.run,
            why=why,
        )

    @staticmethod
    def _is_open(account: RunAccount, run: str) -> bool:
        return account.remaining > 0 and run in (account.name.run, account.name.agreement)

    def _known_heads(self) -> list[Head]:
        kept = self._keeper.read() if self._keeper is not None else None
        return [*self._noted, *([kept] if kept is not None else [])]

    def _lacking(self, known: Sequence[Head]) -> list[Head]:
        """Return the heads known from elsewhere that this ledger has never had."""
        return [head for head in dict.fromkeys(known) if not self._book.has(head)]

    def _head_is_gone(self) -> bool:
        keeper = self._keeper
        return (
            keeper is not None and keeper.place in self._book.head_kept_at and keeper.read() is None
        )

    def _check_heads(self, known: Sequence[Head]) -> None:
        lacking = self._lacking(known)
        if lacking:
            newest = max(lacking, key=lambda head: head.number)
            raise Refused(
                Problem("LF4209", f"the ledger is an older copy, or another one: it has "
                        f"{self._book.head.number} entries and lacks entry {newest.number} "
                        f"({newest.hash[:12]}), which is known from the receipts or the second "
                        "place", where=str(self._chain.path),
                        remedy="restore the newest copy; if there is none, lower the budget by "
                        "what is missing and run `lepton-fed ledger accept`")
            )  # fmt: skip
        if self._head_is_gone():
            raise Refused(
                Problem("LF4211", "the second place does not say where the ledger stood: there is "
                        "no such file", where=self._keeper.place if self._keeper else "",
                        key="ledger.head",
                        remedy="mount its disk; if it is lost, run `lepton-fed ledger accept`")
            )  # fmt: skip
