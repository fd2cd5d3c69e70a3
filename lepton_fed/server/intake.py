"""What a round takes in: updates, added up or spilled, and counts."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lepton_fed.core.exchange import Reply
from lepton_fed.core.layout import Layout
from lepton_fed.core.metrics import CountsSum, MetricsPlan
from lepton_fed.core.ring import RingEncoding, RingSum
from lepton_fed.core.task import Task
from lepton_fed.errors import Problem, TaskError, UpdateRefused
from lepton_fed.server.admission import admit
from lepton_fed.server.spill import Spill
from lepton_fed.strategies.base import Each, Strategy, Sum

__all__ = ["SECOND_REPLY", "Evaluation", "Intake", "plan_encoding"]

SECOND_REPLY = Problem("LF4410", "a second reply to one ask")


def plan_encoding(task: Task, cohort: int) -> RingEncoding:
    """Return how a round's updates are added.

    Args:
        task: The task; its bounds decide.
        cohort: Largest number of updates in a round.

    Raises:
        TaskError: The ring has no room for the cohort at the task's bounds.
    """
    try:
        # No coordinate exceeds the norm, so the norm's bound is the coordinate's too.
        return RingEncoding.plan(
            cohort=cohort,
            coordinate_bound=task.aggregation.norm_bound,
            weight_bound=task.aggregation.weight_bound,
        )
    except ValueError as error:
        raise TaskError(
            Problem("LF3401", str(error), key="task.aggregation.norm_bound",
                    remedy="a smaller norm_bound, or fewer sites in a round")
        ) from error  # fmt: skip


class Intake:
    """The updates of one round, as the strategy needs them: added up, or spilled to disk.

    Args:
        strategy: Says which vectors an update carries, and whether the sum is enough.
        layout: The run's layout.
        task: The task; its bounds decide what is admitted.
        number: Round, from 1.
        cohort: Largest number of updates.
        sites: Number of sites of the run.
        spill: Folder for single updates; only made when the strategy needs them.

    Raises:
        TaskError: The ring has no room for the cohort at the task's bounds.
    """

    def __init__(
        self,
        strategy: Strategy,
        layout: Layout,
        task: Task,
        number: int,
        cohort: int,
        sites: int,
        spill: Path,
    ) -> None:
        self._sites = sites
        self._layout = layout
        self._aggregation = task.aggregation
        self._number = number
        self._vectors = tuple(strategy.site.vectors)
        self._names: set[str] = set()
        self._spill: Spill | None = None
        self._sums: dict[str, RingSum] = {}
        if strategy.server.needs == "each":
            self._spill = Spill(spill, number, layout.size)
            return
        encoding = plan_encoding(task, cohort)
        self._sums = {name: RingSum(encoding, layout.size) for name in self._vectors}

    @property
    def contributors(self) -> tuple[str, ...]:
        """Return the names of the sites whose updates are in, sorted."""
        return tuple(sorted(self._names))

    def add(self, reply: Reply) -> float:
        """Admit one reply and add it; return its norm."""
        update = reply.update
        if update is None:
            raise UpdateRefused(Problem("LF4409", "the reply holds no update", where=reply.site))
        if reply.site in self._names:
            raise UpdateRefused(SECOND_REPLY)
        norm = admit(update, self._layout, self._aggregation, self._vectors, reply.site)
        if self._spill:
            self._spill.add(reply.site, update.vectors, update.weight)
        else:
            try:
                for name, total in self._sums.items():
                    total.add(update.vectors[name], update.weight)
            except ValueError as error:
                raise UpdateRefused(Problem("LF4403", str(error), where=reply.site)) from error
        self._names.add(reply.site)
        return norm

    def aggregate(self) -> Sum | Each:
        """Return what the server rule works on; the sums are used up."""
        if self._spill:
            return self._spill
        encoding = next(iter(self._sums.values())).encoding
        encoded = next(iter(self._sums.values())).weight
        means = {name: total.into_mean() for name, total in self._sums.items()}
        weight = math.ldexp(encoded * encoding.weight_bound, -encoding.weight_bits)
        return Sum(self._number, means, self.contributors, weight, self._sites)

    def close(self) -> None:
        """Remove what was spilled."""
        if self._spill:
            self._spill.close()


class Evaluation:
    """Counts of one model: each site's metrics, and the exact sum over all.

    Args:
        plan: What is counted.
    """

    def __init__(self, plan: MetricsPlan) -> None:
        self._plan = plan
        self._sum = CountsSum(plan.size)
        self.sites: dict[str, dict[str, float]] = {}

    def add(self, site: str, counts: npt.NDArray[np.float64]) -> None:
        """Add one site's counts, checked; a second time they are passed over."""
        if site in self.sites:
            return
        self._sum.add(counts)
        self.sites[site] = self._plan.values(counts)

    def total(self) -> npt.NDArray[np.float64]:
        """Return the counts of all sites together."""
        return self._sum.total()
