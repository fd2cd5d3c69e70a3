"""Recurrent and attention models: trained with record-level DP, and exported as torch's own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from opacus.layers import DPGRU
from torch import nn

from lepton_fed.config import plugins
from lepton_fed.config.schema import RecordPrivacy
from lepton_fed.core.task import Column, DataContract, ModelSpec, Target, Task, TrainingSpec
from lepton_fed.data.dataset import Dataset
from lepton_fed.data.drawn import drawn_inputs
from lepton_fed.errors import DataError, TaskError
from lepton_fed.export.inference import Session
from lepton_fed.export.onnx import export_onnx, reference_outputs
from lepton_fed.models.build import read_vector
from lepton_fed.privacy.dp.entropy import Entropy
from lepton_fed.privacy.dp.sampling import PoissonSampler
from lepton_fed.strategies.base import PlainSite
from lepton_fed.training.kit import build_kit
from lepton_fed.training.local import LocalRows, Moment, PrivateTraining, train
from lepton_fed.training.noise import check_trainable

CPU = torch.device("cpu")
WORDS, LENGTH = 12, 6
TASK = Task(
    data=DataContract(
        columns=[
            Column(f"word {n}", mean=6.0, std=3.0, minimum=0.0, maximum=WORDS - 1.0)
            for n in range(LENGTH)
        ],
        target=Target(classes=["no", "yes"]),
    ),
    model=ModelSpec("mlp", fix=True),
    training=TrainingSpec(epochs=1, batch_size=16, learning_rate=0.5),
)


class Reader(nn.Module):
    """Reads words one after the other."""

    def __init__(self, kind):
        super().__init__()
        self.words = nn.Embedding(WORDS, 5)
        self.reading = kind(5, 7, batch_first=True)
        self.head = nn.Linear(7, 2)

    def forward(self, codes):
        return self.head(self.reading(self.words(codes.long()))[0][:, -1])


class Encoder(nn.Module):
    """A small Transformer over words and their places."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, 8), nn.Embedding(LENGTH, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(8, 2)

    def forward(self, codes):
        places = torch.arange(LENGTH).expand(codes.shape)
        return self.head(self.encoder(self.words(codes.long()) + self.places(places)).mean(1))


class Normalised(nn.Module):
    """Normalises by the batch."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)

    def forward(self, codes):
        return self.head(torch.relu(self.norm(self.first(codes))))


MODELS = {
    "rnn": lambda: Reader(nn.RNN),
    "lstm": lambda: Reader(nn.LSTM),
    "gru": lambda: Reader(nn.GRU),
    "opacus": lambda: Reader(DPGRU),
    "transformer": Encoder,
    "batchnorm": Normalised,
}


def installed(monkeypatch, model, fix=True):
    monkeypatch.setattr(plugins, "call", lambda *given, **named: MODELS[model]())
    return build_kit(replace(TASK, model=replace(TASK.model, fix=fix)), seed=1)


@pytest.mark.parametrize("engine", ["hooks", "bookkeeping"])
@pytest.mark.parametrize("model", MODELS)
def test_a_fixed_model_trains_under_dp_and_is_exported_without_a_trace(monkeypatch, model, engine):
    kit = installed(monkeypatch, model)
    check_trainable(kit, RecordPrivacy(enabled=True, engine=engine), devices=1)
    codes = torch.from_numpy(drawn_inputs(TASK.data, 48, seed=3)).round()
    rows = LocalRows(codes, (codes[:, -1] > 6).long())
    private = PrivateTraining(
        1.0, 0.01, Entropy(bytes(32)), PoissonSampler(48, 16), engine=engine, most_records=7
    )
    before = read_vector(kit.model, kit.layout)
    train(
        kit.model, kit.layout, rows, kit.task, PlainSite(), None, Moment(1, 1, 1, "north"),
        devices=[CPU], private=private,
    )  # fmt: skip
    vector = read_vector(kit.model, kit.layout)
    assert np.isfinite(vector).all()
    assert not np.array_equal(before, vector)
    exported = kit.predictor(vector)
    kinds = {type(module) for module in exported.modules()}
    assert all(
        kind.__module__.startswith(("torch.", "lepton_fed.data.")) or kind in (Reader, Encoder)
        or kind is Normalised
        for kind in kinds
    ), kinds  # fmt: skip
    inputs = codes.numpy()[:5]
    with torch.no_grad():
        wanted = kit.model.eval()(kit.preprocessing(codes[:5])).numpy()
    np.testing.assert_allclose(
        reference_outputs(exported, kit.task, inputs), wanted, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("model", ["gru", "lstm", "transformer"])
def test_the_onnx_file_answers_as_the_trained_model_does(monkeypatch, model):
    kit = installed(monkeypatch, model)
    codes = torch.from_numpy(drawn_inputs(TASK.data, 9, seed=3)).round()
    exported = kit.predictor(kit.initial)
    file = export_onnx(exported, kit.task, codes.numpy())
    with torch.no_grad():
        wanted = kit.model.eval()(codes).numpy()
    for count in (1, 9):
        found = Session(file).run("inputs", codes.numpy()[:count])
        np.testing.assert_allclose(found, wanted[:count], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "what", "instead"),
    [
        ("lstm", "reading (LSTM)", "linear layers"),
        ("transformer", "encoder.layers.0.self_attn (MultiheadAttention)", "linear layers"),
        ("batchnorm", "norm (BatchNorm1d)", "GroupNorm"),
    ],
)
def test_without_fix_it_is_said_which_layer_is_wrong_and_what_to_use(
    monkeypatch, model, what, instead
):
    kit = installed(monkeypatch, model, fix=False)
    with pytest.raises(TaskError) as caught:
        check_trainable(kit, RecordPrivacy(enabled=True), devices=1)
    (problem,) = caught.value.problems
    assert problem.code == "LF3302"
    assert what in problem.what
    assert instead in problem.remedy
    assert "task.model.fix: true" in problem.remedy


def test_fixing_is_part_of_the_task_so_every_party_has_the_same_layout(monkeypatch):
    fixed, usual = installed(monkeypatch, "gru"), installed(monkeypatch, "gru", fix=False)
    assert fixed.task.digest != usual.task.digest
    assert fixed.layout.digest == installed(monkeypatch, "gru").layout.digest
    assert fixed.layout.digest != usual.layout.digest
    assert np.array_equal(np.sort(fixed.initial), np.sort(usual.initial)), "the same first weights"


def test_rows_that_are_not_finite_after_preprocessing_are_refused_by_count(monkeypatch):
    kit = installed(monkeypatch, "gru")
    inputs = drawn_inputs(TASK.data, 5, seed=1)
    inputs[1, 2], inputs[3, 0] = np.nan, np.inf
    with pytest.raises(DataError) as caught:
        kit.prepare(Dataset(inputs, np.zeros(5, np.int64)), CPU)
    (problem,) = caught.value.problems
    assert problem.code == "LF2040"
    assert "2 of 5 rows" in problem.what
