"""How the updates of a task become integers: the same for plain and for masked sums."""

from __future__ import annotations

from lepton_fed.core.ring import RingEncoding
from lepton_fed.core.task import Task
from lepton_fed.errors import Problem, TaskError

__all__ = ["PLAIN_BITS", "plan_encoding"]

PLAIN_BITS = 64
"""Size of the ring in which updates are added that nothing masks."""


def plan_encoding(task: Task, cohort: int, bits: int = PLAIN_BITS) -> RingEncoding:
    """Return how a round's updates are added.

    Args:
        task: The task; its bounds decide.
        cohort: Largest number of updates in a round.
        bits: Size of the ring in bits, 16 to 64.

    Raises:
        TaskError: LF3401, the ring has no room for the cohort at the task's bounds.
    """
    try:
        # No coordinate exceeds the norm, so the norm's bound is the coordinate's too.
        return RingEncoding.plan(
            cohort=cohort,
            coordinate_bound=task.aggregation.norm_bound,
            weight_bound=task.aggregation.weight_bound,
            bits=bits,
        )
    except ValueError as error:
        more = "" if bits == PLAIN_BITS else "more privacy.secure_aggregation.bits, "
        raise TaskError(
            Problem("LF3401", str(error), key="task.aggregation.norm_bound",
                    remedy=f"{more}a smaller norm_bound, or fewer sites in a round")
        ) from error  # fmt: skip
