"""Markdown from names that somebody else chose: escaped, in tables and sentences."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import ROUND_CEILING, Context, Decimal

__all__ = ["code_block", "escape", "figure", "listed", "table", "upper_figure"]

# What Markdown or HTML gives a meaning inside a line. Signs that have one only at the beginning of
# a line are left alone: no name ever stands there.
_SPECIAL = re.compile(r"([\\`*_\[\]<>|~&@$])")
# What is made a link as it stands: https://..., mailto:..., www.... (an address has its at sign).
_LINK = re.compile(r"(?i)(:(?=//)|(?<=mailto):|(?<=xmpp):|(?<=www)\.)")
_MAX_NAME = 200
_WIDE = Context(prec=400)  # the largest float has 309 digits before the point


def escape(text: str) -> str:
    r"""Return ``text`` as words of a Markdown sentence or cell, whatever is in it.

    Line breaks become spaces; characters that cannot be seen (controls, changes of the writing
    direction) become U+FFFD; names beyond 200 characters are cut.

    Example:
        >>> print(escape("mean_radius | <b>"))
        mean\_radius \| \<b\>
    """
    cut = text if len(text) <= _MAX_NAME else text[:_MAX_NAME] + "..."
    one_line = " ".join(cut.split())
    seen = "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in one_line)
    return _LINK.sub(r"\\\1", _SPECIAL.sub(r"\\\1", seen))


def figure(value: float | None) -> str:
    """Return a number with four significant digits, or a dash for none."""
    return "-" if value is None else f"{value:.4g}"


def upper_figure(value: float | None) -> str:
    """Return a number with three decimals, rounded up: an epsilon is never shown too small."""
    if value is None:
        return "-"
    return str(Decimal(repr(value)).quantize(Decimal("0.001"), ROUND_CEILING, _WIDE))


def listed(items: Sequence[str], most: int) -> str:
    """Return escaped items with commas, the first ``most`` of them, and how many are left out."""
    shown = ", ".join(escape(item) or "(empty)" for item in items[:most])
    return shown if len(items) <= most else f"{shown}, and {len(items) - most} more"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table; the first column is left-aligned, the others as the header's.

    Args:
        header: Titles; one that ends in ``>`` aligns its column to the right.
        rows: Cells, already escaped.
    """
    titles = [title.removesuffix(">") for title in header]
    rule = ["---:" if title.endswith(">") else ":---" for title in header]
    return [_row(titles), _row(rule), *(_row(row) for row in rows)]


def code_block(lines: Sequence[str]) -> list[str]:
    """Return a fenced block of fixed text."""
    return ["```sh", *lines, "```"]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
