"""A stock ``flwr.serverapp.strategy`` object as the server half of a strategy.

The round loop, selection and admission stay lepton-fed's: replies are checked before the stock
strategy sees them, so a NaN or a negative weight never reaches it. It needs single updates, so it
refuses secure aggregation, and it sums floats, in the order of the sites' names. Only its server
half is used: what a stock strategy expects of a ClientApp (FedProx's term, say) is a site rule
here.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import flwr.serverapp.strategy as stock_strategies
import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Strategy as FlowerStrategy

from lepton_fed.core.layout import Vector
from lepton_fed.errors import ConfError, Problem, Refused, RunError
from lepton_fed.flower.compat import COORDINATOR_NODE, AppExitException
from lepton_fed.flower.grid import InProcessGrid
from lepton_fed.strategies.base import (
    DELTA,
    Each,
    Needs,
    PlainSite,
    ServerState,
    Stateless,
    Strategy,
    Sum,
)

__all__ = ["StockServer", "flower", "from_flower"]

_log = logging.getLogger("lepton_fed.strategy")

_DP = "DifferentialPrivacy"
_UNFIT = ("FedXgb", _DP)  # trees, not vectors; noise that can be seeded
_LINEAR = frozenset({"FedAdagrad", "FedAdam", "FedAvg", "FedAvgM", "FedYogi"})
"""Those that make the weighted mean first, and of it the model."""

_SLICE = 1 << 14  # elements of the mean that are in double precision at a time
_ARRAYS = "arrays"
_MODEL = "model"


@dataclass(frozen=True)
class StockServer(Stateless):
    """Hands admitted updates to a stock strategy and takes its model.

    Args:
        strategy: The stock strategy. It keeps its own state between rounds in its attributes; each
            round works on a copy of it that is given the state and asked for it afterwards, so
            that a checkpoint holds it. Kept are numbers and arrays, also in lists, dicts and
            ArrayRecords.
        weight_key: Name under which it looks for a reply's weight.
    """

    strategy: FlowerStrategy
    weight_key: str = "num-examples"
    needs: Needs = "each"

    def step(
        self, state: ServerState, model: Vector, aggregate: Sum | Each
    ) -> tuple[ServerState, Vector]:
        """Return the model that the stock strategy makes of the round's updates.

        Raises:
            RunError: It wants something of the sites that they do not send.
        """
        if isinstance(aggregate, Sum) and type(self.strategy).__name__ not in _LINEAR:
            raise TypeError("this stock strategy needs single updates")
        strategy = copy.deepcopy(self.strategy)
        _restore(strategy, state)
        number, sites = aggregate.round_number, aggregate.contributors
        if len(sites) < _least_nodes(strategy, len(sites)):
            # It would wait for more nodes, for ever.
            _log.warning("strategy.below_minimum round=%s sites=%s", number, len(sites))
            return state, model
        grid = InProcessGrid(ClientApp(), [{} for _ in sites])
        # It may keep the model it sends (the server optimisers do), so it is asked to send it.
        asks = strategy.configure_train(number, _record(model), ConfigRecord(), grid)
        content = RecordDict({_ARRAYS: ArrayRecord()})
        by_node = {message.metadata.dst_node_id: message for message in asks}
        replies = []
        for node, (delta, weight) in enumerate(
            _updates(aggregate, model.size), COORDINATOR_NODE + 1
        ):
            ask = by_node.get(node) or Message(content, node, "train")
            moved = model + delta
            metrics = MetricRecord({self.weight_key: weight})
            records = RecordDict({_ARRAYS: _record(moved), "metrics": metrics})
            replies.append(Message(records, reply_to=ask))
        try:
            arrays, _ = strategy.aggregate_train(number, replies)
        except AppExitException as error:
            raise RunError(
                Problem("LF5305", f"{type(strategy).__name__} cannot aggregate: {error}",
                        key="strategy.arguments", remedy="another strategy, or other arguments")
            ) from error  # fmt: skip
        if arrays is None:
            return state, model
        moved = np.asarray(arrays[_MODEL].numpy(), dtype=np.float32).reshape(model.shape)
        return _state_of(strategy), moved


def from_flower(strategy: FlowerStrategy) -> Strategy:
    """Return a stock strategy object as a strategy of lepton-fed.

    Args:
        strategy: For example ``flwr.serverapp.strategy.FedAdam(eta=0.01)``.

    Raises:
        Refused: One of flwr's DP wrappers: its noise comes from numpy's global generator, which
            anybody in the process can seed, so it would be a protection in name only.
    """
    name = type(strategy).__name__
    if name.startswith(_DP):
        raise Refused(
            Problem("LF4303", f"the noise of flwr's {name} can be seeded, so it protects nothing",
                    remedy="privacy.record.enabled: true")
        )  # fmt: skip
    weight_key = getattr(strategy, "weighted_by_key", "num-examples")
    server = StockServer(strategy, weight_key)
    return Strategy(f"flower:{name}", PlainSite(), server, linear=name in _LINEAR)


def flower(strategy: str, arguments: dict[str, Any] | None = None) -> Strategy:
    """Return a stock strategy by name, for a conf.

    Args:
        strategy: Name of a class in ``flwr.serverapp.strategy``, for example ``FedAdam``.
        arguments: Its arguments.

    Raises:
        ConfError: There is no such strategy, or it refuses its arguments.
    """
    fits = not strategy.startswith(_UNFIT)
    found = getattr(stock_strategies, strategy, None) if fits else None
    key = "strategy.arguments"
    if not (isinstance(found, type) and issubclass(found, FlowerStrategy)):
        raise ConfError(
            Problem("LF1103", f"{strategy!r} is no strategy of flwr that averages models",
                    key=f"{key}.strategy",
                    remedy="a class of flwr.serverapp.strategy: FedAdam, FedYogi, FedMedian, ...")
        )  # fmt: skip
    try:
        return from_flower(found(**(arguments or {})))
    except (TypeError, ValueError) as error:
        raise ConfError(
            Problem("LF1104", f"{strategy} refuses its arguments: {error}", key=f"{key}.arguments")
        ) from error


def _updates(aggregate: Sum | Each, size: int) -> Iterator[tuple[Vector, float]]:
    """Yield each update with its weight; of a sum, the mean with the weight of all."""
    if isinstance(aggregate, Sum):
        mean = np.empty(size, np.float32)
        for start in range(0, size, _SLICE):
            part = slice(start, start + _SLICE)
            mean[part] = aggregate.read(DELTA, part)
        yield mean, aggregate.weight
        return
    for site in aggregate.contributors:
        yield aggregate.read(site, DELTA, slice(0, size)), aggregate.weight(site)


def _least_nodes(strategy: FlowerStrategy, nodes: int) -> int:
    """Return how many nodes a stock strategy waits for when there are ``nodes``."""
    inner = strategy
    least = [getattr(inner, name, 0) for name in ("min_available_nodes", "min_train_nodes")]
    return max(*least, int(nodes * getattr(inner, "fraction_train", 1.0)))


def _state_of(strategy: FlowerStrategy) -> ServerState:
    """Return the numbers and arrays among a stock strategy's attributes: ``name/kind[/key]``."""
    found: dict[str, npt.NDArray[np.generic]] = {}
    for name, value in vars(strategy).items():
        if isinstance(value, bool | int | float | np.generic):
            found[f"{name}/number"] = np.asarray(value)
        elif isinstance(value, np.ndarray):
            found[f"{name}/array"] = value
        elif isinstance(value, ArrayRecord):
            found |= {f"{name}/record/{key}": item.numpy() for key, item in value.items()}
        elif isinstance(value, dict) and _all_arrays(value.values()):
            found |= {f"{name}/dict/{key}": item for key, item in value.items()}
        elif isinstance(value, list) and _all_arrays(value):
            found |= {f"{name}/list/{index}": item for index, item in enumerate(value)}
    return found


def _restore(strategy: FlowerStrategy, state: ServerState) -> None:
    """Give a stock strategy the attributes that :func:`_state_of` returned."""
    several: dict[tuple[str, str], dict[str, npt.NDArray[np.generic]]] = {}
    for word, value in state.items():
        name, kind, *key = word.split("/", 2)
        if kind == "number":
            setattr(strategy, name, value.item())
        elif kind == "array":
            setattr(strategy, name, value)
        else:
            several.setdefault((name, kind), {})[key[0]] = value
    for (name, kind), items in several.items():
        if kind == "record":
            setattr(strategy, name, ArrayRecord({k: Array(v) for k, v in items.items()}))
        elif kind == "dict":
            setattr(strategy, name, items)
        else:
            setattr(strategy, name, [items[str(index)] for index in range(len(items))])


def _all_arrays(values: Iterable[object]) -> bool:
    found = list(values)
    return bool(found) and all(isinstance(value, np.ndarray) for value in found)


def _record(vector: Vector) -> ArrayRecord:
    return ArrayRecord({_MODEL: Array(vector)})
