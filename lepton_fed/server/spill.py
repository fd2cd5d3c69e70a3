"""Updates on disk, for strategies that must see single ones: memory stays at one slice a site.

What single sites sent is nobody else's: only the coordinator's own account can read it, whatever
its umask.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lepton_fed.core.layout import Vector
from lepton_fed.runs.files import writing

__all__ = ["Spill"]


class Spill:
    """The updates of one round, readable by slices.

    Args:
        folder: An empty or missing folder, removed by :meth:`close`.
        round_number: Round, from 1.
        size: Length of a vector, in elements.

    Raises:
        RunError: LF5209, also from :meth:`add`: it cannot be written.
    """

    def __init__(self, folder: Path, round_number: int, size: int) -> None:
        shutil.rmtree(folder, ignore_errors=True)  # a killed round's leavings
        with writing(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700)
        self._folder = folder
        self._round = round_number
        self._size = size
        self._weights: dict[str, float] = {}

    @property
    def round_number(self) -> int:
        """Return the round, from 1."""
        return self._round

    @property
    def contributors(self) -> tuple[str, ...]:
        """Return the names of the sites, sorted."""
        return tuple(sorted(self._weights))

    def add(self, site: str, vectors: Mapping[str, Vector], weight: float) -> None:
        """Write one site's update."""
        for name, vector in vectors.items():
            path = self._path(site, name)
            with writing(path):
                vector.astype("<f4", copy=False).tofile(path)
                path.chmod(0o600)
        self._weights[site] = weight

    def weight(self, site: str) -> float:
        """Return a site's weight."""
        return self._weights[site]

    def read(self, site: str, vector: str, part: slice) -> Vector:
        """Return a slice of one site's vector, float32."""
        mapped = np.memmap(self._path(site, vector), dtype="<f4", mode="r", shape=(self._size,))
        return np.asarray(mapped[part], dtype=np.float32).copy()

    def close(self) -> None:
        """Remove the files."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, site: str, vector: str) -> Path:
        # Hashed: a name is never a path.
        return self._folder / hashlib.sha256(f"{site}\0{vector}".encode()).hexdigest()
