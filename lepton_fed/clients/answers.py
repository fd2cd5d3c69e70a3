"""The site's newest answer of each run, kept until the next: what is asked twice is trained once.

An answer is written and synced before it leaves, together with what the site keeps of the round
(its own tensors, its strategy's state), in one file. Whatever is killed then, coordinator or site,
the same ask gets the same answer, at no further cost to the records, and the site goes on from
where it was. Nothing but the site reads the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lepton_fed.core.decode import decode, strict_json
from lepton_fed.core.digests import canonical_json
from lepton_fed.core.exchange import Ask, Reply, Update
from lepton_fed.runs.files import PARTIAL, read_tensors, reading, write_tensors, writing

__all__ = ["Answers", "Kept", "ask_digest"]

Tensors = Mapping[str, npt.NDArray[np.generic]]

_MOST_RUNS = 4
_VECTOR, _STATE, _LOCAL, _COUNTS = "vector/", "state/", "local/", "counts"


@dataclass(frozen=True)
class _Head:
    ask: str
    round_number: int
    layout: str
    weight: float
    norms: dict[str, float] = field(default_factory=dict)
    epsilon: float | None = None
    noise_multiplier: float | None = None


@dataclass(frozen=True)
class Kept:
    """A site after a round.

    Args:
        ask: :func:`ask_digest` of what was asked.
        round_number: The round.
        reply: What was answered, without the site's name.
        state: What the strategy keeps at the site, by name.
        local: The tensors that stay at the site, by name.
    """

    ask: str
    round_number: int
    reply: Reply
    state: Tensors
    local: Tensors


def ask_digest(ask: Ask) -> str:
    """Return the SHA-256 of everything in an ask, 64 hexadecimal digits."""
    head = {name: getattr(ask, name) for name in ("agreement", "layout", "round_number")}
    digests = {
        name: hashlib.sha256(np.ascontiguousarray(vector, "<f4").data).hexdigest()
        for name, vector in ask.vectors.items()
    }
    told = {**head, "train": ask.train, "evaluate": ask.evaluate, "vectors": digests}
    return hashlib.sha256(canonical_json(told)).hexdigest()


class Answers:
    """The answers of one run at one site.

    Args:
        folder: Where the answers of all runs are; made with the first.
        agreement: Digest of what was agreed to.
    """

    def __init__(self, folder: Path, agreement: str) -> None:
        self._folder = folder
        self._path = folder / f"{agreement}.safetensors"

    def keep(self, kept: Kept) -> None:
        """Write a round's answer in place of the one before; nothing may leave earlier.

        Raises:
            RunError: It cannot be written; the one before is there still.
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
        )
        arrays: dict[str, npt.NDArray[np.generic]] = {}
        arrays |= {_VECTOR + name: vector for name, vector in reply.update.vectors.items()}
        arrays |= {_STATE + name: value for name, value in kept.state.items()}
        arrays |= {_LOCAL + name: value for name, value in kept.local.items()}
        if reply.counts is not None:
            arrays[_COUNTS] = reply.counts
        with writing(self._folder):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_tensors(self._path, arrays, {"head": canonical_json(asdict(head)).decode()})
        self._prune()

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
        vectors = {n: v.view(np.float32) for n, v in _below(_VECTOR, arrays).items()}
        counts = arrays.get(_COUNTS)
        reply = Reply(
            "",
            update=Update(head.layout, vectors, head.weight, head.norms),
            counts=None if counts is None else counts.view(np.float64),
            epsilon=head.epsilon,
            noise_multiplier=head.noise_multiplier,
            again=True,
        )
        return Kept(
            head.ask, head.round_number, reply, _below(_STATE, arrays), _below(_LOCAL, arrays)
        )

    def _prune(self) -> None:
        """Remove the answers of runs long over, and what a killed process had begun to write."""
        with writing(self._folder):
            for partial in self._folder.glob(PARTIAL):
                partial.unlink(missing_ok=True)
            files = sorted(self._folder.glob("*.safetensors"), key=lambda p: p.stat().st_mtime_ns)
            for old in files[:-_MOST_RUNS]:
                old.unlink(missing_ok=True)


def _below(prefix: str, arrays: Tensors) -> dict[str, npt.NDArray[np.generic]]:
    return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
