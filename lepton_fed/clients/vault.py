"""What a site keeps of a run's secure aggregation: its half of the protocol, and its vector.

The vector is what would leave, before it is masked: written once, after training and with all its
noise, so that a round that has to be masked again, under other keys, is masked from the very same
numbers. Both files are synced before an answer leaves, readable for their owner alone, and written
over by the next round; a closed round's vector is removed at once, and what is secret of a round
that nobody went on with after a week. (What the site trained is kept beside, in ``answers``, as
without secure aggregation: the site's own disk is trusted.)
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from lepton_fed.core.decode import decode, strict_json
from lepton_fed.core.digests import canonical_json
from lepton_fed.errors import Problem, Refused
from lepton_fed.privacy.secagg.masks import Words
from lepton_fed.privacy.secagg.member import State
from lepton_fed.runs.files import (
    read_about,
    read_tensors,
    reading,
    sweep,
    write_atomic,
    write_tensors,
    writing,
)

__all__ = ["FileVault", "MemoryVault", "Remembered", "StoredVector", "Vault", "prune"]

_WORDS = "words"
_MOST_RUNS = 16
_OPEN_S = 7 * 24 * 3600.0
"""How long a round may stay open with nothing written of it. Longer than any round trains, and than
a coordinator that was down over a long weekend; a run that goes on later loses that one round."""


@dataclass
class Remembered:
    """Where a site is in a run.

    Args:
        member: Its half of the protocol.
        begun: When it began the rounds of the last hour, Unix seconds.
    """

    member: State = field(default_factory=State)
    begun: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class StoredVector:
    """What is known of the stored vector.

    Args:
        serial: Number of the round.
        ask: Digest of what was asked.
        norm_before: Largest norm of the update's vectors, before clipping.
        norm_after: After it.
        notes: What the receipt says of it, by name.
    """

    serial: int
    ask: str
    norm_before: float
    norm_after: float
    notes: dict[str, str]


class Vault(Protocol):
    """Where a site keeps them."""

    def recall(self) -> Remembered:
        """Return where the site is."""

    def remember(self, now: Remembered) -> None:
        """Keep where it is, before anything leaves."""

    def elsewhere(self, since: float) -> list[float]:
        """Return when rounds of other runs began since a time, Unix seconds."""

    def stored(self) -> StoredVector | None:
        """Return what is known of the stored vector; None without one."""

    def words(self) -> Words:
        """Return the stored vector, the caller's to change."""

    def store(self, words: Words, about: StoredVector) -> None:
        """Keep a vector in the place of the one before."""

    def clear(self) -> None:
        """Keep none."""


class MemoryVault:
    """Keeps them as long as the process lives: a simulation."""

    def __init__(self) -> None:
        self._now = Remembered()
        self._vector: tuple[Words, StoredVector] | None = None

    def recall(self) -> Remembered:
        """Return where the site is."""
        return self._now

    def remember(self, now: Remembered) -> None:
        """Keep where it is."""
        self._now = now

    def elsewhere(self, since: float) -> list[float]:
        """Return nothing: a simulation has one run."""
        del since
        return []

    def stored(self) -> StoredVector | None:
        """Return what is known of the stored vector; None without one."""
        return self._vector[1] if self._vector else None

    def words(self) -> Words:
        """Return the stored vector, the caller's to change."""
        if self._vector is None:
            raise RuntimeError("there is no stored vector")
        return self._vector[0].copy()

    def store(self, words: Words, about: StoredVector) -> None:
        """Keep a vector in the place of the one before."""
        self._vector = words, about

    def clear(self) -> None:
        """Keep none."""
        self._vector = None


class FileVault:
    """Keeps them in two files.

    Args:
        folder: Where; made when it is first needed.
        run: Name of the files: the digest of the run's agreement.
    """

    def __init__(self, folder: Path, run: str) -> None:
        self._folder = folder
        self._state = folder / f"{run}.json"
        self._vector = folder / f"{run}.safetensors"

    def recall(self) -> Remembered:
        """Return where the site is.

        Raises:
            Refused: LF4517, the file is broken, so that nothing says what was revealed.
            RunError: It cannot be read.
        """
        with reading(self._state):
            if not self._state.exists():
                return Remembered()
        known = _read(self._state)
        if known is None:
            raise Refused(
                Problem("LF4517", "what this site has revealed in this run cannot be read any more",
                        where=str(self._state),
                        remedy="start the run under another name; an older copy of the file does "
                        "not know of everything")
            )  # fmt: skip
        return known

    def remember(self, now: Remembered) -> None:
        """Keep where it is, synced.

        Raises:
            RunError: It cannot be written.
        """
        self._make_folder()
        write_atomic(self._state, canonical_json(now) + b"\n", mode=0o600)

    def elsewhere(self, since: float) -> list[float]:
        """Return when rounds of other runs began since a time, Unix seconds.

        Of a file that is broken, when it was written.

        Raises:
            RunError: A file cannot be read.
        """
        found: list[float] = []
        with reading(self._folder):
            for path in self._folder.glob("*.json"):
                written = path.stat().st_mtime
                if path == self._state or written <= since:
                    continue
                known = _read(path)
                found += [written] if known is None else known.begun
        return [begun for begun in found if begun > since]

    def stored(self) -> StoredVector | None:
        """Return what is known of the stored vector; None without one that can be read.

        Raises:
            RunError: It cannot be read.
        """
        with reading(self._vector):
            if not self._vector.exists():
                return None
        try:
            about = read_about(self._vector)["about"]
            return decode(StoredVector, strict_json(about.encode()))
        except (KeyError, ValueError):
            return None

    def words(self) -> Words:
        """Return the stored vector, the caller's to change.

        Raises:
            Refused: LF4517, it is gone.
            RunError: It cannot be read.
        """
        try:
            arrays, _ = read_tensors(self._vector)
            words: Words = arrays[_WORDS]  # type: ignore[assignment]
        except (KeyError, ValueError):
            raise Refused(
                Problem("LF4517", "the stored vector of this round is gone or broken",
                        where=str(self._vector), remedy="nothing: the next round is answered as "
                        "ever")
            ) from None  # fmt: skip
        return words

    def store(self, words: Words, about: StoredVector) -> None:
        """Keep a vector in the place of the one before, synced.

        Raises:
            RunError: It cannot be written.
        """
        self._make_folder()
        text = {"about": canonical_json(about).decode()}
        write_tensors(self._vector, {_WORDS: words}, text, mode=0o600)

    def clear(self) -> None:
        """Keep none.

        Raises:
            RunError: The file cannot be removed.
        """
        with writing(self._vector):
            self._vector.unlink(missing_ok=True)

    def _make_folder(self) -> None:
        if self._folder.is_dir():
            return
        with writing(self._folder):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            parent = os.open(self._folder.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(parent)  # so that it is there after a power cut too
            finally:
                os.close(parent)

    def prune(self, now: float) -> None:
        """Prune the folder, as :func:`prune` does; of this run nothing goes but what is too old.

        Args:
            now: Unix seconds.

        Raises:
            RunError: Something cannot be read or removed.
        """
        prune(self._folder, now, keep=self._state.stem)


def prune(folder: Path, now: float, keep: str = "") -> None:
    """Take away what no run needs any more; what refuses a replay stays.

    - A round that is open and of which nothing was written for a week is closed; its secrets,
      envelopes, shares and vector go. So does everything of a closed round, which until then
      answers the same request again.
    - Of runs in which no round was begun nothing has left that anybody could use: the newest 16
      stay, so that offers alone do not fill the disk.
    - Vectors of runs long over go, too.

    Args:
        folder: That of the vaults; it need not be there.
        now: Unix seconds.
        keep: Name of the run that is asked for.

    Raises:
        RunError: Something cannot be read or removed.
    """
    sweep(folder)
    with writing(folder):
        vectors = _newest_first(folder, "*.safetensors")
        states = _newest_first(folder, "*.json")
    vectors_left = [p for p in vectors if not _old(p, now)]
    over = [p for p in vectors_left if p.stem != keep][_MOST_RUNS:]
    for path in vectors:
        if path not in vectors_left or path in over:
            _remove(path)
    for path in states:
        if _old(path, now):
            _close(path)
    if len(states) > _MOST_RUNS:
        # A vector without its state would be one that the site has forgotten: it goes first.
        unused = [p for p in states if p.stem != keep and _is_unused(p)]
        for path in unused[_MOST_RUNS:]:
            _remove(path.with_suffix(".safetensors"))
            _remove(path)


def _newest_first(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.glob(pattern), key=lambda p: p.stat().st_mtime_ns, reverse=True)


def _old(path: Path, now: float) -> bool:
    with reading(path):
        return path.stat().st_mtime < now - _OPEN_S


def _close(path: Path) -> None:
    """Reduce the state of a run to what it must never answer again."""
    known = _read(path)
    if known is None:
        return  # a person has to look at it
    least = Remembered(State(closed=max(known.member.closed, known.member.round_number)))
    if known != least:
        _remove(path.with_suffix(".safetensors"))  # before the state that knows of it
        write_atomic(path, canonical_json(least) + b"\n", mode=0o600)


def _is_unused(path: Path) -> bool:
    """Return whether a run's state is of no round: at most an advert has left, and no share."""
    known = _read(path)
    return known is not None and not (known.member.closed or known.member.round_number)


def _read(path: Path) -> Remembered | None:
    """Return a state; None of one that is broken."""
    with reading(path):
        content = path.read_bytes()
    try:
        return decode(Remembered, strict_json(content))
    except ValueError:
        return None


def _remove(path: Path) -> None:
    with writing(path):
        path.unlink(missing_ok=True)
