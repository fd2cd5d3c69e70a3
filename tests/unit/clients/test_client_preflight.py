"""What a site's owner can check before the first contact."""

from __future__ import annotations

import shutil
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from lepton_fed.clients import preflight
from lepton_fed.clients.first_contact import reach
from lepton_fed.clients.preflight import check_client
from lepton_fed.config import yaml_text
from lepton_fed.config.load import load_values
from lepton_fed.config.schema import ClientConf, ServerConf
from lepton_fed.config.templates import template
from lepton_fed.core.digests import plain
from lepton_fed.errors import RunError
from lepton_fed.identity.certificates import make_certificates
from lepton_fed.identity.keys import generate_key, load_private_key
from lepton_fed.identity.node_key import generate_node_key
from lepton_fed.identity.roster import Member, Roster, enrol, write_roster


class Answering(HTTPServer):
    """A TLS listener that answers 404 with a date, as a coordinator's does."""

    date: Callable[[], str] = staticmethod(lambda: format_datetime(datetime.now(UTC), usegmt=True))


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response_only(404)
        self.send_header("Date", self.server.date())  # type: ignore[attr-defined]
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *words: Any) -> None:
        pass


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    make_certificates(folder, [])
    return folder


@pytest.fixture
def coordinator(tls: Path) -> Iterator[Answering]:
    with answering(tls, "127.0.0.1") as server:
        yield server


@contextmanager
def answering(tls: Path, host: str) -> Iterator[Answering]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls / "server.crt", tls / "server.key")
    server = Answering((host, 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def address(server: Answering, host: str = "localhost") -> str:
    return f"{host}:{server.server_address[1]}"


@pytest.fixture
def conf(tmp_path: Path, tls: Path, coordinator: Answering) -> Callable[..., ClientConf]:
    """Return a client's conf for which everything is there."""
    server = load_values(ServerConf, template("server")).conf
    (tmp_path / "server.yaml").write_text(yaml_text.block(plain(server)))
    generate_key(tmp_path / "coordinator.pem")
    identity = generate_key(tmp_path / "north.pem").public_bytes_raw().hex()
    line = generate_node_key(tmp_path / "north.node")
    private = load_private_key(tmp_path / "coordinator.pem")
    empty = Roster(1, private.public_key().public_bytes_raw().hex(), [], "")
    write_roster(tmp_path / "roster.json", enrol(empty, Member("north", identity, line)), private)
    values = {
        "task": str(tmp_path / "server.yaml"),
        "coordinator": address(coordinator),
        "ca": str(tls / "ca.crt"),
        "coordinator_key": str(tmp_path / "coordinator.pub"),
        "roster": str(tmp_path / "roster.json"),
        "identity_key": str(tmp_path / "north.pem"),
        "node_key": str(tmp_path / "north.node"),
        "state": str(tmp_path / "state" / "north"),
    }

    def one(*overrides: str) -> ClientConf:
        return load_values(ClientConf, {**template("client"), **values}, list(overrides)).conf

    return one


def found(conf: ClientConf) -> tuple[dict[str, str], dict[str, str], int]:
    checks = check_client(conf)
    details = {check.name: check.detail for check in checks.checks if not check.problems}
    problems = {check.name: check.problems[0] for check in checks.checks if check.problems}
    assert {name for name, problem in problems.items() if not problem.remedy} == set()
    return details, {name: p.code for name, p in problems.items()}, checks.exit_code


def test_a_sound_conf_is_described(conf: Callable[..., ClientConf]) -> None:
    details, codes, exit_code = found(conf())
    assert (codes, exit_code) == ({}, 0)
    assert list(details) == [
        "task", "data", "policy", "device", "disk", "ledger", "coordinator key", "identity key",
        "node key", "roster", "authority", "connection", "clock",
    ]  # fmt: skip
    assert details["task"].startswith("digits, ")
    assert details["data"] == "1797 rows fit the task's contract"
    assert details["device"] == "cpu"
    assert len(details["coordinator key"].split()) == 16, "a fingerprint to compare by eye"
    assert len(details["identity key"].split()) == 8, "words to compare by phone"
    assert details["roster"] == "version 2, 1 sites"


def test_several_failures_are_reported_together(
    conf: Callable[..., ClientConf], tmp_path: Path
) -> None:
    generate_node_key(tmp_path / "other.node")
    details, codes, _ = found(
        conf(
            "source.reader=wine",
            "device=cuda:63",
            "policy.models=[cnn]",
            f"node_key={tmp_path / 'other.node'}",
            f"identity_key={tmp_path / 'nowhere.pem'}",
            "coordinator=127.0.0.1:1",
        )
    )
    assert codes == {
        "data": "LF2020",
        "policy": "LF4601",
        "device": "LF1102",
        "identity key": "LF4151",
        "roster": "LF4151",
        "connection": "LF5331",
    }
    assert "clock" not in details


def test_a_roster_that_names_other_keys_is_found(
    conf: Callable[..., ClientConf], tmp_path: Path
) -> None:
    generate_node_key(tmp_path / "other.node")
    _, codes, _ = found(conf(f"node_key={tmp_path / 'other.node'}"))
    assert codes == {"roster": "LF4512"}
    _, codes, _ = found(conf("name=east"))
    assert codes == {"roster": "LF4512"}


def test_a_ledger_that_was_changed_or_has_no_second_place_is_found(
    conf: Callable[..., ClientConf], tmp_path: Path
) -> None:
    (tmp_path / "ledger.sqlite").write_text("something else " * 99)
    _, codes, _ = found(conf(f"ledger.file={tmp_path / 'ledger.sqlite'}"))
    assert codes == {"ledger": "LF4204"}
    _, codes, _ = found(conf(f"ledger.head={tmp_path / 'unmounted' / 'head'}"))
    assert codes == {"ledger": "LF4211"}


def test_a_full_disk_is_found(
    conf: Callable[..., ClientConf], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        preflight.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 2**29)
    )
    _, codes, _ = found(conf())
    assert codes == {"disk": "LF5334"}


@pytest.mark.parametrize(
    ("seconds", "sound"), [(3, True), (60, False), (-200, True), (-400, False)]
)
def test_a_clock_that_node_authentication_would_refuse_is_found(
    coordinator: Answering, tls: Path, seconds: float, sound: bool
) -> None:
    ours = lambda: datetime.now(UTC) + timedelta(seconds=seconds)  # noqa: E731
    contact = reach(address(coordinator), tls / "ca.crt", ours)
    if sound:
        assert "of the coordinator's" in contact.check_clock()
        return
    with pytest.raises(RunError) as failed:
        contact.check_clock()
    assert failed.value.code == "LF5333"


def test_a_certificate_of_another_authority_or_for_another_host_is_found(
    coordinator: Answering, tmp_path: Path, tls: Path
) -> None:
    make_certificates(tmp_path / "other", [])
    with pytest.raises(RunError) as failed:
        reach(address(coordinator), tmp_path / "other" / "ca.crt")
    assert failed.value.code == "LF5332"
    with answering(tls, "127.0.0.2") as elsewhere, pytest.raises(RunError) as failed:
        reach(address(elsewhere, "127.0.0.2"), tls / "ca.crt")
    assert failed.value.code == "LF5332"
    with pytest.raises(RunError) as failed:
        reach(address(coordinator), tls / "nowhere.crt")
    assert failed.value.code == "LF5332"


def test_what_answers_without_a_date_is_no_coordinator(coordinator: Answering, tls: Path) -> None:
    coordinator.date = lambda: "yesterday"
    with pytest.raises(RunError) as failed:
        reach(address(coordinator), tls / "ca.crt")
    assert failed.value.code == "LF5331"
