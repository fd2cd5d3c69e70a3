"""With shared noise a site sends its step, to the last digit, by every engine."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from lepton_fed.clients.site import Site
from lepton_fed.config.agreement import Agreement
from lepton_fed.config.schema import Privacy, RecordPrivacy, SecureAggregation, StrategyConf
from lepton_fed.core.exchange import MODEL, Ask
from lepton_fed.core.task import Column, DataContract, ModelSpec, Target, Task, TrainingSpec
from lepton_fed.data.dataset import Dataset
from lepton_fed.privacy.dp.engines.base import EngineName
from lepton_fed.privacy.dp.shared import noise_to_agree_on
from lepton_fed.strategies.base import DELTA, PlainSite
from lepton_fed.training.kit import build_kit

ENGINES: tuple[EngineName, ...] = ("hooks", "ghost", "bookkeeping")
RATE, CLIP, BATCH, ROWS = 0.2, 0.5, 8, 40
TASK = Task(
    data=DataContract(columns=[Column("a"), Column("b")], target=Target(classes=["no", "yes"])),
    model=ModelSpec("linear"),
    training=TrainingSpec(
        batch_size=BATCH, learning_rate=RATE, epochs=None, steps=1, momentum=0.0
    ),
)  # fmt: skip


def rows() -> Dataset:
    draws = np.random.default_rng(1)
    inputs = draws.normal(size=(ROWS, 2)).astype(np.float32)
    return Dataset(inputs, (inputs @ np.array([1.0, -2.0]) > 0).astype(np.int64))


@contextmanager
def a_site(
    engine: EngineName, folder: Path, data: Dataset | None = None
) -> Iterator[tuple[Site, Agreement]]:
    record = RecordPrivacy(True, 3.0, 1e-5, CLIP)
    record = replace(record, noise="shared", sampling_rate=1.0, honest=3, engine=engine)
    privacy = Privacy(record, secure_aggregation=SecureAggregation(enabled=True))
    kit = build_kit(TASK, 5)
    agreement = Agreement(
        "run", TASK, StrategyConf(), 1, 5, privacy, 4, noise_to_agree_on(privacy, 1)
    )  # fmt: skip
    data = data or rows()
    site = Site(
        "north", kit, PlainSite(), data, data.take(np.arange(0)), agreement,
        devices=[torch.device("cpu")], folder=folder,
    )  # fmt: skip
    yield site, agreement
    site.close()


def sent(
    engine: EngineName, folder: Path, moved: float
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return the model that was asked with, all biases moved, and what the site sends."""
    kit = build_kit(TASK, 5)
    model = kit.initial.copy()
    for name, view in kit.layout.views(model).items():
        if name.endswith("bias"):
            view += np.float32(moved)  # of all classes alike: the gradient is the same
    with a_site(engine, folder) as (site, agreement):
        ask = Ask(agreement.digest, kit.layout.digest, 1, True, False, {MODEL: model})
        reply = site.answer(ask)
    assert reply.update is not None, reply.refusal
    return model, reply.update.vectors[DELTA]


def by_hand() -> npt.NDArray[np.float64]:
    """Return the step at the first weights: each record's gradient clipped, none noised."""
    kit, data = build_kit(TASK, 5), rows()
    prepared = kit.prepare(data, torch.device("cpu"))
    total = np.zeros(kit.layout.size)
    for inputs, target in zip(prepared.inputs, prepared.targets, strict=True):
        kit.model.zero_grad()
        torch.nn.functional.cross_entropy(kit.model(inputs[None]), target[None]).backward()
        gradient = kit.layout.gather(
            {n: p.grad.numpy() for n, p in kit.model.named_parameters() if p.grad is not None}
        ).astype(np.float64)
        total += gradient * min(1.0, CLIP / float(np.linalg.norm(gradient)))
    return -RATE / BATCH * total


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_sent_is_the_clipped_step_without_noise(engine: EngineName, tmp_path: Path) -> None:
    _, delta = sent(engine, tmp_path, 0.0)
    np.testing.assert_allclose(delta, by_hand(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("engine", ENGINES)
def test_large_weights_do_not_round_what_is_sent(engine: EngineName, tmp_path: Path) -> None:
    model, delta = sent(engine, tmp_path, 2.0**12)
    digit = float(np.spacing(np.abs(model).max()))
    assert digit > RATE / BATCH * 1e-2  # a record's share could turn a difference's last digit
    biases = np.abs(model) > 1000
    assert (np.abs(delta[biases] / digit % 1.0 - 0.5) < 0.4999).all()  # no multiples of it
    np.testing.assert_allclose(delta, by_hand(), atol=digit / 4)


@pytest.mark.parametrize("engine", ["hooks", "bookkeeping"])
def test_a_record_moves_what_many_records_send_no_further_than_its_clip(
    engine: EngineName, tmp_path: Path
) -> None:
    """In float32 what they send is rounded by more than a thousandth of that."""
    kit, moves = build_kit(TASK, 5), RATE / BATCH * CLIP
    sent = []
    for count in range(20_000, 20_005):
        inputs = np.tile(np.array([[0.7, -1.1]], np.float32), (count, 1))
        data = Dataset(inputs, np.zeros(count, np.int64))
        with a_site(engine, tmp_path / f"{count}", data) as (site, agreement):
            ask = Ask(agreement.digest, kit.layout.digest, 1, True, False, {MODEL: kit.initial})
            reply = site.answer(ask)
        assert reply.update is not None, reply.refusal
        sent.append(reply.update.vectors[DELTA])
    for fewer, more in itertools.pairwise(sent):
        assert float(np.linalg.norm(more - fewer)) == pytest.approx(moves, rel=1e-5)
        assert float(np.linalg.norm(more - fewer)) <= moves * (1 + 1e-5)
