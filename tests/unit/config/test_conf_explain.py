"""`config explain` and the generated reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lepton_fed.config.explain import all_keys, explain
from lepton_fed.config.load import Loaded, load_conf
from lepton_fed.config.reference import reference_markdown
from lepton_fed.config.render import render
from lepton_fed.config.schema import KINDS, SimulationConf
from lepton_fed.config.templates import template
from lepton_fed.errors import ConfError


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loaded[SimulationConf]:
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text(render(template("simulation"), "simulation"))
    overrides = ["rounds.count=7", "task.model.arguments.hidden=32"]
    return load_conf("x.yaml", overrides, kind=SimulationConf)


def test_a_key_is_explained_with_its_limits_and_default() -> None:
    found = explain("simulation", "privacy.record.epsilon")
    assert found.meaning == "Epsilon that one record may cost over the whole run."
    assert (found.type, found.bounds) == ("a number", "greater than 0, at most 100")
    assert (found.default, found.value, found.origin) == ("8.0", None, "")


def test_choices_are_listed() -> None:
    found = explain("server", "task.training.optimiser")
    assert found.choices == ("sgd", "adam", "adamw")
    assert found.default == "sgd"


def test_the_present_value_has_its_origin(loaded: Loaded[SimulationConf]) -> None:
    text = Path("x.yaml").read_text().splitlines()
    line = next(number for number, row in enumerate(text, 1) if row.startswith("    epsilon:"))
    found = explain("simulation", "privacy.record.epsilon", loaded)
    assert (found.value, found.origin) == ("8.0", f"x.yaml:{line}:14")
    found = explain("simulation", "rounds.count", loaded)
    assert (found.value, found.origin) == ("7", "command line")
    found = explain("simulation", "task.training.schedule.every", loaded)
    assert (found.value, found.origin) == ("10", "default")


def test_the_text_is_one_small_screen(loaded: Loaded[SimulationConf]) -> None:
    assert explain("simulation", "rounds.count", loaded).text() == (
        "rounds.count\n"
        "  Number of rounds.\n"
        "\n"
        "  type     a whole number\n"
        "  bounds   at least 1, at most 1_000_000\n"
        "  default  10\n"
        "  value    7  (command line)"
    )


def test_a_section_lists_its_keys() -> None:
    found = explain("simulation", "rounds")
    assert list(found.keys) == ["count", "fraction", "quorum", "evaluate"]
    assert "    quorum    Smallest number of usable updates" in found.text()


def test_an_empty_key_explains_the_whole_conf() -> None:
    found = explain("client", "")
    assert found.meaning == "A site."
    assert "budget" in found.keys
    assert found.text().startswith("  A site.")


def test_elements_of_lists_are_explained(loaded: Loaded[SimulationConf]) -> None:
    assert explain("simulation", "task.data.columns[].std").bounds == "greater than 0"
    assert explain("simulation", "task.data.columns[7].std", loaded).value is None
    assert explain("simulation", "task.data.shape[1]", loaded).value == "8"
    assert explain("simulation", "task.data.shape[1]").type == "a whole number"
    assert list(explain("simulation", "task.preprocessing").keys) == ["step", "arguments"]
    assert list(explain("simulation", "task.preprocessing[0]").keys) == ["step", "arguments"]
    assert explain("simulation", "task.preprocessing[0].step", loaded).value == "scale"


def test_an_argument_is_explained_from_the_plugins_signature(
    loaded: Loaded[SimulationConf],
) -> None:
    found = explain("simulation", "task.model.arguments.hidden", loaded)
    assert found.meaning.startswith("Widths of the hidden layers")
    assert (found.type, found.default) == ("a list of whole numbers, or null", "null")
    assert (found.value, found.origin) == ("32", "command line")
    assert "activation" in explain("simulation", "task.model.arguments").keys  # of the default, mlp


def test_arguments_without_a_plugin_are_values_the_schema_does_not_know(
    loaded: Loaded[SimulationConf],
) -> None:
    found = explain("simulation", "task.preprocessing[0].arguments.by", loaded)
    assert (found.type, found.value) == ("any value", "16.0")
    assert explain("simulation", "task.preprocessing[0].arguments", loaded).value == "{by: 16.0}"


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("privacy.epsilon", "did you mean privacy.record.epsilon or privacy.client.epsilon?"),
        ("rouns.fraction", "did you mean rounds.fraction?"),
        ("rounds.fracton", "did you mean rounds.fraction?"),
        ("task.data.columns.std", "did you mean task.data.columns[].std?"),
        ("task.data.columns[2].stdd", "did you mean task.data.columns[].std?"),
        ("seed.x", "did you mean seed?"),
        ("zzzzzz", "`config explain` lists the keys"),
        ("..", "`config explain` lists the keys"),
        ("task.model.arguments.hiden", "did you mean task.model.arguments.hidden?"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(key: str, remedy: str) -> None:
    with pytest.raises(ConfError) as caught:
        explain("simulation", key)
    (problem,) = caught.value.problems
    assert (problem.code, problem.key, problem.remedy) == ("LF1027", key, remedy)


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_key_of_a_conf_can_be_explained_and_is_in_the_reference(kind: str) -> None:
    table = reference_markdown(kind)
    for key in all_keys(kind):
        if not key.endswith("arguments"):  # those import their plug-in
            found = explain(kind, key)
            assert found.meaning, key
            json.dumps(found.as_dict())
        assert f"| `{key}` | " in table


def test_the_columns_of_the_reference_are_never_broken_by_a_value() -> None:
    rows: list[Any] = [row.split(" | ") for row in reference_markdown("server").splitlines()[2:]]
    assert {len(row) for row in rows} == {5}
