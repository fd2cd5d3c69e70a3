"""One step of DP-SGD with Opacus: clip each record's gradient, sum, add noise.

M. Abadi et al.: Deep Learning with Differential Privacy. CCS 2016. arXiv:1607.00133. Per-record
gradients (``hooks``) or per-record norms and a second backward pass (``ghost``: X. Li et al., ICLR
2022; Z. Bu et al.) are Opacus'; the noise is the site's own entropy, not torch's seedable
generator, and the sum is divided by the public expected batch, never by the number of rows that
happened to be drawn.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lepton_fed.errors import Problem, TaskError
from lepton_fed.privacy.dp.entropy import Entropy

__all__ = ["DpSgd", "Engine", "check_model"]

Engine = Literal["hooks", "ghost"]
Loss = Callable[[Tensor, Tensor], Tensor]

_LEFT_ON_MODULES = ("activations", "max_batch_len")


def check_model(model: nn.Module, probe: Tensor) -> None:
    """Refuse a model whose layers mix records.

    Args:
        model: The model.
        probe: Two different made-up inputs, ``[2, ...]``, on the model's device.

    Raises:
        TaskError: A layer has no per-record gradient (batch normalisation and its kind), or what
            the model says of one input depends on the other.
    """
    from opacus.validators import ModuleValidator

    # Validators look at a training module; the mode is put back.
    was_training = model.training
    model.train()
    found = ModuleValidator.validate(model, strict=False)
    model.train(was_training)
    if found:
        raise TaskError([_mixes(_first_sentence(error)) for error in found])
    model.eval()
    try:
        with torch.no_grad():
            together = model(probe)
            alone = torch.cat([model(probe[:1]), model(probe[1:])])
    except (RuntimeError, ValueError) as error:
        raise TaskError(_mixes(f"it does not take one record by itself: {error}")) from error
    finally:
        model.train(was_training)
    if not torch.allclose(together, alone, rtol=1e-3, atol=1e-4):
        raise TaskError(_mixes("its output for one record depends on the others in the batch"))


def _mixes(why: str) -> Problem:
    return Problem(
        "LF3302",
        f"the model cannot be trained with record-level DP: {why}",
        key="task.model",
        remedy="use GroupNorm for BatchNorm; Opacus' DP layers for attention and RNNs",
    )


class DpSgd:
    """Turns a batch into a clipped, summed, noised and scaled gradient in ``parameter.grad``.

    Use it as a context manager: Opacus hangs hooks on the model, and they must go again.

    Args:
        model: The model, already checked by :func:`check_model`.
        loss: From outputs and targets to the loss of each record, ``[batch]``.
        clip: Euclidean norm to which a record's gradient is clipped.
        noise_multiplier: Standard deviation of the noise over ``clip``.
        expected_batch: Public divisor of the sum.
        engine: ``hooks`` or ``ghost``.
        entropy: Where the noise comes from.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        *,
        clip: float,
        noise_multiplier: float,
        expected_batch: int,
        engine: Engine,
        entropy: Entropy,
    ) -> None:
        self._model = model
        self._loss = loss
        self._clip = clip
        self._noise_multiplier = noise_multiplier
        self._expected_batch = expected_batch
        self._engine = engine
        self._entropy = entropy
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._hooks: Any = None
        self._bare: list[nn.Module] = []

    def __enter__(self) -> DpSgd:
        self._bare = [m for m in self._model.modules() if not hasattr(m, "activations")]
        if self._engine == "ghost":
            from opacus.grad_sample import GradSampleHooksFastGradientClipping as Hooks

            self._hooks = Hooks(self._model, loss_reduction="sum", max_grad_norm=self._clip)
        else:
            from opacus.grad_sample import GradSampleHooks as Hooks

            self._hooks = Hooks(self._model, loss_reduction="sum")
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.cleanup()
        # A pass that broke off leaves what the next one would take for its own.
        for module in self._bare:
            for leftover in _LEFT_ON_MODULES:
                if hasattr(module, leftover):
                    delattr(module, leftover)
        for parameter in self._parameters:
            for leftover in ("grad_sample", "summed_grad", "_norm_sample", "_forward_counter"):
                if hasattr(parameter, leftover):
                    delattr(parameter, leftover)

    def gradient(self, inputs: Tensor, targets: Tensor) -> None:
        """Set ``grad`` of each trainable parameter to the noised mean gradient.

        Args:
            inputs: ``[batch, ...]``; the batch may be empty, the noise is added all the same.
            targets: ``[batch]``.
        """
        if len(targets) == 0:
            clipped = [torch.zeros_like(p) for p in self._parameters]
        else:
            clipped = self.clipped_sum(inputs, targets)
        std = self._noise_multiplier * self._clip
        sizes = [p.numel() for p in self._parameters]
        noise = torch.split(torch.from_numpy(self._entropy.normal(sum(sizes))), sizes)
        for parameter, total, part in zip(self._parameters, clipped, noise, strict=True):
            total.add_(part.view_as(total).to(total.device), alpha=std)
            parameter.grad = total.div_(self._expected_batch)

    def clipped_sum(self, inputs: Tensor, targets: Tensor) -> list[Tensor]:
        """Return the sum of the records' clipped gradients, one tensor a parameter; no noise.

        A record whose gradient overflows counts as zero: whatever the weights are, one record
        changes the sum by at most ``clip``, and the sum is finite. (Were the sum NaN, the failure
        would tell a coordinator that chose the weights that the record is there.)

        Args:
            inputs: ``[batch, ...]``, at least one record.
            targets: ``[batch]``.
        """
        if self._engine == "ghost":
            return self._ghost_sum(inputs, targets)
        self._backward(inputs, targets)
        samples = [self._sample(p, len(targets)) for p in self._parameters]
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in samples]).norm(dim=0)
        whole = norms.isfinite()
        factors = torch.where(whole, (self._clip / (norms + 1e-6)).clamp(max=1.0), 0.0)
        sums = []
        for sample in samples:
            # Zero times infinity is NaN, so such rows are replaced, not scaled.
            kept = sample if bool(whole.all()) else sample[whole]
            weights = factors if bool(whole.all()) else factors[whole]
            sums.append(torch.einsum("i,i...->...", weights, kept).contiguous())
        for parameter in self._parameters:
            setattr(parameter, "grad_sample", None)  # noqa: B010 - Opacus' attribute, not torch's
        return sums

    def _ghost_sum(self, inputs: Tensor, targets: Tensor) -> list[Tensor]:
        losses = self._backward(inputs, targets, keep=True)
        norms = torch.stack(list(self._taken_norms())).norm(dim=0)
        whole = norms.isfinite() & losses.detach().isfinite()
        if not bool(whole.all()):
            # A factor of zero takes no NaN out of the second pass; leaving the rows out does.
            if not bool(whole.any()):
                self._model.zero_grad(set_to_none=True)
                return [torch.zeros_like(p) for p in self._parameters]
            return self._ghost_sum(inputs[whole], targets[whole])
        factors = (self._clip / (norms + 1e-6)).clamp(max=1.0)
        self._model.zero_grad(set_to_none=True)
        self._hooks.disable_hooks()
        with _quiet_hooks():
            (factors * losses).sum().backward()
        self._hooks.enable_hooks()
        return [
            torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
            for p in self._parameters
        ]

    def _taken_norms(self) -> Iterator[Tensor]:
        """Yield each parameter's norms and forget them; one that the loss ignores has none."""
        for parameter in self._parameters:
            found = getattr(parameter, "_norm_sample", None)
            if found is not None:
                setattr(parameter, "_norm_sample", None)  # noqa: B010 - Opacus' attribute
                yield cast(Tensor, found)

    def _backward(self, inputs: Tensor, targets: Tensor, *, keep: bool = False) -> Tensor:
        self._model.zero_grad(set_to_none=True)
        with _quiet_hooks():
            losses = self._loss(self._model(inputs), targets)
            losses.sum().backward(retain_graph=keep)  # type: ignore[no-untyped-call]
        return losses

    def _sample(self, parameter: nn.Parameter, batch: int) -> Tensor:
        """Return a parameter's gradient for each record; zeros for one that the loss ignores."""
        found = getattr(parameter, "grad_sample", None)
        return (
            parameter.new_zeros(batch, *parameter.shape) if found is None else cast(Tensor, found)
        )


def _first_sentence(error: Exception) -> str:
    return str(error).split(". ")[0]


@contextmanager
def _quiet_hooks() -> Iterator[None]:
    """Silence torch's note that the first layer's hook sees no input gradient: none is needed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing when gradients")
        yield
