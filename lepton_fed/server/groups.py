"""The groups of a round that is summed by secure aggregation, and their files.

A group's file is written before each phase and read by the process after this one. Its envelopes
and its sum are in files beside it, each written once: of a thousand sites the envelopes take more
than a hundred megabytes. They come first, so that the file that says they are there is never alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from lepton_fed.core.decode import decode, strict_json
from lepton_fed.core.digests import canonical_json
from lepton_fed.core.exchange import Phase
from lepton_fed.privacy.secagg.collector import Collector, Progress
from lepton_fed.privacy.secagg.masks import Words
from lepton_fed.privacy.secagg.messages import Wire
from lepton_fed.privacy.secagg.vector import Opened
from lepton_fed.runs.files import (
    read_tensors,
    reading,
    replacing,
    write_atomic,
    write_tensors,
    writing,
)

__all__ = ["Group", "GroupFiles", "GroupSum", "SavedGroup"]

_WHOSE, _TOTAL = "whose", "total"


@dataclass(frozen=True)
class GroupSum:
    """What the coordinator learns of a group.

    Args:
        number: Its number, from 1.
        names: Whose vectors are in the sum, sorted.
        opened: The sum.
        sent_bytes: Bytes of one masked vector.
    """

    number: int
    names: tuple[str, ...]
    opened: Opened
    sent_bytes: int


@dataclass
class Group:
    """A group of a round, and how far it has come.

    Args:
        number: Its number, from 1.
        names: Names of its sites.
        attempt: The attempt that goes on, from 1.
        threshold: That of the first attempt whose cohort was asked; 0 before.
        named: Sites that sent something false.
        accused: Who says so of whom, where the coordinator cannot see it.
        collector: The attempt; None before it begins.
        stage: The phase that comes next.
        why: Why it failed; empty when it did not.
        sum: Its sum, once it is open.
    """

    number: int
    names: tuple[str, ...]
    attempt: int = 1
    threshold: int = 0
    named: set[str] = field(default_factory=set)
    accused: dict[str, set[str]] = field(default_factory=dict)
    collector: Collector | None = None
    stage: Phase = "advertise"
    why: str = ""
    sum: GroupSum | None = None

    @property
    def open(self) -> Collector:
        """Return the attempt that goes on."""
        if self.collector is None:
            raise RuntimeError("the attempt has not begun")
        return self.collector

    @property
    def believed(self) -> set[str]:
        """Return whom two sites or more accuse."""
        return {site for site, accusers in self.accused.items() if len(accusers) > 1}

    def accuse(self, site: str, *, by: str) -> None:
        """Take one site's word on another of the group."""
        if site in self.names and site != by:
            self.accused.setdefault(site, set()).add(by)

    def again(self, least: int) -> bool:
        """Get ready for another attempt without who was named; return whether there can be one.

        Args:
            least: Fewest sites in a sum.
        """
        believed = self.believed
        for site, accusers in self.accused.items():
            # One word against another: both are left out. Of two it is taken.
            self.named |= {site} if site in believed else {site, *accusers}
        left = tuple(name for name in self.names if name not in self.named)
        if left == self.names:
            return False  # nothing would be different
        return self._with(left, least)

    def under(self, roster: Collection[str], least: int) -> bool:
        """Get ready for an attempt under another roster; return whether there can be one.

        Nobody has to be left out: what one site said of another was of the roster before.

        Args:
            roster: Names of its sites.
            least: Fewest sites in a sum.
        """
        return self._with(tuple(name for name in self.names if name in roster), least)

    def _with(self, names: tuple[str, ...], least: int) -> bool:
        self.accused.clear()  # they are of the last attempt's cohort alone
        if self.stage == "reveal" or len(names) < max(least, self.threshold):
            return False  # shares may be out, or too few are left
        # Of adverts alone nothing can come; and a process after this one begins with this attempt.
        self.attempt += self.stage != "advertise"
        self.names = names
        return True


@dataclass(frozen=True)
class _Whose:
    """What an attempt's files have in common: those of another are no part of it."""

    serial: int
    number: int
    attempt: int
    roster: str


@dataclass(frozen=True)
class _Saved:
    """What is on disk of a group beside its envelopes and its sum."""

    whose: _Whose
    names: list[str]
    threshold: int
    stage: Phase
    progress: Progress


Envelopes = dict[str, list[Wire]]


@dataclass(frozen=True)
class SavedGroup:
    """A group as another process left it.

    Args:
        group: The group; its attempt has not begun again.
        roster: Digest of the roster that it went by.
        progress: How far it had come.
        envelopes: Those of each sender, once they were closed.
        total: The sum, once it was closed, ``[words]`` in the ring.
    """

    group: Group
    roster: str
    progress: Progress
    envelopes: Envelopes
    total: Words | None


class GroupFiles:
    """The files of a round's groups.

    Args:
        folder: Where they are; made with the first.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, serial: int, roster: str, group: Group) -> None:
        """Write down how far a group has come, synced: what is new since the last time.

        Args:
            serial: Number of the round.
            roster: Digest of the roster that its attempt goes by.
            group: The group.

        Raises:
            RunError: It cannot be written.
        """
        whose = _Whose(serial, group.number, group.attempt, roster)
        saved = _Saved(whose, list(group.names), group.threshold, group.stage, group.open.progress)
        with writing(self._folder):
            self._folder.mkdir(exist_ok=True)
        if group.stage == "mask":
            with replacing(self._envelopes(group.number)) as file:
                file.write(canonical_json(whose) + b"\n")
                for envelopes in group.open.envelopes():
                    file.write(canonical_json(envelopes) + b"\n")
        elif group.stage == "confirm":
            about = {_WHOSE: canonical_json(whose).decode()}
            write_tensors(self._sum(group.number), {_TOTAL: group.open.total}, about)
        write_atomic(self._folder / f"group-{group.number:04d}.json", canonical_json(saved) + b"\n")

    def load(self, serial: int) -> Iterator[SavedGroup]:
        """Yield the groups of a round as another process left them.

        One whose files are of another round, or broken, is passed over.

        Args:
            serial: Number of the round.

        Raises:
            RunError: A file cannot be read.
        """
        if not self._folder.is_dir():
            return
        for path in sorted(self._folder.glob("group-*.json")):
            with reading(path):
                content = path.read_bytes()
            try:
                saved = decode(_Saved, strict_json(content))
                if saved.whose.serial == serial:
                    yield self._loaded(saved)
            except (KeyError, ValueError):
                continue

    def _loaded(self, saved: _Saved) -> SavedGroup:
        whose, stage = saved.whose, saved.stage
        group = Group(whose.number, tuple(saved.names), whose.attempt, saved.threshold)
        group.stage = stage
        envelopes: Envelopes = {}
        if stage not in ("advertise", "share"):
            envelopes = self._read_envelopes(whose)
        total = self._read_sum(whose) if stage in ("confirm", "reveal") else None
        return SavedGroup(group, whose.roster, saved.progress, envelopes, total)

    def _read_envelopes(self, whose: _Whose) -> Envelopes:
        path, found = self._envelopes(whose.number), {}
        if not path.exists():
            raise ValueError("its envelopes are gone")
        with reading(path), path.open("rb") as file:
            if decode(_Whose, strict_json(next(file, b""))) != whose:
                raise ValueError("its envelopes are of another attempt")
            for line in file:
                name, envelopes = decode(list[Any], strict_json(line))
                found[decode(str, name)] = decode(list[Wire], envelopes)
        return found

    def _read_sum(self, whose: _Whose) -> Words:
        path = self._sum(whose.number)
        if not path.exists():
            raise ValueError("its sum is gone")
        arrays, about = read_tensors(path)
        if decode(_Whose, strict_json(about[_WHOSE].encode())) != whose:
            raise ValueError("its sum is of another attempt")
        return cast("Words", arrays[_TOTAL])

    def _envelopes(self, number: int) -> Path:
        return self._folder / f"group-{number:04d}.envelopes.jsonl"

    def _sum(self, number: int) -> Path:
        return self._folder / f"group-{number:04d}.sum.safetensors"

    def remove(self) -> None:
        """Remove all of them.

        Raises:
            RunError: One cannot be removed.
        """
        with writing(self._folder):
            if self._folder.is_dir():
                for path in self._folder.iterdir():
                    path.unlink(missing_ok=True)
