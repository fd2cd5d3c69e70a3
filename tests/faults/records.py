"""What a site has written down: receipts, ledger, bundle; read while the site goes on."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from lepton_fed.clients.bundles import BundleStore
from lepton_fed.clients.receipts import Receipts
from lepton_fed.config.load import load_conf
from lepton_fed.config.schema import ClientConf
from lepton_fed.export.bundle import verify_bundle
from lepton_fed.identity.keys import load_public_key
from tests.ledger_entries import charges_in

__all__ = ["Records", "Update"]

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

    def charged(self) -> Counter[Round]:
        """Return how often the ledger was charged, by run and round; its chain is whole."""
        return Counter((body["run"], body["round"]) for body in charges_in(self._state))

    def bundle_holds(self) -> None:
        """Assert that the bundle in force is the coordinator's and whole."""
        key = load_public_key(self._root / self._conf.coordinator_key)
        verify_bundle(BundleStore(self._state / "bundles", key, self._conf.policy).in_force(), key)
