"""The site's newest answer of a run, kept until the next: what is asked twice is trained once.

An answer is written and synced before it leaves, together with what the site keeps of the round
(its own tensors, its strategy's state, noise that later steps take back), in one file. Whatever is
killed then, coordinator or site, the same ask gets the same answer, at no further cost to the
records, and the site goes on from where it was. Nothing but the site reads the file.

Answers are large, so only those of the newest runs are kept. Beside each lies a record of a line,
which round and which ask it was for, that is never removed: without the answer, because it is of
an older run or the file is broken, the round is refused and not trained a second time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from lepton_fed.core.decode import decode, strict_json
from lepton_fed.core.digests import canonical_json
from lepton_fed.core.exchange import Reply, Update
from lepton_fed.errors import Problem, Refused
from lepton_fed.runs.files import (
    read_tensors,
    reading,
    sweep,
    write_atomic,
    write_tensors,
    writing,
)

__all__ = ["Answered", "Answers", "Kept", "KeptNoise"]

Tensors = Mapping[str, npt.NDArray[np.generic]]

_MOST_RUNS = 4
_VECTOR, _STATE, _LOCAL, _COUNTS = "vector/", "state/", "local/", "counts"
_NOISE = "noise"


@dataclass(frozen=True)
class _Head:
    ask: str
    round_number: int
    layout: str
    weight: float
    norms: dict[str, float] = field(default_factory=dict)
    epsilon: float | None = None
    noise_multiplier: float | None = None
    noise_of: str = ""
    noise_step: int = 0
    training: str = ""


@dataclass(frozen=True)
class KeptNoise:
    """Noise that later steps take back. Secret: who has it takes the noise of those steps off.

    Args:
        of: Digest of what it is the noise of.
        step: Steps that are done.
        past: ``[band - 1, size]`` float32; ``[0, size]`` after the last step.
        training: Name of the training, which the ledger has for what left.
    """

    of: str
    step: int
    past: npt.NDArray[np.float32]
    training: str


@dataclass(frozen=True)
class Kept:
    """A site after a round.

    Args:
        ask: :func:`~lepton_fed.core.exchange.ask_digest` of what was asked.
        round_number: The round.
        reply: What was answered, without the site's name.
        state: What the strategy keeps at the site, by name.
        local: The tensors that stay at the site, by name.
        noise: With correlated noise, what the next round goes on from.
    """

    ask: str
    round_number: int
    reply: Reply
    state: Tensors
    local: Tensors
    noise: KeptNoise | None = None


@dataclass(frozen=True)
class Answered:
    """The newest round of a run that a site trained.

    Args:
        ask: :func:`~lepton_fed.core.exchange.ask_digest` of what was asked.
        round_number: The round.
    """

    ask: str
    round_number: int


class Answers:
    """The answers of one run at one site.

    Args:
        folder: Where the answers of all runs are; made with the first.
        agreement: Digest of what was agreed to.
    """

    def __init__(self, folder: Path, agreement: str) -> None:
        self._folder = folder
        self._path = folder / f"{agreement}.safetensors"
        self._record = folder / f"{agreement}.json"

    def keep(self, kept: Kept) -> None:
        """Write a round's answer in place of the one before; nothing may leave earlier.

        Raises:
            RunError: It cannot be written; the one before is there still, or this one.
        """
        reply = kept.reply
        assert reply.update is not None  # noqa: S101 - only training is kept
        head = _Head(
            kept.ask,
            kept.round_number,
            reply.update.layout,
            reply.update.weight,
            dict(reply.update.norms),
            reply.epsilon,
            reply.noise_multiplier,
            kept.noise.of if kept.noise else "",
            kept.noise.step if kept.noise else 0,
            kept.noise.training if kept.noise else "",
        )
        arrays: dict[str, npt.NDArray[np.generic]] = {}
        arrays |= {_VECTOR + name: vector for name, vector in reply.update.vectors.items()}
        arrays |= {_STATE + name: value for name, value in kept.state.items()}
        arrays |= {_LOCAL + name: value for name, value in kept.local.items()}
        if reply.counts is not None:
            arrays[_COUNTS] = reply.counts
        if kept.noise is not None:
            arrays[_NOISE] = kept.noise.past
        with writing(self._folder):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_tensors(self._path, arrays, {"head": canonical_json(asdict(head)).decode()})
        # After the answer: killed in between, the site has an answer and makes up for the record.
        self._note(kept)
        self._prune()

    def answered(self, kept: Kept | None) -> Answered | None:
        """Return the newest round that was answered; None before the first.

        Args:
            kept: The stored answer, if there is one.

        Raises:
            Refused: LF4506, neither the answer nor the record says which rounds were.
            RunError: The record cannot be read, or cannot be made up for.
        """
        try:
            noted = self._noted()
        except ValueError:
            if kept is None:
                raise Refused(
                    Problem("LF4506", "which rounds of this run the site has answered cannot be "
                            "read any more", where=str(self._record),
                            remedy="restore the file, or start the run under another name")
                ) from None  # fmt: skip
            noted = None
        if kept is None or (noted is not None and noted.round_number >= kept.round_number):
            return noted
        return self._note(kept)

    def _noted(self) -> Answered | None:
        """Return what the record says; a ValueError tells that it is broken."""
        with reading(self._record):
            if not self._record.exists():
                return None
            content = self._record.read_bytes()
        return decode(Answered, strict_json(content))

    def _note(self, kept: Kept) -> Answered:
        answered = Answered(kept.ask, kept.round_number)
        write_atomic(self._record, canonical_json(answered) + b"\n")
        return answered

    def kept(self) -> Kept | None:
        """Return the newest answer; None without one, or if the file is broken.

        Raises:
            RunError: It cannot be read.
        """
        with reading(self._path):
            if not self._path.exists():
                return None
        try:
            arrays, about = read_tensors(self._path)
            head = decode(_Head, strict_json(about["head"].encode()))
        except (KeyError, ValueError):
            return None
        vectors = {
            n: cast("npt.NDArray[np.floating]", v) for n, v in _below(_VECTOR, arrays).items()
        }
        counts = arrays.get(_COUNTS)
        reply = Reply(
            "",
            update=Update(head.layout, vectors, head.weight, head.norms),
            counts=None if counts is None else counts.view(np.float64),
            epsilon=head.epsilon,
            noise_multiplier=head.noise_multiplier,
            again=True,
        )
        past = arrays.get(_NOISE)
        noise = None if past is None else KeptNoise(
            head.noise_of, head.noise_step, past.view(np.float32), head.training
        )  # fmt: skip
        state, local = _below(_STATE, arrays), _below(_LOCAL, arrays)
        return Kept(head.ask, head.round_number, reply, state, local, noise)

    def _prune(self) -> None:
        """Remove the answers of runs long over, and what a killed process had begun to write.

        Their records stay.
        """
        sweep(self._folder)
        with writing(self._folder):
            files = sorted(self._folder.glob("*.safetensors"), key=lambda p: p.stat().st_mtime_ns)
            for old in files[:-_MOST_RUNS]:
                old.unlink(missing_ok=True)


def _below(prefix: str, arrays: Tensors) -> dict[str, npt.NDArray[np.generic]]:
    return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
