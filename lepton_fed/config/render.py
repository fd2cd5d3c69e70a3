"""A conf as a YAML file that explains itself: every key with its meaning above it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

from lepton_fed.config.hints import bounds, choices
from lepton_fed.config.keys import Key, keys_of
from lepton_fed.config.load import load_values
from lepton_fed.config.schema import KINDS, Conf
from lepton_fed.config.yaml_text import block, flow
from lepton_fed.core.digests import plain

__all__ = ["render"]

_WIDTH = 100
_HEADERS = {
    "simulation": (
        "A federated run in one process: the coordinator, and sites that share one data set out "
        "among them.",
        "lepton-fed simulate --conf conf/simulation.yaml",
    ),
    "server": (
        "The coordinator of a federated run.",
        "lepton-fed check --conf conf/server.yaml",
    ),
    "client": (
        "A site: its own rows, which stay where they are, and the rules under which it takes part.",
        "lepton-fed check --conf conf/client.yaml",
    ),
}


def render(conf: Conf | Mapping[str, object], kind: str) -> str:
    """Return a conf as commented YAML.

    Keys that are flagged ``advanced`` are left out while they have their default.

    Args:
        conf: A conf, or its values as plain data; what is missing there has its default.
        kind: A key of ``KINDS``.

    Returns:
        Text that :func:`.load.load_conf` reads back to the same conf.

    Raises:
        ConfError: The values make no conf.
    """
    whole = load_values(KINDS[kind], conf).conf if isinstance(conf, Mapping) else conf
    sections = ("\n".join(lines) for lines in _keys(whole, 0))
    return "\n\n".join(["\n".join(_header(kind)), *sections]) + "\n"


def _header(kind: str) -> Iterator[str]:
    purpose, command = _HEADERS[kind]
    yield from _comment(purpose, 0)
    yield "#"
    yield f"#   {command}"
    yield "#"
    yield from _comment(
        "A key that is left out has its default. Any key can be set on the command line as well: "
        "key=value. `lepton-fed config explain KEY` says more about one.",
        0,
    )


def _keys(section: object, indent: int) -> Iterator[list[str]]:
    """Yield the lines of each key of a section."""
    schema: type = type(section)
    for key in keys_of(schema).values():
        value = getattr(section, key.name)
        if not (key.setting.advanced and value == key.default):
            yield [*_comment(_meaning(key), indent), *_value(key, value, indent)]


def _value(key: Key, value: object, indent: int) -> Iterator[str]:
    margin = " " * indent
    if key.section is not None and isinstance(value, list) and value:
        for name, inner in keys_of(key.section).items():
            yield from _comment(f"{name}: {_meaning(inner)}", indent, first="  ", rest="    ")
        yield f"{margin}{key.name}:"
        for element in value:
            yield from _element(element, indent + 2)
    elif is_dataclass(value):
        yield f"{margin}{key.name}:"
        yield from _spaced(_keys(value, indent + 2), apart=indent == 0)
    else:
        yield from _filled(f"{margin}{key.name}: ", plain(value), indent + 2)


def _spaced(keys: Iterable[list[str]], *, apart: bool) -> Iterator[str]:
    """Yield the lines of a section; sections in a top-level one stand apart by a blank line."""
    before = False
    for index, lines in enumerate(keys):
        is_section = sum(not line.lstrip().startswith("#") for line in lines) > 1
        if apart and index and (before or is_section):
            yield ""
        yield from lines
        before = is_section


def _element(element: Any, indent: int) -> Iterator[str]:
    """Yield an element of a list of sections: in one line if it fits, without its defaults."""
    schema: type = type(element)
    given = {
        name: plain(getattr(element, name))
        for name, key in keys_of(schema).items()
        if key.required or getattr(element, name) != key.default
    }
    line = f"{' ' * indent}- {flow(given)}"
    if len(line) <= _WIDTH:
        yield line
    else:
        yield f"{' ' * indent}- {block(given, indent + 2).strip()}"


def _filled(name: str, value: object, indent: int) -> Iterator[str]:
    """Yield ``name`` and a value, a long list on as many lines as it needs."""
    line = f"{name}{flow(value)}"
    if len(line) <= _WIDTH or not isinstance(value, Sequence) or isinstance(value, str):
        yield line
        return
    line = f"{name}["
    for index, item in enumerate(map(flow, value)):
        end = "]" if index == len(value) - 1 else ","
        if len(line) + len(item) + 2 > _WIDTH and line.strip():
            yield line.rstrip()
            line = " " * indent
        line += f"{item}{end} "
    yield line.rstrip()


def _meaning(key: Key) -> str:
    """Return meaning, unit and limits of a key in prose."""
    doc = key.setting.doc
    parts = [doc]
    if key.setting.unit:
        parts.append(f"Unit: {key.setting.unit}.")
    if limits := bounds(key.setting):
        parts.append(f"{limits[0].upper()}{limits[1:]}.")
    named = [str(choice) for choice in choices(key.hint)]
    if len(named) > 1 and not all(choice in doc for choice in named):
        parts.append(f"One of {', '.join(named)}.")
    return " ".join(parts)


def _comment(text: str, indent: int, *, first: str = "", rest: str = "") -> list[str]:
    margin = f"{' ' * indent}# "
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=f"{margin}{first}",
        subsequent_indent=f"{margin}{rest}",
        break_on_hyphens=False,
    )
