"""What sites tell each other through the coordinator in one attempt at a round, each word signed.

An attempt has four messages of a site, after the advert that it gave with its last one:

====================  ==============================================  =======================
phase                 the coordinator hands on                        the site answers
====================  ==============================================  =======================
``share``             the adverts of the cohort                       an envelope per holder
``mask``              who takes part, the envelopes for this site     its masked vector
``confirm``           whose vectors are in the sum                    its signature over that
``reveal``            signatures over one and the same list           shares, its next advert
====================  ==============================================  =======================

Lists of sites are those of the whole cohort, also where a site deals with some of it only (see
:mod:`lepton_fed.privacy.secagg.graph`), so that one confirmation is worth the same to all.

Every signature is by the site's identity key, which everybody pinned with the roster, and over a
body that names protocol, run, round, attempt, roster, task and layout, so that nothing signed for
one attempt is worth anything in another.

References:
    K. Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning",
    CCS 2017, figure 4, with the steps that its section 6 adds against an active adversary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

from lepton_fed.identity.signature import (
    SIGNATURE_BYTES,
    PrivateKey,
    check_payload,
    sign_payload,
)
from lepton_fed.identity.signature import PublicKey as IdentityKey
from lepton_fed.privacy.secagg.context import COMMITMENT_BYTES, Context
from lepton_fed.privacy.secagg.envelopes import envelope_bytes
from lepton_fed.privacy.secagg.graph import Graph, Graphs
from lepton_fed.privacy.secagg.keys import WRAPPED_BYTES, Party, PublicKey
from lepton_fed.privacy.secagg.shamir import SHARE_BYTES

__all__ = [
    "Advert",
    "Cohort",
    "Confirmation",
    "Envelope",
    "FalseMessage",
    "Reveal",
    "Wire",
    "require_list",
]

_ADVERT = "application/vnd.lepton-fed.secagg.advert.v1+json"
_ENVELOPE = "application/vnd.lepton-fed.secagg.envelope.v1+json"
_CONFIRMATION = "application/vnd.lepton-fed.secagg.confirmation.v1+json"


class FalseMessage(ValueError):
    """A message that is not as an honest sender makes it; nothing of it was used.

    Args:
        sender: Who is to blame, as far as signatures can tell: a site's name, or empty for the
            coordinator.
        why: What is wrong with it.
    """

    def __init__(self, sender: str, why: str) -> None:
        super().__init__(f"{sender or 'the coordinator'}: {why}")
        self.sender = sender
        self.why = why


Wire = dict[str, str]
"""A message as plain text fields; bytes are hexadecimal digits."""


def _unhex(unverified: Mapping[str, object], names: Sequence[str], kind: str) -> list[Any]:
    """Return the fields of a message that came as text; bytes but for those that are names."""
    if set(unverified) != set(names):
        raise FalseMessage("", f"no {kind}: other fields than {', '.join(names)}")
    found: list[Any] = []
    for name in names:
        text = unverified[name]
        if not isinstance(text, str):
            raise FalseMessage("", f"no {kind}: its {name} is no text")
        if name in _TEXTS:
            found.append(text)
            continue
        try:
            found.append(bytes.fromhex(text))
        except ValueError:
            raise FalseMessage("", f"no {kind}: its {name} is not hexadecimal") from None
    return found


_TEXTS = ("name", "sender", "recipient")


def require_list(names: Sequence[str], what: str, *, within: Iterable[str]) -> None:
    """Refuse a list that is not sorted, or names a site twice or one that it may not.

    Args:
        names: The list.
        what: What it is a list of, for the message.
        within: The sites that it may name.

    Raises:
        FalseMessage: It is such a list.
    """
    if list(names) != sorted(set(names)):
        raise FalseMessage("", f"the {what} are not a sorted list of different sites")
    strangers = sorted(set(names) - set(within))
    if strangers:
        raise FalseMessage("", f"{strangers[0]} cannot be among the {what}")


@dataclass(frozen=True)
class Advert:
    """The public halves of a site's keys for one attempt, and what it commits to.

    Args:
        name: Name of the site.
        mask: Public half of its mask pair.
        envelope: Public half of its envelope pair.
        self_mask: Commitment to the seed of its own mask, 32 bytes.
        signature: By the site's identity key, 64 bytes.
    """

    name: str
    mask: PublicKey
    envelope: PublicKey
    self_mask: bytes
    signature: bytes = b""

    def wire(self) -> Wire:
        """Return the advert as it travels."""
        return {
            "name": self.name,
            "mask": self.mask.encode().hex(),
            "envelope": self.envelope.encode().hex(),
            "self_mask": self.self_mask.hex(),
            "signature": self.signature.hex(),
        }

    @classmethod
    def parse(cls, unverified: Mapping[str, object]) -> Advert:
        """Return the advert that came; nothing of it is checked but its form.

        Raises:
            FalseMessage: It has not the form of an advert.
        """
        names = ("name", "mask", "envelope", "self_mask", "signature")
        name, mask, envelope, seed, signature = _unhex(unverified, names, "advert")
        try:
            keys = PublicKey.parse(mask), PublicKey.parse(envelope)
        except ValueError as error:
            raise FalseMessage("", str(error)) from None
        return cls(name, *keys, seed, signature)

    def body(self, context: Context) -> bytes:
        """Return what is signed."""
        return context.bind(
            "advert",
            name=self.name,
            mask=self.mask.encode().hex(),
            envelope=self.envelope.encode().hex(),
            self_mask=self.self_mask.hex(),
        )

    def signed(self, context: Context, identity: PrivateKey) -> Advert:
        """Return the advert with its signature."""
        return replace(self, signature=sign_payload(identity, _ADVERT, self.body(context)))

    def check(self, context: Context, identity: IdentityKey, *, post_quantum: bool) -> None:
        """Refuse an advert that its site did not make for this attempt.

        Raises:
            FalseMessage: It is not signed by the site, or not of the kind that was agreed on.
        """
        if len(self.self_mask) != COMMITMENT_BYTES:
            raise FalseMessage(self.name, f"a commitment of {len(self.self_mask)} bytes")
        if not check_payload(identity, _ADVERT, self.body(context), self.signature):
            raise FalseMessage("", f"the advert of {self.name} is not signed by it for this round")
        if any(bool(key.kem) != post_quantum for key in (self.mask, self.envelope)):
            raise FalseMessage(self.name, "its keys are not of the kind that was agreed on")


@dataclass(frozen=True)
class Cohort:
    """The sites of an attempt, and how many of them must stay.

    Args:
        context: The attempt.
        adverts: Of each site, in the order of their names; signatures are checked elsewhere.
        threshold: How many must stay and confirm; in the complete graph so many shares give a
            secret, too.
        graphs: Gives the graph of so many sites; another than the default only to see it at work
            on a few sites.
        subject: Digest of what all of them were asked, the model among it. Who is asked something
            else signs another cohort, and is masked with nobody.

    Raises:
        FalseMessage: A site or a key is there twice, the order is another, or the threshold is not
            more than half of the sites.
    """

    context: Context
    adverts: tuple[Advert, ...]
    threshold: int
    graphs: Graphs = field(default=Graph.of, compare=False)
    subject: str = ""

    def __post_init__(self) -> None:
        names = self.names
        if list(names) != sorted(set(names)):
            raise FalseMessage("", "the cohort is not a sorted list of different sites")
        keys = [key.encode() for advert in self.adverts for key in (advert.mask, advert.envelope)]
        if len(set(keys)) != len(keys):
            raise FalseMessage("", "two sites of the cohort have the same key")
        if not len(names) < 2 * self.threshold <= 2 * len(names):
            raise FalseMessage(
                "", f"a threshold of {self.threshold} for {len(names)} sites is not more than half"
            )

    @classmethod
    def of(
        cls,
        context: Context,
        adverts: Iterable[Advert],
        threshold: int,
        graphs: Graphs = Graph.of,
        subject: str = "",
    ) -> Cohort:
        """Return the cohort of some adverts, in whatever order they came."""
        ordered = tuple(sorted(adverts, key=lambda advert: advert.name))
        return cls(context, ordered, threshold, graphs, subject)

    @cached_property
    def graph(self) -> Graph:
        """Return how many hold shares of a site's secrets, and how many of them give one."""
        return self.graphs(len(self.adverts), self.threshold)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Return the names of the sites, sorted."""
        return tuple(advert.name for advert in self.adverts)

    @cached_property
    def digest(self) -> str:
        """Return SHA-256 of all that every site of the cohort has to have in common, 64 digits."""
        adverts = [hashlib.sha256(advert.body(self.context)).hexdigest() for advert in self.adverts]
        graph = self.graph
        # The complete graph has nothing that is not said by the others.
        of_graph = {} if graph.is_complete else {"degree": graph.degree, "holders": graph.threshold}
        body = self.context.bind(
            "cohort",
            adverts=adverts,
            threshold=self.threshold,
            subject=self.subject,
            **of_graph,
        )
        return hashlib.sha256(body).hexdigest()

    @cached_property
    def parties(self) -> Mapping[str, Party]:
        """Return each site as keys are agreed with it, by name; indices are from 1."""
        return {
            advert.name: Party(index, advert.name, advert.mask, advert.envelope)
            for index, advert in enumerate(self.adverts, 1)
        }

    def advert(self, name: str) -> Advert:
        """Return a site's advert."""
        return self.adverts[self.parties[name].index - 1]

    def require(self, names: Sequence[str], what: str, *, within: Iterable[str]) -> None:
        """Refuse a list of sites that is not one that may be acted on.

        Args:
            names: The list.
            what: What it is a list of, for the message.
            within: The sites that it may name.

        Raises:
            FalseMessage: It is not sorted, names a site twice or one that it may not, or has fewer
                than the threshold.
        """
        require_list(names, what, within=within)
        if len(names) < self.threshold:
            raise FalseMessage("", f"{len(names)} {what} are below the threshold {self.threshold}")


@dataclass(frozen=True)
class Envelope:
    """Shares of one site's secrets for another, readable for that one alone.

    Args:
        sender: Who made it.
        recipient: Who can open it.
        sealed: Share of the mask secret and share of the seed, encrypted.
        wrapped: The pair secret of both, with post-quantum keys and unless the recipient's
            envelope is sure to have it; else empty.
        mask_share: Commitment to the share of the mask secret, 32 bytes.
        seed_share: Commitment to the share of the seed, 32 bytes.
        signature: By the sender's identity key, 64 bytes.
    """

    sender: str
    recipient: str
    sealed: bytes
    wrapped: bytes
    mask_share: bytes
    seed_share: bytes
    signature: bytes = b""

    def wire(self) -> Wire:
        """Return the envelope as it travels."""
        values = {part.name: getattr(self, part.name) for part in fields(self)}
        return {name: v if isinstance(v, str) else v.hex() for name, v in values.items()}

    @classmethod
    def parse(cls, unverified: Mapping[str, object]) -> Envelope:
        """Return the envelope that came; nothing of it is checked but its form.

        Raises:
            FalseMessage: It has not the form of an envelope.
        """
        return cls(*_unhex(unverified, [part.name for part in fields(cls)], "envelope"))

    def body(self, cohort: Cohort) -> bytes:
        """Return what is signed."""
        return cohort.context.bind(
            "envelope",
            cohort=cohort.digest,
            sender=self.sender,
            recipient=self.recipient,
            sealed=hashlib.sha256(self.sealed).hexdigest(),
            wrapped=hashlib.sha256(self.wrapped).hexdigest(),
            mask_share=self.mask_share.hex(),
            seed_share=self.seed_share.hex(),
        )

    @property
    def bound(self) -> bytes:
        """Return what goes beside the encrypted part and may not be exchanged."""
        return self.wrapped + self.mask_share + self.seed_share

    def signed(self, cohort: Cohort, identity: PrivateKey) -> Envelope:
        """Return the envelope with its signature."""
        return replace(self, signature=sign_payload(identity, _ENVELOPE, self.body(cohort)))

    def check(self, cohort: Cohort, identity: IdentityKey) -> None:
        """Refuse an envelope that its sender did not make for this cohort.

        Raises:
            FalseMessage: It is not signed by the sender, or a part of it has another length.
        """
        if not check_payload(identity, _ENVELOPE, self.body(cohort), self.signature):
            why = f"the envelope of {self.sender} is not signed by it for this round"
            raise FalseMessage("", why)
        self.check_form(cohort)

    def check_form(self, cohort: Cohort) -> None:
        """Refuse an envelope a part of which has another length than it should.

        Raises:
            FalseMessage: One has.
        """
        for commitment in (self.mask_share, self.seed_share):
            if len(commitment) != COMMITMENT_BYTES:
                raise FalseMessage(self.sender, f"a commitment of {len(commitment)} bytes")
        post_quantum = bool(cohort.advert(self.sender).mask.kem)
        size = envelope_bytes(2 * SHARE_BYTES, post_quantum=post_quantum)
        if len(self.sealed) != (0 if self.sender == self.recipient else size):
            raise FalseMessage(self.sender, f"an envelope of {len(self.sealed)} bytes")
        if len(self.wrapped) not in ((0, WRAPPED_BYTES) if post_quantum else (0,)):
            raise FalseMessage(self.sender, f"a pair secret wrapped in {len(self.wrapped)} bytes")


@dataclass(frozen=True)
class Confirmation:
    """A site's word on who is in the sum.

    Args:
        name: Name of the site.
        signature: Over cohort, senders and survivors, 64 bytes.
    """

    name: str
    signature: bytes

    def wire(self) -> Wire:
        """Return the confirmation as it travels."""
        return {"name": self.name, "signature": self.signature.hex()}

    @classmethod
    def parse(cls, unverified: Mapping[str, object]) -> Confirmation:
        """Return the confirmation that came; nothing of it is checked but its form.

        Raises:
            FalseMessage: It has not the form of a confirmation.
        """
        return cls(*_unhex(unverified, ("name", "signature"), "confirmation"))

    @staticmethod
    def body(cohort: Cohort, senders: Sequence[str], survivors: Sequence[str]) -> bytes:
        """Return what is signed.

        Args:
            cohort: The cohort.
            senders: Whose envelopes were handed out, hence who is masked with whom.
            survivors: Whose masked vectors are in the sum.
        """
        return cohort.context.bind(
            "confirmation", cohort=cohort.digest, senders=list(senders), survivors=list(survivors)
        )

    @classmethod
    def signed(
        cls,
        name: str,
        identity: PrivateKey,
        cohort: Cohort,
        senders: Sequence[str],
        survivors: Sequence[str],
    ) -> Confirmation:
        """Return a site's confirmation."""
        body = cls.body(cohort, senders, survivors)
        return cls(name, sign_payload(identity, _CONFIRMATION, body))

    def is_over(self, body: bytes, identity: IdentityKey) -> bool:
        """Return whether the site signed these very lists; ``body`` is :meth:`body` of them."""
        return len(self.signature) == SIGNATURE_BYTES and check_payload(
            identity, _CONFIRMATION, body, self.signature
        )


@dataclass(frozen=True)
class Reveal:
    """The shares that a site gives up, of those that it holds: of each site one kind, never both.

    Args:
        seeds: Share of the seed of each survivor, by name, 33 bytes each.
        masks: Share of the mask secret of each site that dropped out, by name, 33 bytes each.
    """

    seeds: Mapping[str, bytes]
    masks: Mapping[str, bytes]

    def wire(self) -> dict[str, Wire]:
        """Return the shares as they travel."""
        return {
            "seeds": {name: share.hex() for name, share in self.seeds.items()},
            "masks": {name: share.hex() for name, share in self.masks.items()},
        }

    @classmethod
    def parse(cls, unverified: Mapping[str, object]) -> Reveal:
        """Return the shares that came; nothing of them is checked but their form.

        Raises:
            FalseMessage: They have not the form of shares.
        """
        if set(unverified) != {"seeds", "masks"}:
            raise FalseMessage("", "no shares: other fields than seeds, masks")
        return cls(*(_shares(unverified[kind]) for kind in ("seeds", "masks")))


def _shares(unverified: object) -> dict[str, bytes]:
    if not isinstance(unverified, Mapping):
        raise FalseMessage("", "no shares: not a table of them")
    try:
        return {str(name): bytes.fromhex(share) for name, share in unverified.items()}
    except (TypeError, ValueError):
        raise FalseMessage("", "no shares: one is not hexadecimal") from None
