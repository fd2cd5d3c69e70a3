"""Plain values as YAML that :mod:`.document` reads back to the same values.

Text that another YAML reader could take for something else (`no`, `010`, `1:30`) is quoted, and
numbers are written so that YAML 1.1 reads them as numbers too (`1.0e-05`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TypeGuard

import yaml

__all__ = ["block", "flow"]

_WORD = re.compile(r"[A-Za-z_/][A-Za-z0-9_./+-]*( [A-Za-z0-9_./+-]+)*")
_RESERVED = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null"})


def flow(value: object) -> str:
    """Return a value on one line.

    Args:
        value: None, bool, int, float, str, or sequences and mappings of them.

    Example:
        >>> flow({"by": 16.0, "names": ["north", "1e-5", "no"]})
        "{by: 16.0, names: [north, '1e-5', 'no']}"
    """
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_text(str(k))}: {flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, Sequence):
        return "[" + ", ".join(map(flow, value)) + "]"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text.replace("e", ".0e") if "e" in text and "." not in text else text


def block(section: Mapping[str, object], indent: int = 0) -> str:
    """Return a section as lines of YAML: sections and lists of sections in block style.

    Args:
        section: Keys and values.
        indent: Spaces before each line.
    """
    margin, lines = " " * indent, []
    for key, value in section.items():
        name = f"{margin}{_text(str(key))}:"
        if isinstance(value, Mapping) and value:
            lines.append(f"{name}\n{block(value, indent + 2)}")
        elif _is_list_of_sections(value):
            lines.append(f"{name}\n")
            lines += [f"{margin}  - {block(item, indent + 4).lstrip()}" for item in value]
        else:
            lines.append(f"{name} {flow(value)}\n")
    return "".join(lines)


def _is_list_of_sections(value: object) -> TypeGuard[list[Mapping[str, object]]]:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, Mapping) and item for item in value)
    )


def _text(text: str) -> str:
    if _WORD.fullmatch(text) and text.lower() not in _RESERVED:
        return text
    if text.isprintable():
        return "'" + text.replace("'", "''") + "'"
    quoted: str = yaml.safe_dump(text, default_style='"', width=float("inf"), allow_unicode=True)
    return quoted.rstrip("\n")
