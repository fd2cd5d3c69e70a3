"""What a site has written down: receipts, ledger, bundle; read while the site goes on."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from lepton_fed.clients.bundles import BundleStore
from lepton_fed.clients.receipts import Receipts
from lepton_fed.config.load import load_conf
from lepton_fed.config.schema import ClientConf
from lepton_fed.export.bundle import verify_bundle
from lepton_fed.identity.keys import load_public_key
from tests.ledger_entries import charges_in

__all__ = ["Masked", "Records", "Update"]

Round = tuple[str, int]


@dataclass
class Update:
    """An update that left.

    Args:
        norm: Its Euclidean norm.
        times: How often it left.
    """

    norm: float
    times: int = 0


@dataclass
class Masked:
    """What left in the phases of a masked round.

    Args:
        norms: Norm of the update behind each masked vector, before and after clipping.
        vectors: Hashes of the masked vectors, by attempt.
        sums: Whose vectors are in the sums that the site helped to open.
        phases: How often each phase was answered.
    """

    norms: set[tuple[float, float]] = field(default_factory=set)
    vectors: dict[str, set[str]] = field(default_factory=dict)
    sums: set[str] = field(default_factory=set)
    phases: Counter[str] = field(default_factory=Counter)


class Records:
    """The records of one site.

    Args:
        root: The folder of the federation.
        site: Name of the site.
    """

    def __init__(self, root: Path, site: str) -> None:
        self._root = root
        self._state = root / "state" / site
        self._conf = load_conf(root / f"{site}.yaml", [], kind=ClientConf).conf

    def left(self) -> dict[Round, dict[str, Update]]:
        """Return what left, by run and round, each update by its hash; the receipts are whole.

        What leaves a second time has to say so.
        """
        found: dict[Round, dict[str, Update]] = {}
        for receipt in Receipts(self._state / "receipts").read():
            if receipt.vectors:
                sent = receipt.vectors["delta"]
                updates = found.setdefault((receipt.run, receipt.round), {})
                assert "sent again" in receipt.numbers or sent.sha256 not in updates, receipt
                updates.setdefault(sent.sha256, Update(sent.norm_after)).times += 1
        return found

    def masked(self) -> dict[Round, Masked]:
        """Return what left of masked rounds of training; the receipts are whole.

        Whatever happens in between, an update is in one sum at most: an attempt has one masked
        vector, all attempts mask the same update, and one list of sites is revealed for.
        """
        found: dict[Round, Masked] = {}
        evaluated: set[Round] = set()
        for receipt in Receipts(self._state / "receipts").read():
            if receipt.refusal or "phase" not in receipt.numbers:
                continue
            key = receipt.run, receipt.round
            phase, attempt = receipt.numbers["phase"].split(", ")
            if phase == "mask" and "weight" not in receipt.numbers:
                evaluated.add(key)  # the last evaluation has the number of the last round
            if key in evaluated:
                continue
            one = found.setdefault(key, Masked())
            one.phases[phase] += 1
            if phase == "mask":
                sent = receipt.vectors["masked"]
                one.norms.add((sent.norm_before, sent.norm_after))
                one.vectors.setdefault(attempt, set()).add(sent.sha256)
            elif phase == "reveal":
                one.sums.add(receipt.numbers["sum of"])
        for key, one in found.items():
            assert len(one.norms) <= 1, (key, one)
            assert all(len(vectors) == 1 for vectors in one.vectors.values()), (key, one)
            assert len(one.sums) <= 1, (key, one)
        return found

    def charged(self) -> Counter[Round]:
        """Return how often the ledger was charged, by run and round; its chain is whole."""
        return Counter((body["run"], body["round"]) for body in charges_in(self._state))

    def bundle_holds(self) -> None:
        """Assert that the bundle in force is the coordinator's and whole."""
        key = load_public_key(self._root / self._conf.coordinator_key)
        verify_bundle(BundleStore(self._state / "bundles", key, self._conf.policy).in_force(), key)
