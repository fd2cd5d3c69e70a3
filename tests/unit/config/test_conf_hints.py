"""Types in plain words, and values checked against them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Optional, Union

import pytest

from lepton_fed.config.hints import bounds, fit, shown, words
from lepton_fed.config.nearest import did_you_mean, nearest
from lepton_fed.core.settings import Setting


@dataclass
class Section:
    """Any section."""

    name: str


@pytest.mark.parametrize(
    ("hint", "text"),
    [
        (int, "a whole number"),
        (float, "a number"),
        (bool, "true or false"),
        (str, "text"),
        (float | None, "a number, or null"),
        (Optional[str], "text, or null"),  # noqa: UP045
        (Union[int, str], "a whole number or text"),  # noqa: UP007
        (list[str], "a list of texts"),
        (tuple[float, ...], "a list of numbers"),
        (Sequence[list[int]], "a list of lists"),
        (list[Literal["a", "b"]], "a list of these: a, b"),
        (list[Section], "a list of sections"),
        (list, "a list of values"),
        (Section, "a section of keys and values"),
        (dict[str, int], "a section of keys and values"),
        (Literal["a"], "a"),
        (Literal["a", "b", "c"] | None, "a, b or c, or null"),
        (Annotated[int, "extra"], "a whole number"),
        (Any, "any value"),
        (object, "any value"),
    ],
)
def test_a_type_reads_as_plain_words(hint: Any, text: str) -> None:
    assert words(hint) == text


@pytest.mark.parametrize(
    ("value", "hint", "result"),
    [
        (3, float, 3.0),
        (3, int, 3),
        (3, int | float, 3),
        (3, float | None, 3.0),
        (None, float | None, None),
        ("a", Literal["a", "b"], "a"),
        ([1, 2], list[float], [1.0, 2.0]),
        ([1, 2], tuple[int, ...], (1, 2)),
        ([1, "x"], tuple[int, str], (1, "x")),
        ([1], Sequence[int], [1]),
        ([1], list, [1]),
        ({"a": 1}, dict[str, float], {"a": 1.0}),
        ({"a": 1}, Mapping, {"a": 1}),
        ([[1], []], list[list[int]], [[1], []]),
        ("x", object, "x"),
        ("x", Any, "x"),
    ],
)
def test_a_value_that_fits_is_converted_without_loss(
    value: object, hint: Any, result: object
) -> None:
    assert fit(value, hint) == (result, True)
    assert type(fit(value, hint)[0]) is type(result)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (True, int),
        (False, float),
        (1, bool),
        (1.0, int),
        ("1", float),
        (None, int),
        (0, None),
        (1, Literal[True]),
        (True, Literal[1]),
        ("c", Literal["a", "b"]),
        ("abc", list[str]),
        ([1, "x"], list[int]),
        ([1], tuple[int, int]),
        ({"a": "x"}, dict[str, int]),
        ([1], dict[str, int]),
        ("x", int | None),
    ],
)
def test_a_value_that_does_not_fit_is_told(value: object, hint: Any) -> None:
    assert fit(value, hint) == (value, False)


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        (Setting(""), ""),
        (Setting("", above=0, at_most=1), "greater than 0, at most 1"),
        (Setting("", at_least=0.5, below=1e6), "at least 0.5, smaller than 1_000_000"),
    ],
)
def test_bounds_read_as_plain_words(setting: Setting, text: str) -> None:
    assert bounds(setting) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (1e-5, "1e-05"),
        ("", "empty text"),
        ("a'b", '''the text "a'b"'''),
        ([], "an empty list"),
        ([1, 2], "a list of 2"),
        ({}, "a section (empty)"),
        ({"a": 1, "b": 2}, "a section (a, b)"),
    ],
)
def test_a_value_is_shown_as_it_would_be_written(value: object, text: str) -> None:
    assert shown(value) == text


def test_the_nearest_name_ignores_case_and_needs_some_likeness() -> None:
    assert nearest("EPSILON", ["delta", "epsilon"]) == "epsilon"
    assert nearest("zzz", ["delta", "epsilon"]) == ""
    assert did_you_mean("zzz", ["a", "b"], noun="keys here") == "keys here: a, b"
