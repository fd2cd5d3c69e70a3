"""A coordinator that was turned against its sites, as a process; what it sends, and to whom.

It has what the owner of a coordinator's machine has: an address and a certificate that the sites
trust, a register with their node keys, and the key that seals asks. Run it as
``python -m tests.e2e.hostile ROOT PORT SITE``: it prints what came back, JSON.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import ssl
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
import numpy as np
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from lepton_fed.config.agreement import Agreement
from lepton_fed.config.load import load_conf
from lepton_fed.config.schema import ServerConf
from lepton_fed.core.digests import canonical_json
from lepton_fed.core.exchange import Ask, Offer, PushStep
from lepton_fed.flower import compat, superlink
from lepton_fed.flower.records import ask_to_record, offer_to_record, push_to_record
from lepton_fed.flower.seal import COORDINATOR, Sealing, new_nonce
from lepton_fed.flower.superlink import APP_ID, SuperLink
from lepton_fed.identity.keys import load_private_key
from lepton_fed.identity.node_key import load_node_key, node_public_line, node_public_pem
from lepton_fed.identity.signature import PrivateKey

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict  # isort: skip
from flwr.common.serde import fab_to_proto  # isort: skip
from flwr.proto.control_pb2 import (  # isort: skip
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
)
from flwr.proto.runtime_pb2 import AcquireTaskRequest  # isort: skip
from flwr.supercore.constant import TaskType  # isort: skip
from flwr.supercore.fab import Fab  # isort: skip

AUTHORITY = "keys/tls/ca.crt"
MARKER = "marker-of-the-attack"
PROTOBUF = {"content-type": "application/protobuf", "accept": "application/protobuf"}
_ATTACK_S = 30.0
_CONNECT_S = 60.0


class Poison:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self._path),))


def hostile_app(app: str, marker: Path, *, agent: bool = False) -> bytes:
    """Return a whole Flower app whose Python writes a file as soon as it is imported."""
    publisher, name = app.split("/")
    kinds = ("agentapp",) if agent else ("serverapp", "clientapp")
    manifest = "\n".join(
        (
            f'[project]\nname = "{name}"\nversion = "1.0.0"\ndescription = ""\nlicense = "MIT"',
            f'[tool.flwr.app]\npublisher = "{publisher}"',
            "[tool.flwr.app.components]",
            *(f'{kind} = "payload.app:app"' for kind in kinds),
            "[tool.flwr.app.config]",
            *(f"{key} = {json.dumps(code)}" for key, code in code_as_text(marker).items()),
        )
    )
    wicked = f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n"
    content = wicked + "from flwr.clientapp import ClientApp\napp = ClientApp()\n"
    files = {
        "pyproject.toml": manifest,
        "payload/__init__.py": wicked,
        "payload/app.py": content,
        "sitecustomize.py": wicked,
    }
    listed = "\n".join(
        f"{path},{hashlib.sha256(text.encode()).hexdigest()},{8 * len(text)}"
        for path, text in files.items()
    )
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        for path, text in {**files, ".info/CONTENT": listed}.items():
            file.writestr(zipfile.ZipInfo(path, (2024, 10, 1, 0, 0, 0)), text)
    return packed.getvalue()


def code_as_text(marker: Path) -> dict[str, str]:
    """Return settings that are code to whoever evaluates, formats, resolves or loads them."""
    return {
        "expression": f"__import__('pathlib').Path({str(marker)!r}).touch()",
        "tag": f"!!python/object/apply:os.mkdir ['{marker}']",
        "target": f"${{oc.env:HOME}}$(touch {marker})",
        "reference": "payload.app:app",
    }


@dataclass(frozen=True)
class Attack:
    """What the hostile coordinator sends to the site.

    Args:
        says: What the answer has to be, a regular expression over all of it.
        kind: Flower's type of the message.
        content: Its records.
        app: The app in whose name it comes.
        agent: Whether that app is of the agent type.
    """

    says: str
    kind: str
    content: RecordDict
    app: str = APP_ID
    agent: bool = False


def attacks(root: Path, site: str) -> dict[str, Attack]:
    """Return what is tried on a site, by name."""
    marker = root / MARKER
    key = load_private_key(root / "keys" / "coordinator.pem")
    wrong = PrivateKey.generate()
    code = RecordDict({"head": ConfigRecord({"agreement": "", **code_as_text(marker)})})
    hollow = Ask("0" * 64, "0" * 64, 1, True, True, {"model": np.zeros(4, "f4")})
    wild = ask_to_record(replace(hollow, agreement=code_as_text(marker)["expression"]))
    poisoned = ask_to_record(hollow)
    pickled = pickle.dumps(Poison(marker))
    poisoned["vectors"] = ArrayRecord(
        {"model": Array("object", (1,), "numpy.ndarray", npy(pickled))}
    )

    def sealed(
        record: RecordDict, by: PrivateKey = key, purpose: str = "train", reader: str = site
    ) -> RecordDict:
        return Sealing(purpose, COORDINATOR, reader, new_nonce()).seal(record, by)

    def offer(agreement: bytes) -> RecordDict:
        roster = (root / "keys" / "roster.json").read_bytes()
        return sealed(offer_to_record(Offer(agreement, roster)), purpose="query.offer")

    def push(**fields: Any) -> RecordDict:
        step = PushStep(**{"step": "begin", "bundle": "0" * 64, **fields})
        return sealed(push_to_record(step), purpose="query.push")

    agreed = agreement_of(root)
    model = replace(agreed.task.model, name=f"os:mkdir({MARKER!r})")
    strange = replace(agreed, task=replace(agreed.task, model=model))
    no_seal, no_app = "LF4414", "this site runs no app of others"
    no_type = "this site answers no task of this type"
    return {
        "code in the app, no seal": Attack(no_seal, "train", ask_to_record(hollow)),
        "a seal by another key": Attack(no_seal, "train", sealed(ask_to_record(hollow), wrong)),
        "a seal for another site": Attack(
            no_seal, "train", sealed(ask_to_record(hollow), reader="another")
        ),
        "a seal for another purpose": Attack(
            no_seal, "train", sealed(ask_to_record(hollow), purpose="evaluate")
        ),
        "code in the message's settings": Attack("LF4411", "train", sealed(code)),
        "code for a digest": Attack("LF4501", "train", sealed(wild)),
        "a pickle for a vector": Attack("LF4411", "train", sealed(poisoned)),
        "an unknown question": Attack("LF5301", "query.run_code", sealed(code)),
        "code for an offer": Attack(
            "LF4511", "query.offer", offer(code_as_text(marker)["expression"].encode())
        ),
        "code for a model": Attack("LF4", "query.offer", offer(canonical_json(strange))),
        "a push out of its folder": Attack(
            "LF4", "query.push", push(step="chunk", file=f"../../../{marker.name}", data=b"x")
        ),
        "a push that nobody signed": Attack(
            "LF4", "query.push", push(manifest=b'{"version": 1}', signature=b"\0" * 64)
        ),
        "a foreign app": Attack(no_app, "train", sealed(ask_to_record(hollow)), "evil/app"),
        "an agent of our name": Attack(
            no_type, "query", sealed(code, purpose="query"), APP_ID, agent=True
        ),
        "an agent of others": Attack(
            no_type, "query", sealed(code, purpose="query"), "evil/agent", agent=True
        ),
    }  # fmt: skip


def npy(data: bytes) -> bytes:
    """Return the NumPy file of an object array that holds a pickle."""
    head = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
    head += b" " * (63 - (10 + len(head)) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + data


def agreement_of(root: Path) -> Agreement:
    conf = load_conf(root / "server.yaml", [], kind=ServerConf).conf
    rounds = conf.rounds.count
    return Agreement("hostile", conf.task, conf.strategy, rounds, conf.seed, conf.privacy)


def told(message: Message) -> str:
    """Return everything that an answer says."""
    if message.has_error():
        return f"error {message.error.code}: {message.error.reason}"
    records = {name: dict(record) for name, record in message.content.items() if name != "seal"}
    return str(records)


class Hostile:
    """A SuperLink that whoever owns the coordinator's machine has bent to their will."""

    def __init__(self, root: Path, port: int, site: str) -> None:
        self._root = root
        self._port = port
        self._site = site
        conf = load_conf(root / "server.yaml", [], kind=ServerConf).conf
        tls = conf.tls
        self._link = SuperLink(
            ("127.0.0.1", port),
            root / tls.certificate,
            root / tls.key,
            root / "hostile.sqlite",
        )
        line = node_public_line(load_node_key(root / "keys" / f"{site}.node"))
        self._keys = {site: node_public_pem(line)}

    def __enter__(self) -> Hostile:
        self._link.start(self._keys)
        return self

    def __exit__(self, *_: object) -> None:
        self._link.stop()

    def calls(self) -> dict[str, dict[str, int]]:
        """Return what its listeners answer to whom; the private one also with the secret."""
        header = {self._link._header._name: self._link._header._secret}
        own = f"http://{self._link._address}"
        return {
            "public": calls(f"https://127.0.0.1:{self._port}", self._root / AUTHORITY),
            "private": calls(own),
            "private with the secret": calls(own, headers=header),
        }

    def wait_for_the_site(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            found = compat.registered_nodes(self._link._control)
            if any(status == "online" for _, status in found.values()):
                return
            time.sleep(0.1)
        raise AssertionError("the site did not connect")

    def attack(self, tried: Mapping[str, Attack]) -> dict[str, str]:
        """Try all of one app, and return what came back, by name of the attack."""
        (node,) = self._link.nodes(self._keys).values()
        found: dict[str, str] = {}
        for app, agent in sorted({(each.app, each.agent) for each in tried.values()}):
            ours = {n: each for n, each in tried.items() if (each.app, each.agent) == (app, agent)}
            fab = hostile_app(app, self._root / MARKER, agent=agent)
            with self._run_of(fab, agent=agent) as grid:
                messages = [Message(each.content, node, each.kind) for each in ours.values()]
                sent = dict(zip(grid.push_messages(messages), ours, strict=True))
                until = time.monotonic() + _ATTACK_S
                while sent and time.monotonic() < until:
                    for message_id in list(sent):
                        for message in grid.pull_messages([message_id]):
                            # An agent's Grid first hands out the user's prompt.
                            if message.metadata.reply_to_message_id == message_id:
                                found[sent.pop(message_id)] = told(message)
                    time.sleep(0.1)
        return found

    @contextmanager
    def _run_of(self, fab: bytes, *, agent: bool) -> Iterator[Any]:
        """Open a Flower run of an app; that of an agent is started and taken as an agent's."""

        def start(control: Any, app: bytes, digest: str) -> int:
            prompt = code_as_text(self._root / MARKER)["expression"] if agent else ""
            sent = fab_to_proto(Fab(digest, app, {}))
            request = StartRunRequest(fab=sent, user_prompt=prompt)
            return int(control.StartRun(request).run_id)

        def take(executor: Any) -> str:
            kind = TaskType.AGENT_APP if agent else TaskType.SERVER_APP
            request = AcquireTaskRequest(supported_task_types=[str(kind)])
            return str(executor.AcquireTask(request).token)

        with (
            patch.object(superlink, "codeless_app", lambda: fab),
            patch.object(compat, "start_run", start),
            patch.object(compat, "take_server_task", take),
            self._link.grid() as grid,
        ):
            yield grid


def calls(
    url: str, certificate: Path | None = None, headers: Mapping[str, str] | None = None
) -> dict[str, int]:
    """Call what starts runs, enrols nodes and hands out tasks, and return the statuses."""
    fab = hostile_app(APP_ID, Path("/nonexistent/marker"))
    made = ec.generate_private_key(ec.SECP384R1()).public_key()
    pem = made.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    digest = hashlib.sha256(fab).hexdigest()
    asked: dict[str, Any] = {
        "control/list-runs": ListRunsRequest(),
        "control/list-nodes": ListNodesRequest(),
        "control/register-node": RegisterNodeRequest(public_key=pem, name="stranger"),
        "control/start-run": StartRunRequest(fab=fab_to_proto(Fab(digest, fab, {}))),
        "runtime/acquire-task": AcquireTaskRequest(
            supported_task_types=[str(kind) for kind in TaskType]
        ),
    }
    context = ssl.create_default_context(cafile=str(certificate)) if certificate else True
    found: dict[str, int] = {}
    with httpx.Client(verify=context, trust_env=False, timeout=20.0) as client:
        for path, request in asked.items():
            found[path] = client.post(
                f"{url}/v1/{path}",
                content=request.SerializeToString(),
                headers={**PROTOBUF, **(headers or {})},
            ).status_code
    return found


def main() -> None:
    root, port, site = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    os.chdir(root)
    with Hostile(root, port, site) as hostile:
        hostile.wait_for_the_site(_CONNECT_S)
        answers = hostile.attack(attacks(root, site))
        json.dump({"answers": answers, "statuses": hostile.calls()}, sys.stdout)


if __name__ == "__main__":
    main()
