"""Shamir's secret sharing of 32-byte secrets: any t shares give the secret, fewer say nothing.

The field has ``PRIME = 2**256 + 297`` elements. It is the smallest prime above ``2**256``, so every
32-byte string is an element as it stands, without a case that must be drawn again or cut off, and a
share fits in 33 bytes. Site ``x``, from 1, holds ``f(x)`` for

    f(X) = secret + c_1 X + ... + c_(t-1) X**(t-1)    with uniform c_i, zero among them

and the secret is ``f(0) = sum(w_x f(x))``, with Lagrange's weights ``w_x``, which depend on who
answered but not on the secret: they are made once and used for all.

Python's integers do not take the same time for every value. The secrets live for one round, are
split where they were made, and are put together only when they are revealed; whoever can time
single multiplications of that process is outside the threat model.

References:
    A. Shamir, "How to share a secret", Communications of the ACM 22(11), 1979.
    K. Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning",
    CCS 2017, section 3.1 (secret sharing).
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

__all__ = [
    "PRIME",
    "SECRET_BYTES",
    "SHARE_BYTES",
    "Randomness",
    "Weights",
    "combine",
    "split",
    "split_at",
]

Randomness = Callable[[int], bytes]
"""Returns that many random bytes; the operating system's outside the tests."""

PRIME = 2**256 + 297
SECRET_BYTES = 32
SHARE_BYTES = 33
MOST_SHARES = 65_535


def split(
    secret: bytes | bytearray,
    shares: int,
    threshold: int,
    randomness: Randomness = secrets.token_bytes,
) -> list[bytes]:
    """Return the shares of a secret for the points from 1 on.

    Args:
        secret: 32 bytes.
        shares: How many shares, up to 65 535.
        threshold: How many of them give the secret, 1 to ``shares``.
        randomness: Where coefficients come from.

    Returns:
        ``shares`` encodings of 33 bytes, big-endian; the first is that of ``x = 1``.

    Raises:
        ValueError: As :func:`split_at` says.
    """
    return list(split_at(secret, range(1, shares + 1), threshold, randomness).values())


def split_at(
    secret: bytes | bytearray,
    points: Sequence[int],
    threshold: int,
    randomness: Randomness = secrets.token_bytes,
) -> dict[int, bytes]:
    """Return the shares of a secret for some points.

    Coefficients are drawn by rejection, 33 bytes at a time of which 257 bits count, so that they
    are exactly uniform: sharing is perfect, not only nearly so.

    Args:
        secret: 32 bytes.
        points: Who gets a share, 1 to 65 535.
        threshold: How many of them give the secret, 1 to as many as there are points.
        randomness: Where coefficients come from.

    Returns:
        Encodings of 33 bytes, big-endian, by point.

    Raises:
        ValueError: The secret has another length, a point is out of range or given twice, or
            threshold or number of shares is out of range.
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"the secret has {len(secret)} bytes, not {SECRET_BYTES}")
    if not 1 <= threshold <= len(points) <= MOST_SHARES:
        raise ValueError(f"threshold {threshold} of {len(points)} shares is out of range")
    _check_points(points)
    coefficients = [_element(randomness) for _ in range(threshold - 1)]
    coefficients.append(int.from_bytes(secret, "big"))
    return {x: _at(coefficients, x).to_bytes(SHARE_BYTES, "big") for x in points}


@dataclass(frozen=True)
class Weights:
    """Lagrange's weights at zero for one set of points.

    Args:
        points: Who answered, in ascending order.
        values: The weight of each.
    """

    points: tuple[int, ...]
    values: tuple[int, ...]

    @classmethod
    def at(cls, points: Sequence[int], threshold: int) -> Weights:
        """Make the weights of the ``threshold`` smallest of some points.

        Args:
            points: Points whose shares are at hand, 1 to 65 535, in any order.
            threshold: How many shares give the secret.

        Raises:
            ValueError: A point is out of range or given twice, or there are too few.
        """
        if threshold < 1:
            raise ValueError(f"threshold {threshold} is out of range")
        _check_points(points)
        if len(points) < threshold:
            raise ValueError(f"{len(points)} shares where {threshold} are needed")
        chosen = tuple(sorted(points)[:threshold])
        # w_i = prod(x_j) / (x_i prod(x_j - x_i)): products of small numbers, one inverse for all.
        product = math.prod(chosen)
        below = [x * math.prod(other - x for other in chosen if other != x) % PRIME for x in chosen]
        return cls(chosen, tuple(product * inverse % PRIME for inverse in _inverses(below)))

    def combine(self, shares: Mapping[int, bytes]) -> bytes:
        """Return the secret that shares at these points stand for.

        A false share gives another secret, or this error; only a commitment to the secret tells.

        Args:
            shares: Encodings of 33 bytes by point; points without a weight are left aside.

        Returns:
            32 bytes.

        Raises:
            ValueError: A share is missing, is no element of the field, or the result is not one of
                32 bytes.
        """
        total = 0
        for point, weight in zip(self.points, self.values, strict=True):
            if point not in shares:
                raise ValueError(f"the share of point {point} is missing")
            total += weight * _decode(shares[point], point)
        total %= PRIME
        if total >> (8 * SECRET_BYTES):
            raise ValueError("the shares do not stand for a secret of 32 bytes")
        return total.to_bytes(SECRET_BYTES, "big")


def combine(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """Return the secret that at least ``threshold`` shares stand for.

    Args:
        shares: Encodings of 33 bytes by point.
        threshold: How many shares give the secret.

    Raises:
        ValueError: As :meth:`Weights.at` and :meth:`Weights.combine` say.
    """
    return Weights.at(list(shares), threshold).combine(shares)


def _check_points(points: Sequence[int]) -> None:
    for point in points:
        if not 1 <= point <= MOST_SHARES:
            raise ValueError(f"point {point} is not between 1 and {MOST_SHARES}")
    if len(set(points)) != len(points):
        raise ValueError("a point is given twice")


def _element(randomness: Randomness) -> int:
    while True:
        drawn = randomness(SHARE_BYTES)
        if len(drawn) != SHARE_BYTES:
            raise ValueError(f"the source gave {len(drawn)} random bytes, not {SHARE_BYTES}")
        element = int.from_bytes(drawn, "big") & (2**257 - 1)
        if element < PRIME:
            return element


def _at(coefficients: Sequence[int], x: int) -> int:
    """Return a polynomial at a point, by Horner's rule; the highest coefficient is first.

    Points are small, so the value grows by a byte or two a step; dividing once at the end is
    quicker than at every step for as many steps as a cohort has sites.
    """
    value = 0
    for coefficient in coefficients:
        value = value * x + coefficient
    return value % PRIME


def _inverses(elements: Sequence[int]) -> list[int]:
    """Return all inverses for the price of one (Montgomery's trick)."""
    before = [1]
    for element in elements:
        before.append(before[-1] * element % PRIME)
    inverse = pow(before[-1], -1, PRIME)
    found = []
    for element, product in zip(reversed(elements), reversed(before[:-1]), strict=True):
        found.append(inverse * product % PRIME)
        inverse = inverse * element % PRIME
    return found[::-1]


def _decode(share: bytes, point: int) -> int:
    if len(share) != SHARE_BYTES:
        raise ValueError(f"the share of point {point} has {len(share)} bytes, not {SHARE_BYTES}")
    value = int.from_bytes(share, "big")
    if value >= PRIME:
        raise ValueError(f"the share of point {point} is no element of the field")
    return value
