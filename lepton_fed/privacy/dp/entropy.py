"""Random numbers that differential privacy may depend on: AES-256 in counter mode.

The key comes from the operating system. A seedable generator would void the guarantee (whoever
knows the seed subtracts the noise and rebuilds the batches), so the only public way to make one
takes its key from the operating system. The key can be given for test vectors.

The Gaussian is Box-Muller on 53-bit uniforms in double precision (G. E. P. Box, M. E. Muller,
Annals of Mathematical Statistics 29(2), 1958): its tail reaches 8.5 standard deviations. Noise is
rounded to float32 at the end, which leaves the usual floating-point caveat of DP (I. Mironov, CCS
2012): see docs/sharp-edges.md.
"""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

__all__ = ["Entropy"]

_KEY_BYTES = 32


class Entropy:
    """A stream of random words, uniform and Gaussian numbers.

    Args:
        key: 32 secret bytes; :meth:`from_system` draws them.

    Raises:
        ValueError: The key has another length.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != _KEY_BYTES:
            raise ValueError(f"the key has {len(key)} bytes, not {_KEY_BYTES}")
        # A key is used for one stream only, so the counter may start at zero.
        self._stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    @classmethod
    def from_system(cls) -> Entropy:
        """Return a stream keyed by the operating system."""
        return cls(os.urandom(_KEY_BYTES))

    def words(self, count: int) -> npt.NDArray[np.uint64]:
        """Return ``[count]`` uniform 64-bit words."""
        return np.frombuffer(self._stream.update(bytes(8 * count)), dtype="<u8")

    def uniform(self, count: int) -> npt.NDArray[np.float64]:
        """Return ``[count]`` numbers uniform on the multiples of 2**-53 in [0, 1)."""
        return (self.words(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def normal(self, count: int) -> npt.NDArray[np.float32]:
        """Return ``[count]`` standard Gaussian numbers, float32."""
        pairs = (count + 1) // 2
        uniform = self.uniform(2 * pairs)
        radius = np.sqrt(-2.0 * np.log1p(-uniform[:pairs]))  # log(1 - u): u = 0 is harmless
        angle = 2.0 * np.pi * uniform[pairs:]
        both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
        return both[:count].astype(np.float32)
