"""A running coordinator takes in a new certificate and a new roster, and refuses bad ones once."""

from __future__ import annotations

import logging
import os
import shutil
import ssl
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from lepton_fed.errors import Problem, Refused, RunError
from lepton_fed.identity.certificates import make_certificates, make_next_certificate
from lepton_fed.identity.keys import generate_key, load_private_key
from lepton_fed.identity.node_key import generate_node_key
from lepton_fed.identity.roster import Member, Roster, enrol, remove, write_roster
from lepton_fed.server.federation import RosterChange
from lepton_fed.server.renewal import CertificateInUse, Members, RosterInUse, Watcher

DAY = timedelta(days=1)
PAIR = ("server.crt", "server.key")
CA = "ca.crt"


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "lepton_fed.server")
    return caplog


def said(heard: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in heard.records]
    heard.clear()
    return found


class Certificates:
    """A coordinator's TLS files, on a clock that a test sets."""

    def __init__(self, folder: Path, *hosts: str) -> None:
        self.folder = folder
        make_certificates(folder / "tls", hosts)
        self.now = datetime.now(UTC)
        self.ends: list[float] = []
        self.shown: list[ssl.SSLContext] = []
        files = (folder / "tls" / name for name in (*PAIR, CA))
        self.used = CertificateInUse(*files, self.ends.append, lambda: self.now)

    def put(self, source: Path, *names: str) -> None:
        for name in names or PAIR:
            shutil.copy2(source / name, self.folder / "aside")
            os.replace(self.folder / "aside", self.folder / "tls" / name)

    def make(self, name: str, *hosts: str, now: datetime | None = None) -> Path:
        make_next_certificate(self.folder / "tls", self.folder / name, hosts, now)
        return self.folder / name

    def look(self, times: int = 2) -> None:
        for _ in range(times):
            self.used.look(self.shown.append)


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path, "fed.example.org")


def test_a_new_pair_is_shown_once_and_its_end_is_told(
    certificates: Certificates, heard: pytest.LogCaptureFixture
) -> None:
    certificates.look(3)
    assert not certificates.shown
    assert not said(heard)
    certificates.put(certificates.make("next", now=certificates.now + DAY / 2))
    certificates.now += DAY
    certificates.look(4)
    assert len(certificates.shown) == 1
    (line,) = said(heard)
    assert line.startswith("certificate.renewed valid until 20")
    assert certificates.ends[1] - certificates.ends[0] == pytest.approx(43200, abs=5)


def test_the_same_pair_again_is_no_news(
    certificates: Certificates, heard: pytest.LogCaptureFixture
) -> None:
    for name in PAIR:
        os.utime(certificates.folder / "tls" / name)
    certificates.look(3)
    assert not certificates.shown
    assert not said(heard)


def test_a_bad_pair_is_told_once_and_the_next_good_one_is_taken(
    certificates: Certificates, heard: pytest.LogCaptureFixture
) -> None:
    good = certificates.make("next")
    ended = certificates.make("ended", now=certificates.now - 900 * DAY)
    certificates.put(ended)
    certificates.look(5)
    (line,) = said(heard)
    assert line.startswith("certificate.refused ")
    assert "LF4164" in line
    assert "the one in use stays" in line
    certificates.put(good, "server.crt")
    certificates.look(5)
    (line,) = said(heard)
    assert "LF4178" in line
    assert not certificates.shown
    certificates.put(good, "server.key")
    certificates.look(5)
    assert len(certificates.shown) == 1
    assert "certificate.renewed" in said(heard)[0]


def test_one_that_is_not_valid_yet_is_told_once_and_taken_when_it_is(
    certificates: Certificates, heard: pytest.LogCaptureFixture
) -> None:
    certificates.put(certificates.make("next", now=certificates.now + 2 * DAY))
    certificates.look(5)
    assert ["LF4164" in line for line in said(heard)] == [True]
    certificates.now += DAY
    certificates.look(5)
    assert not said(heard)
    assert not certificates.shown
    certificates.now += 2 * DAY
    certificates.look(1)
    assert [line.split()[0] for line in said(heard)] == ["certificate.renewed"]
    assert len(certificates.shown) == 1


def test_two_files_that_are_replaced_one_after_the_other_are_one_change(
    certificates: Certificates, heard: pytest.LogCaptureFixture
) -> None:
    good = certificates.make("next")
    certificates.put(good, "server.crt")
    certificates.look(1)
    certificates.put(good, "server.key")
    certificates.look(2)
    assert [line.split()[0] for line in said(heard)] == ["certificate.renewed"]


def test_one_that_sites_could_not_trust_any_more_is_refused(
    certificates: Certificates, heard: pytest.LogCaptureFixture
) -> None:
    certificates.put(certificates.make("next", "elsewhere.example.org"))
    certificates.look()
    (line,) = said(heard)
    assert "LF4165" in line
    assert "is not for fed.example.org," in line
    assert not certificates.shown


@pytest.mark.parametrize(
    ("before", "taken"), [(["fed.example.org"], True), ([], False)], ids=["network", "trial"]
)
def test_names_of_the_machine_itself_count_only_where_there_are_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: list[str], taken: bool
) -> None:
    found = Certificates(tmp_path, *before)
    monkeypatch.setattr("lepton_fed.identity.certificates._LOCAL", ())
    found.put(found.make("own", "fed.example.org"))
    found.look()
    assert bool(found.shown) == taken


def test_one_of_another_authority_waits_until_the_authority_is_known(
    certificates: Certificates, heard: pytest.LogCaptureFixture
) -> None:
    make_certificates(certificates.folder / "other", ["fed.example.org"])
    certificates.put(certificates.folder / "other")
    certificates.look(4)
    (line,) = said(heard)
    assert "LF4179" in line
    assert not certificates.shown
    ca = certificates.folder / "tls" / CA
    ca.write_bytes(ca.read_bytes() + (certificates.folder / "other" / CA).read_bytes())
    certificates.look(4)
    assert [line.split()[0] for line in said(heard)] == ["certificate.renewed"]
    assert len(certificates.shown) == 1


@pytest.mark.parametrize("known", [None, b"none", "other"])
def test_where_the_authority_was_never_named_it_is_not_asked_for(
    certificates: Certificates, heard: pytest.LogCaptureFixture, known: bytes | str | None
) -> None:
    make_certificates(certificates.folder / "other", ["fed.example.org"])
    make_certificates(certificates.folder / "third", ["fed.example.org"])
    ca = certificates.folder / "tls" / CA
    ca.unlink()
    if known is not None:
        third = (certificates.folder / "third" / CA).read_bytes()
        ca.write_bytes(third if isinstance(known, str) else known)
    certificates.put(certificates.folder / "other")
    certificates.look(4)
    assert [line.split()[0] for line in said(heard)] == ["certificate.renewed"]


def test_its_end_is_told_of_once_a_day_from_two_weeks_before(
    certificates: Certificates, heard: pytest.LogCaptureFixture
) -> None:
    end = datetime.fromtimestamp(certificates.ends[0], UTC)
    certificates.now = end - 15 * DAY
    certificates.look()
    assert not said(heard)
    certificates.now = end - 13 * DAY
    certificates.look(4)
    (line,) = said(heard)
    assert line.startswith("certificate.ends on ")
    assert "in 13 days" in line
    certificates.now += DAY / 2
    certificates.look()
    assert not said(heard)
    certificates.now += DAY
    certificates.look()
    assert "certificate.ends" in said(heard)[0]
    certificates.now = end + DAY
    certificates.look()
    (line,) = said(heard)
    assert line.startswith("certificate.ended on ")


def test_a_new_one_ends_the_warning(
    certificates: Certificates, heard: pytest.LogCaptureFixture
) -> None:
    certificates.now = datetime.fromtimestamp(certificates.ends[0], UTC) - DAY
    certificates.look()
    said(heard)
    certificates.put(certificates.make("next", now=certificates.now))
    certificates.look()
    certificates.now += 2 * DAY
    certificates.look()
    assert [line.split()[0] for line in said(heard)] == ["certificate.renewed"]


class Register:
    """Lets nodes in, but none that it was told to refuse."""

    def __init__(self) -> None:
        self.let_in: dict[str, bytes] = {}
        self.refused: set[bytes] = set()
        self.broken = False
        self.locked = False
        self.asked = 0

    def enrol(self, keys: Mapping[str, bytes]) -> None:
        self.asked += 1
        if self.locked:
            raise RunError(Problem("LF5018", f"the database is locked, asked {self.asked} times"))
        if self.broken:
            raise ConnectionError("database is locked")
        if self.refused & set(keys.values()):
            raise RunError(Problem("LF5015", "taken off before"))
        self.let_in = dict(keys)

    def nodes(self, keys: Mapping[str, bytes]) -> dict[str, int]:
        return {name: int.from_bytes(pem[-60:-50]) for name, pem in keys.items()}


class Rosters:
    """A coordinator's roster file, and what follows from it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        generate_key(folder / "coordinator.pem")
        self.key = load_private_key(folder / "coordinator.pem")
        self.path = folder / "roster.json"
        public = self.key.public_key().public_bytes_raw().hex()
        self.now = Roster(1, public, [], "")
        for name in ("north", "south"):
            self.now = enrol(self.now, self.member(name))
        self.write()
        self.register = Register()
        self.used = RosterInUse(self.path, self.key)
        self.changes: list[tuple[Members, RosterChange]] = []

    def member(self, name: str, generation: int = 1) -> Member:
        stem = self.folder / f"{name}-{generation}"
        identity = generate_key(stem.with_suffix(".pem"))
        return Member(
            name, identity.public_bytes_raw().hex(), generate_node_key(stem.with_suffix(".node"))
        )

    def write(self) -> None:
        write_roster(self.path, self.now, self.key)

    def look(self, times: int = 2) -> None:
        for _ in range(times):
            self.used.look(self.register)

    def note(self, members: Members, change: RosterChange) -> None:
        self.changes.append((members, change))


@pytest.fixture
def rosters(tmp_path: Path) -> Rosters:
    return Rosters(tmp_path)


def test_a_changed_roster_lets_others_in_and_whoever_follows_is_told(
    rosters: Rosters, heard: pytest.LogCaptureFixture
) -> None:
    first = rosters.used.take(rosters.register)
    assert rosters.used.take(rosters.register) is first
    with rosters.used.followed(first, rosters.note):
        rosters.now = enrol(rosters.now, rosters.member("north", 2))
        rosters.now = enrol(remove(rosters.now, "south"), rosters.member("east"))
        rosters.write()
        rosters.look(4)
    ((members, change),) = rosters.changes
    assert (change.removed, change.renewed, change.added) == (("south",), ("north",), ("east",))
    assert change.sites == ("east", "north")
    assert change.version == rosters.now.version
    assert change.roster == rosters.path.read_bytes()
    assert set(rosters.register.let_in) == set(rosters.used.keys) == {"east", "north"}
    assert members.nodes["north"] != first.nodes["north"]
    north = rosters.now.member("north")
    assert north is not None
    assert members.seals.sites["north"].public_bytes_raw() == north.key.public_bytes_raw()
    assert {line.split()[1] for line in said(heard)} == {"removed", "new", "added"}


def test_whoever_follows_no_more_is_told_nothing(rosters: Rosters) -> None:
    with rosters.used.followed(rosters.used.take(rosters.register), rosters.note):
        pass
    rosters.now = remove(rosters.now, "south")
    rosters.write()
    rosters.look()
    assert set(rosters.register.let_in) == {"north"}
    assert not rosters.changes


def test_whoever_begins_to_follow_misses_no_change(rosters: Rosters) -> None:
    known = rosters.used.take(rosters.register)
    rosters.now = remove(rosters.now, "south")
    rosters.write()
    rosters.look()
    with rosters.used.followed(known, rosters.note):
        assert rosters.changes[0][1].removed == ("south",)


@pytest.mark.parametrize("bad", ["half", "unsigned", "older", "other"])
def test_a_bad_roster_is_told_once_and_the_one_in_use_stays(
    rosters: Rosters, heard: pytest.LogCaptureFixture, bad: str
) -> None:
    old = rosters.now
    rosters.now = enrol(rosters.now, rosters.member("east"))
    rosters.write()
    rosters.look()
    said(heard)
    content = rosters.path.read_bytes()
    codes = {"half": "LF4166", "unsigned": "LF4167", "older": "LF4175", "other": "LF4175"}
    if bad == "half":
        rosters.path.write_bytes(content[:200])
    elif bad == "unsigned":
        generate_key(rosters.folder / "stranger.pem")
        write_roster(rosters.path, rosters.now, load_private_key(rosters.folder / "stranger.pem"))
    else:
        older = old if bad == "older" else enrol(old, rosters.member("west"))
        write_roster(rosters.path, older, rosters.key)
    rosters.look(4)
    (line,) = said(heard)
    assert line.startswith("roster.refused ")
    assert codes[bad] in line
    assert set(rosters.used.keys) == set(rosters.register.let_in) == {"north", "south", "east"}
    rosters.path.write_bytes(content)
    rosters.look(4)
    assert not said(heard)
    with pytest.raises(Refused):
        RosterInUse(rosters.folder / "north-1.pub", rosters.key)


def test_a_node_key_that_was_taken_off_before_changes_nothing(
    rosters: Rosters, heard: pytest.LogCaptureFixture
) -> None:
    known = rosters.used.take(rosters.register)
    rosters.now = enrol(rosters.now, rosters.member("east"))
    rosters.register.refused = {rosters.register.let_in["south"]}
    rosters.write()
    rosters.look(4)
    assert ["LF5015" in line for line in said(heard)] == [True]
    assert set(rosters.used.keys) == {"north", "south"}
    with rosters.used.followed(known, rosters.note):
        assert not rosters.changes


def test_what_passes_by_is_tried_again(rosters: Rosters, heard: pytest.LogCaptureFixture) -> None:
    rosters.now = remove(rosters.now, "south")
    rosters.write()
    rosters.register.broken = True
    rosters.look(1)
    with pytest.raises(ConnectionError):
        rosters.look(1)
    assert set(rosters.used.keys) == {"north", "south"}
    rosters.register.broken = False
    rosters.look(1)
    assert set(rosters.used.keys) == {"north"}


def test_a_roster_that_came_while_the_database_was_locked_is_taken_afterwards(
    rosters: Rosters, heard: pytest.LogCaptureFixture
) -> None:
    rosters.used.take(rosters.register)
    rosters.now = remove(rosters.now, "south")
    rosters.write()
    rosters.register.locked = True
    rosters.look(6)
    assert ["LF5018" in line for line in said(heard)] == [True], "told once"
    assert rosters.register.asked > 3
    rosters.register.locked = False
    rosters.look(1)
    assert set(rosters.register.let_in) == set(rosters.used.keys) == {"north"}
    assert [line.split()[0] for line in said(heard)] == ["roster.changed"]
    asked = rosters.register.asked
    rosters.look(3)
    assert rosters.register.asked == asked, "what is taken is not taken again"


def test_what_only_a_person_mends_is_not_tried_again(rosters: Rosters) -> None:
    rosters.path.write_bytes(rosters.path.read_bytes()[:200])
    rosters.look(4)
    assert not rosters.used._retry.due(False)


def test_a_watcher_goes_on_when_a_look_fails_and_says_so_once(
    heard: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lepton_fed.server.renewal._LOOK_S", 0.0)
    seen: list[int] = []

    def fail() -> None:
        raise OSError("no such disk")

    def look() -> None:
        seen.append(1)
        if len(seen) == 5:
            watcher._stopping.set()

    watcher = Watcher(fail, look)
    watcher.start()
    watcher.join(20)
    assert len(seen) == 5
    assert said(heard) == ["a changed file is not taken in yet"]
    watcher.stop()
