"""The layout of a model: which tensor lies where in one flat vector.

An update, a checkpoint and a broadcast are flat float32 vectors over the *shared* tensors. The
layout says where each tensor lies in that vector, and names the two kinds that are not in it:
*local* tensors stay at their site, *frozen* ones never travel and are held to be the same
everywhere by their digest.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Literal

import numpy as np
import numpy.typing as npt

from lepton_fed.core.digests import digest_of

__all__ = ["Layout", "Rule", "TensorEntry", "Vector", "vector_digest"]

Vector = npt.NDArray[np.float32]
Rule = Literal["shared", "local", "frozen"]


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a model.

    Args:
        name: Its name in the model's state.
        shape: Its shape.
        dtype: Its element type by numpy's name, for example ``float32``; one that numpy lacks, such
            as ``bfloat16``, by torch's.
        rule: ``shared``, ``local`` or ``frozen``.
        offset: Place of its first element in the shared vector; -1 when it is not in it.
        content: SHA-256 of a frozen tensor's bytes; empty otherwise.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    rule: Rule
    offset: int = -1
    content: str = ""

    @property
    def size(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """All tensors of a model, in the model's own order."""

    entries: tuple[TensorEntry, ...]

    @classmethod
    def of(
        cls,
        tensors: Iterable[tuple[str, Rule, npt.NDArray[np.generic]]],
        dtypes: Mapping[str, str] = MappingProxyType({}),
    ) -> Layout:
        """Lay tensors out one after another.

        Args:
            tensors: Name, rule and value of each tensor, in the model's order.
            dtypes: Element types that numpy lacks, by tensor name; the value of such a tensor is
                its bytes as integers of the same width. Only frozen tensors may have one.

        Raises:
            ValueError: A name occurs twice, a shared tensor is not float32, or a local one is of a
                type that numpy lacks.
        """
        entries: list[TensorEntry] = []
        seen: set[str] = set()
        offset = 0
        for name, rule, value in tensors:
            if name in seen:
                raise ValueError(f"tensor {name!r} occurs twice")
            seen.add(name)
            dtype = dtypes.get(name, value.dtype.name)
            shape = tuple(int(n) for n in value.shape)
            if rule == "shared":
                if dtype != "float32":
                    raise ValueError(f"tensor {name!r} is {dtype}; shared tensors are float32")
                entries.append(TensorEntry(name, shape, dtype, rule, offset))
                offset += value.size
            elif rule == "frozen":
                content = hashlib.sha256(np.ascontiguousarray(value).data).hexdigest()
                entries.append(TensorEntry(name, shape, dtype, rule, content=content))
            elif name in dtypes:
                raise ValueError(f"tensor {name!r} is {dtype}; no site can keep that by itself")
            else:
                entries.append(TensorEntry(name, shape, dtype, rule))
        return cls(tuple(entries))

    @cached_property
    def size(self) -> int:
        """Return the length of the shared vector, in elements."""
        return sum(entry.size for entry in self.entries if entry.rule == "shared")

    @cached_property
    def digest(self) -> str:
        """Return the canonical SHA-256 digest, 64 hexadecimal digits."""
        return digest_of("lepton-fed layout 1", list(self.entries))

    def of_rule(self, rule: Rule) -> tuple[TensorEntry, ...]:
        """Return the entries of one rule, in order."""
        return tuple(entry for entry in self.entries if entry.rule == rule)

    def views(self, vector: Vector) -> dict[str, Vector]:
        """Return the shared tensors as views into ``vector``; nothing is copied.

        Args:
            vector: ``[size]`` float32.

        Raises:
            ValueError: ``vector`` has another length.
        """
        if vector.shape != (self.size,):
            raise ValueError(f"vector has shape {vector.shape}, layout wants ({self.size},)")
        return {
            entry.name: vector[entry.offset : entry.offset + entry.size].reshape(entry.shape)
            for entry in self.of_rule("shared")
        }

    def gather(self, tensors: Mapping[str, npt.NDArray[np.generic]]) -> Vector:
        """Return one vector of the shared tensors; each is copied once.

        Args:
            tensors: Value of at least each shared tensor, by name.

        Raises:
            ValueError: A tensor is missing, is not float32, or has another shape than the layout's.
        """
        vector = np.empty(self.size, dtype=np.float32)
        for name, view in self.views(vector).items():
            value = tensors.get(name)
            if value is None:
                raise ValueError(f"tensor {name!r} is missing")
            if value.shape != view.shape or value.dtype != view.dtype:
                raise ValueError(
                    f"tensor {name!r} is {value.dtype} {value.shape}, not float32 {view.shape}"
                )
            view[...] = value
        return vector


def vector_digest(layout: Layout, vector: Vector) -> str:
    """Return the SHA-256 of a model: its layout and its shared vector, little-endian.

    Args:
        layout: The model's layout.
        vector: ``[layout.size]`` float32.

    Returns:
        64 hexadecimal digits.
    """
    hasher = hashlib.sha256(b"lepton-fed model 1\0" + layout.digest.encode())
    hasher.update(np.ascontiguousarray(vector, dtype="<f4").data)
    return hasher.hexdigest()
