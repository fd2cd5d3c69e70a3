"""The groups of a round that is summed by secure aggregation, and their files.

A group's file is written before each phase and read by the process after this one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from lepton_fed.core.decode import decode, strict_json
from lepton_fed.core.digests import canonical_json
from lepton_fed.core.exchange import Phase
from lepton_fed.privacy.secagg.collector import Collector, Progress
from lepton_fed.privacy.secagg.masks import Words
from lepton_fed.privacy.secagg.vector import Opened
from lepton_fed.runs.files import read_tensors, write_tensors, writing

__all__ = ["Group", "GroupFiles", "GroupSum"]

_ABOUT, _TOTAL = "about", "total"


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


@dataclass(frozen=True)
class _Saved:
    """What is on disk of a group beside its sum."""

    serial: int
    number: int
    names: list[str]
    attempt: int
    threshold: int
    roster: str
    stage: str
    progress: Progress


class GroupFiles:
    """The files of a round's groups.

    Args:
        folder: Where they are; made with the first.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, serial: int, roster: str, group: Group) -> None:
        """Write down how far a group has come, synced.

        Args:
            serial: Number of the round.
            roster: Digest of the roster that its attempt goes by.
            group: The group.

        Raises:
            RunError: It cannot be written.
        """
        saved = _Saved(
            serial,
            group.number,
            list(group.names),
            group.attempt,
            group.threshold,
            roster,
            group.stage,
            group.open.progress,
        )
        with writing(self._folder):
            self._folder.mkdir(exist_ok=True)
        # As an array: the text of a file may have 100 MB at most, and envelopes of many sites more.
        arrays: dict[str, npt.NDArray[Any]] = {
            _ABOUT: np.frombuffer(canonical_json(saved), dtype=np.uint8)
        }
        if group.open.survivors:
            arrays[_TOTAL] = group.open.total
        write_tensors(self._folder / f"group-{group.number:04d}.safetensors", arrays, {})

    def load(self, serial: int) -> Iterator[tuple[Group, Progress, Words | None, str]]:
        """Yield the groups of a round, how far each had come, its sum, and its roster's digest.

        One whose file is of another round, or broken, is passed over.

        Args:
            serial: Number of the round.

        Raises:
            RunError: A file cannot be read.
        """
        if not self._folder.is_dir():
            return
        for path in sorted(self._folder.glob("group-*.safetensors")):
            try:
                arrays, _ = read_tensors(path)
                saved = decode(_Saved, strict_json(arrays[_ABOUT].tobytes()))
            except (KeyError, ValueError):
                continue
            if saved.serial == serial:
                group = Group(saved.number, tuple(saved.names), saved.attempt, saved.threshold)
                group.stage = cast("Phase", saved.stage)
                total = cast("Words | None", arrays.get(_TOTAL))
                yield group, saved.progress, total, saved.roster

    def remove(self) -> None:
        """Remove all of them.

        Raises:
            RunError: One cannot be removed.
        """
        with writing(self._folder):
            if self._folder.is_dir():
                for path in self._folder.iterdir():
                    path.unlink(missing_ok=True)
