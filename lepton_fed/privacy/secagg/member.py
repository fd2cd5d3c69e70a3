"""The site's half of secure aggregation: it decides, and it answers each phase once.

Whatever the coordinator says is held against the pinned roster and the owner's rules. A phase is
answered once: the same request gets the same answer, also after a restart, and another one is
refused. :meth:`Member.state` is all that has to be on disk, synced, before an answer leaves.

**What a site never does**, whoever asks: reveal both secrets of one site; reveal anything of sites
that it did not confirm, on fewer confirmations than the threshold, or on too few by the holders of
its own secrets (:mod:`lepton_fed.privacy.secagg.graph` says why these); go back to a round that it
has revealed shares of; or be in two sums of one round with one vector. The last needs care, because
a site may have to mask its vector again when an attempt fails before it revealed anything, and it
cannot know whether others did. So an attempt's cohort must lie within that of the first attempt at
its round, under no lower a threshold. Two attempts that both come to their end then have more than
half of the first cohort reveal shares in each, so some site would have had to reveal twice. In a
large cohort, where a few holders give a secret, the graph's numbers and the threshold of
confirmations see to it that so many are needed.

References:
    K. Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning",
    CCS 2017, figure 4 and section 6.
    J. Bell, K. Bonawitz, A. Gascón, T. Lepoint, M. Raykova, "Secure Single-Server Aggregation with
    (Poly)Logarithmic Overhead", CCS 2020, section 4.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from lepton_fed.core.digests import canonical_json
from lepton_fed.identity.signature import PrivateKey
from lepton_fed.identity.signature import PublicKey as IdentityKey
from lepton_fed.privacy.secagg.context import Context, commit, opens
from lepton_fed.privacy.secagg.envelopes import open_envelope, seal_envelope
from lepton_fed.privacy.secagg.graph import Graph, Graphs
from lepton_fed.privacy.secagg.keys import (
    RoundSecrets,
    mask_key,
    self_mask_key,
    wrap_pair_secret,
    wrapping_party,
)
from lepton_fed.privacy.secagg.masks import pair_sign
from lepton_fed.privacy.secagg.messages import (
    Advert,
    Cohort,
    Confirmation,
    Envelope,
    FalseMessage,
    Reveal,
    require_list,
)
from lepton_fed.privacy.secagg.shamir import SECRET_BYTES, SHARE_BYTES, Randomness, split_at
from lepton_fed.privacy.secagg.state import Coming, State

__all__ = ["MASK_SHARE", "SEED", "SEED_SHARE", "MaskKeys", "Member", "Rules", "State"]

SEED = "seed of a site's own mask"
SEED_SHARE = "share of a seed"
MASK_SHARE = "share of a mask secret"
"""What is committed to."""


@dataclass(frozen=True)
class Rules:
    """What the site's owner asks of an attempt.

    Args:
        min_cohort: Fewest sites in the cohort, and in the sum.
        threshold: Least share of the cohort that must stay, and without which nothing is revealed;
            more than a half, at most 1.
        post_quantum: Whether keys must be agreed with ML-KEM-768 too.

    Raises:
        ValueError: The cohort may be below 3, or the threshold is out of range.
    """

    min_cohort: int
    threshold: float
    post_quantum: bool = False

    def __post_init__(self) -> None:
        if self.min_cohort < 3:
            raise ValueError(f"a sum of {self.min_cohort} hides no site from the others")
        if not 0.5 < self.threshold <= 1:
            raise ValueError(f"a threshold of {self.threshold} is not more than half")

    def least(self, sites: int) -> int:
        """Return the lowest threshold for a cohort, in sites."""
        whole = int(self.threshold * sites)
        return max(sites // 2 + 1, whole + (whole < self.threshold * sites))


@dataclass(frozen=True)
class MaskKeys:
    """The keys of the masks that go onto a site's vector.

    Args:
        plus: Of the masks that are added, the site's own first.
        minus: Of the masks that are subtracted.
    """

    plus: list[bytearray]
    minus: list[bytearray]


class Member:
    """A site in the secure aggregation of a run.

    Args:
        name: Name of the site.
        identity: Its identity key.
        roster: Public identity key of every site of the pinned roster, by name.
        rules: What the site's owner asks.
        state: What it remembers; a new one for a new run.
        randomness: Where secrets, coefficients and the choice of holders come from.
        graphs: As :class:`~lepton_fed.privacy.secagg.messages.Cohort` takes it.
    """

    def __init__(
        self,
        name: str,
        identity: PrivateKey,
        roster: Mapping[str, IdentityKey],
        rules: Rules,
        state: State | None = None,
        randomness: Randomness = secrets.token_bytes,
        graphs: Graphs = Graph.of,
    ) -> None:
        self._name = name
        self._identity = identity
        self._roster = roster
        self._rules = rules
        self.state = state or State()
        self._randomness = randomness
        self._graphs = graphs

    def advertise(self, context: Context) -> Advert:
        """Return the advert for an attempt; the first call draws its secrets.

        The attempt that is going on goes on until envelopes are made for this one. Adverts go
        forward alone: after a crash the newest one is what says that the stored vector is not of
        a round which the site has forgotten.

        Args:
            context: The attempt, with round and attempt as the coordinator counts them.

        Raises:
            FalseMessage: The round is closed, or the attempt lies behind.
        """
        state, number = self.state, (context.round_number, context.attempt)
        if not self._is_current(context) or context.round_number <= state.closed:
            self._require_open(context)
            if number < _number(state.coming):
                raise FalseMessage("", _behind(context))
            if number > _number(state.coming):
                drawn = [self._randomness(SECRET_BYTES).hex() for _ in range(3)]
                state.coming = Coming(*number, drawn)
        return self._advert(context, self._secrets(context))

    def share(
        self, context: Context, adverts: Sequence[Advert], threshold: int, subject: str = ""
    ) -> list[Envelope]:
        """Return an envelope for each holder of this site's secrets, itself among them.

        In a large cohort the site picks them here, once it has seen who is in it.

        Args:
            context: The attempt.
            adverts: Of every site of the cohort, in the order of their names.
            threshold: How many of them must stay.
            subject: Digest of what this site is asked for in the round, the model among it.

        Returns:
            The envelopes, in the order of the holders' names.

        Raises:
            FalseMessage: The cohort is not one that this site takes part in. Nothing is remembered
                then.
        """
        request = [[advert.wire() for advert in adverts], threshold, subject]
        if self._is_current(context) and self._is_repeated(context, "share", request):
            return [Envelope.parse(envelope) for envelope in self.state.envelopes]
        self._require_open(context)
        cohort = Cohort(context, tuple(adverts), threshold, self._graphs, subject)
        secret = self._secrets(context)
        self._check_cohort(cohort, secret)
        own, state = cohort.parties[self._name].index, self.state
        holders = cohort.graph.holders(own, self._randomness)
        mask_shares, seed_shares = (
            split_at(value, holders, cohort.graph.threshold, self._randomness)
            for value in (secret.mask.secret, secret.self_mask)
        )
        made = [
            self._envelope(cohort, secret, cohort.names[at - 1], mask_shares[at], seed_shares[at])
            for at in holders
        ]
        same = context.round_number == state.round_number and bool(state.first)
        self.state = State(
            closed=state.closed,
            round_number=context.round_number,
            attempt=context.attempt,
            first=state.first if same else list(cohort.names),
            first_threshold=state.first_threshold if same else threshold,
            secrets=state.coming.secrets,
            threshold=threshold,
            subject=subject,
            adverts=[advert.wire() for advert in adverts],
            envelopes=[envelope.wire() for envelope in made],
            seed_shares={self._name: seed_shares[own].hex()},
        )
        self._note(context, "share", request)
        return made

    def mask(
        self, context: Context, envelopes: Sequence[Envelope], senders: Sequence[str]
    ) -> MaskKeys:
        """Return the keys of the masks for this site's vector.

        Args:
            context: The attempt.
            envelopes: Those for this site, of every other site that still takes part and picked
                this one, in the order of their makers' names.
            senders: All who still take part, sorted, this site among them.

        Raises:
            FalseMessage: They are not; a site is named that made a false one. Nothing is
                remembered then.
        """
        cohort = self._cohort(context)
        request = [[envelope.wire() for envelope in envelopes], list(senders)]
        if not self._is_repeated(context, "mask", request, after="share"):
            self._open(cohort, envelopes, senders)
            self._note(context, "mask", request)
        return self._mask_keys(cohort)

    def confirm(self, context: Context, survivors: Sequence[str]) -> Confirmation:
        """Return this site's signature over who is in the sum.

        Args:
            context: The attempt.
            survivors: Whose masked vectors are, sorted.

        Raises:
            FalseMessage: This site is not among them, they are too few, one cannot be there, or
                others were confirmed before.
        """
        cohort, state = self._cohort(context), self.state
        if not self._is_repeated(context, "confirm", list(survivors), after="mask"):
            cohort.require(survivors, "survivors", within=state.senders)
            self._require_cohort(len(survivors))
            if self._name not in survivors:
                raise FalseMessage("", "this site sent its vector, and is to confirm a sum without")
            self._require_holders(cohort, survivors, "survivors")
            state.survivors = list(survivors)
            self._note(context, "confirm", list(survivors))
        return Confirmation.signed(
            self._name, self._identity, cohort, state.senders, state.survivors
        )

    def reveal(
        self,
        context: Context,
        survivors: Sequence[str],
        dropped: Sequence[str],
        confirmations: Sequence[Confirmation],
    ) -> Reveal:
        """Return the shares that take the masks off the sum, and close the round for good.

        Args:
            context: The attempt.
            survivors: Whose vectors are in the sum, as confirmed.
            dropped: Whose envelopes came and whose vectors did not.
            confirmations: Of at least as many survivors as the threshold.

        Raises:
            FalseMessage: The lists are not those that this site confirmed, or too few sites or too
                few holders of its secrets confirmed them. Nothing is revealed, and the request may
                be made again rightly.
        """
        state = self.state
        lists = [list(survivors), list(dropped)]
        cohort = self._cohort(context)
        if not self._is_repeated(context, "reveal", lists, after="confirm", closing=True):
            signed = self._check_reveal(cohort, survivors, dropped, confirmations)
            self._close(context, survivors, dropped)
            state.signed = sorted(signed)
            self._note(context, "reveal", lists)
        return Reveal(
            {n: bytes.fromhex(state.seed_shares[n]) for n in survivors if n in state.seed_shares},
            {n: bytes.fromhex(state.mask_shares[n]) for n in dropped if n in state.mask_shares},
        )

    # --- what is checked

    def _require_open(self, context: Context) -> None:
        """Refuse an attempt that is not after the one that is going on."""
        state = self.state
        if context.round_number <= state.closed:
            raise FalseMessage("", f"round {context.round_number} is closed")
        if (context.round_number, context.attempt) <= _number(state):
            raise FalseMessage("", _behind(context))

    def _check_cohort(self, cohort: Cohort, secret: RoundSecrets) -> None:
        state, sites = self.state, len(cohort.names)
        for advert in cohort.adverts:
            advert.check(
                cohort.context, self._key(advert.name), post_quantum=self._rules.post_quantum
            )
        if self._name not in cohort.names:
            raise FalseMessage("", "the cohort is without this site")
        if cohort.advert(self._name) != self._advert(cohort.context, secret):
            raise FalseMessage("", "the cohort holds another advert of this site than its own")
        self._require_cohort(sites)
        least = self._rules.least(sites)
        if cohort.threshold < least:
            raise FalseMessage(
                "", f"a threshold of {cohort.threshold} of {sites} sites is below {least}"
            )
        if cohort.context.round_number != state.round_number:
            return
        if not set(cohort.names) <= set(state.first):
            raise FalseMessage("", "this attempt has sites that the first at its round had not")
        if cohort.threshold < state.first_threshold:
            raise FalseMessage("", "this attempt has a lower threshold than the first at its round")

    def _key(self, name: str) -> IdentityKey:
        """Return a site's identity key; it may have been taken off the roster since it shared."""
        key = self._roster.get(name)
        if key is None:
            raise FalseMessage("", f"{name} is not on the roster")
        return key

    def _require_cohort(self, sites: int) -> None:
        if sites < self._rules.min_cohort:
            raise FalseMessage("", f"{sites} sites are fewer than {self._rules.min_cohort}")

    def _require_holders(self, cohort: Cohort, there: Collection[str], what: str) -> None:
        """Refuse lists with fewer holders of this site's secrets than it takes to rebuild one."""
        holders = {envelope["recipient"] for envelope in self.state.envelopes}
        among, threshold = len(holders.intersection(there)), cohort.graph.threshold
        if among < threshold:
            raise FalseMessage(
                "", f"{among} holders of this site's secrets among the {what}, not {threshold}"
            )

    def _require_senders(
        self, cohort: Cohort, envelopes: Sequence[Envelope], senders: Sequence[str]
    ) -> None:
        cohort.require(senders, "senders", within=cohort.names)
        self._require_cohort(len(senders))
        others = set(senders) - {self._name}
        if len(others) == len(senders):
            raise FalseMessage("", "this site made its envelopes, and is not among the senders")
        self._require_holders(cohort, senders, "senders")
        makers = [envelope.sender for envelope in envelopes]
        require_list(makers, "makers of envelopes", within=others)
        if cohort.graph.is_complete and len(makers) < len(others):
            raise FalseMessage("", f"no envelope of {min(others.difference(makers))}")

    def _open(self, cohort: Cohort, envelopes: Sequence[Envelope], senders: Sequence[str]) -> None:
        """Read the shares that others made for this site."""
        own, context = cohort.parties[self._name], cohort.context
        self._require_senders(cohort, envelopes, senders)
        pair = self._secrets(context).envelope
        seeds, masks, wrapped = {}, {}, {}
        for envelope in envelopes:
            sender = cohort.parties[envelope.sender]
            if envelope.recipient != self._name:
                raise FalseMessage("", f"an envelope for {envelope.recipient}")
            envelope.check(cohort, self._key(sender.name))
            try:
                content = open_envelope(
                    pair, context, sender, own, envelope.sealed, bound=envelope.bound
                )
            except ValueError as error:
                raise FalseMessage(sender.name, str(error)) from None
            mask, seed = bytes(content[:SHARE_BYTES]), bytes(content[SHARE_BYTES:])
            for kind, share, commitment in (
                (MASK_SHARE, mask, envelope.mask_share),
                (SEED_SHARE, seed, envelope.seed_share),
            ):
                if len(share) != SHARE_BYTES or not opens(
                    commitment, context, kind, share, owner=sender.name, holder=self._name
                ):
                    raise FalseMessage(sender.name, f"its {kind} is not the one it committed to")
            seeds[sender.name], masks[sender.name] = seed.hex(), mask.hex()
            wrapped[sender.name] = envelope.wrapped.hex()
        state = self.state
        before = state.senders, state.wrapped
        state.senders, state.wrapped = list(senders), wrapped
        try:
            self._mask_keys(cohort)  # a pair secret that was wrapped falsely shows here
        except FalseMessage:
            state.senders, state.wrapped = before
            raise
        state.seed_shares |= seeds
        state.mask_shares = masks

    def _check_reveal(
        self,
        cohort: Cohort,
        survivors: Sequence[str],
        dropped: Sequence[str],
        confirmations: Sequence[Confirmation],
    ) -> set[str]:
        """Return who signed these very lists."""
        state = self.state
        if list(survivors) != state.survivors:
            raise FalseMessage("", "other survivors than this site confirmed")
        if list(dropped) != sorted(set(state.senders) - set(survivors)):
            raise FalseMessage("", "the dropped are not all who sent envelopes and did not survive")
        body = Confirmation.body(cohort, state.senders, survivors)
        among = set(survivors)
        signed = {
            confirmation.name
            for confirmation in confirmations
            if confirmation.name in among
            and confirmation.is_over(body, self._key(confirmation.name))
        }
        if len(signed) < cohort.threshold:
            raise FalseMessage(
                "", f"{len(signed)} sites confirmed this sum, the threshold is {cohort.threshold}"
            )
        self._require_holders(cohort, signed, "sites that confirmed this sum")
        return signed

    # --- what is made

    def _advert(self, context: Context, secret: RoundSecrets) -> Advert:
        seed = commit(context, SEED, secret.self_mask, owner=self._name)
        advert = Advert(self._name, secret.mask.public, secret.envelope.public, seed)
        return advert.signed(context, self._identity)

    def _close(self, context: Context, survivors: Sequence[str], dropped: Sequence[str]) -> None:
        """Keep of the round what is revealed, in case it is asked for again, and nothing else."""
        state = self.state
        state.closed = context.round_number
        state.secrets, state.envelopes, state.wrapped = [], [], {}
        for shares, named in ((state.seed_shares, survivors), (state.mask_shares, dropped)):
            for name in set(shares).difference(named):
                del shares[name]

    def _secrets(self, context: Context) -> RoundSecrets:
        """Return the secrets of the attempt that is going on, or of the last advert."""
        state = self.state
        if self._is_current(context):
            found = state.secrets
        elif (context.round_number, context.attempt) == _number(state.coming):
            found = state.coming.secrets
        else:
            raise FalseMessage("", "this site has given no advert for this attempt")
        if not found:
            raise FalseMessage("", "the secrets of this attempt are wiped")
        drawn_before = [bytes.fromhex(secret) for secret in found]
        return RoundSecrets(*drawn_before, post_quantum=self._rules.post_quantum)

    def _cohort(self, context: Context) -> Cohort:
        adverts = tuple(Advert.parse(advert) for advert in self.state.adverts)
        if not adverts or not self._is_current(context):
            raise FalseMessage("", "this site has made no shares for this attempt")
        return Cohort(context, adverts, self.state.threshold, self._graphs, self.state.subject)

    def _envelope(
        self, cohort: Cohort, secret: RoundSecrets, recipient: str, mask: bytes, seed: bytes
    ) -> Envelope:
        context, own, other = cohort.context, cohort.parties[self._name], cohort.parties[recipient]
        mask_share = commit(context, MASK_SHARE, mask, owner=self._name, holder=recipient)
        seed_share = commit(context, SEED_SHARE, seed, owner=self._name, holder=recipient)
        sealed = wrapped = b""
        if recipient != self._name:
            try:
                # In the complete graph the other site makes an envelope as well, so it is known
                # already who wraps.
                if own.index < other.index or not cohort.graph.is_complete:
                    wrapped = wrap_pair_secret(secret.mask, context, own, other)
                sealed = seal_envelope(
                    secret.envelope,
                    context,
                    own,
                    other,
                    mask + seed,
                    bound=wrapped + mask_share + seed_share,
                    randomness=self._randomness,
                )
            except ValueError as error:
                raise FalseMessage(recipient, str(error)) from None
        envelope = Envelope(self._name, recipient, sealed, wrapped, mask_share, seed_share)
        return envelope.signed(cohort, self._identity)

    def _mask_keys(self, cohort: Cohort) -> MaskKeys:
        state, context = self.state, cohort.context
        secret = self._secrets(context)
        own = cohort.parties[self._name]
        made = {envelope["recipient"]: envelope["wrapped"] for envelope in state.envelopes}
        keys = MaskKeys([self_mask_key(secret.self_mask, context, own)], [])
        for name in state.senders:
            makers = [self._name] * (name in made) + [name] * (name in state.wrapped)
            if name == self._name or not makers:
                continue
            other = cohort.parties[name]
            wrapper = wrapping_party(own, other, makers)
            wrapped = made[name] if wrapper is own else state.wrapped[name]
            try:
                key = mask_key(
                    secret.mask, context, own, other, bytes.fromhex(wrapped), wrapper=wrapper
                )
            except ValueError as error:
                raise FalseMessage(name, str(error)) from None
            (keys.plus if pair_sign(own.index, other.index) > 0 else keys.minus).append(key)
        return keys

    # --- what was asked before

    def _is_current(self, context: Context) -> bool:
        return (context.round_number, context.attempt) == _number(self.state)

    def _is_repeated(
        self,
        context: Context,
        phase: str,
        request: object,
        *,
        after: str = "",
        closing: bool = False,
    ) -> bool:
        """Return whether this was answered before; refuse what comes at the wrong time."""
        state = self.state
        if not self._is_current(context):
            raise FalseMessage("", f"attempt {context.attempt} at round {context.round_number} is "
                               "not the one that is going on")  # fmt: skip
        known = state.asked.get(phase)
        if known is not None:
            if known != _digest(context, phase, request):
                raise FalseMessage("", f"another {phase} was answered in this attempt")
            if state.closed >= context.round_number and not closing:
                raise FalseMessage("", f"round {context.round_number} is closed")
            return True
        if state.closed >= context.round_number:
            raise FalseMessage("", f"round {context.round_number} is closed")
        if after and after not in state.asked:
            raise FalseMessage("", f"{phase} comes after {after}")
        return False

    def _note(self, context: Context, phase: str, request: object) -> None:
        self.state.asked[phase] = _digest(context, phase, request)


def _number(of: State | Coming) -> tuple[int, int]:
    """Return round and attempt; later ones are larger."""
    return of.round_number, of.attempt


def _behind(context: Context) -> str:
    return f"attempt {context.attempt} at round {context.round_number} lies behind"


def _digest(context: Context, phase: str, request: object) -> str:
    body = context.bind("asked", phase=phase) + b"\0" + canonical_json(request)
    return hashlib.sha256(body).hexdigest()
