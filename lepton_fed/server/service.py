"""The coordinator as a long-lived service: Flower's SuperLink, runs one after another, pushes.

Its SQLite, lock and jobs live in a state folder; a run's record in a run folder. It opens one
Flower run for its own life: that is only the channel. Rounds, admission and sums are lepton-fed's.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lepton_fed.config.agreement import Agreement
from lepton_fed.config.load import Loaded, load_conf
from lepton_fed.config.schema import ServerConf
from lepton_fed.core.pace import Deadline, Pace
from lepton_fed.errors import LeptonError, Problem, Refused
from lepton_fed.export.bundle import verify_bundle
from lepton_fed.flower.superlink import Grid, SuperLink
from lepton_fed.flower.transport import GridTransport
from lepton_fed.identity.keys import load_private_key
from lepton_fed.identity.signature import PrivateKey
from lepton_fed.privacy.client import with_client_noise
from lepton_fed.privacy.dp.shared import noise_to_agree_on
from lepton_fed.runs.events import EventLog, Listener
from lepton_fed.runs.folder import RunFolder, find_run
from lepton_fed.runs.status import PASSING
from lepton_fed.runs.summary import RunSummary
from lepton_fed.server.execution import Left, execute, left, recorded
from lepton_fed.server.federation import Federation, RosterChange
from lepton_fed.server.intake import plan_aggregation
from lepton_fed.server.jobs import Job, Jobs
from lepton_fed.server.monitor import Monitor
from lepton_fed.server.ongoing import Ongoing, OngoingRun, run_digest_of_conf
from lepton_fed.server.push import push_bundle
from lepton_fed.server.renewal import CertificateInUse, Members, RosterInUse, Watcher
from lepton_fed.server.rounds import Coordinator, Outcome
from lepton_fed.server.standing import Standing
from lepton_fed.strategies.build import build_strategy
from lepton_fed.training.kit import build_kit

__all__ = ["Finished", "Service", "address_of", "serve"]

_LOOK_S = 0.5
_PUSH_S = 120.0

_ABSENT = frozenset({"LF5001", "LF5004"})
"""The sites are not there: a later start may find them."""

_log = logging.getLogger("lepton_fed.server")


@dataclass(frozen=True)
class Finished:
    """A run that ended well.

    Args:
        folder: Its run folder.
        summary: What it has to say.
    """

    folder: RunFolder
    summary: RunSummary


def serve(
    loaded: Loaded[ServerConf],
    *,
    once: bool,
    new: bool = False,
    resume: str = "",
    listeners: tuple[Listener, ...] = (),
    told: Callable[[Finished], None] = lambda finished: None,
    stop: threading.Event | None = None,
) -> None:
    """Be the coordinator: execute the conf's run, then what is asked for, until stopped.

    A run that was interrupted, by whatever, goes on from its last checkpoint. The conf's run is not
    executed a second time unless that is asked for: the system may start a service again at any
    time, and every run costs the sites of their budget.

    What a new start may mend ends the service, so that the system starts it again and the run goes
    on: a full disk, a database that is damaged or locked, an event log that another process holds,
    sites that are not there. What only a person can mend is told, and the service stays.

    Args:
        loaded: The conf.
        once: End after the conf's run.
        new: Begin the conf's run anew, also when one was interrupted or is finished.
        resume: Words that name a run to go on with in place of the conf's; empty for none.
        listeners: Called with each event of a run.
        told: Called with each run that ended well.
        stop: Set to end; between runs.

    Raises:
        LeptonError: Conf, keys, roster, certificate or address are wrong; what a new start may
            mend ended a run; with ``once``, whatever ended the run.
    """
    service = Service(loaded.conf, listeners)
    with service.jobs.owned():
        turns = _turns(service, loaded, once=once, new=new, resume=resume)
        service.open()
        try:
            _work(service, turns, once=once, told=told, stop=stop or threading.Event())
        finally:
            service.close()


@dataclass(frozen=True)
class _Turn:
    """A run to execute, or to go on with."""

    loaded: Loaded[ServerConf]
    folder: RunFolder | None = None
    job: str = ""


def _turns(
    service: Service, loaded: Loaded[ServerConf], *, once: bool, new: bool, resume: str
) -> list[_Turn]:
    """Return what to run before what is asked for: what was interrupted, then the conf's run."""
    ongoing = _interrupted(service, named=new or bool(resume))
    if resume:
        folder = find_run(resume, Path(loaded.conf.runs))
        if folder.read_summary() is not None:
            raise Refused(
                Problem("LF4217", "this run is finished", where=str(folder.path),
                        remedy="resume one that is not: lepton-fed runs list")
            )  # fmt: skip
        same = ongoing is not None and Path(ongoing.folder) == folder.path.absolute()
        job = ongoing.job if ongoing is not None and same else ""
        return [_Turn(load_conf(folder.conf, [], kind=ServerConf), folder, job)]
    turns: list[_Turn] = []
    mine = run_digest_of_conf(loaded.conf)
    done = None if once or new else service.ongoing.done()
    if ongoing is not None and not new:
        folder = RunFolder(Path(ongoing.folder))
        if ongoing.job:
            turns.append(_Turn(load_conf(folder.conf, [], kind=ServerConf), folder, ongoing.job))
        elif ongoing.conf == mine:
            return [_Turn(loaded, folder)]
        else:
            _log.warning(
                "server.left run %s was interrupted under another conf and is left as it is; "
                "lepton-fed server --resume %s goes on with it", folder.name, folder.name,
            )  # fmt: skip
    if done is not None and done.conf == mine:
        _log.info(
            "server.done this conf's run is finished: %s; --new or `lepton-fed runs submit` runs "
            "it again", done.folder,
        )  # fmt: skip
        return turns
    return [*turns, _Turn(loaded)]


def _interrupted(service: Service, *, named: bool) -> OngoingRun | None:
    """Return the run that was interrupted; tell whoever gave it, if it is over.

    Args:
        service: The coordinator.
        named: Whether a person said what to run, so that it need not be known.
    """
    try:
        found = service.ongoing.run()
    except Refused:
        if not named:
            raise
        return None
    if found is None or found.result is None:
        return found
    _answer(service, found.job, found.result)
    return None


def _answer(service: Service, job: str, result: dict[str, Any]) -> None:
    """Tell a job's giver what came of it; a kill in between repeats this, and not the job."""
    service.ongoing.answer(job, result)
    service.jobs.done(job, result)
    service.ongoing.end(job)


def _work(
    service: Service,
    turns: list[_Turn],
    *,
    once: bool,
    told: Callable[[Finished], None],
    stop: threading.Event,
) -> None:
    with service.channel() as grid:
        for turn in turns:
            if turn.job:
                _answer(service, turn.job, _execute(service, turn, grid, told))
                continue
            try:
                told(service.run(turn, grid))
            except LeptonError as error:
                if once or error.code in PASSING | _ABSENT:
                    raise
                service.monitor.failed(error.code)
                _tell(turn.loaded, error)
        while not once and not stop.is_set():
            for name, job in service.jobs.waiting():
                _answer(service, name, _do(service, name, job, grid, told))
            stop.wait(_LOOK_S)


def _do(
    service: Service, name: str, job: Job, grid: Grid, told: Callable[[Finished], None]
) -> dict[str, Any]:
    """Do a job; what goes wrong is its result, unless it can be done after a new start."""
    try:
        if job.kind == "push":
            return service.push(Path(job.path), grid)
        turn = _Turn(load_conf(Path(job.path), [], kind=ServerConf), job=name)
    except LeptonError as error:
        if error.code in PASSING:
            raise
        return _failed(error)
    return _execute(service, turn, grid, told)


def _execute(
    service: Service, turn: _Turn, grid: Grid, told: Callable[[Finished], None]
) -> dict[str, Any]:
    """Execute the run of a job; a failure is its result, unless a new start may mend it."""
    try:
        finished = service.run(turn, grid)
        told(finished)
        return {"run": finished.folder.name, "folder": str(finished.folder.path)}
    except LeptonError as error:
        if error.code in PASSING:
            raise
        return _failed(error)


def _failed(error: LeptonError) -> dict[str, Any]:
    return {"error": {"exit_code": error.exit_code, "problems": list(map(asdict, error.problems))}}


def _tell(loaded: Loaded[ServerConf], error: LeptonError) -> None:
    for problem in error.problems:
        _log.error("%s [%s]", loaded.located(problem), problem.code)


class Service:
    """What a coordinator has open.

    Args:
        conf: Its conf.
        listeners: Called with each event of a run.

    Raises:
        LeptonError: Keys, roster, certificate or address are wrong.
    """

    def __init__(self, conf: ServerConf, listeners: tuple[Listener, ...]) -> None:
        self._conf = conf
        self.monitor = Monitor(self._online, lambda: list(self._roster.keys))
        self._listeners: tuple[Listener, ...] = (*listeners, self.monitor)
        self._key: PrivateKey = load_private_key(Path(conf.signing_key))
        self._state = Path(conf.state)
        self.jobs = Jobs(self._state)
        self.ongoing = Ongoing(self._state)
        self._roster = RosterInUse(Path(conf.roster), self._key)
        self._certificate = CertificateInUse(
            Path(conf.tls.certificate),
            Path(conf.tls.key),
            Path(conf.tls.ca),
            self.monitor.certificate_ends,
        )
        self._link: SuperLink | None = None
        self._watcher = Watcher(
            lambda: self._certificate.look(self._opened().show),
            lambda: self._roster.look(self._opened()),
        )

    def open(self) -> None:
        """Start to listen."""
        conf = self._conf
        if conf.monitor:
            self.monitor.listen(address_of(conf.monitor))
        self._link = SuperLink(
            address_of(conf.listen),
            Path(conf.tls.certificate),
            Path(conf.tls.key),
            self._state / "flower.sqlite",
        )
        self._link.start(self._roster.keys)
        self._watcher.start()
        _log.info("listening on %s", conf.listen)

    def close(self) -> None:
        """Listen no more."""
        self._watcher.stop()
        self.monitor.close()
        if self._link is not None:
            self._link.stop()

    def channel(self) -> Any:
        """Return the context in which sites can be reached: a Flower run's Grid."""
        return self._opened().grid()

    def run(self, turn: _Turn, grid: Grid) -> Finished:
        """Execute a run, or go on with one.

        Raises:
            LeptonError: It could not begin, or could not go on.
        """
        conf, folder = turn.loaded.conf, turn.folder
        summary = folder.read_summary() if folder else None
        if folder and summary:  # it was killed between its last two writes
            self._end(turn)
            return Finished(folder, summary)
        strategy = build_strategy(conf.strategy)
        kit = build_kit(conf.task, conf.seed)
        line, members = self._line(grid)
        # One that goes on has the sites it began with: who came since then takes part in the next.
        begun = left(folder) if folder else None
        of_run = sorted(begun.sites if begun else members.nodes)
        names = [name for name in of_run if name in members.nodes]
        if len(names) < conf.rounds.quorum:
            raise Refused(
                Problem("LF4216", f"the roster has {len(names)} sites, the quorum is "
                        f"{conf.rounds.quorum}", where=self._conf.roster, key="rounds.quorum",
                        remedy="enrol the sites: lepton-fed keys enrol NAME.enrol.json")
            )  # fmt: skip
        cohort = conf.rounds.cohort_size(len(of_run))
        agreement = Agreement(
            folder.name if folder else "run", conf.task, conf.strategy, conf.rounds.count,
            conf.seed, conf.privacy, cohort,
            noise_to_agree_on(conf.privacy, conf.rounds.count),
        )  # fmt: skip
        agreement = with_client_noise(agreement, kit.layout.size)
        plan_aggregation(agreement, strategy, kit.layout, kit.plan, len(of_run))
        if folder is None:
            text = turn.loaded.resolved_yaml()
            folder = RunFolder.create(Path(conf.runs), conf.task.name, text)
            agreement = replace(agreement, run=folder.name)
        known = OngoingRun(str(folder.path.absolute()), turn.job, run_digest_of_conf(conf))
        self.ongoing.begin(known)
        current = [members]
        secure = conf.privacy.secure_aggregation
        least = max(conf.rounds.quorum, secure.least_sites() if secure.enabled else 1)
        with recorded(EventLog(folder.events, self._listeners)) as log:
            sites = Federation(
                line,
                agreement,
                members.content,
                names,
                least,
                conf.gather_s,
                log,
                of_run=of_run,
            )

            def renew(now: Members, change: RosterChange) -> None:
                current[0] = now
                line.renew(now.nodes, now.seals)
                sites.renew(change)

            def rounds(coordinator: Coordinator, standing: Standing) -> Outcome:
                with self._roster.followed(members, renew):
                    sites.gather(_awaited(begun, standing))
                    return coordinator.run(sites, standing)

            _, summary = execute(
                conf,
                strategy,
                kit,
                agreement,
                of_run,
                folder,
                log,
                rounds,
                keys=lambda: current[0].seals.sites,
                one_kind_of_device=False,
                pace=Pace(conf.patience),
            )
        self._end(turn)
        return Finished(folder, summary)

    def _end(self, turn: _Turn) -> None:
        """Write down that a run is finished; that of a job is when its giver is told."""
        if not turn.job:
            self.ongoing.end()

    def push(self, folder: Path, grid: Grid) -> dict[str, Any]:
        """Hand a bundle to every site of the roster that is online.

        Returns:
            Per site, what came of it.

        Raises:
            LeptonError: The bundle is not whole, or not signed by this coordinator.
        """
        bundle = verify_bundle(folder, self._key.public_key())
        line, members = self._line(grid)
        online = set(line.sites())
        deadline = Deadline(1.0, len(members.nodes), _PUSH_S)
        with self._roster.followed(members, lambda now, _: line.renew(now.nodes, now.seals)):
            outcomes = push_bundle(bundle, sorted(online), lambda steps: line.push(steps, deadline))
        found: dict[str, Any] = {name: asdict(outcome) for name, outcome in outcomes.items()}
        for name in sorted(set(members.nodes) - online):
            found[name] = {"absent": True}
        return {"version": bundle.manifest.version, "task": bundle.manifest.task, "sites": found}

    def _line(self, grid: Grid) -> tuple[GridTransport, Members]:
        """Return what reaches the sites of the roster as it is now."""
        members = self._roster.take(self._opened())
        return GridTransport(grid, members.nodes, seals=members.seals), members

    def _online(self) -> list[str]:
        return self._opened().online(self._roster.keys)

    def _opened(self) -> SuperLink:
        if self._link is None:
            raise RuntimeError("open() comes first")
        return self._link


def _awaited(begun: Left | None, standing: Standing) -> Collection[str]:
    """Return whom a run waits for before it draws the next cohort; nobody named stands for all.

    One that goes on waits for all it had, as if nothing had happened. Before the end of the first
    round that is everybody: a new run would have waited for them too.
    """
    if begun is None or not standing.round_number:
        return ()
    return begun.agreed | set(standing.record.sites)


def address_of(address: str) -> tuple[str, int]:
    """Return host and port of ``host:port`` or ``[host]:port``."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
