"""Opacus' ghost clipping: norms without gradients, then a second backward pass of weighted losses.

X. Li, F. Tramer, P. Liang, T. Hashimoto: Large Language Models Can Be Strong Differentially Private
Learners. ICLR 2022. arXiv:2110.05679.

For simulations only. Its norms are products of squares in single precision, and what it clips by
them comes from another pass with other rounding: a coordinator that chooses the weights can make a
norm vanish beside the gradient that it stands for, and that gradient then passes unclipped. Neither
can be mended from outside Opacus. The book-keeping engine is the same idea without the two faults.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from lepton_fed.privacy.dp.engines.base import (
    Loss,
    clip_factors,
    quiet_hooks,
    trained_parameters,
)
from lepton_fed.privacy.dp.engines.hooks import forget, without_rule

__all__ = ["GhostEngine"]


class GhostEngine:
    """Clipped sums by Opacus' ghost norms and two backward passes.

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

    def __enter__(self) -> Self:
        """Hang Opacus' hooks on the model."""
        from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (
            GradSampleHooksFastGradientClipping,
        )

        self._bare = [m for m in self._model.modules() if not hasattr(m, "activations")]
        self._hooks = GradSampleHooksFastGradientClipping(self._model, loss_reduction="sum")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the hooks off, and what they left."""
        self._hooks.cleanup()
        forget(self._bare, self._parameters)

    def clipped_sum(self, inputs: Tensor, targets: Tensor) -> list[Tensor]:
        """Return the sum of the clipped gradients; see :class:`Engine`."""
        forget(self._bare, self._parameters)
        for parameter in self._parameters:
            setattr(parameter, "grad_sample", None)  # noqa: B010 - Opacus' attribute, not torch's
            setattr(parameter, "_forward_counter", 0)  # noqa: B010
        self._model.zero_grad(set_to_none=True)
        self._hooks.enable_hooks()
        with quiet_hooks():
            losses = self._loss(self._model(inputs), targets)
            losses.sum().backward(retain_graph=True)  # type: ignore[no-untyped-call]
            factors = clip_factors(self._norms(len(targets)), self._clip)
            kept = factors > 0
            if not bool(kept.all()):
                # Zero times infinity is NaN, so such records are left out, not scaled.
                if not bool(kept.any()):
                    return [torch.zeros_like(p) for p in self._parameters]
                return self.clipped_sum(inputs[kept], targets[kept])
            self._hooks.disable_hooks()
            self._model.zero_grad(set_to_none=True)
            losses.backward(factors.to(losses.dtype))  # type: ignore[no-untyped-call]
        sums = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        self._model.zero_grad(set_to_none=True)
        return sums

    def _norms(self, batch: int) -> Tensor:
        """Return the norm of each record's gradient, ``[batch]`` float64.

        Raises:
            NotImplementedError: A parameter has a gradient, but Opacus did not see where.
        """
        found = []
        for parameter in self._parameters:
            norms = getattr(parameter, "_norm_sample", None)
            if norms is not None:
                found.append(norms.reshape(batch).double())
            elif parameter.grad is not None:
                raise NotImplementedError("a parameter is used outside the layer that holds it")
        if not found:
            return torch.zeros(batch, dtype=torch.float64, device=self._parameters[0].device)
        whole: Tensor = torch.linalg.vector_norm(torch.stack(found), dim=0)
        return whole
