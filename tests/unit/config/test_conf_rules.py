"""Contradictions between values that are each right, with the key that is to blame."""

from __future__ import annotations

from typing import Any

import pytest

from lepton_fed.config.load import load_values
from lepton_fed.config.schema import ClientConf, Rounds, ServerConf, SimulationConf
from lepton_fed.core.task import Task
from lepton_fed.errors import ConfError, Problem

IMAGE: dict[str, Any] = {
    "kind": "image",
    "shape": [1, 8, 8],
    "target": {"classes": ["a", "b", "c"]},
}
TABLE: dict[str, Any] = {
    "columns": [
        {"name": "age", "mean": 40.0, "std": 12.0, "minimum": 0.0, "maximum": 120.0},
        {"name": "ward", "kind": "category", "values": ["north", "south"]},
    ],
    "target": {"kind": "number", "name": "days"},
}


def _found(kind: type[Any], values: dict[str, Any], overrides: tuple[str, ...]) -> list[Problem]:
    try:
        load_values(kind, values, overrides)
    except ConfError as error:
        return list(error.problems)
    return []


def _image(*overrides: str) -> list[Problem]:
    return _found(Task, {"data": IMAGE}, overrides)


def _table(*overrides: str) -> list[Problem]:
    return _found(Task, {"data": TABLE}, overrides)


def _simulation(*overrides: str) -> list[Problem]:
    values = {"task": {"data": IMAGE}, "sites": {"source": {"reader": "digits"}}}
    return _found(SimulationConf, values, overrides)


def _codes(problems: list[Problem]) -> list[tuple[str, str]]:
    return [(problem.code, problem.key) for problem in problems]


def test_the_confs_that_the_tests_start_from_have_no_contradiction() -> None:
    assert _image() == _table() == _simulation() == []


@pytest.mark.parametrize(
    ("override", "code", "key"),
    [
        ("name=Digits", "LF1051", "name"),
        ("name=../x", "LF1051", "name"),
        (f"name={'a' * 64}", "LF1051", "name"),
        ("name=", "LF1051", "name"),
        ("data.shape=[8, 8]", "LF1062", "data.shape"),
        ("data.shape=[]", "LF1062", "data.shape"),
        ("data.shape=[1, 0, 8]", "LF1062", "data.shape[1]"),
        ("data.columns=[{name: a}]", "LF1062", "data.columns"),
        ("data.target.classes=[a]", "LF1061", "data.target.classes"),
        ("data.target.classes=[a, b, a]", "LF1061", "data.target.classes[2]"),
        ("data.target.classes=[a, b, '']", "LF1061", "data.target.classes[2]"),
        ("data.target.minimum=0", "LF1061", "data.target.minimum"),
        ("data.target.kind=number", "LF1061", "data.target.classes"),
        ("data.target.name=", "LF1061", "data.target.name"),
        ("model.name=cnnn", "LF1021", "model.name"),
        ("training.epochs=null", "LF1040", "training.epochs"),
        ("training={steps: 5, epochs: 1}", "LF1040", "training.steps"),
        ("training={optimiser: adam, momentum: 0.9}", "LF1041", "training.momentum"),
        ("training.schedule.final=0.1", "LF1041", "training.schedule.final"),
        ("aggregation.weight_bound=0.5", "LF1042", "aggregation.weight_bound"),
        ("aggregation.weight_bound=2", "LF1042", "aggregation.weight_bound"),
        ("aggregation.weight=rows", "LF1042", "aggregation.weight_bound"),
        ("metrics=[acuracy]", "LF1043", "metrics[0]"),
        ("metrics=[accuracy, mae]", "LF1044", "metrics[1]"),
        ("metrics=[auc]", "LF1044", "metrics[0]"),
        ("metrics=[loss]", "LF1044", "metrics[0]"),
        ("metrics=[recall, recall]", "LF1044", "metrics[1]"),
    ],
)
def test_a_contradiction_in_an_image_task_names_its_key(override: str, code: str, key: str) -> None:
    (problem,) = _image(override)
    assert (problem.code, problem.key) == (code, key)
    assert problem.what
    assert problem.remedy
    assert problem.where.startswith(("command line: ", "template"))


@pytest.mark.parametrize(
    ("override", "code", "key"),
    [
        ("data.columns=[]", "LF1063", "data.columns"),
        ("data.shape=[3]", "LF1063", "data.shape"),
        ("data.dtype=uint8", "LF1063", "data.dtype"),
        ("data.columns[1].name=age", "LF1063", "data.columns[1]"),
        ("data.columns[0].name=days", "LF1063", "data.columns[0].name"),
        ("data.columns[0].name=", "LF1063", "data.columns[0]"),
        ("data.columns[0].values=[x]", "LF1064", "data.columns[0].values"),
        ("data.columns[0].maximum=-1", "LF1064", "data.columns[0].minimum"),
        ("data.columns[0].fill=-1", "LF1064", "data.columns[0].fill"),
        ("data.columns[0].fill=120.5", "LF1064", "data.columns[0].fill"),
        ("data.columns[0].mean=-1e39", "LF1064", "data.columns[0].mean"),
        ("data.columns[0].std=3.5e38", "LF1064", "data.columns[0].std"),
        ("data.columns[0].std=1e-46", "LF1064", "data.columns[0].std"),
        ("data.columns[0]={name: age, fill: 1e39}", "LF1064", "data.columns[0].fill"),
        ("data.columns[1].values=[]", "LF1064", "data.columns[1].values"),
        ("data.columns[1].values=[x, x]", "LF1064", "data.columns[1].values[1]"),
        ("data.columns[1].mean=1", "LF1064", "data.columns[1].mean"),
        ("data.columns[1].fill=1", "LF1064", "data.columns[1].fill"),
        ("data.columns[1].minimum=1", "LF1064", "data.columns[1].minimum"),
        ("data.target={kind: number, minimum: -1e200}", "LF1061", "data.target.minimum"),
        ("data.target={kind: number, minimum: 2, maximum: 2}", "LF1061", "data.target.minimum"),
        ("augmentation=[{step: flip}]", "LF1060", "augmentation"),
        ("metrics=[accuracy]", "LF1044", "metrics[0]"),
        ("metrics=[r3]", "LF1043", "metrics[0]"),
    ],
)
def test_a_contradiction_in_a_table_task_names_its_key(override: str, code: str, key: str) -> None:
    assert _codes(_table(override)) == [(code, key)]


@pytest.mark.parametrize(
    "override",
    [
        "data.shape=[2]",
        "data.columns[0].fill=0",
        "data.columns[0].fill=120",
        "data.columns[0]={name: age, mean: 3.4e38, std: 3.4e38, fill: -3.4e38}",
        "metrics=[mae, r2]",
        "training={optimiser: adamw}",
        "training.schedule={name: cosine, final: 0.1}",
        "aggregation={weight: rows, weight_bound: 1000}",
    ],
)
def test_what_is_no_contradiction_is_let_through(override: str) -> None:
    assert _table(override) == []


def test_two_classes_have_an_auc() -> None:
    assert _image("data.target.classes=[no, yes]", "metrics=[auc]") == []


@pytest.mark.parametrize(
    ("overrides", "code", "key"),
    [
        (("rounds.quorum=4",), "LF1049", "rounds.quorum"),
        (("rounds.quorum=2", "rounds.fraction=0.3"), "LF1049", "rounds.quorum"),
        (("sites.names=[a, b]", "sites.count=3"), "LF1048", "sites.names"),
        (("sites.names=[a, b, a]",), "LF1048", "sites.names[2]"),
        (("sites.names=[a, B]",), "LF1051", "sites.names[1]"),
        (("sites.held_out=0",), "LF1050", "sites.held_out"),
        (("sites.source.reader=digit",), "LF1021", "sites.source.reader"),
        (("sites.partition.name=dirichlett",), "LF1021", "sites.partition.name"),
        (("strategy.name=fedpox",), "LF1021", "strategy.name"),
        (("task.model.name=cn",), "LF1021", "task.model.name"),
        (("device=gpu",), "LF1052", "device"),
        (("device='cuda:0,'",), "LF1052", "device"),
        (("runs=",), "LF1053", "runs"),
        (("privacy.outside_epsilon=[evalution]",), "LF1047", "privacy.outside_epsilon[0]"),
        (
            ("task.training.schedule.warmup_rounds=11",),
            "LF1045",
            "task.training.schedule.warmup_rounds",
        ),
        (
            ("privacy.record.enabled=true", "task.training.max_gradient_norm=1"),
            "LF1046",
            "task.training.max_gradient_norm",
        ),
        (
            (
                "privacy.record.enabled=true",
                "task.aggregation={weight: rows, weight_bound: 500}",
            ),
            "LF1046",
            "task.aggregation.weight",
        ),
    ],
)
def test_a_contradiction_in_a_simulation_names_its_key(
    overrides: tuple[str, ...], code: str, key: str
) -> None:
    assert _codes(_simulation(*overrides)) == [(code, key)]


@pytest.mark.parametrize(
    "overrides",
    [
        ("device=cuda",),
        ("device=cuda:1",),
        ("device=cuda:0,1,12",),
        ("rounds.fraction=0.1",),
        ("sites.held_out=0", "rounds.evaluate=false"),
        ("privacy.outside_epsilon=[evaluation]",),
        ("task.training.max_gradient_norm=1",),
        ("task.training.schedule.warmup_rounds=10",),
        ("privacy.record={enabled: true}", "task.training.momentum=0.9"),
    ],
)
def test_what_a_simulation_may_say_is_let_through(overrides: tuple[str, ...]) -> None:
    assert _simulation(*overrides) == []


@pytest.mark.parametrize(
    ("fraction", "sites", "selected"), [(1.0, 7, 7), (0.5, 7, 4), (0.3, 10, 3), (0.01, 3, 1)]
)
def test_a_cohort_has_one_size_everywhere(fraction: float, sites: int, selected: int) -> None:
    assert Rounds(fraction=fraction).cohort_size(sites) == selected
    overrides = (f"rounds.fraction={fraction}", f"sites.count={sites}")
    assert _simulation(*overrides, f"rounds.quorum={selected}") == []
    (problem,) = _simulation(*overrides, f"rounds.quorum={selected + 1}")
    assert f"{selected} of {sites} sites" in problem.what


def test_contradictions_are_reported_together_and_located() -> None:
    found = _simulation(
        "rounds.quorum=9", "device=tpu", "task.metrics=[mae]", "strategy.name=fedavgg"
    )
    assert sorted(_codes(found)) == [
        ("LF1021", "strategy.name"),
        ("LF1044", "task.metrics[0]"),
        ("LF1049", "rounds.quorum"),
        ("LF1052", "device"),
    ]
    assert {p.where for p in found} >= {"command line: device=tpu"}


def test_a_contradiction_in_a_default_points_at_its_section() -> None:
    (problem,) = _found(Task, {"data": {"target": TABLE["target"]}}, ())
    assert (problem.key, problem.where) == ("data.columns", "template")


def test_noise_from_a_seed_is_for_simulations_alone() -> None:
    seeded = ("privacy.record={enabled: true, randomness: insecure_seeded}",)
    assert _codes(_simulation(*seeded)) == []
    found = _found(ServerConf, {"task": {"data": IMAGE}}, seeded)
    assert _codes(found) == [("LF1069", "privacy.record.randomness")]


FTRL = "privacy.record={enabled: true, mechanism: dp_ftrl, sampler: full, band: 8}"


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("privacy.record.sampler=poisson", "sampler"),
        ("privacy.record.sampler=shuffled", "sampler"),
        ("privacy.record.mechanism=dp_sgd", "band"),
    ],
)
def test_correlated_noise_goes_with_one_order(change: str, key: str) -> None:
    assert _codes(_simulation(FTRL)) == []
    assert _codes(_simulation(FTRL, change)) == [("LF1071", f"privacy.record.{key}")]


def test_correlated_noise_is_not_shared() -> None:
    found = _codes(_simulation(FTRL, "privacy.record.noise=shared"))
    assert ("LF1071", "privacy.record.noise") in found


def test_ghost_clipping_is_for_simulations() -> None:
    asked = ("privacy.record.enabled=true", "privacy.record.engine=ghost")
    assert _simulation(*asked) == []
    (problem,) = _found(ServerConf, {"task": {"data": IMAGE}}, asked)
    assert (problem.code, problem.key) == ("LF1046", "privacy.record.engine")
    others = (asked[0], "privacy.record.engine=bookkeeping")
    assert _found(ServerConf, {"task": {"data": IMAGE}}, others) == []


def test_a_server_conf_is_judged_like_a_simulation_without_sites() -> None:
    values = {"task": {"data": IMAGE}}
    found = _found(ServerConf, values, ("rounds.quorum=900", "strategy.name=x", "signing_key="))
    assert _codes(found) == [("LF1021", "strategy.name"), ("LF1053", "signing_key")]


@pytest.mark.parametrize("address", ["", "127.0.0.1:9093", "127.8.8.8:1", "'[::1]:9093'"])
def test_a_monitor_is_on_loopback_or_nowhere(address: str) -> None:
    assert _found(ServerConf, {"task": {"data": IMAGE}}, (f"monitor={address}",)) == []


@pytest.mark.parametrize(
    ("address", "code"),
    [
        ("0.0.0.0:9093", "LF1057"),
        ("'[::]:9093'", "LF1057"),
        ("10.0.0.5:9093", "LF1057"),
        ("fed.example.org:9093", "LF1057"),
        ("localhost:9093", "LF1057"),
        ("127.0.0.1.example.org:9093", "LF1057"),
        ("127.1:9093", "LF1057"),
        ("'[127.0.0.1]:9093'", "LF1054"),
        ("127.0.0.1", "LF1054"),
        ("127.0.0.1:0", "LF1054"),
        ("127.0.0.1:65536", "LF1054"),
    ],
)
def test_a_monitor_that_others_could_reach_is_refused(address: str, code: str) -> None:
    found = _found(ServerConf, {"task": {"data": IMAGE}}, (f"monitor={address}",))
    assert _codes(found) == [(code, "monitor")]


def test_a_client_conf_is_judged() -> None:
    overrides = ("name=Site 1", "source.reader=cvs", "device=cuda:x", "task=", "state=' '")
    assert sorted(_codes(_found(ClientConf, {}, overrides))) == [
        ("LF1021", "source.reader"),
        ("LF1051", "name"),
        ("LF1052", "device"),
        ("LF1053", "state"),
        ("LF1053", "task"),
    ]


_MASKED = "privacy.secure_aggregation.enabled=true"


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (("sites.count=2",), "min_cohort"),
        (("sites.count=5", "rounds.fraction=0.4"), "min_cohort"),
        (("sites.count=5", "privacy.secure_aggregation.min_cohort=6"), "min_cohort"),
        (("sites.count=23", "privacy.secure_aggregation.groups=3"), "groups"),
        (("sites.count=29", "privacy.secure_aggregation.groups=3",
          "privacy.secure_aggregation.min_cohort=10"), "groups"),
    ],
)  # fmt: skip
def test_fewer_sites_than_hide_an_update_are_refused(overrides: tuple[str, ...], name: str) -> None:
    assert _codes(_simulation(_MASKED, *overrides)) == [
        ("LF1059", f"privacy.secure_aggregation.{name}")
    ]
    assert _simulation(*overrides) == [], "without it they may be as few as they like"


@pytest.mark.parametrize(
    "overrides",
    [
        ("sites.count=3",),
        ("sites.count=6", "rounds.fraction=0.5"),
        ("sites.count=24", "privacy.secure_aggregation.groups=3"),
        ("sites.count=30", "privacy.secure_aggregation.groups=3",
         "privacy.secure_aggregation.min_cohort=10"),
    ],
)  # fmt: skip
def test_as_many_sites_as_hide_an_update_are_enough(overrides: tuple[str, ...]) -> None:
    assert _simulation(_MASKED, *overrides) == []
