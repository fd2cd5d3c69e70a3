"""A Flower Grid that runs a ClientApp in this process: no SuperLink, no Ray.

ServerApps, ClientApps and strategies of flwr run on it unchanged. A site's app runs when its reply
is pulled, one after another, so that one reply is in memory at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from lepton_fed.flower.compat import COORDINATOR_NODE, set_identity, set_message_id

__all__ = ["InProcessGrid"]

_APP_FAILED = 2  # flwr's code for an exception in a ClientApp


class InProcessGrid(Grid):
    """Runs a ClientApp for each of several nodes in this process.

    Args:
        app: The ClientApp.
        node_configs: One node config a node; node ids follow :data:`COORDINATOR_NODE`.
        run_id: Flower's number of the run.
    """

    def __init__(
        self,
        app: ClientApp,
        node_configs: Iterable[Mapping[str, str | int | float | bool]],
        run_id: int = 1,
    ) -> None:
        self._app = app
        self._ids = itertools.count(1)
        self._waiting: dict[str, Message] = {}
        self._contexts = {
            node: Context(
                run_id=run_id,
                node_id=node,
                node_config=dict(config),
                state=RecordDict(),
                run_config={},
            )
            for node, config in enumerate(node_configs, start=COORDINATOR_NODE + 1)
        }
        set_identity(run_id, COORDINATOR_NODE)

    def set_run(self, run: object) -> None:
        """Do nothing: the run is this process."""
        del run

    @property
    def run(self) -> object:  # type: ignore[override]
        """Return nothing: there is no SuperLink that knows the run."""
        return None

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a message; see :meth:`flwr.serverapp.Grid.create_message`."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Return the node ids."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message], answer_bytes: int = 0) -> list[str]:
        """Take messages; each runs when its reply is pulled, however large that is."""
        del answer_bytes
        pushed = []
        for message in messages:
            message_id = f"message-{next(self._ids)}"
            set_message_id(message, message_id)
            self._waiting[message_id] = message
            pushed.append(message_id)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Run the app for each waiting message as its reply is taken."""
        for message_id in message_ids:
            if message_id in self._waiting:
                yield self._call(self._waiting.pop(message_id))

    def drop_messages(self, message_ids: Iterable[str]) -> list[str]:
        """Drop what is waiting, or came, of these messages; return the ids of those."""
        return [m.metadata.reply_to_message_id for m in self.pull_messages(message_ids)]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Push messages and return all replies; ``timeout`` has no meaning in one process."""
        del timeout
        return list(self.pull_messages(self.push_messages(messages)))

    def _call(self, message: Message) -> Message:
        # Strategies share one RecordDict between all messages, and an app may keep what it sends;
        # a network would have copied both.
        message.content = _own_records(message.content)
        try:
            reply = self._app(message, self._contexts[message.metadata.dst_node_id])
            if reply.has_content():
                reply.content = _own_records(reply.content)
        except Exception as error:  # noqa: BLE001 - as flwr's own runtime: the run goes on
            return Message(Error(_APP_FAILED, type(error).__name__), reply_to=message)
        return reply


def _own_records(content: RecordDict) -> RecordDict:
    """Return records of its own for one message; the arrays' bytes are shared, not copied."""
    copies: dict[str, ArrayRecord | ConfigRecord | MetricRecord] = {}
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            arrays = {k: Array(a.dtype, a.shape, a.stype, a.data) for k, a in record.items()}
            copies[name] = ArrayRecord(arrays)
            continue
        values: dict[str, Any] = {
            k: list(v) if isinstance(v, list) else v for k, v in record.items()
        }
        metric = isinstance(record, MetricRecord)
        copies[name] = MetricRecord(values) if metric else ConfigRecord(values)
    return RecordDict(copies)
