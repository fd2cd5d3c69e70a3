"""Write a bundle: whole, verified and synced before it gets its name, or not at all."""

from __future__ import annotations

import base64
import hashlib
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from lepton_fed.core.digests import canonical_json
from lepton_fed.core.task import Task
from lepton_fed.errors import Problem, TaskError
from lepton_fed.export.bundle import VerifiedBundle, verify_bundle
from lepton_fed.export.manifest import (
    CARD,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    MAX_TEXT_BYTES,
    ONNX,
    SIGNATURE,
    TASK,
    WEIGHTS,
    FileRecord,
    Release,
    encode_manifest,
    make_manifest,
)
from lepton_fed.identity.signature import PrivateKey, PublicKey, fingerprint, sign
from lepton_fed.runs.summary import RunSummary

__all__ = ["refuse_existing", "write_bundle"]


def write_bundle(
    folder: Path,
    *,
    task: Task,
    summary: RunSummary,
    release: Release,
    onnx: bytes,
    weights: Mapping[str, npt.NDArray[np.generic]],
    card: str,
    private_key: PrivateKey,
) -> VerifiedBundle:
    """Write a signed bundle.

    It is built in a hidden folder beside ``folder``, synced, read back and verified as any site
    would, and renamed: ``folder`` either does not exist or is whole, also after a crash. Nothing is
    overwritten.

    Args:
        folder: The folder to make; its parent is made if missing.
        task: What was learned.
        summary: What the run says of itself.
        release: What the export adds.
        onnx: The exported model.
        weights: Tensors of the model by name.
        card: Model card, Markdown.
        private_key: The coordinator's key.

    Returns:
        The bundle as read back.

    Raises:
        TaskError: LF3208, ``folder`` exists; LF3209, manifest, task or card is too large; LF3210,
            the folder cannot be written; LF3211, a number of the summary is not finite.
        BundleRefused: What was written cannot be verified, for one of :func:`verify_bundle`'s
            reasons; nothing is left behind.
    """
    refuse_existing(folder)
    public_key = private_key.public_key()
    files = {
        ONNX: onnx,
        WEIGHTS: safetensors.numpy.save(dict(weights)),
        TASK: canonical_json(task),
        CARD: card.encode(),
    }
    records = {
        name: FileRecord(hashlib.sha256(data).hexdigest(), len(data))
        for name, data in files.items()
    }
    manifest = make_manifest(task, summary, release, fingerprint(public_key), records)
    try:
        files[MANIFEST] = encode_manifest(manifest)
    except ValueError:
        raise _failed(
            "LF3211",
            "a number in the run's summary is not finite",
            folder,
            "the run's summary is damaged; export another run",
        ) from None
    for name, limit in (
        (MANIFEST, MAX_MANIFEST_BYTES),
        (TASK, MAX_TEXT_BYTES),
        (CARD, MAX_TEXT_BYTES),
    ):
        if len(files[name]) > limit:
            raise _failed(
                "LF3209",
                f"{name} would have {len(files[name])} bytes, more than the {limit} readers take",
                folder,
                "shorten the names of sites, columns and classes",
            )
    files[SIGNATURE] = base64.b64encode(sign(private_key, files[MANIFEST])) + b"\n"
    try:
        return _write_folder(folder, files, public_key)
    except OSError as error:
        if os.path.lexists(folder):  # came to stand there since it was looked for
            raise _exists(folder) from error
        raise _failed(
            "LF3210",
            f"cannot write the bundle: {error.strerror}",
            folder,
            "choose a writable place with room for it",
        ) from error


def refuse_existing(folder: Path) -> None:
    """Refuse a target that exists, whatever it is.

    Raises:
        TaskError: LF3208.
    """
    if os.path.lexists(folder):
        raise _exists(folder)


def _write_folder(
    folder: Path, files: Mapping[str, bytes], public_key: PublicKey
) -> VerifiedBundle:
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    building.mkdir()
    try:
        for name, data in files.items():
            with (building / name).open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        _sync(building)
        bundle = verify_bundle(building, public_key)
        # Fails if anything but an empty folder stands there by now.
        building.rename(folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    _sync(folder.parent)
    return replace(bundle, folder=folder)


def _sync(folder: Path) -> None:
    """Make the names in a folder survive a power cut; Windows has no such call."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exists(folder: Path) -> TaskError:
    return _failed(
        "LF3208",
        "this exists, and a bundle never overwrites",
        folder,
        "give another place: --out FOLDER",
    )


def _failed(code: str, what: str, where: Path, remedy: str) -> TaskError:
    return TaskError(Problem(code=code, what=what, where=str(where), remedy=remedy))
