"""A database that cannot be used is named and left alone; what the SuperLink fails of is told."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import InvalidRequestError, OperationalError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from lepton_fed.errors import RunError
from lepton_fed.flower.compat import FlowerError
from lepton_fed.flower.failures import check_database, telling
from lepton_fed.flower.parcels import Post

ROWS = 4000


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "flower.sqlite"
    with closing(sqlite3.connect(path)) as made:
        made.execute("PRAGMA journal_mode = WAL")
        made.execute("CREATE TABLE t (a INTEGER PRIMARY KEY, b TEXT)")
        made.executemany("INSERT INTO t VALUES (?, ?)", ((n, "x" * 100) for n in range(ROWS)))
        made.commit()
    return path


@pytest.fixture
def held(database: Path) -> Iterator[Path]:
    """A database that somebody writes to; fine again afterwards."""
    with closing(sqlite3.connect(database, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield database
    check_database(database, wait_s=0.0)


def code_and_text(error: RunError) -> tuple[str, str]:
    return error.code, str(error)


def test_a_whole_database_and_none_are_fine(database: Path) -> None:
    before = database.read_bytes()
    check_database(database)
    assert database.read_bytes() == before
    check_database(database.with_name("none"))
    assert not database.with_name("none").exists()


@pytest.mark.parametrize("damage", ["head", "middle", "cut", "text"])
def test_a_damaged_database_is_named_and_left_alone(database: Path, damage: str) -> None:
    content = bytearray(database.read_bytes())
    if damage == "head":
        content[:16] = b"\0" * 16
    elif damage == "middle":
        content[8192:24576] = b"\xff" * 16384
    elif damage == "cut":
        del content[len(content) // 2 :]
    else:
        content[:] = b"this is no database at all\n" * 1000
    database.write_bytes(content)
    with pytest.raises(RunError) as failed:
        check_database(database)
    code, said = code_and_text(failed.value)
    assert code == "LF5017"
    assert str(database) in said
    assert "damaged" in said
    assert database.read_bytes() == content


def test_a_locked_database_is_named(held: Path) -> None:
    with pytest.raises(RunError) as failed:
        check_database(held, wait_s=0.0)
    assert failed.value.code == "LF5018"
    assert str(held) in str(failed.value)


def failing_query(path: Path) -> None:
    engine = create_engine(f"sqlite:///{path}", poolclass=NullPool, connect_args={"timeout": 0.0})
    with engine.connect() as connection:
        connection.execute(text("INSERT INTO t (b) VALUES ('y')"))
        connection.commit()


def test_a_lock_that_is_met_later_is_told_as_at_the_start(held: Path) -> None:
    with pytest.raises(RunError) as failed, telling():
        failing_query(held)
    code, said = code_and_text(failed.value)
    assert code == "LF5018"
    assert "flower.sqlite" in said
    assert isinstance(failed.value.__cause__, SQLAlchemyError)


def test_damage_that_is_met_later_is_told_as_at_the_start(database: Path) -> None:
    database.write_bytes(b"this is no database at all\n" * 1000)
    with pytest.raises(RunError) as failed, telling():
        failing_query(database)
    assert failed.value.code == "LF5017"


def test_a_full_disk_is_told_as_one(database: Path) -> None:
    with closing(sqlite3.connect(database)) as full:
        pages = full.execute("PRAGMA page_count").fetchone()[0]
        full.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(sqlite3.OperationalError) as met:
            full.executemany("INSERT INTO t (b) VALUES (?)", (("z" * 4000,) for _ in range(100)))
    with pytest.raises(RunError) as failed, telling():
        raise OperationalError("INSERT", {}, met.value)
    assert failed.value.code == "LF5209"
    assert "full" in str(failed.value)


@pytest.mark.parametrize(
    "error",
    [
        FlowerError(4, "the run is no more"),
        httpx.ReadTimeout("timed out"),
        httpx.HTTPStatusError(
            "500", request=httpx.Request("GET", "http://x"), response=httpx.Response(500)
        ),
        InvalidRequestError("the session is closed"),
    ],
)
def test_whatever_the_superlink_fails_of_is_one_error(error: Exception) -> None:
    with pytest.raises(RunError) as failed, telling():
        raise error
    assert failed.value.code == "LF5019"
    assert str(error).splitlines()[0] in str(failed.value)


def test_what_a_file_is_refused_is_told_with_its_place() -> None:
    with pytest.raises(RunError) as failed, telling("/var/state/replies"):
        raise OSError(28, "No space left on device")
    assert code_and_text(failed.value)[0] == "LF5209"
    assert "/var/state/replies" in str(failed.value)


def test_an_error_of_lepton_fed_and_a_bug_go_through() -> None:
    for error in (RuntimeError("a bug"), KeyError("another")):
        with pytest.raises(type(error)), telling():
            raise error


class Broken:
    """A SuperLink whose every call fails."""

    def __getattr__(self, name: str) -> object:
        def fail(*arguments: object) -> None:
            raise InvalidRequestError(name)

        return fail


@pytest.mark.parametrize(
    "use",
    [
        lambda post: post.get_node_ids(),
        lambda post: post.push_messages([]),
        lambda post: list(post.pull_messages(["m"])),
        lambda post: post.drop_messages(["m"]),
    ],
)
def test_every_way_to_use_a_failing_superlink_is_told(tmp_path: Path, use) -> None:
    post = Post(Broken(), tmp_path / "replies")
    with pytest.raises(RunError) as failed:
        use(post)
    assert failed.value.code == "LF5019"
