"""What the coordinator asks in each phase, and what a site answers, as they travel: plain JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

from lepton_fed.core.decode import decode, strict_json
from lepton_fed.core.digests import canonical_json
from lepton_fed.privacy.secagg.messages import FalseMessage

__all__ = [
    "AdvertReply",
    "AdvertRequest",
    "ConfirmReply",
    "ConfirmRequest",
    "MaskRequest",
    "RevealReply",
    "RevealRequest",
    "ShareReply",
    "ShareRequest",
    "packed_body",
    "read_body",
]

Wire = dict[str, str]
Body = TypeVar("Body")


@dataclass(frozen=True)
class AdvertRequest:
    """Asks for the public halves of a site's keys.

    Args:
        roster: Digest of the roster that the coordinator goes by.
    """

    roster: str


@dataclass(frozen=True)
class AdvertReply:
    """Gives them.

    Args:
        advert: The site's advert.
    """

    advert: Wire


@dataclass(frozen=True)
class ShareRequest:
    """Says who is in the cohort.

    Args:
        roster: Digest of the roster that the coordinator goes by.
        adverts: Of the whole cohort, in the order of their names.
        threshold: How many shares give a secret.
    """

    roster: str
    adverts: list[Wire]
    threshold: int


@dataclass(frozen=True)
class ShareReply:
    """Hands out shares.

    Args:
        envelopes: One for each site of the cohort.
    """

    envelopes: list[Wire]


@dataclass(frozen=True)
class MaskRequest:
    """Asks for the masked vector, which comes back beside an empty body.

    Args:
        roster: Digest of the roster that the coordinator goes by.
        envelopes: Those for this site, in the order of their senders' names.
        senders: Whose envelopes came in time, sorted; their vectors are masked with each other.
    """

    roster: str
    envelopes: list[Wire]
    senders: list[str]


@dataclass(frozen=True)
class ConfirmRequest:
    """Asks for a signature over who is in the sum.

    Args:
        roster: Digest of the roster that the coordinator goes by.
        survivors: Whose masked vectors came, sorted.
    """

    roster: str
    survivors: list[str]


@dataclass(frozen=True)
class ConfirmReply:
    """Confirms.

    Args:
        confirmation: The site's signature.
    """

    confirmation: Wire


@dataclass(frozen=True)
class RevealRequest:
    """Asks for the shares that take the masks off the sum.

    Args:
        roster: Digest of the roster that the coordinator goes by.
        survivors: As confirmed.
        dropped: Whose envelopes came and whose vectors did not, sorted.
        confirmations: Of enough survivors.
        advert: Whether to give the advert of the next round too.
    """

    roster: str
    survivors: list[str]
    dropped: list[str]
    confirmations: list[Wire]
    advert: bool


@dataclass(frozen=True)
class RevealReply:
    """What opens the sum.

    Args:
        shares: The shares.
        advert: For the first attempt at the next round; empty when it was not asked for.
    """

    shares: dict[str, Wire]
    advert: Wire = field(default_factory=dict)


def packed_body(body: object) -> bytes:
    """Return a request or a reply as it travels."""
    return canonical_json(body)


def read_body(kind: type[Body], content: bytes) -> Body:
    """Return the request or reply that came; its messages are not looked at.

    Raises:
        FalseMessage: It is none of this kind.
    """
    if b"\\" in content:  # names and digits need none, and half a letter cannot be written again
        raise FalseMessage("", "malformed: an escaped character")
    try:
        return decode(kind, strict_json(content))
    except ValueError as error:
        raise FalseMessage("", f"malformed: {error}") from None
