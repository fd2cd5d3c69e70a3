"""Membership inference: the likelihood ratio attack (LiRA).

Many models are trained, each on every candidate record with probability one half. How confident a
model is about a record gives two Gaussians, one over the models that had it and one over those that
had not, and the score of a record under a model is the log ratio of their densities there. Other
statistics than the confidence add their own ratio. Each model is attacked in turn, with all others
as shadow models, so that each training serves twice.

References:
    N. Carlini et al.: Membership Inference Attacks From First Principles. IEEE S&P 2022.
    arXiv:2112.03570, section V. A record's variance is taken to be the same in and out: few models
    tell two of them badly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from lepton_fed.core.task import Task

__all__ = ["FALSE_POSITIVES", "Membership", "confidence", "lira", "most_true_positives"]

FALSE_POSITIVES = 0.01
"""False positive rate at which true positives are counted."""

_LARGEST = 1e6
_LEAST_VARIANCE = 1e-6  # of the records' mean
_LEAST_ERROR = 1e-12
_RESAMPLED = 400
_CONFIDENCE = 0.95

Included = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Membership:
    """How well members are told from others.

    Args:
        tpr: True positive rate at a false positive rate of 1 %.
        low: Lower end of its 95 % confidence interval.
        high: Upper end.
        auc: Area under the curve.
        members: Members that were guessed about.
    """

    tpr: float
    low: float
    high: float
    auc: float
    members: int


def most_true_positives(epsilon: float, delta: float) -> float:
    """Return the largest true positive rate at 1 % false ones that (epsilon, delta)-DP allows.

    Example:
        >>> round(most_true_positives(1.0, 1e-5), 4)
        0.0272
    """
    return min(1.0, math.exp(min(epsilon, 700.0)) * FALSE_POSITIVES + delta)


def confidence(outputs: Tensor, targets: Tensor, task: Task) -> Numbers:
    """Return how confident a model is about records: nearly normal over models.

    Args:
        outputs: ``[records, task.outputs]``, the model's.
        targets: ``[records]``: int64 class codes or float32 numbers.
        task: Says which.

    Returns:
        ``[records]``: log(p / (1 - p)) of the record's class, or minus the logarithm of the squared
        error.
    """
    outputs = outputs.double()
    if task.data.target.kind == "classes":
        own = outputs.gather(1, targets[:, None]).squeeze(1)
        hot = functional.one_hot(targets, outputs.shape[1]).bool()
        found = own - outputs.masked_fill(hot, -torch.inf).logsumexp(dim=1)
    else:
        found = -torch.log((outputs.squeeze(1) - targets).square() + _LEAST_ERROR)
    return np.asarray(found.nan_to_num(0.0, _LARGEST, -_LARGEST).clamp(-_LARGEST, _LARGEST).numpy())


def lira(statistics: Numbers, included: Included, draws: np.random.Generator) -> Membership:
    """Attack each model with all others as shadow models.

    Args:
        statistics: ``[statistics, models, records]``: :func:`confidence`, and others of which
            members are expected to have another mean.
        included: ``[models, records]``: which records each model was trained on.
        draws: Resamples models, for the confidence interval: what one training's noise does to all
            of its records is one draw, and not as many as there are records.
    """
    scores: Numbers = np.sum([_ratios(each, included) for each in statistics], axis=0)
    models = len(scores)
    tpr = _true_positives(scores, included)
    again = [draws.integers(models, size=models) for _ in range(_RESAMPLED)]
    found = [_true_positives(scores[picked], included[picked]) for picked in again]
    tail = (1.0 - _CONFIDENCE) / 2.0
    low, high = np.quantile(found, [tail, 1.0 - tail])
    members = int(included.sum())
    return Membership(tpr, float(low), float(high), _area(scores, included), members)


def _ratios(values: Numbers, included: Included) -> Numbers:
    """Return the log likelihood ratio of each record under each model, without that model's own."""
    centred = values - values.mean(axis=0)
    means, squares = [], np.zeros_like(centred)
    for group in (included, ~included):
        own = group * 1.0
        count = np.maximum(own.sum(axis=0) - own, 1.0)
        ours = centred * own
        mean = (ours.sum(axis=0) - ours) / count
        # Of the other models of the group, around their mean.
        squares += (ours**2).sum(axis=0) - ours**2 - count * mean**2
        means.append(mean)
    variance = np.maximum(squares, 0.0) / len(values)
    variance += _LEAST_VARIANCE * (variance.mean() + _LEAST_ERROR)
    return np.asarray(((centred - means[1]) ** 2 - (centred - means[0]) ** 2) / (2.0 * variance))


def _true_positives(scores: Numbers, included: Included) -> float:
    threshold = np.quantile(scores[~included], 1.0 - FALSE_POSITIVES)
    return float((scores[included] > threshold).mean())


def _area(scores: Numbers, included: Included) -> float:
    members, others = scores[included], scores[~included]
    below = np.searchsorted(np.sort(others), members, side="left")
    not_above = np.searchsorted(np.sort(others), members, side="right")
    return float((below + not_above).mean() / 2.0 / len(others))
