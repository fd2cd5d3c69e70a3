"""Book-keeping: one backward pass gives norms and weighted sum from the same stored factors.

Z. Bu, Y.-X. Wang, S. Zha, G. Karypis: Differentially Private Optimization on Large Model at Small
Cost. ICML 2023. arXiv:2210.00038.

The forward pass keeps what each layer was given; one backward pass, which computes no gradient of a
weight, gives the gradient of what each layer answered. From these pairs come the norm of each
record's gradient and, once the factors are known, the clipped sum. So a step costs what plain SGD
costs, and the norms.

Whatever the gradients are, what is added for a record depends on its own pairs alone, and is no
longer than the clipping norm; see :mod:`lepton_fed.privacy.dp.engines.pieces`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from lepton_fed.privacy.dp.engines.base import Loss, clip_factors, trained_parameters
from lepton_fed.privacy.dp.engines.layers import Use, known, layer_pieces, own_parameters
from lepton_fed.privacy.dp.engines.pieces import Piece, joined

__all__ = ["BookKeepingEngine"]


@dataclass(frozen=True)
class _Call:
    """A layer's call, as the forward pass left it."""

    layer: nn.Module
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    versions: list[int]
    answers: list[GradientEdge | None]


class BookKeepingEngine:
    """Clipped sums from stored pairs of inputs and gradients.

    Args:
        model: The model; its layers are given the batch first.
        loss: From outputs and targets to the loss of each record, ``[batch]``.
        clip: Euclidean norm to which a record's gradient is clipped.
    """

    def __init__(self, model: nn.Module, loss: Loss, clip: float) -> None:
        self._model = model
        self._loss = loss
        self._clip = clip
        self._parameters = trained_parameters(model)
        self._layers = {
            name: module for name, module in model.named_modules() if own_parameters(module)
        }
        self._handles: list[RemovableHandle] = []
        self._calls: list[_Call] = []
        self._watching = False

    @property
    def without_rule(self) -> list[str]:
        """Return the layers that are run a second time, for want of a rule of their own."""
        return [name or "the model" for name, layer in self._layers.items() if not known(layer)]

    def __enter__(self) -> Self:
        """Hang a forward hook on each layer that holds trained parameters."""
        self._handles = [
            layer.register_forward_hook(self._note, with_kwargs=True)
            for layer in self._layers.values()
        ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._calls.clear()

    def clipped_sum(self, inputs: Tensor, targets: Tensor) -> list[Tensor]:
        """Return the sum of the clipped gradients; see :class:`Engine`."""
        with self._noting() as calls:
            total = self._loss(self._model(inputs), targets).sum()
        edges = [edge for call in calls for edge in call.answers if edge is not None]
        found = iter(
            torch.autograd.grad(total, edges, allow_unused=True) if total.requires_grad else ()
        )
        pieces: dict[Tensor, list[Piece]] = {p: [] for p in self._parameters}
        with torch.no_grad():
            for call in calls:
                for parameter, piece in layer_pieces(_use(call, found), len(targets)):
                    if parameter not in pieces:
                        raise NotImplementedError("a layer's weight is made of other parameters")
                    pieces[parameter].append(piece)
            calls.clear()
            whole = {p: joined(parts) for p, parts in pieces.items() if parts}
            pieces.clear()
            if not whole:
                return [torch.zeros_like(p, dtype=torch.float64) for p in self._parameters]
            norms = torch.stack([piece.squared_norms() for piece in whole.values()]).sum(0).sqrt()
            factors = clip_factors(norms, self._clip)
            return [
                # What is summed is let go at once: the largest are the last to be needed.
                whole.pop(p).weighted_sum(factors)
                if p in whole
                else torch.zeros_like(p, dtype=torch.float64)
                for p in self._parameters
            ]

    @contextmanager
    def _noting(self) -> Iterator[list[_Call]]:
        """Note the calls of one forward pass; what a broken pass noted is dropped."""
        calls: list[_Call] = []
        self._calls = calls
        self._watching = True
        try:
            yield calls
        finally:
            self._watching = False
            self._calls = []

    def _note(
        self, layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any
    ) -> Any:
        if not self._watching:
            return output  # a layer without a rule is run once more
        if isinstance(output, Tensor) and output._is_view():
            # What overwrites a view leaves its edge out of the graph.
            output = output.clone()
        answers = output if isinstance(output, tuple | list) else (output,)
        given = [a for a in (*arguments, *named.values()) if isinstance(a, Tensor)]
        self._calls.append(
            _Call(
                layer,
                tuple(_detached(a) for a in arguments),
                {name: _detached(a) for name, a in named.items()},
                [tensor._version for tensor in given],
                [
                    # The edge, not the tensor: what overwrites the tensor (an activation in
                    # place) comes after it.
                    get_gradient_edge(answer) if answer.requires_grad else None
                    for answer in answers
                    if isinstance(answer, Tensor)
                ],
            )
        )
        return output


def _detached(argument: Any) -> Any:
    return argument.detach() if isinstance(argument, Tensor) else argument


def _use(call: _Call, found: Iterator[Tensor | None]) -> Use:
    """Return a call with its gradients, which are taken from ``found`` in order.

    Raises:
        NotImplementedError: The layer's inputs were overwritten.
    """
    given = [a for a in (*call.arguments, *call.named.values()) if isinstance(a, Tensor)]
    if [tensor._version for tensor in given] != call.versions:
        raise NotImplementedError(
            f"what {type(call.layer).__name__} was given is overwritten after it"
        )
    gradients = tuple(None if edge is None else next(found) for edge in call.answers)
    return Use(call.layer, call.arguments, call.named, gradients)
