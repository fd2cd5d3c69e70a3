"""The site's record of what its records have spent; see docs/explanation/ledger.md."""

from __future__ import annotations

from lepton_fed.privacy.ledger.ledger import Ledger

__all__ = ["Ledger"]
