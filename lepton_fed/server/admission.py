"""Which replies may be added to the sum. A bad one is refused and named; it never ends a run."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lepton_fed.config.schema import RecordPrivacy
from lepton_fed.core.exchange import Reply, Update, legible
from lepton_fed.core.layout import Layout
from lepton_fed.core.norms import euclidean_norm
from lepton_fed.core.task import Aggregation
from lepton_fed.errors import Problem, UpdateRefused
from lepton_fed.privacy.dp.accounting import LARGEST_NOISE

__all__ = ["admit", "admit_claims"]


def admit(
    update: Update, layout: Layout, aggregation: Aggregation, vectors: Sequence[str], site: str
) -> float:
    """Check an update before it is added.

    Args:
        update: What the site sent; nothing about it is trusted.
        layout: The run's layout.
        aggregation: The task's bounds.
        vectors: Names of the vectors the strategy wants.
        site: Name of the site, as the transport knows it.

    Returns:
        The largest Euclidean norm among its vectors.

    Raises:
        UpdateRefused: Another layout, a missing or extra vector, another length or element type,
            a value that is not finite, a norm out of bounds, or a weight the task does not give.
    """

    def refuse(code: str, what: str) -> UpdateRefused:
        return _refusal(code, what, site)

    if update.layout != layout.digest:
        given = legible(update.layout, 12)
        raise refuse("LF4401", f"layout {given} is not the run's {layout.digest[:12]}")
    if sorted(update.vectors) != sorted(vectors):
        given = legible(str(sorted(update.vectors)), 80)
        raise refuse("LF4402", f"vectors {given}, wanted {sorted(vectors)}")
    weight = update.weight
    if not isinstance(weight, float):
        raise refuse("LF4403", f"a weight of type {type(weight).__name__}")
    if aggregation.weight == "equal":
        if weight != 1.0:
            raise refuse("LF4403", f"weight {weight:g}, where every site has weight 1")
    elif not (1 <= weight <= aggregation.weight_bound and weight == math.floor(weight)):
        bound = f"{aggregation.weight_bound:g}"
        raise refuse("LF4403", f"weight {weight:g} is no number of rows from 1 to {bound}")
    largest = 0.0
    for name in vectors:
        vector = update.vectors[name]
        if getattr(vector, "dtype", None) != np.float32:
            raise refuse("LF4404", f"vector {name!r} is not float32")
        if vector.shape != (layout.size,):
            raise refuse(
                "LF4404", f"vector {name!r} has shape {vector.shape}, not ({layout.size},)"
            )
        norm = euclidean_norm(vector)
        if not math.isfinite(norm):
            raise refuse("LF4405", f"vector {name!r} holds NaN or infinities")
        if norm > aggregation.norm_bound:
            raise refuse("LF4406", f"norm {norm:.4g} exceeds {aggregation.norm_bound:g}")
        largest = max(largest, norm)
    return largest


def admit_claims(reply: Reply, record: RecordPrivacy) -> None:
    """Check what a reply says of its site's privacy: it goes into the run's record as it stands.

    Args:
        reply: What came back; nothing about it is trusted.
        record: The run's record-level DP.

    Raises:
        UpdateRefused: A claim in a run without DP, one that is negative or not finite, an epsilon
            beyond the run's target, or a noise multiplier that no accounting gives.
    """
    most = {
        "epsilon": record.epsilon * (1 + 1e-9) if record.enabled else None,
        "noise multiplier": LARGEST_NOISE if record.enabled else None,
    }
    claims = {"epsilon": reply.epsilon, "noise multiplier": reply.noise_multiplier}
    for name, claim in claims.items():
        bound = most[name]
        if claim is None:
            continue
        if bound is None:
            raise _refusal("LF4412", f"{name} {claim:g} in a run without DP", reply.site)
        if not 0 <= claim <= bound:  # NaN compares false
            raise _refusal("LF4412", f"{name} {claim:g} is not in [0, {bound:g}]", reply.site)


def _refusal(code: str, what: str, site: str) -> UpdateRefused:
    remedy = "its contribution to this round is left out"
    return UpdateRefused(Problem(code, what, where=site, remedy=remedy))
