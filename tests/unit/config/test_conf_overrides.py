"""Overrides on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from lepton_fed.config.load import load_conf
from lepton_fed.config.schema import SimulationConf
from lepton_fed.errors import ConfError, Problem

FILE = """\
kind: simulation
task:
  data:
    kind: image
    shape: [1, 8, 8]
    target: {classes: [a, b]}
  preprocessing:
    - {step: scale, arguments: {by: 16}}
  model: {name: cnn, arguments: {hidden: 3}}
rounds: {count: 3}
sites:
  source: {reader: digits, path: somewhere}
"""


@pytest.fixture
def conf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = Path("x.yaml")
    path.write_text(FILE)
    return path


def _conf(path: Path, *overrides: str) -> SimulationConf:
    return load_conf(path, overrides, kind=SimulationConf).conf


def _problems(path: Path, *overrides: str) -> tuple[Problem, ...]:
    with pytest.raises(ConfError) as caught:
        load_conf(path, overrides, kind=SimulationConf)
    return caught.value.problems


def test_an_override_takes_the_place_of_the_value_in_the_file(conf_file: Path) -> None:
    assert _conf(conf_file, "rounds.count=9").rounds.count == 9


def test_an_override_sets_a_key_that_the_file_leaves_out(conf_file: Path) -> None:
    assert _conf(conf_file, "privacy.record.clip=0.5").privacy.record.clip == 0.5


def test_of_two_overrides_of_a_key_the_later_one_holds(conf_file: Path) -> None:
    assert _conf(conf_file, "rounds.count=9", "rounds.count=4").rounds.count == 4


def test_values_are_yaml(conf_file: Path) -> None:
    conf = _conf(
        conf_file, "task.training.learning_rate=1e-3", "task.metrics=[accuracy, auc]",
        "task.model={name: mlp}", "rounds.evaluate=off",
    )  # fmt: skip
    assert conf.task.training.learning_rate == 1e-3
    assert conf.task.metrics == ["accuracy", "auc"]
    assert conf.task.model.name == "mlp"
    assert conf.task.model.arguments == {}  # the section is replaced, not mixed
    assert conf.rounds.evaluate is False


def test_nothing_after_the_equals_sign_is_empty_text(conf_file: Path) -> None:
    assert _conf(conf_file, "sites.source.path=").sites.source.path == ""


def test_an_equals_sign_may_stand_in_the_value(conf_file: Path) -> None:
    assert _conf(conf_file, "sites.source.path=/data/a=b").sites.source.path == "/data/a=b"


def test_elements_of_lists_are_set_by_number(conf_file: Path) -> None:
    conf = _conf(conf_file, "task.preprocessing[0].arguments.by=255", "task.data.shape[0]=3")
    assert conf.task.preprocessing[0].arguments == {"by": 255}
    assert conf.task.data.shape == [3, 8, 8]


def test_the_number_after_the_last_appends(conf_file: Path) -> None:
    conf = _conf(conf_file, "task.preprocessing[1].step=clip", "task.metrics[0]=accuracy")
    assert [step.step for step in conf.task.preprocessing] == ["scale", "clip"]
    assert conf.task.metrics == ["accuracy"]


def test_free_arguments_can_be_set_and_added(conf_file: Path) -> None:
    conf = _conf(conf_file, "task.model.arguments.hidden=5", "strategy.arguments.deep.er=[1]")
    assert conf.task.model.arguments == {"hidden": 5}
    assert conf.strategy.arguments == {"deep": {"er": [1]}}


def test_an_override_cures_an_error_of_the_file_at_that_key(conf_file: Path) -> None:
    conf_file.write_text(FILE.replace("count: 3", "count: three"))
    assert _conf(conf_file, "rounds.count=3").rounds.count == 3


def test_a_wrong_value_is_located_by_the_override_alone(conf_file: Path) -> None:
    (problem,) = _problems(conf_file, "rounds.count=many")
    assert (problem.code, problem.where) == ("LF1012", "command line: rounds.count=many")
    assert problem.key == "rounds.count"
    assert str(problem).startswith("command line: rounds.count=many: wants a whole number")


def test_an_unknown_key_is_located_by_the_override(conf_file: Path) -> None:
    (problem,) = _problems(conf_file, "rounds.cuont=5")
    assert (problem.code, problem.where) == ("LF1011", "command line: rounds.cuont=5")
    assert "did you mean `count`?" in problem.remedy


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("rounds.count", "an override needs a `=`"),
        ("", "an override needs a `=`"),
        ("=5", "no key before the `=`"),
        ("rounds..count=5", "`rounds..count` is not a key"),
        ("rounds.count[x]=5", "`rounds.count[x]` is not a key"),
        ("[0]=5", "`[0]` is not a key"),
        ("rounds count=5", "`rounds count` is not a key"),
        ("task.name=[a", "not YAML"),
        ("task.name=*a", "alias `*a` is not allowed"),
        ("task.name={a: 1, a: 2}", "stands here twice"),
    ],
)
def test_a_malformed_override_is_named(conf_file: Path, override: str, what: str) -> None:
    (problem,) = _problems(conf_file, override)
    assert (problem.code, problem.where) == ("LF1009", f"command line: {override}")
    assert what in problem.what
    assert problem.remedy


@pytest.mark.parametrize(
    ("override", "what", "remedy"),
    [
        (
            "rounds.count.x=5", "`rounds.count` is not a section: it is 3 (x.yaml:10:17)",
            "set it as a whole: rounds.count=...",
        ),
        ("rounds[0]=5", "`rounds` is not a list: it is a section (count) (x.yaml:10:1)", "whole"),
        (
            "task.preprocessing[4].step=x",
            "`task.preprocessing` has no element 4: its length is 1",
            "task.preprocessing[1] appends one",
        ),
    ],
)  # fmt: skip
def test_an_override_that_finds_no_place_says_what_is_there(
    conf_file: Path, override: str, what: str, remedy: str
) -> None:
    (problem,) = _problems(conf_file, override)
    assert (problem.code, problem.what) == ("LF1010", what)
    assert remedy in problem.remedy


def test_problems_of_file_and_overrides_come_together(conf_file: Path) -> None:
    conf_file.write_text(FILE.replace("count: 3", "count: three"))
    found = _problems(conf_file, "sites.count=0", "nonsense", "seed=x")
    assert [problem.code for problem in found] == ["LF1012", "LF1009", "LF1015", "LF1012"]
    assert found[0].where == "x.yaml:10:17"


def test_a_long_override_is_cut_in_the_message(conf_file: Path) -> None:
    (problem,) = _problems(conf_file, f"seed={'x' * 500}")
    assert len(problem.where) < 80


def test_text_that_yaml_cannot_hold_is_refused(conf_file: Path) -> None:
    (problem,) = _problems(conf_file, "runs=\udcff")
    assert problem.code == "LF1009"
