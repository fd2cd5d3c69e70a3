"""How much of each record's gradient is in an update.

Whoever knows the weights that a site began with knows the gradient of each record that it may have.
An update is a sum of those, more or less, and of noise; the shares in it are found by ridge
regression. Of one step of few records they are exact; over several steps gradients change, and the
noise of DP hides them. As a statistic of membership it tells more than the confidence of the
updated model does, where a round is short: that a record was used shows in the update long before
the model has learned it.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

from lepton_fed.core.layout import Vector
from lepton_fed.models.build import write_local, write_vector
from lepton_fed.training.kit import TaskKit
from lepton_fed.training.local import LocalRows, record_losses

__all__ = ["Unmixing"]

_RIDGE = 0.1  # of a gradient's mean square: they change from step to step
_PRIOR = 0.25  # variance of a share that is 0 or 1
_MOST_COORDINATES = 20_000  # of the update that are looked at


class Unmixing:
    """Finds the shares of records in updates of one model.

    Args:
        kit: The task's kit; its initial model is the one that sites begin with.
        rows: Prepared records.
        clip: Norm to which a record's gradient is clipped; infinity without clipping.
        noise_variance: Variance of the noise in a coordinate, over the square of what a record that
            is in adds.
        draws: Which coordinates are looked at, where there are more than enough.
    """

    def __init__(
        self,
        kit: TaskKit,
        rows: LocalRows,
        clip: float,
        noise_variance: float,
        draws: np.random.Generator,
    ) -> None:
        size = kit.layout.size
        few = min(size, _MOST_COORDINATES)
        self._picked = np.sort(draws.choice(size, few, replace=False))
        gradients = _gradients(kit, rows, self._picked, clip)
        gram = gradients @ gradients.T
        ridge = _RIDGE * float(np.mean(np.diag(gram))) + noise_variance / _PRIOR
        self._weights = np.linalg.solve(gram + max(ridge, 1e-12) * np.eye(len(gram)), gradients)

    def shares(self, update: Vector) -> npt.NDArray[np.float64]:
        """Return the share of each record in an update, ``[records]``, at any scale.

        Args:
            update: What was received, ``[layout.size]``.
        """
        wanted = np.nan_to_num(update[self._picked].astype(np.float64))
        return np.asarray(-self._weights @ wanted)


def _gradients(
    kit: TaskKit, rows: LocalRows, picked: npt.NDArray[np.int64], clip: float
) -> npt.NDArray[np.float64]:
    """Return each record's clipped gradient in some coordinates, ``[records, coordinates]``."""
    model = kit.model.eval()
    write_vector(model, kit.layout, kit.initial)
    write_local(model, kit.initial_local)
    parameters = dict(model.named_parameters())
    shared = [parameters[entry.name] for entry in kit.layout.of_rule("shared")]
    losses = record_losses(kit.task)
    found = np.empty((len(rows), len(picked)))
    for record in range(len(rows)):
        part = slice(record, record + 1)
        loss = losses(model(rows.inputs[part]), rows.targets[part]).sum()
        parts = torch.autograd.grad(loss, shared, allow_unused=True)
        whole = np.concatenate(
            [
                np.zeros(p.numel()) if g is None else g.flatten().double().numpy()
                for p, g in zip(shared, parts, strict=True)
            ]
        )
        norm = math.sqrt(float(whole @ whole))
        found[record] = whole[picked] * min(1.0, clip / norm if norm > 0 else 1.0)
    return np.nan_to_num(found)
