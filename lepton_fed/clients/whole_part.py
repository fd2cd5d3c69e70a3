"""What a site's whole part in its runs has cost, by its receipts: client-level DP over all of them.

The ledger counts what single records have spent. What client-level DP promises is promised for one
run, with all that the site sends in it: each receipt of an update says how much, as the site itself
worked it out. Over several runs the promises add up, epsilon and delta alike (basic composition),
whoever the coordinators are; and an update of a run that promises nothing is covered by none of it.

References:
    C. Dwork, A. Roth, "The Algorithmic Foundations of Differential Privacy", 2014, theorem 3.16.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from lepton_fed.clients.receipts import Receipt
from lepton_fed.privacy.client import CLAIM_AGAINST, CLAIM_DELTA, CLAIM_EPSILON

__all__ = ["RunPart", "WholePart", "whole_part"]


@dataclass(frozen=True)
class RunPart:
    """A run in which an update of the site's left.

    Args:
        run: Its name.
        agreement: Digest of what was agreed to.
        coordinator: Words of the coordinator's key.
        rounds: Rounds of which an update left.
        epsilon: What all rounds of the run cost the site, at most; None without client-level DP.
        delta: Delta of that; None without.
        against: Whom it holds against, in words; empty without.
    """

    run: str
    agreement: str
    coordinator: str
    rounds: int
    epsilon: float | None = None
    delta: float | None = None
    against: str = ""


@dataclass(frozen=True)
class WholePart:
    """All runs of a site.

    Args:
        runs: In the order in which they began.
        epsilon: Sum over those with client-level DP.
        delta: Sum of their deltas.
        uncovered: How many are without.
    """

    runs: list[RunPart]
    epsilon: float
    delta: float
    uncovered: int


def whole_part(receipts: Iterable[Receipt]) -> WholePart:
    """Return what a site's receipts say of its whole part in each run.

    Args:
        receipts: The oldest first.

    Raises:
        ValueError: One says something that is no epsilon or delta.
    """
    found: dict[str, RunPart] = {}
    rounds: dict[str, set[int]] = {}
    for receipt in receipts:
        # An update has a weight, and nothing else that leaves has one.
        if not (receipt.vectors and "weight" in receipt.numbers):
            continue
        known = found.get(receipt.agreement)
        part = known or RunPart(receipt.run, receipt.agreement, receipt.coordinator, 0)
        rounds.setdefault(receipt.agreement, set()).add(receipt.round)
        found[receipt.agreement] = _claimed(part, receipt)
    runs = [replace(part, rounds=len(rounds[digest])) for digest, part in found.items()]
    return WholePart(
        runs,
        math.fsum(part.epsilon for part in runs if part.epsilon is not None),
        math.fsum(part.delta for part in runs if part.delta is not None),
        sum(part.epsilon is None for part in runs),
    )


def _claimed(part: RunPart, receipt: Receipt) -> RunPart:
    """Return a run's part with what one of its receipts says of client-level DP."""
    numbers = receipt.numbers
    if CLAIM_EPSILON not in numbers:
        return part
    epsilon, delta = float(numbers[CLAIM_EPSILON]), float(numbers.get(CLAIM_DELTA, "nan"))
    if not (0 <= epsilon < math.inf and 0 <= delta < 1):
        raise ValueError(f"epsilon {epsilon} at delta {delta}")
    return replace(
        part,
        epsilon=max(epsilon, part.epsilon or 0.0),
        delta=max(delta, part.delta or 0.0),
        against=numbers.get(CLAIM_AGAINST, ""),
    )
