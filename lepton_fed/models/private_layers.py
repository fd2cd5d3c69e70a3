"""Layers that record-level DP can take, in the place of those that it cannot, and the way back.

A recurrent layer or attention of torch is one kernel that shows no per-record gradients; built from
linear layers it does, with the same weights and answers. Batch normalisation mixes records however
it is built, so group normalisation takes its place (Y. Wu, K. He: Group Normalization. ECCV 2018.
arXiv:1803.08494). What is exported has torch's own layers again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.rnn import PackedSequence

from lepton_fed.errors import Problem, TaskError

__all__ = ["Attention", "Recurrent", "plain_layers", "private_layers"]

_MOST_GROUPS = 32
_LEAST_CHANNELS = 4  # in a group; one channel alone, without places, would always come out as zero

_GATES = {nn.RNN: 1, nn.GRU: 3, nn.LSTM: 4}
_State = Tensor | tuple[Tensor, Tensor]


class Recurrent(nn.Module):
    """An RNN, GRU or LSTM of linear layers, called like torch's.

    Args:
        source: The layer whose place it takes; its weights are copied.

    Raises:
        ValueError: The layer projects its hidden state, which this one does not.
    """

    def __init__(self, source: nn.RNN | nn.GRU | nn.LSTM) -> None:
        super().__init__()
        if source.proj_size:
            raise ValueError("a recurrent layer with proj_size has no form that DP can train")
        self.kind = type(source)
        self.input_size, self.hidden_size = source.input_size, source.hidden_size
        self.num_layers, self.bias = source.num_layers, source.bias
        self.batch_first, self.dropout = source.batch_first, source.dropout
        self.bidirectional = source.bidirectional
        self.nonlinearity = getattr(source, "nonlinearity", "tanh")
        self.given, self.kept = nn.ModuleList(), nn.ModuleList()
        for suffix in self._suffixes():
            for layers, name in ((self.given, "ih"), (self.kept, "hh")):
                weight = getattr(source, f"weight_{name}_{suffix}")
                bias = getattr(source, f"bias_{name}_{suffix}") if source.bias else None
                layers.append(_linear(weight, bias))

    def _suffixes(self) -> list[str]:
        """Return the ends of torch's names for the weights, layer by layer."""
        ways = ("", "_reverse") if self.bidirectional else ("",)
        return [f"l{layer}{way}" for layer in range(self.num_layers) for way in ways]

    def flatten_parameters(self) -> None:
        """Do nothing: there is no kernel that would want them in one block."""

    def forward(self, inputs: Tensor, start: _State | None = None) -> tuple[Tensor, _State]:
        """Return the hidden states of the last layer, and the last states of all.

        Args:
            inputs: ``[batch, places, input_size]``, or places first without ``batch_first``.
            start: First state, ``[layers * directions, batch, hidden_size]``, and for an LSTM the
                cell's beside it; None is zero.

        Returns:
            ``[batch, places, directions * hidden_size]`` in the order of ``inputs``, and the last
            states as ``start`` has them.

        Raises:
            ValueError: The sequences are packed, or there is no batch.
        """
        if isinstance(inputs, PackedSequence) or inputs.dim() != 3:
            raise ValueError("a recurrent layer under DP takes padded sequences in a batch")
        sequence = inputs if self.batch_first else inputs.transpose(0, 1)
        ways = 2 if self.bidirectional else 1
        last: list[tuple[Tensor, ...]] = []
        for layer in range(self.num_layers):
            if layer and self.dropout:
                sequence = functional.dropout(sequence, self.dropout, self.training)
            answers = []
            for way in range(ways):
                index = layer * ways + way
                state = self._start(start, index, sequence)
                answer, state = self._run(index, sequence.flip(1) if way else sequence, state)
                answers.append(answer.flip(1) if way else answer)
                last.append(state)
            sequence = torch.cat(answers, dim=2)
        ends = tuple(torch.stack(parts) for parts in zip(*last, strict=True))
        output = sequence if self.batch_first else sequence.transpose(0, 1)
        return output, cast(_State, ends if self.kind is nn.LSTM else ends[0])

    def _start(self, start: _State | None, index: int, sequence: Tensor) -> tuple[Tensor, ...]:
        count = 2 if self.kind is nn.LSTM else 1
        if start is None:
            return (sequence.new_zeros(sequence.shape[0], self.hidden_size),) * count
        states = start if isinstance(start, tuple) else (start,)
        return tuple(state[index] for state in states)

    def _run(
        self, index: int, sequence: Tensor, state: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        given, kept = self.given[index](sequence), self.kept[index]
        answers = []
        for place in given.unbind(1):
            state = self._step(place, kept(state[0]), state)
            answers.append(state[0])
        return torch.stack(answers, dim=1), state

    def _step(self, given: Tensor, kept: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.kind is nn.RNN:
            total = given + kept
            return (torch.relu(total) if self.nonlinearity == "relu" else torch.tanh(total),)
        if self.kind is nn.GRU:
            reset, update, new = given.chunk(3, dim=1)
            reset_kept, update_kept, new_kept = kept.chunk(3, dim=1)
            gate = torch.sigmoid(update + update_kept)
            fresh = torch.tanh(new + torch.sigmoid(reset + reset_kept) * new_kept)
            return (fresh + gate * (state[0] - fresh),)
        enter, forget, new, out = (given + kept).chunk(4, dim=1)
        cell = torch.sigmoid(forget) * state[1] + torch.sigmoid(enter) * torch.tanh(new)
        return torch.sigmoid(out) * torch.tanh(cell), cell

    def plain(self) -> nn.Module:
        """Return torch's own layer with these weights."""
        more = {"nonlinearity": self.nonlinearity} if self.kind is nn.RNN else {}
        layer = self.kind(
            self.input_size, self.hidden_size, self.num_layers, bias=self.bias,
            batch_first=self.batch_first, dropout=self.dropout,
            bidirectional=self.bidirectional, **more,
        )  # fmt: skip
        with torch.no_grad():
            for index, suffix in enumerate(self._suffixes()):
                for layers, name in ((self.given, "ih"), (self.kept, "hh")):
                    linear = cast(nn.Linear, layers[index])
                    getattr(layer, f"weight_{name}_{suffix}").copy_(linear.weight)
                    if self.bias:
                        getattr(layer, f"bias_{name}_{suffix}").copy_(linear.bias)
        return layer


class Attention(nn.Module):
    """Attention with several heads, of linear layers, called like torch's.

    Args:
        source: The layer whose place it takes; its weights are copied.

    Raises:
        ValueError: The layer adds keys of its own, which this one does not.
    """

    in_proj_weight: None = None  # torch's encoder asks, and leaves its fused kernel be
    in_proj_bias: None = None
    _qkv_same_embed_dim = False

    def __init__(self, source: nn.MultiheadAttention) -> None:
        super().__init__()
        if source.bias_k is not None or source.add_zero_attn:
            raise ValueError("attention with add_bias_kv or add_zero_attn has no form for DP")
        self.embed_dim, self.num_heads = source.embed_dim, source.num_heads
        self.kdim, self.vdim = source.kdim, source.vdim
        self.dropout, self.batch_first = source.dropout, source.batch_first
        if source._qkv_same_embed_dim:
            weights = list(source.in_proj_weight.chunk(3))
        else:
            weights = [source.q_proj_weight, source.k_proj_weight, source.v_proj_weight]
        bias = source.in_proj_bias
        biases = [None] * 3 if bias is None else list(bias.chunk(3))
        self.query, self.key, self.value = (
            _linear(w, b) for w, b in zip(weights, biases, strict=True)
        )
        self.out_proj = _linear(source.out_proj.weight, source.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return what each place of ``query`` reads, and how much of each place of ``key``.

        Args:
            query: ``[batch, places, embed_dim]``, or places first without ``batch_first``.
            key: ``[batch, others, kdim]``.
            value: ``[batch, others, vdim]``.
            key_padding_mask: ``[batch, others]``: true, or what is added to the scores.
            need_weights: Return the weights too.
            attn_mask: ``[places, others]`` or ``[batch * heads, places, others]``, likewise.
            average_attn_weights: Average the weights over heads.
            is_causal: That ``attn_mask`` is causal.

        Returns:
            As ``query``, and ``[batch, places, others]`` or None.

        Raises:
            ValueError: There is no batch.
        """
        if query.dim() != 3:
            raise ValueError("attention under DP takes a batch")
        if not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        heads = (
            self._heads(layer(tensor))
            for layer, tensor in ((self.query, query), (self.key, key), (self.value, value))
        )
        asking, asked, read = heads
        scores = asking @ asked.mT / float(asking.shape[-1]) ** 0.5
        if attn_mask is not None:
            mask = _added(attn_mask, scores)
            scores = scores + (mask if mask.dim() == 2 else mask.view(scores.shape))
        elif is_causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores + _added(later, scores)
        if key_padding_mask is not None:
            scores = scores + _added(key_padding_mask, scores)[:, None, None, :]
        weights = scores.softmax(dim=-1)
        mixed = functional.dropout(weights, self.dropout, self.training) @ read
        output = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if not self.batch_first:
            output = output.transpose(0, 1)
        if not need_weights:
            return output, None
        return output, weights.mean(1) if average_attn_weights else weights

    def _heads(self, tensor: Tensor) -> Tensor:
        return tensor.view(*tensor.shape[:2], self.num_heads, -1).transpose(1, 2)

    def plain(self) -> nn.Module:
        """Return torch's own layer with these weights."""
        parts = self.query, self.key, self.value, self.out_proj
        return _attention(
            parts, self.num_heads, self.dropout, self.kdim, self.vdim, self.batch_first
        )


def private_layers(model: nn.Module) -> nn.Module:
    """Return a model, changed in place, with layers that record-level DP can take.

    Batch normalisation becomes group normalisation, attention and recurrent layers become ones of
    linear layers with the same weights, and instance normalisation keeps no running statistics. A
    subclass of these may do something else, so it stays, and the check before training refuses it.

    Args:
        model: The model as its plugin made it.

    Raises:
        ValueError: A layer has a feature without such a form.
    """
    return _replaced(model, _private)


def plain_layers(model: nn.Module) -> nn.Module:
    """Return a model with torch's own layers for those that DP needed, ours and Opacus'.

    Args:
        model: The trained model; it is left as it is, and returned itself if there is nothing to
            replace.

    Raises:
        TaskError: An attention layer of Opacus has no layer of torch that answers the same.
    """
    if not any(_is_private(module) for module in model.modules()):
        return model
    # It answers and is not trained: the exporter stumbles over gradients of recurrent layers.
    return _replaced(copy.deepcopy(model), _plain).train(model.training).requires_grad_(False)


def _replaced(model: nn.Module, other: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """Return a model with other layers; a layer that is in two places stays one layer."""
    found: dict[nn.Module, nn.Module] = {}

    def of(module: nn.Module) -> nn.Module:
        if module not in found:
            new = other(module)
            found[module] = module if new is None else _like(new, module)
            if new is None:
                for name, child in module._modules.items():
                    if child is not None:
                        module._modules[name] = of(child)
        return found[module]

    return of(model)


def _like(new: nn.Module, old: nn.Module) -> nn.Module:
    """Return a new layer in the mode of the old one, frozen if that was, and on its device."""
    parameters = list(old.parameters())
    if parameters:
        new.to(parameters[0].device)
        new.requires_grad_(any(p.requires_grad for p in parameters))
    return new.train(old.training)


def _private(module: nn.Module) -> nn.Module | None:
    if type(module) in _GATES:
        return Recurrent(cast(nn.LSTM, module))
    if type(module) is nn.MultiheadAttention:
        return Attention(module)
    if isinstance(module, _BatchNorm):
        channels = module.num_features
        most = max(1, min(_MOST_GROUPS, channels // _LEAST_CHANNELS))
        groups = next(count for count in range(most, 0, -1) if channels % count == 0)
        return nn.GroupNorm(groups, channels, module.eps, module.affine)
    if isinstance(module, _InstanceNorm) and module.track_running_stats:
        return type(module)(module.num_features, module.eps, affine=module.affine)
    return None


def _is_private(module: nn.Module) -> bool:
    return isinstance(module, Recurrent | Attention) or _of_opacus(module)


def _of_opacus(module: nn.Module) -> bool:
    return type(module).__module__.startswith("opacus.layers.")


def _plain(module: nn.Module) -> nn.Module | None:
    if isinstance(module, Recurrent | Attention):
        return module.plain()
    if not _of_opacus(module):
        return None
    kind, made = type(module).__name__, cast(Any, module)
    if kind == "DPMultiheadAttention":
        what = ""
        if made.add_bias_kv or made.add_zero_attn:
            what = "attention with add_bias_kv or add_zero_attn cannot be exported"
        elif made.batch_first and made.num_heads > 1:
            # It takes the heads of a record for its places (Opacus 1.6).
            what = "Opacus' attention with the batch first answers otherwise than torch's"
        if what:
            remedy = "take torch's own in the model, and task.model.fix: true"
            raise TaskError(Problem("LF3201", what, key="task.model", remedy=remedy))
        parts = made.qlinear, made.klinear, made.vlinear, made.out_proj
        dropout = made.dropout.p
        return _attention(parts, made.num_heads, dropout, made.kdim, made.vdim, made.batch_first)
    if kind in ("DPRNN", "DPGRU", "DPLSTM"):
        laws = [cell.nonlinearity for cell in module.modules() if hasattr(cell, "nonlinearity")]
        more = {"nonlinearity": laws[0]} if laws else {}
        layer: nn.Module = getattr(nn, kind.removeprefix("DP"))(
            made.input_size, made.hidden_size, made.num_layers, bias=made.bias,
            batch_first=made.batch_first, dropout=made.dropout,
            bidirectional=made.bidirectional, **more,
        )  # fmt: skip
        layer.load_state_dict({name: module.get_parameter(name) for name in layer.state_dict()})
        return layer
    return None


def _attention(
    parts: tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear],
    heads: int,
    dropout: float,
    kdim: int,
    vdim: int,
    batch_first: bool,
) -> nn.Module:
    """Return torch's attention with the weights of query, key, value and output layers."""
    *three, last = parts
    bias = last.bias is not None
    layer = nn.MultiheadAttention(
        last.out_features, heads, dropout, bias, kdim=kdim, vdim=vdim, batch_first=batch_first
    )
    with torch.no_grad():
        if layer._qkv_same_embed_dim:
            layer.in_proj_weight.copy_(torch.cat([part.weight for part in three]))
        else:
            for name, part in zip("qkv", three, strict=True):
                getattr(layer, f"{name}_proj_weight").copy_(part.weight)
        if bias:
            layer.in_proj_bias.copy_(torch.cat([part.bias for part in three]))
            layer.out_proj.bias.copy_(last.bias)
        layer.out_proj.weight.copy_(last.weight)
    return layer


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a linear layer with copies of these weights."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device=weight.device)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def _added(mask: Tensor, scores: Tensor) -> Tensor:
    """Return what a mask adds to the scores."""
    if mask.dtype != torch.bool:
        return mask.to(scores.dtype)
    return torch.zeros_like(mask, dtype=scores.dtype).masked_fill(mask, -torch.inf)
