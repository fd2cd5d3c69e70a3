"""How a layer's parameters get their per-record gradients from what it was given and sent back.

A rule is right for one forward pass, so a subclass with its own does not get it. A layer
without a rule is taken once more, record by record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn import functional

from lepton_fed.privacy.dp.engines.pieces import Outer, Piece, Rows, Whole

__all__ = ["Use", "known", "layer_pieces", "own_parameters"]

_CHUNK = 2**20  # numbers of unfolded inputs at a time: 4 MiB stay in the cache


@dataclass(frozen=True)
class Use:
    """One call of a layer in a forward pass.

    Args:
        layer: The layer.
        arguments: What it was given, by position; tensors begin with the batch.
        named: What it was given by name.
        gradients: The gradient of each tensor that it answered; None where the loss ignores it.
    """

    layer: nn.Module
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    gradients: tuple[Tensor | None, ...]


Pieces = Iterator[tuple[Tensor, Piece]]
Rule = Callable[[Any, Tensor, Tensor], Pieces]


def known(layer: nn.Module) -> bool:
    """Return whether a layer has a rule of its own."""
    return _rule(layer) is not None


def own_parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters that a layer itself uses, by name.

    Some containers (Opacus' recurrent layers) list what is their layers' under a second name.
    """
    below = {
        id(parameter)
        for module in layer.modules()
        if module is not layer
        for parameter in module.parameters(recurse=False)
    }
    return {
        name: parameter
        for name, parameter in layer.named_parameters(recurse=False)
        if parameter.requires_grad and id(parameter) not in below
    }


def _rule(layer: nn.Module) -> Rule | None:
    kind = type(layer)
    for base in kind.__mro__:
        if base in _RULES:
            names = ("forward", "_conv_forward")
            same = all(getattr(kind, n, None) is getattr(base, n, None) for n in names)
            return _RULES[base] if same else None
    return None


def layer_pieces(use: Use, batch: int) -> Pieces:
    """Yield the per-record gradients of a layer's own trained parameters.

    Args:
        use: One call of the layer.
        batch: Number of records.

    Raises:
        NotImplementedError: They cannot be told apart by record.
    """
    rule = _rule(use.layer)
    if rule is None:
        yield from _unknown_layer(use, batch)
        return
    (gradient,) = use.gradients
    if gradient is None:
        return
    (inputs,) = (*use.arguments, *use.named.values())
    if len(inputs) != batch or len(gradient) != batch:
        raise NotImplementedError(
            f"{type(use.layer).__name__} is not given one input for each record (batch first)"
        )
    for parameter, piece in rule(use.layer, inputs, gradient):
        if parameter.requires_grad:
            yield parameter, piece


def _linear(layer: nn.Linear, inputs: Tensor, gradient: Tensor) -> Pieces:
    batch = len(inputs)
    inputs = inputs.reshape(batch, -1, inputs.shape[-1])
    gradient = gradient.reshape(batch, -1, gradient.shape[-1])
    if layer.weight.requires_grad:
        yield layer.weight, Outer.smaller(inputs, gradient, layer.weight.shape)
    if layer.bias is not None:
        yield layer.bias, Whole(gradient.sum(1))


def _convolution(
    layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, inputs: Tensor, gradient: Tensor
) -> Pieces:
    gradient = gradient.flatten(2)
    if layer.bias is not None:
        yield layer.bias, Whole(gradient.sum(2))
    if not layer.weight.requires_grad:
        return
    batch, channels, places = gradient.shape
    shape, groups = layer.weight.shape, layer.groups
    width = shape[1:].numel()
    if groups == 1 and width * channels > 2 * places * (width + channels):
        unfolded = _unfold(layer, inputs).mT
        yield layer.weight, Outer.smaller(unfolded, gradient.mT, shape)
        return
    values = gradient.new_empty(batch, *shape)
    step = max(1, _CHUNK // (groups * width * places))
    for start in range(0, batch, step):
        part = slice(start, start + step)
        given = _unfold(layer, inputs[part]).view(-1, width, places)
        sent = gradient[part].reshape(-1, channels // groups, places)
        out = values[part].view(-1, channels // groups, width)
        torch.bmm(sent, given.mT, out=out)
    yield layer.weight, Whole(values)


def _unfold(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, inputs: Tensor) -> Tensor:
    """Return what each output place of a convolution sees.

    Returns:
        ``[batch, channels * kernel, places]``; channels of a group lie together.
    """
    kernel, strides, steps = layer.kernel_size, layer.stride, layer.dilation
    sides = list(layer._reversed_padding_repeated_twice)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    if len(kernel) == 2 and mode == "constant" and sides[::2] == sides[1::2]:
        padding = (sides[2], sides[0])
        return functional.unfold(
            inputs,
            kernel,
            steps,
            padding,
            strides,
        )
    padded = (functional.pad(inputs, sides, mode=mode) if any(sides) else inputs).contiguous()
    batch, channels, *sizes = padded.shape
    places = [
        (size - step * (width - 1) - 1) // stride + 1
        for size, width, stride, step in zip(sizes, kernel, strides, steps, strict=True)
    ]
    first, second, *each = padded.stride()
    windows = padded.as_strided(
        (batch, channels, *kernel, *places),
        (
            first,
            second,
            *(s * step for s, step in zip(each, steps, strict=True)),
            *(s * stride for s, stride in zip(each, strides, strict=True)),
        ),
    )
    kernels = channels * torch.Size(kernel).numel()
    return windows.reshape(batch, kernels, torch.Size(places).numel())


def _embedding(layer: nn.Embedding, inputs: Tensor, gradient: Tensor) -> Pieces:
    if layer.max_norm is not None or layer.scale_grad_by_freq:
        raise NotImplementedError("max_norm and scale_grad_by_freq of an embedding mix records")
    batch = len(inputs)
    index = inputs.reshape(batch, -1).long()
    gradient = gradient.reshape(batch, -1, layer.embedding_dim)
    if layer.padding_idx is not None:
        gradient = gradient * (index != layer.padding_idx)[:, :, None]
    yield layer.weight, Rows.read(index, gradient, layer.num_embeddings)


def _layer_norm(layer: nn.LayerNorm, inputs: Tensor, gradient: Tensor) -> Pieces:
    normal = functional.layer_norm(inputs, layer.normalized_shape, eps=layer.eps)
    yield from _trailing(layer.weight, layer.bias, normal, gradient)


def _rms_norm(layer: nn.RMSNorm, inputs: Tensor, gradient: Tensor) -> Pieces:
    normal = functional.rms_norm(inputs, list(layer.normalized_shape), eps=layer.eps)
    yield from _trailing(layer.weight, None, normal, gradient)


def _group_norm(layer: nn.GroupNorm, inputs: Tensor, gradient: Tensor) -> Pieces:
    normal = functional.group_norm(inputs, layer.num_groups, eps=layer.eps)
    yield from _channels(layer.weight, layer.bias, normal, gradient)


def _instance_norm(
    layer: nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d,
    inputs: Tensor,
    gradient: Tensor,
) -> Pieces:
    if layer.track_running_stats:
        raise NotImplementedError("running statistics mix records")
    normal = functional.instance_norm(inputs, eps=layer.eps)
    yield from _channels(layer.weight, layer.bias, normal, gradient)


def _trailing(
    weight: Tensor | None, bias: Tensor | None, normal: Tensor, gradient: Tensor
) -> Pieces:
    """Yield the gradients of a scale and a shift of the last dimensions."""
    if weight is not None:
        yield weight, Whole((gradient * normal).reshape(len(normal), -1, *weight.shape).sum(1))
    if bias is not None:
        yield bias, Whole(gradient.reshape(len(normal), -1, *bias.shape).sum(1))


def _channels(
    weight: Tensor | None, bias: Tensor | None, normal: Tensor, gradient: Tensor
) -> Pieces:
    """Yield the gradients of a scale and a shift of each channel, dimension 1."""
    flat = (len(normal), normal.shape[1], -1)
    if weight is not None:
        yield weight, Whole((gradient * normal).reshape(flat).sum(2))
    if bias is not None:
        yield bias, Whole(gradient.reshape(flat).sum(2))


def _unknown_layer(use: Use, batch: int) -> Pieces:
    """Yield the gradients of any layer's own parameters by running it once more, record by record.

    Raises:
        NotImplementedError: It draws at random, branches on what it is given, or is not given one
            input for each record.
    """
    layer = use.layer
    own = own_parameters(layer)
    sent = [g for g in use.gradients if g is not None]
    if not sent:
        return
    answered = [g is not None for g in use.gradients]
    given = [a for a in (*use.arguments, *use.named.values()) if isinstance(a, Tensor)]
    each = [*given, *sent]
    if not given or any(tensor.dim() == 0 or len(tensor) != batch for tensor in each):
        raise NotImplementedError(
            f"{type(layer).__name__} is not given one input for each record (batch first)"
        )

    def one(tensors: list[Tensor], gradients: list[Tensor]) -> dict[str, Tensor]:
        feed = iter(tensors)
        positional, named = (
            tuple(next(feed).unsqueeze(0) if isinstance(a, Tensor) else a for a in use.arguments),
            {
                n: next(feed).unsqueeze(0) if isinstance(a, Tensor) else a
                for n, a in use.named.items()
            },
        )

        def run(values: dict[str, Tensor]) -> tuple[Tensor, ...]:
            out = functional_call(layer, values, positional, named)
            found = out if isinstance(out, tuple | list) else (out,)
            tensors = [t for t in found if isinstance(t, Tensor)]
            return tuple(t for t, wanted in zip(tensors, answered, strict=True) if wanted)

        back = vjp(run, own)[1]
        return cast(dict[str, Tensor], back(tuple(g.unsqueeze(0) for g in gradients))[0])

    try:
        found = vmap(one)(given, sent)
    except (RuntimeError, NotImplementedError) as error:
        why = str(error).splitlines()[0]
        raise NotImplementedError(
            f"{type(layer).__name__} cannot be taken record by record: {why}"
        ) from error
    for name, values in found.items():
        yield own[name], Whole(values)


_RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Conv3d: _convolution,
    nn.Embedding: _embedding,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _rms_norm,
    nn.GroupNorm: _group_norm,
    nn.InstanceNorm1d: _instance_norm,
    nn.InstanceNorm2d: _instance_norm,
    nn.InstanceNorm3d: _instance_norm,
}
