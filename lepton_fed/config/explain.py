"""What a conf key means, which values it takes, and where its present value comes from."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lepton_fed.config import plugins
from lepton_fed.config.hints import bounds, choices, element, is_section, words
from lepton_fed.config.keys import Key, Path, dotted, keys_of, split, walk
from lepton_fed.config.load import Loaded
from lepton_fed.config.nearest import nearest
from lepton_fed.config.plugin_checks import GIVEN
from lepton_fed.config.plugins import Group
from lepton_fed.config.schema import KINDS
from lepton_fed.config.yaml_text import flow
from lepton_fed.core.digests import plain
from lepton_fed.errors import ConfError, Problem

__all__ = ["Explanation", "all_keys", "explain"]

_WIDTH = 88
_SECTION = "a section of keys and values"
_ABSENT = object()
# Sections of free arguments: the group of the plug-in that reads them, and the key that names it.
_ARGUMENTS: dict[str, tuple[Group, str]] = {
    "task.model": ("models", "name"),
    "strategy": ("strategies", "name"),
    "sites.source": ("readers", "reader"),
    "sites.partition": ("partitioners", "name"),
    "source": ("readers", "reader"),
}


@dataclass(frozen=True)
class Explanation:
    """One key, explained.

    Args:
        key: Dotted name.
        meaning: What it means.
        type: Its type in words.
        unit: Unit of a number; may be empty.
        default: Default value as YAML; empty for a key that must be given and for a section.
        bounds: Bounds in words; may be empty.
        choices: The values it takes, when they are few.
        value: Present value as YAML; None without a conf, or for a key that the conf has not.
        origin: Where the value comes from: a place, ``command line`` or ``default``.
        keys: Keys of a section and their meanings.
    """

    key: str
    meaning: str
    type: str
    unit: str = ""
    default: str = ""
    bounds: str = ""
    choices: tuple[str, ...] = ()
    value: str | None = None
    origin: str = ""
    keys: Mapping[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the explanation as plain data, for ``--json``."""
        return asdict(self)

    def text(self) -> str:
        """Return the explanation as lines for a terminal."""
        lines = [*filter(None, [self.key]), *_wrapped(self.meaning, "  "), ""]
        facts = {
            "type": self.type,
            "unit": self.unit,
            "bounds": self.bounds,
            "default": self.default,
        }
        lines += (f"  {name:<8} {fact}" for name, fact in facts.items() if fact)
        if self.value is not None:
            lines.append(f"  {'value':<8} {self.value}  ({self.origin})")
        if self.keys:
            width = max(map(len, self.keys)) + 2
            lines += ["", "  keys"]
            for name, meaning in self.keys.items():
                first, *rest = _wrapped(meaning, " " * (width + 4)) or [""]
                lines += [f"    {name:<{width}}{first.strip()}", *rest]
        return "\n".join(line.rstrip() for line in lines)


def all_keys(kind: str) -> list[str]:
    """Return the dotted name of every key of a conf; those of list elements as ``columns[].std``.

    Args:
        kind: A key of ``KINDS``.
    """
    return [name for name, _ in walk(KINDS[kind])]


def explain(kind: str, key: str, loaded: Loaded[Any] | None = None) -> Explanation:
    """Explain one key, or with an empty one the whole conf.

    An argument of a plug-in is explained from the plug-in's signature, which imports it.

    Args:
        kind: A key of ``KINDS``.
        key: Dotted name; an element of a list is named by its number or by ``[]``.
        loaded: A loaded conf of that kind, for the present value.

    Raises:
        ConfError: There is no such key, or the plug-in that has it cannot be loaded.
    """
    schema = KINDS[kind]
    if not key:
        return Explanation("", f"{inspect.getdoc(schema)}", _SECTION, keys=_meanings(schema))
    try:
        path = split(key.replace("[]", "[0]"))
        found, rest = _find(schema, path)
    except (KeyError, ValueError):
        raise _unknown(kind, key, all_keys(kind)) from None
    conf = loaded.conf if loaded else None
    explained = _key(key, found, element(found.hint) if isinstance(path[-1], int) else found.hint)
    has_keys = bool(explained.keys)
    if found.is_free:
        explained = _free(kind, explained, path[: len(path) - len(rest)], rest, conf)
    value = _ABSENT if has_keys or "[]" in key else _select(conf, path)
    if loaded is None or value is _ABSENT:
        return explained
    return replace(explained, value=flow(plain(value)), origin=loaded.origin(key))


def _find(schema: type, path: Path) -> tuple[Key, Path]:
    """Return the key at a path, and what of the path lies in its free arguments.

    Raises:
        KeyError: The schema has no such key.
    """
    name, *rest = path
    key = keys_of(schema)[str(name)]
    if rest and key.is_list and isinstance(rest[0], int):
        del rest[0]
        is_whole = False
    else:
        is_whole = key.is_list
    if not rest or key.is_free:
        return key, tuple(rest)
    if key.section is None or is_whole:
        raise KeyError(name)
    return _find(key.section, tuple(rest))


def _key(name: str, key: Key, hint: Any) -> Explanation:
    inner = hint if is_section(hint) else key.section
    if inner is not None:
        return Explanation(name, key.setting.doc, words(hint), keys=_meanings(inner))
    is_element = hint is not key.hint
    return Explanation(
        key=name,
        meaning=key.setting.doc,
        type=words(hint),
        unit=key.setting.unit,
        default="" if key.required or is_element else flow(plain(key.default)),
        bounds=bounds(key.setting),
        choices=tuple(map(str, choices(hint))),
    )


def _free(kind: str, section: Explanation, path: Path, rest: Path, conf: object) -> Explanation:
    """Explain a section of free arguments, or what lies in it."""
    holder, key = path[:-1], dotted(path)
    anything = Explanation(section.key, "A value that the schema does not know.", "any value")
    if dotted(holder) not in _ARGUMENTS or len(rest) > 1:
        return anything if rest else section
    group, naming = _ARGUMENTS[dotted(holder)]
    plugin = _select(conf, (*holder, naming))
    if plugin is _ABSENT:
        plugin = _find(KINDS[kind], (*holder, naming))[0].default
    arguments = plugins.arguments_of(group, str(plugin), given=GIVEN[group], key=key)
    known = {argument.name: argument for argument in arguments}
    if not rest:
        meaning = f"{section.meaning} Those of {plugin} are:"
        return replace(section, meaning=meaning, keys={name: a.doc for name, a in known.items()})
    argument = known.get(str(rest[0]))
    if argument is not None:
        return Explanation(
            key=section.key,
            meaning=f"{argument.doc or 'An argument.'} (argument of {plugin})",
            type=words(argument.hint),
            default="" if argument.required else flow(plain(argument.default)),
            bounds=bounds(argument.setting),
            choices=tuple(map(str, choices(argument.hint))),
        )
    if _select(conf, (*path, *rest)) is _ABSENT:
        raise _unknown(kind, section.key, [f"{key}.{name}" for name in known])
    return anything


def _meanings(section: type) -> dict[str, str]:
    return {name: key.setting.doc for name, key in keys_of(section).items()}


def _select(conf: object, path: Path) -> object:
    """Return the value at a path of a conf, or ``_ABSENT``."""
    value = conf
    for part in path:
        if isinstance(value, Mapping):
            value = value.get(part, _ABSENT)
        elif isinstance(value, list) and isinstance(part, int):
            value = value[part] if part < len(value) else _ABSENT
        else:
            value = getattr(value, str(part), _ABSENT)
    return value


def _unknown(kind: str, key: str, known: Sequence[str]) -> ConfError:
    """Return the error for a key that does not exist, with those it is most like."""
    asked = re.sub(r"\[[0-9]*\]", "[]", key)
    by_last: dict[str, list[str]] = {}
    for name in known:
        by_last.setdefault(_last(name), []).append(name)
    # The right name in the wrong section is likelier than a wrong name in the right one.
    near = by_last.get(_last(asked)) or [nearest(asked, known)]
    if near == [""]:
        near = by_last.get(nearest(_last(asked), by_last), [])
    remedy = f"did you mean {' or '.join(near[:3])}?" if near else "`config explain` lists the keys"
    return ConfError(Problem("LF1027", f"a {kind} conf has no such key", key=key, remedy=remedy))


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _wrapped(text: str, margin: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=margin, subsequent_indent=margin)
