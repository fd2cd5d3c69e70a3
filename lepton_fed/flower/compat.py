"""The private names of flwr that lepton-fed relies on, and nothing else.

They hold for flwr 1.41; tests/unit/flower/test_compat_contract.py checks each, and fails first when
flwr changes them.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import types
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import httpx
from flwr.app import Context, Message
from flwr.app.exception import AppExitException
from flwr.common.constant import ErrorCode, SubStatus
from flwr.common.serde import (
    context_from_proto,
    context_to_proto,
    fab_to_proto,
    run_from_proto,
    user_config_to_proto,
)
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    RegisterNodeRequest,
    StartRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.grid import HttpGrid
from flwr.superlink.main import create_app
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

__all__ = [
    "COORDINATOR_NODE",
    "FLEET_PATH",
    "AppExitException",
    "Heartbeat",
    "PrivateGrid",
    "SecretHeader",
    "SiteTask",
    "acquire_site_task",
    "cap_retry_waits",
    "cap_supernode_polls",
    "control_client",
    "drop_messages_of_ended_runs",
    "end_with_the_heartbeat",
    "executor_client",
    "finish_server_task",
    "hasten_heartbeats",
    "hasten_pulls",
    "register_node",
    "registered_nodes",
    "run_supernode",
    "set_identity",
    "set_message_id",
    "start_run",
    "superlink_app",
    "take_server_task",
    "tell_refused_signatures",
    "unregister_node",
]

COORDINATOR_NODE = 1
"""Node id of the ServerApp's own end."""

FLEET_PATH = "/v1/fleet/"
"""Where the SuperLink answers SuperNodes; nothing else is for the public."""

_ACQUIRE = frozenset({"/flwr.proto.Runtime/AcquireTask"})
_HEARTBEAT_S = 10.0
_FIRST_LOOK_S = 0.05


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


class SecretHeader:
    """Adds a header to each request, without which the coordinator's own listener is silent."""

    def __init__(self, name: str, secret: str) -> None:
        self._name = name
        self._secret = secret

    def intercept(self, context: Any, call_next: Callable[[Any], httpx.Response]) -> httpx.Response:
        """Add the header and go on."""
        context.request.headers[self._name] = self._secret
        return call_next(context)


# --- the coordinator's end


def superlink_app(*, host: str, port: int, database: str, secret: bytes) -> Any:
    """Return a SuperLink as an ASGI app, in process isolation and with node authentication.

    Args:
        host: Address of the listener that is not the public one.
        port: Its port.
        database: SQLite file.
        secret: Without it nobody takes a task.
    """
    # TLS belongs to the listeners; `insecure` only says that this app has none of its own.
    config = SuperLinkLifespanConfig(
        control_address="",
        health_server_address=None,
        host=host,
        port=port,
        insecure=True,
        certificates=None,
        superexec_auth_secret=secret,
        authn_plugin=NoOpControlAuthnPlugin(),
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=True,
        fleet_api_type="grpc-rere",
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=None,
        ssl_certfile=None,
        ssl_keyfile=None,
        database=database,
        isolation="process",
        runtime_dependency_install=False,
    )
    return create_app(config, SuperLinkLifespan)


def control_client(address: str, header: SecretHeader) -> Any:
    """Return a client of the Control API at ``address``."""
    return ControlHttpClient.from_server_address(
        address,
        insecure=True,
        root_certificates=None,
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI"), header],
    )


def register_node(control: Any, public_key_pem: bytes, name: str) -> bool:
    """Enrol a node key; return False if it was taken off the register before, which is for good."""
    try:
        control.RegisterNode(RegisterNodeRequest(public_key=public_key_pem, name=name))
    except httpx.HTTPStatusError as error:
        if error.response.status_code == httpx.codes.PRECONDITION_FAILED:
            return False
        raise
    return True


def unregister_node(control: Any, node_id: int) -> None:
    """Take a node key off the register."""
    control.UnregisterNode(UnregisterNodeRequest(node_id=node_id))


def registered_nodes(control: Any) -> dict[int, tuple[bytes, str]]:
    """Return public key and status of each enrolled node, by node id."""
    found = control.ListNodes(ListNodesRequest()).nodes_info
    return {n.node_id: (n.public_key, n.status) for n in found if n.status != "unregistered"}


def start_run(control: Any, fab: bytes, digest: str) -> int:
    """Open a run and return Flower's number of it.

    Args:
        control: Client of the Control API.
        fab: The app that the run names; it holds no code.
        digest: Its SHA-256, hexadecimal.
    """
    request = StartRunRequest(
        fab=fab_to_proto(Fab(digest, fab, {})), override_config=user_config_to_proto({})
    )
    return int(control.StartRun(request).run_id)


def executor_client(address: str, secret: bytes, *more: Any) -> Any:
    """Return a client that may take tasks at ``address``."""
    protection = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=_ACQUIRE)
    return _runtime_client(address, "SuperExec", protection, *more)


def take_server_task(executor: Any) -> str:
    """Take the ServerApp task that waits and return its token; empty when none waits."""
    request = AcquireTaskRequest(supported_task_types=[str(TaskType.SERVER_APP)])
    return str(executor.AcquireTask(request).token)


class PrivateGrid(HttpGrid):
    """The ServerApp's Grid on the coordinator's own listener.

    Args:
        address: The listener.
        token: The task's.
        header: The secret that opens the listener.
    """

    def __init__(self, address: str, token: str, header: SecretHeader) -> None:
        super().__init__(address, insecure=True, token=token)
        self._header = header

    def _connect(self) -> None:
        self._client = _runtime_client(
            self._addr, "flwr-serverapp", RuntimeTokenHttpInterceptor(self._token), self._header
        )

    def begin(self) -> tuple[int, Context]:
        """Pull the task, become its author, and return Flower's run number and context."""
        found = self._runtime_client.PullTaskInput(PullTaskInputRequest())
        context = context_from_proto(found.context)
        set_identity(found.run.run_id, context.node_id)
        self.set_run(run_from_proto(found.run))
        return int(found.run.run_id), context

    @property
    def runtime(self) -> RuntimeHttpClient:
        """Return the client of the Runtime API."""
        return self._runtime_client


def finish_server_task(grid: PrivateGrid, context: Context, *, completed: bool) -> None:
    """Say how the ServerApp ended."""
    status = SubStatus.COMPLETED if completed else SubStatus.FAILED
    grid.runtime.PushTaskOutput(
        PushTaskOutputRequest(context=context_to_proto(context), sub_status=status, details="")
    )


class Heartbeat(threading.Thread):
    """Keeps a task's token alive until :meth:`stop`."""

    def __init__(self, client: Any, every_s: float = _HEARTBEAT_S) -> None:
        super().__init__(daemon=True)
        self._client = client
        self._every_s = every_s
        self._ended = threading.Event()

    def run(self) -> None:
        """Beat."""
        while not self._ended.wait(self._every_s):
            with suppress(Exception):  # the next call of the task itself will tell
                self._client.SendTaskHeartbeat(SendTaskHeartbeatRequest())

    def stop(self) -> None:
        """Beat no more."""
        self._ended.set()


# --- the site's end


class SiteTask:
    """A task that the site's SuperNode holds for whoever has its secret.

    Args:
        kind: Flower's task type.
        client: Client of the task's own API.
    """

    def __init__(self, kind: str, client: Any) -> None:
        self.kind = kind
        self._client = client
        self._heartbeat = Heartbeat(client)
        self._heartbeat.start()
        self._context: Context | None = None

    def pull(self) -> tuple[Message, Context, Run]:
        """Return the message, the context and the run; the run's bundle of code is dropped."""
        message, context, run, _ = pull_task_input(self._client)
        self._context = context
        return message, context, run

    def reply(self, message: Message) -> None:
        """Send the answer."""
        assert self._context is not None  # noqa: S101 - pull comes first
        push_message(self._client, message, self._context)

    def finish(self, *, completed: bool) -> None:
        """Say how it ended, and let go of it; the context that goes back is as it came."""
        status = SubStatus.COMPLETED if completed else SubStatus.FAILED
        with suppress(Exception):
            push_task_output(self._client, self._context, status, "")
        self.abandon()

    def abandon(self) -> None:
        """Let go of it unanswered: a minute later the SuperNode answers that it failed.

        Of a task that is said to have failed it waits for an answer without end.
        """
        self._heartbeat.stop()
        self._client.close()


def acquire_site_task(executor: Any, address: str) -> SiteTask | None:
    """Take the task that waits at a SuperNode, of whatever type; None when none does.

    A task that nobody takes blocks the SuperNode for ever, so that one to refuse is taken too.
    """
    found = executor.AcquireTask(
        AcquireTaskRequest(supported_task_types=[str(kind) for kind in TaskType])
    )
    if not (found.HasField("task") and found.token):
        return None
    token = RuntimeTokenHttpInterceptor(found.token)
    return SiteTask(str(found.task.type), _runtime_client(address, "flwr-clientapp", token))


CLIENT_TASK = str(TaskType.CLIENT_APP)
"""The one task type that a site answers."""

REFUSED_APP = int(ErrorCode.INVALID_FAB)
FAILED_APP = int(ErrorCode.CLIENT_APP_RAISED_EXCEPTION)


def hasten_pulls() -> None:
    """Look soon for the parts of a message that are on their way (stock: after 1 s)."""
    defaults = inflatable_utils.pull_objects.__kwdefaults__ or {}
    defaults["initial_backoff"] = _FIRST_LOOK_S


def cap_supernode_polls(seconds: float) -> None:
    """Let the SuperNode of this process look for messages at least this often (stock: 3 s)."""
    from flwr.supernode import start_client_internal

    patient = types.SimpleNamespace(sleep=lambda wanted: time.sleep(min(wanted, seconds)))
    vars(start_client_internal)["time"] = patient


def drop_messages_of_ended_runs() -> None:
    """Let the SuperNode of this process forget a message whose run ends while it is received.

    Stock leaves the task without its message, and whoever takes the task waits for ever. A
    coordinator that is started again ends the run that it had opened before, so this is no rarity.
    """
    from flwr.supernode import start_client_internal

    pull = vars(start_client_internal)["pull_objects"]

    def pull_or_fail(*arguments: Any, **settings: Any) -> Any:
        try:
            return pull(*arguments, **settings)
        except RunNotRunningException as error:  # no Exception, so the clean-up passes it by
            raise InterruptedError("its run has ended") from error

    vars(start_client_internal)["pull_objects"] = pull_or_fail


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


def _runtime_client(address: str, component: str, *more: Any) -> Any:
    return RuntimeHttpClient.from_server_address(
        address,
        insecure=True,
        root_certificates=None,
        interceptors=[RuntimeVersionHttpInterceptor(component_name=component), *more],
    )
