"""Noise that sites share: what a sum of shares is, and what refuses to start."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as pld

from lepton_fed.config.agreement import Agreement
from lepton_fed.config.schema import Privacy, RecordPrivacy, SecureAggregation, StrategyConf
from lepton_fed.core.task import Aggregation, ModelSpec, Schedule, Task, TrainingSpec
from lepton_fed.errors import Refused, TaskError
from lepton_fed.privacy.dp.accounting import epsilon_of
from lepton_fed.privacy.dp.discrete_gaussian import discrete_gaussian
from lepton_fed.privacy.dp.entropy import Entropy
from lepton_fed.privacy.dp.shared import (
    LEAST_SHARE,
    honest_of,
    noise_to_agree_on,
    shared_noise,
)
from lepton_fed.privacy.masked_plan import Shape, masked_layout
from lepton_fed.strategies.base import DELTA

SIZE = 2000
SHAPE = Shape("1" * 64, (DELTA,), SIZE, 0)
RECORD = RecordPrivacy(
    enabled=True, epsilon=3.0, clip=0.5, noise="shared", sampling_rate=0.25, honest=7
)
TRAINING = TrainingSpec(epochs=None, steps=1, batch_size=36, learning_rate=2.0)
TASK = Task(training=TRAINING, aggregation=Aggregation(norm_bound=4.0))


def agreed(
    task: Task = TASK, record: RecordPrivacy = RECORD, *, cohort: int = 10, **secure: Any
) -> Agreement:
    privacy = Privacy(record, [], SecureAggregation(**{"enabled": True, **secure}))
    noise = noise_to_agree_on(privacy, 40)
    return Agreement("run", task, StrategyConf(), 40, 1, privacy, cohort, noise)


def test_the_agreed_noise_costs_the_target_and_no_more():
    agreement = agreed()
    noise = shared_noise(agreement, SIZE)
    assert noise is not None
    cost = epsilon_of([replace(noise.event, steps=40)], RECORD.delta)
    assert 0.99 * RECORD.epsilon < cost <= RECORD.epsilon
    assert noise.event.sampling_rate == 0.25
    assert noise.event.steps == 1


def test_the_shares_of_the_honest_make_up_the_whole_noise():
    """In the opened sum, against the clipped gradients alone, and over the coordinates."""
    agreement = agreed()
    noise = shared_noise(agreement, SIZE)
    assert noise is not None
    layout = masked_layout(agreement, SHAPE, train=True, evaluate=False)
    grid = layout.encoding.grid
    entropy = Entropy(bytes(range(32)))
    draws = np.random.default_rng(0)
    total = np.zeros(layout.words, dtype=np.uint32)
    exact = np.zeros(SIZE)
    for _ in range(7):
        update = draws.normal(size=SIZE) * 0.01
        exact += update
        std = noise.share_std(grid)
        words, _ = layout.encode(
            {DELTA: update}, 1.0, noise=lambda n, std=std: discrete_gaussian(std, n, entropy)
        )
        total += words
    opened = layout.open(total)
    assert opened.replies == 7
    assert opened.saturated == 0
    errors = layout.encoding.decode(opened.vectors[DELTA].astype(np.uint64)) - exact
    # What one record moves, and no less than it: the gradient's norm, over the public divisor.
    moves = 2.0 * RECORD.clip / 36
    wanted = noise.noise_multiplier * moves
    assert wanted <= noise.share_std(grid) * grid * math.sqrt(7) < 1.001 * wanted
    assert errors.std() == pytest.approx(wanted, rel=4 / math.sqrt(2 * SIZE))
    assert abs(errors.mean()) < 4 * wanted / math.sqrt(SIZE)


@pytest.mark.parametrize("bits", [24, 32])
def test_one_record_moves_the_rounded_sum_by_no_more_than_is_accounted_for(bits: int):
    agreement = agreed(bits=bits)
    noise = shared_noise(agreement, SIZE)
    assert noise is not None
    layout = masked_layout(agreement, SHAPE, train=True, evaluate=False)
    grid, draws = layout.encoding.grid, np.random.default_rng(0)
    most = noise.share_std(grid) * math.sqrt(noise.honest) / noise.noise_multiplier
    largest = 0.0
    for _ in range(20):
        others, record = draws.normal(size=SIZE) * 0.01, draws.normal(size=SIZE)
        record *= noise.moves / np.linalg.norm(record)
        with_it, without = (
            layout.encode({DELTA: update}, 1.0)[0][:SIZE].astype(np.int64)
            for update in (others + record, others)
        )
        apart = (with_it - without + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)
        largest = max(largest, float(np.linalg.norm(apart)))
    assert noise.moves / grid < largest <= most  # rounding did lengthen it


def test_the_ring_has_room_for_the_noise_of_all():
    agreement = agreed()
    noise = shared_noise(agreement, SIZE)
    assert noise is not None
    encoding = masked_layout(agreement, SHAPE, train=True, evaluate=False).encoding
    most = 10 * TASK.aggregation.norm_bound / encoding.grid
    most += 10 * noise.share_std(encoding.grid) * math.sqrt(10)
    assert most < 2.0 ** (encoding.bits - 1)
    plain = replace(agreement, privacy=replace(agreement.privacy, record=RecordPrivacy()))
    without = masked_layout(plain, SHAPE, train=True, evaluate=False).encoding
    assert encoding.grid in (without.grid, 2 * without.grid)


@pytest.mark.parametrize(("bits", "lost"), [(24, 0.1), (32, 3e-4), (64, 1e-9)])
def test_a_coarse_ring_costs_noise(bits: int, lost: float):
    layout = masked_layout(agreed(bits=bits), SHAPE, train=True, evaluate=False)
    noise = shared_noise(agreed(bits=bits), SIZE)
    assert noise is not None
    grid = layout.encoding.grid
    whole = noise.share_std(grid) * grid * math.sqrt(noise.honest)
    assert 1 < whole / (noise.noise_multiplier * noise.moves) < 1 + lost
    assert noise.share_std(layout.encoding.grid) >= LEAST_SHARE


def test_a_ring_that_is_too_coarse_refuses():
    with pytest.raises(TaskError) as refused:
        masked_layout(agreed(bits=16), SHAPE, train=True, evaluate=False)
    assert refused.value.code == "LF3401"


def test_at_the_coarsest_grid_the_discrete_noise_costs_what_the_continuous_does():
    """One coordinate that a record moves by all it may: of the discrete noise the worst case."""
    sensitivity, noise = 20, 5.0
    discrete = pld.from_discrete_gaussian_mechanism(
        LEAST_SHARE, sensitivity=sensitivity, value_discretization_interval=1e-4
    )
    continuous = pld.from_gaussian_mechanism(noise, value_discretization_interval=1e-4)
    for times in (1, 50):
        one = discrete.self_compose(times).get_epsilon_for_delta(1e-5)
        other = continuous.self_compose(times).get_epsilon_for_delta(1e-5)
        assert one == pytest.approx(other, rel=2e-3)


def test_sites_that_must_stay_are_counted_on_when_nothing_is_said():
    silent = replace(RECORD, honest=0)
    assert honest_of(agreed(record=silent)) == 7
    assert honest_of(agreed(record=silent, threshold=0.9)) == 9
    assert honest_of(agreed(record=silent, cohort=4)) == 3


@pytest.mark.parametrize(
    ("task", "record", "secure"),
    [
        (TASK, RECORD, {"enabled": False}),
        (TASK, RECORD, {"groups": 2}),
        (TASK, replace(RECORD, honest=11), {}),
        (replace(TASK, training=replace(TRAINING, steps=2)), RECORD, {}),
        (replace(TASK, training=replace(TRAINING, steps=None, epochs=1)), RECORD, {}),
        (replace(TASK, training=replace(TRAINING, momentum=0.5)), RECORD, {}),
        (replace(TASK, training=replace(TRAINING, weight_decay=0.1)), RECORD, {}),
        (replace(TASK, training=replace(TRAINING, optimiser="adam")), RECORD, {}),
        (replace(TASK, training=replace(TRAINING, schedule=Schedule("linear"))), RECORD, {}),
        (replace(TASK, model=ModelSpec(local=["*bias"])), RECORD, {}),
        *(
            (replace(TASK, aggregation=replace(TASK.aggregation, weight_bound=bound)), RECORD, {})
            for bound in (0.5, 1.0000001, 4.0, math.nan)
        ),
        # Weights that become infinite, or a step that vanishes, tell of a record without noise.
        (replace(TASK, training=replace(TRAINING, learning_rate=3e38)), RECORD, {}),
        (replace(TASK, training=replace(TRAINING, learning_rate=1e-40)), RECORD, {}),
    ],
)
def test_a_site_refuses_what_a_share_does_not_cover(
    task: Task, record: RecordPrivacy, secure: dict[str, Any]
):
    with pytest.raises(Refused) as refused:
        shared_noise(agreed(task, record, **secure), SIZE)
    assert refused.value.code == "LF4620"


@pytest.mark.parametrize("noise", [0.0, -1.0, math.nan, math.inf, 1e-6, 0.9])
def test_a_site_refuses_noise_that_costs_more_than_is_said(noise: float):
    agreement = replace(agreed(), noise_multiplier=noise)
    with pytest.raises(Refused) as refused:
        shared_noise(agreement, SIZE)
    assert refused.value.code == "LF4620"


def test_of_a_run_in_which_nothing_is_shared_nothing_is_planned():
    for record in (RecordPrivacy(), replace(RECORD, noise="site"), replace(RECORD, enabled=False)):
        agreement = agreed(record=record)
        assert agreement.noise_multiplier == 0
        assert shared_noise(agreement, SIZE) is None
