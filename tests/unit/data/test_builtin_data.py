"""The public data sets that come with scikit-learn."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn import datasets

from lepton_fed.config.schema import Source
from lepton_fed.core.task import Column, Target
from lepton_fed.data import builtin
from lepton_fed.data.builtin import BUILTIN, builtin_contract
from lepton_fed.data.read import read
from lepton_fed.errors import DataError, TaskError

SHAPES = {
    "digits": (1797, 1, 8, 8),
    "breast_cancer": (569, 30),
    "wine": (178, 13),
    "diabetes": (442, 10),
}


def problems_of(name, contract, with_target=True):
    with pytest.raises(DataError) as caught:
        getattr(builtin, name)(contract, "", with_target)
    return caught.value.problems


@pytest.mark.parametrize("name", BUILTIN)
def test_each_set_fits_its_own_contract(name):
    dataset = read(Source(name), builtin_contract(name))
    assert dataset.inputs.shape == SHAPES[name]
    unlabelled = read(Source(name), builtin_contract(name), with_target=False)
    np.testing.assert_array_equal(unlabelled.inputs, dataset.inputs)
    assert len(unlabelled.targets) == 0
    assert unlabelled.targets.dtype == dataset.targets.dtype


def test_digits_are_those_of_scikit_learn():
    bunch = datasets.load_digits()
    dataset = builtin.digits(builtin_contract("digits"), "", True)
    np.testing.assert_array_equal(dataset.inputs[:, 0], bunch.images)
    np.testing.assert_array_equal(dataset.targets, bunch.target)
    assert (dataset.inputs.min(), dataset.inputs.max()) == (0, 16)
    as_bytes = builtin.digits(replace(builtin_contract("digits"), dtype="uint8"), "", True)
    assert as_bytes.inputs.dtype == np.uint8
    np.testing.assert_array_equal(as_bytes.inputs, dataset.inputs)


def test_columns_come_in_the_order_of_the_contract():
    bunch = datasets.load_wine()
    contract = builtin_contract("wine")
    chosen = replace(contract, columns=[Column("proline"), Column("ash")])
    dataset = builtin.wine(chosen, "", True)
    np.testing.assert_array_equal(dataset.inputs, bunch.data[:, [12, 2]].astype(np.float32))


def test_classes_come_in_the_order_of_the_contract():
    bunch = datasets.load_breast_cancer()
    contract = builtin_contract("breast_cancer")
    assert contract.target.classes == ["malignant", "benign"]
    turned = replace(contract, target=replace(contract.target, classes=["benign", "malignant"]))
    np.testing.assert_array_equal(builtin.breast_cancer(turned, "", True).targets, 1 - bunch.target)


def test_the_constants_have_three_digits_and_standardise_the_set():
    contract = builtin_contract("breast_cancer")
    assert (contract.columns[0].name, contract.columns[0].mean) == ("mean radius", 14.1)
    dataset = builtin.breast_cancer(contract, "", True)
    means = np.array([column.mean for column in contract.columns])
    stds = np.array([column.std for column in contract.columns])
    standardised = (dataset.inputs - means) / stds
    assert np.abs(standardised.mean(axis=0)).max() < 0.02
    assert np.abs(standardised.std(axis=0) - 1).max() < 0.01


def test_diabetes_has_a_number_as_target():
    contract = builtin_contract("diabetes")
    dataset = builtin.diabetes(contract, "", True)
    assert contract.target.kind == "number"
    assert dataset.targets.dtype == np.float32
    assert (dataset.targets.min(), dataset.targets.max()) == (25, 346)


def test_there_is_no_contract_for_an_unknown_set():
    with pytest.raises(KeyError):
        builtin_contract("iris")


def test_unknown_columns_and_categories_are_named():
    contract = builtin_contract("wine")
    columns = [Column("alcool"), Column("ash", kind="category", values=["a"]), Column("hue")]
    first, second = problems_of("wine", replace(contract, columns=columns))
    assert (first.code, first.remedy) == ("LF2008", 'did you mean "alcohol"?')
    assert first.where == 'built-in wine column "alcool"'
    assert (second.code, second.where) == ("LF2020", 'built-in wine column "ash"')


@pytest.mark.parametrize(
    ("classes", "what"),
    [
        (["malignant"], 'the contract lacks the class "benign"'),
        (["malignant", "benign", "other"], 'no row is of the class "other"'),
    ],
)
def test_other_classes_are_refused(classes, what):
    contract = replace(builtin_contract("breast_cancer"), target=Target(classes=classes))
    (problem,) = problems_of("breast_cancer", contract)
    assert (problem.code, problem.what) == ("LF2012", what)
    assert problem.remedy == 'the classes are "malignant", "benign"'


def test_another_kind_of_data_or_target_is_refused():
    assert problems_of("wine", builtin_contract("digits"))[0].code == "LF2020"
    assert problems_of("digits", builtin_contract("wine"))[0].code == "LF2020"
    number = replace(builtin_contract("wine"), target=Target("number"))
    assert (
        problems_of("wine", number)[0].what
        == "the target is a class, the contract asks for a number"
    )
    classes = replace(builtin_contract("diabetes"), target=Target(classes=["a", "b"]))
    assert (
        problems_of("diabetes", classes)[0].what
        == "the target is a number, the contract asks for classes"
    )


def test_a_shape_that_digits_do_not_have_is_refused():
    with pytest.raises(DataError) as caught:
        read(Source("digits"), replace(builtin_contract("digits"), shape=[1, 28, 28]))
    assert caught.value.code == "LF2030"


def test_a_path_is_refused_since_it_would_not_be_read():
    with pytest.raises(TaskError) as caught:
        read(Source("digits", path="digits.npz"), builtin_contract("digits"), key="source")
    (problem,) = caught.value.problems
    assert (problem.code, problem.key) == ("LF3104", "source.path")
