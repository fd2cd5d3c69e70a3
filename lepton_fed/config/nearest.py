"""The name that was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["did_you_mean", "nearest"]


def nearest(word: str, known: Iterable[str]) -> str:
    """Return the known name nearest to ``word``, or an empty string if none is near.

    Example:
        >>> nearest("epslion", ["epsilon", "delta"])
        'epsilon'
    """
    by_folded = {name.casefold(): name for name in known}
    found = difflib.get_close_matches(word.casefold(), by_folded, n=1, cutoff=0.6)
    return by_folded[found[0]] if found else ""


def did_you_mean(word: str, known: Iterable[str], *, noun: str) -> str:
    """Return the remedy for an unknown name: the nearest one and all there are.

    Args:
        word: What was written.
        known: The names there are.
        noun: What they are, in the plural: ``"keys here"``, ``"installed models"``.
    """
    names = list(known)
    near = nearest(word, names)
    listed = f"{noun}: {', '.join(names)}" if names else f"{noun}: none"
    return f"did you mean `{near}`? {listed}" if near else listed
