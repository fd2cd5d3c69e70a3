"""Banded Toeplitz factorisations of the prefix sum: coefficients, sensitivity, error.

Training with a constant step size uses the prefix sums ``A g`` of the gradients ``g`` of ``n``
steps, ``A`` the lower triangle of ones. With ``A = B C`` one releases ``C g + z`` for Gaussian
``z`` and thereby ``B (C g + z) = A g + B z``: step ``t`` gets the noise ``(C**-1 z)[t]``, in which
the noise of later steps cancels some of that of earlier ones.

``C`` here is lower triangular, Toeplitz, and zero from its ``p``-th subdiagonal on. Its
coefficients are the first ``p`` of the square root of ``A``: 1, 1/2, 3/8, 5/16, ... (Kalinin and
Lampert's banded square root).

**Sensitivity.** A unit that takes part in at most ``k`` steps, any two of them at least ``b``
apart, moves ``C g`` by at most the norm of a sum of ``k`` such columns of ``C``, because they are
not negative. As the coefficients decrease, the first such columns are the worst: 1, 1 + b, ...

**Error.** The root mean square over the steps of the deviation of ``(B z)[t]``, for noise of
deviation 1 and clipping norm 1: ``|B|_F / sqrt(n)``, times the sensitivity that ``z`` has to hide.

References:
    C. A. Choquette-Choo, A. Ganesh, R. McKenna, H. B. McMahan, K. Rush, A. Thakurta, Z. Xu,
    "(Amplified) Banded Matrix Factorization: A unified approach to private training", NeurIPS
    2023, arXiv:2306.08153, sections 2 and 4.
    N. P. Kalinin, C. Lampert, "Banded Square Root Matrix Factorization for Differentially Private
    Model Training", NeurIPS 2024, arXiv:2405.13763, theorem 2 (sensitivity) and section 3.
    H. Fichtenberger, M. Henzinger, J. Upadhyay, "Constant Matters: Fine-grained Error Bound on
    Differentially Private Continual Observation", ICML 2023, arXiv:2202.11205 (the square root).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

__all__ = [
    "best_band",
    "inverse",
    "moved_squares",
    "prefix_error",
    "sensitivity",
    "square_root",
    "step_deviation",
]

Reals = npt.NDArray[np.float64]


def square_root(band: int) -> Reals:
    """Return the first coefficients of the square root of the prefix sum.

    Args:
        band: How many.

    Returns:
        ``[band]`` float64, from 1 downwards.

    Raises:
        ValueError: None are asked for.
    """
    if band < 1:
        raise ValueError(f"a band of {band}")
    index = np.arange(1, band)
    return np.concatenate([[1.0], np.cumprod((2 * index - 1) / (2 * index))])


def inverse(coefficients: Reals, steps: int) -> Reals:
    """Return the coefficients of the inverse matrix, which is Toeplitz too.

    Args:
        coefficients: ``[p]`` of the matrix; the first is not 0.
        steps: How many to return.

    Returns:
        ``[steps]`` float64.
    """
    known = np.array([1 / coefficients[0]])
    while known.size < steps:  # Newton's step doubles the coefficients that are right
        size = min(2 * known.size, steps)
        width = 2 * size + known.size
        seen = np.fft.rfft(known, width)
        product = np.fft.irfft(np.fft.rfft(coefficients[:size], width) * seen**2, width)[:size]
        doubled = 2 * np.pad(known, (0, size - known.size)) - product
        doubled[: known.size] = known
        known = doubled
    return known


def moved_squares(coefficients: Reals, steps: int, participations: int, separation: int) -> Reals:
    """Return the squares of how far a unit moves what the first steps release, for each number.

    The worst pattern begins with the first step, whatever the number of steps: so each of these is
    the sensitivity of that many first rows of ``C``, and none is smaller than the one before.

    Args:
        coefficients: ``[p]`` of ``C``, not negative, not increasing.
        steps: Rows of ``C``.
        participations: Steps that a unit takes part in, at most.
        separation: Steps from one to the next, at least.

    Returns:
        ``[steps + 1]`` float64: at ``t`` the squared sensitivity of the first ``t`` steps, exactly:
        there are gradients of norm 1 that move them that far.

    Raises:
        ValueError: A number is out of range, or the coefficients are none for which this is known.
    """
    if steps < 1 or participations < 1 or separation < 1:
        raise ValueError(
            f"{steps} steps, {participations} participations, {separation} steps apart"
        )
    if (coefficients < 0).any() or (np.diff(coefficients) > 0).any():
        raise ValueError("coefficients that are negative or increase")
    # Row r of as many columns as there are, one in `separation`: c[r] + c[r - b] + c[r - 2 b] ...
    column = np.zeros(-(-steps // separation) * separation)
    column[: min(coefficients.size, steps)] = coefficients[:steps]
    moved = np.cumsum(column.reshape(-1, separation), axis=0).reshape(-1)
    beyond = participations * separation  # the columns from here on are none of the unit's
    if beyond < steps:
        moved[beyond:] -= moved[:-beyond].copy()
    return np.concatenate([[0.0], np.cumsum(np.square(moved[:steps]))])


def sensitivity(coefficients: Reals, steps: int, participations: int, separation: int) -> float:
    """Return the norm by which a unit whose gradients have norm 1 moves ``C g``.

    Args:
        coefficients: ``[p]`` of ``C``, not negative, not increasing.
        steps: Rows of ``C``.
        participations: Steps that a unit takes part in, at most.
        separation: Steps from one to the next, at least.

    Raises:
        ValueError: As :func:`moved_squares`.
    """
    return math.sqrt(moved_squares(coefficients, steps, participations, separation)[-1])


def step_deviation(coefficients: Reals, steps: int) -> float:
    """Return the deviation of the last step's noise, the largest there is, for unit noise.

    Args:
        coefficients: ``[p]`` of ``C``; the first is not 0.
        steps: Steps of the whole training.
    """
    return float(np.linalg.norm(inverse(coefficients, steps)))


def prefix_error(coefficients: Reals, steps: int, participations: int, separation: int) -> float:
    """Return the root mean square error of the prefix sums, for unit noise and clipping norm 1.

    Args:
        coefficients: ``[p]`` of ``C``, not negative, not increasing.
        steps: Steps of the whole training.
        participations: Steps that a unit takes part in, at most.
        separation: Steps from one to the next, at least.

    Raises:
        ValueError: As :func:`sensitivity`.
    """
    hidden = sensitivity(coefficients, steps, participations, separation)
    prefix = np.cumsum(inverse(coefficients, steps))  # of B, as A sums up columns of C**-1
    squares = float(np.square(prefix) @ np.arange(steps, 0, -1))
    return hidden * math.sqrt(squares / steps)


def best_band(steps: int, participations: int, separation: int, most: int = 0) -> int:
    """Return the band with the least error: of the powers of two, the separation, and all steps.

    Args:
        steps: Steps of the whole training.
        participations: Steps that a unit takes part in, at most.
        separation: Steps from one to the next, at least.
        most: Largest band; the noise of ``band - 1`` steps has to be kept. 0 for any.

    Raises:
        ValueError: A number is out of range.
    """
    largest = min(steps, most or steps)
    if largest < 1:
        raise ValueError(f"{steps} steps and a band of at most {most}")
    powers = {1 << exponent for exponent in range(largest.bit_length())}
    bands = sorted({*powers, min(separation, largest), largest})
    errors = [prefix_error(square_root(band), steps, participations, separation) for band in bands]
    return bands[int(np.argmin(errors))]
