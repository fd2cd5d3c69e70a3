"""The bundle as a reader meets it: nothing in it is parsed before it is verified.

Order of trust. The manifest and its signature are read, bounded. The signature is
verified over the manifest's bytes, and only then are they parsed. Each listed file is read once,
its size and hash compared, and the bytes kept: what was verified is what is used, whatever happens
in the folder afterwards. Only verified bytes reach a JSON, ONNX or safetensors parser.

docs/reference/bundle.md is the format in words.
"""

from __future__ import annotations

import base64
import binascii
import errno
import hashlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from lepton_fed.core.decode import task_from_json
from lepton_fed.core.task import Task
from lepton_fed.errors import BundleRefused, Problem, quoted
from lepton_fed.export.interface import complaints, parse
from lepton_fed.export.manifest import (
    CARD,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    ONNX,
    SIGNATURE,
    TASK,
    WEIGHTS,
    FileRecord,
    Manifest,
    parse_manifest,
    refuse_all,
)
from lepton_fed.identity.signature import (
    SIGNATURE_BYTES,
    PublicKey,
    VerifiedBytes,
    fingerprint,
    verify,
)

__all__ = ["VerifiedBundle", "verify_bundle"]

_SIGNATURE_FILE_BYTES = 4 * -(-SIGNATURE_BYTES // 3) + 1  # base64 and a newline
# Follow no link, do not wait for the other end of a pipe, change no line endings: each is 0 on a
# system that does not have it.
_READ = (
    os.O_RDONLY
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_BINARY", 0)
)
_NOT_PLAIN = (errno.ELOOP, errno.EMLINK, errno.ENXIO)
_FETCH = "the bundle was changed or not fully copied: fetch it again"
_ASK = "ask the coordinator for a bundle that is exported anew"


@dataclass(frozen=True)
class VerifiedBundle:
    """A bundle whose signature, files and task were verified; made by :func:`verify_bundle` only.

    Args:
        folder: Where it was read from, for messages; it is not read again.
        manifest: What the manifest says.
        task: What was learned.
        files: Every listed file's verified bytes, by name.
    """

    folder: Path
    manifest: Manifest
    task: Task
    files: Mapping[str, VerifiedBytes]

    @property
    def onnx(self) -> VerifiedBytes:
        """Return the ONNX file."""
        return self.files[ONNX]

    @property
    def card(self) -> str:
        """Return the model card, Markdown."""
        return self.files[CARD].decode()

    def weights(self) -> dict[str, npt.NDArray[np.generic]]:
        """Return the weights by tensor name, without preprocessing.

        Raises:
            BundleRefused: LF4115, the file is signed but not a safetensors file.
        """
        try:
            return dict(safetensors.numpy.load(self.files[WEIGHTS]))
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            what = f"the weights cannot be read: {error}"
            raise _refused("LF4115", what, self.folder / WEIGHTS, _ASK) from error


def verify_bundle(folder: Path, public_key: PublicKey) -> VerifiedBundle:
    """Read a bundle and hold it to its signature; nothing is parsed before it is verified.

    Args:
        folder: The bundle.
        public_key: The coordinator's key, as pinned.

    Returns:
        The bundle, in memory.

    Raises:
        BundleRefused: LF4101, no bundle there; LF4102, a file is missing; LF4103, the signature is
            not one; LF4104, it does not fit; LF4105, a file is too large; LF4106 to LF4108, the
            manifest is malformed, of another format, or lists what it may not; LF4109, a file is
            not listed; LF4110, not a plain file; LF4111, of another size; LF4112, changed; LF4113,
            the task is malformed or another one; LF4114, the model is not one of that task;
            LF4116, the card is not text.
    """
    manifest_path = folder / MANIFEST
    unverified_manifest = _read(manifest_path, MAX_MANIFEST_BYTES)
    unverified_signature = _read(folder / SIGNATURE, _SIGNATURE_FILE_BYTES)
    signature = _signature_of(unverified_signature, folder / SIGNATURE)
    payload = verify(public_key, unverified_manifest, signature, where=str(manifest_path))
    manifest = parse_manifest(payload, where=str(manifest_path))
    if manifest.signer != fingerprint(public_key):
        what = "the manifest names another signer than the key that signed it"
        raise _refused("LF4106", what, manifest_path, _ASK)
    refuse_all(_strays(folder, manifest))
    files = _read_listed(folder, manifest)
    task = _task(files[TASK], manifest, folder / TASK)
    _check_card(files[CARD], folder / CARD)
    _check_onnx(files[ONNX], task, folder / ONNX)
    return VerifiedBundle(folder=folder, manifest=manifest, task=task, files=files)


def _signature_of(unverified: bytes, path: Path) -> bytes:
    """Return the 64 bytes of a signature file, which has exactly one form."""
    try:
        signature = base64.b64decode(unverified.removesuffix(b"\n"), validate=True)
    except (binascii.Error, ValueError):
        signature = b""
    # Base64 of 64 bytes leaves four bits over that decoding ignores: the way back shows them.
    if len(signature) != SIGNATURE_BYTES or base64.b64encode(signature) + b"\n" != unverified:
        what = "this is not the base64 of a 64-byte signature and a newline"
        raise _refused("LF4103", what, path, _FETCH)
    return signature


def _strays(folder: Path, manifest: Manifest) -> list[Problem]:
    """Return a problem for every entry of the folder that nobody signed."""
    known = {MANIFEST, SIGNATURE, *manifest.files}
    try:
        found = sorted(set(os.listdir(folder)) - known)
    except OSError as error:
        raise _unreadable(folder, error) from error
    what = "is not listed in the manifest"
    return [
        Problem("LF4109", f"{quoted(name)} {what}", str(folder), remedy=_FETCH) for name in found
    ]


def _read_listed(folder: Path, manifest: Manifest) -> dict[str, VerifiedBytes]:
    files: dict[str, VerifiedBytes] = {}
    problems: list[Problem] = []
    for name, record in sorted(manifest.files.items()):
        try:
            unverified = _read(folder / name, record.bytes, exact=True)
            files[name] = _hashed(unverified, record, folder / name)
        except BundleRefused as error:
            problems.extend(error.problems)
    refuse_all(problems)
    return files


def _hashed(unverified: bytes, record: FileRecord, path: Path) -> VerifiedBytes:
    # Both hashes are public, so the comparison need not take constant time.
    if hashlib.sha256(unverified).hexdigest() != record.sha256:
        what = "the file is not the one that was signed: its SHA-256 differs"
        raise _refused("LF4112", what, path, _FETCH)
    return VerifiedBytes(unverified)


def _task(data: VerifiedBytes, manifest: Manifest, path: Path) -> Task:
    try:
        task = task_from_json(data)
    except ValueError as error:
        raise _refused("LF4113", f"the task is malformed: {error}", path, _ASK) from None
    if task.digest != manifest.task:
        what = f"the task's digest is {task.digest}, the manifest says {quoted(manifest.task)}"
        raise _refused("LF4113", what, path, _ASK)
    return task


def _check_card(data: VerifiedBytes, path: Path) -> None:
    try:
        data.decode()
    except UnicodeDecodeError:
        raise _refused("LF4116", "the model card is not UTF-8", path, _ASK) from None


def _check_onnx(data: VerifiedBytes, task: Task, path: Path) -> None:
    try:
        wrong = complaints(parse(data), task)
    except ValueError as error:
        wrong = [f"it is {error}"]
    refuse_all(
        [Problem("LF4114", f"the model cannot be used: {w}", str(path), remedy=_ASK) for w in wrong]
    )


def _read(path: Path, limit: int, *, exact: bool = False) -> bytes:
    """Return the bytes of a plain file, never more than ``limit``.

    Args:
        path: The file; a link is not followed.
        limit: Most bytes it may have.
        exact: It must have ``limit`` bytes.
    """
    try:
        descriptor = os.open(path, _READ)
    except OSError as error:
        if error.errno == errno.ENOENT and path.parent.is_dir():
            raise _refused("LF4102", f"{path.name} is missing", path, _FETCH) from None
        if error.errno in _NOT_PLAIN:
            raise _not_plain(path) from None
        raise _unreadable(path, error) from error
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise _not_plain(path)
        if exact and found.st_size != limit:
            what = f"the file has {found.st_size} bytes, the manifest says {limit}"
            raise _refused("LF4111", what, path, _FETCH)
        if found.st_size > limit:
            what = f"the file has {found.st_size} bytes, more than the {limit} it may have"
            raise _refused("LF4105", what, path, _FETCH)
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(limit)
    except OSError as error:
        raise _unreadable(path, error) from error
    finally:
        os.close(descriptor)


def _unreadable(path: Path, error: OSError) -> BundleRefused:
    what = f"this is not a bundle that can be read: {error.strerror}"
    return _refused("LF4101", what, path, "give the folder that lepton-fed export wrote")


def _not_plain(path: Path) -> BundleRefused:
    what = f"{path.name} is a link, a folder or a device, not a plain file"
    return _refused("LF4110", what, path, _FETCH)


def _refused(code: str, what: str, where: Path, remedy: str) -> BundleRefused:
    return BundleRefused(Problem(code=code, what=what, where=str(where), remedy=remedy))
