"""Preprocessing steps against plain numpy, and in the exported model."""

import io
import logging
import warnings

import numpy as np
import onnxruntime
import pytest
import torch

from lepton_fed.core.task import Column, DataContract, Step, Target, Task
from lepton_fed.data.preprocessing import build_preprocessing
from lepton_fed.errors import TaskError

TABLE = DataContract(
    columns=[
        Column("age", mean=50, std=10, fill=40.0),
        Column("ward", kind="category", values=["north", "south", "west"]),
        Column("dose", mean=-1, std=0.5),
        Column("sex", kind="category", values=["f", "m"]),
    ],
    target=Target(classes=["a", "b"]),
)
NUMBERS = DataContract(
    columns=[Column("age", mean=50, std=10), Column("dose", mean=1, std=4)],
    target=Target(classes=["a", "b"]),
)
IMAGE = DataContract("image", [3, 4, 5], "uint8", target=Target(classes=["a", "b"]))
ROWS = np.array(
    [[60, 2, 0, 1], [np.nan, 0, -1.5, 0], [-20, 1, 3, 1], [50, 2, -1, 0]], dtype=np.float32
)


def steps(*named):
    return [Step(each) if isinstance(each, str) else Step(*each) for each in named]


def build(contract, *named):
    return build_preprocessing(Task(data=contract, preprocessing=steps(*named)))


def apply(contract, rows, *named):
    module, shape = build(contract, *named)
    result = module(torch.from_numpy(rows)).numpy()
    assert result.dtype == np.float32
    assert result.shape == (len(rows), *shape)
    return result


def problems_of(contract, *named):
    with pytest.raises(TaskError) as caught:
        build(contract, *named)
    return caught.value.problems


def by_numpy(rows, low=-2.0, high=2.5):
    """Impute, standardise, clip and one-hot of TABLE, one row at a time."""
    done = []
    for age, ward, dose, sex in rows.astype(np.float64):
        age = 40.0 if np.isnan(age) else age
        age, dose = (min(max(x, low), high) for x in ((age - 50) / 10, (dose + 1) / 0.5))
        done.append([age, ward == 0, ward == 1, ward == 2, dose, sex == 0, sex == 1])
    return np.array(done, dtype=np.float64)


CHAIN = ("impute", "standardise", ("clip", {"low": -2, "high": 2.5}), "one_hot")


def test_a_table_is_what_plain_numpy_makes_of_it():
    np.testing.assert_allclose(apply(TABLE, ROWS, *CHAIN), by_numpy(ROWS), rtol=1e-6)


def test_steps_change_numbers_only_wherever_they_stand():
    before = apply(TABLE, ROWS, "impute", "standardise", ("scale", {"by": 4}), "one_hot")
    after = apply(TABLE, ROWS, "impute", "one_hot", "standardise", ("scale", {"by": 4}))
    np.testing.assert_array_equal(before, after)
    clipped = apply(TABLE, ROWS, "impute", "one_hot", ("clip", {"low": 5, "high": 6}))
    assert set(np.unique(clipped[:, [1, 2, 3, 5, 6]])) == {0, 1}
    assert set(np.unique(clipped[:, [0, 4]])) == {5, 6}


def test_without_steps_rows_are_only_cast():
    pixels = np.arange(120, dtype=np.uint8).reshape(2, 3, 4, 5)
    np.testing.assert_array_equal(apply(IMAGE, pixels), pixels.astype(np.float32))
    np.testing.assert_array_equal(apply(NUMBERS, ROWS[:1, [0, 2]]), ROWS[:1, [0, 2]])


def test_pixels_are_scaled_normalised_and_clipped():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3, 4, 5), dtype=np.uint8)
    means, stds = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
    result = apply(
        IMAGE,
        pixels,
        ("scale", {"by": 255}),
        ("normalise", {"mean": means, "std": stds}),
        ("clip", {"high": 1}),
    )
    expected = np.empty(pixels.shape)
    for channel in range(3):
        expected[:, channel] = (pixels[:, channel] / 255 - means[channel]) / stds[channel]
    np.testing.assert_allclose(result, np.minimum(expected, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1.0, 1e30, 1e-30])
def test_examples_get_the_norm_of_one_and_zeros_stay(size: float):
    rows = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32) * np.float32(size)
    rows[3] = 0
    result = apply(NUMBERS, rows, "unit_norm")
    norms = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    norms[3] = 1
    np.testing.assert_allclose(result, rows / norms, rtol=1e-5)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5), dtype=np.uint8)
    whole = apply(IMAGE, pixels, "unit_norm").reshape(2, -1)
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, rtol=1e-5)


def test_clip_takes_one_end_alone():
    assert apply(NUMBERS, ROWS[2:, [0, 2]], ("clip", {"low": 0})).tolist() == [[0, 3], [50, 0]]
    assert apply(NUMBERS, ROWS[:1, [0, 2]], ("clip", {"high": 7})).tolist() == [[7, 0]]


def test_a_missing_number_without_a_fill_shows_instead_of_being_made_up():
    rows = ROWS.copy()
    rows[0, 2] = np.nan
    result = apply(TABLE, rows, *CHAIN)
    assert np.isnan(result[0, 4])
    assert np.isfinite(result).sum() == result.size - 1


def test_nothing_is_learnt_and_nothing_is_in_an_update():
    module, _ = build(TABLE, *CHAIN)
    assert not list(module.parameters())
    assert not module.state_dict()
    assert list(module.buffers())


def test_an_empty_batch_passes():
    module, shape = build(TABLE, *CHAIN)
    assert module(torch.empty(0, 4)).shape == (0, *shape)


def test_the_input_is_left_as_it_was():
    rows = torch.from_numpy(ROWS.copy())
    module, _ = build(TABLE, *CHAIN)
    module(rows)
    np.testing.assert_array_equal(rows.numpy(), ROWS)


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # torch.export in torch itself
def test_the_exported_model_computes_the_same_for_any_batch(caplog):
    caplog.set_level(logging.ERROR)
    preprocessing, shape = build(TABLE, *CHAIN)
    torch.manual_seed(0)
    model = torch.nn.Sequential(preprocessing, torch.nn.Linear(*shape, 2)).eval()
    program = torch.onnx.export(
        model,
        (torch.from_numpy(ROWS),),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=["inputs"],
        verbose=False,
    )
    content = io.BytesIO()
    program.save(content)
    session = onnxruntime.InferenceSession(content.getvalue(), providers=["CPUExecutionProvider"])
    for count in (1, 2, 7, 32):
        rows = np.tile(ROWS, (8, 1))[1 : 1 + count]
        assert np.isnan(rows).any()
        (exported,) = session.run(None, {"inputs": rows})
        with torch.no_grad():
            expected = model(torch.from_numpy(rows)).numpy()
        assert np.isfinite(expected).all()
        np.testing.assert_allclose(exported, expected, rtol=1e-5, atol=1e-6)


def test_an_unknown_step_is_named_with_the_nearest():
    (problem,) = problems_of(NUMBERS, "standardise", "standardize")
    assert (problem.code, problem.key) == ("LF3101", "task.preprocessing[1].step")
    assert problem.remedy == 'did you mean "standardise"?'


@pytest.mark.parametrize(
    ("contract", "step", "kind"),
    [(NUMBERS, "normalise", "images"), (IMAGE, "one_hot", "tables"), (IMAGE, "impute", "tables")],
)
def test_a_step_for_other_data_is_refused(contract, step, kind):
    (problem,) = problems_of(contract, step)
    assert (problem.code, problem.key) == ("LF3105", "task.preprocessing[0].step")
    assert f"is for {kind}" in problem.what


@pytest.mark.parametrize(
    ("step", "arguments", "code", "key"),
    [
        ("scale", {}, "LF3103", ".by"),
        ("scale", {"by": None}, "LF3103", ".by"),
        ("scale", {"by": "255"}, "LF3104", ".by"),
        ("scale", {"by": True}, "LF3104", ".by"),
        ("scale", {"by": 0}, "LF3104", ".by"),
        ("scale", {"by": -1.0}, "LF3104", ".by"),
        ("scale", {"by": float("nan")}, "LF3104", ".by"),
        ("scale", {"by": float("inf")}, "LF3104", ".by"),
        ("scale", {"by": 10**400}, "LF3104", ".by"),
        ("scale", {"by": 1e-60}, "LF3104", ".by"),
        ("scale", {"by": 2, "of": 3}, "LF3102", ".of"),
        ("clip", {}, "LF3103", ""),
        ("clip", {"low": 2, "high": 1}, "LF3104", ".low"),
        ("clip", {"low": 1, "high": 1}, "LF3104", ".low"),
        ("clip", {"low": [1]}, "LF3104", ".low"),
        ("normalise", {"std": [1, 1, 1]}, "LF3103", ".mean"),
        ("normalise", {"mean": 0.5, "std": [1, 1, 1]}, "LF3104", ".mean"),
        ("normalise", {"mean": [0, 0], "std": [1, 1, 1]}, "LF3104", ".mean"),
        ("normalise", {"mean": [0, 0, 0], "std": [1, 0, 1]}, "LF3104", ".std"),
    ],
)
def test_a_wrong_argument_is_named_by_its_key(step, arguments, code, key):
    (problem,) = problems_of(IMAGE, (step, arguments))
    assert (problem.code, problem.key) == (code, f"task.preprocessing[0].arguments{key}")


def test_all_wrong_steps_are_said_at_once():
    named = (("scale", {"bye": 2}), "blur", ("normalise", {"mean": 1}), ("clip", {"low": "x"}))
    found = [(p.code, p.key.removeprefix("task.preprocessing")) for p in problems_of(IMAGE, *named)]
    assert found == [
        ("LF3103", "[0].arguments.by"),
        ("LF3102", "[0].arguments.bye"),
        ("LF3101", "[1].step"),
        ("LF3104", "[2].arguments.mean"),
        ("LF3103", "[2].arguments.std"),
        ("LF3104", "[3].arguments.low"),
    ]


def test_a_long_list_of_wrong_steps_is_capped():
    problems = problems_of(IMAGE, *(["blur"] * 30))
    assert (len(problems), problems[-1].code, problems[-1].what) == (20, "LF3149", "and 11 more")


def test_impute_after_another_step_is_refused():
    (problem,) = problems_of(TABLE, "standardise", "impute", "one_hot")
    assert (problem.code, problem.key) == ("LF3106", "task.preprocessing[1].step")
    assert problem.remedy == "make it the first step"


@pytest.mark.parametrize("step", ["standardise", "one_hot"])
def test_a_step_that_cannot_be_done_twice_is_refused(step):
    problems = problems_of(TABLE, "impute", "standardise", "one_hot", step)
    assert [(p.code, p.key) for p in problems] == [("LF3106", "task.preprocessing[3].step")]


def test_categories_and_missing_numbers_need_their_steps():
    category, missing = problems_of(TABLE, "standardise")
    assert (category.code, category.remedy) == ("LF3107", "add the step one_hot")
    assert '"ward"' in category.what
    assert (missing.code, missing.remedy) == ("LF3108", "make impute the first step")
    assert '"age"' in missing.what


def test_steps_without_anything_to_do_are_refused():
    assert [p.code for p in problems_of(NUMBERS, "impute", "one_hot")] == ["LF3108", "LF3107"]


@pytest.mark.parametrize("constants", [{"std": 1e-60}, {"std": 1e60}, {"mean": 1e60}])
def test_constants_that_float32_cannot_hold_are_refused(constants):
    contract = DataContract(columns=[Column("x", **constants)], target=Target("number"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (problem,) = problems_of(contract, "standardise")
    assert (problem.code, problem.key) == ("LF3111", "task.preprocessing[0].arguments")
    assert '"x"' in problem.what
