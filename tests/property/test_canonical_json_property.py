from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from lepton_fed.core.decode import strict_json
from lepton_fed.core.digests import canonical_json, digest_of

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63) + 1, 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    TEXTS,
)
PLAIN = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)


def reordered(value: Any, random: Any) -> Any:
    """The same value with the keys of every object inserted in another order."""
    if isinstance(value, dict):
        keys = list(value)
        random.shuffle(keys)
        return {key: reordered(value[key], random) for key in keys}
    return [reordered(item, random) for item in value] if isinstance(value, list) else value


@given(PLAIN, st.randoms(use_true_random=False))
def test_the_order_of_keys_changes_nothing(value: Any, random: Any) -> None:
    other = reordered(value, random)
    assert canonical_json(other) == canonical_json(value)
    assert digest_of("x", other) == digest_of("x", value)


@given(PLAIN)
def test_what_is_read_back_has_the_same_text(value: Any) -> None:
    text = canonical_json(value)
    assert canonical_json(strict_json(text)) == text
    assert json.loads(text) == value


@given(PLAIN, PLAIN)
def test_values_with_the_same_text_are_equal(one: Any, other: Any) -> None:
    if canonical_json(one) == canonical_json(other):
        assert one == other
