from __future__ import annotations

import doctest
import hashlib
import json
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Any

import numpy as np
import pytest

from lepton_fed.core import digests, exchange
from lepton_fed.core.digests import canonical_json, digest_of, plain


class Colour(Enum):
    RED = "red"


class Level(IntEnum):
    HIGH = 2


@dataclass(frozen=True)
class Inner:
    values: tuple[int, ...] = (1, 2)


@dataclass(frozen=True)
class Outer:
    name: str = "ä"
    inner: Inner = field(default_factory=Inner)


@pytest.mark.parametrize("module", [digests, exchange], ids=lambda module: module.__name__)
def test_the_examples_in_the_docstrings_hold(module: Any) -> None:
    found = doctest.testmod(module)
    assert found.attempted >= 1
    assert found.failed == 0


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (3, "3"),
        (3.0, "3.0"),
        (-0.0, "-0.0"),
        (0.1, "0.1"),
        (1e-7, "1e-07"),
        (1e22, "1e+22"),
        (5e-324, "5e-324"),
        (2**70, str(2**70)),
        ("ä心\n\u2028", '"ä心\\n\u2028"'),
        ([1, (2, 3)], "[1,[2,3]]"),
        ({"b": 1, "a": {"d": [], "c": {}}}, '{"a":{"c":{},"d":[]},"b":1}'),
        (Colour.RED, '"red"'),
        (Level.HIGH, "2"),
        (Outer(), '{"inner":{"values":[1,2]},"name":"ä"}'),
    ],
)
def test_a_value_has_one_text(value: object, text: str) -> None:
    assert canonical_json(value) == text.encode()
    assert json.loads(canonical_json(value)) == json.loads(json.dumps(plain(value)))


def test_a_whole_number_and_the_same_float_have_different_digests() -> None:
    assert digest_of("x", 1) != digest_of("x", 1.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_json_does_not_have_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"deep": [value]})


@pytest.mark.parametrize(
    "value", [{1, 2}, b"bytes", object(), np.float32(1), np.zeros(2), Outer, 1j]
)
def test_what_is_not_plain_data_has_no_canonical_form(value: object) -> None:
    with pytest.raises(TypeError, match="has no canonical form"):
        canonical_json([value])


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="surrogates not allowed"):
        canonical_json("\ud800")


def test_a_digest_is_bound_to_its_purpose() -> None:
    expected = hashlib.sha256(b'task\0{"a":1}').hexdigest()
    assert digest_of("task", {"a": 1}) == expected
    assert digest_of("layout", {"a": 1}) != expected


def test_purpose_and_value_cannot_run_into_each_other() -> None:
    assert digest_of("a", "b") != digest_of('a\0"b"', "")
