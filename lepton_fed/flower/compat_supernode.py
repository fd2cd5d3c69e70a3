"""What lepton-fed changes in a SuperNode of flwr: private names too, beside those of ``compat``.

They hold for flwr 1.41; tests/unit/flower/test_compat_contract.py checks each, and fails first when
flwr changes them. Each acts on the process that calls it.
"""

from __future__ import annotations

import inspect
import logging
import os
import signal
import threading
import time
import types
from collections.abc import Callable
from typing import Any

import httpx
from flwr.proto.runtime_pb2 import AcquireTaskResponse
from flwr.supercore.run import RunNotRunningException

__all__ = [
    "cap_retry_waits",
    "cap_supernode_polls",
    "drop_messages_of_ended_runs",
    "end_with_the_heartbeat",
    "hasten_heartbeats",
    "held",
    "retry_broken_handshakes",
    "run_supernode",
    "tell_refused_signatures",
]

_REPLY_LOOK_S = 0.02
_HOLD_S = 2.0


def cap_supernode_polls(seconds: float) -> None:
    """Let the SuperNode of this process look for messages at least this often (stock: 3 s).

    While a message is worked on it looks for the reply (stock: each 0.5 s), which is in its own
    memory; and only then is there a task, so that whoever asks for one is held until then.

    Args:
        seconds: Longest wait between two looks for messages.
    """
    from flwr.supernode import start_client_internal
    from flwr.supernode.servicer.runtime import runtime_handlers

    taken = threading.Event()

    def sleep(wanted: float) -> None:
        if wanted < 1:
            taken.set()
        time.sleep(min(wanted, _REPLY_LOOK_S if wanted < 1 else seconds))

    vars(start_client_internal)["time"] = types.SimpleNamespace(sleep=sleep)
    handlers = vars(runtime_handlers)
    handlers["acquire_task"] = held(handlers["acquire_task"], taken)


def held(
    acquire: Callable[..., AcquireTaskResponse], taken: threading.Event, hold_s: float = _HOLD_S
) -> Callable[..., AcquireTaskResponse]:
    """Return a handler of the SuperNode that lets whoever asks for a task wait until there is one.

    A SuperNode makes a task before it has stored the message that the task is about; whoever takes
    it in between loses the message. Here nobody is let through before both are there. Who asks has
    shown the site's secret before this is called.

    Args:
        acquire: Flower's handler.
        taken: Set while a message is whole and waits for its reply.
        hold_s: Seconds after which the answer is that there is none.
    """

    def acquire_when_whole(*arguments: Any, **settings: Any) -> AcquireTaskResponse:
        if not taken.wait(hold_s):
            return AcquireTaskResponse()
        taken.clear()
        return acquire(*arguments, **settings)

    return acquire_when_whole


def drop_messages_of_ended_runs() -> None:
    """Let the SuperNode of this process forget a message whose run ends while it is received.

    Stock leaves the task without its message, and whoever takes the task waits for ever. A
    coordinator that is started again ends the run that it had opened before, so this is no rarity.
    """
    from flwr.supernode import start_client_internal

    pull = vars(start_client_internal)["_pull_and_store_message"]
    signature = inspect.signature(pull)

    def failing(call: Callable[..., Any]) -> Callable[..., Any]:
        def call_or_fail(*arguments: Any, **settings: Any) -> Any:
            try:
                return call(*arguments, **settings)
            except RunNotRunningException as error:  # no Exception, so the clean-up passes it by
                raise InterruptedError("its run has ended") from error

        return call_or_fail

    def pull_or_forget(*arguments: Any, **settings: Any) -> Any:
        given = signature.bind(*arguments, **settings)
        for name in ("pull_object", "confirm_message_received"):  # once there is a task
            given.arguments[name] = failing(given.arguments[name])
        return pull(*given.args, **given.kwargs)

    vars(start_client_internal)["_pull_and_store_message"] = pull_or_forget


def hasten_heartbeats(interval_s: int) -> None:
    """Let the SuperNode of this process promise a heartbeat this often (stock: 30 s, least: 10 s).

    The SuperLink takes a SuperNode for online until twice that has passed without one, and refuses
    to let the same node in again meanwhile: so long is a killed one lost at least.
    """
    from flwr.supercore import heartbeat
    from flwr.supernode import fleet_http_connection

    vars(heartbeat)["HEARTBEAT_DEFAULT_INTERVAL"] = interval_s
    vars(fleet_http_connection)["HEARTBEAT_DEFAULT_INTERVAL"] = interval_s


def cap_retry_waits(seconds: int) -> None:
    """Let the SuperNode of this process try the coordinator at least this often (stock: 20 s)."""
    from flwr.supercore import heartbeat
    from flwr.supercore.retry import exponential, http_retry

    vars(http_retry)["MAX_RETRY_DELAY"] = seconds
    vars(heartbeat)["exponential"] = lambda max_delay: exponential(
        max_delay=min(max_delay, seconds)
    )


def retry_broken_handshakes() -> None:
    """Let the SuperNode of this process try again when a line is cut during a TLS handshake.

    Stock takes every error that names TLS for a wrong certificate and ends, though a router that
    resets connections, or a coordinator that is just being started, ends handshakes too: seconds
    without a line then cost as much as a killed SuperNode.
    """
    from flwr.supercore.retry import http_retry

    made = vars(http_retry)["RetryInvoker"]

    def lasting(**settings: Any) -> Any:
        gives_up = settings["should_giveup"]

        def gives_up_unless_cut(error: Exception) -> bool:
            cut = (
                isinstance(error, httpx.TransportError) and "certificate" not in str(error).lower()
            )
            return not cut and bool(gives_up(error))

        return made(**{**settings, "should_giveup": gives_up_unless_cut})

    vars(http_retry)["RetryInvoker"] = lasting


def end_with_the_heartbeat() -> None:
    """End the SuperNode of this process when its heartbeat ends of an error.

    Stock goes on without: the SuperLink then takes it for offline, and nobody asks it any more.
    """
    from flwr.supercore import log
    from flwr.supercore.heartbeat import HeartbeatSender

    beat = HeartbeatSender._run

    def run(self: HeartbeatSender) -> None:
        try:
            beat(self)
        except Exception as error:  # noqa: BLE001 - whatever it was, a new process starts afresh
            log(logging.ERROR, "The heartbeat ended: %s", error)
            os.kill(os.getpid(), signal.SIGTERM)

    HeartbeatSender._run = run  # type: ignore[method-assign]


def tell_refused_signatures(words: str) -> None:
    """Say so in the SuperNode's log when its signature was refused; stock ends without a word."""
    from flwr.supercore import log
    from flwr.supernode import fleet_http_connection
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    class Telling(NodeAuthHttpInterceptor):
        """Signs, and looks at the answer."""

        def intercept(self, context: Any, call_next: Callable[[Any], httpx.Response]) -> Any:
            """Sign and go on."""
            response = super().intercept(context, call_next)
            if response.status_code == httpx.codes.UNAUTHORIZED:
                log(logging.ERROR, words)
            return response

    vars(fleet_http_connection)["NodeAuthHttpInterceptor"] = Telling


def run_supernode() -> None:
    """Run ``flower-supernode`` in this process, with its arguments from ``sys.argv``."""
    from flwr.supernode.cli import flower_supernode

    flower_supernode()
