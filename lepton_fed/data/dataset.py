"""A site's rows in memory, as a reader hands them out."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Dataset"]


@dataclass(frozen=True)
class Dataset:
    """Rows of one site, in the units of the contract.

    Rows that were read for prediction have no targets: their ``targets`` has the dtype of the
    contract and length 0. ``labelled`` tells the two apart.

    Args:
        inputs: Examples, ``[rows, *contract.example_shape]``, dtype of the contract. In a table a
            missing number is NaN and a category is its code (its place in ``Column.values``).
        targets: ``[rows]``: int64 class codes (places in ``Target.classes``) or float32 numbers;
            ``[0]`` for rows without targets.
    """

    inputs: npt.NDArray[np.generic]
    targets: npt.NDArray[np.generic]

    def __len__(self) -> int:
        return int(self.inputs.shape[0])

    @property
    def labelled(self) -> bool:
        """Return whether every row has its target."""
        return len(self.targets) == len(self)

    def take(self, rows: npt.NDArray[np.integer]) -> Dataset:
        """Return the given rows, in the given order.

        Args:
            rows: Row numbers, ``[n]``, integers.
        """
        return Dataset(self.inputs[rows], self.targets[rows] if self.labelled else self.targets)

    @property
    def digest(self) -> str:
        """Return the SHA-256 of the content: 64 hexadecimal digits."""
        hasher = hashlib.sha256(b"lepton-fed dataset 1\0")
        for array in (self.inputs, self.targets):
            hasher.update(f"{array.dtype.str}{array.shape}".encode())
            hasher.update(np.ascontiguousarray(array).data)
        return hasher.hexdigest()
