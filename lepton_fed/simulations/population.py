"""The sites of a simulation: one data set, split over them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lepton_fed.config.schema import SimulationConf
from lepton_fed.core.seeds import generator
from lepton_fed.data.dataset import Dataset
from lepton_fed.data.partitioners import partition, split_held_out
from lepton_fed.data.read import read

__all__ = ["SiteRows", "populate", "site_names"]


@dataclass(frozen=True)
class SiteRows:
    """One simulated site's rows.

    Args:
        name: Name of the site.
        training: Rows it trains on.
        held_out: Rows it evaluates on.
    """

    name: str
    training: Dataset
    held_out: Dataset


def populate(conf: SimulationConf) -> list[SiteRows]:
    """Read the data set and split it over the sites, the same way for the same seed.

    Args:
        conf: The simulation.

    Raises:
        DataError: The rows do not fit the contract, or are too few for the sites.
        TaskError: An argument does not fit the contract.
        ConfError: A reader or partitioner is not installed or takes other arguments.
    """
    data = read(conf.sites.source, conf.task.data)
    names = site_names(conf)
    parts = partition(
        data, conf.task.data, conf.sites.partition, len(names), generator(conf.seed, "partition")
    )
    return [_split(name, data, rows, conf) for name, rows in zip(names, parts, strict=True)]


def site_names(conf: SimulationConf) -> list[str]:
    """Return the names of the sites, given or made up."""
    return list(conf.sites.names) or [f"site-{n}" for n in range(1, conf.sites.count + 1)]


def _split(name: str, data: Dataset, rows: npt.NDArray[np.int64], conf: SimulationConf) -> SiteRows:
    training, held_out = split_held_out(
        rows, conf.sites.held_out, generator(conf.seed, "held-out", site=name), data.targets[rows]
    )
    return SiteRows(name, data.take(training), data.take(held_out))
