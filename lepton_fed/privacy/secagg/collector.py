"""The coordinator's half of secure aggregation: it routes, adds, and takes the masks off the sum.

It needs no secret and is trusted with none. What sites send is checked as it comes, so that a site
that sends something false is named and left out, and the others can go on: a bad advert, signature
or confirmation at once, a false share by its maker's commitment, and shares that do not fit
together by what they were to give.

References:
    K. Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning",
    CCS 2017, figure 4.
    J. Bell, K. Bonawitz, A. Gascón, T. Lepoint, M. Raykova, "Secure Single-Server Aggregation with
    (Poly)Logarithmic Overhead", CCS 2020, section 4.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lepton_fed.core.exchange import Octets
from lepton_fed.identity.signature import PublicKey as IdentityKey
from lepton_fed.privacy.secagg import masks
from lepton_fed.privacy.secagg.context import Context, opens
from lepton_fed.privacy.secagg.graph import Graph, Graphs
from lepton_fed.privacy.secagg.keys import KeyPair, mask_key, self_mask_key, wrapping_party
from lepton_fed.privacy.secagg.masks import Words, pair_sign, words_dtype
from lepton_fed.privacy.secagg.member import MASK_SHARE, SEED, SEED_SHARE
from lepton_fed.privacy.secagg.messages import (
    Advert,
    Cohort,
    Confirmation,
    Envelope,
    FalseMessage,
    Reveal,
    Wire,
    require_list,
)
from lepton_fed.privacy.secagg.packing import unpacked
from lepton_fed.privacy.secagg.shamir import SHARE_BYTES, Weights

__all__ = ["Collector", "Progress", "TooFew"]


class TooFew(Exception):
    """Fewer sites are left than the threshold: the attempt is abandoned, nothing was revealed.

    Args:
        left: How many are left.
        threshold: How many are needed.
        owner: Name of the site whose secrets they hold, if only these are too few.
    """

    def __init__(self, left: int, threshold: int, owner: str = "") -> None:
        those = f"holders of the secrets of {owner}" if owner else "sites"
        super().__init__(f"{left} {those} are left, the threshold is {threshold}")
        self.owner = owner
        self.left = left
        self.threshold = threshold


@dataclass
class Progress:
    """How far an attempt has come: what goes on disk before the next phase is asked.

    Envelopes and sum are apart from it: they are large, and do not change once they are there.

    Args:
        adverts: The adverts of the cohort, in the order of their names.
        threshold: Its threshold.
        senders: Whose envelopes came in time, sorted; empty before.
        survivors: Whose vectors are in the sum, sorted; empty before.
        confirmations: Signatures over them; empty before.
    """

    adverts: list[dict[str, str]] = field(default_factory=list)
    threshold: int = 0
    senders: list[str] = field(default_factory=list)
    survivors: list[str] = field(default_factory=list)
    confirmations: list[dict[str, str]] = field(default_factory=list)


class Collector:
    """One attempt at a round, as the coordinator sees it.

    Each phase takes the sites' messages one by one and is then closed; what comes later is late.

    Args:
        context: The attempt.
        roster: Public identity key of every site, by name.
        size: Length of the masked vector, in words.
        bits: Size of the ring in bits, 16 to 64.
        post_quantum: Whether keys are agreed with ML-KEM-768 too.
        graphs: As :class:`~lepton_fed.privacy.secagg.messages.Cohort` takes it.
        subject: Likewise.
    """

    def __init__(
        self,
        context: Context,
        roster: Mapping[str, IdentityKey],
        size: int,
        bits: int = 32,
        *,
        post_quantum: bool = False,
        graphs: Graphs = Graph.of,
        subject: str = "",
    ) -> None:
        self._context = context
        self._subject = subject
        self._roster = roster
        self._bits = bits
        self._post_quantum = post_quantum
        self._graphs = graphs
        self._adverts: dict[str, Advert] = {}
        self._keys: set[bytes] = set()
        self._cohort: Cohort | None = None
        self._envelopes: dict[str, dict[str, Envelope]] = {}
        self._senders: tuple[str, ...] = ()
        self._total: Words = np.zeros(size, dtype=words_dtype(bits))
        self._came: set[str] = set()
        self._survivors: tuple[str, ...] = ()
        self._confirmations: dict[str, Confirmation] = {}
        self._confirmed = False
        self._reveals: dict[str, Reveal] = {}

    # --- over a restart

    @property
    def progress(self) -> Progress:
        """Return how far the attempt has come; a phase that is not closed has not begun."""
        cohort = self._formed()
        return Progress(
            [advert.wire() for advert in cohort.adverts],
            cohort.threshold,
            list(self._senders),
            list(self._survivors),
            [confirmation.wire() for confirmation in self._confirmations.values()]
            if self._confirmed
            else [],
        )

    @property
    def total(self) -> Words:
        """Return the sum so far, ``[size]`` words, masks and all; it is not copied."""
        return self._total

    def envelopes(self) -> Iterator[tuple[str, list[Wire]]]:
        """Yield each sender whose envelopes came in time, sorted, and these."""
        for name in self._senders:
            yield name, [envelope.wire() for envelope in self._envelopes[name].values()]

    def resume(
        self,
        progress: Progress,
        envelopes: Iterable[tuple[str, Sequence[Wire]]] = (),
        total: Words | None = None,
    ) -> Cohort:
        """Go on from where another process was.

        What it wrote down it had checked, so the signatures of adverts and envelopes are not
        checked a second time: for a thousand sites that would take longer than the rest of a phase.

        Args:
            progress: What it had written down.
            envelopes: Those of each sender, once they were closed.
            total: The sum that goes with the survivors; None when there were none yet.

        Returns:
            The cohort.

        Raises:
            ValueError: They are not of such an attempt, or do not go together.
        """
        adverts = [Advert.parse(advert) for advert in progress.adverts]
        self._adverts = {advert.name: advert for advert in adverts}
        cohort = self.form(progress.threshold)
        for name, made in envelopes:
            self._take_envelopes(name, [Envelope.parse(envelope) for envelope in made])
        self._senders = tuple(sorted(self._envelopes))
        if list(self._senders) != progress.senders:
            raise ValueError("the envelopes are of other senders")
        if progress.survivors:
            if (
                total is None
                or total.shape != self._total.shape
                or total.dtype != self._total.dtype
            ):
                raise ValueError("there are survivors, and no sum of theirs")
            cohort.require(progress.survivors, "survivors", within=self._senders)
            self._total, self._survivors = total, tuple(progress.survivors)
            self._came = set(self._survivors)
        for wire in progress.confirmations:
            confirmation = Confirmation.parse(wire)
            self.add_confirmation(confirmation.name, confirmation)
        self._confirmed = bool(progress.confirmations)
        return cohort

    @property
    def advertised(self) -> tuple[str, ...]:
        """Return whose adverts came, sorted."""
        return tuple(sorted(self._adverts))

    @property
    def survivors(self) -> tuple[str, ...]:
        """Return whose vectors are in the sum, sorted."""
        return self._survivors

    # --- adverts

    def add_advert(self, site: str, advert: Advert) -> None:
        """Take a site's advert.

        Raises:
            FalseMessage: It is not this site's for this attempt, a second one, or has a key that is
                there already.
        """
        if site not in self._roster or advert.name != site or site in self._adverts:
            raise FalseMessage(site, "an advert of a stranger, of another site, or a second one")
        try:
            advert.check(self._context, self._roster[site], post_quantum=self._post_quantum)
        except FalseMessage as error:
            raise FalseMessage(site, error.why) from None  # it came from the site itself
        # Nobody sees another's key before the cohort is formed: who has the same works with it.
        keys = {advert.mask.encode(), advert.envelope.encode()}
        if len(keys) < 2 or keys & self._keys:
            raise FalseMessage(site, "a key that another site has, or one key for both purposes")
        self._keys |= keys
        self._adverts[site] = advert

    def form(self, threshold: int) -> Cohort:
        """Make a cohort of the sites whose adverts came.

        Args:
            threshold: How many of them must stay.

        Raises:
            FalseMessage: The threshold is not more than half of them, or two have one key.
        """
        self._cohort = Cohort.of(
            self._context, self._adverts.values(), threshold, self._graphs, self._subject
        )
        return self._cohort

    # --- envelopes

    def add_envelopes(self, site: str, envelopes: Sequence[Envelope]) -> None:
        """Take the envelopes that a site made, one for each holder that it picked and for itself.

        Raises:
            FalseMessage: They are not as many as it had to pick, or one is there twice, for no
                site of the cohort, or not signed by the site.
        """
        if site not in self._roster:
            raise FalseMessage(site, "envelopes of a stranger, or for the second time")
        self._take_envelopes(site, envelopes, self._roster[site])

    def _take_envelopes(
        self, site: str, envelopes: Sequence[Envelope], identity: IdentityKey | None = None
    ) -> None:
        """Take envelopes, checked in all but their signatures where no key is given."""
        cohort = self._formed()
        if site not in cohort.names or site in self._envelopes:
            raise FalseMessage(site, "envelopes of a stranger, or for the second time")
        holders = [envelope.recipient for envelope in envelopes]
        try:
            require_list(holders, "holders", within=cohort.names)
        except FalseMessage as error:
            raise FalseMessage(site, error.why) from None
        if len(holders) != cohort.graph.degree + 1 or site not in holders:
            why = f"{len(holders)} envelopes, not one for itself and {cohort.graph.degree} others"
            raise FalseMessage(site, why)
        for envelope in envelopes:
            if envelope.sender != site:
                raise FalseMessage(site, "an envelope in the name of another site")
            try:
                if identity is None:
                    envelope.check_form(cohort)
                else:
                    envelope.check(cohort, identity)
            except FalseMessage as error:
                raise FalseMessage(site, error.why) from None
        self._envelopes[site] = {envelope.recipient: envelope for envelope in envelopes}

    def close_envelopes(self) -> tuple[str, ...]:
        """Return whose envelopes came, sorted: these send a masked vector.

        Raises:
            TooFew: They are fewer than the threshold.
        """
        self._senders = self._enough(self._envelopes)
        return self._senders

    def envelopes_for(self, site: str) -> list[Envelope]:
        """Return the envelopes for a site, in the order of their senders' names."""
        return [
            self._envelopes[sender][site]
            for sender in self._senders
            if sender != site and site in self._envelopes[sender]
        ]

    @property
    def senders(self) -> tuple[str, ...]:
        """Return whose envelopes came in time, sorted: what goes with the envelopes to each."""
        return self._senders

    # --- masked vectors

    def add_masked(self, site: str, packed: Octets) -> None:
        """Add a site's masked vector to the sum, block by block.

        Args:
            site: Name of the site.
            packed: ``[size]`` words of the ring, packed.

        Raises:
            FalseMessage: The site has none to send, or has sent it, or it has another length, or
                the survivors were told.
        """
        if site not in self._senders or site in self._came or self._survivors:
            raise FalseMessage(site, "a masked vector that nobody waits for")
        try:
            blocks = unpacked(packed, self._total.size, self._bits)
        except ValueError as error:
            raise FalseMessage(site, str(error)) from None
        self._came.add(site)  # from here on the sum has some of it
        for part, words in blocks:
            self._total[part] += words

    def close_masked(self) -> tuple[str, ...]:
        """Return whose vectors are in the sum, sorted.

        Raises:
            TooFew: They are fewer than the threshold.
        """
        self._survivors = self._enough(self._came)
        return self._survivors

    @property
    def dropped(self) -> tuple[str, ...]:
        """Return whose envelopes came and whose masked vectors did not, sorted."""
        survivors = set(self._survivors)
        return tuple(name for name in self._senders if name not in survivors)

    # --- confirmations

    def add_confirmation(self, site: str, confirmation: Confirmation) -> None:
        """Take a site's signature over who is in the sum.

        Raises:
            FalseMessage: It is not its signature over these lists.
        """
        cohort = self._formed()
        if site not in self._survivors or confirmation.name != site:
            raise FalseMessage(site, "a confirmation that nobody waits for")
        body = Confirmation.body(cohort, self._senders, self._survivors)
        if not confirmation.is_over(body, self._roster[site]):
            raise FalseMessage(site, "its confirmation is not of this sum")
        self._confirmations[site] = confirmation

    def close_confirmations(self) -> list[Confirmation]:
        """Return the confirmations, to be shown to every survivor.

        Raises:
            TooFew: They are fewer than the threshold.
        """
        names = self._enough(self._confirmations)
        self._confirmed = True
        return [self._confirmations[site] for site in names]

    # --- shares

    def add_reveal(self, site: str, reveal: Reveal) -> None:
        """Take the shares that a site reveals.

        Raises:
            FalseMessage: They are others than it was asked for, or one is not the share that was
                committed to.
        """
        if site not in self._survivors or site in self._reveals:
            raise FalseMessage(site, "shares that nobody waits for")
        asked = [
            [owner for owner in owners if site in self._envelopes[owner]]
            for owners in (self._survivors, self.dropped)
        ]
        if [sorted(reveal.seeds), sorted(reveal.masks)] != asked:
            raise FalseMessage(site, "shares of others than it was asked for")
        for kind, shares in ((SEED_SHARE, reveal.seeds), (MASK_SHARE, reveal.masks)):
            for owner, share in shares.items():
                if not self._is_committed(kind, owner, site, share):
                    raise FalseMessage(site, f"its {kind} of {owner} is not the one it was given")
        self._reveals[site] = reveal

    def unmask(self) -> Words:
        """Return the sum without masks, ``[size]`` words below ``2**bits``; the sum is used up.

        Raises:
            TooFew: Fewer sites revealed shares than the threshold.
            FalseMessage: A site shared out something else than it had committed to.
        """
        cohort = self._formed()
        self._enough(self._reveals)
        rebuild = _Rebuilding(cohort.graph.threshold)
        plus: list[bytearray] = []
        minus = [self._self_mask(cohort, owner, rebuild) for owner in self._survivors]
        for owner in self.dropped:
            self._pair_masks(cohort, owner, rebuild, plus, minus)
        masks.apply(self._total, plus=plus, minus=minus, bits=self._bits)
        return self._total

    def _shares(self, cohort: Cohort, owner: str) -> dict[int, bytes]:
        """Return the shares that were revealed of a site, by point."""
        there = owner in self._survivors
        return {
            cohort.parties[name].index: (reveal.seeds if there else reveal.masks)[owner]
            for name in self._envelopes[owner]
            if (reveal := self._reveals.get(name))
        }

    def _self_mask(self, cohort: Cohort, owner: str, rebuild: _Rebuilding) -> bytearray:
        seed = rebuild(self._shares(cohort, owner), owner)
        if not opens(cohort.advert(owner).self_mask, self._context, SEED, seed, owner=owner):
            raise FalseMessage(owner, "it shared out another seed than it had committed to")
        return self_mask_key(seed, self._context, cohort.parties[owner])

    def _pair_masks(
        self,
        cohort: Cohort,
        owner: str,
        rebuild: _Rebuilding,
        plus: list[bytearray],
        minus: list[bytearray],
    ) -> None:
        """Collect the keys of the masks that the survivors share with one that dropped out."""
        secret = rebuild(self._shares(cohort, owner), owner)
        pair = KeyPair(secret, "mask", post_quantum=self._post_quantum)
        gone = cohort.parties[owner]
        if pair.public != gone.mask:
            raise FalseMessage(owner, "it shared out another mask secret than its advert has")
        for name in self._survivors:
            makers = [owner] * (name in self._envelopes[owner])
            makers += [name] * (owner in self._envelopes[name])
            if not makers:
                continue
            other = cohort.parties[name]
            wrapper = wrapping_party(gone, other, makers)
            wrapped = self._envelopes[wrapper.name][name if wrapper is gone else owner].wrapped
            try:
                key = mask_key(pair, self._context, gone, other, wrapped, wrapper=wrapper)
            except ValueError as error:
                raise FalseMessage(wrapper.name, str(error)) from None
            # What the survivor added is taken off, and the other way round.
            (minus if pair_sign(other.index, gone.index) > 0 else plus).append(key)

    def _is_committed(self, kind: str, owner: str, holder: str, share: bytes) -> bool:
        envelope = self._envelopes[owner][holder]
        commitment = envelope.seed_share if kind == SEED_SHARE else envelope.mask_share
        return len(share) == SHARE_BYTES and opens(
            commitment, self._context, kind, share, owner=owner, holder=holder
        )

    def _formed(self) -> Cohort:
        if self._cohort is None:
            raise RuntimeError("form() comes first")
        return self._cohort

    def _enough(self, names: Mapping[str, object] | set[str]) -> tuple[str, ...]:
        """Return some sites, sorted, if they and those near each sender are enough to go on."""
        cohort = self._formed()
        if len(names) < cohort.threshold:
            raise TooFew(len(names), cohort.threshold)
        for owner in self._senders or names:
            left = sum(holder in names for holder in self._envelopes[owner])
            if left < cohort.graph.threshold:
                raise TooFew(left, cohort.graph.threshold, owner)
        return tuple(sorted(names))


class _Rebuilding:
    """Puts secrets together from shares; the weights of one set of holders are made once."""

    def __init__(self, threshold: int) -> None:
        self._threshold = threshold
        self._weights: dict[tuple[int, ...], Weights] = {}

    def __call__(self, shares: Mapping[int, bytes], owner: str) -> bytes:
        points = tuple(sorted(shares)[: self._threshold])
        if points not in self._weights:
            self._weights[points] = Weights.at(points, self._threshold)
        try:
            return self._weights[points].combine(shares)
        except ValueError:
            raise FalseMessage(owner, "the shares that it made do not fit together") from None
