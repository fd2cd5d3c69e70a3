"""A ledger for somebody else: all entries and what they add up to, signed by the site.

Who has the site's public key can check it without the site, its files or its rows: the chain is
hashed anew and every sum is computed again from the entries. The hashes of rows stay at the site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lepton_fed.core.decode import decode, strict_json
from lepton_fed.core.digests import canonical_json, plain
from lepton_fed.errors import Problem, Refused
from lepton_fed.identity.signature import PrivateKey, PublicKey, check_payload, sign_payload
from lepton_fed.privacy.dp.accounting import ADJACENCY, GRIDS, ZERO_OUT, epsilon_of
from lepton_fed.privacy.ledger.book import Book
from lepton_fed.privacy.ledger.chain import GENESIS, Entry, Head, followed

__all__ = ["EXPORT_TYPE", "DatasetSpend", "RunSpend", "Statement", "exported", "statement_of",
           "verified"]  # fmt: skip

EXPORT_TYPE = "application/vnd.lepton-fed.ledger.v1+json"
"""What an export is signed as."""


@dataclass(frozen=True)
class RunSpend:
    """What a run cost a data set.

    Args:
        dataset: Name of the data set.
        run: Name of the run.
        agreement: Digest of what was agreed to.
        mechanisms: What added its noise: ``dp_sgd`` or ``dp_ftrl``.
        samplers: What drew its records.
        charges: How often a round was charged.
        epsilon: What they cost by themselves.
        reserved: Rounds that are reserved still.
    """

    dataset: str
    run: str
    agreement: str
    mechanisms: list[str]
    samplers: list[str]
    charges: int
    epsilon: float
    reserved: int


@dataclass(frozen=True)
class DatasetSpend:
    """What the record of a data set that paid most has paid.

    Args:
        dataset: Its name.
        contents: Digests of what it has held.
        shares_rows_with: Other names that some of its rows are under.
        spent: Epsilon of all charges.
        committed: Epsilon with what is reserved.
    """

    dataset: str
    contents: list[str]
    shares_rows_with: list[str]
    spent: float
    committed: float


@dataclass(frozen=True)
class Statement:
    """What a ledger adds up to.

    Args:
        ledger: The ledger's own name, drawn when it was made.
        entries: How many it has.
        head: Hash of the last.
        delta: Delta at which epsilon is counted.
        adjacency: What a neighbouring data set is.
        grid: Coarsest grid of the accounting.
        datasets: What each data set has spent.
        runs: What each run cost.
    """

    ledger: str
    entries: int
    head: str
    delta: float
    adjacency: str
    grid: float
    datasets: list[DatasetSpend]
    runs: list[RunSpend]


def statement_of(book: Book, delta: float) -> Statement:
    """Return what entries add up to, at a delta."""
    datasets = [
        DatasetSpend(
            name,
            sorted(book.contents(name)),
            sorted(frozenset().union(*book.with_rows_of(name)) - {name}),
            book.spent(name, delta),
            book.committed(name, delta),
        )
        for name in book.datasets
    ]
    runs = [
        RunSpend(
            account.dataset,
            account.name.run,
            account.name.agreement,
            account.mechanisms,
            account.samplers,
            len(account.charges),
            epsilon_of(account.charged, delta),
            account.remaining,
        )
        for account in book.runs
    ]
    relations = {event.adjacency for account in book.runs for event in account.charged}
    return Statement(
        book.identity,
        book.head.number,
        book.head.hash,
        delta,
        ZERO_OUT if ZERO_OUT in relations else ADJACENCY,
        GRIDS[0],
        datasets,
        runs,
    )


def exported(site: str, entries: Sequence[Entry], delta: float, key: PrivateKey) -> bytes:
    """Return a signed copy of a ledger: JSON in UTF-8.

    Args:
        site: Name of the site.
        entries: All of them, the oldest first.
        delta: Delta at which epsilon is counted.
        key: The site's identity key.
    """
    book = Book()
    for entry in entries:
        book.add(entry)
    body = {
        "site": site,
        "statement": asdict(statement_of(book, delta)),
        "entries": [dict(entry.body) for entry in entries],
    }
    signature = sign_payload(key, EXPORT_TYPE, canonical_json(body))
    public = key.public_key().public_bytes_raw()
    return canonical_json({**body, "key": public.hex(), "signature": signature.hex()}) + b"\n"


def verified(content: bytes, key: PublicKey, where: str) -> tuple[str, Statement]:
    """Return the site and the sums of an export after checking all of it.

    Args:
        content: What claims to be one.
        key: The site's identity key, known from elsewhere (the roster).
        where: Where it was found, for the message.

    Raises:
        Refused: LF4213, it is malformed, not signed with that key, or does not add up.
    """

    def refuse(why: str) -> Refused:
        return Refused(
            Problem("LF4213", f"this is not a ledger as the site exported it: {why}", where=where,
                    remedy="compare the key with the roster's; ask the site to export it again")
        )  # fmt: skip

    try:
        whole: Mapping[str, Any] = strict_json(content)
        site, entries = str(whole["site"]), list(whole["entries"])
        body = {"site": site, "statement": whole["statement"], "entries": entries}
        signature = bytes.fromhex(whole["signature"])
        said = decode(Statement, whole["statement"])
        signed = check_payload(key, EXPORT_TYPE, canonical_json(body), signature)
    except (KeyError, TypeError, ValueError) as error:
        raise refuse(f"it is malformed ({error})") from None
    if not signed:
        raise refuse("the signature is not of this key")
    book, head = Book(), Head(0, GENESIS)
    for each in entries:
        try:
            entry = followed(head, each)
            book.add(entry)
        except (KeyError, TypeError, ValueError):
            raise refuse(f"entry {head.number + 1} does not follow from the one before") from None
        head = Head(entry.number, entry.hash)
    if plain(statement_of(book, said.delta)) != plain(said):
        raise refuse("its sums are not those of its entries")
    return site, said
