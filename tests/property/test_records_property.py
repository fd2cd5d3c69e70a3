"""Whatever a stranger's message holds, it is a reply that can be judged, or it is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from lepton_fed.config.schema import RecordPrivacy
from lepton_fed.core.exchange import Ask, Reply, Update
from lepton_fed.core.layout import Layout
from lepton_fed.core.task import Aggregation
from lepton_fed.errors import UpdateRefused
from lepton_fed.flower.records import (
    ask_to_record,
    record_to_ask,
    record_to_reply,
    reply_to_record,
)
from lepton_fed.server.admission import admit, admit_claims

LAYOUT = Layout.of([("w", "shared", np.zeros(2, np.float32))])
BOUNDS = Aggregation(norm_bound=10.0)

SCALARS = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.text(max_size=100),
    st.binary(max_size=10),
)
HEAD_KEYS = st.sampled_from(["layout", "weight", "refusal", "why", "epsilon", "noise_multiplier"])
HEAD_VALUES = SCALARS | st.lists(st.floats(), max_size=2)
NAMES = st.sampled_from(["delta", "counts", "control"]) | st.text(max_size=80)
ARRAYS = st.builds(
    Array,
    st.sampled_from(["float32", "float64", "object"]) | st.text(max_size=100),
    st.lists(st.integers(-3, 3) | st.integers(-(2**63), 2**63 - 1), max_size=3).map(tuple),
    st.sampled_from(["lepton.f4le", "lepton.f8le", "numpy.ndarray"]) | st.text(max_size=100),
    st.binary(max_size=24),
)
RECORDS = st.one_of(
    st.dictionaries(HEAD_KEYS, HEAD_VALUES, max_size=4).map(ConfigRecord),
    st.dictionaries(NAMES, ARRAYS, max_size=3).map(ArrayRecord),
    st.just(MetricRecord({"loss": 1.0})),
)


@st.composite
def messages(draw: st.DrawFn) -> RecordDict:
    """A good reply after up to three changes, each of a kind that a stranger could make."""
    values = np.array(draw(st.lists(st.floats(width=32), min_size=2, max_size=2)), np.float32)
    update = Update(LAYOUT.digest, {"delta": values}, draw(st.sampled_from([0.5, 1.0])))
    record = reply_to_record(Reply("a", update=update, counts=np.zeros(3), epsilon=0.5))
    head, vectors = record["head"], record["vectors"]
    for change in draw(st.lists(st.integers(0, 5), max_size=3)):
        if change == 0:
            head[draw(HEAD_KEYS)] = draw(HEAD_VALUES)
        elif change == 1:
            head.pop(draw(HEAD_KEYS), None)
        elif change == 2:
            vectors[draw(NAMES)] = draw(ARRAYS)
        elif change == 3:
            vectors.pop("delta", None)
        elif change == 4:
            record.pop(draw(st.sampled_from(["head", "vectors", "counts"])), None)
        else:
            record = RecordDict(dict(record) | {draw(NAMES | st.just("head")): draw(RECORDS)})
    return record


MESSAGES = messages()


@given(MESSAGES)
def test_a_message_is_a_reply_or_is_refused(message: RecordDict) -> None:
    why = ""
    try:
        reply = record_to_reply("asked", message)
    except UpdateRefused as refused:
        why = str(refused)
    if why:
        assert why.isprintable()
        assert len(why) < 250
        return
    assert reply.site == "asked"
    assert reply.counts is None or (reply.counts.dtype, reply.counts.ndim) == (np.float64, 1)
    if reply.refusal is not None:
        assert reply.refusal.what.isprintable()
        assert len(reply.refusal.what) <= 200
    if reply.update is not None:
        assert type(reply.update.weight) is float
        for vector in reply.update.vectors.values():
            assert (vector.dtype, vector.ndim) == (np.float32, 1)


@given(MESSAGES)
def test_what_is_admitted_in_the_end_is_fit_to_be_added(message: RecordDict) -> None:
    try:
        reply = record_to_reply("asked", message)
        admit_claims(reply, RecordPrivacy(enabled=True))
        if reply.update is None:
            return
        norm = admit(reply.update, LAYOUT, BOUNDS, ("delta",), reply.site)
    except UpdateRefused:
        return
    (vector,) = reply.update.vectors.values()
    assert vector.shape == (2,)
    assert np.isfinite(vector).all()
    assert norm == np.linalg.norm(vector.astype(np.float64)) <= 10
    assert 0 < reply.update.weight <= 1


@given(MESSAGES)
def test_a_message_is_an_ask_or_is_refused(message: RecordDict) -> None:
    try:
        ask = record_to_ask(message)
    except UpdateRefused:
        return
    assert isinstance(ask, Ask)


VECTORS = st.dictionaries(
    st.text(min_size=1, max_size=20),
    st.lists(st.floats(width=32), max_size=5).map(lambda values: np.array(values, np.float32)),
    max_size=3,
)


@given(
    st.builds(
        Ask,
        agreement=st.text(max_size=20),
        layout=st.text(max_size=20),
        round_number=st.integers(1, 10**6),
        train=st.booleans(),
        evaluate=st.booleans(),
        vectors=VECTORS,
    )
)
def test_any_ask_comes_back_to_the_bit(ask: Ask) -> None:
    found = record_to_ask(ask_to_record(ask))
    assert bits(found.vectors) == bits(ask.vectors)
    for name in ("agreement", "layout", "round_number", "train", "evaluate"):
        assert getattr(found, name) == getattr(ask, name)


@given(VECTORS, st.floats(allow_nan=False), st.none() | st.floats(allow_nan=False))
def test_any_reply_comes_back_to_the_bit(
    vectors: Any, weight: float, epsilon: float | None
) -> None:
    reply = Reply("a", update=Update("layout", vectors, weight), epsilon=epsilon)
    found = record_to_reply("a", reply_to_record(reply))
    assert found.update is not None
    assert bits(found.update.vectors) == bits(vectors)
    assert (found.update.weight, found.epsilon) == (weight, epsilon)
    assert found.sent_bytes == sum(vector.nbytes for vector in vectors.values())


def bits(vectors: Any) -> dict[str, bytes]:
    return {name: vector.tobytes() for name, vector in vectors.items()}
