"""Metrics that combine: each is a function of counts and sums, and only those travel.

A site turns its model outputs into one flat vector of counts; vectors of all sites add up; the
metrics of the sum are exactly the metrics of the pooled rows. Averaging ratios (the mean of the
sites' F1, say) is wrong for unequal sites and is never done.

For classes the counts are the confusion matrix and the sum of the loss; for two classes, histograms
of the score in 1024 equal bins give the area under the ROC curve with a known error bound (two
scores in one bin cannot be ordered, so the truth lies within half of the pairs that share a bin).
For numbers they are sums of errors and targets, in units of the contract's target range where it
gives one. Counts of several sites are added exactly and rounded once (:class:`CountsSum`), so the
order in which sites answer does not matter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from lepton_fed.core.task import Task

__all__ = [
    "CLASS_METRICS",
    "NUMBER_METRICS",
    "SCORE_BINS",
    "CountsSum",
    "MetricsPlan",
    "cross_entropy",
]

Counts = npt.NDArray[np.float64]

CLASS_METRICS = ("accuracy", "precision", "recall", "macro_f1", "auc")
NUMBER_METRICS = ("mae", "r2")
SCORE_BINS = 1024

_LEAST_SPREAD = 1e-12  # of the targets, as a fraction of their squares
_MOST_ROWS = 2.0**40  # whole numbers up to here stay whole when many sites add up
_TO_BE_SAID = 1e-6  # an error of R2 below this does not show
_LARGEST_SUM = 1e300  # leaves room to add


@dataclass(frozen=True)
class MetricsPlan:
    """Which counts a task's metrics need and what they mean.

    Args:
        kind: ``classes`` or ``number``.
        classes: Number of classes; 1 for numbers.
        names: Metrics beside the loss, in the order in which they are shown.
        center: Subtracted from targets before squares are summed (numbers).
        scale: Divides them (numbers).
    """

    kind: Literal["classes", "number"]
    classes: int
    names: tuple[str, ...]
    center: float = 0.0
    scale: float = 1.0

    @classmethod
    def of(cls, task: Task) -> MetricsPlan:
        """Return the plan of a task."""
        target = task.data.target
        if target.kind == "classes":
            return cls("classes", len(target.classes), tuple(task.metrics))
        if target.minimum is None or target.maximum is None:
            return cls("number", 1, tuple(task.metrics))
        half = (target.maximum - target.minimum) / 2
        return cls("number", 1, tuple(task.metrics), target.minimum + half, half or 1.0)

    @property
    def size(self) -> int:
        """Return the length of a vector of counts."""
        if self.kind == "number":
            return 5
        return 2 + self.classes**2 + (2 * SCORE_BINS if "auc" in self.names else 0)

    def measure(
        self, outputs: npt.NDArray[np.floating], targets: npt.NDArray[np.generic]
    ) -> Counts:
        """Count one batch or one data set.

        Args:
            outputs: Logits ``[rows, classes]``, or values ``[rows]``.
            targets: Class codes ``[rows]`` int64, or numbers ``[rows]``.

        Returns:
            ``[size]`` float64; counts of several batches add up.
        """
        if self.kind == "number":
            truth = (targets.astype(np.float64) - self.center) / self.scale
            error = (outputs.astype(np.float64).reshape(-1) - self.center) / self.scale - truth
            squares = float(np.square(error).sum())
            sums = [len(truth), squares, np.abs(error).sum(), truth.sum(), np.square(truth).sum()]
            return np.asarray(sums, dtype=np.float64)
        codes = targets.astype(np.int64)
        predicted = outputs.argmax(axis=1)
        confusion = np.bincount(codes * self.classes + predicted, minlength=self.classes**2)
        losses = cross_entropy(outputs, codes)
        head = np.asarray([len(codes), losses.sum()], dtype=np.float64)
        if "auc" not in self.names:
            return np.concatenate([head, confusion.astype(np.float64)])
        # In double precision: single overflows where two logits are 89 apart.
        margin = outputs[:, 0].astype(np.float64) - outputs[:, 1]
        # NaN is nobody's score; the loss is NaN then too, and the counts are refused for it.
        score = 1.0 / (1.0 + np.exp(np.clip(np.nan_to_num(margin), -700, 700)))
        bins = np.minimum((score * SCORE_BINS).astype(np.int64), SCORE_BINS - 1)
        histogram = np.bincount(codes * SCORE_BINS + bins, minlength=2 * SCORE_BINS)
        return np.concatenate([head, confusion.astype(np.float64), histogram.astype(np.float64)])

    def complaint(self, counts: Counts) -> str:
        """Return why ``counts`` cannot be the counts of any rows, or an empty string.

        Args:
            counts: ``[size]`` float64, as it came from a site.
        """
        if counts.dtype != np.float64 or counts.shape != (self.size,):
            return f"counts are {counts.dtype.name} {counts.shape}, not float64 ({self.size},)"
        if not np.isfinite(counts).all():
            return "counts are not finite"
        if counts[0] > _MOST_ROWS or float(np.abs(counts).max()) > _LARGEST_SUM:
            return f"there are more than {_MOST_ROWS:g} rows, or a sum is beyond {_LARGEST_SUM:g}"
        rows, whole = counts[0], counts[2:]
        if rows < 0 or rows != np.floor(rows) or counts[1] < 0:
            return "the number of rows or the loss is negative or not whole"
        if rows == 0 and counts.any():
            return "there are sums but no rows"
        if self.kind == "number":
            negative = counts[2] < 0 or counts[4] < 0
            return "a sum of magnitudes or of squares is negative" if negative else ""
        if (whole < 0).any() or (whole != np.floor(whole)).any():
            return "a count is negative or not whole"
        truth = self._confusion(counts).sum(axis=1)
        if truth.sum() != rows:
            return "the counts do not add up to the number of rows"
        if "auc" in self.names and not np.array_equal(np.sum(self._histograms(counts), 1), truth):
            return "the scores are not those of the rows in the confusion matrix"
        return ""

    def values(self, counts: Counts) -> dict[str, float]:
        """Return the metrics of counts: ``loss`` first, then the task's; empty without rows.

        One that the rows do not define (an AUC of one class) is left out.

        Args:
            counts: ``[size]`` float64, of one site or added up.
        """
        rows = float(counts[0])
        if rows <= 0:
            return {}
        found = self._number_values(counts) if self.kind == "number" else self._class_values(counts)
        wanted = {"loss": found["loss"], **{name: found[name] for name in self.names}}
        return {name: value for name, value in wanted.items() if math.isfinite(value)}

    def error_bounds(self, counts: Counts) -> dict[str, float]:
        """Return how far a metric may be from its exact value, for those that are not exact."""
        if counts[0] <= 0:
            return {}
        if self.kind == "number":
            rounding = self._r2_rounding(counts) if "r2" in self.names else 0.0
            return {"r2": rounding} if rounding > _TO_BE_SAID else {}
        if "auc" not in self.names:
            return {}
        negative, positive = self._histograms(counts)
        pairs = float(negative.sum() * positive.sum())
        return {"auc": 0.5 * float(negative @ positive) / pairs if pairs else 0.0}

    def _r2_rounding(self, counts: Counts) -> float:
        """Return how far rounding moves R2: targets far from the center cancel in their spread."""
        rows, squares, _, total, total_squares = (float(c) for c in counts[:5])
        spread = total_squares - total * total / rows
        if spread <= _LEAST_SPREAD * total_squares:
            return 0.0  # R2 is left out
        return squares / spread * (total_squares / spread) * 2.0**-48

    def _number_values(self, counts: Counts) -> dict[str, float]:
        rows, squares, absolute, total, total_squares = (float(c) for c in counts[:5])
        spread = total_squares - total * total / rows
        # Targets that are all the same explain nothing; what is left of them is rounding.
        r2 = 1.0 - squares / spread if spread > _LEAST_SPREAD * total_squares else math.nan
        mse = squares / rows * self.scale * self.scale
        return {"loss": mse, "mae": absolute / rows * self.scale, "r2": r2}

    def _class_values(self, counts: Counts) -> dict[str, float]:
        rows = float(counts[0])
        confusion = self._confusion(counts)
        hits, truth, predicted = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
        # A class that neither occurs nor is predicted has no precision or recall to average.
        seen = (truth + predicted) > 0
        precision = _ratio(hits, predicted)[seen].mean()
        recall = _ratio(hits, truth)[seen].mean()
        f1 = _ratio(2 * hits, truth + predicted)[seen].mean()
        found = {
            "loss": float(counts[1]) / rows,
            "accuracy": float(hits.sum()) / rows,
            "precision": float(precision),
            "recall": float(recall),
            "macro_f1": float(f1),
        }
        if "auc" in self.names:
            found["auc"] = self._auc(counts)
        return found

    def _auc(self, counts: Counts) -> float:
        negative, positive = self._histograms(counts)
        pairs = float(negative.sum() * positive.sum())
        if not pairs:
            return math.nan
        below = np.cumsum(negative) - negative
        return float(positive @ (below + 0.5 * negative)) / pairs

    def _confusion(self, counts: Counts) -> Counts:
        return counts[2 : 2 + self.classes**2].reshape(self.classes, self.classes)

    def _histograms(self, counts: Counts) -> tuple[Counts, Counts]:
        both = counts[2 + self.classes**2 :].reshape(2, SCORE_BINS)
        return both[0], both[1]


class CountsSum:
    """Adds the counts of several sites, exactly: the sum is rounded once, at the end.

    ``math.fsum`` (J. R. Shewchuk, Discrete & Computational Geometry 18, 1997) gives the double
    nearest to the true sum, whatever the order.

    Args:
        size: Length of a vector of counts.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._added: list[Counts] = []

    def add(self, counts: Counts) -> None:
        """Add one site's counts.

        Raises:
            ValueError: They have another length.
        """
        if counts.shape != (self._size,):
            raise ValueError(f"counts have shape {counts.shape}, the sum has ({self._size},)")
        self._added.append(counts)

    def total(self) -> Counts:
        """Return the sum, ``[size]`` float64."""
        if not self._added:
            return np.zeros(self._size, dtype=np.float64)
        return np.asarray([math.fsum(column) for column in zip(*self._added, strict=True)])


def cross_entropy(logits: npt.NDArray[np.floating], codes: npt.NDArray[np.int64]) -> Counts:
    """Return the cross-entropy of each row, in nats.

    Args:
        logits: ``[rows, classes]``.
        codes: Class codes, ``[rows]`` int64.

    Returns:
        ``[rows]`` float64.
    """
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(axis=1, keepdims=True)
    normaliser = np.log(np.exp(shifted).sum(axis=1))
    return np.asarray(normaliser - shifted[np.arange(len(codes)), codes], dtype=np.float64)


def _ratio(part: Counts, whole: Counts) -> Counts:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)
