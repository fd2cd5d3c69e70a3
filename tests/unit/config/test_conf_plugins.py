"""Plug-ins: found by entry points, their arguments checked against their signatures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Annotated, Any, Literal

import pytest

from lepton_fed.config import plugins
from lepton_fed.config.load import load_values
from lepton_fed.config.plugin_checks import GIVEN, plugin_problems
from lepton_fed.config.schema import ClientConf, SimulationConf
from lepton_fed.core.settings import Setting, setting
from lepton_fed.errors import ConfError, MissingExtra, Problem


def build(
    shape: tuple[int, ...],
    outputs: int,
    width: int,
    rate: float = 0.5,
    kind: Literal["relu", "tanh"] = "relu",
    sizes: list[int] | None = None,
    bias: bool = True,
    name: str = "x",
    window: tuple[float, float] = (0.0, 1.0),
    drop: Annotated[float, Setting("Share that is dropped.", at_least=0, below=1)] = 0.0,
) -> dict[str, Any]:
    """Return what it was given.

    Args:
        shape: Shape of an example.
        outputs: Number of outputs.
        width: Width of the
            layer: in units.
        rate: A rate.
    """
    return dict(locals())


@dataclass(frozen=True)
class Rule:
    """A plug-in that is a dataclass."""

    mu: float = setting(0.1, "Strength of the pull.", at_least=0)
    note: str = ""


def unresolved(width: NotImported, rate: float) -> object:  # type: ignore[name-defined]  # noqa: F821
    """Name a type that does not exist at run time."""
    return width, rate


def open_ended(path: str, **others: object) -> dict[str, object]:
    """Take any argument."""
    return {"path": path, **others}


number = 5

_HERE = __name__


def _point(name: str, value: str) -> EntryPoint:
    return EntryPoint(name=name, value=value, group="lepton_fed.models")


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        _point(name, f"{_HERE}:{name}")
        for name in ("build", "Rule", "unresolved", "open_ended", "number", "absent")
    ]
    points += [
        _point("gone", "no_such_package.models:gone"),
        _point("twice", f"{_HERE}:build"),
        _point("twice", f"{_HERE}:Rule"),
        _point("builtin", "builtins:dict"),
        _point("needy", f"{_HERE}:NEEDY.build"),
    ]
    monkeypatch.setattr(
        plugins, "entry_points", lambda group: points if group[-6:] == "models" else []
    )


class _Needy:
    @property
    def build(self) -> object:
        raise MissingExtra("timm", "timm")


NEEDY = _Needy()

_GIVEN = {"shape": (1, 8, 8), "outputs": 10}


def test_a_wrong_type_comes_with_advice() -> None:
    (problem,) = plugins.check("models", "build", {"width": 3, "bias": "yes"}, given=_GIVEN)
    assert problem.remedy == "write true or false"
    (problem,) = plugins.check("models", "build", {"width": 3, "kind": "x"}, given=_GIVEN)
    assert problem.remedy == "write relu or tanh"


def _check(
    name: str, given: Sequence[str] = (), /, **arguments: object
) -> list[tuple[str, str, str]]:
    found = plugins.check("models", name, arguments, given=given, key="model.arguments")
    return [(problem.code, problem.key, problem.what) for problem in found]


def test_names_are_sorted_and_nothing_is_imported() -> None:
    assert plugins.names("models") == [
        "Rule", "absent", "build", "builtin", "gone", "needy", "number", "open_ended", "twice",
        "unresolved",
    ]  # fmt: skip
    assert plugins.names("readers") == []


def test_a_plugin_is_called_with_the_users_and_the_programs_arguments() -> None:
    made = plugins.call("models", "build", {"width": 3, "rate": 1}, **_GIVEN)
    assert (made["shape"], made["outputs"], made["width"]) == ((1, 8, 8), 10, 3)
    assert type(made["rate"]) is float


def test_leading_arguments_are_given_by_position() -> None:
    made = plugins.call("models", "build", {"width": 3}, (1, 8, 8), 10)
    assert (made["shape"], made["outputs"]) == ((1, 8, 8), 10)
    with pytest.raises(ConfError, match="`shape` is set by the program"):
        plugins.call("models", "build", {"width": 3, "shape": [1]}, (1, 8, 8), 10)


def test_a_list_becomes_the_tuple_that_the_signature_wants() -> None:
    made = plugins.call("models", "build", {"width": 3, "window": [1, 2]}, **_GIVEN)
    assert made["window"] == (1.0, 2.0)


def test_all_problems_of_the_arguments_are_raised_together() -> None:
    wrong = {"widht": 3, "rate": True, "kind": "rleu", "sizes": [1, "x"], "outputs": 4, "drop": 1}
    with pytest.raises(ConfError) as caught:
        plugins.call("models", "build", wrong, key="model.arguments", **_GIVEN)
    assert [(problem.code, problem.key) for problem in caught.value.problems] == [
        ("LF1023", "model.arguments.widht"),
        ("LF1025", "model.arguments.rate"),
        ("LF1025", "model.arguments.kind"),
        ("LF1025", "model.arguments.sizes"),
        ("LF1026", "model.arguments.outputs"),
        ("LF1025", "model.arguments.drop"),
    ]
    assert caught.value.problems[0].remedy.startswith("did you mean `width`?")
    assert caught.value.problems[5].remedy == "it must be at least 0, smaller than 1"


def test_a_missing_argument_is_named_with_its_type() -> None:
    (problem,) = plugins.check("models", "build", {}, given=["shape", "outputs"], key="m")
    assert (problem.code, problem.key) == ("LF1024", "m.width")
    assert problem.remedy == "give it: a whole number"


@pytest.mark.parametrize(
    "arguments",
    [
        {"width": 3},
        {"width": 3, "rate": 2},
        {"width": 3, "kind": "tanh"},
        {"width": 3, "sizes": None},
        {"width": 3, "sizes": [1, 2]},
        {"width": 3, "bias": False},
        {"width": 3, "drop": 0.5},
    ],
)
def test_what_fits_the_signature_is_let_through(arguments: dict[str, object]) -> None:
    assert _check("build", ["shape", "outputs"], **arguments) == []


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("width", True, "wants a whole number, not true"),
        ("width", 3.0, "wants a whole number, not 3.0"),
        ("width", None, "wants a whole number, not null"),
        ("width", "3", "wants a whole number, not the text '3'"),
        ("rate", "fast", "wants a number, not the text 'fast'"),
        ("bias", 1, "wants true or false, not 1"),
        ("bias", "yes", "wants true or false, not the text 'yes'"),
        ("name", 5, "wants text, not 5"),
        ("kind", "gelu", "wants relu or tanh, not the text 'gelu'"),
        ("sizes", 5, "wants a list of whole numbers, or null, not 5"),
        ("sizes", [True], "wants a list of whole numbers, or null, not a list of 1"),
        ("window", [1], "wants a list of numbers, not a list of 1"),
        ("drop", -1, "-1 is out of range"),
    ],
)
def test_a_wrong_type_says_what_was_given_and_what_is_wanted(
    name: str, value: object, what: str
) -> None:
    found = _check("build", ["shape", "outputs"], **{"width": 3, name: value})
    assert found == [("LF1025", f"model.arguments.{name}", what)]


def test_a_dataclass_is_a_plugin_with_its_own_bounds() -> None:
    assert plugins.call("models", "Rule", {"mu": 2}) == Rule(mu=2.0)
    assert _check("Rule", mu=-1) == [("LF1025", "model.arguments.mu", "-1 is out of range")]


def test_a_hint_that_does_not_resolve_does_not_take_the_others_along() -> None:
    assert _check("unresolved", width=object, rate="x") == [
        ("LF1025", "model.arguments.rate", "wants a number, not the text 'x'")
    ]


def test_a_plugin_may_take_any_argument() -> None:
    made = plugins.call("models", "open_ended", {"a": 1}, path="p")
    assert made == {"path": "p", "a": 1}


def test_an_unknown_name_is_answered_with_the_nearest_and_all() -> None:
    with pytest.raises(ConfError) as caught:
        plugins.load("models", "biuld", key="task.model.name")
    (problem,) = caught.value.problems
    assert (problem.code, problem.key) == ("LF1021", "task.model.name")
    assert problem.what == "no model 'biuld' is installed"
    assert problem.remedy.startswith("did you mean `build`? installed models: Rule, absent, build")


def test_a_group_without_plugins_says_so() -> None:
    problem = plugins.unknown("readers", "csv")
    assert problem is not None
    assert problem.remedy == "installed readers: none"


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("gone", "of package no_such_package.models cannot be imported: ModuleNotFoundError"),
        ("absent", "cannot be imported: AttributeError"),
        ("number", "is no callable"),
        ("twice", "more than one package brings a model 'twice'"),
    ],
)
def test_a_broken_plugin_is_named_with_its_package_and_the_reason(name: str, what: str) -> None:
    with pytest.raises(ConfError) as caught:
        plugins.load("models", name, key="task.model.name")
    (problem,) = caught.value.problems
    assert (problem.code, problem.key) == ("LF1022", "task.model.name")
    assert what in problem.what
    assert problem.remedy
    assert plugins.check("models", name, {}, key="task.model.name") == [problem]


def test_a_plugin_without_a_signature_is_named() -> None:
    ((code, _, what),) = _check("builtin")
    assert (code, what[:33]) == ("LF1022", "model 'builtin' tells no signatur")


def test_an_argument_that_the_plugin_does_not_take_is_its_authors_fault() -> None:
    ((code, _, what),) = _check("Rule", ["shape"])
    assert code == "LF1022"
    assert what == "model 'Rule' does not take the argument `shape` that it is given"


def test_a_plugin_that_needs_an_extra_says_which() -> None:
    assert _check("needy") == [("LF6001", "", "this needs timm, which is not installed")]


def test_arguments_are_listed_with_what_the_docstring_says() -> None:
    found = {a.name: a for a in plugins.arguments_of("models", "build", given=["shape"])}
    assert "shape" not in found
    assert found["width"].doc == "Width of the layer: in units."
    assert found["rate"].doc == "A rate."
    assert found["width"].required
    assert found["drop"].doc == "Share that is dropped."
    assert found["kind"].default == "relu"


def _simulation(*overrides: str) -> list[Problem]:
    values = {
        "task": {"data": {"kind": "image", "shape": [1, 8, 8], "target": {"classes": ["a", "b"]}}},
        "sites": {"source": {"reader": "digits"}},
    }
    loaded = load_values(SimulationConf, values, overrides)
    return plugin_problems(loaded)


@pytest.fixture
def _really_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()


@pytest.mark.usefixtures("_really_installed")
def test_the_arguments_of_a_conf_are_checked_where_they_were_written() -> None:
    overrides = (
        "task.model={name: mlp, arguments: {hiden: [3], activation: selu}}",
        "strategy={name: fedprox, arguments: {mu: strong}}",
    )
    found = [(problem.code, problem.key) for problem in _simulation(*overrides)]
    assert found[:3] == [
        ("LF1023", "task.model.arguments.hiden"),
        ("LF1025", "task.model.arguments.activation"),
        ("LF1025", "strategy.arguments.mu"),
    ]
    assert all(p.where.startswith("command line: ") for p in _simulation(*overrides)[:3])


@pytest.mark.usefixtures("_really_installed")
@pytest.mark.parametrize("group", ["models", "readers", "partitioners"])
def test_every_plugin_that_is_shipped_takes_what_the_program_gives(group: plugins.Group) -> None:
    for name in plugins.names(group):
        plugin_arguments = plugins.arguments_of(group, name)
        missing = set(GIVEN[group]) - {argument.name for argument in plugin_arguments}
        assert not missing, f"{group} {name} does not take {missing}"


@pytest.mark.usefixtures("_really_installed")
def test_the_reader_of_a_client_conf_is_checked() -> None:
    loaded = load_values(ClientConf, {"source": {"reader": "digits", "arguments": {"zzz": 1}}})
    found = [(problem.code, problem.key) for problem in plugin_problems(loaded)]
    assert found == [("LF1023", "source.arguments.zzz")]
