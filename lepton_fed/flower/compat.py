"""The private names of flwr that lepton-fed relies on, and nothing else.

They hold for flwr 1.41; tests/unit/flower/test_compat_contract.py checks each, and fails first when
flwr changes them.
"""

from __future__ import annotations

from flwr.app import Message
from flwr.app.exception import AppExitException
from flwr.supercore.task_identity import TaskIdentity

__all__ = ["COORDINATOR_NODE", "AppExitException", "set_identity", "set_message_id"]

COORDINATOR_NODE = 1
"""Node id of the ServerApp's own end."""


def set_identity(run_id: int, node_id: int) -> None:
    """Say who writes the messages made in this process.

    ``Message(...)`` reads a process-wide identity that a Flower task process normally sets; outside
    of one it raises.

    Args:
        run_id: Flower's number of the run.
        node_id: Flower's number of the node.
    """
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = node_id
    TaskIdentity.task_id = 1


def set_message_id(message: Message, message_id: str) -> None:
    """Give a message the id that the SuperLink would give it."""
    message.metadata.__dict__["_message_id"] = message_id
