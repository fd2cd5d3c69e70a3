"""What a running coordinator takes in anew: its TLS certificate, and the roster.

Both are files that somebody replaces. What is put in place is checked as at the start; if it is
not good, that is said once, and what was in use stays in use. What may pass by itself, such as a
locked database or a certificate that is not valid yet, is tried again at each look. Nothing is ever
written here.
"""

from __future__ import annotations

import logging
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol

from lepton_fed.core.retry import Retry
from lepton_fed.errors import LeptonError, Problem, Refused
from lepton_fed.flower.transport import Seals
from lepton_fed.identity.certificates import parse_authorities
from lepton_fed.identity.keys import read_key_file
from lepton_fed.identity.node_key import node_public_pem
from lepton_fed.identity.roster import Roster, changes, read_roster_file
from lepton_fed.identity.server_certificate import ServerCertificate, load_server_certificate
from lepton_fed.identity.signature import PrivateKey
from lepton_fed.identity.watch import FileWatch
from lepton_fed.server.federation import RosterChange

__all__ = ["CertificateInUse", "Members", "Register", "RosterInUse", "Watcher"]

_LOOK_S = 2.0
_STOP_S = 5.0
_THIS_MACHINE = {"localhost", "127.0.0.1", "::1"}
_SOON = timedelta(days=14)
_DAY = timedelta(days=1)

_log = logging.getLogger("lepton_fed.server")


class Watcher(threading.Thread):
    """Looks at files every few seconds, until it is stopped.

    Args:
        looks: What looks; each says itself what it finds.
    """

    def __init__(self, *looks: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._looks = looks
        self._stopping = threading.Event()
        self._last = ""

    def run(self) -> None:
        """Look."""
        while not self._stopping.wait(_LOOK_S):
            for look in self._looks:
                try:
                    look()
                except Exception as error:  # noqa: BLE001 - tried again at the next look
                    if repr(error) != self._last:
                        self._last = repr(error)
                        _log.exception("a changed file is not taken in yet")

    def stop(self) -> None:
        """Look no more."""
        self._stopping.set()
        if self.is_alive():
            self.join(_STOP_S)


class CertificateInUse:
    """The TLS certificate that sites are shown.

    Args:
        certificate: Its file, PEM.
        key: File of its private key, PEM.
        ca: File of the certificate of its authority, which sites trust, PEM.
        ends: Told, in seconds since the epoch, when the one in use is valid no more.
        now: Tells the time.

    Raises:
        Refused: The files are not good; see :func:`load_server_certificate`.
    """

    def __init__(
        self,
        certificate: Path,
        key: Path,
        ca: Path,
        ends: Callable[[float], None] = lambda seconds: None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._files = (certificate, key)
        self._ca = ca
        self._told_end = ends
        self._now = now
        self._watch = FileWatch(certificate, key, ca)
        self._retry = Retry()
        self._shown: ServerCertificate = load_server_certificate(certificate, key, now())
        self._warned: datetime | None = None
        ends(self._shown.ends.timestamp())

    def look(self, show: Callable[[ssl.SSLContext], None]) -> None:
        """Take in what was put in place since the last look.

        Args:
            show: Shows it from the next handshake on.
        """
        if self._retry.due(self._watch.look()):
            try:
                self._take(show)
            except LeptonError as error:
                if self._retry.failed(error):
                    _log.error(
                        "certificate.refused %s; the one in use stays, valid until %s",
                        _in_words(error),
                        _day(self._shown.ends),
                    )
            else:
                self._retry.succeeded()
        self._warn()

    def _take(self, show: Callable[[ssl.SSLContext], None]) -> None:
        found = load_server_certificate(*self._files, self._now())
        if found.digest == self._shown.digest:
            return
        # Those of the machine itself do not count, unless it is a trial on one machine.
        wanted = set(self._shown.hosts) - _THIS_MACHINE or set(self._shown.hosts)
        lost = sorted(wanted - set(found.hosts))
        if lost:
            raise Refused(
                Problem("LF4165", "the certificate is not for " + ", ".join(lost) + ", which the "
                        "one in use is for", where=str(self._files[0]),
                        remedy="have one made for these too; or, if no site connects there, start "
                        "the coordinator again")
            )  # fmt: skip
        if not self._trusted(found) and self._trusted(self._shown):
            raise Refused(
                Problem("LF4179", f"no authority in {self._ca} issued the certificate, and sites "
                        "that trust that file could not connect", where=str(self._files[0]),
                        key="tls.ca", remedy="when the sites trust its authority, put that one "
                        "into tls.ca too")
            )  # fmt: skip
        show(found.context)
        self._shown, self._warned = found, None
        self._told_end(found.ends.timestamp())
        _log.info("certificate.renewed valid until %s", _day(found.ends))

    def _trusted(self, certificate: ServerCertificate) -> bool:
        """Return whether sites trust it, as far as the coordinator's copy of their file says."""
        try:
            authorities = parse_authorities(read_key_file(self._ca, private=False), self._ca)
        except LeptonError:
            return False
        return certificate.is_under(authorities)

    def _warn(self) -> None:
        """Say once a day that it ends soon, or has ended."""
        now = self._now()
        left = self._shown.ends - now
        if left > _SOON or (self._warned is not None and now - self._warned < _DAY):
            return
        self._warned = now
        if left > timedelta(0):
            _log.warning(
                "certificate.ends on %s, in %d days: put a new one in place of %s",
                _day(self._shown.ends),
                left.days,
                self._files[0],
            )
        else:
            _log.error(
                "certificate.ended on %s: no site can connect; put a new one in place of %s",
                _day(self._shown.ends),
                self._files[0],
            )


class Register(Protocol):
    """Which nodes are let in; see :class:`lepton_fed.flower.superlink.SuperLink`."""

    def enrol(self, keys: Mapping[str, bytes]) -> None:
        """Let these nodes in and no others."""

    def nodes(self, keys: Mapping[str, bytes]) -> dict[str, int]:
        """Return the node id of each site, by name."""


@dataclass(frozen=True)
class Members:
    """The sites of a roster, as they are reached.

    Args:
        roster: The roster.
        content: The signed roster, as the file holds it.
        nodes: Node id of each site, by name.
        seals: The keys.
    """

    roster: Roster
    content: bytes
    nodes: Mapping[str, int]
    seals: Seals


Follower = Callable[[Members, RosterChange], None]


class RosterInUse:
    """The roster that sites are reached by.

    Args:
        path: Its file.
        key: The coordinator's key, which signs it.

    Raises:
        Refused: The roster is malformed or not signed.
    """

    def __init__(self, path: Path, key: PrivateKey) -> None:
        self._path = path
        self._key = key
        self._watch = FileWatch(path)
        self._lock = threading.RLock()
        self._retry = Retry()
        self._members: Members | None = None
        self._followers: list[Follower] = []
        self._newest: Roster = read_roster_file(path, key.public_key())[0]
        self.keys: dict[str, bytes] = _node_keys(self._newest)

    def take(self, register: Register) -> Members:
        """Take the roster as it is now, and let its nodes in and no others.

        Raises:
            Refused: It is malformed or not signed; LF4175, it is older than the one in use.
            RunError: LF5015, a node key on it was taken off before.
        """
        with self._lock:
            before = self._members
            roster, content = read_roster_file(self._path, self._key.public_key())
            if before is not None and roster == before.roster:
                return before
            if roster.version <= self._newest.version and roster != self._newest:
                raise Refused(
                    Problem("LF4175", f"this is version {roster.version} of the roster; another "
                            f"version {self._newest.version} is in use", where=str(self._path),
                            remedy="put the newest back, and change that one")
                )  # fmt: skip
            keys = _node_keys(roster)
            register.enrol(keys)
            old = self._newest
            seals = Seals(self._key, {member.name: member.key for member in roster.sites})
            self._members = now = Members(roster, content, register.nodes(keys), seals)
            self._newest, self.keys = roster, keys
            for line in changes(old, roster):
                _log.info("roster.changed %s", line)
            for follower in self._followers:
                follower(now, _change(old, now))
            return now

    def look(self, register: Register) -> None:
        """Take in what was put in place since the last look."""
        if not self._retry.due(self._watch.look()):
            return
        try:
            self.take(register)
        except LeptonError as error:
            if self._retry.failed(error):
                _log.error(
                    "roster.refused %s; version %d stays in use",
                    _in_words(error),
                    self._newest.version,
                )
        else:
            self._retry.succeeded()

    @contextmanager
    def followed(self, since: Members, follower: Follower) -> Iterator[None]:
        """Have somebody told of each change.

        Args:
            since: What they know.
            follower: Told of each change after that, in the thread that looks.
        """
        with self._lock:
            if self._members is not None and self._members is not since:
                follower(self._members, _change(since.roster, self._members))
            self._followers.append(follower)
        try:
            yield
        finally:
            with self._lock:
                self._followers.remove(follower)


def _node_keys(roster: Roster) -> dict[str, bytes]:
    return {member.name: node_public_pem(member.node_key) for member in roster.sites}


def _change(old: Roster, new: Members) -> RosterChange:
    before = {site.name: site for site in old.sites}
    after = {site.name: site for site in new.roster.sites}
    kept: Sequence[str] = [name for name in before if name in after]
    return RosterChange(
        new.content,
        new.roster.version,
        tuple(after),
        removed=tuple(name for name in before if name not in after),
        renewed=tuple(name for name in kept if before[name] != after[name]),
        added=tuple(name for name in after if name not in before),
    )


def _day(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d}"


def _in_words(error: LeptonError) -> str:
    """Return an error in one line of a log: where, what, and what to do."""
    problem = error.problems[0]
    said = f"{problem.where}: {problem.what}" if problem.where else problem.what
    return f"{said}; {problem.remedy} [{problem.code}]"
