"""A SuperLink in this process: what it fails of is told, and its log is the coordinator's."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from sqlalchemy.exc import OperationalError

from lepton_fed.errors import RunError
from lepton_fed.flower import compat
from lepton_fed.flower.parcels import Post
from lepton_fed.flower.superlink import SuperLink
from lepton_fed.identity.certificates import make_certificates
from lepton_fed.identity.node_key import generate_node_key, node_public_pem

NODE = "north"


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "state" / "flower.sqlite"


@pytest.fixture
def link(tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SuperLink]:
    monkeypatch.setattr(logging.getLogger("flwr"), "handlers", [])
    make_certificates(tmp_path / "tls", [])
    generate_node_key(tmp_path / "north.node")
    database.parent.mkdir()
    made = SuperLink(
        ("127.0.0.1", 0), tmp_path / "tls/server.crt", tmp_path / "tls/server.key", database
    )
    made.start({NODE: node_public_pem((tmp_path / "north.node.pub").read_text())})
    try:
        yield made
    finally:
        made.stop()


@pytest.mark.filterwarnings("ignore:No path_separator:DeprecationWarning")  # alembic's
def test_a_task_that_was_ended_is_no_site_that_is_absent(link: SuperLink, database: Path) -> None:
    with link.grid() as grid:
        assert grid.get_node_ids() == []
        with closing(sqlite3.connect(database, timeout=30)) as other:
            changed = other.execute("UPDATE task SET active_until = '2000-01-01 00:00:00'").rowcount
            other.commit()
        assert changed == 1
        with pytest.raises(RunError) as unsent:
            grid.push_messages([Message(RecordDict(), 7, "train", ttl=60.0)])
        with pytest.raises(RunError) as absent:
            grid.get_node_ids()
    assert (unsent.value.code, absent.value.code) == ("LF5019", "LF5019")
    assert "had not heard for a minute" in str(absent.value)


@pytest.mark.filterwarnings("ignore:No path_separator:DeprecationWarning")  # alembic's
def test_what_flower_logs_is_one_line_of_the_coordinators(
    link: SuperLink, caplog: pytest.LogCaptureFixture
) -> None:
    del link
    flower = logging.getLogger("flwr")
    with caplog.at_level(logging.WARNING, "lepton_fed.server"):
        flower.error("it failed\n[SQL: a statement]\n[parameters: secrets]")
        flower.info("nothing to see")
    ours = [record.getMessage() for record in caplog.records if record.name != "flwr"]
    assert ours == ["flower: it failed"]
    assert len(flower.handlers) == 1


def test_a_damaged_database_keeps_the_superlink_from_starting(
    tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("flwr"), "handlers", [])
    make_certificates(tmp_path / "tls", [])
    database.parent.mkdir()
    database.write_bytes(b"no database" * 1000)
    with pytest.raises(RunError) as failed:
        SuperLink(
            ("127.0.0.1", 0), tmp_path / "tls/server.crt", tmp_path / "tls/server.key", database
        )
    assert failed.value.code == "LF5017"
    assert database.read_bytes() == b"no database" * 1000


class Full:
    """A SuperLink's state that stores nothing, and says why when it is asked otherwise."""

    def get_task_by_token(self, token: str) -> str:
        return token

    def store_object(self, *part: object) -> bool:
        return False

    def start_session(self, run: int) -> str:
        full = sqlite3.OperationalError("database or disk is full")
        full.sqlite_errorname = "SQLITE_FULL"
        raise OperationalError("INSERT", {}, full)


def test_a_part_that_could_not_be_stored_is_told_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compat.set_identity(1, compat.COORDINATOR_NODE)

    def push(request: Any, state: object, task: object) -> SimpleNamespace:
        root = request.message_object_trees[0].object_id
        return SimpleNamespace(objects_to_push=[root], session_id="s", message_ids=["m"])

    monkeypatch.setattr(compat.runtime_handlers, "push_messages", push)
    grid = object.__new__(compat.PrivateGrid)
    vars(grid).update({"_state": Full(), "_task": SimpleNamespace(run_id=1), "_token": "t"})
    message = Message(RecordDict({"c": ConfigRecord({"a": 1})}), 7, "train", ttl=60.0)
    with pytest.raises(RunError) as unstored:
        Post(grid, tmp_path / "replies").push_messages([message])
    assert unstored.value.code == "LF5209"
    monkeypatch.setattr(Full, "start_session", lambda self, run: "s")
    message = Message(RecordDict({"c": ConfigRecord({"a": 2})}), 7, "train", ttl=60.0)
    with pytest.raises(RunError) as unknown:
        Post(grid, tmp_path / "replies").push_messages([message])
    assert unknown.value.code == "LF5019"
