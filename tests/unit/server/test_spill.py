from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from lepton_fed.core.layout import Vector
from lepton_fed.flower.parcels import FiledVector
from lepton_fed.runs.folder import RunFolder
from lepton_fed.server.spill import Spill

SIZE = 1000


@pytest.fixture
def spill(tmp_path: Path) -> Spill:
    return Spill(tmp_path / "run" / "spill", 3, SIZE)


def test_what_was_written_is_read_back_by_slices(spill: Spill) -> None:
    rng = np.random.default_rng(0)
    written = {site: rng.normal(size=SIZE).astype(np.float32) for site in ("b", "a")}
    for weight, (site, vector) in enumerate(written.items(), start=1):
        spill.add(site, {"delta": vector, "control": -vector}, float(weight))
    assert spill.round_number == 3
    assert spill.contributors == ("a", "b")
    assert (spill.weight("b"), spill.weight("a")) == (1.0, 2.0)
    for site, vector in written.items():
        for part in (slice(0, SIZE), slice(17, 400), slice(999, 1000), slice(5, 5)):
            found = spill.read(site, "delta", part)
            assert found.dtype == np.float32
            assert found.tobytes() == vector[part].tobytes()
            assert spill.read(site, "control", part).tobytes() == (-vector)[part].tobytes()


def test_a_slice_is_the_readers_own(spill: Spill) -> None:
    spill.add("a", {"delta": np.zeros(SIZE, np.float32)}, 1.0)
    spill.read("a", "delta", slice(0, 10))[:] = 9
    assert not spill.read("a", "delta", slice(0, 10)).any()


def test_a_received_read_only_vector_can_be_written(spill: Spill) -> None:
    spill.add("a", {"delta": np.frombuffer(bytes(4 * SIZE), dtype="<f4")}, 1.0)
    assert not spill.read("a", "delta", slice(0, SIZE)).any()


@pytest.mark.parametrize(
    "site", ["../../escape", "/etc/passwd", "a/b", "..", "", "x" * 5000, "a\0"]
)
def test_a_name_is_never_a_path(tmp_path: Path, site: str) -> None:
    folder = tmp_path / "spill"
    spill = Spill(folder, 1, 4)
    spill.add(site, {"../delta": np.arange(4, dtype=np.float32)}, 1.0)
    assert spill.read(site, "../delta", slice(1, 3)).tolist() == [1, 2]
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == list(folder.iterdir())


def test_names_cannot_run_into_each_other(spill: Spill) -> None:
    spill.add("a", {"bc": np.ones(SIZE, np.float32)}, 1.0)
    spill.add("ab", {"c": np.zeros(SIZE, np.float32)}, 1.0)
    assert spill.read("a", "bc", slice(0, 1))[0] == 1


def test_closing_removes_the_folder_and_opening_removes_what_a_killed_round_left(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "spill"
    first = Spill(folder, 1, 4)
    first.add("a", {"delta": np.zeros(4, np.float32)}, 1.0)
    assert any(folder.iterdir())
    second = Spill(folder, 2, 4)
    assert not any(folder.iterdir())
    assert second.contributors == ()
    second.close()
    assert not folder.exists()
    second.close()


def test_an_update_in_a_file_is_kept_as_that_file(tmp_path: Path) -> None:
    values = np.arange(10, dtype=np.float32)
    values.tofile(tmp_path / "reply")
    spill = Spill(tmp_path / "spill", 1, 10)
    spill.add("north", {"delta": cast("Vector", FiledVector(tmp_path / "reply", 10))}, 1.0)
    (kept,) = (tmp_path / "spill").iterdir()
    assert kept.samefile(tmp_path / "reply")
    (tmp_path / "reply").unlink()
    assert np.array_equal(spill.read("north", "delta", slice(3, 7)), values[3:7])
    spill.close()


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("open_umask")
def test_only_the_coordinator_s_own_account_reads_single_updates(tmp_path: Path) -> None:
    np.zeros(4, np.float32).tofile(tmp_path / "reply")
    (tmp_path / "reply").chmod(0o644)
    spill = Spill(tmp_path / "run" / "spill", 1, 4)
    spill.add("a", {"delta": np.zeros(4, np.float32)}, 1.0)
    spill.add("b", {"delta": cast("Vector", FiledVector(tmp_path / "reply", 4))}, 1.0)
    folder = tmp_path / "run" / "spill"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()] == [0o600, 0o600]


def test_what_a_killed_round_left_goes_when_the_run_is_resumed(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "test", "conf: true\n")
    Spill(folder.spill, 1, 4).add("a", {"delta": np.zeros(4, np.float32)}, 1.0)
    folder.sweep()
    assert not folder.spill.exists()
    folder.sweep()
