"""What a round takes in: updates, added up or spilled, and counts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from lepton_fed.config.agreement import Agreement
from lepton_fed.config.schema import SecureAggregation
from lepton_fed.core.encoding import plan_encoding
from lepton_fed.core.exchange import Reply
from lepton_fed.core.layout import Layout
from lepton_fed.core.metrics import CountsSum, MetricsPlan
from lepton_fed.core.ring import RingEncoding, RingSum
from lepton_fed.core.task import Task
from lepton_fed.errors import Problem, TaskError, UpdateRefused
from lepton_fed.privacy.client import ClientNoise, client_noise
from lepton_fed.privacy.masked_plan import (
    Shape,
    masked_layout,
    require_one_vector,
    require_post_quantum,
)
from lepton_fed.server.admission import admit
from lepton_fed.server.groups import GroupSum
from lepton_fed.server.noised import PlainSum, masked_mean
from lepton_fed.server.spill import Spill
from lepton_fed.strategies.base import DELTA, Each, Means, Strategy, Sum
from lepton_fed.training.noise import require_plain_site

__all__ = [
    "SECOND_REPLY",
    "Evaluation",
    "Intake",
    "MaskedIntake",
    "plan_aggregation",
    "require_sites",
    "shape_of",
]

Float = TypeVar("Float", np.float32, np.float64)

_SLICE = 1 << 14  # elements decoded at a time: the double-precision temporaries stay in cache

SECOND_REPLY = Problem("LF4410", "a second reply to one ask")


def plan_aggregation(
    agreement: Agreement, strategy: Strategy, layout: Layout, plan: MetricsPlan, sites: int
) -> None:
    """Refuse a run whose updates cannot be added as it wants them to be.

    Args:
        agreement: What the sites are to agree to.
        strategy: The strategy that runs.
        layout: The model's layout.
        plan: What is counted in an evaluation.
        sites: Number of sites of the run.

    Raises:
        TaskError: LF3401, the ring has no room for the cohort at the task's bounds; LF3403, the
            strategy needs single updates, and secure aggregation hides them; LF3404, there are
            fewer sites than a sum needs; LF3405, there is no ML-KEM-768 here; LF3330, the
            strategy's site half does not go with shared noise; LF3340, client-level DP covers the
            sum of one vector, and the strategy needs more.
        Refused: LF4630, client-level DP is not sound.
    """
    require_plain_site(agreement, strategy.site)
    _require_covered(agreement, strategy)
    client_noise(agreement, layout.size)
    secure = agreement.privacy.secure_aggregation
    if not secure.enabled:
        if strategy.server.needs == "sum":
            plan_encoding(agreement.task, agreement.cohort)
        return
    if not strategy.sum_is_enough and secure.groups == 1:
        raise TaskError(
            Problem("LF3403", f"strategy {strategy.name!r} compares the updates of single sites, "
                    "which secure aggregation hides", key="strategy.name",
                    remedy="a strategy that works on the sum (fedavg, fedadam, ...), or "
                    "privacy.secure_aggregation.groups of 3 or more: it then compares the sums of "
                    "groups of 8 sites or more")
        )  # fmt: skip
    require_sites(secure, agreement.cohort, sites)
    require_post_quantum(agreement)
    shape = shape_of(strategy, layout, plan)
    masked_layout(agreement, shape, train=True, evaluate=True)


def _require_covered(agreement: Agreement, strategy: Strategy) -> None:
    """Refuse client-level DP with a strategy that reads more than the noised sum."""
    require_one_vector(agreement, strategy.site.vectors)
    if agreement.privacy.client.enabled and not strategy.sum_is_enough:
        raise TaskError(
            Problem("LF3340", f"strategy {strategy.name!r} compares the updates of single sites, "
                    "and client-level DP puts noise on their sum", key="strategy.name",
                    remedy="a strategy that works on the sum: fedavg, fedprox, a server optimiser")
        )  # fmt: skip


def require_sites(secure: SecureAggregation, cohort: int, sites: int) -> None:
    """Refuse a cohort that is too small to hide an update.

    Args:
        secure: How updates are aggregated.
        cohort: Number of sites of a round.
        sites: Number of sites of the run.

    Raises:
        TaskError: LF3404, it is.
    """
    if secure.enabled and cohort < secure.least_sites():
        raise TaskError(
            Problem("LF3404", f"{cohort} of {sites} sites take part in a round; "
                    f"{secure.least_sites()} are needed to hide an update",
                    key="privacy.secure_aggregation.min_cohort",
                    remedy="enrol more sites, take fewer groups, or a larger rounds.fraction")
        )  # fmt: skip


def shape_of(strategy: Strategy, layout: Layout, plan: MetricsPlan) -> Shape:
    """Return what an update is made of."""
    return Shape(layout.digest, tuple(strategy.site.vectors), layout.size, plan.size)


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
        client: The round's client-level noise, which is added to the sum here; None for none.

    Raises:
        TaskError: The ring has no room for the cohort at the task's bounds.
    """

    clip: float | None = None
    """Norm of the next round, once the sum is read; None without client-level DP."""

    def __init__(
        self,
        strategy: Strategy,
        layout: Layout,
        task: Task,
        number: int,
        cohort: int,
        sites: int,
        spill: Path,
        client: ClientNoise | None = None,
    ) -> None:
        self._sites = sites
        self._layout = layout
        self._noised = PlainSum(client) if client else None
        self._aggregation = task.aggregation
        self._number = number
        self._vectors = tuple(strategy.site.vectors)
        self._names: set[str] = set()
        self._spill: Spill | None = None
        self._sums: dict[str, RingSum] = {}
        if self._noised is not None:
            return
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
        if self._noised is not None:
            self._noised.add(update.vectors[DELTA], norm)
        elif self._spill:
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
        if self._noised is not None:
            came = self._noised.updates
            mean, self.clip = self._noised.mean()
            return Sum(self._number, {DELTA: mean}, self.contributors, float(came), self._sites)
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


class MaskedIntake:
    """The sums of one round's groups, as the strategy needs them: added up, or one by one.

    A strategy that wants single updates gets the mean of each group in their place.

    Args:
        strategy: Says whether one sum is enough.
        layout: The run's layout.
        encoding: How coordinates were encoded.
        number: Round, from 1.
        sites: Number of sites of the run.
        spill: Folder for the groups' means; only made when the strategy needs them.
        sums: One of each group.
        client: The round's noise of client-level DP; None without.
    """

    clip: float | None = None
    """Norm of the next round, once the sum is read; None without client-level DP."""

    def __init__(
        self,
        strategy: Strategy,
        layout: Layout,
        encoding: RingEncoding,
        number: int,
        sites: int,
        spill: Path,
        sums: Sequence[GroupSum],
        client: ClientNoise | None = None,
    ) -> None:
        self._strategy = strategy
        self._client = client
        self._layout = layout
        self._encoding = encoding
        self._number = number
        self._sites = sites
        self._folder = spill
        self._sums = sums
        self._spill: Spill | None = None

    @property
    def contributors(self) -> tuple[str, ...]:
        """Return the names of the sites whose updates are in, sorted."""
        return tuple(sorted(name for group in self._sums for name in group.names))

    def aggregate(self) -> Sum | Each:
        """Return what the server rule works on."""
        if self._client is not None:
            (group,) = self._sums  # one group only: conf and sites see to that
            mean, self.clip = masked_mean(self._client, self._encoding, self._number, group)
            weight = self._weight(group.opened.weight)
            return Sum(self._number, {DELTA: mean}, self.contributors, weight, self._sites)
        if not self._strategy.sum_is_enough:
            self._spill = Spill(self._folder, self._number, self._layout.size)
            for group in self._sums:
                means = _GroupMeans(self._encoding, self._layout.size, [group])
                mean_of_group = {name: means.whole(name, np.float32) for name in means}
                weight = self._weight(group.opened.weight)
                self._spill.add(f"group-{group.number:04d}", mean_of_group, weight)
            return self._spill
        total = sum(group.opened.weight for group in self._sums)
        means = _GroupMeans(self._encoding, self._layout.size, self._sums)
        return Sum(self._number, means, self.contributors, self._weight(total), self._sites)

    def close(self) -> None:
        """Remove what was spilled."""
        if self._spill:
            self._spill.close()

    def _weight(self, encoded: int) -> float:
        return math.ldexp(encoded * self._encoding.weight_bound, -self._encoding.weight_bits)


class _GroupMeans(Means):
    """The means of all sites of some groups, decoded from their sums where they are read.

    In double precision a mean is twice as large as a sum of 32-bit words; who reads it by slices
    never has it as a whole.

    Args:
        encoding: How coordinates were encoded.
        size: Length of each vector, in elements.
        sums: One of each group.
    """

    def __init__(self, encoding: RingEncoding, size: int, sums: Sequence[GroupSum]) -> None:
        self._encoding = encoding
        self._size = size
        self._opened = [group.opened for group in sums]
        encoded = sum(opened.weight for opened in self._opened)
        self._weight = math.ldexp(encoded, -encoding.weight_bits)

    def __iter__(self) -> Iterator[str]:
        return iter(self._opened[0].vectors)

    def __len__(self) -> int:
        return len(self._opened[0].vectors)

    def __getitem__(self, vector: str) -> npt.NDArray[np.float64]:
        return self.whole(vector, np.float64)

    def whole(self, vector: str, dtype: type[Float]) -> npt.NDArray[Float]:
        """Return the mean of one vector, ``[size]``, slice by slice."""
        mean = np.empty(self._size, dtype)
        for start in range(0, mean.size, _SLICE):
            part = slice(start, start + _SLICE)
            mean[part] = self.read(vector, part)
        return mean

    def read(self, vector: str, part: slice) -> npt.NDArray[np.float64]:
        """Return a slice of the mean of one vector, float64."""
        first, *others = (opened.vectors[vector][part] for opened in self._opened)
        added = first.astype(np.uint64)
        for words in others:
            added += words
        added &= self._encoding.mask
        return self._encoding.decode(added) / self._weight


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
