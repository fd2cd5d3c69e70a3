"""The engine that runs a federation in one process, sites one after another.

It is the deployment without a network: the same coordinator and sites, as a Flower ServerApp and
ClientApp on an in-process Grid, hence the same run digest.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from lepton_fed.clients.site import Site
from lepton_fed.config.agreement import Agreement
from lepton_fed.config.load import Loaded
from lepton_fed.config.schema import SimulationConf, StrategyConf
from lepton_fed.core.exchange import Ask, Reply
from lepton_fed.core.layout import vector_digest
from lepton_fed.errors import LeptonError, RunError
from lepton_fed.runs.events import EventLog, Listener
from lepton_fed.runs.folder import RunFolder
from lepton_fed.runs.summary import RunSummary, SiteSummary
from lepton_fed.server.intake import plan_encoding
from lepton_fed.server.rounds import Coordinator, Outcome
from lepton_fed.simulations.open_files import room_for_ledgers
from lepton_fed.simulations.population import SiteRows, populate
from lepton_fed.strategies.base import Strategy
from lepton_fed.strategies.build import build_strategy
from lepton_fed.training.device import devices_of
from lepton_fed.training.kit import TaskKit, build_kit
from lepton_fed.training.noise import check_trainable, plan_noise

__all__ = ["Simulation", "agreement_of", "plan_privacy", "simulate"]

_LIBRARIES = ("lepton-fed", "torch", "numpy", "flwr", "opacus", "dp-accounting", "safetensors")


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
    started = time.monotonic()
    chosen = strategy or build_strategy(conf.strategy)
    devices = devices_of(conf.device)
    kit = build_kit(conf.task, conf.seed)
    population = populate(conf)
    plan_privacy(conf, kit, population)
    if chosen.server.needs == "sum":
        plan_encoding(conf.task, conf.rounds.cohort_size(len(population)))
    with ExitStack() as stack:
        if conf.privacy.record.enabled:
            stack.enter_context(room_for_ledgers(len(population)))
        folder = RunFolder.create(Path(conf.runs), conf.task.name, loaded.resolved_yaml())
        named = conf.strategy if strategy is None else StrategyConf(strategy.name)
        agreement = agreement_of(conf, folder.name, named)
        log = stack.enter_context(_recorded(EventLog(folder.events, listeners)))
        log.emit(
            "run.started",
            run=folder.name,
            task=conf.task.digest,
            layout=kit.layout.digest,
            parameters=kit.layout.size,
            seed=conf.seed,
            rounds=conf.rounds.count,
            strategy=chosen.name,
            sites=[rows.name for rows in population],
            record_dp=conf.privacy.record.enabled,
            outside_epsilon=outside_epsilon(conf),
        )
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
        coordinator = Coordinator(
            agreement,
            conf.rounds,
            kit.layout,
            kit.plan,
            chosen,
            folder=folder,
            log=log,
        )
        outcome = _run_on_flower(coordinator, sites, kit)
        about = {"layout": kit.layout.digest, "task": conf.task.digest, "digest": outcome.digest}
        folder.write_model(kit.layout, outcome.model, about)
        summary = _summary(conf, chosen, kit, outcome, folder, time.monotonic() - started)
        log.emit(
            "run.finished", digest=outcome.digest, metrics=summary.metrics, seconds=summary.seconds
        )
        summary = replace(summary, events=log.head)
        folder.write_summary(summary)
    return Simulation(folder, summary, kit, population, outcome)


@contextmanager
def _recorded(log: EventLog) -> Iterator[EventLog]:
    """Close a run's log in the end; let it say why, when the run ends before its time."""
    try:
        yield log
    except BaseException as error:
        # As far as it can be written: what ended the run is the error to tell.
        with suppress(RunError):
            log.emit("run.failed", code=_code_of(error))
        with suppress(RunError):
            log.close()
        raise
    log.close()


def _code_of(error: BaseException) -> str:
    if isinstance(error, LeptonError):
        return error.code
    if isinstance(error, KeyboardInterrupt):
        return "LF5211"
    return "LF5401" if isinstance(error, OSError) else "LF5212"


def agreement_of(conf: SimulationConf, run: str, strategy: StrategyConf) -> Agreement:
    """Return what the sites of a simulation agree to.

    Args:
        conf: The conf.
        run: Name of the run.
        strategy: The strategy that runs; of an object, its name is all that is known.
    """
    return Agreement(run, conf.task, strategy, conf.rounds.count, conf.seed, conf.privacy)


def plan_privacy(
    conf: SimulationConf, kit: TaskKit, population: Sequence[SiteRows]
) -> dict[str, float]:
    """Return the noise multiplier that each site's target epsilon takes; empty without DP.

    Args:
        conf: The conf.
        kit: The task's kit.
        population: The sites' rows.

    Raises:
        TaskError: The task or the target does not go with record-level DP.
    """
    record = conf.privacy.record
    if not record.enabled:
        return {}
    check_trainable(kit, record, devices=1)  # each site trains on one
    return {
        rows.name: plan_noise(kit, record, len(rows.training), conf.rounds.count).noise_multiplier
        for rows in population
    }


def outside_epsilon(conf: SimulationConf) -> list[str]:
    """Return the numbers derived from rows that leave the sites uncovered by epsilon."""
    if not conf.privacy.record.enabled:
        return []
    return list(conf.privacy.outside_epsilon) if conf.rounds.evaluate else []


def _run_on_flower(coordinator: Coordinator, sites: dict[str, Site], kit: TaskKit) -> Outcome:
    from lepton_fed.flower.transport import run_in_process

    def answer(site: str, ask: Ask) -> Reply:
        return sites[site].answer(ask)

    return run_in_process(
        list(sites), answer, lambda transport: coordinator.run(transport, kit.initial)
    )


def _summary(
    conf: SimulationConf,
    strategy: Strategy,
    kit: TaskKit,
    outcome: Outcome,
    folder: RunFolder,
    seconds: float,
) -> RunSummary:
    record = conf.privacy.record
    return RunSummary(
        run=folder.name,
        task=conf.task.digest,
        layout=kit.layout.digest,
        model=vector_digest(kit.layout, outcome.model),
        digest=outcome.digest,
        repeatable=conf.device == "cpu" and not record.enabled and strategy.server.needs == "sum",
        seed=conf.seed,
        rounds=conf.rounds.count,
        strategy=strategy.name,
        parameters=kit.layout.size,
        metrics=dict(outcome.metrics),
        error_bounds=dict(outcome.error_bounds),
        delta=record.delta if record.enabled else None,
        clip=record.clip if record.enabled else None,
        outside_epsilon=outside_epsilon(conf),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(seconds, 3),
        versions={name: version(name) for name in _LIBRARIES},
        sites=[
            SiteSummary(
                name=name,
                rounds=site.rounds,
                metrics=site.metrics,
                epsilon=site.epsilon,
                noise_multiplier=site.noise_multiplier,
                update_bytes=site.update_bytes,
            )
            for name, site in sorted(outcome.sites.items())
        ],
    )
