"""What a site masks, as one vector of ring words: its update, its weight, its counts, its witness.

The coordinator learns the sum of such vectors and nothing else, so everything that it needs of a
round is in them::

    [ vector 1 | vector 2 | ... | weight | counts | saturated | one ]

The vectors are coordinates times weight, on the grid of :class:`lepton_fed.core.ring.RingEncoding`.
What follows are whole numbers that need more room than a word has: each is cut into limbs, so small
that a sum of limbs over the whole cohort still fits into a word. The last number is one, so that
its sum says how many vectors are in the sum.

Evaluation counts go on a grid of ``2**-24``; beyond ``2**55`` they saturate. Their sum is off by at
most ``2**-25`` for each site.

References:
    K. Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning",
    CCS 2017, section 3 (weighted averages: the weight is summed beside the vector).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import numpy as np
import numpy.typing as npt

from lepton_fed.core.ring import RingEncoding
from lepton_fed.privacy.secagg.masks import Words, words_dtype

__all__ = ["COUNT_BOUND", "MaskedLayout", "Opened"]

Counts = npt.NDArray[np.float64]

COUNT_BOUND = 2.0**55
"""Largest absolute evaluation count that is summed faithfully."""

_COUNT_FRACTION_BITS = 24
_COUNT_OFFSET = 1 << 79
_COUNT_BITS = 81  # of a count on its grid, above the offset; the bound itself is one of them
_SIZE_BITS = 48  # of the number of saturated coordinates of one site
_ONE_BITS = 1
_SLICE = 1 << 14  # elements encoded at a time: the double-precision temporaries stay in cache


@dataclass(frozen=True)
class Opened:
    """A sum without masks.

    Args:
        vectors: Sum of each vector, in the ring, ``[size]`` words.
        weight: Sum of the encoded weights.
        counts: Sum of the evaluation counts, ``[counts]`` float64.
        saturated: How many coordinates lay beyond the bound, of all sites.
        replies: How many vectors are in the sum.
    """

    vectors: Mapping[str, Words]
    weight: int
    counts: Counts
    saturated: int
    replies: int


@dataclass(frozen=True)
class MaskedLayout:
    """Where everything lies in a masked vector.

    Args:
        encoding: How coordinates and weights become integers.
        names: Names of the vectors, in order.
        size: Length of each, in elements.
        counts: Number of evaluation counts; 0 when none are sent.

    Raises:
        ValueError: The ring has no room for a limb of a number of this cohort.
    """

    encoding: RingEncoding
    names: tuple[str, ...]
    size: int
    counts: int = 0

    def __post_init__(self) -> None:
        if self.limb_bits < 1:
            raise ValueError(
                f"a ring of {self.encoding.bits} bits has no room for numbers of "
                f"{self.encoding.cohort} sites; use a larger ring"
            )

    @property
    def limb_bits(self) -> int:
        """Return the bits of a number that one word carries."""
        return self.encoding.bits - math.ceil(math.log2(max(2, self.encoding.cohort)))

    @cached_property
    def words(self) -> int:
        """Return the length of the masked vector, in words."""
        numbers = (self.encoding.weight_bits + 1, *[_COUNT_BITS] * self.counts, _SIZE_BITS)
        limbs = sum(self._limbs(bits) for bits in (*numbers, _ONE_BITS))
        return len(self.names) * self.size + limbs

    def encode(
        self,
        vectors: Mapping[str, npt.NDArray[np.floating] | npt.NDArray[np.uint64]],
        weight: float,
        counts: Counts | None = None,
        noise: Callable[[int], npt.NDArray[np.int64]] | None = None,
    ) -> tuple[Words, int]:
        """Return a site's vector before it is masked.

        Args:
            vectors: ``[size]`` floating point each, finite; or uint64 that are in the ring already,
                with noise on a grid of their own: those are left as they are.
            weight: In (0, weight bound].
            counts: ``[counts]`` float64, finite.
            noise: From a length to that many whole numbers, in steps of the grid, that are added
                to coordinates before they leave. How many saturated is not told then: nothing
                would cover it.

        Returns:
            ``[words]`` ring words, and how many coordinates saturated.

        Raises:
            ValueError: Something has another length, a weight is out of range, or a value is NaN.
        """
        if set(vectors) != set(self.names):
            raise ValueError(f"vectors {sorted(vectors)}, not {sorted(self.names)}")
        given = np.zeros(0) if counts is None else counts
        if given.shape != (self.counts,) or not np.isfinite(given).all():
            raise ValueError(f"counts of shape {given.shape}, finite ones of ({self.counts},)")
        encoded_weight = self.encoding.encode_weight(weight)
        words = np.empty(self.words, dtype=words_dtype(self.encoding.bits))
        saturated = 0
        for at, name in enumerate(self.names):
            vector = vectors[name]
            if vector.shape != (self.size,):
                raise ValueError(f"vector {name!r} has shape {vector.shape}, not ({self.size},)")
            target = words[at * self.size : (at + 1) * self.size]
            if vector.dtype == np.uint64:
                if vector.max(initial=0) > self.encoding.mask:
                    raise ValueError(f"vector {name!r} is not in a ring of {self.encoding.bits}")
                target[:] = vector
                continue
            values = cast("npt.NDArray[np.floating]", vector)
            for part in _slices(self.size):
                encoded, beyond = self.encoding.encode(values[part], encoded_weight)
                if noise is not None:
                    encoded += noise(encoded.size).view(np.uint64)  # wraps as the ring does
                    encoded &= self.encoding.mask
                    beyond = 0
                target[part] = encoded  # below 2**bits, so nothing is cut off
                saturated += beyond
        numbers = [(encoded_weight, self.encoding.weight_bits + 1)]
        numbers += [(_of_count(count), _COUNT_BITS) for count in given.tolist()]
        numbers += [(saturated, _SIZE_BITS), (1, _ONE_BITS)]
        limbs = [limb for number, bits in numbers for limb in self._cut(number, bits)]
        words[len(self.names) * self.size :] = np.array(limbs, dtype=words.dtype)
        return words, saturated

    def open(self, total: Words) -> Opened:
        """Return what a sum says.

        Args:
            total: ``[words]`` ring words without masks.

        Raises:
            ValueError: It has another length or type, or it is no sum of at most a cohort of
                vectors that were encoded and masked as they should be.
        """
        if total.shape != (self.words,) or total.dtype != words_dtype(self.encoding.bits):
            raise ValueError(f"a sum of {total.dtype} {total.shape}, not of ({self.words},)")
        limbs = iter(total[len(self.names) * self.size :].tolist())
        weight = self._join(limbs, self.encoding.weight_bits + 1)
        raw = [self._join(limbs, _COUNT_BITS) for _ in range(self.counts)]
        saturated = self._join(limbs, _SIZE_BITS)
        replies = self._join(limbs, _ONE_BITS)
        most = replies << self.encoding.weight_bits
        if not 1 <= replies <= self.encoding.cohort or not replies <= weight <= most:
            raise ValueError(f"no sum of vectors as sites make them: {replies} of weight {weight}")
        if saturated > replies * len(self.names) * self.size:
            raise ValueError(f"no sum of vectors as sites make them: {saturated} saturated")
        counts = np.array([_to_count(number, replies) for number in raw], dtype=np.float64)
        vectors = {
            name: total[at * self.size : (at + 1) * self.size] for at, name in enumerate(self.names)
        }
        return Opened(vectors, weight, counts, saturated, replies)

    def _limbs(self, bits: int) -> int:
        return -(-bits // self.limb_bits)

    def _cut(self, number: int, bits: int) -> list[int]:
        each = (1 << self.limb_bits) - 1
        return [number >> (at * self.limb_bits) & each for at in range(self._limbs(bits))]

    def _join(self, limbs: Iterator[int], bits: int) -> int:
        return sum(next(limbs) << (at * self.limb_bits) for at in range(self._limbs(bits)))


def _of_count(count: float) -> int:
    """Return a count as a number that is not negative: its place on the grid above the bound's."""
    inside = min(max(count, -COUNT_BOUND), COUNT_BOUND)
    return round(math.ldexp(inside, _COUNT_FRACTION_BITS)) + _COUNT_OFFSET


def _to_count(number: int, replies: int) -> float:
    return float((number - replies * _COUNT_OFFSET) / 2**_COUNT_FRACTION_BITS)


def _slices(size: int) -> Iterator[slice]:
    for start in range(0, size, _SLICE):
        yield slice(start, min(start + _SLICE, size))
