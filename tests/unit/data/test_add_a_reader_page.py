"""The page on adding a reader: its code is installed and run as a reader of its would do it."""

import json
import re
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from lepton_fed.config.schema import Source
from lepton_fed.core.task import Column, DataContract, Target
from lepton_fed.data.read import read
from lepton_fed.errors import ConfError, DataError

PAGE = Path(__file__).parents[3] / "docs" / "how-to" / "add-a-reader.md"
CONTRACT = DataContract(
    columns=[Column("age"), Column("ward", kind="category", values=["north", "south"])],
    target=Target(name="outcome", classes=["well", "ill"]),
)


def block(language):
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    return found


@pytest.fixture
def source(tmp_path, monkeypatch):
    """Install the page's package and write the file that its conf names."""
    (tmp_path / "json_lines.py").write_text(block("python"))
    declared = tomllib.loads(block("toml"))["project"]["entry-points"]
    info = tmp_path / "json_lines-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: json-lines\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "".join(
            f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
            for group, points in declared.items()
        )
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "json_lines", raising=False)
    monkeypatch.chdir(tmp_path)

    def write(*records):
        lines = [each if isinstance(each, str) else json.dumps(each) for each in records]
        (tmp_path / "patients.jsonl").write_text("\n".join(lines))
        return Source(**yaml.safe_load(block("yaml")))

    yield write
    sys.modules.pop("json_lines", None)


WELL = {"age": 30, "ward": "south", "outcome": "well"}


def test_the_reader_of_the_page_reads(source):
    given = source(WELL, {"age": 4.5, "ward": "north", "outcome": "ill", "name": "ignored"})
    dataset = read(given, CONTRACT)
    np.testing.assert_array_equal(dataset.inputs, np.array([[30, 1], [4.5, 0]], np.float32))
    assert dataset.targets.tolist() == [0, 1]
    assert len(read(given, CONTRACT, with_target=False).targets) == 0


def test_what_it_leaves_to_the_program_is_refused_with_row_and_column(source):
    given = source(WELL, {"age": None, "ward": "east", "outcome": "so-so"})
    with pytest.raises(DataError) as caught:
        read(given, CONTRACT)
    assert [(problem.code, problem.where) for problem in caught.value.problems] == [
        ("LF2033", 'patients.jsonl row 2 column "age"'),
        ("LF2037", 'patients.jsonl row 2 column "ward"'),
        ("LF2038", 'patients.jsonl row 2 column "outcome"'),
    ]


def test_what_only_it_can_see_it_says_itself(source):
    with pytest.raises(DataError) as caught:
        read(source(WELL, "{"), CONTRACT)
    (problem,) = caught.value.problems
    assert (problem.code, problem.where) == ("LF2090", "patients.jsonl line 2")


def test_a_file_that_cannot_be_opened_is_reported_for_it(source):
    given = replace(source(WELL), path="none.jsonl")
    with pytest.raises(DataError) as caught:
        read(given, CONTRACT)
    (problem,) = caught.value.problems
    assert (problem.code, problem.where) == ("LF2001", "none.jsonl")


def test_an_argument_it_does_not_have_is_refused(source):
    given = source(WELL)
    given.arguments["compression"] = "gzip"
    with pytest.raises(ConfError, match="compression"):
        read(given, CONTRACT)
