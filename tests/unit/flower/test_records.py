from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto

from lepton_fed.core.exchange import Ask, OfferReply, Reply, Update
from lepton_fed.errors import Problem, UpdateRefused
from lepton_fed.flower.records import (
    ask_to_record,
    offer_reply_to_record,
    record_to_ask,
    record_to_offer_reply,
    record_to_reply,
    reply_to_record,
)

BITS = np.array([0, 0x80000000, 1, 0x7F7FFFFF, 0x7FC00000, 0xFF800000], dtype="<u4")
ASK = Ask(
    agreement="1" * 64,
    layout="2" * 64,
    round_number=3,
    train=True,
    evaluate=False,
    vectors={"model": BITS.view("<f4"), "control": np.ones(2, np.float32)},
    limit_s=12.5,
    clip=0.1,
)
REPLY = Reply(
    "site-1",
    update=Update("3" * 64, {"delta": BITS.view("<f4")}, 0.125),
    counts=np.array([1.0, 0.25, -0.0]),
    epsilon=1.5,
    noise_multiplier=0.75,
)


def sent(record: RecordDict) -> RecordDict:
    """The record as it comes out of flwr's wire format."""
    return recorddict_from_proto(recorddict_to_proto(record))


@pytest.mark.parametrize("wire", [sent, lambda record: record], ids=["wire", "process"])
def test_an_ask_comes_back_as_it_was(wire: Callable[[RecordDict], RecordDict]) -> None:
    found = record_to_ask(wire(ask_to_record(ASK)))
    for name in ("agreement", "layout", "round_number", "train", "evaluate", "limit_s", "clip"):
        assert getattr(found, name) == getattr(ASK, name)
        assert type(getattr(found, name)) is type(getattr(ASK, name))
    assert list(found.vectors) == list(ASK.vectors)
    for name, vector in ASK.vectors.items():
        assert found.vectors[name].dtype == np.float32
        assert found.vectors[name].tobytes() == vector.tobytes()


@pytest.mark.parametrize("wire", [sent, lambda record: record], ids=["wire", "process"])
def test_a_reply_comes_back_as_it_was(wire: Callable[[RecordDict], RecordDict]) -> None:
    found = record_to_reply("site-1", wire(reply_to_record(REPLY)))
    assert found.update is not None
    assert REPLY.update is not None
    assert (found.update.layout, found.update.weight) == ("3" * 64, 0.125)
    assert found.update.vectors["delta"].tobytes() == BITS.tobytes()
    assert found.counts is not None
    assert found.counts.dtype == np.float64
    assert found.counts.tobytes() == np.array([1.0, 0.25, -0.0]).tobytes()
    assert (found.epsilon, found.noise_multiplier, found.refusal) == (1.5, 0.75, None)
    assert found.sent_bytes == BITS.nbytes + 3 * 8


def test_a_refusal_comes_back_as_code_and_words() -> None:
    problem = Problem("LF4205", "refused by the site", where="secret path", remedy="secret")
    record = sent(reply_to_record(Reply("site-1", refusal=problem)))
    assert dict(record["head"]) == {"refusal": "LF4205", "why": "refused by the site"}
    found = record_to_reply("site-1", record)
    assert found.refusal == Problem("LF4205", "refused by the site", where="site-1")
    assert (found.update, found.counts, found.sent_bytes) == (None, None, 0)


def test_counts_without_an_update_come_back() -> None:
    found = record_to_reply("a", sent(reply_to_record(Reply("a", counts=np.zeros(2)))))
    assert found.update is None
    assert found.counts is not None


def test_a_site_is_who_was_asked_and_not_who_it_says_it_is() -> None:
    record = reply_to_record(REPLY)
    assert b"site-1" not in recorddict_to_proto(record).SerializeToString()
    record["head"]["site"] = "somebody-else"
    assert record_to_reply("asked", record).site == "asked"


@pytest.mark.parametrize("order", ["<f4", ">f4"])
@pytest.mark.parametrize("strided", [False, True])
def test_vectors_travel_as_little_endian_bytes(order: str, strided: bool) -> None:
    vector = np.arange(6).astype(order)[:: 2 if strided else 1]
    record = ask_to_record(Ask("", "", 1, True, True, {"model": vector}))
    array = record["vectors"]["model"]
    assert array.data == vector.astype("<f4").tobytes()
    assert (array.dtype, array.shape, array.stype) == ("float32", (len(vector),), "lepton.f4le")


def test_a_vector_is_read_without_a_copy_and_cannot_be_changed() -> None:
    record = sent(ask_to_record(ASK))
    vector = record_to_ask(record).vectors["control"]
    raw = np.frombuffer(record["vectors"]["control"].data, dtype="<f4")
    assert np.shares_memory(vector, raw)
    with pytest.raises(ValueError, match="read-only"):
        vector[0] = 1


def test_an_empty_vector_is_a_vector() -> None:
    empty = Reply("a", update=Update("l", {"delta": np.zeros(0, np.float32)}, 1.0))
    found = record_to_reply("a", sent(reply_to_record(empty)))
    assert found.update is not None
    assert found.update.vectors["delta"].shape == (0,)


def head(**fields: Any) -> RecordDict:
    """A good reply with fields of its head changed; a field that is None is taken away."""
    record = reply_to_record(REPLY)
    for name, value in fields.items():
        if value is None:
            del record["head"][name]
        else:
            record["head"][name] = value
    return record


def delta(*array: Any, name: str = "delta") -> RecordDict:
    record = reply_to_record(REPLY)
    record["vectors"] = ArrayRecord({name: Array(*array)})
    return record


def counts(*array: Any, name: str = "counts") -> RecordDict:
    record = reply_to_record(REPLY)
    record["counts"] = ArrayRecord({name: Array(*array)})
    return record


def other_kind(name: str, kind: Callable[[], Any]) -> RecordDict:
    record = reply_to_record(REPLY)
    return RecordDict({k: kind() if k == name else v for k, v in record.items()})


EIGHT = bytes(8)

MALFORMED = {
    "no head": RecordDict({"vectors": reply_to_record(REPLY)["vectors"]}),
    "nothing at all": RecordDict(),
    "a head of metrics": other_kind("head", MetricRecord),
    "a head of arrays": other_kind("head", ArrayRecord),
    "vectors of config": other_kind("vectors", ConfigRecord),
    "counts of metrics": other_kind("counts", MetricRecord),
    "counts under another name": counts("float64", (1,), "lepton.f8le", EIGHT, name="count"),
    "no layout": head(layout=None),
    "a layout that is bytes": head(layout=b"3" * 64),
    "a layout that is a list": head(layout=["3" * 64]),
    "no weight": head(weight=None),
    "a weight that is true": head(weight=True),
    "a weight that is a whole number": head(weight=1),
    "a weight that is text": head(weight="1.0"),
    "a weight that is a list": head(weight=[1.0]),
    "an epsilon that is true": head(epsilon=True),
    "an epsilon that is text": head(epsilon="none"),
    "a noise multiplier that is a list": head(noise_multiplier=[0.1]),
    "a refusal that is a number": head(refusal=4205, why="x"),
    "a refusal without words": head(refusal="LF4205"),
    "words that are a list": head(refusal="LF4205", why=["x"]),
    "another element type": delta("float64", (1,), "lepton.f4le", EIGHT),
    "an element type of nonsense": delta("object", (2,), "lepton.f4le", EIGHT),
    "flwr's own serialisation": delta(np.zeros(2, np.float32)),
    "another serialisation": delta("float32", (2,), "pickle", EIGHT),
    "that of double precision": delta("float32", (1,), "lepton.f8le", EIGHT),
    "a byte too few": delta("float32", (2,), "lepton.f4le", bytes(7)),
    "a byte too many": delta("float32", (2,), "lepton.f4le", bytes(9)),
    "no bytes": delta("float32", (2,), "lepton.f4le", b""),
    "an extra axis": delta("float32", (2, 1), "lepton.f4le", EIGHT),
    "an extra axis in front": delta("float32", (1, 2), "lepton.f4le", EIGHT),
    "no axis": delta("float32", (), "lepton.f4le", bytes(4)),
    "a negative axis": delta("float32", (-2,), "lepton.f4le", EIGHT),
    "two negative axes": delta("float32", (-1, -2), "lepton.f4le", EIGHT),
    "a huge axis": delta("float32", (2**62,), "lepton.f4le", EIGHT),
    "a huge name": delta("float32", (2,), "lepton.f4le", EIGHT, name="x" * 10_000),
    "counts in single precision": counts("float32", (2,), "lepton.f4le", EIGHT),
    "counts with an extra axis": counts("float64", (1, 1), "lepton.f8le", EIGHT),
    "counts a byte short": counts("float64", (1,), "lepton.f8le", bytes(7)),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_reply_is_refused_in_few_legible_words(name: str) -> None:
    with pytest.raises(UpdateRefused) as caught:
        record_to_reply("site-1", MALFORMED[name])
    (problem,) = caught.value.problems
    assert problem.code == "LF4411"
    assert problem.what.startswith("malformed message: ")
    assert len(problem.what) < 160
    assert problem.what.isprintable()


@pytest.mark.parametrize("field", ["dtype", "stype"])
def test_what_a_stranger_calls_an_array_is_not_repeated_at_length(field: str) -> None:
    text = "\x1b[2J" + "y" * 100_000
    array = {"dtype": "float32", "stype": "lepton.f4le"} | {field: text}
    with pytest.raises(UpdateRefused) as caught:
        record_to_reply("a", delta(array["dtype"], (2,), array["stype"], EIGHT))
    assert len(str(caught.value)) < 200
    assert "\x1b" not in str(caught.value)


def test_the_words_of_a_refusal_are_cut_and_cannot_steer_a_terminal() -> None:
    record = head(refusal="LF\x1b[2J" + "0" * 99, why="no\x1b[31m rows\r\n" + "x" * 10_000)
    refusal = record_to_reply("a", record).refusal
    assert refusal is not None
    assert refusal.code == "LF?[2J0000000000"
    assert refusal.what.startswith("no?[31m rows??xxx")
    assert len(refusal.what) == 200


ASK_FIELDS: list[tuple[str, Any]] = [
    ("agreement", 1),
    ("agreement", b"x"),
    ("layout", ["x"]),
    ("round", True),
    ("round", 1.0),
    ("train", 1),
    ("train", "true"),
    ("evaluate", 0),
    ("clip", 1),
    ("clip", "0.5"),
]


@pytest.mark.parametrize(("name", "value"), ASK_FIELDS)
def test_a_malformed_ask_is_refused(name: str, value: Any) -> None:
    record = ask_to_record(ASK)
    record["head"][name] = value
    with pytest.raises(UpdateRefused, match=f"field '{name}' is {type(value).__name__}"):
        record_to_ask(record)
    del record["head"][name]
    with pytest.raises(UpdateRefused, match=f"field '{name}' is NoneType"):
        record_to_ask(record)


@pytest.mark.parametrize("clip", [math.nan, math.inf, -math.inf])
def test_a_norm_that_is_no_number_is_refused(clip: float) -> None:
    record = ask_to_record(ASK)
    record["head"]["clip"] = clip
    with pytest.raises(UpdateRefused, match="a norm of"):
        record_to_ask(record)


def test_an_ask_without_head_or_vectors_is_refused() -> None:
    for name in ("head", "vectors"):
        record = ask_to_record(ASK)
        del record[name]
        with pytest.raises(UpdateRefused, match=f"no {name}"):
            record_to_ask(record)


def test_records_beside_those_of_a_reply_change_nothing_but_its_size() -> None:
    record = reply_to_record(REPLY)
    record["more"] = ArrayRecord({"x": Array("uint8", (3,), "raw", b"abc")})
    record["config"] = ConfigRecord({"code": b"import os"})
    found = record_to_reply("a", record)
    assert found.sent_bytes == BITS.nbytes + 3 * 8 + 3
    assert found.update is not None
    assert list(found.update.vectors) == ["delta"]


def test_numbers_are_carried_as_they_are_for_admission_to_judge() -> None:
    found = record_to_reply("a", head(weight=math.nan, epsilon=math.inf))
    assert found.update is not None
    assert math.isnan(found.update.weight)
    assert found.epsilon == math.inf


@pytest.mark.parametrize("left", [None, 0.0, 3.25, 1e6])
def test_what_a_site_says_to_an_offer_comes_back_as_it_was(left: float | None) -> None:
    said = OfferReply("site-1", "1" * 64, version="0.1.0", budget_left=left)
    assert record_to_offer_reply("site-1", sent(offer_reply_to_record(said))) == said
    refused = OfferReply("site-1", refusal=Problem("LF4601", "no", where="site-1"), version="0.1.0")
    assert record_to_offer_reply("site-1", sent(offer_reply_to_record(refused))) == refused


def test_a_site_that_does_not_say_its_version_takes_part() -> None:
    record = RecordDict({"head": ConfigRecord({"agreement": "1" * 64})})
    assert record_to_offer_reply("site-1", record) == OfferReply("site-1", "1" * 64)


def test_a_version_is_cut_short_and_made_legible() -> None:
    record = RecordDict({"head": ConfigRecord({"agreement": "", "version": "\x1b[2J" + "9" * 99})})
    assert record_to_offer_reply("site-1", record).version == "?[2J" + "9" * 28


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", 1),
        ("version", b"0.1.0"),
        ("budget_left", "3"),
        ("budget_left", 3),
        ("budget_left", True),
        ("budget_left", -0.5),
        ("budget_left", 1e6 + 1),
        ("budget_left", math.inf),
        ("budget_left", math.nan),
        ("budget_left", [1.0]),
    ],
)
def test_what_no_site_can_say_of_itself_is_refused(field: str, value: Any) -> None:
    record = RecordDict({"head": ConfigRecord({"agreement": "1" * 64, field: value})})
    with pytest.raises(UpdateRefused, match="LF4411"):
        record_to_offer_reply("site-1", record)
