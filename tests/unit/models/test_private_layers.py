"""Layers for record-level DP answer as torch's own do, and become torch's own again."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from opacus.layers import DPGRU, DPLSTM, DPRNN, DPMultiheadAttention
from torch import nn

from lepton_fed.errors import TaskError
from lepton_fed.models.private_layers import Attention, Recurrent, plain_layers, private_layers

PLAIN = (nn.RNN, nn.GRU, nn.LSTM, nn.MultiheadAttention)


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        yield


def same(one, two):
    """Compare what two layers answer, however nested."""
    if isinstance(one, tuple):
        for a, b in zip(one, two, strict=True):
            same(a, b)
    elif one is not None:
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    else:
        assert two is None


RECURRENT = [
    (nn.RNN, {}),
    (nn.RNN, {"nonlinearity": "relu", "bias": False}),
    (nn.GRU, {"num_layers": 2, "batch_first": True}),
    (nn.GRU, {"bidirectional": True}),
    (nn.LSTM, {"batch_first": True}),
    (nn.LSTM, {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False}),
]


@pytest.mark.parametrize(("kind", "how"), RECURRENT)
def test_recurrent_layers_answer_the_same_and_go_back_to_the_bit(kind, how):
    layer = kind(3, 4, **how).eval()
    states = layer.state_dict()
    ours = private_layers(copy.deepcopy(layer))
    assert isinstance(ours, Recurrent)
    assert not ours.training
    ours.flatten_parameters()
    inputs = torch.randn(5, 6, 3)
    same(ours(inputs), layer(inputs))
    start = torch.randn_like(layer(inputs)[1] if kind is not nn.LSTM else layer(inputs)[1][0])
    start = (start, torch.randn_like(start)) if kind is nn.LSTM else start
    same(ours(inputs, start), layer(inputs, start))
    back = plain_layers(ours)
    assert type(back) is kind
    assert list(back.state_dict()) == list(states)
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, states[name])


def test_dropout_between_recurrent_layers_is_applied_in_training_alone():
    ours = private_layers(nn.GRU(3, 4, 2, dropout=0.9, batch_first=True))
    inputs = torch.randn(2, 3, 3)
    assert not torch.equal(ours(inputs)[0], ours(inputs)[0])
    ours.eval()
    assert torch.equal(ours(inputs)[0], ours(inputs)[0])
    assert plain_layers(ours).dropout == 0.9


@pytest.mark.parametrize(
    "how",
    [{}, {"batch_first": True}, {"bias": False, "batch_first": True}, {"kdim": 3, "vdim": 5}],
)
def test_attention_answers_the_same_and_goes_back_to_the_bit(how):
    layer = nn.MultiheadAttention(8, 2, **how).eval()
    states = layer.state_dict()
    ours = private_layers(copy.deepcopy(layer))
    assert isinstance(ours, Attention)
    query = torch.randn(3, 3, 8)
    key, value = torch.randn(3, 3, layer.kdim), torch.randn(3, 3, layer.vdim)
    padding = torch.tensor([[False, False, True], [False] * 3, [False, True, True]])
    later = torch.ones(3, 3, dtype=torch.bool).triu(1)
    for more in (
        {},
        {"need_weights": False},
        {"key_padding_mask": padding},
        {"attn_mask": later},
        {"attn_mask": torch.randn(3, 3), "average_attn_weights": False},
        {"attn_mask": torch.randn(6, 3, 3)},
    ):
        same(ours(query, key, value, **more), layer(query, key, value, **more))
    causal = ours(query, key, value, is_causal=True)
    same(causal, layer(query, key, value, attn_mask=later, is_causal=True))
    back = plain_layers(ours)
    assert list(back.state_dict()) == list(states)
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, states[name])


@pytest.mark.parametrize("training", [True, False])
def test_a_transformer_encoder_answers_the_same_in_both_modes(training):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(training)
    inputs, padding = torch.randn(3, 4, 8), torch.zeros(3, 4, dtype=torch.bool)
    padding[1, 2:] = True
    wanted = encoder(inputs, src_key_padding_mask=padding)
    ours = private_layers(copy.deepcopy(encoder))
    assert not any(isinstance(m, nn.MultiheadAttention) for m in ours.modules())
    with torch.set_grad_enabled(training):
        same(ours(inputs, src_key_padding_mask=padding), wanted)
    same(plain_layers(ours)(inputs, src_key_padding_mask=padding), wanted)


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d(6), (3, 6)),
        (nn.BatchNorm1d(32), (3, 32, 4)),
        (nn.BatchNorm2d(64, affine=False), (3, 64, 2, 2)),
        (nn.BatchNorm3d(5, eps=0.1), (3, 5, 2, 2, 2)),
    ],
)
def test_batch_normalisation_becomes_group_normalisation_that_answers_by_record(norm, shape):
    (ours,) = private_layers(nn.Sequential(norm))
    assert type(ours) is nn.GroupNorm
    assert ours.num_channels // ours.num_groups >= min(4, norm.num_features)
    assert (ours.affine, ours.eps) == (norm.affine, norm.eps)
    inputs = torch.randn(shape)
    assert ours(inputs).std() > 0.5, "a group of one number would always be zero"
    torch.testing.assert_close(ours(inputs)[:1], ours(inputs[:1]))


def test_instance_normalisation_keeps_no_statistics():
    (ours,) = private_layers(
        nn.Sequential(nn.InstanceNorm2d(3, affine=True, track_running_stats=True))
    )
    assert not list(ours.buffers())
    assert ours.affine


def test_a_layer_in_two_places_stays_one_and_a_frozen_one_frozen():
    recurrent = nn.GRU(4, 4)
    frozen = nn.LSTM(4, 4).requires_grad_(False)
    model = private_layers(nn.ModuleList([recurrent, recurrent, frozen, nn.Linear(2, 2)]))
    assert model[0] is model[1]
    assert not any(p.requires_grad for p in model[2].parameters())
    back = plain_layers(model)
    assert back[0] is back[1]
    assert not any(p.requires_grad for p in back[2].parameters())
    assert isinstance(model[0], Recurrent), "the trained model is left as it is"


def test_a_model_without_such_layers_is_returned_itself():
    model = nn.Sequential(nn.Linear(2, 2), nn.GroupNorm(1, 2))
    assert plain_layers(model) is model
    assert private_layers(model) is model


@pytest.mark.parametrize(
    "layer",
    [
        nn.LSTM(3, 4, proj_size=2),
        nn.MultiheadAttention(4, 2, add_bias_kv=True),
        nn.MultiheadAttention(4, 2, add_zero_attn=True),
    ],
)
def test_what_has_no_form_for_dp_is_refused(layer):
    with pytest.raises(ValueError, match="no form"):
        private_layers(nn.Sequential(layer))


def test_what_has_no_batch_is_refused():
    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 3), torch.randn(2, 3)])
    for inputs in (packed, torch.randn(3, 3)):
        with pytest.raises(ValueError, match="batch"):
            private_layers(nn.LSTM(3, 4))(inputs)
    with pytest.raises(ValueError, match="batch"):
        private_layers(nn.MultiheadAttention(4, 2))(*[torch.randn(3, 4)] * 3)


@pytest.mark.parametrize(
    ("opacus", "kind"),
    [
        (DPRNN(3, 4, batch_first=True, nonlinearity="relu"), nn.RNN),
        (DPGRU(3, 4, num_layers=2), nn.GRU),
        (DPLSTM(3, 4, bidirectional=True, batch_first=True), nn.LSTM),
    ],
)
def test_opacus_recurrent_layers_become_torch_s(opacus, kind):
    model = nn.ModuleDict({"layer": opacus}).eval()
    back = plain_layers(model)["layer"]
    assert type(back) is kind
    inputs = torch.randn(4, 5, 3)
    same(back(inputs)[0], opacus(inputs)[0])


@pytest.mark.parametrize(
    ("heads", "how"),
    [
        (2, {}),
        (2, {"kdim": 3, "vdim": 5}),
        (4, {"bias": False}),
        (1, {"batch_first": True}),
    ],
)
def test_opacus_attention_becomes_torch_s(heads, how):
    opacus = DPMultiheadAttention(8, heads, **how).eval()
    back = plain_layers(nn.ModuleDict({"layer": opacus}))["layer"].eval()
    assert type(back) is nn.MultiheadAttention
    query = torch.randn(3, 4, 8)
    key, value = torch.randn(3, 4, opacus.kdim), torch.randn(3, 4, opacus.vdim)
    same(back(query, key, value)[0], opacus(query, key, value)[0])


@pytest.mark.parametrize("how", [{"add_zero_attn": True}, {"batch_first": True}])
def test_opacus_attention_that_answers_otherwise_than_torch_s_is_not_exported(how):
    with pytest.raises(TaskError) as caught:
        plain_layers(nn.Sequential(DPMultiheadAttention(8, 2, **how)))
    assert caught.value.code == "LF3201"


def test_the_weights_are_a_copy():
    layer = nn.GRU(2, 2)
    before = layer.weight_ih_l0.detach().numpy().copy()
    ours = private_layers(nn.Sequential(layer))
    with torch.no_grad():
        ours[0].given[0].weight.add_(1)
    assert np.array_equal(layer.weight_ih_l0.detach().numpy(), before)
