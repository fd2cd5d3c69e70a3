"""A message counts only from whom it should come, to whom it was meant, for what was asked."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from lepton_fed.core.exchange import (
    MODEL,
    Ask,
    Offer,
    OfferReply,
    PushReply,
    PushStep,
    Reply,
    Update,
)
from lepton_fed.errors import Problem, UpdateRefused
from lepton_fed.flower.grid import InProcessGrid
from lepton_fed.flower.seal import COORDINATOR, Sealing, contents_digest, new_nonce, nonce_of
from lepton_fed.flower.transport import GridTransport, Seals
from lepton_fed.flower.worker import site_app
from lepton_fed.identity.signature import PrivateKey

COORDINATORS, NORTH, EAST = (PrivateKey.from_private_bytes(bytes([n]) * 32) for n in (1, 2, 3))
SEAL = Sealing("train", COORDINATOR, "north", "ab" * 16)


def records() -> RecordDict:
    vector = np.arange(3, dtype="<f4")
    array = Array("float32", (3,), "lepton.f4le", vector.tobytes())
    head = ConfigRecord({"round": 1, "train": True, "names": ["a", "b"], "raw": b"\x01", "x": 0.5})
    return RecordDict({"head": head, "vectors": ArrayRecord({MODEL: array})})


def test_sealed_records_come_back_as_they_were() -> None:
    sealed = SEAL.seal(records(), COORDINATORS)
    assert nonce_of(sealed) == "ab" * 16
    opened = SEAL.check(sealed, COORDINATORS.public_key())
    assert set(opened) == {"head", "vectors"}
    assert contents_digest(opened) == contents_digest(records())


@pytest.mark.parametrize(
    "other",
    [
        replace(SEAL, purpose="evaluate"),
        replace(SEAL, author="north"),
        replace(SEAL, reader="east"),
        replace(SEAL, nonce="cd" * 16),
    ],
)
def test_a_seal_is_worth_nothing_for_anything_else(other: Sealing) -> None:
    sealed = SEAL.seal(records(), COORDINATORS)
    with pytest.raises(UpdateRefused, match="without the seal"):
        other.check(sealed, COORDINATORS.public_key())


def test_another_key_s_seal_is_refused() -> None:
    with pytest.raises(UpdateRefused):
        SEAL.check(SEAL.seal(records(), NORTH), COORDINATORS.public_key())


def changed_round(record: RecordDict) -> None:
    record["head"]["round"] = 2


def changed_type(record: RecordDict) -> None:
    record["head"]["round"] = 1.0


def changed_flag(record: RecordDict) -> None:
    record["head"]["train"] = 1


def changed_list(record: RecordDict) -> None:
    record["head"]["names"] = ["a,b"]


def changed_bytes(record: RecordDict) -> None:
    record["head"]["raw"] = "01"


def changed_array(record: RecordDict) -> None:
    old = record["vectors"][MODEL]
    record["vectors"][MODEL] = Array(old.dtype, old.shape, old.stype, b"\x00" * 12)


def changed_name(record: RecordDict) -> None:
    record["vectors"]["other"] = record["vectors"].pop(MODEL)


def added_record(record: RecordDict) -> None:
    record["more"] = ConfigRecord({})


def added_metrics(record: RecordDict) -> None:
    record["more"] = MetricRecord({"loss": math.nan})


def removed_record(record: RecordDict) -> None:
    del record["vectors"]


def no_text(record: RecordDict) -> None:
    record["head"]["names"] = ["\ud800", "b"]


CHANGES = [changed_round, changed_type, changed_flag, changed_list, changed_bytes, changed_array,
           changed_name, added_record, added_metrics, removed_record, no_text]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_under_a_seal_can_be_changed(change: Callable[[RecordDict], None]) -> None:
    sealed = SEAL.seal(records(), COORDINATORS)
    change(sealed)
    with pytest.raises(UpdateRefused):
        SEAL.check(sealed, COORDINATORS.public_key())


@pytest.mark.parametrize("seal", [None, {}, {"signature": "text"}, {"signature": b"short"}])
def test_a_missing_or_malformed_seal_is_refused(seal: dict[str, Any] | None) -> None:
    record = records()
    if seal is not None:
        record["seal"] = ConfigRecord(seal)
    assert nonce_of(record) == ""
    with pytest.raises(UpdateRefused):
        SEAL.check(record, COORDINATORS.public_key())


def test_no_two_asks_share_a_nonce() -> None:
    assert len({new_nonce() for _ in range(100)}) == 100


class Agent:
    """A site that answers what the tests want, and keeps what it was asked."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.seen: list[object] = []

    def asked(self, ask: Ask) -> Reply:
        self.seen.append(ask)
        return Reply(self.name, update=Update("layout", {"delta": np.ones(3, np.float32)}, 1.0))

    def offered(self, offer: Offer) -> OfferReply:
        self.seen.append(offer)
        return OfferReply(self.name, refusal=Problem("LF4601", "not this model"))

    def pushed(self, step: PushStep) -> PushReply:
        self.seen.append(step)
        return PushReply(self.name, {"model.onnx": 17}, 4)


ASK = Ask("agreement", "layout", 1, True, False, {MODEL: np.zeros(3, np.float32)})


def network(
    keys: dict[str, PrivateKey], coordinator: PrivateKey = COORDINATORS
) -> tuple[GridTransport, dict[str, Agent]]:
    """Sites with these keys under a coordinator whose roster has north and east."""
    agents = {name: Agent(name) for name in keys}
    apps = {
        index: site_app(agents[name], name, key, COORDINATORS.public_key())
        for index, (name, key) in enumerate(keys.items())
    }

    def answer(message: Message, context: Any) -> Message:
        return apps[int(context.node_config["index"])](message, context)

    grid = InProcessGrid(answer, [{"index": index} for index in apps])  # type: ignore[arg-type]
    nodes = dict(zip(keys, grid.get_node_ids(), strict=True))
    roster = {"north": NORTH.public_key(), "east": EAST.public_key()}
    return GridTransport(grid, nodes, seals=Seals(coordinator, roster)), agents


def test_asks_offers_and_pushes_go_there_and_back_under_seals() -> None:
    line, agents = network({"north": NORTH, "east": EAST})
    replies = list(line.exchange({"north": ASK, "east": ASK}))
    assert [(r.site, r.update is not None) for r in replies] == [("north", True), ("east", True)]
    line.offer({"north": Offer(b"agreement", b"roster")}, 60.0)
    (offered,) = line.offer_replies()
    assert line.offer_replies() == []
    assert offered.refusal == Problem("LF4601", "not this model", where="north")
    step = PushStep("chunk", "ab" * 32, file="model.onnx", offset=17, data=b"\x00\xff")
    (pushed,) = line.push({"east": step})
    assert pushed == PushReply("east", {"model.onnx": 17}, 4)
    assert agents["east"].seen[-1] == step


def test_a_site_that_signs_with_another_s_key_counts_for_nobody() -> None:
    line, _ = network({"north": EAST, "east": EAST})
    replies = {reply.site: reply for reply in line.exchange({"north": ASK, "east": ASK})}
    refusal = replies["north"].refusal
    assert refusal is not None
    assert refusal.code == "LF4414"
    assert replies["east"].update is not None


def test_a_coordinator_with_another_key_than_the_pinned_one_is_not_answered() -> None:
    line, agents = network({"north": NORTH}, coordinator=EAST)
    (reply,) = line.exchange({"north": ASK})
    assert reply.update is None
    assert agents["north"].seen == []


def test_an_old_reply_does_not_answer_a_new_ask() -> None:
    """A node that keeps its neighbour's reply to round 1 and sends it again in round 2."""
    kept: list[RecordDict] = []
    honest = site_app(Agent("north"), "north", NORTH, COORDINATORS.public_key())

    def replay(message: Message, context: Any) -> Message:
        if not kept:
            kept.append(honest(message, context).content)
        return Message(kept[0], reply_to=message)

    grid = InProcessGrid(replay, [{}])  # type: ignore[arg-type]
    seals = Seals(COORDINATORS, {"north": NORTH.public_key()})
    line = GridTransport(grid, {"north": 2}, seals=seals)
    (first,) = line.exchange({"north": ASK})
    (second,) = line.exchange({"north": replace(ASK, round_number=2)})
    assert first.update is not None
    assert second.refusal is not None
    assert second.refusal.code == "LF4414"


def test_what_is_sealed_with_a_key_that_was_replaced_is_refused_also_in_flight() -> None:
    line, agents = network({"north": NORTH, "east": EAST})
    new = PrivateKey.generate()
    roster = {"north": new.public_key(), "east": EAST.public_key()}
    nodes = {"north": 2, "east": 3}

    class Renewing(Agent):
        """While it answers, the coordinator takes in a new roster."""

        def asked(self, ask: Ask) -> Reply:
            line.renew(nodes, Seals(COORDINATORS, roster))
            return super().asked(ask)

    agents["north"].__class__ = Renewing
    replies = {reply.site: reply for reply in line.exchange({"north": ASK, "east": ASK})}
    refusal = replies["north"].refusal
    assert refusal is not None
    assert refusal.code == "LF4414"
    assert replies["east"].update is not None


def test_a_site_that_was_taken_off_the_roster_is_neither_asked_nor_heard() -> None:
    line, agents = network({"north": NORTH, "east": EAST})

    class Leaving(Agent):
        """While it answers, it is taken off the roster."""

        def asked(self, ask: Ask) -> Reply:
            line.renew({"east": 3}, Seals(COORDINATORS, {"east": EAST.public_key()}))
            return super().asked(ask)

    agents["north"].__class__ = Leaving
    codes = {reply.site: reply.refusal for reply in line.exchange({"north": ASK, "east": ASK})}
    assert codes["north"] is not None
    assert codes["north"].code == "LF4414"
    assert codes["east"] is None
    asked = len(agents["north"].seen)
    replies = {reply.site: reply.refusal for reply in line.exchange({"north": ASK, "east": ASK})}
    assert replies["north"] is not None
    assert replies["north"].code == "LF5304"
    assert replies["east"] is None
    assert len(agents["north"].seen) == asked
    assert list(line.sites()) == ["east"]
