"""The noise of each step, made as training goes on from the noise of the last few.

From ``C w = z`` follows ``w[t] = (z[t] - sum_{0<j<p} c[j] w[t-j]) / c[0]``: one fresh Gaussian
vector a step, and ``p - 1`` old ones in memory, 4 bytes for each coordinate.

The old noise is secret: who has it can take it off. Training that went on without it would be a new
mechanism, which costs again.

References:
    C. A. Choquette-Choo et al., NeurIPS 2023, arXiv:2306.08153 (streaming
    multiplication by the inverse of a banded matrix).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lepton_fed.privacy.dp.entropy import Entropy

__all__ = ["CorrelatedNoise"]

Reals = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]

_SLICE = 1 << 14


class CorrelatedNoise:
    """A stream of noise vectors.

    Args:
        coefficients: ``[p]`` of ``C``; the first is not 0.
        size: Coordinates of a vector.
        deviation: Standard deviation of ``z``.
        steps: How many vectors there are at most.
        entropy: The owner's own, from the operating system.
        past: What :meth:`past` said when training stopped; nothing at the start.

    Attributes:
        size: Coordinates of a vector.
        step: How many vectors there were.
        steps: How many there are at most.

    Raises:
        ValueError: A number is out of range, or the past is that of another stream.
    """

    def __init__(
        self,
        coefficients: Reals,
        size: int,
        deviation: float,
        steps: int,
        entropy: Entropy,
        past: tuple[int, Floats] | None = None,
    ) -> None:
        if coefficients.size < 1 or coefficients[0] == 0 or size < 1 or steps < 1:
            raise ValueError(f"{coefficients.size} coefficients, {size} coordinates, {steps} steps")
        if not 0 < deviation < np.inf:
            raise ValueError(f"noise of deviation {deviation}")
        self.steps = steps
        self._coefficients = coefficients
        self._deviation = deviation
        self._entropy = entropy
        # Row t modulo p - 1 has the noise of step t.
        kept = (min(coefficients.size, steps) - 1, size)
        if past is not None and past[0] == steps:
            kept = (0, size)
        self.step, self._past = past or (0, np.zeros(kept, dtype=np.float32))
        if self._past.shape != kept or not 0 <= self.step <= steps:
            raise ValueError(f"step {self.step} and noise of shape {self._past.shape}, not {kept}")
        self.size = size

    def past(self) -> tuple[int, Floats]:
        """Return the step that is next and the noise that is still needed: both are secret.

        To be on disk before the noise of a step is used: a step whose noise is made a second time,
        from the same past, tells the difference of both.

        Returns:
            The step, and ``[band - 1, size]`` float32, the stream's own memory; ``[0, size]`` after
            the last step, when nothing is needed any more.
        """
        return self.step, self._past

    def next(self) -> Floats:
        """Return the noise of the next step, ``[size]`` float32, in the gradients' units.

        Raises:
            ValueError: All steps have had theirs: more would cost more than was accounted for.
        """
        if self.step >= self.steps:
            raise ValueError(f"noise for more than {self.steps} steps")
        kept = self._past.shape[0]
        noise = np.empty(self.size, dtype=np.float32)
        back = 1 + np.arange(min(kept, self.step))
        weights = np.zeros(kept)
        if kept:
            weights[(self.step - back) % kept] = self._coefficients[back]
        for start in range(0, self.size, _SLICE):
            part = slice(start, min(start + _SLICE, self.size))
            wide = self._entropy.normal(part.stop - part.start).astype(np.float64)
            wide *= self._deviation
            if back.size:
                # Not by BLAS, whose threads wait for each other longer than this takes.
                wide -= np.einsum("i,ij->j", weights, self._past[:, part].astype(np.float64))
            noise[part] = wide / self._coefficients[0]
        if kept:
            self._past[self.step % kept] = noise
        self.step += 1
        if self.step == self.steps:
            self._past = np.empty((0, self.size), dtype=np.float32)
        return noise
