"""The arguments of everything a conf names, checked against the signatures of the plug-ins.

Apart from :mod:`.rules` because it imports the plug-ins, and with them PyTorch: seconds instead of
milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from lepton_fed.config import plugins
from lepton_fed.config.load import Loaded
from lepton_fed.config.plugins import Group
from lepton_fed.config.schema import ClientConf, ServerConf, SimulationConf
from lepton_fed.errors import Problem

__all__ = ["GIVEN", "plugin_problems"]

GIVEN: Final[dict[Group, tuple[str, ...]]] = {
    "strategies": (),
    "models": ("shape", "outputs"),
    "readers": ("contract", "path", "with_target"),
    "partitioners": ("dataset", "sites", "generator", "contract"),
}
"""What the program passes to the plug-ins of each group itself; a conf may not set it."""


def plugin_problems(loaded: Loaded[Any]) -> list[Problem]:
    """Return what is wrong with the arguments of a conf's plug-ins, with places.

    Args:
        loaded: A loaded conf of any kind.
    """
    return [
        loaded.located(problem)
        for group, name, arguments, key in _uses(loaded.conf)
        for problem in plugins.check(group, name, arguments, given=GIVEN[group], key=key)
    ]


def _uses(conf: object) -> Iterator[tuple[Group, str, dict[str, Any], str]]:
    if isinstance(conf, (SimulationConf, ServerConf)):
        model, strategy = conf.task.model, conf.strategy
        yield "models", model.name, model.arguments, "task.model.arguments"
        yield "strategies", strategy.name, strategy.arguments, "strategy.arguments"
    if isinstance(conf, SimulationConf):
        source, partition = conf.sites.source, conf.sites.partition
        yield "readers", source.reader, source.arguments, "sites.source.arguments"
        yield "partitioners", partition.name, partition.arguments, "sites.partition.arguments"
    if isinstance(conf, ClientConf):
        yield "readers", conf.source.reader, conf.source.arguments, "source.arguments"
