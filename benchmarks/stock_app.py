"""The app that stock Flower runs in `benchmarks.federation`: FedAvg of a model that nobody trains.

It is sent to stock Flower by itself, as a user's app is, so it imports nothing of this project. An
update differs by site and round, since equal bytes would not be sent again.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

__all__ = ["client", "server"]

client = ClientApp()
server = ServerApp()


class InTurn(FedAvg):
    """Flower's FedAvg, which waits for its turn before each round and tells how long it took.

    Args:
        sites: How many there are.
        line: Gives a byte for each turn; takes a line for each round.
    """

    def __init__(self, sites: int, line: socket.socket) -> None:
        super().__init__(
            fraction_evaluate=0.0, min_train_nodes=sites, min_available_nodes=sites
        )  # fmt: skip
        self._line = line
        self._started = 0.0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Wait for the turn and begin the round."""
        if not self._line.recv(1):
            raise ConnectionError("nobody gives turns any more")
        self._started = time.monotonic()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """End the round and tell how long it took; one that lacks an update does not count."""
        replies = list(replies)
        whole = len(replies) == self.min_train_nodes and all(r.has_content() for r in replies)
        found = super().aggregate_train(server_round, replies)
        seconds = time.monotonic() - self._started
        self._line.sendall(f"{seconds if whole else float('nan')}\n".encode())
        return found


@server.main()
def serve(grid: Grid, context: Context) -> None:
    """Run the rounds."""
    settings = context.run_config
    sites, floats = int(settings["sites"]), int(settings["floats"])
    while len(list(grid.get_node_ids())) < sites:
        time.sleep(0.5)
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(str(settings["turns"]))
        initial = ArrayRecord({"model": Array(np.zeros(floats, np.float32))})
        InTurn(sites, line).start(grid, initial, num_rounds=int(settings["rounds"]))


@client.train()
def train(message: Message, context: Context) -> Message:
    """Return an update that no other site sends, and not this one in another round."""
    model = message.content.array_records["arrays"]["model"].numpy()
    number = int(str(message.content.config_records["config"]["server-round"]))
    generator = np.random.default_rng((int(context.node_config["site"]), number))
    moved = model + 1e-3 * generator.standard_normal(model.size, dtype=np.float32)
    content = RecordDict(
        {
            "arrays": ArrayRecord({"model": Array(moved.astype(np.float32))}),
            "metrics": MetricRecord({"num-examples": 1}),
        }
    )
    return Message(content, reply_to=message)
