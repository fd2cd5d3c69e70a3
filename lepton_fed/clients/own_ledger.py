"""The ledger of a site: where its conf says it is, and what else is known of its head.

A ledger that was put back from an older copy is a whole ledger. What tells is the head: receipts
carry it, signed with the site's identity key, and a second place may keep it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from lepton_fed.clients.receipts import Receipts
from lepton_fed.config.schema import ClientConf
from lepton_fed.core.decode import decode, strict_json
from lepton_fed.core.digests import canonical_json
from lepton_fed.data.dataset import Dataset
from lepton_fed.data.source_rows import source_rows
from lepton_fed.errors import Problem, Refused
from lepton_fed.identity.keys import load_private_key
from lepton_fed.identity.signature import PrivateKey, PublicKey, check_payload, sign_payload
from lepton_fed.privacy.client import CLAIM_EPSILON
from lepton_fed.privacy.ledger.chain import Chain, Head
from lepton_fed.privacy.ledger.ledger import Ledger
from lepton_fed.privacy.ledger.rows import KnownRows
from lepton_fed.runs.files import reading, write_atomic, writing

__all__ = [
    "HEAD_TYPE",
    "HeadFile",
    "check_receipts",
    "head_in",
    "ledger_path",
    "open_ledger",
    "signed_head",
    "signed_properly",
    "uncounted_runs",
]

HEAD_TYPE = "application/vnd.lepton-fed.ledger-head.v1+json"
"""What a head is signed as."""

_FORMER = "ledger.jsonl"
_SIGNED = re.compile(r"(\d{1,18}) ([0-9a-f]{64}) ([0-9a-f]{128})")


class HeadFile:
    """The head of a ledger, in a file on another disk or machine.

    Args:
        path: The file; its folder must be there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def place(self) -> str:
        """Return the file's path."""
        return str(self._path)

    def read(self) -> Head | None:
        """Return what it holds; None before the first.

        Raises:
            RunError: LF5210, it cannot be read.
            Refused: LF4211, it holds something else.
        """
        with reading(self._path):
            if not self._path.exists():
                return None
            content = self._path.read_bytes()
        try:
            return decode(Head, strict_json(content))
        except ValueError:
            raise Refused(
                Problem("LF4211", "the second place does not say where the ledger stood: the file "
                        "is broken", where=str(self._path), key="ledger.head",
                        remedy="restore it; if it is lost, remove it and run `lepton-fed ledger "
                        "accept`")
            ) from None  # fmt: skip

    def write(self, head: Head) -> None:
        """Replace it, synced.

        Raises:
            RunError: LF5209, it cannot be written.
        """
        with writing(self._path):
            write_atomic(self._path, canonical_json(asdict(head)) + b"\n", 0o600)


def ledger_path(conf: ClientConf) -> Path:
    """Return where a site's ledger is.

    Raises:
        Refused: LF4208, there is one of the former format, which nobody reads any more.
    """
    former = Path(conf.state) / _FORMER
    if former.exists():
        raise Refused(
            Problem("LF4208", "this ledger is of a former version, which kept one line a round",
                    where=str(former),
                    remedy="lower budget.epsilon by what the site's last receipts say was spent "
                    "of it, and move the file out of the state folder")
        )  # fmt: skip
    return Path(conf.ledger.file or Path(conf.state) / "ledger.sqlite")


def open_ledger(
    conf: ClientConf,
    content: str = "",
    read: Callable[[], Dataset] | None = None,
    *,
    check_heads: bool = True,
) -> Ledger:
    """Return the ledger of a site.

    Args:
        conf: The site's conf.
        content: Digest of what its data set holds now; empty to look at the ledger only.
        read: Reads the rows under the task's contract; see :func:`source_rows`.
        check_heads: Refuse an older copy.

    Raises:
        Refused: See :class:`Ledger`.
        RunError: The newest receipts, or the second place, cannot be read.
    """

    def rows() -> Dataset:
        if read is None:
            raise ValueError("no run has said what a row looks like")
        return read()

    path = ledger_path(conf)
    noted = head_in(Receipts(Path(conf.state) / "receipts"))
    return Ledger(
        path,
        dataset=conf.budget.dataset,
        content=content,
        epsilon=conf.budget.epsilon,
        delta=conf.budget.delta,
        rows=KnownRows(path.with_suffix(".key"), lambda: source_rows(conf.source, rows)),
        keeper=HeadFile(Path(conf.ledger.head)) if conf.ledger.head else None,
        noted=[] if noted is None else [noted],
        check_heads=check_heads,
    )


def head_in(receipts: Receipts) -> Head | None:
    """Return the head in the newest receipt that has one.

    Raises:
        RunError: A receipt cannot be read.
    """
    for receipt in receipts.newest_first():
        if found := _SIGNED.fullmatch(receipt.ledger):
            return Head(int(found[1]), found[2])
    return None


def uncounted_runs(conf: ClientConf) -> list[str]:
    """Return the runs that the site sent something to and nothing counts, by name.

    They had no DP, of records or of the whole site: nothing bounds what they tell of a record.

    Args:
        conf: The site's conf.

    Raises:
        Refused: LF4641, a receipt is malformed.
        RunError: One cannot be read.
    """
    left = [each for each in Receipts(Path(conf.state) / "receipts").newest_first() if each.vectors]
    # Of one name there may be several runs: the coordinator gives the names.
    counted = {each.agreement for each in left if each.ledger or CLAIM_EPSILON in each.numbers}
    return sorted({each.run for each in left if each.agreement not in counted})


def check_receipts(conf: ClientConf, ledger: Ledger) -> tuple[int, int]:
    """Hold the head in each receipt against the ledger.

    Args:
        conf: The site's conf.
        ledger: The ledger.

    Returns:
        How many receipts have a head, and how many of them are signed with the key in use; those
        from before the key was replaced are not.

    Raises:
        Refused: LF4209, the ledger was never where a receipt says; LF4641, the receipts are not
            whole.
        RunError: A receipt cannot be read.
    """
    key = load_private_key(Path(conf.identity_key)).public_key()
    heads = signed = 0
    receipts = Receipts(Path(conf.state) / "receipts").read()
    book = ledger.book  # after them: the site may be at work
    for number, receipt in enumerate(receipts, start=1):
        if not receipt.ledger:
            continue
        found = _SIGNED.fullmatch(receipt.ledger)
        if found is None or not book.has(Head(int(found[1]), found[2])):
            raise Refused(
                Problem("LF4209", f"the ledger was never where receipt {number} says it stood",
                        where=str(ledger_path(conf)),
                        remedy="restore the newest copy; if there is none, lower the budget by "
                        "what is missing and run `lepton-fed ledger accept`")
            )  # fmt: skip
        heads += 1
        signed += signed_properly(receipt.ledger, key)
    return heads, signed


def signed_head(conf: ClientConf, key: PrivateKey) -> str:
    """Return where the ledger stands, for a receipt: number, hash and signature.

    Args:
        conf: The site's conf.
        key: The site's identity key.

    Raises:
        Refused: The ledger cannot be read.
    """
    head = Chain(ledger_path(conf)).head()
    signature = sign_payload(key, HEAD_TYPE, canonical_json(asdict(head)))
    return f"{head.number} {head.hash} {signature.hex()}"


def signed_properly(text: str, key: PublicKey) -> bool:
    """Return whether a receipt's head carries the site's signature.

    Args:
        text: The receipt's ``ledger``.
        key: The site's identity key.
    """
    found = _SIGNED.fullmatch(text)
    if found is None:
        return False
    body = canonical_json(asdict(Head(int(found[1]), found[2])))
    return check_payload(key, HEAD_TYPE, body, bytes.fromhex(found[3]))
