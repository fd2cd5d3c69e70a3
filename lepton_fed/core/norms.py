"""Euclidean norms of large vectors, slice by slice, and clipping to one."""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np
import numpy.typing as npt

__all__ = ["clipped", "euclidean_norm"]

Float = TypeVar("Float", bound=np.floating)

_SLICE = 1 << 14  # elements widened at a time: the double-precision temporaries stay in cache


def euclidean_norm(vector: npt.NDArray[np.floating]) -> float:
    """Return the Euclidean norm, NaN for a vector that is not finite.

    Args:
        vector: ``[n]`` float32 or float64; only slices of it are read.
    """
    squares = 0.0
    for start in range(0, vector.size, _SLICE):
        part = vector[start : start + _SLICE]
        # Before widening: a signalling NaN makes that a warning.
        if not np.isfinite(part).all():
            return math.nan
        wide = part.astype(np.float64)
        wide *= wide  # not BLAS: at each slice its threads would wait for the slowest core
        squares += float(wide.sum())
    return math.sqrt(squares)


def clipped(vector: npt.NDArray[Float], bound: float) -> tuple[npt.NDArray[Float], float]:
    """Return a vector scaled down to a norm, and the norm that it had.

    Args:
        vector: ``[n]`` float32 or float64.
        bound: Largest norm.

    Returns:
        ``[n]`` of the same type, the vector itself where it is within the bound, but for a hair, or
        not finite; its norm, NaN where it is not finite.
    """
    norm = euclidean_norm(vector)
    # A hair below, so that rounding to float32 cannot bring it above again. What is longer than
    # that is scaled, too: with a step at the bound, a record could move more than it is clipped to.
    inner = bound * (1 - 1e-6)
    if norm > inner:
        kind = vector.dtype.type
        factor = inner / norm
        if factor >= np.finfo(vector.dtype).tiny:
            return vector * kind(factor), norm
        # No normal number of that type, which would round it to one much larger, or to none.
        root = kind(math.sqrt(factor))
        vector = vector * root * root
    return vector, norm
