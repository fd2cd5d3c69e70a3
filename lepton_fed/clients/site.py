"""A site: its rows, its rules, and its answer to an ask.

Everything that leaves goes through :meth:`Site.answer`. It checks what is asked against what the
site agreed to, charges the ledger before it trains, and turns every failure into a code: an
exception's text may hold values of rows, so it stays in the site's own log.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from lepton_fed.clients.answers import Answers, Kept
from lepton_fed.clients.correlated import CorrelatedTraining
from lepton_fed.clients.one_step import OneStep
from lepton_fed.config.agreement import Agreement
from lepton_fed.core.exchange import MODEL, Ask, Reply, Update, ask_digest
from lepton_fed.core.layout import Vector
from lepton_fed.core.norms import clipped
from lepton_fed.data.dataset import Dataset
from lepton_fed.errors import (
    BudgetExceeded,
    DataError,
    LeptonError,
    Problem,
    Refused,
    RunError,
)
from lepton_fed.models.build import (
    frozen_buffers,
    local_tensors,
    read_vector,
    write_local,
    write_vector,
)
from lepton_fed.privacy.client import client_noise, noise_of_round
from lepton_fed.privacy.dp.accounting import Event, epsilon_of
from lepton_fed.privacy.dp.entropy import Entropy
from lepton_fed.privacy.dp.planning import NoisePlan
from lepton_fed.privacy.dp.shared import shared_noise
from lepton_fed.privacy.ledger.book import RunName
from lepton_fed.privacy.ledger.ledger import Ledger
from lepton_fed.privacy.masked_plan import require_one_vector
from lepton_fed.strategies.base import DELTA, SiteRule, SiteState
from lepton_fed.training.evaluation import evaluate
from lepton_fed.training.kit import TaskKit
from lepton_fed.training.local import Moment, PrivateTraining, train
from lepton_fed.training.noise import (
    check_trainable,
    plan_noise,
    require_memory,
    require_plain_site,
)

__all__ = ["EVALUATION", "Site"]

EVALUATION = "evaluation"
"""Word of ``privacy.outside_epsilon``: counts on held-out rows may leave while DP is on."""

Floats = npt.NDArray[np.floating]

_UNEXPECTED = "LF5301"
_MOST_VECTORS = 8  # the model, and what a strategy sends beside it

_log = logging.getLogger("lepton_fed.site")


class Site:
    """One data owner's side of a run.

    Args:
        name: Name of the site.
        kit: The task's kit.
        rule: The strategy's site half.
        rows: Rows to train on, as read.
        held_out: Rows to evaluate on, as read; may be empty.
        agreement: What the site agreed to, for the kit's task.
        devices: One device, or several GPUs.
        folder: Folder of the site's own records, when it has no other ledger.
        ledger: The ledger of the data set over its life; when None, one of this run in ``folder``.
        coordinator: Who runs it; what its runs before have reserved and not used is free.
        answers: Keeps what was answered; None where a site lives no longer than its run.
        noise_bytes: The most that past noise may take; None for all of the machine's memory.

    Raises:
        DataError: There are no rows to train on.
        BudgetExceeded: The whole run would cost more than is left.
        TaskError: The model or the target epsilon does not go with record-level DP, or the strategy
            does something at the site that does not go with shared noise; LF3352, past noise does
            not fit into memory.
        Refused: LF4623, past noise takes more than ``noise_bytes``. The ledger is not whole;
            LF4506, nothing says which rounds were answered; LF4630, client-level DP is not sound.
    """

    def __init__(
        self,
        name: str,
        kit: TaskKit,
        rule: SiteRule,
        rows: Dataset,
        held_out: Dataset,
        agreement: Agreement,
        *,
        devices: list[torch.device],
        folder: Path,
        ledger: Ledger | None = None,
        coordinator: str = "",
        answers: Answers | None = None,
        noise_bytes: int | None = None,
    ) -> None:
        if len(rows) == 0:
            raise DataError(Problem("LF2101", "there are no rows to train on", where=name))
        self.name = name
        self._kit = kit
        self._rule = rule
        self._agreement = agreement
        self._devices = devices
        self._rows = kit.prepare(rows, devices[0])
        self._held_out = kit.prepare(held_out, devices[0])
        self._state: SiteState = {}
        self._local = kit.initial_local
        self._ledger: Ledger | None = None
        self._entropy: Entropy | None = None
        self._noise: NoisePlan | None = None
        self._digest = agreement.digest
        self._run = RunName(agreement.run, agreement.digest, coordinator)
        self._lasting = ledger is not None
        self._spent = 0.0
        self._newest_round = 0
        self._newest_ask = ""
        self._answers = answers
        self._correlated: CorrelatedTraining | None = None
        kept = self._remember()
        record = agreement.privacy.record
        if agreement.task != kit.task:
            raise ValueError("the agreement is for another task than the kit")
        self._client = client_noise(agreement, kit.layout.size)
        require_one_vector(agreement, rule.vectors)
        if record.enabled:
            check_trainable(kit, record, len(devices))
            require_plain_site(agreement, rule)
            shared = shared_noise(agreement, kit.layout.size)
            self._noise = plan_noise(kit, record, len(rows), agreement.rounds, shared)
            _require_bytes(require_memory([self._noise], kit.noised_size), noise_bytes)
            self._entropy = (
                Entropy.from_system()
                if record.randomness == "system"
                # In simulations alone: no policy lets it in, no coordinator's conf asks for it.
                else Entropy.insecurely_seeded(agreement.seed, name)
            )
            self._ledger = ledger or Ledger(
                folder / "ledger.sqlite",
                dataset="rows",
                content=rows.digest,
                epsilon=record.epsilon,
                delta=record.delta,
            )
            self._ledger.reserve(self._noise.round_event, self._run, agreement.rounds)
            if record.is_correlated:
                self._correlated = CorrelatedTraining(
                    self._noise,
                    kit.noised_size,
                    record.clip,
                    rows.digest,
                    self._entropy,
                    self._ledger,
                    self._run,
                )
                self._correlated.restore(kept, self._newest_round)

    @property
    def noise_multiplier(self) -> float | None:
        """Return the noise of record-level DP over the clipping norm; None without."""
        return self._noise.noise_multiplier if self._noise else None

    @property
    def epsilon(self) -> float | None:
        """Return the epsilon spent so far in this run; None without record-level DP.

        What other runs have spent is nobody's business but the site's.
        """
        if self._ledger is None:
            return None
        charged = self._ledger.of_run(self._run.agreement)
        now = epsilon_of(charged, self._agreement.privacy.record.delta)
        self._spent = max(self._spent, now)  # a ledger that broke meanwhile does not say
        return self._spent

    @property
    def budget_left(self) -> float | None:
        """Return the epsilon of the budget that is neither spent nor reserved; None without DP."""
        return self._ledger.left if self._ledger else None

    def close(self) -> None:
        """Write nothing into the ledger any more."""
        if self._ledger:
            self._ledger.close()

    def answer(self, ask: Ask) -> Reply:
        """Do what is asked, within what was agreed.

        Args:
            ask: What the coordinator wants.

        Returns:
            An update, counts, both, or a refusal that holds a code and nothing else of the site.
        """
        try:
            return self._answer(ask)
        except LeptonError as error:
            _log.error("site.refused site=%s round=%s %s", self.name, ask.round_number, error)
            return self._refusal(error.code, "refused by the site")
        except Exception:  # noqa: BLE001 - whatever went wrong, only a code may leave
            _log.exception("site.failed site=%s round=%s", self.name, ask.round_number)
            return self._refusal(_UNEXPECTED, "failed at the site")

    def _refusal(self, code: str, what: str) -> Reply:
        return Reply(
            self.name,
            refusal=Problem(code, what),
            epsilon=self.epsilon,  # also what a round cost that then failed
            noise_multiplier=self.noise_multiplier,
        )

    def _answer(self, ask: Ask) -> Reply:
        self._check(ask)
        if self._answers and ask.train and ask.round_number == self._newest_round:
            kept = self._answers.kept()
            if kept is None or kept.ask != self._newest_ask:
                # Trained anew it would be a second, different update, and charged twice.
                raise Refused(
                    Problem("LF4506", f"round {ask.round_number} was answered already, and the "
                            "stored answer is gone or broken", where=f"round {ask.round_number}",
                            remedy="nothing: a later round is answered as ever")
                )  # fmt: skip
            if self._correlated:
                self._correlated.leaves(ask.round_number)
            return replace(kept.reply, site=self.name)
        model = self._kit.model_on(self._devices[0])
        received = ask.vectors[MODEL]
        write_vector(model, self._kit.layout, received)
        write_local(model, self._local)
        counts = None
        if ask.evaluate and self._may_evaluate():
            counts = evaluate(
                model, self._held_out, self._kit.task, self._kit.plan, self._devices[0]
            )
        if not ask.train:
            return self._reply(None, counts)
        private = self._charged(ask.round_number)
        try:
            update, state = self._train(ask, model, received, private)
        except Exception:
            if self._correlated:
                self._correlated.failed(ask.round_number)
            raise
        reply = self._reply(update, counts)
        local = local_tensors(model, self._kit.layout)
        if self._answers:
            self._keep(ask, reply, state, local)
        self._state = state
        self._local = local
        self._newest_round = ask.round_number
        if self._correlated:
            self._correlated.trained(ask.round_number)
            self._correlated.leaves(ask.round_number)
        return reply

    def _keep(
        self,
        ask: Ask,
        reply: Reply,
        state: SiteState,
        local: Mapping[str, npt.NDArray[np.generic]],
    ) -> None:
        """Write the answer, with all that the next round goes on from; or be as before."""
        assert self._answers is not None  # noqa: S101 - as it was called
        digest = ask_digest(ask)
        noise = self._correlated.state() if self._correlated else None
        try:
            self._answers.keep(Kept(digest, ask.round_number, reply, state, local, noise))
        except Exception:
            if self._correlated:
                self._correlated.restore(self._remember(), self._newest_round)
            raise
        self._newest_ask = digest

    def _reply(self, update: Update | None, counts: npt.NDArray[np.float64] | None) -> Reply:
        return Reply(
            self.name,
            update=update,
            counts=counts,
            epsilon=self.epsilon,
            noise_multiplier=self.noise_multiplier,
        )

    def _remember(self) -> Kept | None:
        """Go on from the run's newest answer, and return it, if there is one."""
        if self._answers is None:
            return None
        kept = self._answers.kept()
        answered = self._answers.answered(kept)
        if answered is not None:
            self._newest_round, self._newest_ask = answered.round_number, answered.ask
            if kept is None:
                _log.warning("answer.gone run=%s round=%s", self._agreement.run, self._newest_round)
        if kept is not None:
            self._state = {name: value.view(np.float32) for name, value in kept.state.items()}
            self._local = {**self._local, **kept.local}
        return kept

    def _charged(self, round_number: int) -> PrivateTraining | None:
        """Charge a round, and return how it is to be noised; None without record-level DP."""
        record = self._agreement.privacy.record
        if not (self._ledger and self._entropy and self._noise):
            return None
        event: Event
        sampler, noise = self._noise.sampler, None
        if self._correlated:
            event = self._correlated.event()
            sampler, noise = self._correlated.steps()
        else:
            event = self._noise.round_event
        self._check_run(self._ledger, event, round_number)
        self._ledger.charge(event, self._run, round_number, self._kit.task.digest)
        return PrivateTraining(
            record.clip,
            self._noise.noise_multiplier,
            self._entropy,
            sampler,
            engine=record.engine,
            most_records=record.most_records,
            other_noise=noise,
        )

    def _train(
        self,
        ask: Ask,
        model: torch.nn.Module,
        received: Vector,
        private: PrivateTraining | None,
    ) -> tuple[Update, SiteState]:
        """Return the update, and what the strategy keeps for the next round."""
        kit, record = self._kit, self._agreement.privacy.record
        shared = {entry.name for entry in kit.layout.of_rule("shared")}
        start = {n: p.detach().clone() for n, p in model.named_parameters() if n in shared}
        memory = self._rule.begin(start, ask.vectors, self._state)
        step = OneStep.of(model) if private and record.is_shared else None
        if private and step:
            private = replace(private, other_noise=step)
        trained = train(
            model,
            kit.layout,
            self._rows,
            kit.task,
            self._rule,
            memory,
            Moment(self._agreement.seed, ask.round_number, self._agreement.rounds, self.name),
            devices=self._devices,
            private=private,
            augment=kit.augment,
        )
        self._check_frozen(model)
        if private and step:  # the rule is the plain one then
            exact = step.delta(kit.layout, trained.learning_rate, private.sampler.divisor)
            return self._bounded({DELTA: exact}, ask), {}
        delta = read_vector(model, kit.layout)
        delta -= received
        vectors, state = self._rule.update(memory, delta, trained.steps, trained.learning_rate)
        return self._bounded(vectors, ask), state

    def _check_run(self, ledger: Ledger, event: Event, round_number: int) -> None:
        """Refuse a round that brings the run beyond the epsilon that was agreed to.

        A round may be asked for again, when it failed or the site was restarted, and is charged
        again; the budget of the data set may be larger than what one run may cost.
        """
        record = self._agreement.privacy.record
        if not self._lasting:
            return  # the ledger's own bound is the run's
        after = epsilon_of([*ledger.of_run(self._run.agreement), event], record.delta)
        if not after <= record.epsilon:
            raise BudgetExceeded(
                Problem("LF4508", f"the run would cost epsilon {after:.4g}, {record.epsilon:g} was "
                        "agreed to", where=f"round {round_number}",
                        remedy="rounds that were trained twice are charged twice; end the run here")
            )  # fmt: skip

    def _bounded(self, vectors: Mapping[str, Floats], ask: Ask) -> Update:
        """Return the update with each vector scaled down to the norm that was agreed to."""
        client = noise_of_round(self._client, ask.clip, train=True)
        bound = client.site_bound if client else self._kit.task.aggregation.norm_bound
        bounded: dict[str, Floats] = {}
        norms: dict[str, float] = {}
        for name, vector in vectors.items():
            bounded[name], norms[name] = clipped(vector, bound)
            if not math.isfinite(norms[name]):
                raise RunError(Problem("LF5312", f"vector {name!r} of the update is not finite"))
        return Update(self._kit.layout.digest, bounded, self._weight(), norms)

    def _check_frozen(self, model: torch.nn.Module) -> None:
        """Refuse a model that changed a buffer it shares with everybody, and put it back."""
        now = frozen_buffers(model, self._kit.layout)
        for name, value in self._kit.frozen_buffers.items():
            if now[name].tobytes() != value.tobytes():
                write_local(model, self._kit.frozen_buffers)
                raise RunError(
                    Problem("LF5102", f"training changed buffer {name!r}, which is the same at all "
                            "sites", key="task.model.local",
                            remedy=f"task.model.local: [{name}] keeps it at each site")
                )  # fmt: skip

    def _weight(self) -> float:
        aggregation = self._kit.task.aggregation
        if aggregation.weight == "equal":
            return 1.0
        return float(min(len(self._rows), math.floor(aggregation.weight_bound)))

    def _may_evaluate(self) -> bool:
        privacy = self._agreement.privacy
        return not privacy.is_noised or EVALUATION in privacy.outside_epsilon

    def _is_again(self, ask: Ask) -> bool:
        """Return whether this was asked, and answered, before."""
        return bool(self._newest_ask) and ask_digest(ask) == self._newest_ask

    def _check(self, ask: Ask) -> None:
        """Refuse an ask that is not what was agreed to."""
        kit, agreement = self._kit, self._agreement

        def refuse(code: str, what: str) -> Refused:
            return Refused(Problem(code, what, where=f"round {ask.round_number}"))

        if ask.agreement != self._digest:
            raise refuse("LF4501", "the ask is for another agreement than this site's")
        noise_of_round(self._client, ask.clip, train=ask.train)
        if ask.layout != kit.layout.digest:
            raise refuse("LF4502", "the model's layout is not the one this task gives here")
        if not 1 <= ask.round_number <= agreement.rounds:
            raise refuse("LF4503", f"{agreement.rounds} rounds were agreed to")
        if ask.train and ask.round_number <= self._newest_round and not self._is_again(ask):
            raise refuse("LF4506", f"round {self._newest_round} was trained already")
        if len(ask.vectors) > _MOST_VECTORS:
            raise refuse("LF4505", f"the ask holds {len(ask.vectors)} vectors")
        for name, vector in ask.vectors.items():
            if vector.dtype != np.float32 or vector.shape != (kit.layout.size,):
                raise refuse("LF4505", f"vector {name!r} does not fit the layout")
            if not np.isfinite(vector).all():
                raise RunError(Problem("LF5302", f"vector {name!r} is not finite"))
        if MODEL not in ask.vectors:
            raise refuse("LF4505", "the ask holds no model")


def _require_bytes(needed: int, most: int | None) -> None:
    """Refuse noise that takes more memory and disk than the owner allows, before it is made."""
    if most is not None and needed > most:
        raise Refused(
            Problem("LF4623", f"the noise of the steps before takes {needed:,} bytes of memory and "
                    f"disk, at most {most:,} are allowed at this site", key="policy.noise_bytes",
                    remedy="a smaller privacy.record.band")
        )  # fmt: skip
