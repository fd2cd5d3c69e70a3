"""What a site says to what it is asked: policy first, then training, then the receipt.

It knows neither Flower nor sockets. Everything that leaves goes through here; a refusal carries a
code and a sentence about the policy, never a path, a value of a row, or the text of an exception.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from lepton_fed.clients.bundles import BundleStore
from lepton_fed.clients.masked import MaskedSite
from lepton_fed.clients.own_ledger import signed_head
from lepton_fed.clients.policy import filtered, judge, policy_digest, within_hours
from lepton_fed.clients.receipts import Receipts, receipt_of, receipt_of_phase
from lepton_fed.clients.training_child import TrainingChild
from lepton_fed.clients.vault import FileVault
from lepton_fed.config.agreement import Agreement
from lepton_fed.config.rules import task_problems
from lepton_fed.config.schema import ClientConf
from lepton_fed.core.decode import decode, strict_json
from lepton_fed.core.digests import canonical_json
from lepton_fed.core.exchange import (
    Ask,
    Offer,
    OfferReply,
    PhaseAsk,
    PhaseReply,
    PushReply,
    PushStep,
    Reply,
    legible,
)
from lepton_fed.errors import LeptonError, Problem, Refused
from lepton_fed.identity.pinned import PinnedRoster
from lepton_fed.identity.roster import Roster
from lepton_fed.identity.signature import PrivateKey, PublicKey
from lepton_fed.identity.words import key_words
from lepton_fed.privacy.client import client_noise, noise_of_round
from lepton_fed.privacy.dp.accounting import terms
from lepton_fed.privacy.masked_plan import require_post_quantum
from lepton_fed.runs.files import write_atomic, writing

__all__ = ["Agent"]

_MOST_OFFER = 1024 * 1024
_MOST_AGREED = 16  # a coordinator executes one run after another
_HEX = frozenset("0123456789abcdef")

_log = logging.getLogger("lepton_fed.site")


class Agent:
    """One site's answers.

    Args:
        conf: The site's conf.
        identity: Its identity key; the roster must name the public half.
        node_key: The public half of its node key, one OpenSSH line; the roster must name it.
        coordinator: The pinned key.
        child: Trains.
        now: Tells the local time.

    Raises:
        LeptonError: The roster is malformed or not signed.
    """

    def __init__(
        self,
        conf: ClientConf,
        identity: PrivateKey,
        node_key: str,
        coordinator: PublicKey,
        child: TrainingChild | None = None,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        self._conf = conf
        self._key = identity
        self._identity = identity.public_key().public_bytes_raw().hex()
        self._node_key = node_key
        self._coordinator = coordinator
        self._child = child or TrainingChild(conf)
        self._now = now
        state = Path(conf.state)
        self._pinned()  # what is wrong with it is said before the first contact
        self._receipts = Receipts(state / "receipts")
        self._agreements = state / "agreements"
        self._bundles = BundleStore(state / "bundles", coordinator, conf.policy)
        self._policy_digest = policy_digest(conf.policy, conf.budget)
        self._agreed: dict[str, Agreement] = {}

    def close(self) -> None:
        """End what trains."""
        self._child.close()

    def interrupt(self) -> None:
        """End the training in progress; the next ask is answered as ever."""
        self._child.interrupt()

    def offered(self, offer: Offer) -> OfferReply:
        """Say whether the site takes part in a run."""
        installed = version("lepton-fed")
        try:
            agreement = self._consider(offer)
            left = self._child.budget_left() if "budget" in self._conf.policy.leaves else None
        except LeptonError as error:
            _tell(f"offer of {_run_in(offer.agreement)}", error.problems)
            return OfferReply("", refusal=_public(error.problems), version=installed)
        told = "" if left is None else f" budget_left={left:.4g}"
        _log.info("run.agreed run=%s task=%s%s", agreement.run, agreement.task.digest[:12], told)
        return OfferReply("", agreement.digest, version=installed, budget_left=left)

    def asked(self, ask: Ask) -> Reply:
        """Train or evaluate, write the receipt, and say what came of it."""
        try:
            reply = self._answer(ask)
        except LeptonError as error:
            _tell(self._about(ask), error.problems)
            reply = Reply(self._conf.name, refusal=_public(error.problems))
        reply = filtered(self._conf.policy, reply)
        try:
            recorded = self._receive(reply, ask)
        except LeptonError as error:  # without a receipt nothing leaves
            _tell(self._about(ask), error.problems)
            return Reply(self._conf.name, refusal=_public(error.problems))
        if not recorded and reply.refusal is not None:
            return Reply(self._conf.name, refusal=_bare(reply.refusal))
        return reply

    def phased(self, asked: PhaseAsk) -> PhaseReply:
        """Answer a phase of secure aggregation, with a receipt of what leaves."""
        try:
            reply = self._take(asked)
            if reply.refusal is not None:
                _tell(self._about(asked.ask), [reply.refusal])
                reply = replace(reply, refusal=_public([reply.refusal]))
        except LeptonError as error:
            _tell(self._about(asked.ask), error.problems)
            reply = PhaseReply(self._conf.name, refusal=_public(error.problems))
        try:
            recorded = self._receive_phase(reply, asked)
        except LeptonError as error:  # without a receipt nothing leaves
            _tell(self._about(asked.ask), error.problems)
            return PhaseReply(self._conf.name, refusal=_public(error.problems))
        if not recorded and reply.refusal is not None:
            return PhaseReply(self._conf.name, refusal=_bare(reply.refusal))
        return reply

    def pushed(self, step: PushStep) -> PushReply:
        """Take one step of a push."""
        return self._bundles.step(step)

    def _consider(self, offer: Offer) -> Agreement:
        if len(offer.agreement) > _MOST_OFFER or len(offer.roster) > _MOST_OFFER:
            raise Refused(Problem("LF4511", "the offer is too large"))
        pinned = self._pinned()
        for line in pinned.consider(offer.roster):
            _log.warning("roster.changed %s", line)
        self._check_member(pinned.current)
        agreement = _decoded(offer.agreement)
        self._allow(agreement)
        self._child.begin(agreement)
        write_atomic(self._kept(agreement.digest), canonical_json(agreement))
        self._agreed.pop(agreement.digest, None)  # the newest is last, also when it is known
        self._agreed[agreement.digest] = agreement
        self._forget_old()
        return agreement

    def _forget_old(self) -> None:
        """Forget agreements of runs long over; one that is gone on with is offered anew."""
        for digest in list(self._agreed)[:-_MOST_AGREED]:
            del self._agreed[digest]
        with writing(self._agreements):
            kept = sorted(self._agreements.glob("*.json"), key=lambda p: p.stat().st_mtime_ns)
            for old in kept[:-_MOST_AGREED]:
                old.unlink(missing_ok=True)

    def _pinned(self) -> PinnedRoster:
        """Return the roster as it is now: a person may have accepted another one meanwhile."""
        conf = self._conf
        follow = conf.policy.roster == "follow"
        return PinnedRoster(Path(conf.roster), Path(conf.state), self._coordinator, follow)

    def _check_member(self, roster: Roster) -> None:
        member = roster.member(self._conf.name)
        if member is None or (member.identity, member.node_key) != (self._identity, self._node_key):
            raise Refused(
                Problem("LF4512", f"the roster does not name {self._conf.name} with this site's "
                        "keys", remedy="enrol: send the coordinator NAME.enrol.json")
            )  # fmt: skip

    def _allow(self, agreement: Agreement) -> None:
        """Hold a run against the policy, and its task against what is installed here."""
        problems = judge(self._conf.policy, self._conf.budget, agreement)
        problems = problems or list(task_problems(agreement.task))
        if problems:
            raise Refused(problems)
        require_post_quantum(agreement)

    def _take(self, asked: PhaseAsk) -> PhaseReply:
        agreement, conf = self._agreement(asked.ask.agreement), self._conf
        if not agreement.privacy.secure_aggregation.enabled:
            raise Refused(Problem("LF4518", "this run was agreed to without secure aggregation"))
        roster = self._pinned().current
        self._check_member(roster)
        vault = FileVault(Path(conf.state) / "masked", agreement.digest)
        vault.prune(self._now().timestamp())
        site = MaskedSite(
            conf.name,
            self._key,
            {member.name: member.key for member in roster.sites},
            agreement,
            self._child.begin(agreement),
            conf.policy.privacy.secure_aggregation,
            vault,
            lambda ask: filtered(conf.policy, self._train(agreement, ask)),
        )
        return site.take(asked)

    def _answer(self, ask: Ask) -> Reply:
        agreement = self._agreement(ask.agreement)
        if agreement.privacy.secure_aggregation.enabled:
            raise Refused(Problem("LF4518", "in this run updates leave masked only"))
        return self._train(agreement, ask)

    def _train(self, agreement: Agreement, ask: Ask) -> Reply:
        if ask.train and not within_hours(self._conf.policy, self._now()):
            raise Refused(Problem("LF4605", "this site trains at other hours", key="policy.hours"))
        self._child.begin(agreement)
        limit_s = self._conf.policy.seconds_per_round
        if 0 < ask.limit_s < limit_s:
            limit_s = ask.limit_s
        reply = self._child.answer(self._conf.name, ask, limit_s)
        if reply.refusal is not None:
            refusal = _public([reply.refusal])
            return replace(reply, refusal=refusal)
        return reply

    def _agreement(self, digest: str) -> Agreement:
        """Return what was agreed to, also before a restart."""
        if digest in self._agreed:
            return self._agreed[digest]
        if len(digest) == 64 and set(digest) <= _HEX and self._kept(digest).is_file():
            agreement = _decoded(self._kept(digest).read_bytes())
            if agreement.digest == digest:
                self._allow(agreement)
                self._agreed[digest] = agreement
                return agreement
        raise Refused(Problem("LF4501", "this site agreed to no such run"))

    def _kept(self, digest: str) -> Path:
        self._agreements.mkdir(mode=0o700, parents=True, exist_ok=True)
        return self._agreements / f"{digest}.json"

    def _about(self, ask: Ask) -> str:
        agreement = self._agreed.get(ask.agreement)
        run = agreement.run if agreement else "an unknown run"
        return f"round {ask.round_number} of {legible(run, 80)}"

    def _receive(self, reply: Reply, ask: Ask) -> bool:
        """Return whether a receipt says what leaves; if not, a refusal's code may leave alone."""
        about = self._receipt_about(ask)
        if about is None:
            return True  # a sentence about the coordinator's own mistake, and nothing else
        agreement = self._agreed[ask.agreement]
        record = agreement.privacy.record
        client = None
        if reply.update is not None:  # else the norm that the ask tells may be out of bounds
            # Not masked, so no shares: the size does not matter.
            client = noise_of_round(client_noise(agreement, 1), ask.clip, train=ask.train)
        receipt = receipt_of(
            reply,
            ask,
            about,
            terms(record.sampler, record.delta, record.mechanism),
            client.notes if client else {},
            noised=agreement.privacy.is_noised,
        )
        return self._receipts.write(receipt) is not None

    def _receive_phase(self, reply: PhaseReply, asked: PhaseAsk) -> bool:
        about = self._receipt_about(asked.ask)
        # An advert is made of fresh random numbers: nothing of the site's has left with it.
        if about is None or (asked.phase == "advertise" and reply.refusal is None):
            return True
        return self._receipts.write(receipt_of_phase(reply, asked, about)) is not None

    def _receipt_about(self, ask: Ask) -> dict[str, str] | None:
        agreement = self._agreed.get(ask.agreement)
        if agreement is None:
            return None  # a stranger's asks shall not fill the folder
        return {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "site": self._conf.name,
            "coordinator": key_words(self._coordinator),
            "address": self._conf.coordinator,
            "run": agreement.run,
            "task": agreement.task.digest,
            "policy": self._policy_digest,
            "ledger": signed_head(self._conf, self._key)
            if agreement.privacy.record.enabled
            else "",
        }


def _decoded(content: bytes) -> Agreement:
    try:
        return decode(Agreement, strict_json(content))
    except ValueError as error:
        raise Refused(Problem("LF4511", f"the offer is no agreement: {error}")) from None


def _run_in(agreement: bytes) -> str:
    """Return the name of a run that was not accepted, for the log."""
    try:
        return legible(_decoded(agreement).run, 80)
    except Refused:
        return "an unreadable run"


def _tell(where: str, problems: Sequence[Problem]) -> None:
    """Say in the site's own log, in full, why nothing left."""
    for problem in problems:
        _log.warning("site.refused %s: %s [%s]", where, legible(str(problem), 2000), problem.code)


def _public(problems: Sequence[Problem]) -> Problem:
    """Return what the coordinator may know: codes, and sentences about the policy only."""
    code = problems[0].code
    if all(problem.code in _SAYABLE for problem in problems):
        return Problem(code, "; ".join(problem.what for problem in problems))
    for prefix, what in _KINDS:
        if code.startswith(prefix):
            return Problem(code, what)
    return _bare(problems[0])


def _bare(problem: Problem) -> Problem:
    """Return a refusal that says nothing but its code."""
    return Problem(problem.code, "refused by the site")


# Their sentences name the coordinator's own words and the owner's bounds, nothing of the data.
_SAYABLE = frozenset(
    {
        *(f"LF46{number:02d}" for number in (*range(1, 13), 20, 21)),
        *(f"LF45{number:02d}" for number in range(14, 20)),
        *("LF4175", "LF4176", "LF4501", "LF4502", "LF4503", "LF4506", "LF4512", "LF5310", "LF5314"),
    }
)
_KINDS = (  # by the beginning of a code; the first that fits counts, so whole codes come first
    ("LF5209", "the site cannot write its records; its disk may be full"),
    ("LF52", "the site cannot write or read its records"),
    ("LF2", "the site's data does not fit the task's contract"),
    ("LF3", "the task cannot be trained at this site"),
    ("LF4201", "the data set's budget does not allow this"),
    ("LF4508", "the run has cost the epsilon that was agreed to"),
    ("LF4207", "the data set's budget does not allow this run"),
    ("LF4202", "the site cannot write its ledger; its disk may be full"),
    ("LF5311", "training failed at the site"),
)
