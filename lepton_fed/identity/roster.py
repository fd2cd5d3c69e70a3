"""The roster: who takes part, signed by the coordinator and pinned by each site.

A site asks to be on it with an enrolment: its name, the public halves of its two keys, and its own
signature over them. The coordinator compares the words of the key by phone, enrols, and signs the
roster anew. Sites take a roster only with the signature of the coordinator that they pinned, never
an older one, and, unless their policy says otherwise, only after a person has seen the change.

docs/reference/roster.md is the format in words.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from lepton_fed.core.decode import decode, strict_json
from lepton_fed.core.digests import canonical_json, digest_of, plain
from lepton_fed.errors import Problem, Refused
from lepton_fed.identity.keys import read_key_file
from lepton_fed.identity.node_key import node_public_pem
from lepton_fed.identity.signature import PrivateKey, PublicKey, check_payload, sign_payload
from lepton_fed.identity.words import key_words

__all__ = [
    "Enrolment",
    "Member",
    "Roster",
    "changes",
    "enrol",
    "enrolment_file",
    "parse_enrolment",
    "parse_roster",
    "read_roster",
    "read_roster_file",
    "remove",
    "roster_file",
    "write_file",
    "write_roster",
]

_ROSTER_TYPE = "application/vnd.lepton-fed.roster.v1+json"
_ENROLMENT_TYPE = "application/vnd.lepton-fed.enrolment.v1+json"
_MOST_BYTES = 1024 * 1024
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_KEY = re.compile(r"[0-9a-f]{64}")

Signed = TypeVar("Signed")


@dataclass(frozen=True)
class Member:
    """A site on the roster.

    Args:
        name: Name of the site.
        identity: Its Ed25519 public key, 64 hexadecimal digits.
        node_key: Public half of its node key, one OpenSSH line.
    """

    name: str
    identity: str
    node_key: str

    @property
    def key(self) -> PublicKey:
        """Return the site's public key."""
        return PublicKey.from_public_bytes(bytes.fromhex(self.identity))


@dataclass(frozen=True)
class Roster:
    """Who takes part.

    Args:
        version: Counter, from 1; every change is one more.
        coordinator: The coordinator's Ed25519 public key, 64 hexadecimal digits.
        sites: The sites, by name.
        previous: Digest of the roster before; empty for the first.
    """

    version: int
    coordinator: str
    sites: list[Member]
    previous: str

    @property
    def digest(self) -> str:
        """Return the canonical SHA-256 digest, 64 hexadecimal digits."""
        return digest_of("lepton-fed roster 1", self)

    def member(self, name: str) -> Member | None:
        """Return the site of this name; None when there is none."""
        return next((site for site in self.sites if site.name == name), None)


@dataclass(frozen=True)
class Enrolment:
    """A site's wish to be on the roster.

    Args:
        site: What is to stand there.
    """

    site: Member


@dataclass(frozen=True)
class _RosterFile:
    roster: Roster
    signature: str


@dataclass(frozen=True)
class _EnrolmentFile:
    enrolment: Enrolment
    signature: str


def parse_roster(content: bytes, coordinator: PublicKey, where: str = "") -> Roster:
    """Return the roster that a signed file holds.

    Args:
        content: The file.
        coordinator: The pinned key.
        where: Where it was found, for the message.

    Raises:
        Refused: LF4166, it is malformed; LF4167, the pinned key did not sign it.
    """
    file = _parse(_RosterFile, content, "roster", where)
    roster, body = file.roster, canonical_json(file.roster)
    if not check_payload(coordinator, _ROSTER_TYPE, body, _bytes(file.signature)):
        raise Refused(
            Problem("LF4167", "the roster is not signed by the pinned coordinator "
                    f"({key_words(coordinator)})", where=where,
                    remedy="compare the words with the coordinator's by phone; then fetch it again")
        )  # fmt: skip
    wrong = _complaint(roster, coordinator)
    if wrong:
        raise _malformed("roster", wrong, where)
    return roster


def roster_file(roster: Roster, private: PrivateKey) -> bytes:
    """Return the signed file of a roster, readable JSON."""
    signature = sign_payload(private, _ROSTER_TYPE, canonical_json(roster)).hex()
    return _readable(_RosterFile(roster, signature))


def read_roster(path: Path, coordinator: PublicKey) -> Roster:
    """Return the roster in a file; see :func:`parse_roster`.

    Raises:
        Refused: LF4151 or LF4157, it cannot be read; else as :func:`parse_roster`.
    """
    return read_roster_file(path, coordinator)[0]


def read_roster_file(path: Path, coordinator: PublicKey) -> tuple[Roster, bytes]:
    """Return the roster in a file, and the signed file itself; see :func:`read_roster`."""
    content = _read(path)
    return parse_roster(content, coordinator, str(path)), content


def write_roster(path: Path, roster: Roster, private: PrivateKey) -> None:
    """Sign a roster and replace the file by it.

    Raises:
        Refused: LF4157, it cannot be written; what was there is there still.
    """
    write_file(path, roster_file(roster, private))


def enrolment_file(site: Member, identity: PrivateKey) -> bytes:
    """Return a site's enrolment as a file, signed by it to show that the keys are its own."""
    enrolment = Enrolment(site)
    signature = sign_payload(identity, _ENROLMENT_TYPE, canonical_json(enrolment)).hex()
    return _readable(_EnrolmentFile(enrolment, signature))


def parse_enrolment(path: Path) -> Member:
    """Return the site that an enrolment file asks for.

    Raises:
        Refused: LF4151 or LF4157, it cannot be read; LF4166, it is malformed; LF4168, it is not
            signed by the identity that it names.
    """
    file = _parse(_EnrolmentFile, _read(path), "enrolment", str(path))
    site = file.enrolment.site
    wrong = _member_complaint(site)
    if wrong:
        raise _malformed("enrolment", wrong, str(path))
    body = canonical_json(file.enrolment)
    if not check_payload(site.key, _ENROLMENT_TYPE, body, _bytes(file.signature)):
        raise Refused(
            Problem("LF4168", "the enrolment is not signed by the identity that it names",
                    where=str(path), remedy="let the site make it: lepton-fed keys site NAME")
        )  # fmt: skip
    return site


def enrol(roster: Roster, site: Member) -> Roster:
    """Return the roster with a site on it; one of the same name is replaced.

    Raises:
        Refused: LF4169, another site has one of its keys, or nothing would change.
    """
    others = [member for member in roster.sites if member.name != site.name]
    for other in others:
        if other.identity == site.identity or other.node_key == site.node_key:
            raise Refused(
                Problem("LF4169", f"{other.name} is on the roster with this key", where=site.name,
                        remedy="each site makes keys of its own")
            )  # fmt: skip
    if site in roster.sites:
        raise Refused(Problem("LF4169", "it is on the roster already", where=site.name))
    return _changed(roster, [*others, site])


def remove(roster: Roster, name: str) -> Roster:
    """Return the roster without a site.

    Raises:
        Refused: LF4170, it is not on it.
    """
    if roster.member(name) is None:
        names = ", ".join(site.name for site in roster.sites) or "none"
        raise Refused(
            Problem("LF4170", f"{name!r} is not on the roster", remedy=f"sites on it: {names}")
        )
    return _changed(roster, [site for site in roster.sites if site.name != name])


def changes(old: Roster | None, new: Roster) -> list[str]:
    """Return what a person should see of a change, a line a site.

    Args:
        old: The roster before; None when there was none.
        new: The roster after.
    """
    before = {site.name: site for site in old.sites} if old else {}
    after = {site.name: site for site in new.sites}
    lines = [f"removed  {name}" for name in sorted(set(before) - set(after))]
    for name, site in sorted(after.items()):
        if name not in before:
            lines.append(f"added    {name}  {key_words(site.key)}")
        elif before[name] != site:
            lines.append(f"new key  {name}  {key_words(site.key)}")
    return lines


def write_file(path: Path, content: bytes) -> None:
    """Replace a file; after a crash it holds the old or the new.

    Raises:
        Refused: LF4157, it cannot be written.
    """
    aside = path.parent / f".{secrets.token_hex(8)}.partial"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            with aside.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise Refused(
            Problem("LF4157", f"this cannot be written: {error.strerror}", where=str(path),
                    remedy="choose a writable folder with room")
        ) from error  # fmt: skip


def _changed(roster: Roster, sites: Sequence[Member]) -> Roster:
    ordered = sorted(sites, key=lambda site: site.name)
    return replace(roster, version=roster.version + 1, sites=ordered, previous=roster.digest)


def _complaint(roster: Roster, coordinator: PublicKey) -> str:
    if roster.coordinator != coordinator.public_bytes_raw().hex():
        return "it names another coordinator than the key that signed it"
    if roster.version < 1:
        return "its version is below 1"
    names = [site.name for site in roster.sites]
    if names != sorted(set(names)):
        return "its sites are not in order, or one is there twice"
    keys = [key for site in roster.sites for key in (site.identity, site.node_key)]
    if len(set(keys)) < len(keys):
        return "two sites share a key"
    return next(filter(None, map(_member_complaint, roster.sites)), "")


def _member_complaint(site: Member) -> str:
    if not _NAME.fullmatch(site.name):
        return "a site's name has characters that it may not have"
    if not _KEY.fullmatch(site.identity):
        return "an identity is no Ed25519 public key"
    try:
        node_public_pem(site.node_key)
    except Refused:
        return "a node key is no EC P-384 key in OpenSSH format"
    return ""


def _parse(kind: type[Signed], content: bytes, what: str, where: str) -> Signed:
    if len(content) > _MOST_BYTES:
        raise _malformed(what, "it is too large", where)
    try:
        return decode(kind, strict_json(content))
    except ValueError as error:
        raise _malformed(what, str(error), where) from None


def _read(path: Path) -> bytes:
    return read_key_file(path, private=False, limit=_MOST_BYTES)


def _bytes(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        return b""


def _readable(value: object) -> bytes:
    return json.dumps(plain(value), indent=2, ensure_ascii=False).encode() + b"\n"


def _malformed(what: str, why: str, where: str) -> Refused:
    return Refused(
        Problem("LF4166", f"this is no {what}: {why}", where=where, remedy="fetch it again")
    )
