"""The round loop: select, ask, admit, add, step, checkpoint.

Replies are taken one at a time and added to a running sum in the integer ring; no list of models is
ever held, and the result does not depend on who answered first. A bad reply is refused and named. A
round with fewer usable updates than the quorum leaves the model as it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lepton_fed.config.agreement import Agreement
from lepton_fed.config.schema import Rounds
from lepton_fed.core.exchange import MODEL, Ask, PhaseAsk, PhaseReply, Reply
from lepton_fed.core.layout import Layout, Vector, vector_digest
from lepton_fed.core.metrics import MetricsPlan
from lepton_fed.core.pace import Deadline, Pace
from lepton_fed.core.run_digest import RunDigest
from lepton_fed.errors import Problem, RunError, UpdateRefused
from lepton_fed.privacy.client import client_noise, noise_of_round
from lepton_fed.runs.events import EventLog
from lepton_fed.runs.folder import ALL_SITES, RunFolder
from lepton_fed.server.admission import admit_claims
from lepton_fed.server.groups import GroupSum
from lepton_fed.server.intake import SECOND_REPLY, Evaluation, Intake, MaskedIntake
from lepton_fed.server.laps import Laps
from lepton_fed.server.masked import MaskedRounds
from lepton_fed.server.select import select_cohort
from lepton_fed.server.standing import Record, SiteRecord, Standing
from lepton_fed.strategies.base import ServerState, Strategy

__all__ = ["Coordinator", "Late", "Outcome", "Transport"]


_NOT_ASKED = Problem("LF4407", "it was not asked")
_NO_REPLY = "LF5306"


class Late(Protocol):
    """A reply that came after its deadline."""

    @property
    def site(self) -> str:
        """Return the name of the site."""

    @property
    def round_number(self) -> int:
        """Return the round that it was asked in."""


class Transport(Protocol):
    """Carries asks to sites and their replies back."""

    def sites(self) -> Sequence[str]:
        """Return the names of the sites that can be asked now."""

    def exchange(
        self, asks: Mapping[str, Ask], deadline: Deadline | None = None
    ) -> Iterator[Reply]:
        """Ask sites and yield their replies as they come, each site's at most once.

        Args:
            asks: What is asked of each site, by name.
            deadline: Tells when a site that has not answered is given up; None waits.
        """

    def phase(
        self,
        asks: Mapping[str, PhaseAsk],
        deadline: Deadline | None = None,
        answer_bytes: int = 0,
    ) -> Iterator[PhaseReply]:
        """Ask sites for a phase of secure aggregation, as :meth:`exchange` asks."""

    def take_late(self) -> Sequence[Late]:
        """Return which replies came too late since the last time; they were dropped."""


@dataclass(frozen=True)
class Outcome:
    """A finished run.

    Args:
        model: The final model, ``[layout.size]`` float32.
        digest: Run digest.
        metrics: Metrics of the final model over all sites.
        error_bounds: Error bound of those that are not exact.
        record: What is known of the sites, and how long it took.
    """

    model: Vector
    digest: str
    metrics: Mapping[str, float]
    error_bounds: Mapping[str, float]
    record: Record


class Coordinator:
    """Runs the rounds of one run.

    Args:
        agreement: What the sites agreed to.
        rounds: Length of the run and choice of sites.
        layout: The model's layout.
        plan: What is counted in an evaluation.
        strategy: The strategy; only its server half is used.
        folder: The run's folder.
        log: Its event log.
        pace: Sets the deadline of each round; None waits for every site.
        masked: Has the sums made by secure aggregation; None where updates are sent as they are.
        clock: Tells seconds that never go back.
    """

    def __init__(
        self,
        agreement: Agreement,
        rounds: Rounds,
        layout: Layout,
        plan: MetricsPlan,
        strategy: Strategy,
        *,
        folder: RunFolder,
        log: EventLog,
        pace: Pace | None = None,
        masked: MaskedRounds | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pace = pace
        self._masked = masked
        self._clock = clock
        self._agreement = agreement
        self._client = client_noise(agreement, layout.size)
        self._task = agreement.task
        self._layout = layout
        self._plan = plan
        self._strategy = strategy
        self._rounds = rounds
        self._seed = agreement.seed
        self._folder = folder
        self._log = log
        self._record = Record()
        self._laps = Laps(clock)

    def start(self, initial: Vector) -> Standing:
        """Return where a new run stands.

        Args:
            initial: The model before the first round, ``[layout.size]`` float32.
        """
        digest = RunDigest(self._task.digest, self._seed)
        return Standing(0, initial.copy(), self._strategy.server.init(initial), digest.value)

    def standing(self) -> Standing | None:
        """Return where the run's newest checkpoint stands; None without one.

        Raises:
            RunError: LF5216, there are checkpoints, and none can be gone on from.
        """
        layout = self._layout
        return Standing.load(self._folder, self._task.digest, layout.digest, layout.size)

    def run(self, transport: Transport, standing: Standing) -> Outcome:
        """Run the rounds that are left and a last evaluation.

        Args:
            transport: Reaches the sites.
            standing: Where the run stands: :meth:`start`, or what a checkpoint holds.

        Raises:
            RunError: No site can be reached, no round reached the quorum, or the strategy made
                something else than a model.
            TaskError: The ring has no room for the cohort at the task's bounds.
        """
        if self._masked is not None:
            self._masked.tell(evaluate=self._rounds.evaluate)
        begun = self._clock() - standing.record.seconds
        self._record = record = standing.record
        record.clip = self._clip()
        self._learn_pace()
        names = self._names(transport)
        if not names:
            raise RunError(Problem("LF5001", "no site can be reached", remedy="start the sites"))
        model, state = standing.model, standing.state
        digest = RunDigest(self._task.digest, self._seed, standing.digest)
        first = standing.round_number + 1
        for number in range(first, self._rounds.count + 1):
            self._laps.start()
            names = self._names(transport) if number > first else names
            size = self._rounds.cohort_size(len(names))
            cohort = select_cohort(names, size, self._seed, number) if names else ()
            self._laps.done("select")
            self._log.emit(
                "round.started",
                round=number,
                rounds=self._rounds.count,
                cohort=list(cohort),
                absent=sorted(record.sites.keys() - set(names)),
            )
            contributors, state, model = self._round(transport, number, cohort, state, model)
            self._laps.done("aggregate")
            record.used += bool(contributors)
            record.contributors = list(contributors)
            record.seconds = self._clock() - begun
            digest.add_round(number, contributors, vector_digest(self._layout, model))
            standing = Standing(number, model, state, digest.value, record)
            self._log.sync()  # a checkpoint without the log that leads to it is refused
            # On disk before it is told: a kill in between tells it again, never takes it back.
            standing.save(self._folder, self._task.digest, self._layout.digest)
            if self._masked is not None:
                self._masked.forget()
            self._laps.done("checkpoint")
            self.tell_closed(standing)
        if not record.used:
            raise RunError(
                Problem("LF5002", f"none of {self._rounds.count} rounds reached the quorum of "
                        f"{self._rounds.quorum} usable updates", where=str(self._folder.events),
                        key="rounds.quorum", remedy="the event log says why replies were refused")
            )  # fmt: skip
        metrics, bounds = self._last_evaluation(transport, self._names(transport), state, model)
        record.seconds = self._clock() - begun
        return Outcome(model, digest.value, metrics, bounds, record)

    def tell_closed(self, standing: Standing) -> None:
        """Write down that a round is over."""
        self._log.emit(
            "round.closed",
            round=standing.round_number,
            rounds=self._rounds.count,
            sites=standing.record.contributors,
            model=vector_digest(self._layout, standing.model),
            digest=standing.digest,
            seconds=self._laps.seconds(),
            sent_bytes=standing.record.sent_bytes,
            clip=standing.record.clip or None,
        )

    def _names(self, transport: Transport) -> list[str]:
        """Return the names of the sites that can be asked now; each has a record from now on."""
        names = sorted(transport.sites())
        for name in names:
            self._record.sites.setdefault(name, SiteRecord())
        return names

    def _learn_pace(self) -> None:
        for name, site in self._record.sites.items():
            if self._pace is not None and site.took_s is not None:
                self._pace.note(name, site.took_s)

    def _round(
        self,
        transport: Transport,
        number: int,
        cohort: Sequence[str],
        state: ServerState,
        model: Vector,
    ) -> tuple[tuple[str, ...], ServerState, Vector]:
        """Run one round; return who contributed, and the state and model after it."""
        ask = self._ask(number, state, model, train=True)
        client = noise_of_round(self._client, ask.clip, train=True)
        self._record.sent_bytes = len(cohort) * _bytes_of(ask.vectors)
        with ExitStack() as stack:
            intake: Intake | MaskedIntake
            if self._masked is None:
                intake = Intake(
                    self._strategy, self._layout, self._task, number, max(1, len(cohort)),
                    len(self._record.sites), self._folder.spill, client,
                )  # fmt: skip
                stack.callback(intake.close)
                self._take_updates(transport, cohort, ask, intake)
            else:
                sums = self._sums(self._masked, transport, cohort, ask)
                self._report_sum(sums, ask)
                intake = MaskedIntake(
                    self._strategy, self._layout, self._masked.encoding, number,
                    len(self._record.sites), self._folder.spill, sums, client,
                )  # fmt: skip
                stack.callback(intake.close)
            self._laps.done("exchange")
            if len(intake.contributors) < self._rounds.quorum:
                self._log.emit(
                    "round.below_quorum",
                    round=number,
                    usable=len(intake.contributors),
                    quorum=self._rounds.quorum,
                )
                return (), state, model
            received = intake.aggregate()
            if ask.clip and intake.clip:
                # The sum is read, whatever becomes of the model: the norm follows it.
                self._record.clip = intake.clip
            after, moved = self._strategy.server.step(state, model, received)
            if moved.shape != model.shape or moved.dtype != model.dtype:
                raise RunError(
                    Problem("LF5003", f"strategy {self._strategy.name!r} made a model of "
                            f"{moved.dtype} {moved.shape}, not {model.dtype} {model.shape}",
                            remedy="its server rule must return the model as it received it")
                )  # fmt: skip
            if not np.isfinite(moved).all():
                self._log.emit("round.model_not_finite", round=number)
                return (), state, model
            for site in intake.contributors:
                self._record.sites[site].rounds += 1
            return intake.contributors, after, moved

    def _take_updates(
        self, transport: Transport, cohort: Sequence[str], ask: Ask, intake: Intake
    ) -> None:
        """Take in the updates of a cohort as they come, and what it evaluated."""
        evaluation = Evaluation(self._plan)
        for reply in self._exchange(transport, cohort, ask):
            self._take(reply, cohort, intake, evaluation, ask.round_number)
        # What sites evaluated is the model they received: that of the round before.
        if evaluation.sites:
            self._report(evaluation.total(), evaluation.sites, ask.round_number - 1)

    def _sums(
        self, masked: MaskedRounds, transport: Transport, cohort: Sequence[str], ask: Ask
    ) -> list[GroupSum]:
        """Have the sums of a cohort made, and write down what it evaluated."""
        if not cohort:
            return []
        deadline = None
        if self._pace is not None:
            deadline = self._pace.deadline(cohort, _bytes_of(ask.vectors))
            ask = replace(ask, limit_s=deadline.limit_s)
        started = self._clock()

        def answered(site: str) -> None:
            took_s = self._clock() - started
            if self._pace is not None and ask.train:
                self._pace.note(site, took_s)
                self._record.sites.setdefault(site, SiteRecord()).took_s = took_s

        sums = masked.sums(transport, ask, cohort, deadline, answered)
        self._tell_late(transport, ask)
        for group in sums:
            for site in group.names:
                record = self._record.sites.setdefault(site, SiteRecord())
                record.update_bytes = max(record.update_bytes, group.sent_bytes)
                self._log.emit(
                    "reply.accepted",
                    round=ask.round_number,
                    site=site,
                    bytes=group.sent_bytes,
                    norm=None,
                    epsilon=None,
                )
        return sums

    def _report_sum(self, sums: Sequence[GroupSum], ask: Ask) -> npt.NDArray[np.float64] | None:
        """Write down what the sum of all counts says, and return it; of one site nothing is known.

        None stands for no counts, or none that an evaluation can give.
        """
        if not (ask.evaluate and sums):
            return None
        names = [name for group in sums for name in group.names]
        total: npt.NDArray[np.float64] = np.sum([group.opened.counts for group in sums], axis=0)
        complaint = self._plan.complaint(total)
        if complaint:
            self._log.emit(
                "secagg.counts_refused", round=ask.round_number, code="LF4408", why=complaint
            )
            return None
        if not total[0] > 0:
            return None
        after = ask.round_number - 1 if ask.train else ask.round_number
        self._report(total, {}, after, among=names)
        return total

    def _exchange(self, transport: Transport, cohort: Sequence[str], ask: Ask) -> Iterator[Reply]:
        """Ask a cohort within the round's deadline; learn what each site takes."""
        if not cohort:
            return
        deadline = None
        if self._pace is not None:
            deadline = self._pace.deadline(cohort, _bytes_of(ask.vectors))
            ask = replace(ask, limit_s=deadline.limit_s)
        started = self._clock()
        for reply in transport.exchange(dict.fromkeys(cohort, ask), deadline):
            late = reply.refusal is not None and reply.refusal.code == _NO_REPLY
            if self._pace is not None and ask.train and (late or reply.refusal is None):
                took_s = self._clock() - started
                self._pace.note(reply.site, took_s)
                if reply.site in cohort:
                    self._record.sites[reply.site].took_s = took_s
            yield reply
        self._tell_late(transport, ask)

    def _tell_late(self, transport: Transport, ask: Ask) -> None:
        for late_reply in transport.take_late():
            self._log.emit(
                "reply.late",
                round=ask.round_number,
                site=late_reply.site,
                asked_in_round=late_reply.round_number,
            )

    def _take(
        self,
        reply: Reply,
        cohort: Sequence[str],
        intake: Intake,
        evaluation: Evaluation,
        number: int,
    ) -> None:
        problem = None if reply.site in cohort else _NOT_ASKED
        norm = 0.0
        if problem is None:
            try:
                self._note_claims(reply)
                problem = reply.refusal
                norm = 0.0 if problem else intake.add(reply)
            except UpdateRefused as error:
                problem = error.problems[0]
        if problem is not None:
            self._refuse(reply.site, number, problem)
            return
        record = self._record.sites[reply.site]
        record.update_bytes = max(record.update_bytes, _update_bytes(reply))
        self._log.emit(
            "reply.accepted",
            round=number,
            site=reply.site,
            bytes=reply.sent_bytes,
            # Client-level DP covers the noised sum, and no norm of one site.
            norm=None if self._client else round(norm, 6),
            epsilon=reply.epsilon,
        )
        self._count(reply, evaluation, number)

    def _note_claims(self, reply: Reply) -> None:
        """Write down what a site says it spent, also when its update is not used: it left."""
        admit_claims(reply, self._agreement.privacy.record)
        record = self._record.sites[reply.site]
        if reply.epsilon is not None:
            record.epsilon = max(reply.epsilon, record.epsilon or 0.0)
        if reply.noise_multiplier is not None:
            record.noise_multiplier = reply.noise_multiplier

    def _refuse(self, site: str, number: int, problem: Problem) -> None:
        self._log.emit(
            "reply.refused", round=number, site=site, code=problem.code, why=problem.what
        )

    def _count(self, reply: Reply, evaluation: Evaluation, number: int) -> None:
        if reply.counts is None:
            return
        complaint = self._plan.complaint(reply.counts)
        record = self._record.sites[reply.site]
        if not complaint and record.held_out not in (None, reply.counts[0]):
            complaint = f"{reply.counts[0]:g} held-out rows, before {record.held_out:g}"
        if complaint:
            self._log.emit(
                "counts.refused", round=number, site=reply.site, code="LF4408", why=complaint
            )
            return
        record.held_out = float(reply.counts[0])
        evaluation.add(reply.site, reply.counts)

    def _report(
        self,
        total: npt.NDArray[np.float64],
        sites: Mapping[str, Mapping[str, float]],
        after_round: int,
        among: Sequence[str] = (),
    ) -> None:
        """Write down what an evaluation says of the model after a round.

        Args:
            total: Counts of all sites together.
            sites: Metrics of each site, where they are known.
            after_round: The round.
            among: Names of the sites, where their metrics are not known.
        """
        overall = self._plan.values(total)
        for site, metrics in sites.items():
            self._record.sites[site].metrics = dict(metrics)
        self._folder.append_metrics(after_round, {ALL_SITES: overall, **sites})
        self._log.emit("model.evaluated", round=after_round, metrics=overall,
                       sites=sorted(sites or among))  # fmt: skip

    def _last_evaluation(
        self, transport: Transport, names: Sequence[str], state: ServerState, model: Vector
    ) -> tuple[Mapping[str, float], Mapping[str, float]]:
        """Ask every site to evaluate the final model."""
        if not self._rounds.evaluate:
            return {}, {}
        number = self._rounds.count
        ask = self._ask(number, state, model, train=False)
        if self._masked is not None:
            most = min(len(names), self._agreement.cohort)
            cohort = select_cohort(names, most, self._seed, number + 1) if names else ()
            # Its files stay until the run's summary is there: sites open a sum once.
            total = self._report_sum(self._sums(self._masked, transport, cohort, ask), ask)
        else:
            total = self._evaluate(transport, names, ask)
        if total is None:
            return {}, {}
        return self._plan.values(total), self._plan.error_bounds(total)

    def _evaluate(
        self, transport: Transport, names: Sequence[str], ask: Ask
    ) -> npt.NDArray[np.float64] | None:
        """Ask sites to evaluate a model and return the counts of all; None without any."""
        evaluation, number = Evaluation(self._plan), ask.round_number
        for reply in self._exchange(transport, names, ask):
            problem = None if reply.site in names else _NOT_ASKED
            if reply.site in evaluation.sites:
                problem = SECOND_REPLY
            if problem is None:
                try:
                    self._note_claims(reply)
                    problem = reply.refusal
                except UpdateRefused as error:
                    problem = error.problems[0]
            if problem is not None:
                self._refuse(reply.site, number, problem)
            else:
                self._count(reply, evaluation, number)
        if not evaluation.sites:
            return None
        total = evaluation.total()
        self._report(total, evaluation.sites, number)
        return total

    def _ask(self, number: int, state: ServerState, model: Vector, *, train: bool) -> Ask:
        return Ask(
            agreement=self._agreement.digest,
            layout=self._layout.digest,
            round_number=number,
            train=train,
            evaluate=self._rounds.evaluate,
            vectors={MODEL: model, **(self._strategy.server.sends(state) if train else {})},
            clip=self._clip() if train else 0.0,
        )

    def _clip(self) -> float:
        """Return the norm that sites are told; 0 where it stays as it was agreed."""
        client = self._client
        if client is None or client.quantile is None:
            return 0.0
        return self._record.clip or client.clip


def _update_bytes(reply: Reply) -> int:
    return _bytes_of(reply.update.vectors) if reply.update else 0


def _bytes_of(vectors: Mapping[str, Vector]) -> int:
    return sum(vector.nbytes for vector in vectors.values())
