"""Opacus' ghost clipping: norms without gradients, then a second backward pass of weighted losses.

X. Li, F. Tramer, P. Liang, T. Hashimoto: Large Language Models Can Be Strong Differentially Private
Learners. ICLR 2022. arXiv:2110.05679.

For simulations only. Its norms are products of squares in single precision, and what it clips by
them comes from another pass with other rounding: a coordinator that chooses the weights can make a
norm vanish beside the gradient that it stands for, and that gradient then passes unclipped. Neither
can be mended from outside Opacus. The book-keeping engine is the same idea without the two faults.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lepton_fed.privacy.dp.engines.base import clip_factors, quiet_hooks
from lepton_fed.privacy.dp.engines.hooks import OpacusEngine

__all__ = ["GhostEngine"]


class GhostEngine(OpacusEngine):
    """Clipped sums by Opacus' ghost norms and two backward passes."""

    def _hung(self) -> Any:
        from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (
            GradSampleHooksFastGradientClipping,
        )

        return GradSampleHooksFastGradientClipping(self._model, loss_reduction="sum")

    def clipped_sum(self, inputs: Tensor, targets: Tensor) -> list[Tensor]:
        """Return the sum of the clipped gradients; see :class:`Engine`."""
        self._begin()
        self._hooks.enable_hooks()
        with quiet_hooks():
            losses = self._loss(self._model(inputs), targets)
            losses.sum().backward(retain_graph=True)  # type: ignore[no-untyped-call]
            factors = clip_factors(self._norms(len(targets)), self._clip)
            kept = factors > 0
            if not bool(kept.all()):
                # Zero times infinity is NaN, so such records are left out, not scaled.
                if not bool(kept.any()):
                    return [torch.zeros_like(p, dtype=torch.float64) for p in self._parameters]
                return self.clipped_sum(inputs[kept], targets[kept])
            self._hooks.disable_hooks()
            self._model.zero_grad(set_to_none=True)
            losses.backward(factors.to(losses.dtype))  # type: ignore[no-untyped-call]
        sums = [
            torch.zeros_like(p, dtype=torch.float64) if p.grad is None else p.grad.double()
            for p in self._parameters
        ]
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
