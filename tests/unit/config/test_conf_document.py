"""The YAML dialect: what values mean, where they stand, what is refused."""

from __future__ import annotations

import pytest

from lepton_fed.config.document import from_plain, parse, scalar
from lepton_fed.errors import ConfError


def _place(line: int, column: int) -> str:
    return f"{line}:{column}"


def _problems(text: str) -> list[tuple[str, str]]:
    try:
        _, problems = parse(text, _place)
    except ConfError as error:
        problems = list(error.problems)
    return [(problem.code, problem.where) for problem in problems]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        (".5", 0.5),
        ("5.", 5.0),
        ("-3", -3),
        ("+3", 3),
        ("1_000", 1000),
        ("010", 10),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("-.inf", float("-inf")),
    ],
)
def test_an_unquoted_scalar_has_the_type_that_people_mean(text: str, value: object) -> None:
    found = scalar(text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "text", ["no", "Yes", "on", "off", "y", "1:30", "2026-01-01", "0x10", "1__0", "1_", "e5", "."]
)
def test_what_yaml_1_1_would_twist_stays_text(text: str) -> None:
    assert scalar(text) == text


def test_a_number_of_thousands_of_digits_is_no_whole_number() -> None:
    assert not isinstance(scalar("9" * 5000), int)


def test_values_and_keys_know_line_and_column() -> None:
    root, problems = parse("a:\n  b: 1\n  c: [x, y]\n", _place)
    assert root is not None
    assert not problems
    section = root.content["a"]  # type: ignore[index, call-overload]
    assert section.place == "1:1"
    assert section.content["b"].place == "2:6"
    assert section.content["c"].place == "3:3"
    assert section.content["c"].content[1].place == "3:10"
    assert root.plain == {"a": {"b": 1, "c": ["x", "y"]}}


def test_quotes_make_text_and_keys_are_always_text() -> None:
    root, _ = parse("1: '5'\ntrue: \"no\"\n", _place)
    assert root is not None
    assert root.plain == {"1": "5", "true": "no"}


def test_every_repeated_key_is_found() -> None:
    text = "a: 1\nb: 2\na: 3\nc: {d: 1, d: 2}\n"
    assert _problems(text) == [("LF1007", "3:1"), ("LF1007", "4:11")]
    _, problems = parse(text, _place)
    assert "the first is at 1:1" in problems[0].what


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("a: &x 1\nb: 2\n", "1:4"),
        ("a: 1\nb: *x\n", "2:4"),
        ("a: !!float 1\n", "1:4"),
        ("a: !!python/object/apply:os.system [id]\n", "1:4"),
        ("? [a, b]\n: 1\n", "1:3"),
        ("a: 1\n'': 2\n", "2:1"),
        ("a: 1\n---\nb: 2\n", "2:1"),
        ("[" * 40 + "]" * 40, "1:33"),
    ],
)
def test_what_a_conf_does_not_need_is_refused(text: str, where: str) -> None:
    assert _problems(text) == [("LF1008", where)]


def test_nesting_far_beyond_the_limit_does_not_exhaust_the_stack() -> None:
    assert _problems("[" * 100_000) == [("LF1008", "1:33")]


@pytest.mark.parametrize(
    ("text", "where", "remedy"),
    [
        ("a: [1, 2\nb: 3\n", "2:2", "add it"),
        ("a: {b: 1\n", "2:1", "add it"),
        ("a: 1\n\tb: 2\n", "2:1", "indent with spaces"),
        ("a: 1\nb: @x\n", "2:4", "put it in quotes"),
        ("a: *\n", "1:5", "put it in quotes"),
        ("a: 1\n b: 2\n", "2:3", "indentation"),
        ("a: b: c\n", "1:5", "in quotes"),
        ("a:\n  - 1\n - 2\n", "3:2", "two spaces a level"),
        ("a: 'x\n", "2:1", "close it"),
        ("a: 1\nfoo\nb: 2\n", "3:1", "write `key: value`"),
        ('"a" "b"\n', "1:5", "write `key: value` lines"),
        ('a: "\\q"\n', "1:6", "look at this line and the one before"),
        ("a: 1\nb: x\x00y\n", "2:5", "remove it"),
    ],
)
def test_text_that_is_not_yaml_is_located(text: str, where: str, remedy: str) -> None:
    with pytest.raises(ConfError) as caught:
        parse(text, _place)
    (problem,) = caught.value.problems
    assert (problem.code, problem.where) == ("LF1006", where)
    assert remedy in problem.remedy


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "---\n"])
def test_nothing_is_told_from_null(text: str) -> None:
    assert parse(text, _place) == (None, [])


def test_plain_data_becomes_a_document_at_one_place() -> None:
    value = {"a": [1, 2.5, True, None, "x"], "b": {"c": ()}}
    root = from_plain(value, "template")
    assert root.plain == {"a": [1, 2.5, True, None, "x"], "b": {"c": []}}
    assert root.content["b"].place == "template"  # type: ignore[index, call-overload]


def test_plain_data_that_is_nested_too_deeply_is_refused() -> None:
    value: object = 1
    for _ in range(10_000):
        value = [value]
    with pytest.raises(ConfError, match="nested more than 32 levels deep"):
        from_plain(value, "offer")


def test_data_that_is_not_plain_is_refused() -> None:
    with pytest.raises(TypeError, match="set cannot stand in a conf"):
        from_plain({"a": {1}}, "template")
