"""The check of rows against the contract."""

import numpy as np
import pytest

from lepton_fed.core.task import Column, DataContract, Target
from lepton_fed.data.contract import check
from lepton_fed.data.dataset import Dataset
from lepton_fed.errors import DataError

TABLE = DataContract(
    columns=[
        Column("age", minimum=0, maximum=120),
        Column("weight", fill=70.0),
        Column("ward", kind="category", values=["north", "south"]),
    ],
    target=Target(classes=["well", "ill"]),
)
IMAGE = DataContract("image", [1, 2, 2], target=Target(classes=["a", "b"]))
NUMBER = DataContract(
    columns=[Column("age")], target=Target("number", "price", minimum=0, maximum=10)
)


def table(rows=5):
    inputs = np.tile(np.array([30, 80, 1], np.float32), (rows, 1))
    return Dataset(inputs, np.zeros(rows, np.int64))


def problems_of(dataset, contract, **further):
    with pytest.raises(DataError) as caught:
        check(dataset, contract, where="a.npz", **further)
    return caught.value.problems


def test_rows_that_fit_pass():
    check(table(), TABLE, where="a.npz")
    check(Dataset(table().inputs, np.empty(0, np.int64)), TABLE, where="", with_target=False)
    check(Dataset(np.zeros((2, 1, 2, 2), np.float32), np.array([0, 1])), IMAGE, where="")


def test_a_missing_number_passes_where_the_contract_has_a_fill():
    dataset = table()
    dataset.inputs[2, 1] = np.nan
    check(dataset, TABLE, where="a.npz")


def test_all_that_is_wrong_is_said_at_once_with_row_and_column():
    dataset = table()
    dataset.inputs[1, 0] = np.nan
    dataset.inputs[2, 0] = -1
    dataset.inputs[4, 0] = 121
    dataset.inputs[3, 1] = -np.inf
    dataset.inputs[0, 2] = 2
    dataset.inputs[3, 2] = 0.5
    dataset.inputs[4, 2] = np.nan
    dataset.targets[4] = 2
    found = {(p.code, p.where): p.what for p in problems_of(dataset, TABLE)}
    assert set(found) == {
        ("LF2033", 'a.npz row 2 column "age"'),
        ("LF2036", 'a.npz row 3 column "age"'),
        ("LF2035", 'a.npz row 4 column "weight"'),
        ("LF2037", 'a.npz row 1 column "ward"'),
        ("LF2038", 'a.npz row 5 column "label"'),
    }
    outside = found["LF2036", 'a.npz row 3 column "age"']
    assert outside == "-1.0 is outside the contract's bounds, 0.0 to 120.0 (also at row 5)"
    assert "(also at row 4, row 5)" in found["LF2037", 'a.npz row 1 column "ward"']


def test_rows_of_a_text_file_are_named_by_their_lines():
    dataset = table()
    dataset.inputs[3, 0] = 500
    (problem,) = problems_of(dataset, TABLE, lines=[2, 3, 4, 9, 10])
    assert problem.where == 'a.npz line 9 column "age"'


def test_a_bound_admits_the_number_that_it_names():
    # Neither is a float32: the nearest one lies above 0.1, and below 0.7.
    columns = [Column("x", maximum=0.1), Column("y", minimum=0.7)]
    contract = DataContract(columns=columns, target=Target("number"))
    dataset = Dataset(np.array([[0.1, 0.7]], np.float32), np.zeros(1, np.float32))
    check(dataset, contract, where="")


@pytest.mark.parametrize(
    ("target", "code"),
    [(np.nan, "LF2039"), (np.inf, "LF2039"), (-0.5, "LF2036"), (10.5, "LF2036")],
)
def test_a_wrong_target_number_is_named(target, code):
    dataset = Dataset(np.ones((2, 1), np.float32), np.array([1, target], np.float32))
    (problem,) = problems_of(dataset, NUMBER)
    assert (problem.code, problem.where) == (code, 'a.npz row 2 column "price"')


@pytest.mark.parametrize("code", [-1, 2])
def test_a_class_code_outside_the_classes_is_named(code):
    dataset = Dataset(table().inputs, np.array([0, 1, 0, code, 0]))
    (problem,) = problems_of(dataset, TABLE)
    assert problem.what.startswith(f"{code} is not the code of a class")
    assert problem.remedy == "codes go from 0 to 1, in the order of `classes`"


@pytest.mark.parametrize(("value", "code"), [(np.nan, "LF2034"), (np.inf, "LF2035")])
def test_a_broken_pixel_is_named_by_row_and_place(value, code):
    images = np.zeros((3, 1, 2, 2), np.float32)
    images[2, 0, 1, 0] = value
    (problem,) = problems_of(Dataset(images, np.zeros(3, np.int64)), IMAGE)
    assert (problem.code, problem.where) == (code, "a.npz row 3")
    assert "pixel at [0, 1, 0]" in problem.what


def test_a_broken_pixel_is_found_beyond_the_first_block(monkeypatch):
    monkeypatch.setattr("lepton_fed.data.contract._BLOCK_ELEMENTS", 8)
    images = np.zeros((5, 1, 2, 2), np.float32)
    images[4, 0, 0, 1] = np.nan
    images[2, 0, 0, 1] = np.nan
    (problem,) = problems_of(Dataset(images, np.zeros(5, np.int64)), IMAGE)
    assert problem.where == "a.npz row 3"
    assert "also at row 5" in problem.what


def test_wrong_shapes_and_types_are_said_together():
    dataset = Dataset(np.zeros((2, 4)), np.zeros((3, 1), np.int32))
    assert {p.code for p in problems_of(dataset, TABLE)} == {"LF2030", "LF2031", "LF2032"}


@pytest.mark.parametrize(
    ("dataset", "with_target", "code"),
    [
        (table(0), True, "LF2013"),
        (Dataset(table().inputs, np.zeros(4, np.int64)), True, "LF2032"),
        (Dataset(table().inputs, np.zeros(0, np.int64)), True, "LF2032"),
        (table(), False, "LF2032"),
        (Dataset(table().inputs, np.zeros(5, np.float32)), True, "LF2031"),
        (Dataset([[1.0]], np.zeros(1, np.int64)), True, "LF2032"),
    ],
)
def test_what_a_reader_hands_out_must_have_the_right_form(dataset, with_target, code):
    assert problems_of(dataset, TABLE, with_target=with_target)[0].code == code


def test_many_bad_columns_are_capped():
    columns = [Column(f"c{n}") for n in range(30)]
    contract = DataContract(columns=columns, target=Target("number"))
    dataset = Dataset(np.full((2, 30), np.nan, np.float32), np.zeros(2, np.float32))
    problems = problems_of(dataset, contract)
    assert len(problems) == 20
    assert (problems[-1].code, problems[-1].what) == ("LF2099", "and 11 more")
