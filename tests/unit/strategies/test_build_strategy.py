from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lepton_fed.config import plugins
from lepton_fed.config.schema import StrategyConf
from lepton_fed.errors import ConfError, TaskError
from lepton_fed.strategies.build import build_strategy
from lepton_fed.strategies.fedavg import fedavg
from lepton_fed.strategies.fedprox import fedprox


def test_a_strategy_is_built_by_name_with_its_arguments() -> None:
    assert build_strategy(StrategyConf()) == fedavg()
    conf = StrategyConf("fedprox", {"mu": 1, "server_learning_rate": 0.5})
    assert build_strategy(conf) == fedprox(1.0, 0.5)


@pytest.mark.parametrize(
    ("conf", "key"),
    [
        (StrategyConf("fedavgg"), "strategy.arguments"),
        (StrategyConf("fedprox", {"mu": -1.0}), "strategy.arguments.mu"),
        (StrategyConf("flower", {"strategy": "FedSGD"}), "strategy.arguments.strategy"),
        (StrategyConf("flower", {}), "strategy.arguments.strategy"),
    ],
)
def test_a_conf_that_does_not_fit_is_a_located_error(conf: StrategyConf, key: str) -> None:
    with pytest.raises(ConfError) as caught:
        build_strategy(conf)
    assert [problem.key for problem in caught.value.problems] == [key]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Put one plug-in in the place of all."""
    return lambda plugin: monkeypatch.setattr(plugins, "load", lambda *_, **__: plugin)


def test_arguments_that_a_strategy_refuses_itself_are_a_located_error(installed: Any) -> None:
    def picky(rate: float = 1.0) -> None:
        raise ValueError(f"rate {rate} does not go with this")

    installed(picky)
    with pytest.raises(TaskError) as caught:
        build_strategy(StrategyConf("picky", {"rate": 3}))
    (problem,) = caught.value.problems
    assert (problem.code, problem.key) == ("LF3007", "strategy.arguments")
    assert problem.what == "rate 3.0 does not go with this"


def test_a_plug_in_that_makes_something_else_is_named(installed: Any) -> None:
    installed(lambda: "fedavg")
    with pytest.raises(TaskError, match="strategy 'odd' is a str, not a Strategy") as caught:
        build_strategy(StrategyConf("odd"))
    assert caught.value.code == "LF3008"
