"""How a simulation splits one data set over its sites.

A partitioner is a function ``(dataset, sites, generator, *, contract, **arguments)`` that returns
one array of row numbers for each site. It depends on nothing else, so the same generator gives the
same split. :func:`partition` holds every split, whoever wrote the partitioner, to the one rule that
matters: each row belongs to exactly one site, and each site has a row.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import numpy.typing as npt

from lepton_fed.config import plugins
from lepton_fed.config.schema import Partition
from lepton_fed.core.settings import Setting
from lepton_fed.core.task import DataContract
from lepton_fed.data.dataset import Dataset
from lepton_fed.data.findings import nearest, under
from lepton_fed.errors import DataError, Problem, TaskError, quoted

__all__ = ["column", "dirichlet", "iid", "partition", "quantity", "shards", "split_held_out"]

Rows = npt.NDArray[np.int64]
# Types and bounds are held against the conf by `plugins.call`.
Alpha = Annotated[float, Setting("Concentration.", at_least=1e-3, at_most=1e6)]
Minimum = Annotated[int, Setting("Smallest number of rows of a site.", at_least=1)]

_DIRICHLET_DRAWS = 100
_TARGET_BINS = 10


def partition(
    dataset: Dataset,
    contract: DataContract,
    spec: Partition,
    sites: int,
    generator: np.random.Generator,
    *,
    key: str = "sites.partition",
) -> list[Rows]:
    """Split rows over sites with the partitioner that the conf names.

    Args:
        dataset: Rows with targets, at least one a site.
        contract: Contract of the rows.
        spec: Name and arguments of the partitioner.
        sites: Number of sites, at least 1.
        generator: Source of every random choice.
        key: Conf key of ``spec``, for errors.

    Returns:
        Row numbers of each site, ascending; each row is in exactly one of them, none is empty.

    Raises:
        DataError: The rows cannot be split in this way, or the partitioner broke the rule above.
        TaskError: An argument does not fit the contract.
        ConfError: No partitioner of that name is installed, or it does not take these arguments.
    """
    if sites < 1:
        raise ValueError(f"{sites} sites")
    _require_rows(dataset, sites, f"{sites} sites need a row each")
    with under(key):
        given: Any = plugins.call(
            "partitioners",
            spec.name,
            spec.arguments,
            key=f"{key}.arguments",
            dataset=dataset,
            sites=sites,
            generator=generator,
            contract=contract,
        )
    try:
        parts = [np.sort(np.asarray(rows, dtype=np.int64).reshape(-1)) for rows in given]
    except (TypeError, ValueError):  # no list of arrays of whole numbers
        parts = []
    together = np.sort(np.concatenate([*parts, np.empty(0, np.int64)]))
    if (
        len(parts) != sites
        or not all(len(rows) for rows in parts)
        or not np.array_equal(together, np.arange(len(dataset)))
    ):
        raise DataError(
            Problem(
                "LF2054",
                f"the partitioner {quoted(spec.name)} did not give each row to exactly one of "
                f"{sites} sites",
                key=key,
                remedy="tell the author of the partitioner",
            )
        )
    return parts


def iid(
    dataset: Dataset, sites: int, generator: np.random.Generator, *, contract: DataContract
) -> list[Rows]:
    """Deal shuffled rows out evenly: the sizes of two sites differ by one row at most.

    Args:
        dataset: Rows, at least one a site.
        sites: Number of sites.
        generator: Source of every random choice.
        contract: Contract of the rows.

    Returns:
        Row numbers of each site.

    Raises:
        DataError: There are fewer rows than sites.
    """
    _require_rows(dataset, sites, f"{sites} sites need a row each")
    return np.array_split(generator.permutation(len(dataset)), sites)


def dirichlet(
    dataset: Dataset,
    sites: int,
    generator: np.random.Generator,
    *,
    contract: DataContract,
    alpha: Alpha,
    minimum: Minimum = 2,
) -> list[Rows]:
    """Skew the classes: each is divided by proportions of its own, drawn from Dirichlet(alpha).

    Small alpha gives sites of few classes and unequal size, large alpha even ones. Numbers as
    targets are binned by their deciles. A draw that leaves a site with fewer than ``minimum`` rows
    is repeated.

    Args:
        dataset: Rows with targets.
        sites: Number of sites.
        generator: Source of every random choice.
        contract: Contract of the rows.
        alpha: Concentration, in [0.001, 1e6].
        minimum: Smallest number of rows a site may get.

    Returns:
        Row numbers of each site.

    Raises:
        DataError: There are too few rows, or 100 draws left a site with fewer than ``minimum``.

    References:
        M. Yurochkin et al. Bayesian Nonparametric Federated Learning of Neural Networks. ICML 2019.
        arXiv:1905.12022 (the division of each class).
        T.-M. H. Hsu, H. Qi, M. Brown. Measuring the Effects of Non-Identical Data Distribution for
        Federated Visual Classification. 2019. arXiv:1909.06335 (the meaning of alpha).
    """
    _require_rows(dataset, sites * minimum, f"{sites} sites need {minimum} rows each")
    labels = _labels(dataset)
    classes = [generator.permutation(np.flatnonzero(labels == each)) for each in np.unique(labels)]
    for _ in range(_DIRICHLET_DRAWS):
        # Sizes first: most draws of a small alpha are thrown away, before any row is moved.
        shares = generator.dirichlet(np.full(sites, alpha), size=len(classes))
        cuts = [_cuts(share, len(rows)) for share, rows in zip(shares, classes, strict=True)]
        sizes = sum(
            np.diff(cut, prepend=0, append=len(rows))
            for cut, rows in zip(cuts, classes, strict=True)
        )
        if np.min(sizes) >= minimum:
            pieces = [np.split(rows, cut) for rows, cut in zip(classes, cuts, strict=True)]
            return [np.concatenate(of_site) for of_site in zip(*pieces, strict=True)]
    raise DataError(
        Problem(
            "LF2052",
            f"{_DIRICHLET_DRAWS} draws with alpha {alpha:g} each left one of {sites} sites with "
            f"fewer than {minimum} rows",
            key="arguments.alpha",
            remedy="raise alpha, or lower the number of sites or `minimum`",
        )
    )


def shards(
    dataset: Dataset,
    sites: int,
    generator: np.random.Generator,
    *,
    contract: DataContract,
    per_site: Annotated[int, Setting("Shards of a site.", at_least=1)] = 2,
) -> list[Rows]:
    """Sort rows by target, cut them into equal shards, and deal ``per_site`` of them to each site.

    With as many shards as classes and more, a site sees about ``per_site`` classes.

    Args:
        dataset: Rows with targets.
        sites: Number of sites.
        generator: Source of every random choice.
        contract: Contract of the rows.
        per_site: Shards of a site, at least 1.

    Returns:
        Row numbers of each site.

    Raises:
        DataError: There are fewer rows than shards.

    References:
        H. B. McMahan et al. Communication-Efficient Learning of Deep Networks from Decentralized
        Data. AISTATS 2017. arXiv:1602.05629.
    """
    count = sites * per_site
    _require_rows(dataset, count, f"{sites} sites with {per_site} shards each need a row a shard")
    _require_targets(dataset)
    shuffled = generator.permutation(len(dataset))  # so that rows of one class fall where they may
    ordered = shuffled[np.argsort(dataset.targets[shuffled], kind="stable")]
    pieces = np.array_split(ordered, count)
    dealt = generator.permutation(count).reshape(sites, per_site)
    return [np.concatenate([pieces[shard] for shard in of_site]) for of_site in dealt]


def quantity(
    dataset: Dataset,
    sites: int,
    generator: np.random.Generator,
    *,
    contract: DataContract,
    alpha: Alpha,
    minimum: Minimum = 2,
) -> list[Rows]:
    """Skew the sizes only: each site gets ``minimum`` rows, and a Dirichlet share of the others.

    Args:
        dataset: Rows.
        sites: Number of sites.
        generator: Source of every random choice.
        contract: Contract of the rows.
        alpha: Concentration, in [0.001, 1e6]; small values give one site almost everything.
        minimum: Smallest number of rows a site gets.

    Returns:
        Row numbers of each site.

    Raises:
        DataError: There are too few rows.
    """
    _require_rows(dataset, sites * minimum, f"{sites} sites need {minimum} rows each")
    share = generator.dirichlet(np.full(sites, alpha))
    cuts = _cuts(share, len(dataset) - sites * minimum) + minimum * np.arange(1, sites)
    return np.split(generator.permutation(len(dataset)), cuts)


def column(
    dataset: Dataset,
    sites: int,
    generator: np.random.Generator,
    *,
    contract: DataContract,
    column: str,
) -> list[Rows]:
    """Split by the values of one input column, as where each site is a hospital or an age group.

    Rows with the same value are never separated. The values, in ascending order (categories in the
    contract's, missing numbers last), are cut into as many runs as there are sites, of about equal
    numbers of rows; with as many values as sites, each site gets one.

    Args:
        dataset: Rows of a table.
        sites: Number of sites.
        generator: Not drawn from: this split has no chance in it.
        contract: Contract of the rows.
        column: Name of the column.

    Returns:
        Row numbers of each site.

    Raises:
        DataError: The column has fewer values than there are sites.
        TaskError: The contract has no such column.
    """
    names = [each.name for each in contract.columns] if contract.kind == "table" else []
    if column not in names:
        raise TaskError(
            Problem(
                "LF3110",
                f"the contract has no column {quoted(column)}",
                key="arguments.column",
                remedy=nearest(str(column), names),
            )
        )
    values = dataset.inputs[:, names.index(column)]
    _, codes, counts = np.unique(values, return_inverse=True, return_counts=True)
    if len(counts) < sites:
        raise DataError(
            Problem(
                "LF2053",
                f"the column {quoted(column)} has {len(counts)} values; "
                f"{sites} sites need one each",
                key="arguments.column",
                remedy="lower the number of sites, or name another column",
            )
        )
    # Site s ends at the value where the running count comes nearest to its share, moved as little
    # as needed for each site before and after it to have a value of its own.
    order = np.arange(1, sites)
    ends = np.searchsorted(np.cumsum(counts), len(dataset) * order / sites) + 1
    ends = np.maximum.accumulate(ends - order) + order
    ends = np.minimum(ends, len(counts) - sites + order)
    site_of_value = np.searchsorted(ends, np.arange(len(counts)), side="right")
    site_of_row = site_of_value[codes]
    return [np.flatnonzero(site_of_row == site) for site in range(sites)]


def split_held_out(
    rows: Rows,
    fraction: float,
    generator: np.random.Generator,
    targets: npt.NDArray[np.generic] | None = None,
) -> tuple[Rows, Rows]:
    """Split one site's rows into those it trains on and those it keeps for evaluation.

    With class codes as targets, each class is split in about the same proportion, and a class of
    one row is trained on before it is held out.

    Args:
        rows: Row numbers, int64 ``[n]``.
        fraction: Part to hold out, in [0, 1).
        generator: Source of every random choice.
        targets: Targets of ``rows``, in their order, ``[n]``; numbers and None split at random.

    Returns:
        Rows to train on (at least one, if there is one) and rows held out (at least one, if
        ``fraction`` is above 0 and there are two), both ascending.

    Raises:
        ValueError: ``fraction`` or the length of ``targets`` is wrong.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction must be in [0, 1), it is {fraction}")
    if targets is not None and len(targets) != len(rows):
        raise ValueError(f"{len(rows)} rows, but {len(targets)} targets")
    count = len(rows)
    if fraction == 0 or count < 2:
        return np.sort(rows), rows[:0]
    held = min(max(round(fraction * count), 1), count - 1)
    order = generator.permutation(count)
    if targets is not None and targets.dtype.kind in "iu":
        order = _by_class(targets, order, held)
    chosen = np.zeros(count, dtype=np.bool_)
    chosen[order[:held]] = True
    return np.sort(rows[~chosen]), np.sort(rows[chosen])


def _by_class(targets: npt.NDArray[np.generic], order: Rows, held: int) -> Rows:
    """Reorder ``order`` so that its first ``held`` entries take a fair share of every class."""
    _, codes, sizes = np.unique(targets[order], return_inverse=True, return_counts=True)
    divisible = np.where(sizes > 1, sizes, 0)
    if divisible.sum() <= held:  # so much is held out that classes of one row cannot be spared
        divisible = sizes
    share = divisible * held / divisible.sum()
    quota = np.floor(share).astype(np.int64)
    # What rounding down leaves goes to the largest remainders.
    quota[np.argsort(quota - share, kind="stable")[: held - int(quota.sum())]] += 1
    within = np.empty(len(order), dtype=np.int64)
    for code, size in enumerate(sizes):
        within[codes == code] = np.arange(size)
    return order[np.argsort(within >= quota[codes], kind="stable")]


def _cuts(share: npt.NDArray[np.float64], count: int) -> Rows:
    """Return where ``count`` rows are cut so that the pieces have about these shares."""
    return np.rint(np.cumsum(share)[:-1] * count).astype(np.int64)


def _labels(dataset: Dataset) -> npt.NDArray[np.generic]:
    """Return class codes, or the decile of a number."""
    _require_targets(dataset)
    if dataset.targets.dtype.kind in "iu":
        return dataset.targets
    targets = dataset.targets.astype(np.float64)
    edges = np.quantile(targets, np.linspace(0, 1, _TARGET_BINS + 1)[1:-1])
    return np.searchsorted(edges, targets, side="right")


def _require_rows(dataset: Dataset, needed: int, why: str) -> None:
    if len(dataset) < needed:
        raise DataError(
            Problem(
                "LF2050",
                f"there are {len(dataset)} rows; {why}, {needed} in all",
                key="sites.count",
                remedy="lower the number of sites, or give more rows",
            )
        )


def _require_targets(dataset: Dataset) -> None:
    if not dataset.labelled:
        raise DataError(Problem("LF2051", "the rows have no targets to split by"))
