"""Rows for attacks on a run: the run's own where they are this machine's, and made up elsewhere."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lepton_fed.audit.canaries import made_up_targets
from lepton_fed.audit.claims import Claims
from lepton_fed.clients.own_rows import OwnRows
from lepton_fed.config.schema import ClientConf, SimulationConf
from lepton_fed.data.dataset import Dataset
from lepton_fed.data.drawn import drawn_inputs, pixel_range
from lepton_fed.data.read import read

__all__ = ["mislabelled", "rows_for"]

_WRONG = 0.2
_MADE_UP = 1500


def rows_for(claims: Claims, draws: np.random.Generator) -> tuple[Dataset, str]:
    """Return rows to attack, in random order.

    Args:
        claims: The run's. A simulation's rows are read again, and a site's own at the site; a
            coordinator has none, so they are made up as the task's contract has them.
        draws: Shuffles rows and targets, or makes them up.

    Returns:
        The rows as read, and in words whose they are.

    Raises:
        LeptonError: The rows cannot be read, or do not fit the contract.
    """
    task, conf = claims.agreement.task, claims.conf
    if isinstance(conf, SimulationConf):
        data, whose = read(conf.sites.source, task.data), "the simulation's own"
    elif isinstance(conf, ClientConf):
        data, whose = OwnRows(conf).read(task.data), "this site's own"
    else:
        seed = int(draws.integers(2**31))
        inputs = drawn_inputs(task.data, _MADE_UP, seed, pixel_range(task))
        data, whose = Dataset(inputs, made_up_targets(task, _MADE_UP, draws)), "made up"
    return data.take(draws.permutation(len(data))), whose


def mislabelled(data: Dataset, draws: np.random.Generator) -> Dataset:
    """Return rows of which a fifth have another's target.

    What is labelled wrongly must be memorised to be got right: its membership shows best.

    Args:
        data: The rows.
        draws: Which they are.
    """
    targets = data.targets.copy()
    wrong = np.flatnonzero(draws.random(len(data)) < _WRONG)
    targets[wrong] = targets[draws.permutation(wrong)]
    return replace(data, targets=targets)
