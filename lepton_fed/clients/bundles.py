"""The site's bundles: taken in by chunks, verified, one in use for each task, the last one kept.

A bundle arrives in a folder of its own, a file at a time, each appended to and never longer than
the signed manifest says, so that a push that was interrupted goes on where it stopped. It comes
into use by the replacement of one small file, after everything in it was verified: a crash leaves
the old or the new in use, never neither.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import logging
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from lepton_fed.clients.policy import allows_task
from lepton_fed.config.schema import Policy
from lepton_fed.core.decode import decode, strict_json
from lepton_fed.core.digests import canonical_json
from lepton_fed.core.exchange import PushReply, PushStep
from lepton_fed.errors import BundleRefused, LeptonError, Problem, Refused, RunError
from lepton_fed.export.bundle import VerifiedBundle, verify_bundle
from lepton_fed.export.manifest import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    SIGNATURE,
    Manifest,
    parse_manifest,
)
from lepton_fed.identity.signature import PublicKey, fingerprint, verify
from lepton_fed.runs.files import reading, write_atomic, writing

__all__ = ["BundleStore", "InForce"]

_IN_FORCE = "in-force.json"
_INCOMING = "incoming"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MOST_CHUNK = 64 * 1024 * 1024
_MOST_SIGNATURE = 128

_log = logging.getLogger("lepton_fed.site")


@dataclass(frozen=True)
class InForce:
    """Which bundle of a task is in use.

    Args:
        version: Its version.
        bundle: SHA-256 of its manifest.
        folder: Name of its folder.
        previous: Name of the folder of the one before; empty when there is none.
    """

    version: int
    bundle: str
    folder: str
    previous: str = ""


@dataclass(frozen=True)
class _Table:
    tasks: dict[str, InForce] = field(default_factory=dict)


class BundleStore:
    """The bundles of one site.

    Args:
        folder: Where they are.
        coordinator: The pinned key; every bundle must carry it.
        policy: What the owner allows.
    """

    def __init__(self, folder: Path, coordinator: PublicKey, policy: Policy) -> None:
        self._folder = folder
        self._coordinator = coordinator
        self._policy = policy

    def step(self, step: PushStep) -> PushReply:
        """Take one step of a push.

        Returns:
            What is there already and in use; with a refusal when the bundle is not taken.
        """
        try:
            return {"begin": self._begin, "chunk": self._chunk, "finish": self._finish}[step.step](
                step
            )
        except LeptonError as error:
            _log.warning("bundle.refused %s", error)
            shutil.rmtree(self._incoming(step), ignore_errors=True)
            problem = error.problems[0]
            # Its text may name paths of this machine.
            return PushReply("", refusal=Problem(problem.code, _public(problem)))

    def in_force(self, task: str = "") -> Path:
        """Return the folder of the bundle in use; whoever uses it verifies it again.

        Args:
            task: First digits of the task's digest; may be empty when only one is in use.

        Raises:
            RunError: LF5320, none is in use, or more than one fits; LF5210 or LF5321, the record
                of it cannot be read.
        """
        found = {t: use for t, use in self._table().tasks.items() if t.startswith(task)}
        if len(found) == 1:
            return self._folder / next(iter(found.values())).folder
        known = ", ".join(t[:12] for t in self._table().tasks) or "none"
        what = "no bundle is in use" if not found else f"{len(found)} bundles are in use"
        raise RunError(
            Problem("LF5320", f"{what} at this site", where=str(self._folder),
                    remedy=f"--task with one of: {known}; the coordinator's `lepton-fed push` "
                    "brings them")
        )  # fmt: skip

    def versions(self) -> dict[str, int]:
        """Return the version in use of each task, by the task's digest."""
        return {task: use.version for task, use in self._table().tasks.items()}

    def _begin(self, step: PushStep) -> PushReply:
        manifest = self._manifest(step)
        table = self._table()
        self._check_task(manifest.task, "")
        now = table.tasks.get(manifest.task)
        if now is not None and now.bundle == step.bundle:
            sizes = {name: record.bytes for name, record in manifest.files.items()}
            return PushReply("", sizes, now.version)
        self._check_newer(manifest, now)
        incoming = self._incoming(step)
        with writing(incoming):
            self._clear_others(incoming)
            incoming.mkdir(mode=0o700, parents=True, exist_ok=True)
            needed = sum(record.bytes for record in manifest.files.values())
            if shutil.disk_usage(incoming).free < 2 * needed:
                raise RunError(Problem("LF5322", "there is no room for the bundle at this site"))
        write_atomic(incoming / MANIFEST, step.manifest)
        write_atomic(incoming / SIGNATURE, step.signature)
        return PushReply("", self._have(incoming, manifest), now.version if now else 0)

    def _chunk(self, step: PushStep) -> PushReply:
        incoming, manifest = self._opened(step)
        record = manifest.files.get(step.file)
        if record is None:
            raise _refused("LF4122", "the manifest lists no file of this name")
        path = incoming / step.file
        have = path.stat().st_size if path.exists() else 0
        if step.offset != have or not 0 < len(step.data) <= _MOST_CHUNK:
            # Not an error of the bundle's: say what is there, so that the push goes on from it.
            return PushReply("", self._have(incoming, manifest))
        if have + len(step.data) > record.bytes:
            raise _refused("LF4123", "a file is longer than the manifest says")
        with writing(path), path.open("ab") as file:
            file.write(step.data)
        return PushReply("", self._have(incoming, manifest))

    def _finish(self, step: PushStep) -> PushReply:
        table = self._table()
        for use in table.tasks.values():
            if use.bundle == step.bundle:
                return PushReply("", in_force=use.version)
        incoming, manifest = self._opened(step)
        bundle = verify_bundle(incoming, self._coordinator)
        self._check_task(bundle.task.digest, bundle.task.model.name)
        now = table.tasks.get(manifest.task)
        self._check_newer(manifest, now)
        self._take(bundle, step.bundle, table, now)
        return PushReply("", in_force=manifest.version)

    def _take(
        self, bundle: VerifiedBundle, digest: str, table: _Table, now: InForce | None
    ) -> None:
        manifest = bundle.manifest
        name = f"{manifest.task[:12]}-v{manifest.version:06d}"
        target = self._folder / name
        with writing(target):
            shutil.rmtree(target, ignore_errors=True)  # left by a crash before it came into use
            self._incoming_of(digest).rename(target)
        use = InForce(manifest.version, digest, name, now.folder if now else "")
        write_atomic(
            self._folder / _IN_FORCE,
            canonical_json(_Table({**table.tasks, manifest.task: use})) + b"\n",
        )
        _log.info("bundle.in_use task=%s version=%s", manifest.task[:12], manifest.version)
        if now is not None and now.previous:
            shutil.rmtree(self._folder / now.previous, ignore_errors=True)

    def _manifest(self, step: PushStep) -> Manifest:
        """Return the manifest of a push, once its signature was verified."""
        too_large = len(step.manifest) > MAX_MANIFEST_BYTES or len(step.signature) > _MOST_SIGNATURE
        if too_large or hashlib.sha256(step.manifest).hexdigest() != step.bundle:
            raise _refused("LF4121", "the push does not begin with its manifest and signature")
        try:
            signature = base64.b64decode(step.signature.removesuffix(b"\n"), validate=True)
        except (binascii.Error, ValueError):
            signature = b""
        manifest = parse_manifest(verify(self._coordinator, step.manifest, signature))
        if manifest.signer != fingerprint(self._coordinator):
            raise _refused("LF4106", "the manifest names another signer")
        return manifest

    def _opened(self, step: PushStep) -> tuple[Path, Manifest]:
        """Return the folder of a push that began, and its manifest, verified again."""
        incoming = self._incoming(step)
        try:
            manifest = (incoming / MANIFEST).read_bytes()
            signature = (incoming / SIGNATURE).read_bytes()
        except OSError:
            raise _refused("LF4124", "this push did not begin here; begin again") from None
        begun = PushStep("begin", step.bundle, manifest, signature)
        return incoming, self._manifest(begun)

    def _check_task(self, digest: str, model: str) -> None:
        # Before the task itself is here, its model is not known: what may fit goes on.
        may_fit = not model and bool(self._policy.models)
        if not may_fit and not allows_task(self._policy, digest, model):
            raise _refused("LF4125", "this site's policy does not allow the bundle's task")

    def _check_newer(self, manifest: Manifest, now: InForce | None) -> None:
        if now is not None and manifest.version <= now.version:
            raise _refused(
                "LF4126",
                f"version {manifest.version} is not newer than version {now.version}, which is "
                "in use here",
            )

    def _have(self, incoming: Path, manifest: Manifest) -> dict[str, int]:
        paths = {name: incoming / name for name in manifest.files}
        return {name: p.stat().st_size if p.exists() else 0 for name, p in paths.items()}

    def _clear_others(self, incoming: Path) -> None:
        """Keep one push that is not finished, so that many cannot fill the disk."""
        for other in incoming.parent.glob("*"):
            if other != incoming:
                shutil.rmtree(other, ignore_errors=True)

    def _incoming(self, step: PushStep) -> Path:
        return self._incoming_of(step.bundle)

    def _incoming_of(self, digest: str) -> Path:
        name = digest if _DIGEST.fullmatch(digest) else "none"  # a name from outside is no path
        return self._folder / _INCOMING / name

    def _table(self) -> _Table:
        path = self._folder / _IN_FORCE
        with reading(path):
            if not path.exists():
                return _Table()
            content = path.read_bytes()
        try:
            return decode(_Table, strict_json(content))
        except ValueError as error:
            raise RunError(
                Problem("LF5321", f"the record of bundles in use is damaged: {error}",
                        where=str(path), remedy="restore it from a backup")
            ) from error  # fmt: skip


def _public(problem: Problem) -> str:
    if problem.code in _OWN:
        return problem.what
    if problem.code.startswith("LF41"):
        return "the bundle is not whole, or not signed by the pinned coordinator"
    return "the site could not store the bundle"


_OWN = frozenset({"LF4121", "LF4122", "LF4123", "LF4124", "LF4125", "LF4126", "LF5322"})


def _refused(code: str, what: str) -> Refused:
    return BundleRefused(Problem(code, what, where="push"))
