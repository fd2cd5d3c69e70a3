"""Loading conf files: every class of error with its place and remedy, and all at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from lepton_fed.config.load import kind_of, load_conf, load_task, load_values
from lepton_fed.config.schema import ClientConf, ServerConf, SimulationConf
from lepton_fed.core.task import Task
from lepton_fed.errors import ConfError, Problem

GOOD = """\
kind: simulation
task:
  name: digits
  data:
    kind: image
    shape: [1, 8, 8]
    target:
      classes: [a, b]
  model:
    name: cnn
    arguments: {hidden: 16}
  training:
    learning_rate: 1e-2
sites:
  source: {reader: digits}
"""


@pytest.fixture
def conf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path("x.yaml")


def _wrong(path: Path, text: str | bytes, overrides: Sequence[str] = ()) -> tuple[Problem, ...]:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfError) as caught:
        load_conf(path, overrides, kind=SimulationConf)
    return caught.value.problems


def _only(path: Path, text: str, overrides: Sequence[str] = ()) -> Problem:
    problems = _wrong(path, text, overrides)
    assert len(problems) == 1, [str(problem) for problem in problems]
    return problems[0]


_TOO_LONG = "99999999999999999999999"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("task.training.batch_size", _TOO_LONG),
        ("task.training.batch_size", "9223372036854775808"),
        ("task.data.shape[1]", _TOO_LONG),
        ("seed", f"-{_TOO_LONG}"),
        ("task.model.arguments.hidden", "-9223372036854775809"),
        ("task.model.arguments.a.b[0]", f"{_TOO_LONG}"),
        ("sites.partition.arguments.minimum", _TOO_LONG),
    ],
)
def test_a_whole_number_beyond_64_bits_is_refused(conf_file: Path, key: str, value: str) -> None:
    override = f"{key}={value}"
    if key.endswith("b[0]"):
        override = f"task.model.arguments.a={{b: [{value}]}}"
    problem = _only(conf_file, GOOD, [override])
    assert (problem.code, problem.key) == ("LF1015", key)
    assert problem.what == f"{value} does not fit into 64 bits"


def test_the_largest_whole_numbers_are_taken(conf_file: Path) -> None:
    conf_file.write_text(GOOD)
    overrides = ["task.model.arguments.low=-9223372036854775808",
                 "task.training.batch_size=9223372036854775807"]  # fmt: skip
    task = load_conf(conf_file, overrides, kind=SimulationConf).conf.task
    assert task.model.arguments["low"] == -(2**63)
    assert task.training.batch_size == 2**63 - 1


def test_a_float_may_be_written_with_as_many_digits_as_it_needs(conf_file: Path) -> None:
    conf_file.write_text(GOOD)
    loaded = load_conf(conf_file, [f"task.training.weight_decay={_TOO_LONG}"], kind=SimulationConf)
    assert loaded.conf.task.training.weight_decay == 1e23


def test_a_run_has_at_most_a_million_rounds(conf_file: Path) -> None:
    problem = _only(conf_file, GOOD, ["rounds.count=1000001"])
    assert (problem.code, problem.key) == ("LF1015", "rounds.count")
    conf_file.write_text(GOOD)
    load_conf(conf_file, ["rounds.count=1000000"], kind=SimulationConf)


def test_a_key_that_stands_twice_hides_nothing_else(conf_file: Path) -> None:
    conf_file.write_text(GOOD + "device: tpu\nsites: {}\nrouns: 3\n")
    with pytest.raises(ConfError) as caught:
        load_task(conf_file)
    assert [problem.code for problem in caught.value.problems] == ["LF1052", "LF1007", "LF1011"]


def test_a_kind_that_is_an_alias_is_reported_once(conf_file: Path) -> None:
    conf_file.write_text("kind: *which\n")
    with pytest.raises(ConfError) as caught:
        kind_of(conf_file)
    assert [problem.code for problem in caught.value.problems] == ["LF1008"]


def test_a_kind_that_is_none_is_reported_beside_the_rest_of_the_text(conf_file: Path) -> None:
    conf_file.write_text("kind: simulatio\nseed: 1\nseed: 2\n")
    with pytest.raises(ConfError) as caught:
        kind_of(conf_file)
    assert [problem.code for problem in caught.value.problems] == ["LF1005", "LF1007"]


def test_a_good_file_becomes_a_typed_conf(conf_file: Path) -> None:
    conf_file.write_text(GOOD)
    conf = load_conf(conf_file, kind=SimulationConf).conf
    assert isinstance(conf, SimulationConf)
    assert conf.task.training.learning_rate == 0.01
    assert conf.task.model.arguments == {"hidden": 16}
    assert conf.rounds.count == SimulationConf().rounds.count


@pytest.mark.parametrize(
    ("line", "code", "where", "key", "what", "remedy"),
    [
        ("rouns: {}", "LF1011", "1:1", "rouns", "unknown key `rouns`", "did you mean `rounds`?"),
        (
            "rounds: {epsilon: 1}", "LF1011", "1:10", "rounds.epsilon", "unknown key",
            "`epsilon` is a key of another section: privacy.record.epsilon",
        ),
        (
            "seed: abc", "LF1012", "1:7", "seed", "wants a whole number, not the text 'abc'",
            "write digits only",
        ),
        ("seed: 1e3", "LF1012", "1:7", "seed", "wants a whole number, not 1e3", "write 1000"),
        ("seed: true", "LF1012", "1:7", "seed", "wants a whole number, not true", "digits only"),
        (
            "rounds: {evaluate: 1}", "LF1012", "1:20", "rounds.evaluate",
            "wants true or false, not 1", "write true or false",
        ),
        (
            "rounds: {fraction: false}", "LF1012", "1:20", "rounds.fraction",
            "wants a number, not false", "write it like 0.5 or 1e-5",
        ),
        (
            "task: {data: {shape: [1, x, 3]}}", "LF1012", "1:26", "task.data.shape[1]",
            "wants a whole number, not the text 'x'", "write digits only",
        ),
        (
            "task: {training: {optimiser: adm}}", "LF1013", "1:30", "task.training.optimiser",
            "wants sgd, adam or adamw, not the text 'adm'", "did you mean `adam`?",
        ),
        (
            "task: {training: {optimiser: 7}}", "LF1013", "1:30", "task.training.optimiser",
            "wants sgd, adam or adamw, not 7", "write sgd or adam or adamw",
        ),
        ("seed: null", "LF1014", "1:7", "seed", "must not be null", "leave the key out"),
        ("runs:", "LF1014", "1:1", "runs", "no value is given", 'write "" for empty text'),
        ("seed: -1", "LF1015", "1:7", "seed", "-1 is out of range", "it must be at least 0"),
        (
            "privacy: {record: {epsilon: 0}}", "LF1015", "1:29", "privacy.record.epsilon",
            "0 is out of range", "it must be greater than 0, at most 100",
        ),
        (
            "privacy: {record: {clip: .inf}}", "LF1015", "1:26", "privacy.record.clip",
            ".inf is not a finite number", "choose a finite one",
        ),
        (
            "privacy: {record: {clip: .nan}}", "LF1015", "1:26", "privacy.record.clip",
            ".nan is not a finite number", "choose a finite one",
        ),
        (
            "task: {data: {columns: [{kind: number}]}}", "LF1016", "1:25",
            "task.data.columns[0].name", "`name` is missing", "Name of the column",
        ),
        (
            "task: {preprocessing: [{}]}", "LF1016", "1:24", "task.preprocessing[0].step",
            "`step` is missing", "Name of the step",
        ),
        (
            "rounds: 5", "LF1017", "1:9", "rounds", "wants a section of keys and values, not 5",
            "keys here: count, fraction, quorum, evaluate",
        ),
        (
            "rounds: [count]", "LF1017", "1:1", "rounds", "not a list of 1",
            "leave out the dashes",
        ),
        (
            "task: {metrics: accuracy}", "LF1017", "1:17", "task.metrics",
            "wants a list of texts, not the text 'accuracy'", "write [accuracy]",
        ),
        (
            "task: {preprocessing: scale}", "LF1017", "1:23", "task.preprocessing",
            "wants a list of sections, not the text 'scale'", "write [{step: scale}]",
        ),
        (
            "task: {preprocessing: [scale]}", "LF1017", "1:24", "task.preprocessing[0]",
            "wants a section of keys and values, not the text 'scale'", "write {step: scale}",
        ),
        (
            "seed: {a: 1}", "LF1017", "1:1", "seed",
            "wants a whole number, not a section (a)", "write digits only",
        ),
        (
            "strategy: {arguments: [1]}", "LF1017", "1:12", "strategy.arguments",
            "wants a section of keys and values, not a list of 1", "{name: value, ...}",
        ),
        (
            "runs: ${oc.env:HOME}", "LF1018", "1:7", "runs", "is a placeholder",
            "runs=value",
        ),
        (
            "strategy: {arguments: {a: ['???']}}", "LF1018", "1:28", "strategy.arguments.a[0]",
            "is a placeholder", "write the value itself",
        ),
        (
            "strategy: {arguments: {a: .inf}}", "LF1015", "1:27", "strategy.arguments.a",
            ".inf is not a finite number", "choose a finite one",
        ),
    ],
)  # fmt: skip
def test_a_wrong_value_is_located_and_has_a_remedy(
    conf_file: Path, line: str, code: str, where: str, key: str, what: str, remedy: str
) -> None:
    problem = _only(conf_file, line)
    assert (problem.code, problem.where, problem.key) == (code, f"x.yaml:{where}", key)
    assert what in problem.what
    assert remedy
    assert remedy in problem.remedy


def test_all_problems_of_a_file_are_reported_at_once_and_in_order(conf_file: Path) -> None:
    text = """\
kind: simulation
task:
  data:
    kind: imge
    shape: [1, x]
    columns:
      - kind: number
  training:
    batch_size: 0
    learning_rate: [1]
rounds:
  quorum:
rouns: 5
rounds: {}
seed: ${x}
"""
    problems = _wrong(conf_file, text)
    assert [(problem.code, problem.where, problem.key) for problem in problems] == [
        ("LF1013", "x.yaml:4:11", "task.data.kind"),
        ("LF1012", "x.yaml:5:16", "task.data.shape[1]"),
        ("LF1016", "x.yaml:7:9", "task.data.columns[0].name"),
        ("LF1015", "x.yaml:9:17", "task.training.batch_size"),
        ("LF1017", "x.yaml:10:5", "task.training.learning_rate"),
        ("LF1014", "x.yaml:12:3", "rounds.quorum"),
        ("LF1011", "x.yaml:13:1", "rouns"),
        ("LF1007", "x.yaml:14:1", ""),
        ("LF1018", "x.yaml:15:7", "seed"),
    ]


def test_a_long_list_of_problems_is_cut_with_a_count(conf_file: Path) -> None:
    problems = _wrong(conf_file, "\n".join(f"key{i}: 1" for i in range(50)))
    assert len(problems) == 20
    assert (problems[-1].code, problems[-1].what) == ("LF1019", "and 31 more")


def test_a_misspelt_required_key_is_one_problem(conf_file: Path) -> None:
    problem = _only(conf_file, "task: {preprocessing: [{stp: scale}]}")
    assert (problem.code, problem.key) == ("LF1011", "task.preprocessing[0].stp")


def test_a_long_value_is_cut_in_the_message(conf_file: Path) -> None:
    assert len(_only(conf_file, f"seed: {'x' * 5000}").what) < 120


def test_text_is_taken_as_it_is_written(conf_file: Path) -> None:
    text = GOOD.replace("[a, b]", "[0, 1.0, 007, no, true, 1e3]")
    conf_file.write_text(text)
    conf = load_conf(conf_file, kind=SimulationConf).conf
    assert conf.task.data.target.classes == ["0", "1.0", "007", "no", "true", "1e3"]


@pytest.mark.parametrize(
    ("word", "value"), [("yes", True), ("off", False), ("On", True), ("FALSE", False)]
)
def test_a_key_that_wants_a_boolean_takes_yes_and_no(
    conf_file: Path, word: str, value: bool
) -> None:
    conf_file.write_text(f"{GOOD}rounds: {{evaluate: {word}}}\n")
    assert load_conf(conf_file, kind=SimulationConf).conf.rounds.evaluate is value


def test_headings_without_keys_are_empty_sections(conf_file: Path) -> None:
    conf_file.write_text(f"{GOOD}rounds:\nprivacy:\n  outside_epsilon:\nstrategy:\n  arguments:\n")
    conf = load_conf(conf_file, kind=SimulationConf).conf
    assert conf.rounds == SimulationConf().rounds
    assert conf.privacy.outside_epsilon == []
    assert conf.strategy.arguments == {}


def test_free_arguments_keep_their_types(conf_file: Path) -> None:
    conf_file.write_text(f"{GOOD}strategy: {{arguments: {{a: 1e-5, b: [1, no, {{c: null}}]}}}}\n")
    conf = load_conf(conf_file, kind=SimulationConf).conf
    assert conf.strategy.arguments == {"a": 1e-5, "b": [1, "no", {"c": None}]}


def test_a_missing_file_points_to_init(conf_file: Path) -> None:
    with pytest.raises(ConfError, match=r"x\.yaml: there is no such file\n.*lepton-fed init"):
        load_conf(conf_file, kind=SimulationConf)


def test_a_directory_is_named_as_such(tmp_path: Path) -> None:
    with pytest.raises(ConfError, match="this is a directory, not a file"):
        load_conf(tmp_path, kind=SimulationConf)


def test_a_file_that_cannot_be_opened_says_why(conf_file: Path) -> None:
    conf_file.write_text(GOOD)
    with pytest.raises(ConfError, match="cannot be read: Not a directory"):
        load_conf(conf_file / "conf.yaml", kind=SimulationConf)


def test_a_name_that_cannot_be_a_path_is_an_error_of_the_conf() -> None:
    with pytest.raises(ConfError, match="cannot be read: embedded null byte"):
        load_conf("a\0b", kind=SimulationConf)


@pytest.mark.parametrize("text", ["", "# nothing yet\n"])
def test_an_empty_file_points_to_init(conf_file: Path, text: str) -> None:
    problem = _only(conf_file, text)
    assert (problem.code, problem.where) == ("LF1002", "x.yaml")
    assert "lepton-fed init" in problem.remedy


def test_another_encoding_is_located(conf_file: Path) -> None:
    (problem,) = _wrong(conf_file, "kind: simulation\nruns: caf\xe9\n".encode("latin-1"))
    assert (problem.code, problem.where) == ("LF1003", "x.yaml:2:10")
    assert problem.remedy == "save the file as UTF-8"


def test_a_byte_order_mark_is_no_matter(conf_file: Path) -> None:
    conf_file.write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert load_conf(conf_file, kind=SimulationConf).origin("kind") == "x.yaml:1:7"


def test_an_absurdly_large_file_is_not_read(conf_file: Path) -> None:
    problem = _only(conf_file, "#" * (1 << 20) + "#")
    assert (problem.code, problem.what) == ("LF1004", "the file is larger than 1 MiB")


@pytest.mark.parametrize(("text", "found"), [("[1, 2]", "a list of 2"), ("x", "the text 'x'")])
def test_a_file_that_is_no_section_is_refused(conf_file: Path, text: str, found: str) -> None:
    problem = _only(conf_file, text)
    assert (problem.code, problem.where) == ("LF1017", "x.yaml:1:1")
    assert problem.what == f"a conf consists of keys and values, not {found}"


def test_a_conf_of_another_kind_is_one_clear_error(conf_file: Path) -> None:
    problem = _only(conf_file, "kind: server\nsites: {count: 3}\nrouns: 1\n")
    assert (problem.code, problem.where, problem.key) == ("LF1005", "x.yaml:1:7", "kind")
    assert problem.what == "this is a server conf; a simulation conf is wanted here"


def test_a_misspelt_kind_is_named(conf_file: Path) -> None:
    problem = _only(conf_file, "kind: simulatoin\nrouns: 1\n")
    assert problem.code == "LF1005"
    assert problem.remedy == "did you mean `simulation`? kinds: simulation, server, client"


def test_the_kind_of_a_file_is_found(conf_file: Path) -> None:
    conf_file.write_text("kind: client\n")
    assert kind_of(conf_file) == "client"


def test_a_file_without_a_kind_is_told_the_kinds(conf_file: Path) -> None:
    conf_file.write_text("seed: 1\n")
    with pytest.raises(ConfError, match="does not say what it configures") as caught:
        kind_of(conf_file)
    assert caught.value.problems[0].remedy == "write `kind:` and one of simulation, server, client"


def test_finding_the_kind_reports_what_the_reader_refuses(conf_file: Path) -> None:
    conf_file.write_text("kind: server\nkind: client\n")
    with pytest.raises(ConfError, match="stands here twice"):
        kind_of(conf_file)


def test_origins_tell_file_command_line_and_default(conf_file: Path) -> None:
    conf_file.write_text(GOOD)
    loaded = load_conf(conf_file, ["rounds.count=7"], kind=SimulationConf)
    assert loaded.origin("task.training.learning_rate") == "x.yaml:13:20"
    assert loaded.origin("task.model.arguments.hidden") == "x.yaml:11:25"
    assert loaded.origin("task.data.shape[2]") == "x.yaml:6:19"
    assert loaded.origin("rounds.count") == "command line"
    assert loaded.origin("rounds.quorum") == "default"


def test_later_stages_can_point_at_a_key(conf_file: Path) -> None:
    conf_file.write_text(GOOD)
    loaded = load_conf(conf_file, ["rounds.count=7"], kind=SimulationConf)
    problem = loaded.problem_at("task.training.learning_rate", "it diverged", "lower it", "LF3999")
    assert str(problem) == ("x.yaml:13:20 task.training.learning_rate: it diverged\n  -> lower it")
    assert loaded.place("rounds.count") == "command line: rounds.count=7"
    assert loaded.place("task.training.batch_size") == "x.yaml:12:3"  # the section it belongs in
    assert loaded.place("seed") == "x.yaml (default)"
    bare = Problem("LF3999", "wrong", key="task.data.shape")
    assert loaded.located(bare).where == "x.yaml:6:5"
    assert loaded.located(Problem("LF3999", "wrong")) == Problem("LF3999", "wrong")


def test_steps_alone_replace_the_default_epochs(conf_file: Path) -> None:
    conf_file.write_text(GOOD)
    loaded = load_conf(conf_file, ["task.training.steps=5"], kind=SimulationConf)
    training = loaded.conf.task.training
    assert (training.steps, training.epochs) == (5, None)
    assert loaded.origin("task.training.epochs") == "command line"


@pytest.mark.parametrize(
    "lines", ["{epochs: 2, steps: null}", "{steps: null}", "{}", "{epochs: 2}"]
)
def test_epochs_stand_when_no_steps_are_given(lines: str) -> None:
    loaded = load_values(Task, _task(), [f"training={lines}"])
    assert loaded.conf.training.epochs == (2 if "2" in lines else 1)
    assert loaded.conf.training.steps is None


def test_names_alone_give_the_number_of_sites(conf_file: Path) -> None:
    conf_file.write_text(GOOD)
    loaded = load_conf(conf_file, ["sites.names=[a, b, c, d]"], kind=SimulationConf)
    assert loaded.conf.sites.count == 4


def test_the_resolved_conf_loads_to_an_equal_one(conf_file: Path, tmp_path: Path) -> None:
    conf_file.write_text(GOOD)
    loaded = load_conf(conf_file, ["task.training.steps=5"], kind=SimulationConf)
    again = tmp_path / "conf.yaml"
    again.write_text(loaded.resolved_yaml())
    assert load_conf(again, kind=SimulationConf).conf == loaded.conf


def _task() -> dict[str, object]:
    return {
        "data": {"columns": [{"name": "age"}], "target": {"kind": "number", "name": "y"}},
        "metrics": ["mae"],
    }


def test_a_task_by_itself_loads_with_keys_relative_to_it() -> None:
    task = load_values(Task, _task()).conf
    assert isinstance(task, Task)
    assert task.outputs == 1
    with pytest.raises(ConfError) as caught:
        load_values(Task, _task(), ["metrics=[auc]"], source="offer")
    assert caught.value.problems[0].key == "metrics[0]"


def test_problems_in_a_template_say_so() -> None:
    with pytest.raises(ConfError) as caught:
        load_values(ServerConf, {"seed": -1})
    assert caught.value.problems[0].where == "template"


def test_the_task_of_a_server_conf_can_be_loaded_alone(conf_file: Path) -> None:
    conf_file.write_text(GOOD.replace("simulation", "server").split("sites:")[0])
    assert load_task(conf_file).name == "digits"


def test_a_client_conf_has_no_task(conf_file: Path) -> None:
    conf_file.write_text("kind: client\n")
    with pytest.raises(ConfError) as caught:
        load_task(conf_file)
    assert caught.value.code == "LF1020"
    assert load_conf(conf_file, kind=ClientConf).conf.kind == "client"
