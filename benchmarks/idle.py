"""A site that trains nothing: what it answers in the benchmarks."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from benchmarks.setting import Setting
from lepton_fed.clients.masked import MaskedSite
from lepton_fed.clients.vault import FileVault
from lepton_fed.config.schema import AggregationFloor
from lepton_fed.core.exchange import (
    Ask,
    Offer,
    OfferReply,
    PhaseAsk,
    PhaseReply,
    PushReply,
    PushStep,
    Reply,
    Update,
)
from lepton_fed.core.metrics import MetricsPlan
from lepton_fed.identity.keys import load_private_key, load_public_key
from lepton_fed.server.intake import shape_of
from lepton_fed.strategies.base import DELTA
from lepton_fed.strategies.fedavg import fedavg

__all__ = ["Idle"]


class Idle:
    """Answers every ask at once with an update of its own.

    Args:
        setting: The federation.
        name: Name of the site.
    """

    def __init__(self, setting: Setting, name: str) -> None:
        self._number = setting.names.index(name)
        agreement = setting.agreement
        self._masked = MaskedSite(
            name,
            load_private_key(setting.key(f"{name}.pem")),
            {other: load_public_key(setting.key(f"{other}.pub")) for other in setting.names},
            agreement,
            shape_of(fedavg(), setting.layout, MetricsPlan.of(agreement.task)),
            AggregationFloor(rounds_per_hour=sys.maxsize),
            FileVault(Path(setting.folder) / name / "masked", agreement.digest),
            self.asked,
        )

    def asked(self, ask: Ask) -> Reply:
        """Return an update that no other site sends, and not this one in another round."""
        size = ask.vectors["model"].size
        generator = np.random.default_rng((self._number, ask.round_number))
        delta = generator.standard_normal(size, dtype=np.float32)
        delta *= np.float32(1e-3)
        return Reply("", update=Update(ask.layout, {DELTA: delta}, 1.0))

    def offered(self, offer: Offer) -> OfferReply:
        """Agree to nothing: there is no offer in this benchmark."""
        raise NotImplementedError

    def phased(self, asked: PhaseAsk) -> PhaseReply:
        """Mask the update."""
        return self._masked.take(asked)

    def pushed(self, step: PushStep) -> PushReply:
        """Take nothing."""
        raise NotImplementedError
