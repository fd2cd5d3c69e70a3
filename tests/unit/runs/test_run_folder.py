from __future__ import annotations

import csv
import errno
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lepton_fed.core.layout import Layout
from lepton_fed.errors import RunError
from lepton_fed.runs.files import read_tensors, write_tensors
from lepton_fed.runs.folder import ALL_SITES, RunFolder, find_run, list_runs
from lepton_fed.runs.summary import RunSummary, SiteSummary

LAYOUT = Layout.of(
    [
        ("weight", "shared", np.zeros((2, 3), np.float32)),
        ("steps", "local", np.zeros((), np.int64)),
        ("scale", "shared", np.zeros((), np.float32)),
    ]
)

SUMMARY = RunSummary(
    run="20260101T000000Z-digits-abcd",
    task="1" * 64,
    layout="2" * 64,
    model="3" * 64,
    digest="4" * 64,
    repeatable=True,
    seed=2**52,
    rounds=10,
    strategy="fedavg",
    parameters=1234,
    metrics={"loss": 0.25, "accuracy": 0.1 + 0.2},
    error_bounds={"auc": 1e-05},
    delta=1e-5,
    clip=None,
    outside_epsilon=["evaluation"],
    finished="2026-01-01T00:00:00+00:00",
    seconds=1.5,
    versions={"torch": "2.13.0"},
    sites=[
        SiteSummary("b", 10, {"accuracy": 1.0}, epsilon=7.9, noise_multiplier=0.8, update_bytes=4),
        SiteSummary("ä", 0),
    ],
    events="5" * 64,
)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "deep" / "runs", "digits", "kind: simulation\n")


def code_of(action: Callable[[], object]) -> str:
    with pytest.raises(RunError) as caught:
        action()
    (problem,) = caught.value.problems
    assert problem.where
    assert problem.remedy
    return problem.code


def test_a_new_folder_is_named_by_time_task_and_short_id(folder: RunFolder) -> None:
    assert re.fullmatch(r"\d{8}T\d{6}Z-digits-[0-9a-f]{4}", folder.name)
    assert folder.path.parent.name == "runs"
    assert folder.conf.read_text() == "kind: simulation\n"
    assert (folder.path / "checkpoints").is_dir()
    assert folder.events == folder.path / "events.jsonl"
    assert folder.bundle == folder.path / "bundle"
    assert folder.site("a") == folder.path / "sites" / "a"


def test_two_runs_of_one_second_have_folders_of_their_own(tmp_path: Path) -> None:
    names = {RunFolder.create(tmp_path, "digits", "").name for _ in range(2)}
    assert len(names) == 2


def test_a_folder_that_cannot_be_made_is_a_located_error(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    assert code_of(lambda: RunFolder.create(tmp_path / "runs", "digits", "")) == "LF5201"


def test_metrics_are_one_tidy_table(folder: RunFolder) -> None:
    first = {ALL_SITES: {"loss": 0.1 + 0.2, "accuracy": 1.0}, 'a,"b"\n': {"loss": 1e-300}}
    folder.append_metrics(0, first)
    folder.append_metrics(1, {ALL_SITES: {"loss": np.float64(2.5)}})
    with (folder.path / "metrics.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["round", "site", "metric", "value"],
        ["0", "all", "loss", "0.30000000000000004"],
        ["0", "all", "accuracy", "1.0"],
        ["0", 'a,"b"\n', "loss", "1e-300"],
        ["1", "all", "loss", "2.5"],
    ]


def checkpoints(folder: RunFolder) -> list[str]:
    return sorted(path.name for path in (folder.path / "checkpoints").iterdir())


def test_the_newest_two_checkpoints_are_kept(folder: RunFolder) -> None:
    for number in range(1, 5):
        folder.write_checkpoint(number, {"model": np.full(3, number, np.float32)}, {"n": "x"})
        kept = [n for n in (number - 1, number) if n]
        assert checkpoints(folder) == [f"round-{n:04d}.safetensors" for n in kept]
    tensors, about = read_tensors(folder.path / "checkpoints" / "round-0003.safetensors")
    assert tensors["model"].tolist() == [3, 3, 3]
    assert about == {"n": "x"}


def test_beyond_round_9999_the_newest_two_are_still_the_newest(folder: RunFolder) -> None:
    for number in range(9998, 10003):
        folder.write_checkpoint(number, {"model": np.zeros(1, np.float32)}, {})
        assert f"round-{number}.safetensors" in checkpoints(folder)
    assert checkpoints(folder) == ["round-10001.safetensors", "round-10002.safetensors"]


def test_a_file_of_somebody_elses_among_the_checkpoints_stops_nothing(folder: RunFolder) -> None:
    (folder.path / "checkpoints" / "notes.txt").write_text("mine")
    for number in range(1, 4):
        folder.write_checkpoint(number, {"model": np.zeros(1, np.float32)}, {})
    assert checkpoints(folder) == [
        "notes.txt",
        "round-0002.safetensors",
        "round-0003.safetensors",
    ]


def test_the_final_model_is_written_by_name_and_read_as_a_vector(folder: RunFolder) -> None:
    model = np.arange(7, dtype=np.float32)
    folder.write_model(LAYOUT, model, {"layout": LAYOUT.digest})
    tensors, _ = read_tensors(folder.path / "model.safetensors")
    assert {name: value.shape for name, value in tensors.items()} == {"weight": (2, 3), "scale": ()}
    assert folder.read_model(LAYOUT).tobytes() == model.tobytes()


def test_a_run_without_a_final_model_says_so(folder: RunFolder) -> None:
    assert code_of(lambda: folder.read_model(LAYOUT)) == "LF5202"


def good_tensors() -> dict[str, Any]:
    return {"weight": np.zeros((2, 3), np.float32), "scale": np.zeros((), np.float32)}


@pytest.mark.parametrize(
    ("tensors", "layout"),
    [
        (good_tensors(), "0" * 64),
        ({"weight": np.zeros((2, 3), np.float32)}, LAYOUT.digest),
        (good_tensors() | {"weight": np.zeros((3, 2), np.float32)}, LAYOUT.digest),
        (good_tensors() | {"weight": np.zeros((2, 3), np.float64)}, LAYOUT.digest),
        (good_tensors() | {"scale": np.zeros(1, np.float32)}, LAYOUT.digest),
    ],
    ids=["another layout", "one missing", "another shape", "another type", "an axis more"],
)
def test_a_model_that_is_not_the_runs_is_a_located_error(
    folder: RunFolder, tensors: dict[str, Any], layout: str
) -> None:
    write_tensors(folder.path / "model.safetensors", tensors, {"layout": layout})
    assert code_of(lambda: folder.read_model(LAYOUT)) == "LF5203"


def test_a_broken_model_file_is_a_located_error(folder: RunFolder) -> None:
    folder.write_model(LAYOUT, np.zeros(7, np.float32), {"layout": LAYOUT.digest})
    path = folder.path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    assert code_of(lambda: folder.read_model(LAYOUT)) == "LF5203"


def test_a_summary_comes_back_as_it_was(folder: RunFolder) -> None:
    assert folder.read_summary() is None
    folder.write_summary(SUMMARY)
    assert folder.read_summary() == SUMMARY


def test_a_summary_can_be_read_without_lepton_fed(folder: RunFolder) -> None:
    folder.write_summary(SUMMARY)
    text = (folder.path / "summary.json").read_text()
    assert json.loads(text)["sites"][1]["name"] == "ä"
    assert text.endswith("}\n")


def test_a_summary_with_nan_is_not_written(folder: RunFolder) -> None:
    with pytest.raises(ValueError, match="JSON"):
        folder.write_summary(replace(SUMMARY, seconds=float("nan")))
    assert folder.read_summary() is None


def without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda record: {k: v for k, v in record.items() if k != key}


def with_value(key: str, value: object) -> Callable[[dict[str, Any]], Any]:
    return lambda record: record | {key: value}


@pytest.mark.parametrize(
    "change",
    [
        without("digest"),
        without("sites"),
        with_value("surprise", 1),
        with_value("rounds", "ten"),
        with_value("rounds", True),
        with_value("metrics", [1, 2]),
        with_value("metrics", {"loss": "low"}),
        with_value("sites", {}),
        with_value("sites", ["a"]),
        with_value("sites", [{"name": "a"}]),
        with_value("sites", [None]),
        lambda record: [record],
        lambda record: "text",
        lambda record: None,
        lambda record: 7,
    ],
)
def test_a_malformed_summary_is_a_located_error(
    folder: RunFolder, change: Callable[[dict[str, Any]], Any]
) -> None:
    folder.write_summary(SUMMARY)
    path = folder.path / "summary.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    assert code_of(folder.read_summary) == "LF5204"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"NaN", b"[" * 100_000, b'{"a":1,"a":2}']
)
def test_a_summary_that_is_no_json_is_a_located_error(folder: RunFolder, content: bytes) -> None:
    (folder.path / "summary.json").write_bytes(content)
    assert code_of(folder.read_summary) == "LF5204"


def make(root: Path, name: str, age_s: int = 0) -> None:
    (root / name).mkdir(parents=True)
    conf = root / name / "conf.yaml"
    conf.write_text("")
    os.utime(conf, (1_700_000_000 + age_s, 1_700_000_000 + age_s))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    root = tmp_path / "runs"
    make(root, "20260102T000000Z-digits-00aa")
    make(root, "20260101T000000Z-digits-ffff")
    make(root, "20260103T000000Z-wine-0001", age_s=9)
    make(root, "20260103T000000Z-digits-0001", age_s=3)
    (root / "notes").mkdir()
    (root / "file.txt").write_text("not a run")
    return root


def test_runs_are_listed_the_newest_last(runs: Path) -> None:
    assert [run.name for run in list_runs(runs)] == [
        "20260101T000000Z-digits-ffff",
        "20260102T000000Z-digits-00aa",
        "20260103T000000Z-digits-0001",
        "20260103T000000Z-wine-0001",
    ]
    assert list_runs(runs / "missing") == []
    assert list_runs(runs / "file.txt") == []


def test_of_two_runs_of_one_second_the_one_made_later_is_the_last(tmp_path: Path) -> None:
    make(tmp_path, "20260103T000000Z-zebra-ffff", age_s=0)
    make(tmp_path, "20260103T000000Z-ant-0000", age_s=1)
    assert find_run("last", tmp_path).name == "20260103T000000Z-ant-0000"


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("last", "20260103T000000Z-wine-0001"),
        ("00aa", "20260102T000000Z-digits-00aa"),
        ("wine-0001", "20260103T000000Z-wine-0001"),
        ("20260101T000000Z-digits-ffff", "20260101T000000Z-digits-ffff"),
    ],
)
def test_a_run_is_found_by_last_short_id_or_name(runs: Path, words: str, name: str) -> None:
    assert find_run(words, runs).name == name


def test_a_run_is_found_by_its_folder(runs: Path) -> None:
    path = runs / "20260102T000000Z-digits-00aa"
    assert find_run(str(path), runs / "elsewhere").path == path


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("0001", "more than one run goes by '0001'"),
        ("0aa", "no run goes by '0aa'"),
        ("notes", "no run goes by 'notes'"),
        ("digits", "no run goes by 'digits'"),
        ("", "no run goes by ''"),
    ],
)
def test_words_that_name_no_run_or_several_are_answered_with_names(
    runs: Path, words: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs)
    with pytest.raises(RunError) as caught:
        find_run(words, runs)
    (problem,) = caught.value.problems
    assert (problem.code, problem.what) == ("LF5205", what)
    assert "20260103T000000Z-wine-0001" in problem.remedy
    assert ("20260101T000000Z" in problem.remedy) == (words != "0001")


def test_where_there_is_no_run_the_remedy_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="lepton-fed simulate"):
        find_run("last", tmp_path / "runs")


WRITES: dict[str, Callable[[RunFolder], object]] = {
    "checkpoint": lambda folder: folder.write_checkpoint(3, {"model": np.zeros(4)}, {}),
    "model": lambda folder: folder.write_model(LAYOUT, np.zeros(7, np.float32), {}),
    "summary": lambda folder: folder.write_summary(SUMMARY),
}


def full(*_: object) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_full_disk_is_a_located_error_and_leaves_nothing_behind(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, write: Callable[[RunFolder], object]
) -> None:
    before = sorted(folder.path.rglob("*"))
    monkeypatch.setattr(os, "fsync", full)
    assert code_of(lambda: write(folder)) == "LF5209"
    assert sorted(folder.path.rglob("*")) == before


def test_metrics_that_cannot_be_written_leave_the_table_whole(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.append_metrics(0, {ALL_SITES: {"loss": 1.0}})
    before = (folder.path / "metrics.csv").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr("lepton_fed.runs.folder.append", full)
        assert code_of(lambda: folder.append_metrics(1, {ALL_SITES: {"loss": 2.0}})) == "LF5209"
    assert (folder.path / "metrics.csv").read_bytes() == before


def test_the_table_begins_with_its_heading_also_after_a_first_attempt_that_failed(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("lepton_fed.runs.folder.append", full)
        code_of(lambda: folder.append_metrics(0, {ALL_SITES: {"loss": 2.0}}))
    folder.append_metrics(0, {ALL_SITES: {"loss": 2.0}})
    assert (folder.path / "metrics.csv").read_text() == (
        "round,site,metric,value\n0,all,loss,2.0\n"
    )


def test_a_folder_whose_conf_cannot_be_written_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", full)
    assert code_of(lambda: RunFolder.create(tmp_path, "digits", "kind: simulation\n")) == "LF5209"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_already_is_not_taken_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secrets.token_hex", lambda count: "ab" * count)
    first = RunFolder.create(tmp_path, "digits", "mine")
    stamp = first.path.name.split("-")[0]

    class Frozen:
        @staticmethod
        def now(_: object) -> Any:
            class Then:
                @staticmethod
                def strftime(_: str) -> str:
                    return stamp

            return Then

    monkeypatch.setattr("lepton_fed.runs.folder.datetime", Frozen)
    assert code_of(lambda: RunFolder.create(tmp_path, "digits", "other")) == "LF5201"
    assert first.conf.read_text() == "mine"


def unreadable(folder: RunFolder, name: str) -> None:
    (folder.path / name).mkdir()  # not even root reads a folder as a file


def test_a_summary_or_model_that_cannot_be_read_is_a_located_error(folder: RunFolder) -> None:
    unreadable(folder, "summary.json")
    unreadable(folder, "model.safetensors")
    assert code_of(folder.read_summary) == "LF5210"
    assert code_of(lambda: folder.read_model(LAYOUT)) == "LF5210"


def test_words_longer_than_any_name_name_no_run(tmp_path: Path) -> None:
    assert code_of(lambda: find_run("x" * 300, tmp_path)) == "LF5210"


@pytest.mark.parametrize(
    "left",
    [
        bytes(40) + b"\n",
        b"\n",
        b"2,all\n",
        b"two,all,accuracy,0.5\n",
        b"2,all,accuracy,much\n",
        b"\xff\xfe,all,accuracy,0.5\n",
        b"9" * 5000 + b",all,accuracy,0.5\n",
        b'2,"all,accuracy,0.5\n',
        b"1,all,accuracy,0.25",
    ],
)
def test_what_a_power_cut_left_among_the_metrics_is_dropped(tmp_path: Path, left: bytes) -> None:
    folder = RunFolder.create(tmp_path, "task", "conf: true\n")
    folder.append_metrics(1, {ALL_SITES: {"accuracy": 0.5}})
    folder.append_metrics(2, {ALL_SITES: {"accuracy": 0.75}})
    path = folder.path / "metrics.csv"
    expected = b"round,site,metric,value\n1,all,accuracy,0.5\n"
    whole = path.read_bytes()
    for content in (whole + left, expected + left * left.endswith(b"\n") + whole[len(expected) :]):
        path.write_bytes(content)
        folder.drop_metrics_from(2)
        assert path.read_bytes() == expected


@pytest.mark.parametrize("left", [b"", b"round,si", bytes(200), bytes(200) + b"\n"])
def test_metrics_of_which_nothing_is_whole_begin_anew(tmp_path: Path, left: bytes) -> None:
    folder = RunFolder.create(tmp_path, "task", "conf: true\n")
    path = folder.path / "metrics.csv"
    path.write_bytes(left)
    folder.drop_metrics_from(1)
    folder.append_metrics(1, {ALL_SITES: {"accuracy": 0.5}})
    assert path.read_bytes() == b"round,site,metric,value\n1,all,accuracy,0.5\n"
