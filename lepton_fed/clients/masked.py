"""A site's part in secure aggregation: trains, encodes, masks, and reveals what takes masks off.

The decisions are in :class:`~lepton_fed.privacy.secagg.member.Member`; here they meet the round's
update, the disk and the owner's rules. Nothing is answered before what the site has to remember of
it is kept: see :mod:`~lepton_fed.clients.vault`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lepton_fed.clients.vault import Remembered, StoredVector, Vault
from lepton_fed.config.agreement import Agreement
from lepton_fed.config.schema import AggregationFloor
from lepton_fed.core.exchange import Ask, PhaseAsk, PhaseReply, Reply, ask_digest
from lepton_fed.errors import Problem, Refused, RunError
from lepton_fed.identity.signature import PrivateKey, PublicKey
from lepton_fed.privacy.client import ClientNoise, client_noise, noise_of_round
from lepton_fed.privacy.dp.discrete_gaussian import discrete_gaussian
from lepton_fed.privacy.dp.entropy import Entropy
from lepton_fed.privacy.dp.integers import Integers
from lepton_fed.privacy.dp.shared import shared_noise
from lepton_fed.privacy.masked_plan import (
    Shape,
    context_of,
    masked_layout,
    roster_digest,
    serial_of,
)
from lepton_fed.privacy.secagg import masks
from lepton_fed.privacy.secagg.context import Context, wipe
from lepton_fed.privacy.secagg.member import Member, Rules
from lepton_fed.privacy.secagg.messages import Advert, Confirmation, Envelope, FalseMessage
from lepton_fed.privacy.secagg.packing import packed_words
from lepton_fed.privacy.secagg.requests import (
    AdvertReply,
    AdvertRequest,
    ConfirmReply,
    ConfirmRequest,
    MaskRequest,
    RevealReply,
    RevealRequest,
    ShareReply,
    ShareRequest,
    packed_body,
    read_body,
)
from lepton_fed.privacy.secagg.vector import MaskedLayout

__all__ = ["MaskedSite"]

_HOUR_S = 3600.0
_MOST_ATTEMPTS = 16  # at one round: each is a new draw of who holds a site's secrets


@dataclass(frozen=True)
class _Round:
    """What is asked for, as the site sees it."""

    ask: Ask
    serial: int
    layout: MaskedLayout
    context: Context
    digest: str
    client: ClientNoise | None


class MaskedSite:
    """One site in the secure aggregation of a run.

    Args:
        name: Name of the site.
        identity: Its identity key.
        roster: Public identity key of every site of the pinned roster, by name.
        agreement: What the site agreed to.
        shape: What an update of the task is made of.
        floor: What the site's owner asks.
        vault: What it remembers.
        answer: From an ask to the update and the counts that may leave.
        clock: Tells Unix seconds.
    """

    def __init__(
        self,
        name: str,
        identity: PrivateKey,
        roster: Mapping[str, PublicKey],
        agreement: Agreement,
        shape: Shape,
        floor: AggregationFloor,
        vault: Vault,
        answer: Callable[[Ask], Reply],
        clock: Callable[[], float] = time.time,
    ) -> None:
        secure = agreement.privacy.secure_aggregation
        self._noise = shared_noise(agreement, shape.size)
        self._client = client_noise(agreement, shape.size)
        self._name = name
        self._identity = identity
        self._roster = roster
        self._roster_digest = roster_digest(roster)
        self._agreement = agreement
        self._shape = shape
        self._floor = floor
        # Both were compared when the site agreed; the higher one holds whatever was said then.
        self._rules = Rules(
            max(
                secure.least_sites() // secure.groups,
                floor.min_cohort,
                self._noise.honest if self._noise else 0,
                self._client.honest if self._client else 0,
            ),
            max(secure.threshold, floor.threshold),
            secure.post_quantum,
        )
        self._vault = vault
        self._answer = answer
        self._clock = clock

    def take(self, asked: PhaseAsk) -> PhaseReply:
        """Answer a phase.

        Args:
            asked: What the coordinator wants.

        Returns:
            The answer, or a refusal of what is not as the protocol has it.

        Raises:
            LeptonError: The site cannot or may not answer; nothing has left then.
        """
        handlers = {
            "advertise": self._advertise,
            "share": self._share,
            "mask": self._mask,
            "confirm": self._confirm,
            "reveal": self._reveal,
        }
        handler = handlers.get(asked.phase)
        if handler is None:
            raise Refused(Problem("LF4514", "secure aggregation has no such phase"))
        now = self._vault.recall()
        self._clear_closed(now)
        self._require_newest(now)
        member = Member(self._name, self._identity, self._roster, self._rules, now.member)
        try:
            return handler(asked, self._round(asked), member, now)
        except FalseMessage as error:
            why = f"{error.sender}: {error.why}" if error.sender else error.why
            problem = Problem("LF4514", why, where=f"round {asked.ask.round_number}")
            return PhaseReply(self._name, refusal=problem, accused=error.sender)

    # --- the phases

    def _advertise(
        self, asked: PhaseAsk, about: _Round, member: Member, now: Remembered
    ) -> PhaseReply:
        self._require_roster(read_body(AdvertRequest, asked.body).roster)
        advert = member.advertise(about.context)
        self._keep(member, now)
        return PhaseReply(self._name, packed_body(AdvertReply(advert.wire())))

    def _share(self, asked: PhaseAsk, about: _Round, member: Member, now: Remembered) -> PhaseReply:
        request = read_body(ShareRequest, asked.body)
        self._require_roster(request.roster)
        if len(request.adverts) > self._agreement.cohort:
            raise FalseMessage("", f"a cohort of {len(request.adverts)}, at most "
                               f"{self._agreement.cohort} were agreed to")  # fmt: skip
        adverts = [Advert.parse(advert) for advert in request.adverts]
        begun = self._begun(now, about.serial)
        if now.member.round_number == about.serial > now.member.closed:
            self._stored(about)  # trained anew, one round would have two vectors of this site
        envelopes = member.share(about.context, adverts, request.threshold, about.digest)
        self._make_vector(about)
        self._keep(member, Remembered(begun=begun))
        notes = {
            "cohort": ", ".join(advert.name for advert in adverts),
            "threshold": f"{request.threshold} of {len(adverts)} sites",
            "envelopes": f"{len(envelopes) - 1}, sealed, each for one other site of the cohort",
        }
        body = packed_body(ShareReply([envelope.wire() for envelope in envelopes]))
        return PhaseReply(self._name, body, notes=notes)

    def _mask(self, asked: PhaseAsk, about: _Round, member: Member, now: Remembered) -> PhaseReply:
        request = read_body(MaskRequest, asked.body)
        self._require_roster(request.roster)
        stored = self._stored(about)
        envelopes = [Envelope.parse(envelope) for envelope in request.envelopes]
        keys = member.mask(about.context, envelopes, request.senders)
        words = self._vault.words()
        bits = about.layout.encoding.bits
        try:
            masks.apply(words, plus=keys.plus, minus=keys.minus, bits=bits)
        finally:
            wipe(*keys.plus, *keys.minus)
        packed = packed_words(words, bits)
        self._keep(member, now)
        notes = {
            "masked with": ", ".join(member.state.senders),
            "masked vector": f"{words.size} numbers of {bits} bits; nobody can read it alone",
            **stored.notes,
        }
        return PhaseReply(
            self._name,
            masked=packed,
            sent_bytes=packed.size,
            words=words.size,
            norms=(stored.norm_before, stored.norm_after),
            notes=notes,
        )

    def _confirm(
        self, asked: PhaseAsk, about: _Round, member: Member, now: Remembered
    ) -> PhaseReply:
        request = read_body(ConfirmRequest, asked.body)
        self._require_roster(request.roster)
        confirmation = member.confirm(about.context, request.survivors)
        self._keep(member, now)
        notes = {"signed": f"that the sum is of {', '.join(request.survivors)}"}
        return PhaseReply(self._name, packed_body(ConfirmReply(confirmation.wire())), notes=notes)

    def _reveal(
        self, asked: PhaseAsk, about: _Round, member: Member, now: Remembered
    ) -> PhaseReply:
        request = read_body(RevealRequest, asked.body)
        self._require_roster(request.roster)
        confirmations = [Confirmation.parse(wire) for wire in request.confirmations]
        reveal = member.reveal(about.context, request.survivors, request.dropped, confirmations)
        advert = {}
        if request.advert:
            advert = member.advertise(self._next(asked).context).wire()
        self._keep(member, now)
        self._vault.clear()
        notes = {
            "sum of": ", ".join(request.survivors),
            "signed by": ", ".join(member.state.signed),
            "shares": f"of the own masks of {len(reveal.seeds)} sites in the sum, and of the keys "
            f"of {len(reveal.masks)} that dropped out",
        }
        return PhaseReply(self._name, packed_body(RevealReply(reveal.wire(), advert)), notes=notes)

    # --- the round

    def _round(self, asked: PhaseAsk, *, later: int = 0) -> _Round:
        ask, agreement = asked.ask, self._agreement
        if ask.agreement != agreement.digest:
            raise Refused(Problem("LF4501", "the ask is for another agreement than this site's"))
        if ask.layout != self._shape.layout:
            raise Refused(
                Problem("LF4502", "the model's layout is not the one this task gives here")
            )
        serial = serial_of(agreement, ask.round_number, train=ask.train) + later
        if not 1 <= ask.round_number <= agreement.rounds or serial > agreement.rounds + 1:
            raise Refused(Problem("LF4503", f"{agreement.rounds} rounds were agreed to"))
        layout = masked_layout(
            agreement, self._shape, train=serial <= agreement.rounds, evaluate=ask.evaluate
        )
        client = noise_of_round(self._client, ask.clip, train=ask.train)
        attempt = 1 if later else asked.attempt
        if not 1 <= attempt <= _MOST_ATTEMPTS:
            raise FalseMessage("", f"at most {_MOST_ATTEMPTS} attempts are made at a round")
        context = context_of(
            agreement, self._shape, layout, self._roster_digest, serial=serial, attempt=attempt
        )
        return _Round(ask, serial, layout, context, ask_digest(ask), client)

    def _next(self, asked: PhaseAsk) -> _Round:
        """Return the first attempt at the round after this one."""
        return self._round(asked, later=1)

    def _stored(self, about: _Round) -> StoredVector:
        """Return what is known of the stored vector of a round that has begun.

        Raises:
            Refused: LF4517, it is gone.
        """
        stored = self._vault.stored()
        if stored is None or stored.serial != about.serial:
            raise Refused(Problem("LF4517", "the stored vector of this round is gone"))
        return stored

    def _clear_closed(self, now: Remembered) -> None:
        """Remove the vector of a closed round: a process was killed before it could."""
        stored = self._vault.stored()
        if stored is not None and stored.serial <= now.member.closed:
            self._vault.clear()

    def _require_newest(self, now: Remembered) -> None:
        """Refuse to go on from what an older copy, or none, says of what was revealed."""
        stored, member = self._vault.stored(), now.member
        known = max(member.round_number, member.coming.round_number)
        if stored is not None and stored.serial > known:
            raise Refused(
                Problem("LF4517", "what this site remembers of the run is older than its stored "
                        "vector: it was put back or removed",
                        remedy="start the run under another name")
            )  # fmt: skip

    def _require_roster(self, digest: str) -> None:
        if digest != self._roster_digest:
            raise Refused(
                Problem("LF4515", "the coordinator goes by another roster than this site pinned",
                        remedy="at the site: lepton-fed keys accept --conf conf/client.yaml")
            )  # fmt: skip

    def _begun(self, now: Remembered, serial: int) -> list[float]:
        """Return when the rounds of the last hour began, this one too.

        Raises:
            Refused: LF4516, there are too many already.
        """
        clock = self._clock()
        recent = [begun for begun in now.begun if clock - begun < _HOUR_S]
        if now.member.round_number == serial:
            return recent
        of_all = len(recent) + len(self._vault.elsewhere(clock - _HOUR_S))
        if of_all >= self._floor.rounds_per_hour:
            raise Refused(
                Problem("LF4516", f"{of_all} rounds were begun within the last hour, at most "
                        f"{self._floor.rounds_per_hour} are allowed at this site",
                        key="policy.privacy.secure_aggregation.rounds_per_hour")
            )  # fmt: skip
        return [*recent, clock]

    def _make_vector(self, about: _Round) -> None:
        """Train or evaluate and store what would leave, unless that was done for this very ask."""
        stored, ask, layout, client = self._vault.stored(), about.ask, about.layout, about.client
        if stored is not None and stored.serial == about.serial:
            if stored.ask != about.digest:
                raise Refused(
                    Problem("LF4506", f"round {ask.round_number} was answered already, to another "
                            "ask")
                )  # fmt: skip
            return
        reply = self._answer(ask)
        if reply.refusal is not None:
            raise Refused([reply.refusal])
        shares = self._noise is not None or (client is not None and client.shares)
        if shares and ask.train and reply.again:
            # Its share may have left once, if what was remembered of it is lost or an older copy.
            # With another one, the same update would be in two sums under two noises.
            raise Refused(Problem("LF4517", "the stored vector of this round is gone"))
        vectors: dict[str, npt.NDArray[np.floating] | npt.NDArray[np.uint64]] = {}
        weight, norms = layout.encoding.weight_bound, {}
        if reply.update is not None:
            vectors |= reply.update.vectors
            weight = reply.update.weight
            norms = dict(reply.update.norms)
        counts, notes = np.zeros(layout.counts), {}
        # Who may not send counts adds none, nor who has none that are finite: one such would spoil
        # the sum of all. How many there are belongs to the layout.
        if reply.counts is not None and np.isfinite(reply.counts).all():
            counts, notes["evaluation"] = reply.counts, "inside the masked vector"
        try:
            noise = self._share_of_noise(layout, notes) if ask.train else None
            if reply.update is not None and client:
                notes |= client.notes
                for name, vector in reply.update.vectors.items():
                    # Only here is it known: what comes from training is clipped already.
                    joint = client.vector(vector, over=norms[name] > client.clip)
                    vectors[name] = joint
                    if client.shares:
                        ends = client.noisy_sum(ask.round_number)
                        vectors[name] = ends.encode(joint, Entropy.from_system())
            words, _ = layout.encode(vectors, weight, counts, noise)
        except ValueError as error:
            raise RunError(Problem("LF5312", f"the update cannot be masked: {error}")) from None
        bound = client.site_bound if client else self._agreement.task.aggregation.norm_bound
        notes["clip"] = f"{bound:g}"
        before = max(norms.values(), default=0.0)
        if ask.train:
            lost = layout.encoding.bits_lost_to_weight(weight)
            notes["weight"] = f"inside the masked vector; {lost:.1f} bits are lost to it"
        known = StoredVector(about.serial, about.digest, before, min(before, bound), notes)
        self._vault.store(words, known)

    def _share_of_noise(
        self, layout: MaskedLayout, notes: dict[str, str]
    ) -> Callable[[int], Integers] | None:
        """Return what draws this site's share of the sum's noise; None when nothing is shared."""
        noise = self._noise
        if noise is None:
            return None
        std, entropy = noise.share_std(layout.encoding.grid), Entropy.from_system()
        notes["noise"] = (
            f"this site's share: the sum has the whole noise, multiplier "
            f"{noise.noise_multiplier:.4g}, while {noise.honest} sites in it add theirs"
        )
        return lambda count: discrete_gaussian(std, count, entropy)

    def _keep(self, member: Member, now: Remembered) -> None:
        self._vault.remember(Remembered(member.state, now.begun))
