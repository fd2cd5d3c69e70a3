from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lepton_fed.errors import RunError
from lepton_fed.runs.files import append, read_tensors, sweep, write_atomic, write_tensors


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_atomic(path, b"old and long")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert [each.name for each in tmp_path.iterdir()] == ["summary.json"]


@pytest.mark.parametrize("step", ["write", "sync", "rename"])
@pytest.mark.parametrize("old", [b"old", None], ids=["replaced", "new"])
def test_a_failure_in_the_middle_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, old: bytes | None
) -> None:
    path = tmp_path / "model.safetensors"
    if old is not None:
        path.write_bytes(old)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    content: Any = b"new" * 1000
    if step == "write":
        content = "not bytes"
    elif step == "sync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(TypeError if step == "write" else RunError):
        write_atomic(path, content)
    monkeypatch.undo()

    assert (path.read_bytes() if path.exists() else None) == old
    assert [each for each in tmp_path.iterdir() if each != path] == []
    write_atomic(path, b"next")
    assert [each.name for each in tmp_path.iterdir()] == ["model.safetensors"]
    assert path.read_bytes() == b"next"


def test_file_and_folder_are_synced_around_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, steps = tmp_path / "file", []
    rename, sync = Path.replace, os.fsync

    def noting_sync(number: int) -> None:
        folder = stat.S_ISDIR(os.fstat(number).st_mode)
        steps.append("sync folder" if folder else "sync file")
        sync(number)

    def noting_rename(self: Path, target: Path) -> Path:
        steps.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", noting_sync)
    monkeypatch.setattr(Path, "replace", noting_rename)
    write_atomic(path, b"content")
    assert steps == ["sync file", "rename", "sync folder"]


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (1, 0, 2)])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "uint8", "bool"])
def test_tensors_keep_shape_type_and_bits(
    tmp_path: Path, shape: tuple[int, ...], dtype: str
) -> None:
    value = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    write_tensors(tmp_path / "t.safetensors", {"x": value}, {"round": "1"})
    tensors, about = read_tensors(tmp_path / "t.safetensors")
    assert tensors["x"].dtype == value.dtype
    assert tensors["x"].shape == shape
    assert tensors["x"].tobytes() == value.tobytes()
    assert about == {"round": "1"}


def test_any_memory_order_is_written_as_it_reads(tmp_path: Path) -> None:
    square = np.arange(6, dtype=np.float32).reshape(2, 3)
    given = {"f": np.asfortranarray(square), "t": square.T, "s": square[:, ::2]}
    write_tensors(tmp_path / "t.safetensors", given, {})
    tensors, about = read_tensors(tmp_path / "t.safetensors")
    for name, value in given.items():
        np.testing.assert_array_equal(tensors[name], value)
    assert about == {}


@pytest.mark.parametrize(
    "content", [b"", b"short", b"\xff" * 200, (2**40).to_bytes(8, "little") + b"{}", b"\0" * 64]
)
def test_a_file_that_holds_no_tensors_is_a_value_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError):
        read_tensors(path)


def told(action: Callable[[], object]) -> tuple[str, str, str]:
    with pytest.raises(RunError) as caught:
        action()
    (problem,) = caught.value.problems
    assert problem.remedy
    return problem.code, problem.what, problem.where


def test_a_file_that_cannot_be_written_is_named_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "none" / "model.safetensors"
    found = told(lambda: write_tensors(path, {"x": np.zeros(1)}, {}))
    assert found == ("LF5209", "this cannot be written: No such file or directory", str(path))


def test_a_name_as_long_as_the_system_takes_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("n" * os.pathconf(tmp_path, "PC_NAME_MAX"))
    write_atomic(path, b"content")
    assert path.read_bytes() == b"content"
    longer = path.with_name(f"{path.name}n")
    assert told(lambda: write_atomic(longer, b"content"))[0] == "LF5209"
    assert list(tmp_path.iterdir()) == [path]


def test_tensors_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    assert told(lambda: read_tensors(tmp_path / "none"))[::2] == ("LF5210", str(tmp_path / "none"))


class Filling(FileIO):
    """A disk with room for a few bytes more."""

    def write(self, content: Any, /) -> int:
        before = os.fstat(self.fileno()).st_size
        if before >= 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(memoryview(content)[: 10 - before])


def test_what_is_appended_is_there_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    with Filling(tmp_path / "log", "ab") as file:
        append(file, b"1234\n")
        with pytest.raises(OSError, match="No space left"):
            append(file, b"567890\n")
        append(file, b"5678\n")
    assert (tmp_path / "log").read_bytes() == b"1234\n5678\n"


def test_a_full_device_is_an_error_of_appending() -> None:
    with FileIO("/dev/full", "ab") as file, pytest.raises(OSError, match="No space left"):
        append(file, b"line\n")


def test_what_was_half_written_is_swept_from_the_folders_that_are_named(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    for path in (tmp_path / ".a.partial", inner / ".b.partial", inner / "c.json"):
        path.write_bytes(b"half")
    sweep(tmp_path, tmp_path / "missing")
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".b.partial", "c.json", "inner"]
    sweep(inner)
    assert [path.name for path in inner.iterdir()] == ["c.json"]
    (inner / ".d.partial").mkdir()
    with pytest.raises(RunError) as caught:
        sweep(inner)
    assert caught.value.code == "LF5209"
