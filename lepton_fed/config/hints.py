"""Type hints of conf keys and plug-in arguments: in plain words, and as a check of a value.

The schema's own keys are converted by OmegaConf; this module words their types for messages and
for `config explain`. Arguments of plug-ins have no schema but a signature; :func:`fit` checks a
value against the part of Python's type language that a conf can express, and lets through what it
cannot judge.
"""

from __future__ import annotations

import json
import types
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

from lepton_fed.core.settings import Setting

__all__ = [
    "advice",
    "bounds",
    "choices",
    "element",
    "fit",
    "is_section",
    "optional",
    "shown",
    "words",
]

_PLAIN = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
}
_ADVICE = {
    int: "write digits only: 20",
    float: "write it like 0.5 or 1e-5",
    bool: "write true or false",
    str: "put it in quotes if it is meant as text",
}
_LISTS = (list, tuple, Sequence, Iterable, Collection)
_MAPS = (dict, Mapping)


def _bare(hint: Any) -> Any:
    """Return ``hint`` without ``Annotated``."""
    return _bare(get_args(hint)[0]) if get_origin(hint) is Annotated else hint


def optional(hint: Any) -> tuple[Any, bool]:
    """Return ``hint`` without None, and whether None was in it."""
    hint = _bare(hint)
    if get_origin(hint) not in (Union, types.UnionType):
        return hint, False
    members = get_args(hint)
    rest = tuple(_bare(m) for m in members if m is not type(None))
    return (rest[0] if len(rest) == 1 else Union[rest]), len(rest) < len(members)  # noqa: UP007


def choices(hint: Any) -> tuple[object, ...]:
    """Return the values of a ``Literal``, an empty tuple for another hint."""
    hint, _ = optional(hint)
    return get_args(hint) if get_origin(hint) is Literal else ()


def element(hint: Any) -> Any:
    """Return the element type of a list hint, None for a hint that is not a list."""
    hint, _ = optional(hint)
    if hint in _LISTS or get_origin(hint) in _LISTS:
        return (get_args(hint) or (Any,))[0]
    return None


def is_section(hint: Any) -> TypeGuard[type]:
    """Return whether ``hint`` is a dataclass: a section of keys."""
    return isinstance(hint, type) and is_dataclass(hint)


def words(hint: Any) -> str:
    """Return a type in plain words.

    Example:
        >>> words(list[int] | None)
        'a list of whole numbers, or null'
        >>> words(Literal["sgd", "adam"])
        'sgd or adam'
    """
    hint, or_null = optional(hint)
    text = _words(hint)
    return f"{text}, or null" if or_null else text


def _words(hint: Any) -> str:
    if hint in _PLAIN:
        return _PLAIN[hint]
    if named := choices(hint):
        *most, last = (str(value) for value in named)
        return f"{', '.join(most)} or {last}" if most else last
    if (inner := element(hint)) is not None:
        return f"a list of {_plural(inner)}"
    if hint in _MAPS or get_origin(hint) in _MAPS or is_section(hint):
        return "a section of keys and values"
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_words(_bare(member)) for member in get_args(hint))
    return "any value"


def advice(hint: Any) -> str:
    """Return how a value of a type is written, empty where there is nothing to say.

    Example:
        >>> advice(float | None)
        'write it like 0.5 or 1e-5'
    """
    hint, _ = optional(hint)
    if named := choices(hint):
        return f"write {' or '.join(map(str, named))}"
    if element(hint) is not None:
        return "write [..., ...]"
    return _ADVICE.get(hint, "")


def _plural(hint: Any) -> str:
    hint, _ = optional(hint)
    plurals = {int: "whole numbers", float: "numbers", bool: "true or false", str: "texts"}
    if hint in plurals:
        return plurals[hint]
    if named := choices(hint):
        return f"these: {', '.join(map(str, named))}"
    if is_section(hint):
        return "sections"
    return "lists" if element(hint) is not None else "values"


def shown(value: object, *, width: int = 60) -> str:
    """Return a value as a message quotes it, cut to ``width`` characters."""
    if value is None or isinstance(value, (bool, int, float)):
        text = json.dumps(value)
    elif isinstance(value, Mapping):
        text = f"a section ({', '.join(map(str, value)) or 'empty'})"
    elif isinstance(value, (list, tuple)):
        text = f"a list of {len(value)}" if value else "an empty list"
    elif value == "":
        text = "empty text"
    else:
        text = f"the text {str(value)!r}"
    return text if len(text) <= width else f"{text[: width - 3]}..."


def bounds(of: Setting) -> str:
    """Return the bounds of a number in words, empty without any.

    Example:
        >>> bounds(Setting("", above=0, at_most=1))
        'greater than 0, at most 1'
    """
    named = (
        ("greater than", of.above),
        ("at least", of.at_least),
        ("smaller than", of.below),
        ("at most", of.at_most),
    )
    return ", ".join(f"{word} {_number(value)}" for word, value in named if value is not None)


def _number(value: float) -> str:
    return f"{int(value):_}" if float(value).is_integer() and abs(value) < 1e16 else f"{value:g}"


def fit(value: object, hint: Any) -> tuple[object, bool]:
    """Check a plain value against a type hint, and convert it where nothing is lost.

    Whole numbers fit a float, lists fit a tuple or any sequence; true and false are never numbers.
    A hint that a conf cannot express (a class, a callable) fits everything.

    Args:
        value: None, bool, int, float, str, or lists and dicts of them.
        hint: A resolved type hint.

    Returns:
        The value as the hint wants it, and whether it fits.
    """
    hint = _bare(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return _fit_union(value, get_args(hint))
    if hint is None or hint is type(None):
        return value, value is None
    if named := choices(hint):
        fitting = [c for c in named if type(c) is type(value) and c == value]
        return value, bool(fitting)
    if hint is float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
        return (float(value) if isinstance(value, int) and fits else value), fits
    if hint in (int, str, bool):
        return value, type(value) is hint
    if (inner := element(hint)) is not None:
        return _fit_list(value, hint, inner)
    if hint in _MAPS or get_origin(hint) in _MAPS:
        return _fit_map(value, hint)
    return value, True


def _fit_union(value: object, members: tuple[Any, ...]) -> tuple[object, bool]:
    # An exact type goes first, so that 1 stays a whole number under `float | int`.
    for member in sorted(members, key=lambda m: _bare(m) is not type(value)):
        converted, fits = fit(value, member)
        if fits:
            return converted, True
    return value, False


def _fit_list(value: object, hint: Any, inner: Any) -> tuple[object, bool]:
    if not isinstance(value, (list, tuple)):
        return value, False
    arguments = get_args(hint)
    fixed = get_origin(hint) is tuple and Ellipsis not in arguments
    if fixed and len(arguments) != len(value):
        return value, False
    wanted = arguments if fixed else (inner,) * len(value)
    pairs = [fit(item, want) for item, want in zip(value, wanted, strict=True)]
    items = [item for item, _ in pairs]
    as_tuple = hint is tuple or get_origin(hint) is tuple
    return (tuple(items) if as_tuple else items), all(fits for _, fits in pairs)


def _fit_map(value: object, hint: Any) -> tuple[object, bool]:
    if not isinstance(value, Mapping):
        return value, False
    inner = get_args(hint)[1] if get_args(hint) else Any
    pairs = {str(key): fit(item, inner) for key, item in value.items()}
    return {key: item for key, (item, _) in pairs.items()}, all(fits for _, fits in pairs.values())
