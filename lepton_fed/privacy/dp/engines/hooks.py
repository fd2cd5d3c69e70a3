"""Opacus' hooks: every record's whole gradient is held, so this is the plainest and the largest.

A. Yousefpour et al.: Opacus: User-Friendly Differential Privacy Library in PyTorch. 2021.
arXiv:2109.12298.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from lepton_fed.privacy.dp.engines.base import (
    Loss,
    clip_factors,
    quiet_hooks,
    trained_parameters,
)
from lepton_fed.privacy.dp.engines.pieces import Whole, rows_of

__all__ = ["HooksEngine", "OpacusEngine", "without_rule"]

_LEFT_ON_MODULES = ("activations", "max_batch_len")
_LEFT_ON_PARAMETERS = ("grad_sample", "_forward_counter", "_norm_sample", "_current_grad_sample")


class OpacusEngine:
    """What engines that hang Opacus' hooks on a model have in common.

    Args:
        model: The model.
        loss: From outputs and targets to the loss of each record, ``[batch]``.
        clip: Euclidean norm to which a record's gradient is clipped.
    """

    def __init__(self, model: nn.Module, loss: Loss, clip: float) -> None:
        self._model = model
        self._loss = loss
        self._clip = clip
        self._parameters = trained_parameters(model)
        self._hooks: Any = None
        self._bare: list[nn.Module] = []

    @property
    def without_rule(self) -> list[str]:
        """Return the names of layers that Opacus has no rule for and runs a second time."""
        return without_rule(self._model)

    def _hung(self) -> Any:
        """Return the hooks, hung on the model."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        """Hang Opacus' hooks on the model."""
        self._bare = [m for m in self._model.modules() if not hasattr(m, "activations")]
        self._hooks = self._hung()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the hooks off, and what they left."""
        self._hooks.cleanup()
        _forget(self._bare, self._parameters)

    def _begin(self) -> None:
        """Leave nothing of the pass before."""
        _forget(self._bare, self._parameters)
        for parameter in self._parameters:
            setattr(parameter, "grad_sample", None)  # noqa: B010 - Opacus' attribute, not torch's
            setattr(parameter, "_forward_counter", 0)  # noqa: B010
        self._model.zero_grad(set_to_none=True)


class HooksEngine(OpacusEngine):
    """Per-record gradients by Opacus' hooks."""

    def _hung(self) -> Any:
        from opacus.grad_sample import GradSampleHooks

        return GradSampleHooks(self._model, loss_reduction="sum")

    def clipped_sum(self, inputs: Tensor, targets: Tensor) -> list[Tensor]:
        """Return the sum of the clipped gradients; see :class:`Engine`."""
        self._begin()
        with quiet_hooks():
            self._loss(self._model(inputs), targets).sum().backward()  # type: ignore[no-untyped-call]
        samples = [self._sample(p, len(targets)) for p in self._parameters]
        norms = torch.stack(
            # In float64 the square of a float32 number neither vanishes nor overflows.
            [torch.linalg.vector_norm(rows_of(g), dim=1, dtype=torch.float64) for g in samples]
        ).norm(dim=0)
        factors = clip_factors(norms, self._clip)
        return [Whole(sample).weighted_sum(factors) for sample in samples]

    def _sample(self, parameter: nn.Parameter, batch: int) -> Tensor:
        """Return a parameter's gradient for each record; zeros for one that the loss ignores.

        Raises:
            NotImplementedError: The loss does not ignore it, but Opacus did not see where.
        """
        found = getattr(parameter, "grad_sample", None)
        if found is not None:
            return cast(Tensor, found)
        if parameter.grad is not None:
            raise NotImplementedError("a parameter is used outside the layer that holds it")
        return parameter.new_zeros(batch, *parameter.shape)


def _forget(modules: list[nn.Module], parameters: list[nn.Parameter]) -> None:
    """Drop what a pass left: one that broke off, or a layer that the loss ignores, leaves much.

    The next pass would take it for its own.

    Args:
        modules: Those that had no attribute of Opacus' names before.
        parameters: The trained parameters.
    """
    for module in modules:
        for leftover in _LEFT_ON_MODULES:
            if hasattr(module, leftover):
                delattr(module, leftover)
    for parameter in parameters:
        for leftover in _LEFT_ON_PARAMETERS:
            if hasattr(parameter, leftover):
                delattr(parameter, leftover)


def without_rule(model: nn.Module) -> list[str]:
    """Return the names of layers with trained parameters that Opacus has no rule for."""
    from opacus.grad_sample import GradSampleModule
    from opacus.layers.dp_rnn import DPGRU, DPLSTM, DPRNN

    known = (*GradSampleModule.GRAD_SAMPLERS, DPGRU, DPLSTM, DPRNN)
    return [
        name or "the model"
        for name, layer in model.named_modules()
        if type(layer) not in known
        and any(p.requires_grad for p in layer.parameters(recurse=False))
    ]
