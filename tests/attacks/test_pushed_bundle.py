"""What a site's bundle store resists: chunks that lie, older versions, strangers, crashes."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from lepton_fed.clients import bundles as bundles_module
from lepton_fed.clients.bundles import BundleStore
from lepton_fed.config.schema import Policy
from lepton_fed.core.exchange import PushReply, PushStep
from lepton_fed.core.task import Column, DataContract, ModelSpec, Target, Task
from lepton_fed.errors import Problem, RunError
from lepton_fed.export.bundle import verify_bundle
from lepton_fed.export.manifest import Parity, ParityCheck, Release
from lepton_fed.export.writing import write_bundle
from lepton_fed.identity.signature import PrivateKey, sign
from lepton_fed.runs.summary import RunSummary, SiteSummary
from lepton_fed.server.push import push_bundle

KEY = PrivateKey.from_private_bytes(bytes(range(32)))
STRANGER = PrivateKey.from_private_bytes(bytes(range(1, 33)))
TASK = Task(
    name="pushed",
    data=DataContract(columns=[Column("a"), Column("b")], target=Target(classes=["no", "yes"])),
    model=ModelSpec("linear"),
)
POLICY = Policy(models=["linear"])


def model() -> bytes:
    node = helper.make_node("MatMul", ["inputs", "w"], ["logits"])
    weights = np.ones((2, 2), np.float32)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("inputs", 1, ["b", 2])],
        [helper.make_tensor_value_info("logits", 1, ["b", 2])],
        [helper.make_tensor("w", TensorProto.FLOAT, [2, 2], weights.tobytes(), raw=True)],
    )
    made: onnx.ModelProto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    )
    return made.SerializeToString()


def write(folder: Path, version: int, key: PrivateKey = KEY, task: Task = TASK) -> Path:
    summary = RunSummary(
        run="run-1", task=task.digest, layout="1" * 64, model="2" * 64, digest="3" * 64,
        repeatable=True, seed=1, rounds=2, strategy="fedavg", parameters=4, metrics={"loss": 0.5},
        error_bounds={}, delta=None, clip=None, outside_epsilon=[],
        finished="2026-01-01T00:00:00Z", seconds=1.0, versions={},
        sites=[SiteSummary("site-1", 2)],
    )  # fmt: skip
    parity = Parity("", [ParityCheck(1, 0.0, 1e-5)])
    write_bundle(
        folder,
        task=task,
        summary=summary,
        release=Release(version, "2026-01-01T00:00:00Z", parity, {}),
        onnx=model(),
        weights={"w": np.full((2, 2), version, np.float32)},
        card=f"# Card {version}\n",
        private_key=key,
    )
    return folder


class World:
    """One site's store, and the coordinator's half of a push."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = self.opened()

    def opened(self, policy: Policy = POLICY) -> BundleStore:
        return BundleStore(self.root / "bundles", KEY.public_key(), policy)

    def bundle(self, version: int, task: Task = TASK) -> Path:
        folder = self.root / f"{task.name}-{version}"
        return folder if folder.exists() else write(folder, version, task=task)

    def push(self, version: int, task: Task = TASK) -> Problem | None:
        return self.push_folder(self.bundle(version, task)).refusal

    def push_folder(self, folder: Path, chunk_bytes: int = 200):  # type: ignore[no-untyped-def]
        def exchange(steps: Mapping[str, PushStep]) -> Iterator[PushReply]:
            yield replace(self.store.step(steps["north"]), site="north")

        bundle = verify_bundle(folder, KEY.public_key())
        return push_bundle(bundle, ["north"], exchange, chunk_bytes=chunk_bytes)["north"]

    def begin(self, folder: Path) -> PushStep:
        manifest = (folder / "manifest.json").read_bytes()
        signature = (folder / "manifest.sig").read_bytes()
        return PushStep("begin", hashlib.sha256(manifest).hexdigest(), manifest, signature)

    def version(self) -> int:
        verified = verify_bundle(self.store.in_force(), KEY.public_key())
        return verified.manifest.version


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def code(reply: PushReply) -> str:
    return reply.refusal.code if reply.refusal else ""


def test_a_bundle_arrives_in_chunks_and_is_used(world: World) -> None:
    outcome = world.push_folder(world.bundle(1))
    files = verify_bundle(world.bundle(1), KEY.public_key()).files
    assert outcome.refusal is None
    assert outcome.in_force == 1
    assert outcome.bytes_sent == sum(len(content) for content in files.values())
    assert world.version() == 1
    assert list((world.root / "bundles" / "incoming").iterdir()) == []


def test_the_last_bundle_is_kept_and_the_one_before_it_is_not(world: World) -> None:
    for version in (1, 2, 3):
        assert world.push(version) is None
    kept = sorted(path.name for path in (world.root / "bundles").glob("*-v*"))
    assert [name[-1] for name in kept] == ["2", "3"]
    assert world.version() == 3


def test_an_older_or_the_same_version_is_refused(world: World, tmp_path: Path) -> None:
    assert world.push(2) is None
    for older in (world.bundle(1), write(tmp_path / "again", 2, task=replace(TASK))):
        reply = world.store.step(world.begin(older))
        if older == world.bundle(1):
            assert code(reply) == "LF4126"
    assert world.version() == 2


def test_the_same_version_with_other_content_is_refused(world: World, tmp_path: Path) -> None:
    assert world.push(2) is None
    other = write(tmp_path / "other", 2)
    (other / "card.md").write_text("# Another card\n")
    manifest = (
        (other / "manifest.json")
        .read_text()
        .replace(
            hashlib.sha256(b"# Card 2\n").hexdigest(),
            hashlib.sha256(b"# Another card\n").hexdigest(),
        )
    )
    changed = manifest.replace(f'"bytes":{len("# Card 2") + 1}', '"bytes":15').encode()
    (other / "manifest.json").write_bytes(changed)
    (other / "manifest.sig").write_bytes(base64.b64encode(sign(KEY, changed)) + b"\n")
    assert code(world.store.step(world.begin(other))) == "LF4126"


def test_a_push_that_was_cut_goes_on_where_it_stopped(world: World) -> None:
    bundle = verify_bundle(world.bundle(1), KEY.public_key())
    taken = 0

    def cut(steps: Mapping[str, PushStep]) -> Iterator[PushReply]:
        nonlocal taken
        reply = world.store.step(steps["north"])
        if sum(reply.have.values()) > 200:
            taken = sum(reply.have.values())
            raise ConnectionError
        yield replace(reply, site="north")

    with pytest.raises(ConnectionError):
        push_bundle(bundle, ["north"], cut, chunk_bytes=100)
    world.store = world.opened()  # the site was restarted as well
    outcome = world.push_folder(world.bundle(1), chunk_bytes=100)
    total = sum(len(content) for content in bundle.files.values())
    assert outcome.refusal is None
    assert total - outcome.bytes_sent == taken > 200


def test_lost_replies_are_asked_for_again(world: World) -> None:
    bundle = verify_bundle(world.bundle(1), KEY.public_key())
    calls = 0

    def lossy(steps: Mapping[str, PushStep]) -> Iterator[PushReply]:
        nonlocal calls
        calls += 1
        reply = replace(world.store.step(steps["north"]), site="north")
        if calls in (2, 5):  # done at the site, but nobody heard
            reply = PushReply("north", refusal=Problem("LF5306", "no reply in time"))
        yield reply

    outcome = push_bundle(bundle, ["north"], lossy, chunk_bytes=200)["north"]
    assert outcome.refusal is None
    assert world.version() == 1


def test_a_site_that_takes_nothing_does_not_hold_the_push_for_ever(world: World) -> None:
    bundle = verify_bundle(world.bundle(1), KEY.public_key())

    def stubborn(steps: Mapping[str, PushStep]) -> Iterator[PushReply]:
        yield PushReply("north", dict.fromkeys(bundle.files, 0))

    refusal = push_bundle(bundle, ["north"], stubborn)["north"].refusal
    assert refusal is not None
    assert refusal.code == "LF4128"


def test_a_stranger_s_bundle_is_refused_before_anything_of_it_is_parsed(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parsed(*given: object) -> None:
        raise AssertionError("parsed before it was verified")

    step = world.begin(write(tmp_path / "stranger", 1, key=STRANGER))
    monkeypatch.setattr(bundles_module, "parse_manifest", parsed)
    assert code(world.store.step(step)) == "LF4104"
    assert not (world.root / "bundles" / "incoming" / step.bundle).exists()


@pytest.mark.parametrize(
    "change",
    [
        {"manifest": b""},
        {"manifest": b"x" * (2**20 + 1)},
        {"signature": b"s" * 1000},
        {"bundle": "../../outside"},
        {"bundle": "0" * 64},
    ],
)
def test_a_begin_that_lies_is_refused(world: World, change: dict[str, bytes]) -> None:
    assert code(world.store.step(replace(world.begin(world.bundle(1)), **change))) == "LF4121"
    assert not (world.root / "outside").exists()


@pytest.mark.parametrize("name", ["../escape", "/etc/passwd", "manifest.json", "unlisted.bin", ""])
def test_a_chunk_of_a_file_that_is_not_listed_is_refused(world: World, name: str) -> None:
    begin = world.begin(world.bundle(1))
    assert code(world.store.step(begin)) == ""
    reply = world.store.step(PushStep("chunk", begin.bundle, file=name, data=b"x"))
    assert code(reply) == "LF4122"
    assert not (world.root / "bundles" / "incoming" / "escape").exists()


def test_a_file_cannot_grow_beyond_its_signed_size(world: World) -> None:
    begin = world.begin(world.bundle(1))
    world.store.step(begin)
    reply = world.store.step(PushStep("chunk", begin.bundle, file="card.md", data=b"x" * 1000))
    assert code(reply) == "LF4123"
    assert not (world.root / "bundles" / "incoming" / begin.bundle).exists()


@pytest.mark.parametrize("offset", [-1, 1, 2**62])
def test_a_chunk_at_another_place_changes_nothing(world: World, offset: int) -> None:
    begin = world.begin(world.bundle(1))
    world.store.step(begin)
    reply = world.store.step(
        PushStep("chunk", begin.bundle, file="card.md", offset=offset, data=b"x")
    )
    assert reply.have["card.md"] == 0


def test_changed_bytes_are_found_before_the_bundle_is_used(world: World) -> None:
    assert world.push(1) is None
    begin = world.begin(world.bundle(2))
    world.store.step(begin)
    for name, content in verify_bundle(world.bundle(2), KEY.public_key()).files.items():
        changed = bytes([content[0] ^ 1]) + content[1:]
        world.store.step(PushStep("chunk", begin.bundle, file=name, data=changed))
    reply = world.store.step(PushStep("finish", begin.bundle))
    assert code(reply) == "LF4112"
    assert "bundles" not in (reply.refusal.what if reply.refusal else "")
    assert str(world.root) not in str(reply)
    assert world.version() == 1


def test_a_finish_without_all_bytes_or_without_a_begin_is_refused(world: World) -> None:
    begin = world.begin(world.bundle(1))
    assert code(world.store.step(PushStep("finish", begin.bundle))) == "LF4124"
    world.store.step(begin)
    assert code(world.store.step(PushStep("finish", begin.bundle))) == "LF4102"


def test_a_task_that_the_policy_does_not_allow_is_refused(world: World) -> None:
    world.store = world.opened(Policy(tasks=["0" * 64]))
    assert code(world.store.step(world.begin(world.bundle(1)))) == "LF4125"
    world.store = world.opened(Policy(models=["cnn"]))
    refusal = world.push(1)
    assert refusal is not None
    assert refusal.code == "LF4125"
    world.store = world.opened(Policy(tasks=[TASK.digest[:12]]))
    assert world.push(1) is None


def test_pushes_that_never_finish_do_not_pile_up(world: World) -> None:
    for version in range(1, 6):
        world.store.step(world.begin(world.bundle(version)))
    assert len(list((world.root / "bundles" / "incoming").iterdir())) == 1


def test_a_full_disk_is_said_and_nothing_is_kept(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = bundles_module.shutil.disk_usage(world.root)
    monkeypatch.setattr(bundles_module.shutil, "disk_usage", lambda path: usage._replace(free=100))
    begin = world.begin(world.bundle(1))
    assert code(world.store.step(begin)) == "LF5322"
    assert not (world.root / "bundles" / "incoming" / begin.bundle).exists()


@pytest.mark.parametrize("crash", ["rename", "record"])
def test_a_crash_in_the_last_step_leaves_the_old_or_the_new_in_use(
    world: World, monkeypatch: pytest.MonkeyPatch, crash: str
) -> None:
    assert world.push(1) is None

    def die(*given: object, **named: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if crash == "rename":
            patch.setattr(Path, "rename", die)
        else:
            real = bundles_module.write_atomic
            patch.setattr(
                bundles_module,
                "write_atomic",
                lambda path, content: (
                    die() if path.name == "in-force.json" else real(path, content)
                ),
            )
        with pytest.raises(KeyboardInterrupt):
            world.push(2)
    world.store = world.opened()
    assert world.version() == 1
    assert world.push(2) is None
    assert world.version() == 2


def test_two_tasks_are_in_use_beside_each_other(world: World) -> None:
    other = replace(TASK, name="second")
    assert world.push(1) is None
    assert world.push(4, other) is None
    assert world.store.versions() == {TASK.digest: 1, other.digest: 4}
    assert world.store.in_force(other.digest[:12]).name.endswith("4")
    with pytest.raises(RunError) as failed:
        world.store.in_force()
    assert failed.value.code == "LF5320"


def test_without_a_bundle_nothing_is_in_use(world: World) -> None:
    with pytest.raises(RunError) as failed:
        world.store.in_force()
    assert failed.value.code == "LF5320"
