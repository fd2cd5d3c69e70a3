"""What a site would get by itself: the same task, steps and privacy, its own rows only.

The benefit of a federation is the difference to this. The baseline is a what-if on the simulating
machine: its privacy is charged to a ledger of its own, not to the run's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from lepton_fed.clients.site import Site
from lepton_fed.config.schema import ClientPrivacy, SimulationConf, StrategyConf
from lepton_fed.core.exchange import MODEL, Ask
from lepton_fed.core.layout import Vector
from lepton_fed.errors import Problem, RunError
from lepton_fed.models.build import write_local, write_vector
from lepton_fed.simulations.population import SiteRows
from lepton_fed.simulations.sequential import agreement_of
from lepton_fed.strategies.base import DELTA, PlainSite
from lepton_fed.training.evaluation import evaluate
from lepton_fed.training.kit import TaskKit

__all__ = ["Comparison", "compare_with_alone"]


@dataclass(frozen=True)
class Comparison:
    """One site with and without the federation.

    Args:
        site: Name of the site.
        rows: Rows it trains on.
        alone_own: Metrics of the model trained alone, on the site's held-out rows.
        alone_all: The same, on all sites' held-out rows.
        federated_own: Metrics of the global model, on the site's held-out rows.
        federated_all: The same, on all sites' held-out rows.
    """

    site: str
    rows: int
    alone_own: Mapping[str, float]
    alone_all: Mapping[str, float]
    federated_own: Mapping[str, float]
    federated_all: Mapping[str, float]


def compare_with_alone(
    kit: TaskKit,
    model: Vector,
    population: Sequence[SiteRows],
    folder: Path,
    conf: SimulationConf,
) -> list[Comparison]:
    """Train each site's model alone and hold it beside the global one.

    Args:
        kit: The task's kit.
        model: The global model, ``[layout.size]`` float32.
        population: The sites' rows.
        folder: Receives the baseline's own ledgers.
        conf: Task, rounds, privacy and seed of both.

    Raises:
        RunError: A site could not train alone.
    """
    federated_own, federated_all = _measure(kit, model, population)
    found = []
    for index, rows in enumerate(population):
        alone = _train_alone(kit, rows, folder, conf)
        alone_own, alone_all = _measure(kit, alone, population)
        found.append(
            Comparison(
                rows.name,
                len(rows.training),
                alone_own[index],
                alone_all,
                federated_own[index],
                federated_all,
            )
        )
    return found


def _train_alone(kit: TaskKit, rows: SiteRows, folder: Path, conf: SimulationConf) -> Vector:
    agreement = agreement_of(conf, "alone", StrategyConf("alone"))
    # Nobody else sees what a site does alone, so there is no sum to put noise into.
    privacy = replace(agreement.privacy, client=ClientPrivacy())
    agreement = replace(agreement, privacy=privacy)
    site = Site(
        rows.name,
        kit,
        PlainSite(),
        rows.training,
        rows.held_out,
        agreement,
        devices=[torch.device("cpu")],
        folder=folder / rows.name,
    )
    model = kit.initial.copy()
    try:
        for number in range(1, conf.rounds.count + 1):
            ask = Ask(
                agreement=agreement.digest,
                layout=kit.layout.digest,
                round_number=number,
                train=True,
                evaluate=False,
                vectors={MODEL: model},
            )
            reply = site.answer(ask)
            if reply.update is None:
                code = reply.refusal.code if reply.refusal else "LF5301"
                raise RunError(Problem(code, "could not train alone", where=rows.name))
            model = model + reply.update.vectors[DELTA]
    finally:
        site.close()
    return model


def _measure(
    kit: TaskKit, model: Vector, population: Sequence[SiteRows]
) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Return a model's metrics on each site's held-out rows, and on all of them."""
    cpu = torch.device("cpu")
    scratch = kit.model_on(cpu)
    write_vector(scratch, kit.layout, model)
    write_local(scratch, kit.initial_local)
    counts = [
        evaluate(scratch, kit.prepare(rows.held_out, cpu), kit.task, kit.plan, cpu)
        for rows in population
    ]
    return [kit.plan.values(c) for c in counts], kit.plan.values(np.sum(counts, axis=0))
