"""Random numbers that differential privacy may depend on: AES-256 in counter mode.

The key comes from the operating system. A seedable generator would void the guarantee (whoever
knows the seed subtracts the noise and rebuilds the batches); the one that simulations may ask for
says in its name what it is, and no client takes it.

The Gaussian is Box-Muller (G. E. P. Box, M. E. Muller, Annals of Mathematical Statistics 29(2),
1958) in float32, a block at a time that stays in the processor's cache. A radius that 32 bits would
cut off at 6.8 standard deviations is made from 85, so the tail reaches 10.8. What is left is the
usual floating-point caveat of DP (I. Mironov, CCS 2012): see docs/sharp-edges.md.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

__all__ = ["Entropy"]

_KEY_BYTES = 32
_BLOCK = 1 << 14  # pairs: the buffers of a block take 320 KiB, which a core's own cache holds
_SMALLEST_STD = 2.0**-80  # and its inverse the largest: far from where float32 ends
_TAIL = 1 << 12  # of 2**32: radii made from smaller words get 53 more bits


class Entropy:
    """A stream of random words, uniform and Gaussian numbers.

    Args:
        key: 32 secret bytes; :meth:`from_system` draws them.

    Attributes:
        insecure: Whether a seed repeats the stream, so that noise from it protects nobody.

    Raises:
        ValueError: The key has another length.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != _KEY_BYTES:
            raise ValueError(f"the key has {len(key)} bytes, not {_KEY_BYTES}")
        # A key is used for one stream only, so the counter may start at zero.
        self._stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
        self.insecure = False

    @classmethod
    def from_system(cls) -> Entropy:
        """Return a stream keyed by the operating system."""
        return cls(os.urandom(_KEY_BYTES))

    @classmethod
    def insecurely_seeded(cls, seed: int, name: str) -> Entropy:
        """Return the stream of a seed: for simulations of rows that need no protection.

        Args:
            seed: Whoever knows it can take the noise off again.
            name: Tells the streams of one seed apart.

        Example:
            >>> one, two = (Entropy.insecurely_seeded(7, "site1") for _ in range(2))
            >>> bool((one.words(4) == two.words(4)).all()), one.insecure
            (True, True)
        """
        said = f"lepton-fed insecure entropy 1\n{seed}\n{name}"
        made = cls(hashlib.sha256(said.encode()).digest())
        made.insecure = True
        return made

    def words(self, count: int) -> npt.NDArray[np.uint64]:
        """Return ``[count]`` uniform 64-bit words."""
        return np.frombuffer(self._stream.update(bytes(8 * count)), dtype="<u8")

    def uniform(self, count: int) -> npt.NDArray[np.float64]:
        """Return ``[count]`` numbers uniform on the multiples of 2**-53 in [0, 1)."""
        return (self.words(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def permutation(self, count: int) -> npt.NDArray[np.int64]:
        """Return the numbers from 0 to ``count - 1`` in random order, int64.

        Two equal ones among the 64-bit words that are sorted stay in order: an order's probability
        is off by a share of at most ``count**2 / 2**64``.
        """
        return np.argsort(self.words(count), kind="stable").astype(np.int64, copy=False)

    def normal(self, count: int) -> npt.NDArray[np.float32]:
        """Return ``[count]`` standard Gaussian numbers, float32."""
        out = np.zeros(count, np.float32)
        self.add_normal(out, 1.0)
        return out

    def add_normal(
        self, out: npt.NDArray[np.float32] | npt.NDArray[np.float64], std: float
    ) -> None:
        """Add independent Gaussian numbers, drawn in float32, to an array, in place.

        Args:
            out: Of any shape, float32 or float64, C-contiguous; ``tensor.numpy()`` of a torch
                tensor on the CPU shares its memory.
            std: Standard deviation of what is added.

        Raises:
            ValueError: The array is of another type or not contiguous, or the standard deviation is
                neither 0 nor a number of which float32 keeps every digit, however small what is
                drawn: rounded to zero it would be no noise.
        """
        if out.dtype not in (np.float32, np.float64) or not out.flags.c_contiguous:
            raise ValueError("noise is added to contiguous float32 or float64 only")
        if not (std == 0 or _SMALLEST_STD <= std <= 1 / _SMALLEST_STD):
            raise ValueError(f"no such standard deviation: {std}")
        flat = out.reshape(-1)
        scratch = _BUFFERS.scratch
        for start in range(0, flat.size, 2 * _BLOCK):
            part = flat[start : start + 2 * _BLOCK]
            pairs = (part.size + 1) // 2
            one, other = self._pairs(scratch, pairs, np.float32(std))
            part[:pairs] += one
            part[pairs:] += other[: part.size - pairs]

    def _pairs(
        self, scratch: _Scratch, pairs: int, std: np.float32
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Return two arrays ``[pairs]`` of Gaussian numbers; the next call overwrites them."""
        self._stream.update_into(scratch.zeros[: 8 * pairs], scratch.bytes)
        words = scratch.words
        radius, angle, cosine = (a[:pairs] for a in (scratch.radius, scratch.angle, scratch.cosine))
        np.copyto(radius, words[:pairs], casting="same_kind")
        np.copyto(angle, words[pairs : 2 * pairs], casting="same_kind")
        radius += np.float32(0.5)
        radius *= np.float32(2.0**-32)
        if int(words[:pairs].min()) < _TAIL:
            rare = np.flatnonzero(words[:pairs] < _TAIL)
            fine = (words[rare] + self.uniform(len(rare)) + 2.0**-54) * 2.0**-32
            radius[rare] = fine.astype(np.float32)
        np.log(radius, out=radius)
        radius *= np.float32(-2.0)
        np.sqrt(radius, out=radius)
        radius *= std
        angle *= np.float32(2.0 * math.pi * 2.0**-32)
        np.cos(angle, out=cosine)
        cosine *= radius
        np.sin(angle, out=angle)
        angle *= radius
        return cosine, angle


class _Scratch:
    """Buffers of one block; kept, because allocating them costs more than filling them."""

    def __init__(self) -> None:
        self.zeros = memoryview(bytes(8 * _BLOCK))
        self.bytes = bytearray(8 * _BLOCK)
        self.words = np.frombuffer(self.bytes, "<u4")
        self.radius, self.angle, self.cosine = (np.empty(_BLOCK, np.float32) for _ in range(3))


class _Buffers(threading.local):
    """One scratch for all streams of a thread: a simulation has a stream for each of its sites."""

    def __init__(self) -> None:
        self.scratch = _Scratch()


_BUFFERS = _Buffers()
