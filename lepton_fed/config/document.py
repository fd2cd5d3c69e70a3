"""A conf file as a tree in which every value knows its line and column.

The dialect is the part of YAML that people mean: maps, lists and scalars, read by the rules of
YAML 1.2. So `1e-5` is a number, `010` is ten, only `true` and `false` are booleans, and `no`, `on`
or `2026-01-01` are text. Anchors, aliases and tags are refused: every value has one place, which is
the one that messages, overrides and `config explain` name, and nothing is ever constructed from a
tag. Keys are always text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import yaml
from yaml.reader import ReaderError

from lepton_fed.errors import ConfError, Problem

__all__ = ["Node", "Scalar", "from_plain", "parse", "scalar"]

Scalar = None | bool | int | float | str

_DEPTH = 32
_TOO_DEEP = (f"nested more than {_DEPTH} levels deep", "make it flatter")
_DIGITS = 32  # a longer whole number is none that anybody meant; int() itself gives up at 4300
_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_BOOL = {w: w.lower() == "true" for w in ("true", "True", "TRUE", "false", "False", "FALSE")}
_INT = re.compile(r"[-+]?[0-9]+(_[0-9]+)*")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(_[0-9]+)*(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
# What the parser says, and how to say it to people.
_SYNTAX = {
    "'\\t'": ("a tab stands here", "indent with spaces"),
    "cannot start any token": ("no value can begin with this character", "put it in quotes"),
    "alphabetic or numeric character": ("`*` and `&` begin no value", "put it in quotes"),
    "expected <block end>": (
        "this line does not fit under the ones before it",
        "indent it like its neighbours, two spaces a level",
    ),
    "mapping values are not allowed": (
        "a `:` does not fit here",
        "look at the indentation; put text that holds a `:` in quotes",
    ),
    "end of stream": ("a quote or bracket is never closed", "close it"),
    "expected ',' or": ("a `,` or a closing bracket is missing before this", "add it"),
    "<document start>": ("keys and values do not go on here", "write `key: value` lines"),
    "could not find expected ':'": ("a `:` is missing after a key", "write `key: value`"),
}


@dataclass
class Node:
    """A value of a conf document.

    Args:
        content: A scalar, or nodes in a list or by key.
        where: Where the value was written, for messages.
        text: A scalar as written; a key that wants text takes it from here, so that the class
            names `1.0`, `007` and `true` stay what they are.
        name_where: Where the key was written; empty for the root and for elements of lists.
        broken: A problem was already reported for it.
        repeated: Its key stands in the section again, which was reported there.
    """

    content: Scalar | list[Node] | dict[str, Node]
    where: str
    text: str | None = None
    name_where: str = ""
    broken: bool = False
    repeated: bool = False

    @property
    def blank(self) -> bool:
        """Return whether nothing was written: a key without a value."""
        return self.content is None and self.text == ""

    @property
    def place(self) -> str:
        """Return the place to point at: the value of a scalar, the key of a section or list."""
        is_scalar = not isinstance(self.content, (list, dict)) and not self.blank
        return self.where if is_scalar or not self.name_where else self.name_where

    @property
    def plain(self) -> object:
        """Return the value as plain Python."""
        if isinstance(self.content, dict):
            return {key: node.plain for key, node in self.content.items()}
        if isinstance(self.content, list):
            return [node.plain for node in self.content]
        return self.content


def scalar(text: str) -> Scalar:
    """Return what an unquoted scalar means.

    Example:
        >>> [scalar(word) for word in ("1e-5", "010", "no", "true", "~")]
        [1e-05, 10, 'no', True, None]
    """
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if len(text) <= _DIGITS and _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _SPECIAL.fullmatch(text):
        return float(text.replace(".", ""))
    return text


def from_plain(value: object, where: str, *, depth: int = 1) -> Node:
    """Return plain Python data as a document, everything at one place.

    Args:
        value: None, bool, int, float, str, or lists, tuples and dicts of them.
        where: The place, for messages.
        depth: Levels that it lies in already, itself included.

    Raises:
        ConfError: The data is nested too deeply.
        TypeError: A value of another kind is met.
    """
    if depth > _DEPTH:
        what, remedy = _TOO_DEEP
        raise ConfError(Problem("LF1008", what, where, remedy=remedy))
    if isinstance(value, dict):
        pairs = {str(k): from_plain(v, where, depth=depth + 1) for k, v in value.items()}
        return Node(pairs, where)
    if isinstance(value, (list, tuple)):
        return Node([from_plain(item, where, depth=depth + 1) for item in value], where)
    if isinstance(value, bool):
        return Node(value, where, text=str(value).lower())
    if value is None:
        return Node(None, where, text="null")
    if isinstance(value, (int, float, str)):
        return Node(value, where, text=str(value))
    raise TypeError(f"{type(value).__name__} cannot stand in a conf")


def parse(text: str, place: Callable[[int, int], str]) -> tuple[Node | None, list[Problem]]:
    """Parse YAML.

    Args:
        text: The document.
        place: Makes a place out of line and column, both from 1.

    Returns:
        The root (None if there is nothing in it), and the problems that do not stop the reader:
        repeated keys, anchors, aliases, tags, keys that are not names.

    Raises:
        ConfError: The text is not YAML, holds several documents, or is nested too deeply.
    """
    builder = _Builder(place)
    try:
        root = builder.document(yaml.parse(text, Loader=yaml.SafeLoader))
    except ReaderError as error:
        before = text[: error.position]
        line, column = before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1
        problem = Problem(
            "LF1006",
            f"character U+{ord(text[error.position]):04X} cannot stand in a conf",
            where=place(line, column),
            remedy="remove it",
        )
        raise ConfError([*builder.problems, problem]) from error
    except yaml.MarkedYAMLError as error:
        raise ConfError([*builder.problems, _syntax(error, place)]) from error
    return root, builder.problems


def _syntax(error: yaml.MarkedYAMLError, place: Callable[[int, int], str]) -> Problem:
    mark = error.problem_mark or error.context_mark
    said = " ".join(part for part in (error.context, error.problem) if part)
    what, remedy = next(
        (words for sign, words in _SYNTAX.items() if sign in said),
        (said, "look at this line and the one before: indentation, a missing colon or quote"),
    )
    where = place(mark.line + 1, mark.column + 1) if mark else place(1, 1)
    return Problem("LF1006", f"not YAML: {what}", where=where, remedy=remedy)


class _Builder:
    """Turns the parser's events into nodes."""

    def __init__(self, place: Callable[[int, int], str]) -> None:
        self._place = place
        self.problems: list[Problem] = []

    def document(self, events: Iterator[yaml.Event]) -> Node | None:
        root: Node | None = None
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent) and root is not None:
                self._add(
                    "LF1008",
                    event,
                    "a second document starts here",
                    "a conf is one document: remove the `---`",
                )
                raise ConfError(self.problems)
            if isinstance(event, yaml.NodeEvent):
                root = self._node(event, events, 1)
        return None if root is None or root.blank else root

    def _node(self, event: yaml.Event, events: Iterator[yaml.Event], depth: int) -> Node:
        if depth > _DEPTH:
            self._add("LF1008", event, *_TOO_DEEP)
            raise ConfError(self.problems)
        where = self._where(event)
        if isinstance(event, yaml.AliasEvent):
            self._refuse(event, f"alias `*{event.anchor}`")
            return Node(None, where, broken=True)
        anchor, tag = getattr(event, "anchor", None), getattr(event, "tag", None)
        if anchor is not None:
            self._refuse(event, f"anchor `&{anchor}`")
        if tag not in (None, "!"):
            self._refuse(event, f"tag `{tag.replace('tag:yaml.org,2002:', '!!')}`")
        if isinstance(event, yaml.SequenceStartEvent):
            node = Node(list(self._elements(events, depth)), where)
        elif isinstance(event, yaml.MappingStartEvent):
            node = Node(self._pairs(events, depth), where)
        elif isinstance(event, yaml.ScalarEvent):
            unquoted = event.implicit[0] and event.style is None
            content = scalar(event.value) if unquoted else event.value
            node = Node(content, where, text=event.value)
        else:
            raise TypeError(f"{type(event).__name__} starts no node")
        node.broken = anchor is not None or tag not in (None, "!")
        return node

    def _elements(self, events: Iterator[yaml.Event], depth: int) -> Iterator[Node]:
        for event in events:
            if isinstance(event, yaml.SequenceEndEvent):
                return
            yield self._node(event, events, depth + 1)

    def _pairs(self, events: Iterator[yaml.Event], depth: int) -> dict[str, Node]:
        pairs: dict[str, Node] = {}
        for event in events:
            if isinstance(event, yaml.MappingEndEvent):
                break
            name = self._node(event, events, depth + 1)
            value = self._node(next(events), events, depth + 1)
            value.name_where = name.where
            if isinstance(name.content, (list, dict)) or not name.text:
                self._add("LF1008", event, "this key is not a name", "write `name: value`")
            elif name.text in pairs:
                first = pairs[name.text]
                first.repeated = True
                what = f"key `{name.text}` stands here twice; the first is at {first.name_where}"
                self._add("LF1007", event, what, "remove one of them")
            else:
                pairs[name.text] = value
        return pairs

    def _refuse(self, event: yaml.Event, what: str) -> None:
        self._add(
            "LF1008",
            event,
            f"{what} is not allowed: every value of a conf has one place and no tag",
            "write the value itself; put text that starts with `*`, `&` or `!` in quotes",
        )

    def _add(self, code: str, event: yaml.Event, what: str, remedy: str) -> None:
        self.problems.append(Problem(code, what, where=self._where(event), remedy=remedy))

    def _where(self, event: yaml.Event) -> str:
        mark = event.start_mark
        return self._place(mark.line + 1, mark.column + 1) if mark else self._place(1, 1)
