"""What a ledger's entries add up to: which rows belong to which name, and what each run costs.

Two names may hold the same row, so a row may have paid under both. ``groups`` are the sets of names
that some row is under all of; what a name has spent is the most that any group with that name in it
has, all its names together. That is what the record that paid most has paid, whatever it was called
at the time, and goes on being so when one of the names spends more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lepton_fed.privacy.dp.accounting import Event, epsilon_of, event_of
from lepton_fed.privacy.ledger.chain import GENESIS, Entry, Head

__all__ = ["Book", "RunAccount", "RunName"]


@dataclass(frozen=True)
class RunName:
    """A run, as a site knows it.

    Args:
        run: Name that the coordinator gave it.
        agreement: Digest of what was agreed to; tells it from others of the same name.
        coordinator: Who runs it; one coordinator executes one run after another.
    """

    run: str
    agreement: str
    coordinator: str = ""


@dataclass
class RunAccount:
    """What a run may cost a data set, and what it has.

    Args:
        name: The run.
        dataset: Name of the data set.
        event: What each of its rounds was to cost when it was last accepted.
        rounds: How many it was to have; 0 when nothing is reserved.
        charges: Round and cost of each charge.
        answered: Newest round of which something left; told only where more depends on it than
            the cost.
        training: Name of the training that it was made in; empty before the first.
    """

    name: RunName
    dataset: str
    event: Event | None = None
    rounds: int = 0
    charges: list[tuple[int, Event]] = field(default_factory=list)
    answered: int = 0
    training: str = ""

    @property
    def remaining(self) -> int:
        """Return how many rounds are reserved still.

        Rounds only go up: one that passed without this site is not asked for any more, and what
        was reserved for it is free. One that had to be trained twice has used up another, unless
        the second time cost nothing.
        """
        newest = max((number for number, _ in self.charges), default=0)
        paid = sum(1 for _, event in self.charges if event.steps)
        return max(0, self.rounds - max(newest, paid))

    @property
    def mechanisms(self) -> list[str]:
        """Return the mechanisms that were charged or are reserved, by name."""
        events = [*self.charged, *([self.event] if self.event else [])]
        return sorted({event.mechanism for event in events})

    @property
    def samplers(self) -> list[str]:
        """Return the samplers that were charged or are reserved, by name."""
        events = [*self.charged, *([self.event] if self.event else [])]
        return sorted({event.sampler for event in events})

    @property
    def charged(self) -> list[Event]:
        """Return what was charged."""
        return [event for _, event in self.charges]

    @property
    def reserved(self) -> list[Event]:
        """Return what is reserved still."""
        if self.event is None or not self.remaining:
            return []
        return [self.event.after(self.charged).times(self.remaining)]


class Book:
    """The entries read so far."""

    def __init__(self) -> None:
        self.head = Head(0, GENESIS)
        self._hashes: list[str] = []
        self.identity = ""
        self.key = ""
        self.head_kept_at: set[str] = set()
        self.accepted: set[Head] = set()
        self.groups: set[frozenset[str]] = set()
        self._contents: dict[str, set[str]] = {}
        self._rows: dict[str, list[str]] = {}
        self._runs: dict[tuple[str, str], RunAccount] = {}

    @property
    def datasets(self) -> list[str]:
        """Return the known names, the oldest first."""
        return list(self._contents)

    @property
    def runs(self) -> list[RunAccount]:
        """Return all runs, the oldest first."""
        return list(self._runs.values())

    def knows(self, dataset: str, content: str) -> bool:
        """Return whether a name was seen with this content."""
        return content in self._contents.get(dataset, ())

    def contents(self, dataset: str) -> set[str]:
        """Return the digests of the contents that a name was seen with."""
        return set(self._contents.get(dataset, ()))

    def rows_of(self, dataset: str) -> list[str]:
        """Return the digests of the parts of a name's row hashes."""
        return list(self._rows.get(dataset, ()))

    def account(self, dataset: str, name: RunName) -> RunAccount:
        """Return what is known of a run on a data set; of an unknown one, nothing."""
        return self._runs.get((dataset, name.agreement), RunAccount(name, dataset))

    def of_run(self, agreement: str) -> list[Event]:
        """Return what a run was charged, whatever the data set was called."""
        return [
            event
            for account in self._runs.values()
            if account.name.agreement == agreement
            for event in account.charged
        ]

    def answered(self, agreement: str) -> int:
        """Return the newest round of a run of which something left, where that is told; or 0."""
        found = [a.answered for a in self._runs.values() if a.name.agreement == agreement]
        return max(found, default=0)

    def training(self, agreement: str) -> str:
        """Return the name of the training that what left of a run was made in; or an empty one."""
        found = [a.training for a in self._runs.values() if a.name.agreement == agreement]
        return max(found, default="")

    def with_rows_of(self, dataset: str) -> list[frozenset[str]]:
        """Return the groups with a name in them; there is always the one of itself."""
        found = [group for group in self.groups if dataset in group]
        return sorted(found, key=sorted) or [frozenset({dataset})]

    def spent(self, dataset: str, delta: float) -> float:
        """Return the epsilon that the record of a data set that paid most has paid."""
        return self._cost(dataset, delta, [])

    def committed(self, dataset: str, delta: float, *, but: RunAccount | None = None) -> float:
        """Return that epsilon with what accepted runs may still cost.

        Args:
            dataset: Name of the data set.
            delta: Delta at which epsilon is counted.
            but: A run of which only what was charged counts.
        """
        return self._cost(
            dataset, delta, [account for account in self._runs.values() if account is not but]
        )

    def _cost(self, dataset: str, delta: float, open_runs: Sequence[RunAccount]) -> float:

        def events(group: frozenset[str]) -> Iterator[Event]:
            for account in self._runs.values():
                yield from account.charged if account.dataset in group else ()
            for account in open_runs:
                yield from account.reserved if account.dataset in group else ()

        return max(epsilon_of(events(group), delta) for group in self.with_rows_of(dataset))

    def add(self, entry: Entry) -> None:
        """Take an entry in.

        Raises:
            KeyError: It lacks something.
            TypeError: Something in it has another type.
            ValueError: It is no entry of a known kind.
        """
        body = entry.body
        kinds = {
            "opened": self._open,
            "dataset": self._see,
            "reserved": self._reserve,
            "charged": self._charge,
            "answered": self._answer,
            "released": self._release,
            "acknowledged": self._acknowledge,
        }
        if body["kind"] not in kinds or (body["kind"] == "opened") != (entry.number == 1):
            raise ValueError(f"an entry of the kind {body['kind']!r}")
        kinds[body["kind"]](body)
        self.head = Head(entry.number, entry.hash)
        self._hashes.append(entry.hash)

    def has(self, head: Head) -> bool:
        """Return whether the ledger was at a head once, or its owner accepted that it was not."""
        if head.number == 0 or head in self.accepted:
            return True
        return head.number <= len(self._hashes) and self._hashes[head.number - 1] == head.hash

    def _open(self, body: Mapping[str, Any]) -> None:
        self.identity = _text(body, "ledger")

    def _see(self, body: Mapping[str, Any]) -> None:
        dataset = _text(body, "dataset")
        self._contents.setdefault(dataset, set()).add(_text(body, "content"))
        self.groups |= {frozenset(group) for group in body["groups"]}
        if body["hashes"] is not None:
            self._rows.setdefault(dataset, []).append(_text(body, "hashes"))
            self.key = _text(body, "key")

    def _reserve(self, body: Mapping[str, Any]) -> None:
        account = self._of(body)
        account.event, account.rounds = event_of(body["event"]), _count(body, "rounds")

    def _charge(self, body: Mapping[str, Any]) -> None:
        self._of(body).charges.append((_count(body, "round"), event_of(body["event"])))

    def _answer(self, body: Mapping[str, Any]) -> None:
        account = self._of(body)
        account.answered = max(account.answered, _count(body, "round"))
        account.training = _text(body, "training")

    def _release(self, body: Mapping[str, Any]) -> None:
        account = self._of(body)
        account.event, account.rounds = None, 0

    def _acknowledge(self, body: Mapping[str, Any]) -> None:
        if body["what"] == "head":
            self.head_kept_at.add(_text(body, "place"))
        elif body["what"] == "older copy":
            self.accepted.add(Head(_count(body, "known"), _text(body, "hash")))
        else:
            raise ValueError("nothing that could be acknowledged")

    def _of(self, body: Mapping[str, Any]) -> RunAccount:
        dataset = _text(body, "dataset")
        name = RunName(_text(body, "run"), _text(body, "agreement"), _text(body, "coordinator"))
        return self._runs.setdefault((dataset, name.agreement), RunAccount(name, dataset))


def _text(body: Mapping[str, Any], key: str) -> str:
    if not isinstance(body[key], str):
        raise TypeError(f"{key} is no text")
    return str(body[key])


def _count(body: Mapping[str, Any], key: str) -> int:
    value = body[key]
    if type(value) is not int or not 0 <= value < math.inf:
        raise ValueError(f"{key} is no count")
    return value
