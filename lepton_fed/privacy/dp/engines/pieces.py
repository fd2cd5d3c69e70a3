"""Per-record gradients of one parameter: held whole, or as the factors that they are products of.

A layer that is linear in its weights has the gradient ``sum over t of g_t a_t^T``, where ``a_t`` is
what it was given at place t and ``g_t`` the gradient of what it answered. The norm can be taken,
and the weighted sum over records formed, from either side of that equation (Z. Bu, Y.-X. Wang,
S. Zha, G. Karypis: Differentially Private Optimization on Large Model at Small Cost. ICML 2023.
arXiv:2210.00038, sections 2 and 3); a piece knows which side is smaller.

Weights are chosen by a coordinator that may want one record to pass unclipped, so each norm here is
an upper bound on what the record adds to the sum, whatever rounding does:

* Norms are taken in float64, where the square of a product of two float32 numbers neither vanishes
  nor overflows.
* A gradient that is held whole is measured and added as the same tensor.
* A single outer product has the norm ``|a| |g|`` without any cancellation.
* Only a sum of outer products can cancel, so that rounding is large beside what is left. There
  products and sums are float64 too, and the largest error of the norm is added to it.
* Sums over records are float64, and stay so until they have their noise: in float32 each of
  thousands of additions rounds, up or down by how far the sum is, and a record that moves it moves
  all that is rounded after it (S. Casacuberta, M. Shoemate, S. Vadhan, C. Wagaman: Widespread
  Underestimation of Sensitivity in Differentially Private Libraries and How to Fix It. CCS 2022).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Outer", "Piece", "Rows", "Whole", "joined", "rows_of"]

_ROUND = 2.0**-53  # unit roundoff of float64
_CHUNK = 2**20  # numbers in one chunk of float64 work: 8 MiB
_CACHED = 2**16  # numbers that stay in the cache between two looks: 512 KiB


class Piece(Protocol):
    """The gradients of one parameter for each record of a batch."""

    def squared_norms(self) -> Tensor:
        """Return the squared norm of each record's gradient, ``[batch]`` float64."""
        ...

    def weighted_sum(self, factors: Tensor) -> Tensor:
        """Return the sum of the records' gradients, each times its factor.

        Args:
            factors: ``[batch]`` float64; zero leaves a record out, whatever its gradient is.

        Returns:
            A new float64 tensor of the parameter's shape.
        """
        ...

    def whole(self) -> Whole:
        """Return the gradients in full."""
        ...


@dataclass(frozen=True)
class Whole:
    """Gradients in full.

    Args:
        values: ``[batch, *shape of the parameter]`` floating point.
    """

    values: Tensor

    def squared_norms(self) -> Tensor:
        """Return the squared norm of each record's gradient, ``[batch]`` float64."""
        return _squares(rows_of(self.values))

    def weighted_sum(self, factors: Tensor) -> Tensor:
        """Return the weighted sum over records."""
        values, factors = _kept(factors, self.values)
        flat = rows_of(values)
        total = flat.new_zeros(flat.shape[1], dtype=torch.float64)
        step = max(1, _CACHED // max(1, flat.shape[1]))
        for start in range(0, len(flat), step):
            part = slice(start, start + step)
            total += factors[part] @ flat[part].double()
        return total.view(self.values.shape[1:])

    def whole(self) -> Whole:
        """Return itself."""
        return self


@dataclass(frozen=True)
class Outer:
    """Sums of outer products, as a linear layer's weight has them.

    Args:
        inputs: ``[batch, places, p]`` float32.
        gradients: ``[batch, places, q]`` float32.
        shape: Shape of the parameter, of ``q * p`` numbers.
    """

    inputs: Tensor
    gradients: Tensor
    shape: torch.Size

    @staticmethod
    def smaller(inputs: Tensor, gradients: Tensor, shape: torch.Size) -> Outer | Whole:
        """Return the gradients in the form that takes less time and memory."""
        outer = Outer(inputs, gradients, shape)
        _, places, width = inputs.shape
        height = gradients.shape[2]
        # Whole gradients at most twice as large as the factors; beyond that the factors are also
        # faster: places**2 (p + q) in float64 against places * p * q.
        if places > 1 and width * height <= 2 * places * (width + height):
            return outer.whole()
        return outer

    def squared_norms(self) -> Tensor:
        """Return the squared norm of each record's gradient, ``[batch]`` float64."""
        batch, places, width = self.inputs.shape
        height = self.gradients.shape[2]
        if places == 1:
            return _squares(self.inputs.flatten(1)) * _squares(self.gradients.flatten(1))
        error = _ROUND * (width + height + places**2 + 8)
        found = []
        step = max(1, _CHUNK // (places * (width + height + 2 * places)))
        for start in range(0, batch, step):
            part = slice(start, start + step)
            inputs, gradients = self.inputs[part].double(), self.gradients[part].double()
            products = (inputs @ inputs.mT).mul_(gradients @ gradients.mT)
            most = (inputs.norm(dim=2) * gradients.norm(dim=2)).sum(1).square()
            found.append(products.sum((1, 2)).clamp_(min=0).add_(most, alpha=error))
        return torch.cat(found)

    def weighted_sum(self, factors: Tensor) -> Tensor:
        """Return the weighted sum over records."""
        inputs, gradients, factors = _kept(factors, self.inputs, self.gradients)
        batch, places, width = inputs.shape
        height = gradients.shape[2]
        total = inputs.new_zeros(height, width, dtype=torch.float64)
        step = max(1, _CHUNK // (places * (width + height)))
        for start in range(0, batch, step):
            part = slice(start, start + step)
            scaled = _wide(gradients[part]).mul_(factors[part, None, None])
            total.addmm_(scaled.flatten(0, 1).mT, inputs[part].double().flatten(0, 1))
        return total.view(self.shape)

    def whole(self) -> Whole:
        """Return the gradients in full."""
        values = torch.bmm(self.gradients.mT, self.inputs)
        return Whole(values.view(-1, *self.shape))


@dataclass(frozen=True)
class Rows:
    """Gradients of a table of which a record reads a few rows.

    Args:
        index: ``[batch, places]`` int64: rows of the table, for one record no row twice with a
            gradient that is not zero.
        values: ``[batch, places, width]`` float32: the gradient of each of these rows.
        count: Rows of the table.
    """

    index: Tensor
    values: Tensor
    count: int

    @classmethod
    def read(cls, index: Tensor, gradients: Tensor, count: int) -> Rows:
        """Return the gradients of a table from the places at which it was read.

        Args:
            index: ``[batch, places]`` int64: the row read at each place.
            gradients: ``[batch, places, width]`` float32: the gradient of what was read there.
            count: Rows of the table.
        """
        order = index.argsort(dim=1, stable=True)
        ordered = index.gather(1, order)
        new = ordered != torch.cat([ordered[:, :1] - 1, ordered[:, :-1]], dim=1)
        slot = new.cumsum(1) - 1
        wide = order[:, :, None].expand_as(gradients)
        values = torch.zeros_like(gradients).scatter_add_(
            1, slot[:, :, None].expand_as(gradients), gradients.gather(1, wide)
        )
        return cls(torch.zeros_like(index).scatter_(1, slot, ordered), values, count)

    def squared_norms(self) -> Tensor:
        """Return the squared norm of each record's gradient, ``[batch]`` float64."""
        return _squares(self.values.flatten(1))

    def weighted_sum(self, factors: Tensor) -> Tensor:
        """Return the weighted sum over records."""
        index, values, factors = _kept(factors, self.index, self.values)
        total = values.new_zeros(self.count, values.shape[2], dtype=torch.float64)
        scaled = _wide(values).mul_(factors[:, None, None])
        return total.index_add_(0, index.flatten(), scaled.flatten(0, 1))

    def whole(self) -> Whole:
        """Return the gradients in full."""
        batch, _, width = self.values.shape
        values = self.values.new_zeros(batch, self.count, width)
        return Whole(
            values.scatter_add_(1, self.index[:, :, None].expand_as(self.values), self.values)
        )


def joined(pieces: Sequence[Piece]) -> Piece:
    """Return the gradients of a parameter that was used more than once.

    Args:
        pieces: Its gradients from each use, at least one.
    """
    if len(pieces) == 1:
        return pieces[0]
    outers = [piece for piece in pieces if isinstance(piece, Outer)]
    if len(outers) == len(pieces):
        # A layer used twice is a layer that was given a sequence.
        return Outer.smaller(
            torch.cat([piece.inputs for piece in outers], dim=1),
            torch.cat([piece.gradients for piece in outers], dim=1),
            outers[0].shape,
        )
    total = pieces[0].whole().values.clone()
    for piece in pieces[1:]:
        total += piece.whole().values
    return Whole(total)


def rows_of(values: Tensor) -> Tensor:
    """Return the gradient of each record as a row, ``[batch, numbers]``; a single number has one.

    Args:
        values: ``[batch, *shape of the parameter]``.
    """
    return values.reshape(len(values), math.prod(values.shape[1:]))


def _wide(values: Tensor) -> Tensor:
    """Return a float64 copy, also of what is float64: it is worked on in place."""
    return values.to(torch.float64, copy=True)


def _squares(rows: Tensor) -> Tensor:
    """Return the squared norm of each row, ``[rows]`` float64, of floating-point numbers."""
    step = max(1, _CACHED // max(1, rows.shape[1]))
    found = []
    for start in range(0, len(rows), step):
        part = _wide(rows[start : start + step])
        found.append(part.mul_(part).sum(1))
    return torch.cat(found)


def _kept(factors: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors, and the factors behind them, without the records whose factor is zero.

    Zero times infinity is NaN, so such records are left out, not scaled.
    """
    kept = factors > 0
    if bool(kept.all()):
        return (*tensors, factors)
    return (*(tensor[kept] for tensor in tensors), factors[kept])
