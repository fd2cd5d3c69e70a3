"""What coordinator and sites say to each other, free of any transport."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from lepton_fed.core.digests import canonical_json
from lepton_fed.core.layout import Vector
from lepton_fed.errors import Problem

__all__ = [
    "MODEL",
    "Ask",
    "Octets",
    "Offer",
    "OfferReply",
    "Phase",
    "PhaseAsk",
    "PhaseReply",
    "PushReply",
    "PushStep",
    "Reply",
    "Update",
    "ask_digest",
    "legible",
]

MODEL = "model"
"""Name of the vector that holds the model itself in an ask; a strategy's vectors go beside it."""


@dataclass(frozen=True)
class Update:
    """What one site contributes in a round.

    Args:
        layout: Digest of the layout of its vectors.
        vectors: Flat float32 vectors over the shared tensors, by name; the strategy says which. One
            that gets its noise later is float64: rounding comes after noise.
        weight: Weight in the mean, in (0, weight bound].
        norms: Euclidean norm of each vector before it was clipped, for the site's receipt; it does
            not leave the site.
    """

    layout: str
    vectors: Mapping[str, npt.NDArray[np.floating]]
    weight: float
    norms: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Ask:
    """What the coordinator asks of one site.

    Args:
        agreement: Digest of what the site agreed to: run, task, strategy, rounds, seed, privacy.
        layout: Digest of the model's layout.
        round_number: Round, from 1.
        train: Whether to train and send an update.
        evaluate: Whether to evaluate the model as received and send the counts.
        vectors: The model and what the strategy sends beside it, by name.
        limit_s: Seconds after which the coordinator no longer waits, as far as it knows; 0 when it
            does not. Beyond it the site would work for nothing, and miss the next round too.
        clip: Norm to which updates are clipped in this round, where client-level DP lets it follow
            their norms; 0 where it does not.
    """

    agreement: str
    layout: str
    round_number: int
    train: bool
    evaluate: bool
    vectors: Mapping[str, Vector]
    limit_s: float = 0.0
    clip: float = 0.0


def ask_digest(ask: Ask) -> str:
    """Return the SHA-256 of everything in an ask but its time limit, 64 hexadecimal digits."""
    head = {name: getattr(ask, name) for name in ("agreement", "layout", "round_number", "clip")}
    digests = {
        name: hashlib.sha256(np.ascontiguousarray(vector, "<f4").data).hexdigest()
        for name, vector in ask.vectors.items()
    }
    told = {**head, "train": ask.train, "evaluate": ask.evaluate, "vectors": digests}
    return hashlib.sha256(canonical_json(told)).hexdigest()


@dataclass(frozen=True)
class Reply:
    """What came back from a site.

    Args:
        site: Name of the site, as the transport knows it, never as the message claims it.
        update: The update; None when the site did not train.
        counts: Evaluation counts, ``[metrics plan's size]`` float64; None when it did not evaluate.
        refusal: Why there is neither; None when all went well.
        sent_bytes: Bytes of the reply's payload.
        epsilon: Epsilon its records have spent in this run, when the site says so; a refusal may
            say it too.
        noise_multiplier: Noise standard deviation over clipping norm, when the site says so.
        again: Whether it is an earlier answer to the same ask, for the site's receipt; it does not
            leave the site.
    """

    site: str
    update: Update | None = None
    counts: npt.NDArray[np.float64] | None = None
    refusal: Problem | None = None
    sent_bytes: int = 0
    epsilon: float | None = None
    noise_multiplier: float | None = None
    again: bool = False


Phase = Literal["advertise", "share", "mask", "confirm", "reveal"]
"""A phase of secure aggregation; in ``share`` the site trains, in ``mask`` its update leaves."""


class Octets(Protocol):
    """Bytes that are read by slices: an array in memory, or a file."""

    @property
    def size(self) -> int:
        """Return how many there are."""

    def __getitem__(self, part: slice, /) -> npt.NDArray[np.uint8]:
        """Return some of them."""


@dataclass(frozen=True)
class PhaseAsk:
    """A phase of secure aggregation that the coordinator asks of one site.

    Args:
        phase: Which.
        attempt: Attempt at the round, from 1.
        body: What it says, as :mod:`lepton_fed.privacy.secagg.requests` has it.
        ask: The round; its vectors are there in ``share`` alone.
    """

    phase: Phase
    attempt: int
    body: bytes
    ask: Ask


@dataclass(frozen=True)
class PhaseReply:
    """What came back from a site in a phase.

    Args:
        site: Name of the site, as the transport knows it.
        body: What it says; empty with a refusal.
        masked: Its masked vector, packed, in ``mask`` alone.
        refusal: Why there is neither; None when all went well.
        accused: Whose message the site could not use, with a refusal; empty when the
            coordinator's own was wrong.
        sent_bytes: Bytes of the masked vector.
        words: How many numbers it has, for the site's receipt.
        norms: Largest norm of the update's vectors before and after clipping, for the site's
            receipt in ``mask``; they do not leave the site.
        notes: What else the receipt says, by name; it does not leave the site.
    """

    site: str
    body: bytes = b""
    masked: Octets | None = None
    refusal: Problem | None = None
    accused: str = ""
    sent_bytes: int = 0
    words: int = 0
    norms: tuple[float, float] = (0.0, 0.0)
    notes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Offer:
    """A run that the coordinator offers a site.

    Args:
        agreement: The agreement, canonical JSON.
        roster: The coordinator's roster, as the signed file holds it.
    """

    agreement: bytes
    roster: bytes


@dataclass(frozen=True)
class OfferReply:
    """What a site says to an offer.

    Args:
        site: Name of the site, as the transport knows it.
        agreement: Digest of what it agrees to; empty with a refusal.
        refusal: Why it does not take part; None when it does.
        version: Version of lepton-fed that it says it runs; empty when it does not say.
        budget_left: Epsilon of its data set's budget that it says is free, at the budget's delta
            and after this run; None when it says nothing.
    """

    site: str
    agreement: str = ""
    refusal: Problem | None = None
    version: str = ""
    budget_left: float | None = None


@dataclass(frozen=True)
class PushStep:
    """One step of handing a bundle to a site: ``begin``, then chunks of files, then ``finish``.

    Args:
        step: begin, chunk or finish.
        bundle: SHA-256 of the manifest, 64 hexadecimal digits.
        manifest: Bytes of the manifest (begin only).
        signature: Bytes of the signature file (begin only).
        file: Name of the file (chunk only).
        offset: Where the data belongs in it (chunk only).
        data: Bytes (chunk only).
    """

    step: Literal["begin", "chunk", "finish"]
    bundle: str
    manifest: bytes = b""
    signature: bytes = b""
    file: str = ""
    offset: int = 0
    data: bytes = b""


@dataclass(frozen=True)
class PushReply:
    """What a site says to a step.

    Args:
        site: Name of the site, as the transport knows it.
        have: Bytes of each listed file that the site has already, so that a push goes on where it
            stopped.
        in_force: Version of the bundle's task that is in use at the site; 0 for none.
        refusal: Why the bundle is refused; None when all went well.
    """

    site: str
    have: Mapping[str, int] = field(default_factory=dict)
    in_force: int = 0
    refusal: Problem | None = None


def legible(text: str, longest: int) -> str:
    r"""Return a stranger's text cut short and free of control characters.

    It ends up in logs and on terminals, where an escape sequence would be obeyed.

    Args:
        text: What came from the other side.
        longest: Largest number of characters.

    Example:
        >>> legible("no rows\x1b[2J", 9)
        'no rows?['
    """
    return "".join(c if c.isprintable() else "?" for c in text[:longest])
