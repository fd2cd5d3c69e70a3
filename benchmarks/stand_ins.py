"""Many sites in one process, which speak Flower's Fleet API over TLS as SuperNodes do.

Every node has a key of its own and takes its ask with all parts of it. It answers with an update
that is made chunk by chunk as it is sent, so that this process stays small however many and however
large they are; or, in secure aggregation, as a real site does. A few are at work at a time.
"""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections.abc import Iterator
from typing import cast

import httpx
import numpy as np
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.app.message.arraychunk import ArrayChunk
from flwr.clientapp import ClientApp
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from benchmarks.idle import Idle
from benchmarks.setting import Setting
from lepton_fed.core.exchange import Reply, Update
from lepton_fed.flower import compat
from lepton_fed.flower.parcels import FiledArray
from lepton_fed.flower.records import reply_to_record
from lepton_fed.flower.seal import COORDINATOR, Sealing
from lepton_fed.flower.worker import site_app
from lepton_fed.identity.keys import load_private_key, load_public_key
from lepton_fed.identity.node_key import load_node_key
from lepton_fed.strategies.base import DELTA

__all__ = ["stand_in"]

_AT_WORK = 3
_START_S = 300.0
_PATIENCE_S = 1800.0  # the most that the SuperLink takes: for an hour nobody needs to beat
_FLOATS = compat.CHUNK_BYTES // 4


class _Chunk(ArrayChunk):
    """A chunk that is made when it is sent, and again whenever it is asked for."""

    __qualname__ = "ArrayChunk"  # what flwr writes into the part

    def __init__(self, seed: tuple[int, ...], floats: int) -> None:
        self._seed, self._floats = seed, floats

    @property
    def data(self) -> memoryview:  # type: ignore[override]
        generator = np.random.default_rng(self._seed)
        values = generator.standard_normal(self._floats, dtype=np.float32)
        values *= np.float32(1e-3)
        return values.data.cast("B")


class _Generated(FiledArray):
    """A vector of such chunks."""

    __qualname__ = "Array"

    def __init__(self, seed: tuple[int, ...], floats: int, setting: Setting) -> None:
        whole, chunks = hashlib.sha256(), []
        for number, start in enumerate(range(0, floats, _FLOATS)):
            chunk = _Chunk((*seed, number), min(_FLOATS, floats - start))
            whole.update(chunk.data)
            chunks.append((chunk.object_id, chunk))
        nowhere = setting.key("nowhere")
        super().__init__("float32", (floats,), "lepton.f4le", nowhere, whole.hexdigest())
        self.__dict__["_chunks"] = chunks


class _Site:
    def __init__(self, setting: Setting, name: str) -> None:
        self._setting = setting
        self._name = name
        self._identity = load_private_key(setting.key(f"{name}.pem"))
        key = load_node_key(setting.key(f"{name}.node"))
        self._client = FleetHttpClient.from_server_address(
            f"127.0.0.1:{setting.port}",
            False,
            str(setting.key("tls/ca.crt")),
            interceptors=[NodeAuthHttpInterceptor(key, key.public_key())],
        )
        self._app: ClientApp | None = None
        if setting.masked:
            coordinator = load_public_key(setting.key("coordinator.pub"))
            self._app = site_app(Idle(setting, name), name, self._identity, coordinator)
        public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        request = ActivateNodeRequest(public_key=public, heartbeat_interval=_PATIENCE_S)
        self._node = Node(node_id=self._activated(request))

    def _activated(self, request: ActivateNodeRequest) -> int:
        """Return the node's id, once the coordinator answers."""
        until = time.monotonic() + _START_S
        while True:
            try:
                return int(self._client.ActivateNode(request).node_id)
            except httpx.TransportError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.5)

    def round(self) -> bool:
        """Take an ask and answer it; return whether there was one."""
        found = self._client.PullMessages(PullMessagesRequest(node=self._node))
        if not found.messages_list:
            return False
        ask, tree = message_from_proto(found.messages_list[0]), found.message_object_trees[0]
        reply = self._masked(self._app, ask, tree) if self._app else self._plain(ask, tree)
        self._client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(
                node=self._node, run_id=ask.metadata.run_id, message_object_id=tree.object_id
            )
        )
        self._send(reply)
        return True

    def _parts(self, ask: Message, tree: ObjectTree) -> Iterator[tuple[str, bytes]]:
        for node in iterate_object_tree(tree):
            request = PullObjectRequest(
                node=self._node, run_id=ask.metadata.run_id, object_id=node.object_id
            )
            while not (found := self._client.PullObject(request)).object_available:
                pass
            yield node.object_id, found.object_content

    def _masked(self, app: ClientApp, ask: Message, tree: ObjectTree) -> Message:
        """Answer as a site does that has all of an ask and of its answer in memory."""
        whole = inflate_object_from_contents(tree.object_id, dict(self._parts(ask, tree)))
        asked = compat.with_content(ask, cast("Message", whole).content)
        return app(asked, Context(1, 1, {}, RecordDict(), {}))

    def _plain(self, ask: Message, tree: ObjectTree) -> Message:
        """Answer with an update that is not made yet."""
        told: dict[str, object] = {}
        for _, part in self._parts(ask, tree):
            if compat.opened(part)[0] == "ConfigRecord":
                told.update(compat.small_record(part))
        small = Update(str(told["layout"]), {DELTA: np.zeros(1, np.float32)}, 1.0)
        record = reply_to_record(Reply("", update=small))
        arrays = ArrayRecord()
        seed = (self._setting.names.index(self._name), int(str(told["round"])))
        arrays[DELTA] = _Generated(seed, self._setting.floats, self._setting)
        record = RecordDict({"head": record["head"], "vectors": arrays})
        sealing = Sealing("train reply", self._name, COORDINATOR, str(told["nonce"]))
        return Message(sealing.seal(record, self._identity), reply_to=ask)

    def _send(self, reply: Message) -> None:
        with no_object_id_recompute():
            compat.set_message_id(reply, reply.object_id)
            parts, tree = get_all_nested_objects(reply), get_object_tree(reply)
        pushed = self._client.PushMessages(
            PushMessagesRequest(
                node=self._node,
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[tree],
                clientapp_runtime_list=[0.0],
            )
        )
        for part in pushed.objects_to_push:
            request = PushObjectRequest(
                node=self._node,
                run_id=reply.metadata.run_id,
                session_id=pushed.session_id,
                object_id=part,
                object_content=parts[part].deflate(),
            )
            if not self._client.PushObject(request).stored:
                raise RuntimeError("a part was not stored")


def stand_in(setting: Setting) -> None:
    """Be all sites of a benchmark until its coordinator is gone."""
    compat.set_identity(1, 2)
    sites: queue.Queue[_Site] = queue.Queue()
    for name in setting.names:
        sites.put(_Site(setting, name))

    def work() -> None:
        while True:
            site = sites.get()
            site.round()
            sites.put(site)

    workers = [threading.Thread(target=work, daemon=True) for _ in range(_AT_WORK)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
