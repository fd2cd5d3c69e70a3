"""From a source in the conf to rows."""

import numpy as np
import pytest

from lepton_fed.config import plugins
from lepton_fed.config.schema import Source
from lepton_fed.core.task import Column, DataContract, Target
from lepton_fed.data.dataset import Dataset
from lepton_fed.data.read import read
from lepton_fed.errors import ConfError, DataError, TaskError

CONTRACT = DataContract(columns=[Column("age")], target=Target("number", "price"))


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("age;price\n1;2\n")
    return str(path)


def test_the_readers_arguments_come_from_the_conf(table):
    dataset = read(Source("csv", table, {"delimiter": ";"}), CONTRACT)
    assert (dataset.inputs.tolist(), dataset.targets.tolist()) == ([[1]], [2])


def test_an_unknown_reader_is_a_conf_error(table):
    with pytest.raises(ConfError):
        read(Source("cvs", table), CONTRACT)


@pytest.mark.parametrize("arguments", [{"delimitre": ";"}, {"delimiter": 3}, {"missing": "NA"}])
def test_arguments_that_do_not_fit_have_their_full_key(table, arguments):
    with pytest.raises(ConfError) as caught:
        read(Source("csv", table, arguments), CONTRACT)
    (key,) = arguments
    assert caught.value.problems[0].key == f"sites.source.arguments.{key}"


def test_an_argument_the_reader_refuses_has_its_full_key(table):
    with pytest.raises(TaskError) as caught:
        read(Source("csv", table, {"delimiter": "--"}), CONTRACT, key="source")
    assert caught.value.problems[0].key == "source.arguments.delimiter"


def answer_with(monkeypatch, answer):
    monkeypatch.setattr(plugins, "load", lambda group, name, *, key="": lambda **given: answer)


def test_a_reader_that_returns_something_else_is_named(monkeypatch):
    answer_with(monkeypatch, [[1, 2]])
    with pytest.raises(DataError) as caught:
        read(Source("mine"), CONTRACT)
    (problem,) = caught.value.problems
    assert problem.code == "LF2021"
    assert problem.what == "the reader mine returned a list, not a Dataset"


def test_what_a_foreign_reader_returns_is_checked(monkeypatch):
    answer_with(monkeypatch, Dataset(np.ones((2, 1), np.float32), np.array([1, np.nan], "f4")))
    with pytest.raises(DataError) as caught:
        read(Source("mine"), CONTRACT)
    (problem,) = caught.value.problems
    assert (problem.code, problem.where) == ("LF2039", 'reader mine row 2 column "price"')
