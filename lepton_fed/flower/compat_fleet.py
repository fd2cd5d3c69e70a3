"""The private names of flwr with which a SuperNode's request is looked at before the SuperLink is.

They hold for flwr 1.41; tests/unit/flower/test_compat_contract.py checks each.
"""

from __future__ import annotations

import binascii
import datetime
from base64 import b64decode
from collections.abc import Container, Iterable

from cryptography.exceptions import UnsupportedAlgorithm
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import PushObjectRequest, PushObjectResponse
from flwr.supercore.constant import FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from lepton_fed.flower.compat import COORDINATOR_NODE, NODE_HEADER

__all__ = ["PUSH_OBJECT_PATH", "PUSH_PATH", "announced", "signer", "storing_node", "was_stored"]

PUSH_PATH = "/v1/fleet/push-messages"
"""Where SuperNodes announce a reply, with the tree of its parts."""

PUSH_OBJECT_PATH = "/v1/fleet/push-object"
"""Where SuperNodes store a part."""


def signer(headers: Iterable[tuple[bytes, bytes]], known: Container[bytes]) -> bytes | None:
    """Return the public key, PEM, with which a SuperNode signed a request; None if it did not.

    What the SuperLink checks itself, but only once it has read and parsed the whole request.

    Args:
        headers: The request's, names in lower case.
        known: Keys that may have signed it; with others nothing is computed.
    """
    given = dict(headers)
    try:
        key = b64decode(given[NODE_HEADER.lower()], validate=True)
        if key not in known:
            return None
        signature = b64decode(given[FLEET_HTTP_SIGNATURE_HEADER.lower().encode()], validate=True)
        signed = given[TIMESTAMP_HEADER.lower().encode()]
        age = (now() - datetime.datetime.fromisoformat(signed.decode("ascii"))).total_seconds()
        if not -SYSTEM_TIME_TOLERANCE < age < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE:
            return None
        return key if verify_signature(bytes_to_public_key(key), signed, signature) else None
    except (KeyError, ValueError, TypeError, AttributeError, binascii.Error, UnsupportedAlgorithm):
        return None


def announced(body: bytes) -> tuple[int, int] | None:
    """Return node id and number of parts of a reply that a node announces.

    Args:
        body: Request for :data:`PUSH_PATH`. That the node is who it says is the SuperLink's to
            check.

    Returns:
        None if it is anything but one reply of that node to the coordinator: the SuperLink would
        take an instruction to a node too.
    """
    request = PushMessagesRequest()
    try:
        request.ParseFromString(body)
    except DecodeError:
        return None
    if not len(request.messages_list) == len(request.message_object_trees) == 1:
        return None
    about = request.messages_list[0].metadata
    node = int(request.node.node_id)
    if not about.reply_to_message_id or about.src_node_id != node:
        return None
    if about.dst_node_id != COORDINATOR_NODE:
        return None
    parts, left = 0, [request.message_object_trees[0]]
    while left:
        parts += 1
        left.extend(left.pop().children)
    return node, parts


def storing_node(body: bytes) -> int | None:
    """Return the node id that a request for :data:`PUSH_OBJECT_PATH` names; None if it is none."""
    request = PushObjectRequest()
    try:
        request.ParseFromString(body)
    except DecodeError:
        return None
    return int(request.node.node_id)


def was_stored(answer: bytes) -> bool:
    """Return whether a part was stored, from the answer at :data:`PUSH_OBJECT_PATH`."""
    try:
        return bool(PushObjectResponse.FromString(answer).stored)
    except DecodeError:
        return False
