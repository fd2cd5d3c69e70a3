"""Rendered conf files and the generated files of the repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lepton_fed.config.explain import all_keys
from lepton_fed.config.generated import generated, write
from lepton_fed.config.keys import walk
from lepton_fed.config.load import load_conf, load_task, load_values
from lepton_fed.config.plugin_checks import plugin_problems
from lepton_fed.config.render import render
from lepton_fed.config.schema import KINDS, ServerConf, SimulationConf
from lepton_fed.config.templates import template
from lepton_fed.config.yaml_text import block, flow

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("name", list(generated()))
def test_a_generated_file_is_what_the_schema_and_the_templates_say(name: str) -> None:
    written = (ROOT / name).read_text(encoding="utf-8")
    assert written == generated()[name], "run: python -m lepton_fed.config.generated"


def test_writing_puts_every_generated_file_in_place(tmp_path: Path) -> None:
    write(tmp_path)
    for name, text in generated().items():
        assert (tmp_path / name).read_text(encoding="utf-8") == text


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_shipped_conf_loads_to_its_template(kind: str) -> None:
    loaded = load_conf(ROOT / "conf" / f"{kind}.yaml", kind=KINDS[kind])
    assert loaded.conf == load_values(KINDS[kind], template(kind)).conf
    assert plugin_problems(loaded) == []


def test_simulation_server_and_client_speak_of_one_task() -> None:
    server = load_task(ROOT / "conf" / "server.yaml")
    assert server.digest == load_task(ROOT / "conf" / "simulation.yaml").digest
    assert template("client")["task"] == "conf/server.yaml"


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_key_that_is_not_advanced_is_shown_with_its_meaning_above_it(kind: str) -> None:
    lines = render(template(kind), kind).splitlines()
    text = "\n".join(lines)
    for name, key in walk(KINDS[kind]):
        if "[]" in name or key.setting.advanced:
            continue
        indent = "  " * name.count(".")
        rows = [i for i, line in enumerate(lines) if line.startswith(f"{indent}{key.name}:")]
        assert rows, name
        assert all(lines[row - 1].startswith(f"{indent}# ") for row in rows), name
        assert key.setting.doc[:40] in text, name


@pytest.mark.parametrize("kind", list(KINDS))
def test_lines_fit_into_a_hundred_columns_and_sections_stand_apart(kind: str) -> None:
    lines = render(template(kind), kind).splitlines()
    assert max(map(len, lines)) <= 100
    assert not any(line != line.rstrip() for line in lines)
    for name in (key for key in all_keys(kind) if "." not in key):
        row = next(i for i, line in enumerate(lines) if line.startswith(f"{name}:"))
        comment = row
        while lines[comment - 1].startswith("#"):
            comment -= 1
        assert lines[comment - 1] == "", name


def test_advanced_keys_appear_once_they_differ_from_their_default() -> None:
    conf = template("simulation")
    assert "warmup_rounds" not in render(conf, "simulation")
    conf["task"]["training"]["schedule"] = {"warmup_rounds": 3}
    assert "      warmup_rounds: 3\n" in render(conf, "simulation")


def test_a_conf_instance_renders_like_its_values() -> None:
    conf = load_values(SimulationConf, template("simulation")).conf
    assert render(conf, "simulation") == render(template("simulation"), "simulation")


def _table() -> dict[str, Any]:
    words = [f"a rather long word for value number {i}" for i in range(9)]
    columns = [
        {"name": "age", "mean": 40.0},
        {"name": "no", "kind": "category", "values": ["yes", "no", "1e-5"]},
        {"name": "diagnosis", "kind": "category", "values": words},
    ]
    target = {"classes": [f"class {i}" for i in range(60)]}
    return {"task": {"data": {"columns": columns, "target": target}}}


def test_columns_are_one_line_each_while_they_fit_and_load_back(tmp_path: Path) -> None:
    text = render(_table(), "server")
    assert "      - {name: age, mean: 40.0}\n" in text
    assert "      - {name: 'no', kind: category, values: ['yes', 'no', '1e-5']}\n" in text
    path = tmp_path / "x.yaml"
    path.write_text(text)
    assert load_conf(path, kind=ServerConf).conf == load_values(ServerConf, _table()).conf


def test_a_long_list_is_wrapped(tmp_path: Path) -> None:
    lines = render(_table(), "server").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("      classes: [class 0,"))
    assert len(lines[start]) <= 100
    assert lines[start].endswith(",")
    assert lines[start + 1].startswith("        class ")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1e-5, "1.0e-05"),
        (1e22, "1.0e+22"),
        (1.5e-7, "1.5e-07"),
        (16.0, "16.0"),
        (True, "true"),
        (None, "null"),
        ("plain words/here-1.2", "plain words/here-1.2"),
        ("no", "'no'"),
        ("007", "'007'"),
        ("it's", "'it''s'"),
        ("a: b", "'a: b'"),
        ("two\nlines", '"two\\nlines"'),
        ([1, "a", []], "[1, a, []]"),
        ({"on": {}}, "{'on': {}}"),
    ],
)
def test_values_are_written_so_that_every_yaml_reader_agrees(value: object, text: str) -> None:
    assert flow(value) == text


def test_lists_of_mixed_things_stay_on_one_line() -> None:
    assert block({"a": [{"b": 1}, 2], "c": [{}], "d": [{"e": 1}]}) == (
        "a: [{b: 1}, 2]\nc: [{}]\nd:\n  - e: 1\n"
    )
