"""What a ledger says, read without opening it as its owner would."""

from __future__ import annotations

from pathlib import Path

from lepton_fed.privacy.ledger.chain import GENESIS, Chain, Head

__all__ = ["charges_in", "entries_in"]


def entries_in(folder: Path, kind: str = "") -> list[dict]:
    """Return the entries of the ledger in a folder, its chain checked: all, or those of a kind."""
    with Chain(folder / "ledger.sqlite").reading(thoroughly=True) as transaction:
        bodies = [dict(entry.body) for entry in transaction.after(Head(0, GENESIS))]
    return [body for body in bodies if kind in ("", body["kind"])]


def charges_in(folder: Path) -> list[dict]:
    """Return the charges in the ledger in a folder."""
    return entries_in(folder, "charged")
