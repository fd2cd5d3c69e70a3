"""Plain data back into dataclasses, strictly: the reading half of canonical JSON.

What is read here may come from a stranger (a task on the wire, a manifest in a bundle), so nothing
is guessed, converted or filled in. Unknown and missing keys, duplicate keys, wrong types, numbers
out of the range that the field declares, NaN, infinities and integers beyond 64 bits are refused,
each with its place: ``data.columns[3].kind``. The one freedom: a whole number may stand where a
float is expected and stays the integer it is, so that the digest of what was read is the digest of
what was written.

The caller bounds the size of the input; time and memory are linear in it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from lepton_fed.core.settings import setting_of
from lepton_fed.core.task import Task

__all__ = ["decode", "strict_json", "task_from_json"]

T = TypeVar("T")

_MAX_DEPTH = 32
_MAX_INTEGER = 2**63 - 1
_MAX_DIGITS = len(f"-{_MAX_INTEGER}")
_MAX_EXACT_FLOAT = 2**53
_MAX_SHOWN = 60


def task_from_json(data: bytes) -> Task:
    """Return the task that ``data`` describes.

    Args:
        data: JSON of every field of a :class:`~lepton_fed.core.task.Task`, in UTF-8.

    Raises:
        ValueError: ``data`` is not such a task; the message says where.
    """
    return decode(Task, strict_json(data))


def strict_json(data: bytes) -> Any:
    """Return the value of a JSON text.

    Args:
        data: JSON in UTF-8, without byte order mark.

    Returns:
        Dicts, lists, strings, integers, floats, booleans and None.

    Raises:
        ValueError: ``data`` is not JSON, not UTF-8, nests too deep, repeats a key, or holds NaN.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte {error.start}") from None
    try:
        return json.loads(
            text, object_pairs_hook=_object, parse_int=_whole, parse_constant=_no_constant
        )
    except RecursionError:
        raise ValueError("not JSON: nested too deep") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None


def decode(kind: type[T], value: object, path: str = "") -> T:
    """Return ``value`` as a ``kind``.

    Args:
        kind: A dataclass whose fields are scalars, ``Literal``, ``X | None``, ``list[X]``,
            ``dict[str, X]``, ``Any`` or such dataclasses.
        value: What :func:`strict_json` returned.
        path: Where ``value`` stands, for messages.

    Raises:
        ValueError: ``value`` does not fit; the message says where.
        TypeError: ``kind`` uses a type that cannot be decoded, which is a mistake of the caller.
    """
    return _decode(kind, value, path, 0)  # type: ignore[no-any-return]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {_show(key)} is given twice")
            seen.add(key)
    return found


def _whole(digits: str) -> int:
    """Refuse before converting: the time of int() grows with the square of the digits."""
    if len(digits) > _MAX_DIGITS or abs(int(digits)) > _MAX_INTEGER:
        raise ValueError(f"{_show(digits)} is a whole number beyond 64 bits")
    return int(digits)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number that JSON has")


def _decode(kind: Any, value: object, path: str, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise ValueError(_at(path, f"nested deeper than {_MAX_DEPTH}"))
    if is_dataclass(kind):
        return _record(kind, value, path, depth)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return _choice(arguments, value, path)
    if origin in (Union, UnionType):
        return _optional(arguments, value, path, depth)
    if origin is list:
        items = _expect(list, "a list", value, path)
        return [_decode(arguments[0], v, f"{path}[{i}]", depth + 1) for i, v in enumerate(items)]
    if origin is dict and arguments[0] is str:
        entries = _expect(dict, "an object", value, path)
        return {
            _text(key, path): _decode(arguments[1], item, _below(path, key), depth + 1)
            for key, item in entries.items()
        }
    read = _SCALARS.get(kind)
    if read is None:
        if kind is Any:
            return _anything(value, path, depth)
        raise TypeError(f"{_at(path, '')}{kind!r} cannot be decoded")
    return read(value, path)


def _record(kind: Any, value: object, path: str, depth: int) -> Any:
    entries = _expect(dict, "an object", value, path)
    hints = _hints(kind)
    for key in entries:
        if key not in hints:
            raise ValueError(_at(path, f"unknown key {_show(key)}"))
    found = {}
    for field in fields(kind):
        if field.name not in entries:
            raise ValueError(_at(path, f"key {field.name!r} is missing"))
        place = _below(path, field.name)
        item = _decode(hints[field.name], entries[field.name], place, depth + 1)
        complaint = setting_of(field).complaint(item)
        if complaint:
            raise ValueError(_at(place, f"{complaint}, not {_show(item)}"))
        found[field.name] = item
    return kind(**found)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    """Return the resolved types of a dataclass's fields; resolving costs more than decoding."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def _choice(choices: tuple[Any, ...], value: object, path: str) -> Any:
    for choice in choices:
        if type(value) is type(choice) and value == choice:
            return choice
    shown = ", ".join(repr(choice) for choice in choices)
    raise ValueError(_at(path, f"must be one of {shown}, not {_show(value)}"))


def _optional(kinds: tuple[Any, ...], value: object, path: str, depth: int) -> Any:
    others = [kind for kind in kinds if kind is not NoneType]
    if len(others) != 1 or len(kinds) != 2:
        raise TypeError(f"{_at(path, '')}of the unions only 'X | None' can be decoded")
    return None if value is None else _decode(others[0], value, path, depth)


def _anything(value: object, path: str, depth: int) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, list):
        return _decode(list[Any], value, path, depth)
    if isinstance(value, dict):
        return _decode(dict[str, Any], value, path, depth)
    if isinstance(value, str):
        return _text(value, path)
    return _integer(value, path) if isinstance(value, int) else _number(value, path)


def _expect(kind: type[T], name: str, value: object, path: str) -> T:
    if not isinstance(value, kind):
        raise ValueError(_at(path, f"must be {name}, not {_show(value)}"))
    return value


def _text(value: object, path: str) -> str:
    text = _expect(str, "a text", value, path)
    try:
        text.encode()
    except (
        UnicodeEncodeError
    ):  # JSON can spell half a surrogate pair, which no digest can be made of
        raise ValueError(_at(path, f"{_show(text)} is not a Unicode text")) from None
    return text


def _boolean(value: object, path: str) -> bool:
    return _expect(bool, "true or false", value, path)


def _integer(value: object, path: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(_at(path, f"must be a whole number, not {_show(value)}"))
    if abs(value) > _MAX_INTEGER:
        raise ValueError(_at(path, "is a whole number beyond 64 bits"))
    return value


def _number(value: object, path: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(_at(path, f"must be a number, not {_show(value)}"))
    if isinstance(value, float):
        if not math.isfinite(value):  # 1e999 is good JSON and reads as infinity
            raise ValueError(_at(path, "is a number beyond the range of a double"))
    elif abs(value) > _MAX_EXACT_FLOAT:
        raise ValueError(_at(path, "is a whole number that no double holds exactly"))
    return value


_SCALARS: dict[Any, Callable[[object, str], Any]] = {
    str: _text,
    bool: _boolean,
    int: _integer,
    float: _number,
}


def _below(path: str, key: object) -> str:
    name = key if isinstance(key, str) and key.isidentifier() else _show(key)
    return f"{path}.{name}" if path else str(name)


def _at(path: str, what: str) -> str:
    return f"{path}: {what}" if path else what


def _show(value: object) -> str:
    """Return ``value`` short and free of control characters: it may be a stranger's."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    shown = ascii(value[: _MAX_SHOWN + 1] if isinstance(value, str) else value)
    return shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]}...'"
