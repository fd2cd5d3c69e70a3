"""Augmentation: what it does to each image, and what it never does."""

import pytest
import torch

from lepton_fed.core.task import Column, DataContract, Step, Target, Task
from lepton_fed.data.augmentation import build_augmentation
from lepton_fed.errors import TaskError

CLASSES = Target(classes=["a", "b"])
IMAGE = DataContract("image", [2, 4, 6], target=CLASSES)


def build(*steps, contract=IMAGE):
    named = [Step(step, arguments) for step, arguments in steps]
    return build_augmentation(Task(data=contract, augmentation=named))


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


def images(count):
    """Return images in which all pixels differ."""
    return torch.arange(1, count * 48 + 1, dtype=torch.float32).reshape(count, 2, 4, 6)


def problems_of(*steps, contract=IMAGE):
    with pytest.raises(TaskError) as caught:
        build(*steps, contract=contract)
    return caught.value.problems


def test_flip_mirrors_about_its_share_of_the_images_and_leaves_the_others():
    batch = images(4000)
    result = build(("flip", {"probability": 0.3}))(batch, seeded())
    mirrored = (result == batch.flip(-1)).flatten(1).all(dim=1)
    same = (result == batch).flatten(1).all(dim=1)
    assert bool((mirrored ^ same).all())
    assert 0.26 < mirrored.float().mean() < 0.34  # five standard deviations either side


@pytest.mark.parametrize("probability", [0, 1])
def test_flip_can_be_never_or_always(probability):
    batch = images(50)
    result = build(("flip", {"probability": probability}))(batch, seeded())
    assert torch.equal(result, batch.flip(-1) if probability else batch)


def test_flip_is_a_coin_by_default():
    batch = images(4000)
    result = build(("flip", {}))(batch, seeded())
    assert 0.46 < (result[:, 0, 0, 0] != batch[:, 0, 0, 0]).float().mean() < 0.54


def test_crop_is_each_image_moved_on_a_ground_of_zeros():
    padding, batch = 2, images(600)
    result = build(("crop", {"padding": padding}))(batch, seeded())
    assert result.shape == batch.shape
    seen = set()
    for before, after in zip(batch, result, strict=True):
        padded = torch.zeros(2, 8, 10)
        padded[:, 2:6, 2:8] = before
        places = [
            (row, column)
            for row in range(5)
            for column in range(5)
            if torch.equal(padded[:, row : row + 4, column : column + 6], after)
        ]
        assert len(places) == 1
        seen.update(places)
    assert len(seen) == 25


def test_noise_has_the_deviation_asked_for_and_differs_between_images():
    batch = torch.zeros(2000, 2, 4, 6)
    result = build(("noise", {"std": 0.25}))(batch, seeded())
    assert abs(result.mean()) < 0.005
    assert abs(result.std() - 0.25) < 0.005
    assert torch.unique(result[:, 0, 0, 0]).numel() > 1900


ALL = (("flip", {}), ("crop", {"padding": 1}), ("noise", {"std": 0.1}))


def test_the_same_generator_gives_the_same_images_and_another_gives_others():
    augment, batch = build(*ALL), images(20)
    assert torch.equal(augment(batch, seeded()), augment(batch, seeded()))
    assert not torch.equal(augment(batch, seeded()), augment(batch, seeded(2)))


def test_a_generator_that_goes_on_gives_new_images():
    augment, batch, generator = build(*ALL), images(20), seeded()
    assert not torch.equal(augment(batch, generator), augment(batch, generator))


def test_neither_the_batch_nor_the_global_generator_is_touched():
    augment, batch = build(*ALL), images(20)
    state = torch.random.get_rng_state()
    augment(batch, seeded())
    assert torch.equal(batch, images(20))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("count", [0, 1])
def test_batches_without_or_with_one_image_pass(count):
    assert build(*ALL)(images(count), seeded()).shape == (count, 2, 4, 6)


def test_without_steps_the_batch_comes_back():
    batch, generator = images(3), seeded()
    state = generator.get_state()
    assert build()(batch, generator) is batch
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize(
    ("step", "arguments", "code", "key"),
    [
        ("flip", {"probability": 1.5}, "LF3104", "arguments.probability"),
        ("flip", {"p": 0.5}, "LF3102", "arguments.p"),
        ("crop", {}, "LF3103", "arguments.padding"),
        ("crop", {"padding": 0}, "LF3104", "arguments.padding"),
        ("crop", {"padding": 4}, "LF3104", "arguments.padding"),
        ("crop", {"padding": 1.0}, "LF3104", "arguments.padding"),
        ("crop", {"padding": True}, "LF3104", "arguments.padding"),
        ("noise", {"std": -1}, "LF3104", "arguments.std"),
        ("noise", {"std": "a lot"}, "LF3104", "arguments.std"),
        ("flop", {}, "LF3101", "step"),
    ],
)
def test_a_wrong_step_is_named_by_its_key(step, arguments, code, key):
    (problem,) = problems_of(("noise", {"std": 1}), (step, arguments))
    assert (problem.code, problem.key) == (code, f"task.augmentation[1].{key}")


def test_all_wrong_steps_are_said_at_once():
    problems = problems_of(("flop", {}), ("crop", {"pad": 1}))
    assert [problem.code for problem in problems] == ["LF3101", "LF3103", "LF3102"]


def test_tables_cannot_be_augmented():
    contract = DataContract(columns=[Column("age")], target=CLASSES)
    (problem,) = problems_of(("noise", {"std": 1}), contract=contract)
    assert (problem.code, problem.key) == ("LF3109", "task.augmentation")
    assert build(contract=contract)(torch.ones(2, 1), seeded()).shape == (2, 1)
