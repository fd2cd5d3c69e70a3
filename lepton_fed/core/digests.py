"""Canonical JSON and SHA-256: one way to turn a value into a digest.

Canonical here means: object keys sorted, no white space, UTF-8, numbers as Python prints the
shortest decimal that reads back to the same double, whole-number floats written with ``.0``.
NaN and infinities have no digest.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

__all__ = ["canonical_json", "digest_of", "plain"]


def plain(value: object) -> Any:
    """Return ``value`` as dicts, lists, strings, numbers, booleans and None.

    Args:
        value: Dataclasses, mappings, sequences, enums and JSON scalars, nested at will.

    Raises:
        TypeError: A value of another kind is met.
    """
    if value is None or isinstance(value, (str, bool, int, float)):
        return value.value if isinstance(value, Enum) else value
    if isinstance(value, Enum):
        return plain(value.value)
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    raise TypeError(f"{type(value).__name__} has no canonical form")


def canonical_json(value: object) -> bytes:
    """Return the canonical JSON of ``value``.

    Raises:
        TypeError: ``value`` holds something that is not plain data.
        ValueError: ``value`` holds NaN or an infinity.

    Example:
        >>> canonical_json({"b": 1, "a": [True, 0.5]})
        b'{"a":[true,0.5],"b":1}'
    """
    text = json.dumps(
        plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode()


def digest_of(purpose: str, value: object) -> str:
    """Return the SHA-256 of ``value``, bound to what it is the digest of.

    Args:
        purpose: Names the kind of thing, so that digests of two kinds never collide.
        value: Plain data.

    Returns:
        64 hexadecimal digits.
    """
    hasher = hashlib.sha256(purpose.encode() + b"\0")
    hasher.update(canonical_json(value))
    return hasher.hexdigest()
