"""The engine that runs a federation in one process, sites one after another.

It is the deployment without a network: the same coordinator and sites, as a Flower ServerApp and
ClientApp on an in-process Grid, hence the same run digest.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from lepton_fed.clients.masked import MaskedSite
from lepton_fed.clients.site import Site
from lepton_fed.clients.vault import MemoryVault
from lepton_fed.config.agreement import Agreement
from lepton_fed.config.load import Loaded
from lepton_fed.config.schema import AggregationFloor, SimulationConf, StrategyConf
from lepton_fed.core.exchange import Ask, PhaseAsk, PhaseReply, Reply
from lepton_fed.errors import LeptonError
from lepton_fed.identity.signature import PrivateKey, PublicKey
from lepton_fed.privacy.client import with_client_noise
from lepton_fed.privacy.dp.shared import noise_to_agree_on, shared_noise
from lepton_fed.privacy.masked_plan import Shape
from lepton_fed.runs.events import EventLog, Listener
from lepton_fed.runs.folder import RunFolder
from lepton_fed.runs.summary import RunSummary
from lepton_fed.server.execution import execute, recorded
from lepton_fed.server.intake import plan_aggregation, shape_of
from lepton_fed.server.rounds import Coordinator, Outcome
from lepton_fed.server.standing import Standing
from lepton_fed.simulations.population import SiteRows, populate
from lepton_fed.strategies.base import Strategy
from lepton_fed.strategies.build import build_strategy
from lepton_fed.training.device import devices_of
from lepton_fed.training.kit import TaskKit, build_kit
from lepton_fed.training.noise import check_trainable, plan_noise, require_memory

__all__ = ["Simulation", "agreement_of", "plan_privacy", "simulate"]


@dataclass(frozen=True)
class Simulation:
    """A finished simulation.

    Args:
        folder: Its run folder.
        summary: What it has to say.
        kit: The task's kit.
        population: The sites' rows.
        outcome: Final model, digest and metrics.
    """

    folder: RunFolder
    summary: RunSummary
    kit: TaskKit
    population: Sequence[SiteRows]
    outcome: Outcome


def simulate(
    loaded: Loaded[SimulationConf],
    *,
    strategy: Strategy | None = None,
    listeners: tuple[Listener, ...] = (),
) -> Simulation:
    """Run a federation in this process.

    Nothing is written before data, task and privacy have been checked.

    Args:
        loaded: The conf.
        strategy: Takes the place of the one the conf names.
        listeners: Called with each event of the run.

    Raises:
        LeptonError: Conf, data or task are wrong, or the run could not go on. What an event log had
            already recorded stays.
    """
    conf = loaded.conf
    chosen = strategy or build_strategy(conf.strategy)
    devices = devices_of(conf.device)
    kit = build_kit(conf.task, conf.seed)
    population = populate(conf)
    plan_privacy(conf, kit, population)
    named = conf.strategy if strategy is None else StrategyConf(strategy.name)
    planned = with_client_noise(agreement_of(conf, "run", named), kit.layout.size)
    plan_aggregation(planned, chosen, kit.layout, kit.plan, len(population))
    with ExitStack() as stack:
        folder = RunFolder.create(Path(conf.runs), conf.task.name, loaded.resolved_yaml())
        agreement = replace(planned, run=folder.name)
        log = stack.enter_context(recorded(EventLog(folder.events, listeners)))
        sites: dict[str, Site] = {}
        for index, rows in enumerate(population):
            site = Site(
                rows.name,
                kit,
                chosen.site,
                rows.training,
                rows.held_out,
                agreement,
                # Several GPUs take the sites in turn; each site trains on one.
                devices=[devices[index % len(devices)]],
                folder=folder.site(rows.name),
            )
            stack.callback(site.close)
            sites[rows.name] = site
        keys, masked = _masked_sites(agreement, shape_of(chosen, kit.layout, kit.plan), sites)
        outcome, summary = execute(
            conf,
            chosen,
            kit,
            agreement,
            [rows.name for rows in population],
            folder,
            log,
            lambda coordinator, standing: _run_on_flower(coordinator, standing, sites, masked),
            keys=lambda: keys,
            one_kind_of_device=conf.device == "cpu",
        )
    return Simulation(folder, summary, kit, population, outcome)


def agreement_of(conf: SimulationConf, run: str, strategy: StrategyConf) -> Agreement:
    """Return what the sites of a simulation agree to.

    Args:
        conf: The conf.
        run: Name of the run.
        strategy: The strategy that runs; of an object, its name is all that is known.
    """
    cohort = conf.rounds.cohort_size(conf.sites.count)
    rounds, privacy = conf.rounds.count, conf.privacy
    noise = noise_to_agree_on(privacy, rounds)
    return Agreement(run, conf.task, strategy, rounds, conf.seed, privacy, cohort, noise)


def plan_privacy(
    conf: SimulationConf, kit: TaskKit, population: Sequence[SiteRows]
) -> dict[str, float]:
    """Return the noise multiplier that each site's target epsilon takes; empty without DP.

    Args:
        conf: The conf.
        kit: The task's kit.
        population: The sites' rows.

    Raises:
        TaskError: The task or the target does not go with record-level DP; LF3352, the noise of
            all sites does not fit into this machine's memory.
    """
    record = conf.privacy.record
    if not record.enabled:
        return {}
    check_trainable(kit, record, devices=1)  # each site trains on one
    agreement = agreement_of(conf, "run", conf.strategy)
    shared = shared_noise(agreement, kit.layout.size)
    plans = {
        rows.name: plan_noise(kit, record, len(rows.training), conf.rounds.count, shared)
        for rows in population
    }
    require_memory(plans.values(), kit.noised_size)
    return {name: plan.noise_multiplier for name, plan in plans.items()}


def _masked_sites(
    agreement: Agreement, shape: Shape, sites: Mapping[str, Site]
) -> tuple[dict[str, PublicKey], dict[str, MaskedSite]]:
    """Return the public key of each site, and its part in secure aggregation."""
    if not agreement.privacy.secure_aggregation.enabled:
        return {}, {}
    identities = {name: PrivateKey.generate() for name in sites}
    keys = {name: identity.public_key() for name, identity in identities.items()}
    # What the coordinator of a simulation asks for is what its owner wants.
    floor = AggregationFloor(rounds_per_hour=sys.maxsize)
    masked = {
        name: MaskedSite(
            name, identity, keys, agreement, shape, floor, MemoryVault(), sites[name].answer
        )
        for name, identity in identities.items()
    }
    return keys, masked


def _run_on_flower(
    coordinator: Coordinator,
    standing: Standing,
    sites: Mapping[str, Site],
    masked: Mapping[str, MaskedSite],
) -> Outcome:
    from lepton_fed.flower.transport import run_in_process

    def answer(site: str, ask: Ask) -> Reply:
        return sites[site].answer(ask)

    def take(site: str, asked: PhaseAsk) -> PhaseReply:
        try:
            return masked[site].take(asked)
        except LeptonError as error:
            return PhaseReply(site, refusal=error.problems[0])

    return run_in_process(
        list(sites), answer, lambda transport: coordinator.run(transport, standing), take
    )
