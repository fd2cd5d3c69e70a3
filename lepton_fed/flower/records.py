"""Asks and replies as Flower records, and back.

Vectors travel as raw little-endian float32 (no per-array header, read without a copy). What comes
back is untrusted: each field is checked for presence, type and size, and anything else is an
UpdateRefused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from lepton_fed.core.exchange import (
    Ask,
    Offer,
    OfferReply,
    PhaseAsk,
    PhaseReply,
    PushReply,
    PushStep,
    Reply,
    Update,
    legible,
)
from lepton_fed.core.layout import Vector
from lepton_fed.errors import Problem, UpdateRefused
from lepton_fed.flower.parcels import FiledArray, FiledVector

__all__ = [
    "ask_to_record",
    "offer_reply_to_record",
    "offer_to_record",
    "phase_reply_to_record",
    "phase_to_record",
    "push_reply_to_record",
    "push_to_record",
    "record_to_ask",
    "record_to_offer",
    "record_to_offer_reply",
    "record_to_phase",
    "record_to_phase_reply",
    "record_to_push",
    "record_to_push_reply",
    "record_to_reply",
    "reply_to_record",
]

_VECTORS = "vectors"
_COUNTS = "counts"
_HEAD = "head"
_HAVE = "have"
_STEPS = ("begin", "chunk", "finish")
_MOST_FILES = 1000
_LONGEST_NAME = 64
_LONGEST_VERSION = 32
_LARGEST_EPSILON = 1e6
_PHASES = ("advertise", "share", "mask", "confirm", "reveal")
_MASKED = "masked"
_MOST_BODY = 64 * 1024 * 1024  # an envelope is some kilobytes, and a cohort has at most thousands
_RAW = {
    "float32": ("lepton.f4le", "<f4"),
    "float64": ("lepton.f8le", "<f8"),
    "uint8": ("lepton.u1", "|u1"),
}


def ask_to_record(ask: Ask) -> RecordDict:
    """Return an ask as records."""
    head = ConfigRecord(
        {
            "agreement": ask.agreement,
            "layout": ask.layout,
            "round": ask.round_number,
            "train": ask.train,
            "evaluate": ask.evaluate,
            "limit_s": ask.limit_s,
            "clip": ask.clip,
        }
    )
    return RecordDict({_HEAD: head, _VECTORS: _arrays(ask.vectors)})


def record_to_ask(record: RecordDict) -> Ask:
    """Return the ask that records hold.

    Raises:
        UpdateRefused: A field is missing or of another type, or the norm is not finite.
    """
    head = _head(record)
    clip: float = _field(head, "clip", float)
    if not math.isfinite(clip):
        raise _refusal(f"a norm of {clip} to clip to")
    return Ask(
        agreement=_field(head, "agreement", str),
        layout=_field(head, "layout", str),
        round_number=_field(head, "round", int),
        train=_field(head, "train", bool),
        evaluate=_field(head, "evaluate", bool),
        vectors=_vectors(record),
        limit_s=_field(head, "limit_s", float),
        clip=clip,
    )


def reply_to_record(reply: Reply) -> RecordDict:
    """Return a reply as records; the site's name is not among them: the transport knows it."""
    head = _told(reply.refusal)
    if reply.epsilon is not None:
        head["epsilon"] = reply.epsilon
    if reply.noise_multiplier is not None:
        head["noise_multiplier"] = reply.noise_multiplier
    records: dict[str, Any] = {}
    if reply.update is not None:
        head["layout"] = reply.update.layout
        head["weight"] = reply.update.weight
        records[_VECTORS] = _arrays(reply.update.vectors)
    if reply.counts is not None:
        records[_COUNTS] = ArrayRecord({_COUNTS: _raw(reply.counts)})
    return RecordDict({_HEAD: ConfigRecord(head), **records})


def record_to_reply(site: str, record: RecordDict) -> Reply:
    """Return the reply that records hold.

    Args:
        site: Name of the site that was asked.
        record: What came back.

    Raises:
        UpdateRefused: A field is missing or of another type.
    """
    head = _head(record)
    refusal = _refusal_in(head, site)
    update = None
    if _VECTORS in record:
        update = Update(
            _field(head, "layout", str), _vectors(record), _field(head, "weight", float)
        )
    counts: npt.NDArray[np.float64] | None = None
    if _COUNTS in record:
        array = _array(record, _COUNTS, _COUNTS)
        if isinstance(array, FiledArray):
            raise _refusal("more counts than any task has")
        counts = _read(array, "float64")
    return Reply(
        site,
        update=update,
        counts=counts,
        refusal=refusal,
        sent_bytes=_payload(record),
        epsilon=_field(head, "epsilon", float) if "epsilon" in head else None,
        noise_multiplier=(
            _field(head, "noise_multiplier", float) if "noise_multiplier" in head else None
        ),
    )


def phase_to_record(asked: PhaseAsk) -> RecordDict:
    """Return a phase of secure aggregation as records."""
    record = ask_to_record(asked.ask)
    head = cast("ConfigRecord", record[_HEAD])
    head["phase"], head["attempt"], head["body"] = asked.phase, asked.attempt, asked.body
    return record


def record_to_phase(record: RecordDict) -> PhaseAsk:
    """Return the phase of secure aggregation that records hold.

    Raises:
        UpdateRefused: A field is missing or of another type.
    """
    head = _head(record)
    phase = _field(head, "phase", str)
    if phase not in _PHASES:
        raise _refusal("secure aggregation has no such phase")
    return PhaseAsk(
        phase, _field(head, "attempt", int), _field(head, "body", bytes), record_to_ask(record)
    )


def phase_reply_to_record(reply: PhaseReply) -> RecordDict:
    """Return what a site says in a phase as records."""
    head = {"body": reply.body, "accused": reply.accused, **_told(reply.refusal)}
    records: dict[str, Any] = {}
    if reply.masked is not None:
        records[_MASKED] = ArrayRecord({_MASKED: _raw(reply.masked[:])})
    return RecordDict({_HEAD: ConfigRecord(head), **records})


def record_to_phase_reply(site: str, record: RecordDict) -> PhaseReply:
    """Return what records say in a phase.

    Args:
        site: Name of the site that was asked.
        record: What came back.

    Raises:
        UpdateRefused: A field is missing, too long or of another type.
    """
    head = _head(record)
    body = _field(head, "body", bytes)
    if len(body) > _MOST_BODY:
        raise _refusal(f"a body of {len(body)} bytes")
    masked = _read(_array(record, _MASKED, _MASKED), "uint8") if _MASKED in record else None
    return PhaseReply(
        site,
        body,
        masked,
        _refusal_in(head, site),
        legible(_field(head, "accused", str), _LONGEST_NAME),
        sent_bytes=_payload(record),
    )


def offer_to_record(offer: Offer) -> RecordDict:
    """Return an offer as records."""
    head = ConfigRecord({"agreement": offer.agreement, "roster": offer.roster})
    return RecordDict({_HEAD: head})


def record_to_offer(record: RecordDict) -> Offer:
    """Return the offer that records hold.

    Raises:
        UpdateRefused: A field is missing or of another type.
    """
    head = _head(record)
    return Offer(_field(head, "agreement", bytes), _field(head, "roster", bytes))


def offer_reply_to_record(reply: OfferReply) -> RecordDict:
    """Return what a site says to an offer as records."""
    head = {"agreement": reply.agreement, "version": reply.version, **_told(reply.refusal)}
    if reply.budget_left is not None:
        head["budget_left"] = reply.budget_left
    return RecordDict({_HEAD: ConfigRecord(head)})


def record_to_offer_reply(site: str, record: RecordDict) -> OfferReply:
    """Return what records say to an offer.

    Raises:
        UpdateRefused: A field is missing, of another type, or out of range.
    """
    head = _head(record)
    left = _field(head, "budget_left", float) if "budget_left" in head else None
    if left is not None and not 0 <= left <= _LARGEST_EPSILON:  # NaN is neither
        raise _refusal("the budget that is left is no epsilon")
    version = _field(head, "version", str) if "version" in head else ""
    return OfferReply(
        site,
        _field(head, "agreement", str),
        _refusal_in(head, site),
        legible(version, _LONGEST_VERSION),
        left,
    )


def push_to_record(step: PushStep) -> RecordDict:
    """Return a step of a push as records."""
    return RecordDict({_HEAD: ConfigRecord(dict(vars(step)))})


def record_to_push(record: RecordDict) -> PushStep:
    """Return the step of a push that records hold.

    Raises:
        UpdateRefused: A field is missing or of another type.
    """
    head = _head(record)
    step = _field(head, "step", str)
    if step not in _STEPS:
        raise _refusal("a push has no such step")
    return PushStep(
        step=step,
        bundle=_field(head, "bundle", str),
        manifest=_field(head, "manifest", bytes),
        signature=_field(head, "signature", bytes),
        file=_field(head, "file", str),
        offset=_field(head, "offset", int),
        data=_field(head, "data", bytes),
    )


def push_reply_to_record(reply: PushReply) -> RecordDict:
    """Return what a site says to a step of a push as records."""
    head = {"in_force": reply.in_force, **_told(reply.refusal)}
    return RecordDict({_HEAD: ConfigRecord(head), _HAVE: ConfigRecord(dict(reply.have))})


def record_to_push_reply(site: str, record: RecordDict) -> PushReply:
    """Return what records say to a step of a push.

    Raises:
        UpdateRefused: A field is missing or of another type.
    """
    head = _head(record)
    have = record.get(_HAVE)
    if not isinstance(have, ConfigRecord) or len(have) > _MOST_FILES:
        raise _refusal("no list of files")
    names = {str(name): _field(have, str(name), int) for name in have}
    return PushReply(site, names, _field(head, "in_force", int), _refusal_in(head, site))


def _told(refusal: Problem | None) -> dict[str, Any]:
    return {} if refusal is None else {"refusal": refusal.code, "why": refusal.what}


def _refusal_in(head: ConfigRecord, site: str) -> Problem | None:
    if "refusal" not in head:
        return None
    code, why = _field(head, "refusal", str), _field(head, "why", str)
    return Problem(legible(code, 16), legible(why, 200), where=site)


def _arrays(vectors: Mapping[str, Vector]) -> ArrayRecord:
    return ArrayRecord({name: _raw(vector) for name, vector in vectors.items()})


def _raw(vector: npt.NDArray[Any]) -> Array:
    name = vector.dtype.name
    stype, order = _RAW[name]
    return Array(name, tuple(vector.shape), stype, vector.astype(order, copy=False).tobytes())


def _read(array: Array, dtype: str) -> npt.NDArray[Any]:
    stype, order = _RAW[dtype]
    if array.dtype != dtype or array.stype != stype:
        given = f"{legible(array.dtype, 20)} as {legible(array.stype, 20)}"
        raise _refusal(f"an array is {given}, not {dtype} as {stype}")
    shape = tuple(array.shape)
    if isinstance(array, FiledArray) and len(shape) == 1:
        # Of an update, what follows reads slices only.
        return cast("npt.NDArray[Any]", FiledVector(array.path, shape[0], np.dtype(order)))
    wanted = int(np.dtype(order).itemsize) * (shape[0] if len(shape) == 1 else -1)
    if len(array.data) != wanted:
        raise _refusal(f"an array of shape {legible(str(shape), 40)} holds {len(array.data)} bytes")
    return np.frombuffer(array.data, dtype=order)


def _vectors(record: RecordDict) -> dict[str, Vector]:
    arrays = record.get(_VECTORS)
    if not isinstance(arrays, ArrayRecord):
        raise _refusal("no vectors")
    if any(len(name) > _LONGEST_NAME for name in arrays):
        raise _refusal(f"a vector's name is longer than {_LONGEST_NAME}")
    return {name: _read(array, "float32") for name, array in arrays.items()}


def _array(record: RecordDict, name: str, key: str) -> Array:
    arrays = record.get(name)
    if not isinstance(arrays, ArrayRecord) or key not in arrays:
        raise _refusal(f"no array {key!r}")
    return arrays[key]


def _head(record: RecordDict) -> ConfigRecord:
    head = record.get(_HEAD)
    if not isinstance(head, ConfigRecord):
        raise _refusal("no head")
    return head


def _field(head: ConfigRecord, name: str, kind: type[Any]) -> Any:
    value = head.get(name)
    # bool is an int to Python; an ask's round is not True.
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise _refusal(f"field {name!r} is {type(value).__name__}, not {kind.__name__}")
    return value


def _payload(record: RecordDict) -> int:
    """Return the bytes of the arrays: what a message weighs but for its envelope."""
    records = [item for item in record.values() if isinstance(item, ArrayRecord)]
    return sum(_bytes(array) for arrays in records for array in arrays.values())


def _bytes(array: Array) -> int:
    if isinstance(array, FiledArray):
        return array.path.stat().st_size
    return len(array.data)


def _refusal(what: str) -> UpdateRefused:
    return UpdateRefused(Problem("LF4411", f"malformed message: {what}"))
