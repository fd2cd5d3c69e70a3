"""Phases of secure aggregation as records: back as they were, and refused when malformed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto

from lepton_fed.core.exchange import Ask, Phase, PhaseAsk, PhaseReply
from lepton_fed.errors import Problem, UpdateRefused
from lepton_fed.flower import records
from lepton_fed.flower.records import (
    phase_reply_to_record,
    phase_to_record,
    record_to_phase,
    record_to_phase_reply,
)

ASK = Ask("1" * 64, "2" * 64, 3, True, False, {"model": np.ones(2, np.float32)}, 1.5)
ASKED = PhaseAsk("share", 2, b'{"roster":"x"}\x00', ASK)
PACKED = np.arange(256, dtype=np.uint8)
REPLY = PhaseReply(
    "site-1", b"{}", PACKED, sent_bytes=256, words=64, norms=(2.0, 1.0), notes={"clip": "1"}
)


def sent(record: RecordDict) -> RecordDict:
    """The record as it comes out of flwr's wire format."""
    return recorddict_from_proto(recorddict_to_proto(record))


WIRES = pytest.mark.parametrize("wire", [sent, lambda record: record], ids=["wire", "process"])


@WIRES
@pytest.mark.parametrize("phase", get_args(Phase))
def test_a_phase_comes_back_as_it_was(wire: Callable[[RecordDict], RecordDict], phase: Any) -> None:
    asked = PhaseAsk(phase, 2, ASKED.body, ASK)
    found = record_to_phase(wire(phase_to_record(asked)))
    assert (found.phase, found.attempt, found.body) == (phase, 2, ASKED.body)
    assert found.ask.vectors["model"].tobytes() == ASK.vectors["model"].tobytes()
    for name in ("agreement", "layout", "round_number", "train", "evaluate", "limit_s", "clip"):
        assert getattr(found.ask, name) == getattr(ASK, name)


@WIRES
def test_a_reply_comes_back_without_what_stays_at_the_site(
    wire: Callable[[RecordDict], RecordDict],
) -> None:
    found = record_to_phase_reply("site-1", wire(phase_reply_to_record(REPLY)))
    assert (found.site, found.body, found.sent_bytes) == ("site-1", b"{}", 256)
    assert found.masked is not None
    assert found.masked[:].tobytes() == PACKED.tobytes()
    assert (found.refusal, found.accused) == (None, "")
    assert (found.words, found.norms, dict(found.notes)) == (0, (0.0, 0.0), {})


def test_no_note_and_no_norm_is_among_the_records() -> None:
    head = phase_reply_to_record(REPLY)["head"]
    assert set(head) == {"body", "accused"}


@WIRES
def test_a_refusal_comes_back_with_whom_it_accuses(
    wire: Callable[[RecordDict], RecordDict],
) -> None:
    refusal = Problem("LF4514", "its share is not the one", where="/secret", remedy="secret")
    record = wire(phase_reply_to_record(PhaseReply("x", refusal=refusal, accused="north")))
    assert "secret" not in repr(dict(record["head"]))
    found = record_to_phase_reply("site-1", record)
    assert found.refusal == Problem("LF4514", "its share is not the one", where="site-1")
    assert (found.accused, found.body, found.masked, found.sent_bytes) == ("north", b"", None, 0)


def test_a_name_that_is_accused_is_cut_and_free_of_control_characters() -> None:
    record = phase_reply_to_record(
        PhaseReply("x", refusal=Problem("LF4514", "x"), accused="\x1b[2J" + "y" * 999)
    )
    found = record_to_phase_reply("site-1", record)
    assert found.accused == "?[2J" + "y" * 60


def changed(record: RecordDict, **fields: Any) -> RecordDict:
    head = dict(record["head"])  # type: ignore[arg-type]
    for name, value in fields.items():
        if value is None:
            del head[name]
        else:
            head[name] = value
    record["head"] = ConfigRecord(head)
    return record


@pytest.mark.parametrize(
    "fields",
    [
        {"phase": None},
        {"phase": "unmask"},
        {"phase": b"mask"},
        {"attempt": None},
        {"attempt": 1.0},
        {"attempt": True},
        {"attempt": "1"},
        {"body": None},
        {"body": "{}"},
        {"round": None},
        {"evaluate": 1},
    ],
)
def test_a_malformed_phase_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(UpdateRefused, match="LF4411"):
        record_to_phase(changed(phase_to_record(ASKED), **fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"body": None},
        {"body": "{}"},
        {"accused": None},
        {"accused": 1},
        {"refusal": "LF4514"},
        {"refusal": 1, "why": "x"},
    ],
)
def test_a_malformed_reply_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(UpdateRefused, match="LF4411"):
        record_to_phase_reply("site-1", changed(phase_reply_to_record(REPLY), **fields))


def octets(dtype: str, shape: tuple[int, ...], stype: str, data: bytes) -> ArrayRecord:
    return ArrayRecord({"masked": Array(dtype, shape, stype, data)})


@pytest.mark.parametrize(
    "masked",
    [
        octets("uint32", (2,), "lepton.u1", bytes(8)),
        octets("uint8", (8,), "numpy.ndarray", bytes(8)),
        octets("uint8", (9,), "lepton.u1", bytes(8)),
        octets("uint8", (7,), "lepton.u1", bytes(8)),
        octets("uint8", (2, 4), "lepton.u1", bytes(8)),
        octets("uint8", (), "lepton.u1", bytes(1)),
        octets("uint8", (-8,), "lepton.u1", bytes(8)),
        ArrayRecord({"other": Array("uint8", (1,), "lepton.u1", b"x")}),
        ConfigRecord({"masked": b"x"}),
    ],
)
def test_a_malformed_masked_vector_is_refused(masked: Any) -> None:
    record = phase_reply_to_record(REPLY)
    record["masked"] = masked
    with pytest.raises(UpdateRefused, match="LF4411"):
        record_to_phase_reply("site-1", record)


def test_a_body_that_is_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_MOST_BODY", 10)
    assert record_to_phase_reply("x", phase_reply_to_record(PhaseReply("x", bytes(10))))
    with pytest.raises(UpdateRefused, match="LF4411"):
        record_to_phase_reply("x", phase_reply_to_record(PhaseReply("x", bytes(11))))


def test_records_without_a_head_are_refused() -> None:
    for read in (record_to_phase, lambda record: record_to_phase_reply("x", record)):
        with pytest.raises(UpdateRefused, match="LF4411"):
            read(RecordDict({}))
