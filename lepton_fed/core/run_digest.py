"""The run digest: one line that two runs share when they did the same thing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from lepton_fed.core.digests import canonical_json

__all__ = ["RunDigest"]


class RunDigest:
    """SHA-256 over task, seed, and the sorted contributors and model of every round.

    It holds no times and no events, so that a simulation and a deployment of the same task, seed
    and sites print the same one (CPU, no DP noise). Each round is hashed into the one before, hence
    the digest after round r is all that a checkpoint needs to go on.

    Args:
        task: Digest of the task.
        seed: Seed of the run.
        state: Digest after an earlier round, when a run is resumed.
    """

    def __init__(self, task: str, seed: int, state: str = "") -> None:
        self._state = state or _link("lepton-fed run 1", {"task": task, "seed": seed})

    def add_round(self, round_number: int, contributors: Iterable[str], model: str) -> None:
        """Add a finished round.

        Args:
            round_number: Round, from 1.
            contributors: Names of the sites whose updates were used, in any order.
            model: Digest of the model after the round.
        """
        record = {"round": round_number, "contributors": sorted(contributors), "model": model}
        self._state = _link(self._state, record)

    @property
    def value(self) -> str:
        """Return the digest so far, 64 hexadecimal digits."""
        return self._state


def _link(previous: str, record: object) -> str:
    return hashlib.sha256(previous.encode() + b"\0" + canonical_json(record)).hexdigest()
