"""The private names of flwr that lepton-fed relies on, and nothing else.

They hold for flwr 1.41; tests/unit/flower/test_compat_contract.py checks each, and fails first when
flwr changes them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

import httpx
from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.app.exception import AppExitException
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE, ErrorCode, SubStatus
from flwr.common.serde import (
    context_from_proto,
    context_to_proto,
    fab_to_proto,
    message_from_proto,
    message_to_proto,
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
    GetNodesRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushAppMessagesRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore import sql_mixin
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_head_values_from_object_content,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.run import Run
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.grid import HttpGrid
from flwr.superlink.main import create_app
from flwr.superlink.servicer.runtime import runtime_handlers
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

__all__ = [
    "CHUNK_BYTES",
    "COORDINATOR_NODE",
    "FLEET_PATH",
    "MALFORMED",
    "NODE_HEADER",
    "PULL_PATH",
    "AppExitException",
    "FlowerError",
    "Heartbeat",
    "PrivateGrid",
    "SecretHeader",
    "SiteTask",
    "acquire_site_task",
    "control_client",
    "executor_client",
    "finish_server_task",
    "hasten_pulls",
    "opened",
    "register_node",
    "registered_nodes",
    "set_identity",
    "set_message_id",
    "small_record",
    "start_run",
    "superlink_app",
    "take_server_task",
    "unregister_node",
    "with_content",
]

COORDINATOR_NODE = 1
"""Node id of the ServerApp's own end."""

FLEET_PATH = "/v1/fleet/"
"""Where the SuperLink answers SuperNodes; nothing else is for the public."""

PULL_PATH = "/v1/fleet/pull-messages"
"""Where SuperNodes look for messages."""

NODE_HEADER = FLEET_HTTP_PUBLIC_KEY_HEADER.encode()
"""Header with the public key of the SuperNode that asks."""

CHUNK_BYTES = FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
"""Bytes of an array that travel in one request."""

_ACQUIRE = frozenset({"/flwr.proto.Runtime/AcquireTask"})
_HEARTBEAT_S = 10.0
_FIRST_LOOK_S = 0.02
_MOST_LOOK_S = 0.5
_PRAGMAS = (
    ("busy_timeout", "30000"),
    ("journal_mode", "WAL"),
    # The register is made from the roster at each start, and a run goes on from its own
    # checkpoints: nothing here needs to outlive a power cut. A killed process loses nothing.
    ("synchronous", "OFF"),
    ("foreign_keys", "ON"),
    # By connection, and there is one for each thread: models pass through once and are not kept.
    ("cache_size", "-2000"),
    ("mmap_size", "0"),
    ("temp_store", "MEMORY"),
    ("journal_size_limit", "67108864"),
)


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
    vars(sql_mixin)["SQLITE_PRAGMAS"] = _PRAGMAS
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
    """The ServerApp's Grid on the SuperLink of this process.

    What a round needs is asked of the SuperLink directly, without HTTP; only a task's beginning,
    end and heartbeat go through its own listener.

    Args:
        address: The listener.
        token: The task's.
        header: The secret that opens the listener.
        superlink: The SuperLink, from :func:`superlink_app`.
    """

    def __init__(self, address: str, token: str, header: SecretHeader, superlink: Any) -> None:
        super().__init__(address, insecure=True, token=token)
        self._header = header
        self._state = superlink.state.linkstate_factory.state()
        self._task = self._state.get_task_by_token(token)

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

    def end_earlier_runs(self) -> None:
        """End the runs before this one, and remove their messages with the models in them.

        Stock removes them when a node asks for something of such a run; of a coordinator that was
        killed in the middle of a round, and was not asked, they would be kept for good.
        """
        for run in self._state.get_run_info():
            if run.run_id != self._task.run_id:
                self._state.stop_run(run.run_id)  # does nothing to one that has ended
                self._state.cleanup_run(run.run_id)

    @property
    def runtime(self) -> RuntimeHttpClient:
        """Return the client of the Runtime API."""
        return self._runtime_client

    def get_node_ids(self) -> list[int]:
        """Return the ids of the nodes that are online.

        Raises:
            FlowerError: The SuperLink has ended the task.
        """
        self._require_task()
        found = runtime_handlers.get_nodes(GetNodesRequest(), self._state, self._task)
        return [node.node_id for node in found.nodes]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Put messages out, each part of them once, and return their ids.

        One part after another is made into bytes and stored: of a model that goes to many sites no
        further copy is held than what is stored.

        Raises:
            FlowerError: The SuperLink has ended the task, or could not store a part: its database
                is locked, or its disk full.
        """
        self._require_task()
        messages = list(messages)
        objects: dict[str, Any] = {}
        trees = []
        with no_object_id_recompute():
            for message in messages:
                set_message_id(message, message.object_id)
                objects.update(get_all_nested_objects(message))
                trees.append(get_object_tree(message))
            request = PushAppMessagesRequest(
                messages_list=[message_to_proto(remove_content_from_message(m)) for m in messages],
                message_object_trees=trees,
            )
            pushed = runtime_handlers.push_messages(request, self._state, self._task)
            for part in pushed.objects_to_push:
                content = objects.pop(part).deflate()
                if not self._state.store_object(
                    self._task.run_id, pushed.session_id, part, content
                ):
                    self._state.start_session(self._task.run_id)  # a write that says why it fails
                    raise FlowerError(
                        ApiErrorCode.NO_PERMISSIONS, "it could not store a part of a message"
                    )
        return list(pushed.message_ids)

    def _require_task(self) -> None:
        """Tell a task that was ended from sites that are not there.

        The SuperLink ends a task whose heartbeat it has not heard for a minute, also when it was
        asleep itself, and its run with it.
        """
        if self._state.get_task_by_token(self._token) is None:
            raise FlowerError(
                ApiErrorCode.NO_PERMISSIONS, "it ended the coordinator's own task, whose heartbeat "
                "it had not heard for a minute"
            )  # fmt: skip

    def claim(self, message_ids: Iterable[str]) -> Iterator[tuple[Message, str]]:
        """Take the replies to these messages that came since the last time.

        Yields:
            The reply without its content, and the id of its parts' root. It is asked for once.
        """
        request = PullAppMessagesRequest(message_ids=list(message_ids))
        found = runtime_handlers.pull_messages(request, self._state, self._task)
        for reply, tree in zip(found.messages_list, found.message_object_trees, strict=True):
            yield message_from_proto(reply), tree.object_id

    def part(self, object_id: str) -> bytes | None:
        """Return a part of a message; empty while it is on its way, None when it will not come."""
        content: bytes | None = self._state.get_object(self._task.run_id, object_id)
        return content

    def forget(self, object_id: str) -> None:
        """Remove a message's parts, but for those that other messages have too."""
        self._state.object_store.delete(object_id)


def opened(part: bytes) -> tuple[str, list[str], memoryview]:
    """Return kind, parts and body of a part of a message.

    Raises:
        ValueError: It is none.
    """
    kind, children, size = get_object_head_values_from_object_content(part)
    body = memoryview(part)[part.index(b"\0") + 1 :]
    if len(body) != size:
        raise ValueError("a part of another length than it says")
    return kind, children, body


def small_record(part: bytes) -> ConfigRecord | MetricRecord:
    """Return the record without arrays that a part holds.

    Raises:
        ValueError: It holds none.
    """
    kinds: dict[str, Any] = {"ConfigRecord": ConfigRecord, "MetricRecord": MetricRecord}
    kind = kinds.get(opened(part)[0])
    if kind is None:
        raise ValueError("no such record")
    try:
        return kind.inflate(part)  # type: ignore[no-any-return]
    except Exception as error:
        raise ValueError(str(error)) from error


def with_content(reply: Message, content: RecordDict | Error) -> Message:
    """Return a reply with another content, or with an error instead."""
    if isinstance(content, Error):
        return make_message(metadata=reply.metadata, error=content)
    return make_message(metadata=reply.metadata, content=content)


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


MALFORMED = 4411
"""Code of the error that stands for a reply whose parts are not as they must be."""


def hasten_pulls() -> None:
    """Look soon, and often, for the parts of a message that are on their way (stock: after 1 s)."""
    for pull in (inflatable_utils.pull_objects, inflatable_utils.pull_and_inflate_object_from_tree):
        defaults = pull.__kwdefaults__ or {}
        defaults["initial_backoff"] = _FIRST_LOOK_S
        defaults["backoff_cap"] = _MOST_LOOK_S
        defaults["max_tries_per_object"] = None  # looks are more than stock's; time is the bound


def _runtime_client(address: str, component: str, *more: Any) -> Any:
    return RuntimeHttpClient.from_server_address(
        address,
        insecure=True,
        root_certificates=None,
        interceptors=[RuntimeVersionHttpInterceptor(component_name=component), *more],
    )
