"""From the name in a conf to a strategy."""

from __future__ import annotations

from lepton_fed.config import plugins
from lepton_fed.config.schema import StrategyConf
from lepton_fed.errors import Problem, TaskError
from lepton_fed.strategies.base import Strategy

__all__ = ["build_strategy"]


def build_strategy(conf: StrategyConf) -> Strategy:
    """Return the strategy that a conf names.

    Args:
        conf: Name and arguments.

    Raises:
        ConfError: It is not installed, or does not take these arguments.
        TaskError: It refuses its arguments, or is no strategy.
    """
    key = "strategy.arguments"
    try:
        built = plugins.call("strategies", conf.name, conf.arguments, key=key)
    except ValueError as error:
        raise TaskError(
            Problem("LF3007", str(error), key=key, remedy=f"lepton-fed config explain {key}")
        ) from error
    if not isinstance(built, Strategy):
        raise TaskError(
            Problem(
                "LF3008",
                f"strategy {conf.name!r} is a {type(built).__name__}, not a Strategy",
                key="strategy.name",
                remedy="tell the author of the strategy",
            )
        )
    return built
