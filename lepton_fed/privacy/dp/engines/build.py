"""From an engine's name in the conf to the engine."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from lepton_fed.privacy.dp.engines.base import Engine, EngineName, Loss
from lepton_fed.privacy.dp.engines.bookkeeping import BookKeepingEngine
from lepton_fed.privacy.dp.engines.ghost import GhostEngine
from lepton_fed.privacy.dp.engines.hooks import HooksEngine

__all__ = ["build_engine"]

_ENGINES: dict[EngineName, Callable[[nn.Module, Loss, float], Engine]] = {
    "hooks": HooksEngine,
    "ghost": GhostEngine,
    "bookkeeping": BookKeepingEngine,
}


def build_engine(name: EngineName, model: nn.Module, loss: Loss, clip: float) -> Engine:
    """Return an engine, not entered yet.

    Args:
        name: Which one.
        model: The model, already checked.
        loss: From outputs and targets to the loss of each record, ``[batch]``.
        clip: Euclidean norm to which a record's gradient is clipped.
    """
    return _ENGINES[name](model, loss, clip)
