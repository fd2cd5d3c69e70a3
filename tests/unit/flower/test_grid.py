"""ClientApps and strategies of flwr run on the in-process Grid as they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp.strategy import FedAvg

from lepton_fed.flower.grid import InProcessGrid

NODES = 3


def rows(part: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    rng = np.random.default_rng(part)
    inputs = rng.normal(size=(10 * (part + 1), 2))
    return inputs, inputs @ [1.0, -2.0] + 0.1 * rng.normal(size=len(inputs))


def step(weights: np.ndarray[Any, Any], part: int) -> np.ndarray[Any, Any]:
    inputs, targets = rows(part)
    return weights - 0.1 * inputs.T @ (inputs @ weights - targets) / len(targets)


def regression(fails: tuple[int, ...] = ()) -> ClientApp:
    """A ClientApp as flwr's own tutorials write it: one step of linear regression in numpy."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        part = int(context.node_config["partition-id"])
        if part in fails:
            raise ValueError("row 7 of patient Smith is broken")
        weights = message.content["arrays"].to_numpy_ndarrays()[0]
        arrays = ArrayRecord({"w": Array(step(weights, part))})
        metrics = MetricRecord({"num-examples": len(rows(part)[1])})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        inputs, targets = rows(int(context.node_config["partition-id"]))
        weights = message.content["arrays"].to_numpy_ndarrays()[0]
        loss = float(np.square(inputs @ weights - targets).mean())
        metrics = MetricRecord({"num-examples": len(targets), "loss": loss})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def grid_of(app: ClientApp, nodes: int = NODES) -> InProcessGrid:
    return InProcessGrid(app, [{"partition-id": part} for part in range(nodes)])


def averaged(parts: list[int], rounds: int) -> np.ndarray[Any, Any]:
    weights = np.zeros(2)
    for _ in range(rounds):
        counts = [len(rows(part)[1]) for part in parts]
        weights = np.average([step(weights, part) for part in parts], axis=0, weights=counts)
    return weights


def test_a_stock_strategy_runs_a_stock_app_unchanged() -> None:
    initial = ArrayRecord({"w": Array(np.zeros(2))})
    result = FedAvg().start(grid=grid_of(regression()), initial_arrays=initial, num_rounds=30)
    found = result.arrays.to_numpy_ndarrays()[0]
    np.testing.assert_allclose(found, averaged([0, 1, 2], 30), rtol=1e-12)
    np.testing.assert_allclose(found, [1, -2], atol=0.2)
    losses = [float(result.evaluate_metrics_clientapp[r]["loss"]) for r in range(1, 31)]
    assert losses[-1] < losses[0] / 10


def test_an_app_that_raises_costs_its_own_node_and_says_no_more_than_what_kind() -> None:
    initial = ArrayRecord({"w": Array(np.zeros(2))})
    grid = grid_of(regression(fails=(1,)))
    result = FedAvg().start(grid=grid, initial_arrays=initial, num_rounds=5)
    found = result.arrays.to_numpy_ndarrays()[0]
    np.testing.assert_allclose(found, averaged([0, 2], 5), rtol=1e-12)

    replies = ask(grid, "train", RecordDict({"arrays": initial}))
    assert [reply.has_error() for reply in replies] == [False, True, False]
    assert replies[1].error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert replies[1].error.reason == "ValueError"  # an exception's text may hold values of rows


def test_an_app_that_returns_no_message_costs_its_own_node() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Any:
        return None

    (reply,) = ask(grid_of(app, 1), "train", RecordDict())
    assert reply.has_error()


def ask(grid: InProcessGrid, kind: str, content: RecordDict) -> list[Message]:
    """Send one RecordDict to all nodes, as strategies do."""
    nodes = grid.get_node_ids()
    return grid.send_and_receive([grid.create_message(content, kind, node, "1") for node in nodes])


def test_nodes_have_ids_configs_and_a_memory_of_their_own() -> None:
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        seen = context.state.get("seen")
        times = (seen["times"] if isinstance(seen, ConfigRecord) else 0) + 1
        context.state["seen"] = ConfigRecord({"times": times})
        about = {"node": context.node_id, "part": context.node_config["part"], "times": times}
        return Message(RecordDict({"about": ConfigRecord(about)}), reply_to=message)

    grid = InProcessGrid(app, [{"part": "x"}, {"part": "y"}])
    assert grid.get_node_ids() == [2, 3]
    ask(grid, "query", RecordDict())
    node = grid.get_node_ids()[0]
    grid.send_and_receive([grid.create_message(RecordDict(), "query", node, "1")])
    found = [dict(reply.content["about"]) for reply in ask(grid, "query", RecordDict())]
    assert found == [
        {"node": 2, "part": "x", "times": 3},
        {"node": 3, "part": "y", "times": 2},
    ]


def spoiling(returned: RecordDict | None = None) -> ClientApp:
    """An app that tells what it got and then changes all of it."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        arrays, config = message.content["arrays"], message.content["config"]
        seen = {
            "data": arrays["w"].data,
            "names": sorted(arrays),
            "list": list(config["list"]),
            "round": config["round"],
            "metric": list(message.content["metrics"]["m"]),
        }
        arrays["w"].data = b"spoilt"
        arrays["more"] = arrays["w"]
        config["list"].append(9)
        config["round"] = 99
        message.content["metrics"]["m"].append(9.0)
        message.content["new"] = ConfigRecord()
        content = returned or RecordDict({"seen": ConfigRecord(seen)})
        return Message(content, reply_to=message)

    return app


def shared_content() -> RecordDict:
    return RecordDict(
        {
            "arrays": ArrayRecord({"w": Array("float32", (1,), "raw", b"abcd")}),
            "config": ConfigRecord({"list": [1, 2], "round": 1}),
            "metrics": MetricRecord({"m": [0.5]}),
        }
    )


def test_records_that_strategies_share_between_messages_are_each_nodes_own() -> None:
    content = shared_content()
    replies = ask(grid_of(spoiling()), "train", content)
    for reply in replies:
        assert dict(reply.content["seen"]) == {
            "data": b"abcd",
            "names": ["w"],
            "list": [1, 2],
            "round": 1,
            "metric": [0.5],
        }
    assert content == shared_content()


def test_a_reply_that_an_app_keeps_is_not_changed_by_who_receives_it() -> None:
    kept = shared_content()
    for reply in ask(grid_of(spoiling(kept)), "train", shared_content()):
        assert reply.content == shared_content()
        del reply.content["arrays"]["w"]
        reply.content["config"]["list"].clear()
    assert kept == shared_content()


def test_an_app_runs_when_its_reply_is_pulled_and_once() -> None:
    ran: list[int] = []
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        ran.append(context.node_id)
        return Message(RecordDict(), reply_to=message)

    grid = grid_of(app)
    messages = [
        grid.create_message(RecordDict(), "train", node, "1") for node in grid.get_node_ids()
    ]
    ids = grid.push_messages(messages)
    assert len(set(ids)) == NODES
    assert ran == []
    (reply,) = grid.pull_messages([ids[1]])
    assert ran == [3]
    assert reply.metadata.reply_to_message_id == ids[1]
    assert reply.metadata.src_node_id == 3
    assert list(grid.pull_messages([ids[1]])) == []
    first = next(iter(grid.pull_messages([*ids, "unknown"])))
    assert (first.metadata.reply_to_message_id, ran) == (ids[0], [3, 2])
    assert list(grid.drop_messages([*ids, "unknown"])) == [ids[2]]
    assert sorted(ran) == [2, 3, 4]


@pytest.mark.parametrize(("kind", "node"), [("evaluate", 2), ("train", 99)])
def test_what_nobody_answers_is_an_error_reply(kind: str, node: int) -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(RecordDict(), reply_to=message)

    grid = grid_of(app, 1)
    (reply,) = grid.send_and_receive([grid.create_message(RecordDict(), kind, node, "1")])
    assert reply.has_error()


def test_a_grid_in_one_process_knows_no_superlink() -> None:
    grid = grid_of(ClientApp(), 1)
    grid.set_run(object())
    assert grid.run is None
