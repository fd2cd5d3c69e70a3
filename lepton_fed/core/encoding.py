"""How the updates of a task become integers: the same for plain and for masked sums."""

from __future__ import annotations

from collections.abc import Callable

from lepton_fed.core.ring import RingEncoding
from lepton_fed.core.task import Task
from lepton_fed.errors import Problem, TaskError

__all__ = ["PLAIN_BITS", "plan_encoding"]

PLAIN_BITS = 64
"""Size of the ring in which updates are added that nothing masks."""


_MOST_TRIES = 64


def plan_encoding(
    task: Task,
    cohort: int,
    bits: int = PLAIN_BITS,
    room: Callable[[float], float] | None = None,
) -> RingEncoding:
    """Return how a round's updates are added.

    Args:
        task: The task; its bounds decide.
        cohort: Largest number of updates in a round.
        bits: Size of the ring in bits, 16 to 64.
        room: From a grid to how much more than its update each reply may bring on average; noise
            in the ring is such.

    Raises:
        TaskError: LF3401, the ring has no room for the cohort at the task's bounds.
    """
    # No coordinate exceeds the norm, so the norm's bound is the coordinate's too.
    least = bound = task.aggregation.norm_bound
    try:
        for _ in range(_MOST_TRIES):
            encoding = RingEncoding.plan(
                cohort=cohort,
                coordinate_bound=bound,
                weight_bound=task.aggregation.weight_bound,
                bits=bits,
            )
            needed = least + (room(encoding.grid) if room else 0.0)
            if needed <= bound:
                return encoding
            bound = needed
        raise ValueError(f"a ring of {bits} bits has no room for the noise of {cohort} sites")
    except ValueError as error:
        more = "" if bits == PLAIN_BITS else "more privacy.secure_aggregation.bits, "
        raise TaskError(
            Problem("LF3401", str(error), key="task.aggregation.norm_bound",
                    remedy=f"{more}a smaller norm_bound, or fewer sites in a round")
        ) from error  # fmt: skip
