"""Overrides from the command line: `a.b=c` puts a value into a conf document."""

from __future__ import annotations

from collections.abc import Iterable

from lepton_fed.config.document import Node, parse
from lepton_fed.config.hints import shown
from lepton_fed.config.keys import Path, dotted, split
from lepton_fed.errors import ConfError, Problem

__all__ = ["COMMAND_LINE", "apply"]

COMMAND_LINE = "command line"
_WIDTH = 60


def apply(root: Node, overrides: Iterable[str]) -> list[Problem]:
    """Put overrides into a document, each in the place of what the document said there.

    The value is read as YAML; nothing after the `=` is empty text. `a.b[1]=c` replaces an element,
    and appends one when the list is exactly that long.

    Args:
        root: The document, changed in place.
        overrides: Texts `a.b=c`; of two for one key, the later one holds.

    Returns:
        What is wrong with the overrides themselves.
    """
    problems: list[Problem] = []
    for override in overrides:
        try:
            path, node = _read(override)
            _put(root, path, node)
        except ConfError as error:
            problems += error.problems
    return problems


def _read(override: str) -> tuple[Path, Node]:
    short = override if len(override) <= _WIDTH else f"{override[: _WIDTH - 3]}..."
    where = f"{COMMAND_LINE}: {short}"
    name, equals, text = override.partition("=")
    remedy = "write key=value, for example rounds.count=20 or task.metrics=[accuracy]"
    if not equals:
        raise ConfError(Problem("LF1009", "an override needs a `=`", where, remedy=remedy))
    try:
        path = split(name.strip())
    except ValueError:
        what = f"`{name}` is not a key" if name.strip() else "no key before the `=`"
        raise ConfError(Problem("LF1009", what, where, remedy=remedy)) from None
    try:
        node, problems = parse(text, lambda _line, _column: where)
    except ConfError as error:
        problems = list(error.problems)
    if problems:
        raise ConfError(
            [Problem("LF1009", p.what, where, dotted(path), p.remedy) for p in problems]
        )
    node = node or Node("", where, text="")  # a shell swallows the quotes of path=""
    node.name_where = where
    return path, node


def _put(root: Node, path: Path, new: Node) -> None:
    holder = root
    for depth, part in enumerate(path):
        _open(holder, path, depth, new.where)
        here = new if depth == len(path) - 1 else None
        if isinstance(part, str) and isinstance(holder.content, dict):
            if here or part not in holder.content:
                holder.content[part] = here or _blank(new.where)
            holder = holder.content[part]
        elif isinstance(part, int) and isinstance(holder.content, list):
            if part == len(holder.content):
                holder.content.append(here or _blank(new.where))
            elif here:
                holder.content[part] = here
            holder = holder.content[part]


def _open(holder: Node, path: Path, depth: int, where: str) -> None:
    """Make sure that ``holder`` can take ``path[depth]``: a section a name, a list a number."""
    part, name = path[depth], dotted(path[:depth])
    if holder.blank:
        holder.content, holder.text = ({} if isinstance(part, str) else []), None
    wanted = "a section" if isinstance(part, str) else "a list"
    if not isinstance(holder.content, dict if isinstance(part, str) else list):
        raise ConfError(
            Problem(
                "LF1010",
                f"`{name}` is not {wanted}: it is {shown(holder.plain)} ({holder.place})",
                where,
                dotted(path),
                f"correct {name} first, or set it as a whole: {name}=...",
            )
        )
    if isinstance(part, int) and isinstance(holder.content, list) and part > len(holder.content):
        raise ConfError(
            Problem(
                "LF1010",
                f"`{name}` has no element {part}: its length is {len(holder.content)}",
                where,
                dotted(path),
                f"elements count from 0; {name}[{len(holder.content)}] appends one",
            )
        )


def _blank(where: str) -> Node:
    return Node(None, where, text="", name_where=where)
