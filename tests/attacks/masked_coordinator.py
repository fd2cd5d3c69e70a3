"""A coordinator of a masked run that says what a test has it say, and notes what sites give."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lepton_fed.core.exchange import PhaseAsk, PhaseReply
from lepton_fed.privacy.masked_plan import roster_digest
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
from tests.unit.server.masked_world import MaskedWorld

NAMES = tuple("abcdef")
VICTIM = "a"
THRESHOLD = 4
Wire = dict[str, str]


class Liar:
    """A coordinator that says what a test has it say.

    Args:
        world: The sites.
    """

    def __init__(self, world: MaskedWorld) -> None:
        self.world = world
        self.digest = roster_digest(world.roster)
        self.adverts: dict[str, Wire] = {}
        self.envelopes: dict[str, list[Wire]] = {}
        self.masked: dict[str, list[bytes]] = {}
        self.shares: dict[str, list[dict[str, Wire]]] = {}
        self.confirmations: dict[str, Wire] = {}

    def asked(
        self, phase: Any, request: object, number: int = 1, attempt: int = 1, **changes: Any
    ) -> PhaseAsk:
        ask = replace(self.world.ask(number), **changes)
        if phase != "share" and "vectors" not in changes:
            ask = replace(ask, vectors={})
        return PhaseAsk(phase, attempt, packed_body(request), ask)

    def send(self, name: str, asked: PhaseAsk) -> PhaseReply:
        """Ask a site, and note what it gave away."""
        reply = self.world.take(name, asked)
        if reply.masked is not None:
            vector = reply.masked[:].tobytes()
            if vector not in self.masked.setdefault(name, []):
                self.masked[name].append(vector)
        if asked.phase == "reveal" and reply.refusal is None:
            shares = read_body(RevealReply, reply.body).shares
            if shares not in self.shares.setdefault(name, []):
                self.shares[name].append(shares)
        return reply

    def refused(self, name: str, asked: PhaseAsk, code: str = "LF4514") -> str:
        """Assert that a site refuses with nothing but a sentence, and remembers nothing of it."""
        before = self.memory(name)
        reply = self.send(name, asked)
        assert reply.refusal is not None
        assert reply.refusal.code == code, reply.refusal
        assert (reply.body, reply.masked, reply.sent_bytes) == (b"", None, 0)
        after = self.memory(name)
        assert after.keys() == before.keys()
        for path, content in before.items():
            if path.endswith(".json"):
                found, known = json.loads(after[path]), json.loads(content)
                found["member"].pop("coming")  # fresh random numbers, of no attempt yet
                known["member"].pop("coming")
                assert found == known
            else:
                assert after[path] == content
        return reply.refusal.what

    def memory(self, name: str) -> dict[str, bytes]:
        folder = self.world.root / "sites" / name
        found = folder.glob("*") if folder.is_dir() else []
        return {path.name: path.read_bytes() for path in found}

    def require_nothing_twice(self) -> None:
        """Assert that nobody gave away two vectors of a round, or both shares of anybody."""
        assert all(len(vectors) == 1 for vectors in self.masked.values())
        for answers in self.shares.values():
            (shares,) = answers
            assert not set(shares["seeds"]) & set(shares["masks"])
        assert all(calls == 1 for calls in self.world.answered.values()), "trained twice"

    # --- a round as it should be, as far as a test wants it

    def to_adverts(self, number: int = 1, attempt: int = 1, **changes: Any) -> Liar:
        for name in self.world.names:
            asked = self.asked("advertise", AdvertRequest(self.digest), number, attempt, **changes)
            reply = self.send(name, asked)
            if reply.refusal is None:
                self.adverts[name] = read_body(AdvertReply, reply.body).advert
        return self

    def share(self, names: Sequence[str] = NAMES, threshold: int = THRESHOLD) -> ShareRequest:
        return ShareRequest(self.digest, [self.adverts[name] for name in names], threshold)

    def to_shares(self, number: int = 1, attempt: int = 1, **changes: Any) -> Liar:
        self.to_adverts(number, attempt, **changes)
        for name in self.world.names:
            reply = self.send(name, self.asked("share", self.share(), number, attempt, **changes))
            if reply.refusal is None:
                self.envelopes[name] = read_body(ShareReply, reply.body).envelopes
        return self

    def inbox(self, name: str, senders: Sequence[str] = NAMES) -> list[Wire]:
        at = NAMES.index(name)
        return [self.envelopes[sender][at] for sender in senders if sender != name]

    def mask(self, name: str, senders: Sequence[str] = NAMES) -> MaskRequest:
        return MaskRequest(self.digest, self.inbox(name, senders), list(senders))

    def to_masks(self, number: int = 1, senders: Sequence[str] = NAMES) -> Liar:
        self.to_shares(number)
        for name in senders:
            reply = self.send(name, self.asked("mask", self.mask(name, senders), number))
            assert reply.masked is not None
        return self

    def confirm(self, survivors: Sequence[str] = NAMES) -> ConfirmRequest:
        return ConfirmRequest(self.digest, list(survivors))

    def to_confirmations(self, survivors: Sequence[str] = NAMES, number: int = 1) -> Liar:
        self.to_masks(number)
        for name in survivors:
            reply = self.send(name, self.asked("confirm", self.confirm(survivors), number))
            self.confirmations[name] = read_body(ConfirmReply, reply.body).confirmation
        return self

    def reveal(
        self,
        survivors: Sequence[str] = NAMES,
        dropped: Sequence[str] = (),
        signed: Sequence[Wire] | None = None,
        *,
        advert: bool = False,
    ) -> RevealRequest:
        wires = list(self.confirmations.values()) if signed is None else list(signed)
        return RevealRequest(self.digest, list(survivors), list(dropped), wires, advert)

    def to_the_end(self, survivors: Sequence[str] = NAMES[:5], number: int = 1) -> Liar:
        self.to_confirmations(survivors, number)
        dropped = [name for name in NAMES if name not in survivors]
        for name in survivors:
            assert not self.send(
                name, self.asked("reveal", self.reveal(survivors, dropped), number)
            ).refusal
        return self
