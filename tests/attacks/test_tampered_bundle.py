"""What a bundle resists: changed bytes, wrong keys, and a signer who means harm."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.numpy
from onnx import TensorProto, helper

import lepton_fed.export.bundle as bundle_module
from lepton_fed.core.digests import canonical_json
from lepton_fed.core.task import Column, DataContract, Target, Task
from lepton_fed.errors import BundleRefused
from lepton_fed.export.bundle import verify_bundle
from lepton_fed.export.manifest import MAX_MANIFEST_BYTES, Parity, ParityCheck, Release
from lepton_fed.export.predict import predict
from lepton_fed.export.writing import write_bundle
from lepton_fed.identity.signature import PrivateKey, sign
from lepton_fed.runs.summary import RunSummary, SiteSummary

KEY = PrivateKey.from_private_bytes(bytes(range(32)))
STRANGER = PrivateKey.from_private_bytes(bytes(range(1, 33)))
FILES = ["card.md", "model.onnx", "model.safetensors", "task.json"]
TASK = Task(
    name="tampered",
    data=DataContract(columns=[Column("a"), Column("b")], target=Target(classes=["no", "yes"])),
)


def model(**changes: Any) -> onnx.ModelProto:
    """A valid model of TASK, or one with a part of its outside changed."""
    name, shape = changes.get("input", "inputs"), changes.get("shape", ["b", 2])
    node = helper.make_node(
        changes.get("operator", "MatMul"), [name, "w"], ["logits"], domain=changes.get("domain", "")
    )
    weights = np.array([[1, -1], [2, 0.5]], np.float32)
    tensor = helper.make_tensor("w", TensorProto.FLOAT, [2, 2], weights.tobytes(), raw=True)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info(name, changes.get("dtype", 1), shape)],
        [helper.make_tensor_value_info("logits", 1, ["b", 2])],
        [tensor],
    )
    opsets = [helper.make_opsetid("", 20)]
    if "domain" in changes:
        opsets.append(helper.make_opsetid(changes["domain"], 1))
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def summary() -> RunSummary:
    return RunSummary(
        run="run-1",
        task=TASK.digest,
        layout="1" * 64,
        model="2" * 64,
        digest="3" * 64,
        repeatable=True,
        seed=1,
        rounds=2,
        strategy="fedavg",
        parameters=4,
        metrics={"loss": 0.5},
        error_bounds={},
        delta=None,
        clip=None,
        outside_epsilon=[],
        finished="2026-01-01T00:00:00Z",
        seconds=1.0,
        versions={},
        sites=[SiteSummary("site-1", 2)],
    )


def write(folder: Path, weights: float = 1.0) -> None:
    write_bundle(
        folder,
        task=TASK,
        summary=summary(),
        release=Release(1, "2026-01-01T00:00:00Z", Parity("", [ParityCheck(1, 0.0, 1e-5)]), {}),
        onnx=model().SerializeToString(),
        weights={"w": np.full((2, 2), weights, np.float32)},
        card="# Card\n",
        private_key=KEY,
    )


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine") / "bundle"
    write(folder)
    return folder


@pytest.fixture
def bundle(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "bundle"))


def codes_of(folder: Path, key: PrivateKey = KEY) -> set[str]:
    with pytest.raises(BundleRefused) as caught:
        verify_bundle(folder, key.public_key())
    assert all(problem.remedy for problem in caught.value.problems)
    assert str(folder) in str(caught.value)
    return {problem.code for problem in caught.value.problems}


def sign_raw(folder: Path, manifest: bytes, key: PrivateKey = KEY) -> None:
    (folder / "manifest.json").write_bytes(manifest)
    (folder / "manifest.sig").write_bytes(base64.b64encode(sign(key, manifest)) + b"\n")


def sign_changed(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what the manifest says and sign it with the right key."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    change(manifest)
    sign_raw(folder, json.dumps(manifest).encode())


def sign_file(folder: Path, name: str, content: bytes, **changes: Any) -> None:
    """Put another file into the bundle and sign for it with the right key."""
    (folder / name).write_bytes(content)
    record = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    sign_changed(folder, lambda m: (m["files"].update({name: record}), m.update(changes)))


def test_the_untouched_bundle_is_accepted(bundle: Path) -> None:
    verified = verify_bundle(bundle, KEY.public_key())
    assert verified.task == TASK
    assert verified.card == "# Card\n"
    assert verified.weights()["w"].tolist() == [[1, 1], [1, 1]]


def test_single_bit_flips_anywhere_are_refused(bundle: Path) -> None:
    draw = np.random.default_rng(20260101)
    files = sorted(path.name for path in bundle.iterdir())
    expected = {name: {"LF4112"} for name in FILES}
    expected |= {"manifest.json": {"LF4104"}, "manifest.sig": {"LF4103", "LF4104"}}
    for flip in range(200):
        name = files[flip % len(files)]
        original = (bundle / name).read_bytes()
        changed = bytearray(original)
        changed[draw.integers(len(changed))] ^= 1 << int(draw.integers(8))
        (bundle / name).write_bytes(changed)
        assert codes_of(bundle) <= expected[name], (name, flip)
        (bundle / name).write_bytes(original)
    verify_bundle(bundle, KEY.public_key())


def test_every_bit_of_the_signature_file_counts(bundle: Path) -> None:
    original = (bundle / "manifest.sig").read_bytes()
    for bit in range(8 * len(original)):
        changed = bytearray(original)
        changed[bit // 8] ^= 1 << (bit % 8)
        (bundle / "manifest.sig").write_bytes(changed)
        assert codes_of(bundle) <= {"LF4103", "LF4104"}, bit


@pytest.mark.parametrize("name", FILES)
def test_a_missing_truncated_or_grown_file_is_refused(bundle: Path, name: str) -> None:
    original = (bundle / name).read_bytes()
    for content in (b"", original[:-1], original + b"\0"):
        (bundle / name).write_bytes(content)
        assert codes_of(bundle) == {"LF4111"}
    (bundle / name).unlink()
    assert codes_of(bundle) == {"LF4102"}


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sig"])
def test_a_bundle_without_manifest_or_signature_is_refused(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    assert codes_of(bundle) == {"LF4102"}


def test_everything_that_is_wrong_is_said_at_once(bundle: Path) -> None:
    (bundle / "card.md").unlink()
    (bundle / "task.json").write_bytes(b"{}")
    (bundle / "model.onnx").write_bytes((bundle / "model.onnx").read_bytes()[::-1])
    assert codes_of(bundle) == {"LF4102", "LF4111", "LF4112"}


@pytest.mark.parametrize(
    "name", ["extra.bin", ".hidden", "model.onnx.bak", "card.md~", "a\x1b[31mb"]
)
def test_an_added_file_is_refused(bundle: Path, name: str) -> None:
    (bundle / name).write_bytes(b"")
    assert codes_of(bundle) == {"LF4109"}
    with pytest.raises(BundleRefused, match="not listed") as caught:
        verify_bundle(bundle, KEY.public_key())
    assert "\x1b" not in str(caught.value)


def test_an_added_folder_or_dangling_link_is_refused(bundle: Path) -> None:
    (bundle / "engines").mkdir()
    (bundle / "dangling").symlink_to("nowhere")
    assert codes_of(bundle) == {"LF4109"}


def test_a_flood_of_added_files_is_reported_on_one_screen(bundle: Path) -> None:
    for number in range(50):
        (bundle / f"extra-{number}").touch()
    with pytest.raises(BundleRefused, match="and 31 more") as caught:
        verify_bundle(bundle, KEY.public_key())
    assert len(caught.value.problems) == 20


@pytest.mark.parametrize("name", [*FILES, "manifest.json", "manifest.sig"])
def test_a_link_to_the_very_same_bytes_is_refused(bundle: Path, tmp_path: Path, name: str) -> None:
    (bundle / name).rename(tmp_path / "same")
    (bundle / name).symlink_to(tmp_path / "same")
    assert codes_of(bundle) == {"LF4110"}


@pytest.mark.parametrize("name", ["card.md", "manifest.json"])
def test_a_folder_or_pipe_in_place_of_a_file_is_refused_without_waiting(
    bundle: Path, name: str
) -> None:
    (bundle / name).unlink()
    (bundle / name).mkdir()
    assert codes_of(bundle) == {"LF4110"}
    (bundle / name).rmdir()
    os.mkfifo(bundle / name)
    assert codes_of(bundle) == {"LF4110"}


def test_files_of_two_bundles_of_one_signer_do_not_mix(bundle: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write(other, weights=2.0)
    verify_bundle(other, KEY.public_key())
    shutil.copy(other / "model.safetensors", bundle)
    assert codes_of(bundle) == {"LF4112"}
    shutil.copy(other / "manifest.json", bundle)
    assert codes_of(bundle) == {"LF4104"}
    shutil.copy(other / "manifest.sig", bundle)
    verify_bundle(bundle, KEY.public_key())


def test_two_files_of_one_size_cannot_change_places(bundle: Path) -> None:
    sign_file(bundle, "notes.md", b"# Note\n")
    verify_bundle(bundle, KEY.public_key())
    (bundle / "notes.md").write_bytes(b"# Card\n")
    (bundle / "card.md").write_bytes(b"# Note\n")
    assert codes_of(bundle) == {"LF4112"}


def test_another_key_is_refused(bundle: Path) -> None:
    assert codes_of(bundle, STRANGER) == {"LF4104"}
    sign_raw(bundle, (bundle / "manifest.json").read_bytes(), STRANGER)
    assert codes_of(bundle) == {"LF4104"}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"A" * 2**20,
        base64.b64encode(bytes(63)) + b"\n",
        base64.b64encode(bytes(65)) + b"\n",
        base64.b64encode(bytes(64)),
        base64.b64encode(bytes(64)) + b"\n\n",
        base64.b64encode(bytes(64)) + b"\r\n",
        b" " + base64.b64encode(bytes(64)) + b"\n",
        base64.urlsafe_b64encode(b"\xff" * 64) + b"\n",
        bytes(64),
    ],
)
def test_what_is_not_a_signature_is_refused(bundle: Path, content: bytes) -> None:
    (bundle / "manifest.sig").write_bytes(content)
    assert codes_of(bundle) <= {"LF4103", "LF4105"}


def test_a_signature_of_another_kind_of_payload_is_refused(bundle: Path) -> None:
    manifest = (bundle / "manifest.json").read_bytes()
    for payload in (manifest, b"DSSEv1 4 task %d " % len(manifest) + manifest):
        raw = KEY.sign(payload)  # the right key, but not over the encoding of a manifest
        (bundle / "manifest.sig").write_bytes(base64.b64encode(raw) + b"\n")
        assert codes_of(bundle) == {"LF4104"}


def test_a_null_signature_is_refused(bundle: Path) -> None:
    (bundle / "manifest.sig").write_bytes(base64.b64encode(bytes(64)) + b"\n")
    assert codes_of(bundle) == {"LF4104"}


def test_a_huge_manifest_is_refused_unread(bundle: Path) -> None:
    sign_raw(bundle, b" " * (MAX_MANIFEST_BYTES + 1))
    assert codes_of(bundle) == {"LF4105"}


def test_nothing_is_parsed_before_it_is_verified(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def spy(owner: Any, name: str, event: str) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            events.append(event)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)

    spy(bundle_module, "verify", "verify")
    spy(bundle_module, "_hashed", "hash")
    spy(json, "loads", "json")
    spy(onnx, "load_model_from_string", "onnx")
    spy(safetensors.numpy, "load", "safetensors")
    verify_bundle(bundle, KEY.public_key()).weights()
    assert events == ["verify", "json", *["hash"] * 4, "json", "onnx", "safetensors"]

    for name, before in (("manifest.json", ["verify"]), ("model.onnx", ["verify", "json"])):
        events.clear()
        content = bytearray((bundle / name).read_bytes())
        content[7] ^= 1
        (bundle / name).write_bytes(content)
        codes_of(bundle)
        assert [event for event in events if event != "hash"] == before
        content[7] ^= 1
        (bundle / name).write_bytes(content)


def test_what_was_verified_is_what_is_used(bundle: Path) -> None:
    verified = verify_bundle(bundle, KEY.public_key())
    rows = np.array([[1, 2], [3, 4]], np.float32)
    before = predict(verified, rows)
    for path in bundle.iterdir():
        path.write_bytes(b"changed after the check")
    assert np.array_equal(predict(verified, rows).probabilities, before.probabilities)
    assert verified.weights()["w"].sum() == 4
    assert verified.card == "# Card\n"


@pytest.mark.parametrize(
    "name",
    [
        "../secret.txt",
        "/etc/passwd",
        "..",
        ".",
        "",
        "a/b.bin",
        "a\\b.bin",
        ".hidden.bin",
        "nul\0.bin",
        "UPPER.bin",
        "manifest.json",
        "manifest.sig",
        "a..b",
        "x" * 300 + ".bin",
        "ﬁle.bin",
    ],
)
def test_a_signed_path_out_of_the_folder_is_never_opened(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (bundle.parent / "secret.txt").write_bytes(b"secret")
    record = {"sha256": hashlib.sha256(b"secret").hexdigest(), "bytes": 6}
    sign_changed(bundle, lambda m: m["files"].update({name: record}))
    opened: list[str] = []
    real_open = os.open

    def watched(path: Any, *args: Any, **kwargs: Any) -> int:
        opened.append(os.fspath(path))
        return real_open(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", watched)
    assert codes_of(bundle) == {"LF4108"}
    assert {Path(path).name for path in opened} == {"manifest.json", "manifest.sig"}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda m: m.update(format_version=2), "LF4107"),
        (lambda m: (m.clear(), m.update(format_version=7, all_else="new")), "LF4107"),
        (lambda m: m.update(format_version=0), "LF4107"),
        (lambda m: m.update(format_version="1"), "LF4106"),
        (lambda m: m.update(format_version=True), "LF4106"),
        (lambda m: m.pop("format_version"), "LF4106"),
        (lambda m: m.update(version=0), "LF4106"),
        (lambda m: m.update(version=1.0), "LF4106"),
        (lambda m: m.update(surprise=1), "LF4106"),
        (lambda m: m.pop("metrics"), "LF4106"),
        (lambda m: m.update(delta="1e-5"), "LF4106"),
        (lambda m: m.update(files=[]), "LF4106"),
        (lambda m: m["files"]["card.md"].update(bytes=None), "LF4106"),
        (lambda m: m["files"]["card.md"].update(mode="0777"), "LF4106"),
        (lambda m: m.update(signer="somebody else"), "LF4106"),
        (lambda m: m["files"].pop("card.md"), "LF4108"),
        (lambda m: m["files"]["card.md"].update(bytes=-1), "LF4108"),
        (lambda m: m["files"]["card.md"].update(bytes=2**20 + 1), "LF4108"),
        (lambda m: m["files"]["model.onnx"].update(bytes=2**62), "LF4108"),
        (lambda m: m["files"]["card.md"].update(sha256="0" * 63), "LF4108"),
        (
            lambda m: m["files"].update({f"f{i}.bin": m["files"]["card.md"] for i in range(61)}),
            "LF4108",
        ),
        (lambda m: m.update(task="0" * 64), "LF4113"),
    ],
)
def test_a_signed_manifest_is_still_held_to_the_format(
    bundle: Path, change: Callable[[dict[str, Any]], object], code: str
) -> None:
    sign_changed(bundle, change)
    assert codes_of(bundle) == {code}


@pytest.mark.parametrize(
    "manifest",
    [
        b"",
        b"null",
        b"[]",
        b"\xff\xfe",
        b"[" * 500_000,
        b'{"format_version":1,"format_version":1}',
        b'{"format_version":NaN}',
        b'{"format_version":1' + b"0" * 5000 + b"}",
    ],
)
def test_a_signed_manifest_that_is_not_json_is_refused(bundle: Path, manifest: bytes) -> None:
    sign_raw(bundle, manifest)
    assert codes_of(bundle) == {"LF4106"}


def test_a_duplicate_key_deep_in_a_signed_manifest_is_refused(bundle: Path) -> None:
    manifest = (bundle / "manifest.json").read_bytes()
    sign_raw(bundle, manifest.replace(b'"bytes":', b'"bytes":1,"bytes":', 1))
    assert codes_of(bundle) == {"LF4106"}


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff", canonical_json(TASK)[:-1]])
def test_a_signed_task_is_still_held_to_the_schema(bundle: Path, content: bytes) -> None:
    sign_file(bundle, "task.json", content)
    assert codes_of(bundle) == {"LF4113"}


def test_a_signed_task_must_be_the_one_of_the_manifest(bundle: Path) -> None:
    sign_file(bundle, "task.json", canonical_json(Task(name="another")))
    assert codes_of(bundle) == {"LF4113"}


def test_a_signed_card_must_be_text(bundle: Path) -> None:
    sign_file(bundle, "card.md", b"\xff\xfe")
    assert codes_of(bundle) == {"LF4116"}


def external() -> onnx.ModelProto:
    """A model that asks the reader to load its weights from a file of the reader's."""
    proto = model()
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../../etc/passwd")
    return proto


def external_in_a_branch() -> onnx.ModelProto:
    """The same, hidden in a subgraph."""
    inner = external().graph
    proto = model()
    node = proto.graph.node.add(op_type="If", input=["w"], output=["x"])
    node.attribute.append(helper.make_attribute("then_branch", inner))
    return proto


@pytest.mark.parametrize(
    ("proto", "said"),
    [
        (b"garbage", "not an ONNX file"),
        (b"", "not one named 'inputs'"),
        (model(input="other"), "not one named 'inputs'"),
        (model(shape=[1, 2]), "the batch axis of 'inputs' is 1, not free"),
        (model(shape=[]), "the batch axis of 'inputs' is missing"),
        (model(shape=["b", 3]), r"has shape \[3\], not \[2\]"),
        (model(dtype=TensorProto.DOUBLE), "is not float"),
        (model(domain="com.evil", operator="Run"), "outside the ONNX standard"),
        (external(), "weights outside the file"),
        (external_in_a_branch(), "weights outside the file"),
    ],
)
def test_a_signed_model_is_still_held_to_its_task(
    bundle: Path, proto: bytes | onnx.ModelProto, said: str
) -> None:
    content = proto if isinstance(proto, bytes) else proto.SerializeToString()
    sign_file(bundle, "model.onnx", content)
    assert codes_of(bundle) == {"LF4114"}
    with pytest.raises(BundleRefused, match=said):
        verify_bundle(bundle, KEY.public_key())


def lying_about_its_shape() -> onnx.ModelProto:
    proto = model()
    proto.graph.node[0].CopyFrom(helper.make_node("Flatten", ["inputs"], ["flat"], axis=0))
    proto.graph.node.append(helper.make_node("Identity", ["flat"], ["logits"]))
    return proto


@pytest.mark.parametrize("proto", [model(operator="NoSuchOperator"), lying_about_its_shape()])
def test_a_signed_model_that_cannot_run_gives_an_error_not_a_traceback(
    bundle: Path, proto: onnx.ModelProto, capfd: pytest.CaptureFixture[str]
) -> None:
    sign_file(bundle, "model.onnx", proto.SerializeToString())
    verified = verify_bundle(bundle, KEY.public_key())
    with pytest.raises(BundleRefused) as caught:
        predict(verified, np.zeros((3, 2), np.float32))
    assert caught.value.code == "LF4117"
    assert "\n" not in caught.value.problems[0].what
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, (2**60).to_bytes(8, "little") + b"{}"])
def test_signed_weights_that_are_not_safetensors_are_refused(bundle: Path, content: bytes) -> None:
    sign_file(bundle, "model.safetensors", content)
    verified = verify_bundle(bundle, KEY.public_key())
    with pytest.raises(BundleRefused) as caught:
        verified.weights()
    assert caught.value.code == "LF4115"


def test_a_further_listed_file_is_verified_and_kept(bundle: Path) -> None:
    sign_file(bundle, "model.int8-cpu.onnx", b"later")
    assert verify_bundle(bundle, KEY.public_key()).files["model.int8-cpu.onnx"] == b"later"
    (bundle / "model.int8-cpu.onnx").write_bytes(b"Later")
    assert codes_of(bundle) == {"LF4112"}


@pytest.mark.parametrize("what", ["nothing", "file", "empty"])
def test_what_is_no_bundle_is_refused(tmp_path: Path, what: str) -> None:
    place = tmp_path / "place"
    if what == "file":
        place.write_bytes(b"")
    if what == "empty":
        place.mkdir()
    assert codes_of(place) == {"LF4102" if what == "empty" else "LF4101"}
