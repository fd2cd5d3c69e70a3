"""The keys of a conf, read off its dataclasses, and the dotted names by which people call them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import Any, get_type_hints

from lepton_fed.config.hints import element, is_section, optional
from lepton_fed.core.settings import Setting, setting_of

__all__ = ["Key", "Path", "dotted", "keys_of", "split", "walk"]

Path = tuple[str | int, ...]

_PART = re.compile(r"([^.\[\]=\s]+)((?:\[[0-9]{1,6}\])*)")


@dataclass(frozen=True)
class Key:
    """One key of a section.

    Args:
        name: Its name.
        hint: Its resolved type hint.
        setting: Meaning, bounds and unit.
        default: Default value; ``MISSING`` for a key that must be given.
    """

    name: str
    hint: Any
    setting: Setting
    default: Any

    @property
    def required(self) -> bool:
        """Return whether the key must be given."""
        return self.default is MISSING

    @property
    def section(self) -> type | None:
        """Return the dataclass behind the key, or behind the elements of its list."""
        inner = element(self.hint) or optional(self.hint)[0]
        return inner if is_section(inner) else None

    @property
    def is_list(self) -> bool:
        """Return whether the key holds a list."""
        return element(self.hint) is not None

    @property
    def is_free(self) -> bool:
        """Return whether the key holds names and values that the schema does not know."""
        return bool(optional(self.hint)[0] == dict[str, Any])


@cache
def keys_of(section: type) -> dict[str, Key]:
    """Return the keys of a section by name, in the order of the dataclass."""
    hints = get_type_hints(section)
    found = {}
    for field in fields(section):
        default = field.default
        if field.default_factory is not MISSING:
            default = field.default_factory()
        found[field.name] = Key(field.name, hints[field.name], setting_of(field), default)
    return found


def walk(section: type, prefix: str = "") -> Iterator[tuple[str, Key]]:
    """Yield every key below ``section`` with its dotted name, sections before what is in them.

    Keys in the elements of a list are named `columns[].std`.
    """
    for key in keys_of(section).values():
        name = f"{prefix}.{key.name}" if prefix else key.name
        yield name, key
        if key.section is not None:
            yield from walk(key.section, f"{name}[]" if key.is_list else name)


def dotted(path: Path) -> str:
    """Return the dotted name of a path.

    Example:
        >>> dotted(("task", "data", "columns", 2, "std"))
        'task.data.columns[2].std'
    """
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def split(name: str) -> Path:
    """Return the path of a dotted name.

    Raises:
        ValueError: ``name`` is not a dotted name.

    Example:
        >>> split("task.data.columns[2].std")
        ('task', 'data', 'columns', 2, 'std')
    """
    path: list[str | int] = []
    for part in name.split("."):
        match = _PART.fullmatch(part)
        if match is None:
            raise ValueError(f"{name!r} is not a dotted name")
        path.append(match[1])
        path.extend(int(index) for index in re.findall(r"[0-9]+", match[2]))
    return tuple(path)
