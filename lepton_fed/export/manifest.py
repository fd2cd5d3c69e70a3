"""The manifest: what a bundle says of itself, and the names and sizes it may have.

The signature covers these bytes, and through the hashes in them every other file.
docs/reference/bundle.md is the format in words.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from lepton_fed.core.decode import decode, strict_json
from lepton_fed.core.digests import canonical_json
from lepton_fed.core.task import Task
from lepton_fed.errors import BundleRefused, Problem, capped, quoted
from lepton_fed.identity.signature import VerifiedBytes
from lepton_fed.privacy.dp.accounting import adjacency_of
from lepton_fed.runs.summary import RunSummary, SiteSummary

__all__ = [
    "CARD",
    "FORMAT_VERSION",
    "MANIFEST",
    "MAX_BUNDLE_BYTES",
    "MAX_MANIFEST_BYTES",
    "MAX_SITES",
    "MAX_TEXT_BYTES",
    "ONNX",
    "REQUIRED",
    "SIGNATURE",
    "TASK",
    "WEIGHTS",
    "FileRecord",
    "Manifest",
    "Parity",
    "ParityCheck",
    "Release",
    "SiteRecord",
    "encode_manifest",
    "make_manifest",
    "parse_manifest",
    "refuse_all",
]

FORMAT_VERSION = 1

MANIFEST = "manifest.json"
SIGNATURE = "manifest.sig"
ONNX = "model.onnx"
WEIGHTS = "model.safetensors"
TASK = "task.json"
CARD = "card.md"
REQUIRED = (CARD, ONNX, WEIGHTS, TASK)

MAX_MANIFEST_BYTES = 2**20
MAX_TEXT_BYTES = 2**20
MAX_BUNDLE_BYTES = 2**32
MAX_SITES = 1000

_MAX_FILES = 64
_PLAIN_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}(\.[a-z0-9_-]{1,32}){1,3}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ASK = "ask the coordinator for a bundle that is exported anew"


@dataclass(frozen=True)
class FileRecord:
    """One file of a bundle.

    Args:
        sha256: SHA-256 of its bytes, 64 hexadecimal digits.
        bytes: Its size.
    """

    sha256: str
    bytes: int


@dataclass(frozen=True)
class ParityCheck:
    """PyTorch against ONNX Runtime at one batch size.

    Args:
        batch: Rows in the batch.
        difference: Largest absolute difference of any output.
        tolerance: Largest difference that is accepted, absolute.
    """

    batch: int
    difference: float
    tolerance: float


@dataclass(frozen=True)
class Parity:
    """How closely the exported model follows the trained one.

    Args:
        inputs: What was fed to both, in words.
        checks: One check a batch size.
    """

    inputs: str
    checks: list[ParityCheck]


@dataclass(frozen=True)
class SiteRecord:
    """One site's part in the model.

    Args:
        name: Name of the site.
        rounds: Rounds in which its update was used.
        metrics: Metrics of the model on its held-out rows, those that the rows define.
        epsilon: Epsilon its records spent; None without record-level DP.
        noise_multiplier: Noise over clipping norm; None without record-level DP.
    """

    name: str
    rounds: int
    metrics: dict[str, float]
    epsilon: float | None
    noise_multiplier: float | None


@dataclass(frozen=True)
class Release:
    """What the export adds to what the run says of itself.

    Args:
        version: Counter by which a site tells a newer bundle of a task from an older one.
        created: UTC time, ISO 8601, to the second.
        parity: The exported model against the trained one.
        exported_with: Versions of the libraries that made the bundle, by name.
    """

    version: int
    created: str
    parity: Parity
    exported_with: dict[str, str]


@dataclass(frozen=True)
class Manifest:
    """What ``manifest.json`` says.

    Args:
        format_version: Version of the bundle format.
        version: Counter of the release.
        created: UTC time of the export, ISO 8601.
        run: Name of the run.
        task: Digest of the task.
        layout: Digest of the model's layout.
        model: Digest of the model.
        run_digest: Digest of the run.
        metrics: Metrics over all sites' held-out rows, those that the rows define.
        error_bounds: Error bound of a metric that is not exact.
        delta: Delta of every epsilon; None without record-level DP.
        clip: Per-record clipping norm; None without record-level DP.
        outside_epsilon: Numbers derived from rows that epsilon does not cover.
        mechanism: Record-level DP's, ``dp_sgd`` or ``dp_ftrl``; empty without it.
        sampler: How record-level DP drew a step's records; empty without it.
        adjacency: Which data sets are neighbours for every epsilon; empty without record-level DP.
        randomness: Where its noise and batches came from; ``insecure_seeded`` protects nobody.
        sites: The sites; the :data:`MAX_SITES` with the largest epsilon if there are more.
        sites_total: How many sites took part.
        parity: The exported model against the trained one.
        trained_with: Versions of the libraries of the run.
        exported_with: Versions of the libraries of the export.
        signer: Fingerprint of the key that signs.
        files: Every file of the folder but the manifest and its signature.
    """

    format_version: int
    version: int
    created: str
    run: str
    task: str
    layout: str
    model: str
    run_digest: str
    metrics: dict[str, float]
    error_bounds: dict[str, float]
    delta: float | None
    clip: float | None
    outside_epsilon: list[str]
    mechanism: str
    sampler: str
    adjacency: str
    randomness: str
    sites: list[SiteRecord]
    sites_total: int
    parity: Parity
    trained_with: dict[str, str]
    exported_with: dict[str, str]
    signer: str
    files: dict[str, FileRecord]


def make_manifest(
    task: Task, summary: RunSummary, release: Release, signer: str, files: dict[str, FileRecord]
) -> Manifest:
    """Return the manifest of a new bundle.

    Args:
        task: What was learned.
        summary: What the run says of itself.
        release: What the export adds.
        signer: Fingerprint of the signing key.
        files: Every other file.
    """
    return Manifest(
        format_version=FORMAT_VERSION,
        version=release.version,
        created=release.created,
        run=summary.run,
        task=task.digest,
        layout=summary.layout,
        model=summary.model,
        run_digest=summary.digest,
        metrics=summary.metrics,
        error_bounds=summary.error_bounds,
        delta=summary.delta,
        clip=summary.clip,
        outside_epsilon=summary.outside_epsilon,
        mechanism=summary.mechanism,
        sampler=summary.sampler,
        adjacency=adjacency_of(summary.sampler) if summary.sampler else "",
        randomness=summary.randomness,
        sites=[_site(site) for site in _most_exposed(summary.sites)],
        sites_total=len(summary.sites),
        parity=release.parity,
        trained_with=summary.versions,
        exported_with=release.exported_with,
        signer=signer,
        files=files,
    )


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the bytes of ``manifest.json``, which are the bytes that are signed.

    Raises:
        ValueError: A number in it is not finite.
    """
    return canonical_json(manifest)


def parse_manifest(payload: VerifiedBytes, *, where: str = "") -> Manifest:
    """Return what a verified manifest says.

    A valid signature makes the bytes authentic, not well-formed: whoever holds the key can sign a
    path that leaves the folder. So names and sizes are checked here, before any file is opened.

    Args:
        payload: Bytes that the signature was verified over.
        where: Where they were found, for messages.

    Raises:
        BundleRefused: LF4106, not a manifest; LF4107, of another format version; LF4108, it lists
            a file that a bundle may not have, or not all that it must.
    """
    try:
        value = strict_json(payload)
        found = value.get("format_version") if isinstance(value, dict) else None
        # Asked before anything else is looked at: another version may have other keys.
        if type(found) is int and found != FORMAT_VERSION:
            raise _refused(
                "LF4107",
                f"the bundle has format version {found}, this lepton-fed reads {FORMAT_VERSION}",
                where,
                "install a lepton-fed that reads it" if found > FORMAT_VERSION else _ASK,
            )
        manifest = decode(Manifest, value)
        if manifest.version < 1:
            raise ValueError(f"version: must be at least 1, not {manifest.version}")
    except ValueError as error:
        raise _refused("LF4106", f"the manifest is malformed: {error}", where, _ASK) from None
    refuse_all(
        [Problem("LF4108", what, where, remedy=_ASK) for what in _complaints(manifest.files)]
    )
    return manifest


def refuse_all(problems: list[Problem]) -> None:
    """Refuse a bundle for everything that was found wrong with it, if anything was.

    Args:
        problems: What was found, at will; a screenful is reported.

    Raises:
        BundleRefused: There are problems.
    """
    if problems:
        raise BundleRefused(capped(problems, "LF4149"))


def _complaints(files: dict[str, FileRecord]) -> list[str]:
    found = [f"the manifest does not list {name}" for name in REQUIRED if name not in files]
    if len(files) > _MAX_FILES:
        found.append(f"the manifest lists {len(files)} files, more than {_MAX_FILES}")
    for name, record in files.items():
        if not _PLAIN_NAME.fullmatch(name) or name in (MANIFEST, SIGNATURE):
            found.append(f"the manifest lists {quoted(name)}, which no file of a bundle may be")
        elif not _SHA256.fullmatch(record.sha256):
            found.append(f"the hash of {name} is not a SHA-256")
        elif record.bytes < 0 or (name in (TASK, CARD) and record.bytes > MAX_TEXT_BYTES):
            found.append(f"{name} may not have {record.bytes} bytes")
    if sum(record.bytes for record in files.values()) > MAX_BUNDLE_BYTES:
        found.append(f"the files have more than {MAX_BUNDLE_BYTES} bytes together")
    return found


def _most_exposed(sites: list[SiteSummary]) -> list[SiteSummary]:
    """Return at most MAX_SITES sites, by name; the largest epsilon is always among them."""
    largest = sorted(sites, key=lambda s: (-math.inf if s.epsilon is None else -s.epsilon, s.name))
    return sorted(largest[:MAX_SITES], key=lambda site: site.name)


def _site(site: SiteSummary) -> SiteRecord:
    return SiteRecord(
        name=site.name,
        rounds=site.rounds,
        metrics=site.metrics,
        epsilon=site.epsilon,
        noise_multiplier=site.noise_multiplier,
    )


def _refused(code: str, what: str, where: str, remedy: str) -> BundleRefused:
    return BundleRefused(Problem(code=code, what=what, where=where, remedy=remedy))
