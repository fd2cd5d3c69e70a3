"""What lepton-fed relies on in flwr beyond its documented interface, name by name.

When flwr is updated this file fails first. Then read flwr's changes, check each name here against
lepton_fed/flower/compat.py, grid.py, records.py and stock.py, and only then move the version on.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from dataclasses import fields
from datetime import timedelta
from pathlib import Path

import flwr
import flwr.serverapp.strategy as stock
import httpx
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.common import constant
from flwr.common.constant import (
    FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE,
    SYSTEM_TIME_TOLERANCE,
    TIMESTAMP_HEADER,
    TIMESTAMP_TOLERANCE,
    ErrorCode,
    SubStatus,
)
from flwr.common.serde import (
    context_from_proto,
    context_to_proto,
    fab_to_proto,
    message_from_proto,
    message_to_proto,
    recorddict_from_proto,
    recorddict_to_proto,
    run_from_proto,
    user_config_to_proto,
)
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    RegisterNodeRequest,
    StartRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.message_pb2 import Metadata, ObjectTree, PushObjectRequest, PushObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    AcquireTaskResponse,
    GetNodesRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushAppMessagesRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.serverapp import Grid
from flwr.serverapp.exception import AggregationError, InconsistentMessageReplies
from flwr.serverapp.strategy.strategy_utils import sample_nodes
from flwr.supercore import heartbeat, sql_mixin
from flwr.supercore.constant import (
    FLEET_HTTP_PUBLIC_KEY_HEADER,
    FLEET_HTTP_SIGNATURE_HEADER,
    NOOP_FEDERATION_ID,
    SQLITE_PRAGMAS,
    TaskType,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.date import now
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.fab import Fab
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_head_values_from_object_content,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.primitives.asymmetric import (
    bytes_to_public_key,
    public_key_to_bytes,
    verify_signature,
)
from flwr.supercore.retry import http_retry
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.grid import HttpGrid
from flwr.superlink.main import create_app
from flwr.superlink.routers.fleet import node_auth
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.superlink.servicer.runtime import runtime_handlers
from flwr.supernode import fleet_http_connection
from flwr.supernode.cli import flower_supernode
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from lepton_fed.flower import compat, compat_fleet, compat_supernode, supernode
from lepton_fed.flower.compat import COORDINATOR_NODE, set_identity, set_message_id
from lepton_fed.flower.grid import InProcessGrid


@pytest.fixture(autouse=True)
def _identity() -> None:
    set_identity(1, COORDINATOR_NODE)


def message() -> Message:
    return Message(RecordDict({"head": ConfigRecord({"round": 1})}), 7, "train", group_id="1")


def test_this_is_the_flwr_that_was_checked() -> None:
    assert flwr.__version__.startswith("1.41."), (
        f"flwr {flwr.__version__} is not 1.41: re-check TaskIdentity, Message and its metadata, "
        "AppExitException, Grid's abstract methods, the node counts of stock strategies, Array and "
        "the environment switches; then update this file, the compat modules and pyproject.toml"
    )


def test_compat_offers_what_is_checked_here() -> None:
    text = "".join(
        Path(module.__file__).read_text() for module in (compat, compat_fleet, compat_supernode)
    )
    checked = Path(__file__).read_text()
    private = re.findall(
        r"^ *from (flwr\.(?!app import)[\w.]+) import \(?([\w,\s]+?)\)?$", text, re.MULTILINE
    )
    names = {name.strip() for _, listed in private for name in listed.split(",") if name.strip()}
    assert {name.split(" as ")[0] for name in names if name not in checked} == set()


def test_what_the_superlink_fails_of_is_an_exception_that_says_why() -> None:
    assert "raise FlowerError(" in inspect.getsource(runtime_handlers)
    assert str(FlowerError(ApiErrorCode.NO_PERMISSIONS, "no such run")) == "no such run"
    assert not issubclass(FlowerError, OSError)
    assert "SQLAlchemyError" in inspect.getsource(sql_mixin)


def parameters(of: object) -> set[str]:
    return set(inspect.signature(of).parameters)  # type: ignore[arg-type]


def test_a_superlink_is_an_asgi_app_made_from_these_settings() -> None:
    assert parameters(create_app) >= {"config"}
    assert {f.name for f in fields(SuperLinkLifespanConfig)} == {
        "control_address", "health_server_address", "host", "port", "insecure", "certificates",
        "superexec_auth_secret", "authn_plugin", "event_log_plugin", "fleet_event_log_plugin",
        "enable_event_log", "artifact_provider", "enable_supernode_auth", "fleet_api_type",
        "fleet_api_address", "simulation", "ssl_ca_certfile", "ssl_certfile", "ssl_keyfile",
        "database", "isolation", "runtime_dependency_install",
    }  # fmt: skip
    assert callable(SuperLinkLifespan.startup)
    assert NoOpControlAuthnPlugin()


def test_the_fleet_api_alone_is_below_its_path() -> None:
    """Nothing that starts runs, enrols keys or hands out tasks may stand below the public path."""
    paths = set(create_app(None, SuperLinkLifespan).openapi()["paths"])
    public = {path for path in paths if path.startswith(compat.FLEET_PATH)}
    assert {path.removeprefix(compat.FLEET_PATH) for path in public} == {
        "register-node", "unregister-node", "activate-node", "deactivate-node",
        "send-node-heartbeat", "pull-messages", "push-messages", "get-run", "get-fab",
        "push-object", "pull-object", "confirm-message-received",
    }  # fmt: skip
    assert any("/control/" in path for path in paths - public)
    assert any("/runtime/" in path for path in paths - public)


def test_the_control_api_enrols_lists_and_starts() -> None:
    for call in ("RegisterNode", "UnregisterNode", "ListNodes", "StartRun"):
        assert callable(getattr(ControlHttpClient, call))
    assert parameters(ControlHttpClient.from_server_address) >= {
        "server_address", "insecure", "root_certificates", "interceptors"
    }  # fmt: skip
    for request in (ListNodesRequest, RegisterNodeRequest, StartRunRequest, UnregisterNodeRequest):
        assert request()
    assert parameters(user_config_to_proto) == {"user_config"}
    assert fab_to_proto(Fab("0" * 64, b"", {})).hash_str == "0" * 64


def test_tasks_are_taken_kept_alive_and_ended_through_the_runtime_api() -> None:
    for call in ("AcquireTask", "PullTaskInput", "PushTaskOutput", "SendTaskHeartbeat"):
        assert callable(getattr(RuntimeHttpClient, call))
    assert frozenset({"/flwr.proto.Runtime/AcquireTask"}) == compat._ACQUIRE
    assert parameters(SuperExecAuthHttpInterceptor) == {"master_secret", "protected_methods"}
    assert parameters(RuntimeTokenHttpInterceptor) == {"token"}
    assert parameters(RuntimeVersionHttpInterceptor) >= {"component_name"}
    for message in (AcquireTaskRequest, PullTaskInputRequest, PushTaskOutputRequest,
                    SendTaskHeartbeatRequest):  # fmt: skip
        assert message() is not None
    assert "flwr-clientapp" == str(TaskType.CLIENT_APP) != str(TaskType.SERVER_APP)
    assert {SubStatus.COMPLETED, SubStatus.FAILED} == {"completed", "failed"}
    assert callable(context_from_proto)
    assert callable(context_to_proto)
    assert callable(run_from_proto)
    assert {"fab_id", "run_id"} <= {f.name for f in fields(Run)}


def test_the_grid_connects_through_a_method_that_can_be_replaced() -> None:
    assert callable(HttpGrid._connect)
    assert issubclass(compat.PrivateGrid, HttpGrid)
    names = HttpGrid._connect.__code__.co_names
    assert {"_client", "_addr", "_token"} <= set(names)
    assert isinstance(HttpGrid._runtime_client, property)


@pytest.mark.filterwarnings("ignore:No path_separator:DeprecationWarning")  # alembic's
def test_the_superlink_of_this_process_is_asked_without_http(tmp_path: Path) -> None:
    for handler in ("get_nodes", "push_messages", "pull_messages"):
        assert parameters(getattr(runtime_handlers, handler)) == {"request", "state", "task"}
    assert next(iter(inspect.signature(runtime_handlers.push_messages).parameters)) == "request"
    assert {"messages_list", "message_object_trees"} <= set(
        PushAppMessagesRequest.DESCRIPTOR.fields_by_name
    )
    assert GetNodesRequest() is not None
    assert PullAppMessagesRequest(message_ids=["x"]).message_ids == ["x"]
    app = compat.superlink_app(
        host="127.0.0.1", port=1, database=str(tmp_path / "f.sqlite"), secret=b"s" * 32
    )
    state = app.state.linkstate_factory.state()
    assert state.get_task_by_token("none") is None
    assert parameters(state.store_object) == {
        "run_id", "session_id", "object_id", "object_content"
    }  # fmt: skip
    assert parameters(state.get_object) == {"run_id", "object_id"}
    assert state.get_object(1, "0" * 64) is None
    assert state.object_store.delete("0" * 64) is None
    assert state.get_task_by_token("nobody's") is None


@pytest.mark.filterwarnings("ignore:No path_separator:DeprecationWarning")  # alembic's
def test_the_database_keeps_little_in_memory(tmp_path: Path) -> None:
    app = compat.superlink_app(
        host="127.0.0.1", port=1, database=str(tmp_path / "f.sqlite"), secret=b"s" * 32
    )
    state = app.state.linkstate_factory.state()
    found = {
        name: next(iter(state.query(f"PRAGMA {name}")[0].values()))
        for name in ("mmap_size", "cache_size", "synchronous", "journal_mode", "foreign_keys")
    }
    assert found == {"mmap_size": 0, "cache_size": -2000, "synchronous": 0,
                     "journal_mode": "wal", "foreign_keys": 1}  # fmt: skip
    # What is stock's and not ours; a new one may matter.
    assert {name for name, _ in SQLITE_PRAGMAS} <= {name for name, _ in sql_mixin.SQLITE_PRAGMAS}


@pytest.mark.filterwarnings("ignore:No path_separator:DeprecationWarning")  # alembic's
def test_what_an_earlier_coordinator_s_run_left_is_removed_and_ours_is_kept(tmp_path: Path) -> None:
    app = compat.superlink_app(
        host="127.0.0.1", port=1, database=str(tmp_path / "f.sqlite"), secret=b"s" * 32
    )
    state = app.state.linkstate_factory.state()
    node = state.create_node("owner", "owner", b"a key", 10.0)
    assert state.activate_node(node, 10.0)

    def begun() -> int:
        run = state.create_run(
            None, None, None, {}, NOOP_FEDERATION_ID, None, None, str(TaskType.SERVER_APP)
        )
        set_identity(run, COORDINATOR_NODE)
        model = ArrayRecord({"m": Array(np.full(9, float(run)))})
        sent = Message(RecordDict({"model": model}), node, "train", group_id="1")
        sent.metadata.__dict__["_run_id"] = run
        set_message_id(sent, sent.object_id)
        with no_object_id_recompute():
            state.store_message_and_object_tree(
                remove_content_from_message(sent), get_object_tree(sent), state.start_session(run)
            )
        return int(run)

    def kept() -> dict[str, int]:
        tables = ("message_ins", "objects", "run_objects", "object_children",
                  "object_push_sessions")  # fmt: skip
        return {t: state.query(f"SELECT count(*) AS n FROM {t}")[0]["n"] for t in tables}  # noqa: S608

    begun()
    of_one = kept()
    assert min(of_one.values()) > 0
    grid = object.__new__(compat.PrivateGrid)
    vars(grid).update(_state=state, _task=types.SimpleNamespace(run_id=begun()))
    assert kept() == {name: 2 * count for name, count in of_one.items()}
    for _ in range(2):
        grid.end_earlier_runs()
        assert kept() == of_one
    ours = state.get_run_info(run_ids=[grid._task.run_id])[0]
    assert ours.status.status == "pending"
    assert {run.status.status for run in state.get_run_info()} == {"pending", "finished"}


def test_a_message_travels_without_its_content() -> None:
    asked = message()
    with no_object_id_recompute():
        set_message_id(asked, asked.object_id)
        parts = get_all_nested_objects(asked)
        tree = get_object_tree(asked)
    assert tree.object_id == asked.object_id
    proto = message_to_proto(remove_content_from_message(asked))
    assert len(message_from_proto(proto).content) == 0
    kinds = [get_object_head_values_from_object_content(p.deflate())[0] for p in parts.values()]
    assert kinds == ["ConfigRecord", "RecordDict", "Message"]
    other = make_message(metadata=asked.metadata, error=Error(compat.MALFORMED, "why"))
    assert other.error.reason == "why"
    assert compat.with_content(asked, RecordDict()).metadata == asked.metadata


def test_nodes_name_themselves_in_a_header_and_look_for_messages_at_one_path() -> None:
    assert FLEET_HTTP_PUBLIC_KEY_HEADER.encode().lower() == compat.NODE_HEADER
    assert compat.PULL_PATH in create_app(None, SuperLinkLifespan).openapi()["paths"]
    assert compat.CHUNK_BYTES == FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE


def signed_headers(key: ec.EllipticCurvePrivateKey) -> dict[bytes, bytes]:
    """Return what flwr's own interceptor puts into a request, as a server sees it."""
    call = types.SimpleNamespace(request=httpx.Request("POST", "https://x/"))
    NodeAuthHttpInterceptor(key, key.public_key()).intercept(call, lambda context: None)
    return {name.lower(): value for name, value in call.request.headers.raw}


def test_who_signed_a_request_is_known_from_its_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    key, other = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    pem = public_key_to_bytes(key.public_key())
    headers = signed_headers(key)
    assert set(headers) >= {
        compat.NODE_HEADER, TIMESTAMP_HEADER.encode(), FLEET_HTTP_SIGNATURE_HEADER.encode()
    }  # fmt: skip
    assert compat_fleet.signer(headers.items(), {pem}) == pem
    assert compat_fleet.signer(headers.items(), {public_key_to_bytes(other.public_key())}) is None
    assert verify_signature(bytes_to_public_key(pem), b"x", b"y") is False
    stolen = headers | {compat.NODE_HEADER: signed_headers(other)[compat.NODE_HEADER]}
    assert (
        compat_fleet.signer(stolen.items(), {pem, public_key_to_bytes(other.public_key())}) is None
    )
    for name in headers:
        if name.startswith(b"flwr-"):
            for wrong in (b"", b"\xff", b"x" * 40):
                assert compat_fleet.signer((headers | {name: wrong}).items(), {pem}) is None, name
            assert compat_fleet.signer([h for h in headers.items() if h[0] != name], {pem}) is None
    late = now() + timedelta(seconds=TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE + 1)
    monkeypatch.setattr(compat_fleet, "now", lambda: late)
    assert compat_fleet.signer(headers.items(), {pem}) is None
    # The same is asked by the SuperLink, of the same names.
    source = inspect.getsource(node_auth.authenticate_node)
    for name in (
        "PUBLIC_KEY_HEADER",
        "SIGNATURE_HEADER",
        "TIMESTAMP_HEADER",
        "verify_signature",
        "TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE",
        "request.node.node_id",
    ):
        assert name in source


def announcing(**about: object) -> PushMessagesRequest:
    told: dict[str, object] = {"src_node_id": 7, "dst_node_id": COORDINATOR_NODE,
                               "reply_to_message_id": "ask"}  # fmt: skip
    tree = ObjectTree(object_id="m", children=[ObjectTree(object_id=str(n)) for n in range(3)])
    tree.children[0].children.append(ObjectTree(object_id="x"))
    return PushMessagesRequest(
        node=Node(node_id=7),
        messages_list=[MessageProto(metadata=Metadata(**(told | about)))],  # type: ignore[arg-type]
        message_object_trees=[tree],
    )


def test_a_node_announces_one_reply_of_its_own_to_the_coordinator() -> None:
    def announced(request: PushMessagesRequest) -> tuple[int, int] | None:
        return compat_fleet.announced(request.SerializeToString())

    assert announced(announcing()) == (7, 5)
    assert announced(announcing(reply_to_message_id="")) is None, "an instruction"
    assert announced(announcing(src_node_id=COORDINATOR_NODE)) is None, "of somebody else"
    assert announced(announcing(dst_node_id=7)) is None, "to a node"
    assert compat_fleet.announced(b"\xff") is None
    assert compat_fleet.announced(b"") is None
    two = announcing()
    two.MergeFrom(announcing())
    assert announced(two) is None
    source = inspect.getsource(fleet_handlers.push_messages)
    assert "request.messages_list[0]" in source
    assert "request.message_object_trees[0]" in source
    paths = create_app(None, SuperLinkLifespan).openapi()["paths"]
    assert {compat_fleet.PUSH_PATH, compat_fleet.PUSH_OBJECT_PATH} <= set(paths)


def test_a_part_is_stored_by_a_node_and_the_answer_says_whether() -> None:
    part = PushObjectRequest(node=Node(node_id=7), object_content=b"x" * 100)
    assert compat_fleet.storing_node(part.SerializeToString()) == 7
    assert compat_fleet.storing_node(b"\xff") is None
    for stored in (True, False):
        assert (
            compat_fleet.was_stored(PushObjectResponse(stored=stored).SerializeToString()) is stored
        )
    assert compat_fleet.was_stored(b"\xff") is False


def test_a_site_s_task_is_pulled_and_answered_with_these_three() -> None:
    assert parameters(pull_task_input) == {"client"}
    assert parameters(push_message) == {"client", "message", "context"}
    assert parameters(push_task_output) == {"client", "context", "sub_status", "details"}


def test_the_supernode_sleeps_by_its_modules_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.supernode import main as supernode_main
    from flwr.supernode import start_client_internal
    from flwr.supernode.servicer.runtime import runtime_handlers as of_supernode

    monkeypatch.setitem(vars(start_client_internal), "time", start_client_internal.time)
    monkeypatch.setattr(of_supernode, "acquire_task", of_supernode.acquire_task)
    stock = of_supernode.acquire_task
    compat_supernode.cap_supernode_polls(0.01)
    before = time.monotonic()
    start_client_internal.time.sleep(30)
    assert time.monotonic() - before < 10
    assert "time.sleep(3)" in inspect.getsource(start_client_internal.start_client_internal)
    # Only a message that is whole is waited for in steps of less than a second.
    assert "time.sleep(0.5)" in inspect.getsource(start_client_internal._push_messages)
    assert "sleep" not in inspect.getsource(start_client_internal._pull_and_store_message)
    assert supernode_main._RUNTIME_HANDLERS is of_supernode
    assert of_supernode.acquire_task is not stock
    asked = inspect.getsource(importlib.import_module("flwr.supercore.routers.runtime.router"))
    assert "handlers.acquire_task(request, state)" in asked
    assert "_auth: AcquireTaskAuthDependency" in asked


@pytest.mark.parametrize("ends_at", ["pull_object", "confirm_message_received"])
def test_a_supernode_keeps_nothing_of_a_message_whose_run_ends_while_it_is_received(
    ends_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stock keeps message and task, and is one message behind from then on."""
    from flwr.supernode import start_client_internal

    def ended(*arguments: object) -> None:
        raise RunNotRunningException

    assert not issubclass(RunNotRunningException, Exception)
    pull = start_client_internal._pull_and_store_message
    monkeypatch.setattr(start_client_internal, "_pull_and_store_message", pull)
    compat_supernode.drop_messages_of_ended_runs()
    told: list[str] = []

    class Noted:
        """Notes what is called; knows the run."""

        def __getattr__(self, name: str) -> object:
            return lambda *given, **more: told.append(name) or ["an object"]

        def get_run(self, run_id: int) -> object:
            return types.SimpleNamespace(primary_task_type="", fab_hash="")

    calls = {"pull_object": lambda *given: b"x", "confirm_message_received": lambda *given: None}
    calls[ends_at] = ended
    sent = message()
    found = start_client_internal._pull_and_store_message(
        state=Noted(),
        object_store=Noted(),
        node_config={},
        receive=lambda: (sent, None),
        get_run=ended,
        get_fab=ended,
        trusted_entities=None,
        **calls,
    )
    assert found is None
    assert told[-3:] == ["delete_messages", "delete", "finish_task"]


def test_objects_on_their_way_are_looked_for_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    pulls = (inflatable_utils.pull_objects, inflatable_utils.pull_and_inflate_object_from_tree)
    for pull in pulls:
        monkeypatch.setattr(pull, "__kwdefaults__", dict(pull.__kwdefaults__ or {}))
    compat.hasten_pulls()
    for pull in pulls:
        found = inspect.signature(pull).parameters
        assert found["initial_backoff"].default == pytest.approx(0.02)
        assert found["backoff_cap"].default == pytest.approx(0.5)
        assert found["max_tries_per_object"].default is None
        assert found["max_time"].default > 3600  # then the bound


def test_a_supernode_is_taken_for_online_for_twice_what_its_heartbeats_promise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert (constant.HEARTBEAT_DEFAULT_INTERVAL, constant.HEARTBEAT_PATIENCE) == (30, 2)
    assert supernode._HEARTBEAT_S == constant.HEARTBEAT_MIN_INTERVAL == 10
    for module in (heartbeat, fleet_http_connection):
        assert module.HEARTBEAT_DEFAULT_INTERVAL == 30
        monkeypatch.setattr(module, "HEARTBEAT_DEFAULT_INTERVAL", 30)  # put back afterwards
    compat_supernode.hasten_heartbeats(10)
    source = inspect.getsource(fleet_http_connection.http_request_response)
    assert source.count("heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL") == 2
    assert fleet_http_connection.HEARTBEAT_DEFAULT_INTERVAL == 10
    waits: list[float] = []
    sender = HeartbeatSender(lambda: True)
    stopped = types.SimpleNamespace(is_set=lambda: len(waits) == 3, wait=waits.append)
    monkeypatch.setattr(sender, "_stop_event", stopped)
    sender._run()
    assert all(3.5 <= wait <= 4.5 for wait in waits)


def test_a_supernode_does_not_wait_long_for_a_coordinator_that_is_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert http_retry.MAX_RETRY_DELAY == 20
    monkeypatch.setattr(http_retry, "MAX_RETRY_DELAY", 20)
    monkeypatch.setattr(heartbeat, "exponential", heartbeat.exponential)
    compat_supernode.cap_retry_waits(5)
    invokers = (
        http_retry.make_simple_http_retry_invoker(),
        HeartbeatSender(lambda: True)._retry_invoker,
    )
    for invoker in invokers:
        waits = invoker.wait_gen_factory()
        assert [next(waits) for _ in range(6)] == [1, 2, 4, 5, 5, 5]


@pytest.mark.parametrize(
    ("error", "stock", "ours"),
    [
        (httpx.ConnectError("[SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred"), True, False),
        (httpx.ConnectTimeout("_ssl.c:989: The handshake operation timed out"), True, False),
        (httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] unable to get issuer"), True, True),
        (httpx.ConnectError("[Errno 111] Connection refused"), False, False),
    ],
)
def test_a_handshake_that_is_cut_off_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, error: Exception, stock: bool, ours: bool
) -> None:
    monkeypatch.setattr(http_retry, "RetryInvoker", http_retry.RetryInvoker)
    assert http_retry.make_simple_http_retry_invoker().should_giveup(error) is stock
    compat_supernode.retry_broken_handshakes()
    invoker = http_retry.make_simple_http_retry_invoker()
    assert invoker.should_giveup(error) is ours
    gone = httpx.Response(404, request=httpx.Request("POST", "https://coordinator"))
    refused = httpx.HTTPStatusError("gone", request=gone.request, response=gone)
    assert invoker.should_giveup(refused) is True, "what was answered is stock's to judge"


def test_a_supernode_that_gave_its_connection_up_ends(tmp_path: Path) -> None:
    """Stock leaves a thread behind that keeps the process up; the shim does not."""
    thread = inspect.getsource(sys.modules[flower_supernode.__module__]._start_supernode_http_api)
    assert "threading.Thread(target=server.run, name=" in thread
    assert "daemon" not in thread
    code = (
        "import threading\n"
        "from lepton_fed.flower import compat_supernode, supernode\n"
        "def gives_up():\n"
        "    threading.Thread(target=threading.Event().wait).start()\n"
        "    {0}\n"
        "compat_supernode.run_supernode = gives_up\n"
        "supernode.main()\n"
    )
    for end in ("return", "raise ValueError('no line')"):
        done = subprocess.run(
            [sys.executable, "-c", code.format(end)],
            cwd=tmp_path,
            env={**os.environ, "FLWR_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 1, done.stderr
        assert ("ValueError: no line" in done.stderr) == (end != "return")


def test_a_supernode_ends_with_its_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[tuple[int, int]] = []
    monkeypatch.setattr(compat_supernode.os, "kill", lambda *given: ended.append(given))
    monkeypatch.setattr(HeartbeatSender, "_run", HeartbeatSender._run)  # put back afterwards
    compat_supernode.end_with_the_heartbeat()

    def broken() -> bool:
        raise RuntimeError("the SuperLink does not know this SuperNode")

    HeartbeatSender(broken)._run()
    assert ended == [(os.getpid(), signal.SIGTERM)]


def test_a_supernode_says_that_its_signature_was_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fleet_http_connection, "NodeAuthHttpInterceptor", NodeAuthHttpInterceptor)
    compat_supernode.tell_refused_signatures("refused!")
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    key = ec.generate_private_key(ec.SECP384R1())
    signing = fleet_http_connection.NodeAuthHttpInterceptor(key, key.public_key())
    for status, said in ((200, []), (401, ["refused!"])):
        caplog.clear()
        call = types.SimpleNamespace(request=httpx.Request("POST", "https://x/"))
        answer = httpx.Response(status)
        assert signing.intercept(call, lambda context, answer=answer: answer) is answer
        assert caplog.messages == said
        assert any("signature" in name.lower() for name in call.request.headers)
    assert "NodeAuthHttpInterceptor(private_key, public_key)" in inspect.getsource(
        fleet_http_connection.http_request_response
    )


def test_a_message_needs_an_identity_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, None)
    with pytest.raises(RuntimeError, match="TaskIdentity"):
        message()
    set_identity(run_id=5, node_id=COORDINATOR_NODE)
    found = message().metadata
    assert (found.run_id, found.src_node_id, found.dst_node_id) == (5, COORDINATOR_NODE, 7)


def test_a_message_has_no_id_until_it_is_given_one_and_a_reply_refers_to_it() -> None:
    asked = message()
    assert asked.metadata.message_id == ""
    with pytest.raises(AttributeError):
        asked.metadata.message_id = "x"  # type: ignore[misc]
    set_message_id(asked, "message-3")
    assert asked.metadata.message_id == "message-3"
    reply = Message(RecordDict(), reply_to=asked)
    assert reply.metadata.reply_to_message_id == "message-3"
    assert (reply.metadata.src_node_id, reply.metadata.dst_node_id) == (7, COORDINATOR_NODE)


def test_the_content_of_a_message_can_be_replaced() -> None:
    asked = message()
    asked.content = RecordDict()
    assert len(asked.content) == 0
    assert asked.has_content()
    assert not asked.has_error()


def test_an_error_reply_has_a_code_and_a_reason() -> None:
    asked = message()
    reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "ValueError"), reply_to=asked)
    assert reply.has_error()
    assert not reply.has_content()
    assert (reply.error.code, reply.error.reason) == (2, "ValueError")


def test_what_strategies_raise_has_the_base_that_is_caught() -> None:
    for kind in (AggregationError, InconsistentMessageReplies):
        assert issubclass(kind, compat.AppExitException)
    assert issubclass(compat.AppExitException, Exception)


def test_our_grid_has_every_method_of_flwrs_with_its_arguments() -> None:
    assert Grid.__abstractmethods__ == {
        "set_run",
        "run",
        "create_message",
        "get_node_ids",
        "push_messages",
        "pull_messages",
        "send_and_receive",
    }
    for name in Grid.__abstractmethods__ - {"run"}:
        theirs = inspect.signature(getattr(Grid, name)).parameters
        ours = inspect.signature(getattr(InProcessGrid, name)).parameters
        more = list(ours.values())[len(theirs) :]
        assert all(p.default is not p.empty for p in more), "flwr does not give these"
        assert [(p.name, p.kind, p.default) for p in list(ours.values())[: len(theirs)]] == [
            (p.name, p.kind, p.default) for p in theirs.values()
        ], name


def test_a_stock_strategy_says_how_many_nodes_it_waits_for() -> None:
    strategy = stock.FedAvg()
    assert strategy.min_available_nodes == strategy.min_train_nodes == 2
    assert strategy.fraction_train == 1.0
    assert strategy.weighted_by_key == "num-examples"
    # It waits for the larger of both numbers: this is what `_least_nodes` counts on.
    source = inspect.getsource(sample_nodes)
    assert "min_available_nodes = max(min_available_nodes, sample_size)" in source
    assert "while len(all_nodes := list(grid.get_node_ids())) < min_available_nodes" in source
    assert "max(num_nodes, self.min_train_nodes)" in inspect.getsource(strategy.configure_train)


def test_the_noise_of_the_dp_wrappers_comes_from_numpys_global_generator() -> None:
    # The reason why they are refused; when this fails, look again.
    from flwr.supercore import differential_privacy

    assert "np.random.normal" in inspect.getsource(differential_privacy)


def test_an_array_keeps_a_serialisation_of_our_own_on_the_wire() -> None:
    array = Array("float32", (2,), "lepton.f4le", bytes(range(8)))
    record = RecordDict({"vectors": ArrayRecord({"delta": array})})
    found = recorddict_from_proto(recorddict_to_proto(record))
    assert found["vectors"]["delta"] == array


def test_an_array_keeps_a_serialisation_of_our_own_in_the_object_store() -> None:
    array = Array("float32", (3_000_000,), "lepton.f4le", bytes(12_000_000))  # several chunks
    head = ConfigRecord({"weight": 0.5, "why": "ä", "train": True, "seed": 2**53})
    sent = Message(RecordDict({"head": head, "v": ArrayRecord({"delta": array})}), 7, "train")
    objects = get_all_nested_objects(sent)
    contents = {key: each.deflate() for key, each in objects.items()}
    found = inflate_object_from_contents(sent.object_id, contents)
    assert isinstance(found, Message)
    assert found.content["v"]["delta"] == array
    assert dict(found.content["head"]) == dict(head)
    assert {k: type(v) for k, v in found.content["head"].items()} == {
        "weight": float,
        "why": str,
        "train": bool,
        "seed": int,
    }


def test_who_asks_for_a_task_waits_until_its_message_is_whole() -> None:
    taken, asked = threading.Event(), []
    acquire = compat_supernode.held(lambda *given: asked.append(given) or "a task", taken, 30.0)
    answers: list[object] = []
    waiting = threading.Thread(target=lambda: answers.append(acquire("request", "state")))
    waiting.start()
    assert (asked, answers) == ([], [])
    taken.set()
    waiting.join(30)
    assert (asked, answers) == ([("request", "state")], ["a task"])
    assert not taken.is_set()


def test_who_asks_for_a_task_in_vain_is_not_let_through_to_one_that_is_half_made() -> None:
    asked: list[object] = []
    acquire = compat_supernode.held(lambda *given: asked.append(given), threading.Event(), 0.0)
    assert acquire("request", "state") == AcquireTaskResponse()
    assert asked == []
