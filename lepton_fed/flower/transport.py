"""Asks and replies over a Flower Grid, in terms of sites' names."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import TypeVar

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from lepton_fed.core.exchange import Ask, Reply, legible
from lepton_fed.errors import Problem, UpdateRefused
from lepton_fed.flower.compat import COORDINATOR_NODE
from lepton_fed.flower.grid import InProcessGrid
from lepton_fed.flower.records import (
    ask_to_record,
    record_to_ask,
    record_to_reply,
    reply_to_record,
)

__all__ = ["SITE", "GridTransport", "client_app", "run_in_process", "server_app"]

SITE = "site"
"""Key of a node's config that holds the site's name."""

_POLL_S = 0.2

Result = TypeVar("Result")


class GridTransport:
    """Asks sites over a Grid and hands their replies on as they come, one at a time.

    A reply counts only from the site it was asked of: it is matched by the id of the message it
    answers, never by what it says of itself.

    Args:
        grid: The Grid.
        nodes: Node id of each site, by name.
        sleep: Waits between two looks for replies, seconds.
        clock: Tells seconds that never go back.
    """

    def __init__(
        self,
        grid: Grid,
        nodes: Mapping[str, int],
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._grid = grid
        self._nodes = dict(nodes)
        self._sleep = sleep
        self._clock = clock

    def sites(self) -> Sequence[str]:
        """Return the names of the sites that are online."""
        online = set(self._grid.get_node_ids())
        return sorted(name for name, node in self._nodes.items() if node in online)

    def exchange(self, asks: Mapping[str, Ask], patience_s: float | None = None) -> Iterator[Reply]:
        """Ask sites and yield their replies as they come.

        Args:
            asks: What is asked of each site, by name; the records of one ask are made once,
                however many sites it goes to.
            patience_s: Seconds after which a site that has not answered is given up; None waits.
        """
        until = None if patience_s is None else self._clock() + patience_s
        contents = {id(ask): ask_to_record(ask) for ask in asks.values()}
        messages = [
            self._grid.create_message(
                contents[id(ask)],
                "train" if ask.train else "evaluate",
                self._nodes[site],
                str(ask.round_number),
            )
            for site, ask in asks.items()
        ]
        waiting: dict[str, str] = {}
        for site, pushed in zip_longest(asks, self._grid.push_messages(messages)):
            if pushed:
                waiting[pushed] = site
            else:  # a Grid has no id for a message that it could not send
                problem = Problem("LF5304", "the ask could not be sent", where=site)
                yield Reply(site, refusal=problem)
        while waiting:
            answered = False
            for message_id, site in list(waiting.items()):
                for message in self._grid.pull_messages([message_id]):
                    if message.metadata.reply_to_message_id != message_id:
                        continue
                    if waiting.pop(message_id, None) is not None:
                        answered = True
                        yield _reply(site, message)
            if waiting and not answered:
                if until is not None and self._clock() >= until:
                    break
                self._sleep(_POLL_S)
        for site in waiting.values():
            yield Reply(site, refusal=Problem("LF5306", "no reply in time", where=site))


def _reply(site: str, message: Message) -> Reply:
    if message.has_error():
        what = legible(message.error.reason or "the site's app failed", 200)
        return Reply(site, refusal=Problem("LF5303", what, where=site))
    try:
        return record_to_reply(site, message.content)
    except UpdateRefused as error:
        return Reply(site, refusal=error.problems[0])


def client_app(answer: Callable[[str, Ask], Reply]) -> ClientApp:
    """Return a ClientApp that answers asks.

    Args:
        answer: From a site's name and an ask to its reply.
    """
    app = ClientApp()

    def handle(message: Message, context: Context) -> Message:
        reply = answer(str(context.node_config[SITE]), record_to_ask(message.content))
        return Message(reply_to_record(reply), reply_to=message)

    app.train()(handle)
    app.evaluate()(handle)
    return app


def server_app(run: Callable[[Grid], None]) -> ServerApp:
    """Return a ServerApp whose main function is ``run``."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        del context
        run(grid)

    return app


def run_in_process(
    sites: Sequence[str],
    answer: Callable[[str, Ask], Reply],
    run: Callable[[GridTransport], Result],
) -> Result:
    """Run a ServerApp against a ClientApp in this process and return what ``run`` returns.

    Args:
        sites: Names of the sites.
        answer: From a site's name and an ask to its reply.
        run: The coordinator's part, given a transport that reaches the sites.
    """
    grid = InProcessGrid(client_app(answer), [{SITE: site} for site in sites])
    nodes = dict(zip(sites, grid.get_node_ids(), strict=True))
    results: list[Result] = []
    app = server_app(lambda grid: results.append(run(GridTransport(grid, nodes))))
    app(grid, Context(1, COORDINATOR_NODE, {}, RecordDict(), {}))
    return results[0]
