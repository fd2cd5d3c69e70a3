from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

import lepton_fed.export.writing as writing_module
from lepton_fed.core.digests import canonical_json
from lepton_fed.errors import BundleRefused, TaskError
from lepton_fed.export.bundle import VerifiedBundle, verify_bundle
from lepton_fed.export.manifest import (
    FORMAT_VERSION,
    MAX_SITES,
    FileRecord,
    Parity,
    ParityCheck,
    Release,
    encode_manifest,
    make_manifest,
    parse_manifest,
)
from lepton_fed.export.release import ExportReport
from lepton_fed.export.writing import write_bundle
from lepton_fed.identity.signature import PrivateKey, VerifiedBytes, fingerprint
from lepton_fed.runs.summary import SiteSummary

KEY = PrivateKey.from_private_bytes(bytes(range(32)))
RELEASE = Release(
    version=1,
    created="2026-01-02T03:04:05Z",
    parity=Parity("5 real rows in turn", [ParityCheck(1, 1e-8, 1e-5)]),
    exported_with={"onnx": "1.23.2"},
)


@pytest.fixture
def parts(mlp: Any, summary_of: Any) -> dict[str, Any]:
    return {
        "task": mlp.task,
        "summary": summary_of(mlp.task),
        "release": RELEASE,
        "onnx": mlp.onnx,
        "weights": mlp.weights,
        "card": "# Card\n",
        "private_key": KEY,
    }


def code_of(folder: Path, parts: dict[str, Any]) -> str:
    with pytest.raises(TaskError) as caught:
        write_bundle(folder, **parts)
    assert caught.value.problems[0].remedy
    return caught.value.code


def test_a_bundle_is_six_plain_files(exported: ExportReport) -> None:
    folder = exported.bundle.folder
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "card.md",
        "manifest.json",
        "manifest.sig",
        "model.onnx",
        "model.safetensors",
        "task.json",
    }
    manifest = (folder / "manifest.json").read_bytes()
    assert manifest == canonical_json(json.loads(manifest))
    signature = (folder / "manifest.sig").read_bytes()
    assert len(base64.b64decode(signature)) == 64
    assert signature.endswith(b"=\n")
    for name, record in json.loads(manifest)["files"].items():
        content = (folder / name).read_bytes()
        assert record == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def test_the_signature_is_over_the_dsse_encoding_of_the_manifest(exported: ExportReport) -> None:
    folder = exported.bundle.folder
    manifest = (folder / "manifest.json").read_bytes()
    kind = b"application/vnd.lepton-fed.manifest.v1+json"
    encoding = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(manifest), manifest)
    KEY.public_key().verify(base64.b64decode((folder / "manifest.sig").read_bytes()), encoding)


def test_the_manifest_says_what_task_and_run_say(
    exported: ExportReport, mlp: Any, summary_of: Any
) -> None:
    summary, manifest = summary_of(mlp.task), exported.bundle.manifest
    assert manifest.format_version == FORMAT_VERSION == 1
    assert (manifest.version, manifest.created) == (3, "2026-01-02T03:04:05Z")
    assert (manifest.run, manifest.run_digest) == (summary.run, summary.digest)
    assert (manifest.task, manifest.layout) == (mlp.task.digest, summary.layout)
    assert manifest.model == summary.model
    assert manifest.metrics == summary.metrics
    assert manifest.signer == fingerprint(KEY.public_key())
    assert manifest.parity == exported.parity
    assert manifest.trained_with == summary.versions
    assert manifest.sites_total == 2
    assert [(s.name, s.rounds, s.epsilon) for s in manifest.sites] == [
        ("north", 20, None),
        ("south", 19, None),
    ]


def test_what_was_put_in_comes_out(exported: ExportReport, mlp: Any) -> None:
    bundle = verify_bundle(exported.bundle.folder, KEY.public_key())
    assert bundle == exported.bundle
    assert bundle.task == mlp.task
    assert bundle.onnx == mlp.onnx
    weights = bundle.weights()
    assert sorted(weights) == sorted(mlp.weights)
    for name, array in mlp.weights.items():
        assert weights[name].dtype == array.dtype
        assert np.array_equal(weights[name], array)


def test_two_writes_of_the_same_parts_are_equal_to_the_byte(
    parts: dict[str, Any], tmp_path: Path
) -> None:
    for name in ("one", "two"):
        write_bundle(tmp_path / name, **parts)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_privacy_of_each_site_is_in_the_manifest(mlp: Any, summary_of: Any) -> None:
    sites = [
        SiteSummary("a", 3, epsilon=7.5, noise_multiplier=1.25),
        SiteSummary("b", 3),
    ]
    summary = summary_of(
        mlp.task,
        sites=sites,
        delta=1e-5,
        clip=0.5,
        outside_epsilon=["evaluation"],
        mechanism="dp_sgd",
        sampler="shuffled",
        randomness="system",
    )
    manifest = make_manifest(mlp.task, summary, RELEASE, "signer", {})
    assert (manifest.delta, manifest.clip) == (1e-5, 0.5)
    assert manifest.outside_epsilon == ["evaluation"]
    assert (manifest.sampler, manifest.adjacency) == ("shuffled", "zero-out-one")
    assert (manifest.randomness, manifest.mechanism) == ("system", "dp_sgd")
    bare = make_manifest(mlp.task, summary_of(mlp.task), RELEASE, "signer", {})
    assert (bare.mechanism, bare.sampler, bare.adjacency, bare.randomness) == ("", "", "", "")
    assert [(s.epsilon, s.noise_multiplier) for s in manifest.sites] == [(7.5, 1.25), (None, None)]


def test_of_very_many_sites_the_most_exposed_are_listed(mlp: Any, summary_of: Any) -> None:
    sites = [SiteSummary(f"s{i:04}", 1, epsilon=i / 1000) for i in range(3000)]
    sites[17] = SiteSummary("s0017", 1)  # no epsilon at all is the largest there is
    files = {
        name: FileRecord("0" * 64, 1)
        for name in ("card.md", "model.onnx", "model.safetensors", "task.json")
    }
    manifest = make_manifest(mlp.task, summary_of(mlp.task, sites=sites), RELEASE, "s", files)
    data = encode_manifest(manifest)
    assert len(data) < 2**20
    assert parse_manifest(VerifiedBytes(data)) == manifest
    names = [site.name for site in manifest.sites]
    assert manifest.sites_total == 3000
    assert len(names) == MAX_SITES == 1000
    assert names == sorted(names)
    assert {"s0017", "s2999", "s2001"} <= set(names)
    assert "s2000" not in names


@pytest.mark.parametrize("kind", ["bundle", "empty", "file", "link"])
def test_nothing_is_overwritten(parts: dict[str, Any], tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "bundle"
    if kind == "bundle":
        write_bundle(folder, **parts)
    elif kind == "empty":
        folder.mkdir()
    elif kind == "file":
        folder.write_bytes(b"mine")
    else:
        folder.symlink_to("nowhere")
    before = os.lstat(folder)
    assert code_of(folder, parts) == "LF3208"
    assert os.lstat(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_bundle_that_appears_meanwhile_is_not_overwritten(
    parts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bundle"

    def slow(building: Path, key: Any) -> VerifiedBundle:
        folder.mkdir()
        (folder / "mine").write_bytes(b"mine")
        return verify_bundle(building, key)

    monkeypatch.setattr(writing_module, "verify_bundle", slow)
    assert code_of(folder, parts) == "LF3208"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert (folder / "mine").read_bytes() == b"mine"


def test_a_full_disk_leaves_nothing(
    parts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def full(descriptor: int) -> None:
        written.append(descriptor)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert code_of(tmp_path / "bundle", parts) == "LF3210"
    assert list(tmp_path.iterdir()) == []


def test_everything_is_synced_before_the_folder_gets_its_name(
    parts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    sync, rename = os.fsync, Path.rename

    def synced(descriptor: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        events.append(kind)
        sync(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        events.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    write_bundle(tmp_path / "bundle", **parts)
    assert events == [*["file"] * 6, "folder", "rename", "folder"]


def test_what_no_reader_would_accept_is_not_written(parts: dict[str, Any], tmp_path: Path) -> None:
    parts["onnx"] = b"not a model"
    with pytest.raises(BundleRefused, match="LF4114"):
        write_bundle(tmp_path / "bundle", **parts)
    assert list(tmp_path.iterdir()) == []


def test_texts_beyond_what_a_reader_takes_are_refused(
    parts: dict[str, Any], tmp_path: Path
) -> None:
    assert code_of(tmp_path / "b", {**parts, "card": "x" * (2**20 + 1)}) == "LF3209"
    long = [SiteSummary("x" * 2000 + str(i), 1) for i in range(1000)]
    assert code_of(tmp_path / "b", {**parts, "summary": replace(parts["summary"], sites=long)}) == (
        "LF3209"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_summary_with_numbers_that_are_none_is_refused(
    parts: dict[str, Any], tmp_path: Path, wrong: float
) -> None:
    for changes in ({"delta": wrong}, {"metrics": {"loss": wrong}}):
        summary = replace(parts["summary"], **changes)
        assert code_of(tmp_path / "b", {**parts, "summary": summary}) == "LF3211"


def test_missing_parents_are_made(parts: dict[str, Any], tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "runs" / "r" / "bundle", **parts)
    assert bundle.folder == tmp_path / "runs" / "r" / "bundle"
    assert bundle.folder.is_dir()


def test_an_unwritable_place_is_named(parts: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert code_of(tmp_path / "file" / "bundle", parts) == "LF3210"


def test_a_bundle_behind_a_link_to_its_folder_is_read(
    exported: ExportReport, tmp_path: Path
) -> None:
    (tmp_path / "current").symlink_to(exported.bundle.folder)
    assert verify_bundle(tmp_path / "current", KEY.public_key()).task == exported.bundle.task


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl program")
def test_the_documented_shell_commands_verify_a_bundle(
    exported: ExportReport, tmp_path: Path
) -> None:
    page = (Path(__file__).parents[3] / "docs/reference/bundle.md").read_text(encoding="utf-8")
    commands = page.split("```sh\n")[1].split("```")[0]
    folder = Path(shutil.copytree(exported.bundle.folder, tmp_path / "bundle"))
    (tmp_path / "coordinator.pub").write_bytes(
        KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )

    def verified() -> bool:
        done = subprocess.run(
            ["bash", "-c", commands], cwd=folder, capture_output=True, check=False
        )
        return done.returncode == 0

    assert verified()
    manifest = folder / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"version":3', b'"version":4'))
    assert not verified()


def test_reading_and_using_a_bundle_needs_no_torch() -> None:
    code = (
        "import sys, lepton_fed.export.predict, lepton_fed.identity.keys;"
        "sys.exit(bool({'torch', 'flwr', 'opacus', 'sklearn', 'omegaconf'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
