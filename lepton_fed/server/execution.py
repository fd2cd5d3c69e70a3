"""One run from its first event to its summary, whatever the sites are reached by."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version

from lepton_fed.config.agreement import Agreement
from lepton_fed.config.schema import ServerConf, SimulationConf
from lepton_fed.core.layout import vector_digest
from lepton_fed.core.pace import Pace
from lepton_fed.errors import LeptonError, Problem, RunError
from lepton_fed.identity.signature import PublicKey
from lepton_fed.privacy.client import ClientNoise, client_noise
from lepton_fed.privacy.dp.shared import honest_of
from lepton_fed.runs.events import EventLog, read_events
from lepton_fed.runs.folder import RunFolder
from lepton_fed.runs.summary import ClientGuarantee, RunSummary, SiteSummary
from lepton_fed.server.intake import shape_of
from lepton_fed.server.masked import MaskedRounds
from lepton_fed.server.rounds import Coordinator, Outcome
from lepton_fed.server.standing import Standing
from lepton_fed.strategies.base import Strategy
from lepton_fed.training.kit import TaskKit

__all__ = ["Left", "execute", "left", "outside_epsilon", "recorded"]

_log = logging.getLogger("lepton_fed.server")

_LIBRARIES = ("lepton-fed", "torch", "numpy", "flwr", "opacus", "dp-accounting", "safetensors")


@dataclass(frozen=True)
class Left:
    """Whom a run that goes on had when it was interrupted.

    Args:
        sites: Names of the sites that may take part.
        agreed: Names of those that had agreed, as they said last.
    """

    sites: tuple[str, ...]
    agreed: frozenset[str]


def left(folder: RunFolder) -> Left | None:
    """Return whom an interrupted run had; None for one that had not begun.

    Raises:
        LeptonError: The event log was changed or cannot be read.
    """
    if not folder.events.exists():
        return None
    sites: tuple[str, ...] | None = None
    agreed: set[str] = set()
    for event in read_events(folder.events):
        if event["event"] == "run.started":
            sites = tuple(event["sites"])
        elif event["event"] == "site.agreed":
            agreed.add(event["site"])
        elif event["event"] == "site.refused":
            agreed.discard(event["site"])
    return None if sites is None else Left(sites, frozenset(agreed))


def execute(
    conf: SimulationConf | ServerConf,
    strategy: Strategy,
    kit: TaskKit,
    agreement: Agreement,
    sites: Sequence[str],
    folder: RunFolder,
    log: EventLog,
    run: Callable[[Coordinator, Standing], Outcome],
    *,
    keys: Callable[[], Mapping[str, PublicKey]],
    one_kind_of_device: bool,
    pace: Pace | None = None,
) -> tuple[Outcome, RunSummary]:
    """Run the rounds that are left and write down what came of them.

    A run whose event log says that it was begun goes on after its last checkpoint.

    Args:
        conf: The conf.
        strategy: The strategy that runs.
        kit: The task's kit.
        agreement: What the sites agree to.
        sites: Names of the sites that may take part.
        folder: The run's folder.
        log: Its event log.
        run: Lets the coordinator reach the sites and go on from where the run stands.
        keys: Tells the public identity key of every site of the roster, by name.
        one_kind_of_device: Whether all sites are known to train on a CPU.
        pace: Sets the deadlines of rounds; None waits for every site.

    Raises:
        LeptonError: The run could not go on; what was recorded stays.
    """
    masked = None
    if agreement.privacy.secure_aggregation.enabled:
        masked = MaskedRounds(
            agreement,
            shape_of(strategy, kit.layout, kit.plan),
            folder,
            log,
            keys,
            quorum=conf.rounds.quorum,
            patience=None if pace is None else pace.patience,
        )
    coordinator = Coordinator(
        agreement,
        conf.rounds,
        kit.layout,
        kit.plan,
        strategy,
        folder=folder,
        log=log,
        pace=pace,
        masked=masked,
    )
    standing = coordinator.start(kit.initial)
    events = read_events(folder.events)
    closed = [event["round"] for event in events if event["event"] == "round.closed"]
    begun = any(event["event"] == "run.started" for event in events)
    checkpoint = coordinator.standing()
    _require_whole(folder, checkpoint, max(closed, default=0), begun=begun)
    if begun:
        standing = _resume(checkpoint or standing, folder)
        log.emit(
            "run.resumed",
            run=folder.name,
            round=standing.round_number,
            rounds=conf.rounds.count,
            strategy=strategy.name,
        )
        if standing.round_number > max(closed, default=0):
            coordinator.tell_closed(standing)
    else:
        log.emit(
            "run.started",
            run=folder.name,
            task=conf.task.digest,
            layout=kit.layout.digest,
            parameters=kit.layout.size,
            seed=conf.seed,
            rounds=conf.rounds.count,
            strategy=strategy.name,
            sites=list(sites),
            record_dp=conf.privacy.record.enabled,
            mechanism=_told(conf, "mechanism"),
            sampler=_told(conf, "sampler"),
            randomness=_told(conf, "randomness"),
            outside_epsilon=outside_epsilon(conf),
        )
    client = client_noise(agreement, kit.layout.size)
    if client is not None:
        log.emit(
            "client_dp.planned",
            epsilon=client.epsilon,
            delta=client.delta,
            adjacency=client.adjacency,
            against=client.against,
            noise=client.source,
            mechanism=client.mechanism,
            clip=client.clip,
            noise_multiplier=client.noise_multiplier,
            honest=client.honest,
            rounds=agreement.rounds,
            cohort=agreement.cohort,
            mean_deviation=client.mean_deviation(max(1, agreement.cohort)),
            quantile=client.quantile,
        )
    outcome = run(coordinator, standing)
    about = {"layout": kit.layout.digest, "task": conf.task.digest, "digest": outcome.digest}
    folder.write_model(kit.layout, outcome.model, about)
    repeatable = (
        one_kind_of_device and not conf.privacy.is_noised and strategy.server.needs == "sum"
    )
    summary = _summary(conf, agreement, strategy, kit, outcome, folder, repeatable)
    log.emit(
        "run.finished", digest=outcome.digest, metrics=summary.metrics, seconds=summary.seconds
    )
    summary = replace(summary, events=log.head)
    folder.write_summary(summary)
    if masked is not None:
        masked.forget()
    return outcome, summary


def _require_whole(
    folder: RunFolder, checkpoint: Standing | None, closed: int, *, begun: bool
) -> None:
    """Refuse a run whose log and checkpoints do not belong together: one was taken away.

    The newest checkpoint may be damaged, as the one before it is kept too.
    """
    newest = checkpoint.round_number if checkpoint else 0
    if checkpoint and not begun:
        what = f"there is a checkpoint of round {newest}, and the event log does not know the run"
    elif newest < closed - 1 or (closed and not checkpoint):
        what = f"round {closed} is closed, and the newest checkpoint is of round {newest}"
    else:
        if newest < closed:
            _log.warning(
                "run.resumed the checkpoint of round %d is damaged; it is done again", closed
            )
        return
    raise RunError(
        Problem("LF5216", what, where=str(folder.path), remedy="restore its folder from a backup, "
                "or begin anew: lepton-fed server --new")
    )  # fmt: skip


def _resume(standing: Standing, folder: RunFolder) -> Standing:
    """Take back what was written after the checkpoint that a run goes on from."""
    folder.sweep()
    folder.drop_metrics_from(standing.round_number)
    return standing


@contextmanager
def recorded(log: EventLog) -> Iterator[EventLog]:
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


def outside_epsilon(conf: SimulationConf | ServerConf) -> list[str]:
    """Return the numbers derived from rows that leave the sites uncovered by epsilon."""
    if not conf.privacy.is_noised:
        return []
    return list(conf.privacy.outside_epsilon) if conf.rounds.evaluate else []


def _guarantee(client: ClientNoise, last_clip: float) -> ClientGuarantee:
    """Return what the summary says of client-level DP."""
    return ClientGuarantee(
        epsilon=client.epsilon,
        delta=client.delta,
        adjacency=client.adjacency,
        against=client.against,
        noise=client.source,
        mechanism=client.mechanism,
        clip=client.clip,
        noise_multiplier=client.noise_multiplier,
        honest=client.honest,
        quantile=client.quantile,
        last_clip=last_clip or client.clip,
    )


def _told(conf: SimulationConf | ServerConf, setting: str) -> str:
    """Return a word of the conf's record-level DP; empty without it."""
    record = conf.privacy.record
    return str(getattr(record, setting)) if record.enabled else ""


def _summary(
    conf: SimulationConf | ServerConf,
    agreement: Agreement,
    strategy: Strategy,
    kit: TaskKit,
    outcome: Outcome,
    folder: RunFolder,
    repeatable: bool,
) -> RunSummary:
    record, masked = conf.privacy.record, conf.privacy.secure_aggregation.enabled
    # Of a masked update nothing says what it cost; no site goes beyond what it agreed to.
    client = client_noise(agreement, kit.layout.size)
    at_most = record.epsilon if masked and record.enabled else None
    return RunSummary(
        run=folder.name,
        task=conf.task.digest,
        layout=kit.layout.digest,
        model=vector_digest(kit.layout, outcome.model),
        digest=outcome.digest,
        repeatable=repeatable,
        seed=conf.seed,
        rounds=conf.rounds.count,
        strategy=strategy.name,
        parameters=kit.layout.size,
        metrics=dict(outcome.metrics),
        error_bounds=dict(outcome.error_bounds),
        delta=record.delta if record.enabled else None,
        clip=record.clip if record.enabled else None,
        outside_epsilon=outside_epsilon(conf),
        mechanism=_told(conf, "mechanism"),
        sampler=_told(conf, "sampler"),
        randomness=_told(conf, "randomness"),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(outcome.record.seconds, 3),
        versions={name: version(name) for name in _LIBRARIES},
        sites=[
            SiteSummary(
                name=name,
                rounds=site.rounds,
                metrics=site.metrics,
                epsilon=at_most if site.epsilon is None else site.epsilon,
                noise_multiplier=site.noise_multiplier,
                update_bytes=site.update_bytes,
            )
            for name, site in sorted(outcome.record.sites.items())
        ],
        masked=masked,
        honest=honest_of(agreement) if record.is_shared else 0,
        client=_guarantee(client, outcome.record.clip) if client else None,
    )
