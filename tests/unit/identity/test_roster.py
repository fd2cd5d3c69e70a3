"""The roster: signed, pinned, never older, changed only before a person's eyes."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lepton_fed.errors import Refused
from lepton_fed.identity.node_key import generate_node_key
from lepton_fed.identity.pinned import PinnedRoster
from lepton_fed.identity.roster import (
    Member,
    Roster,
    changes,
    enrol,
    enrolment_file,
    parse_enrolment,
    parse_roster,
    read_roster,
    remove,
    roster_file,
    write_roster,
)
from lepton_fed.identity.signature import PrivateKey
from lepton_fed.identity.words import key_words

COORDINATOR, STRANGER, *SITES = (PrivateKey.from_private_bytes(bytes([n]) * 32) for n in range(5))
NAMES = ("north", "east", "south")


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Member]:
    folder = tmp_path_factory.mktemp("keys")
    found = {}
    for name, key in zip(NAMES, SITES, strict=True):
        public = key.public_key().public_bytes_raw().hex()
        found[name] = Member(name, public, generate_node_key(folder / f"{name}.node"))
    return found


@pytest.fixture
def roster(members: dict[str, Member]) -> Roster:
    made = Roster(1, COORDINATOR.public_key().public_bytes_raw().hex(), [], "")
    return enrol(enrol(made, members["north"]), members["east"])


def code(action: Callable[[], object]) -> str:
    with pytest.raises(Refused) as refused:
        action()
    return refused.value.code


def test_a_signed_roster_comes_back_as_it_was(roster: Roster, tmp_path: Path) -> None:
    write_roster(tmp_path / "roster.json", roster, COORDINATOR)
    assert read_roster(tmp_path / "roster.json", COORDINATOR.public_key()) == roster
    assert [site.name for site in roster.sites] == ["east", "north"]
    assert roster.version == 3


def test_every_version_names_the_one_before(roster: Roster, members: dict[str, Member]) -> None:
    after = enrol(roster, members["south"])
    assert (after.version, after.previous) == (4, roster.digest)
    assert remove(after, "south").sites == roster.sites
    assert remove(after, "south").version == 5


def test_a_roster_that_another_signed_is_refused(roster: Roster) -> None:
    content = roster_file(roster, STRANGER)
    assert code(lambda: parse_roster(content, COORDINATOR.public_key())) == "LF4167"


def test_any_changed_byte_is_refused(roster: Roster) -> None:
    content = roster_file(roster, COORDINATOR)
    for place in range(0, len(content), 7):
        changed = bytearray(content)
        changed[place] ^= 1
        if json.dumps(_loaded(bytes(changed))) == json.dumps(_loaded(content)):
            continue  # white space
        assert code(
            lambda c=bytes(changed): parse_roster(c, COORDINATOR.public_key())  # type: ignore[misc]
        ) in ("LF4166", "LF4167")


def _loaded(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"roster": 1}', b"x" * (2**20 + 1)])
def test_what_is_no_roster_is_refused(content: bytes) -> None:
    assert code(lambda: parse_roster(content, COORDINATOR.public_key())) == "LF4166"


def test_a_coordinator_that_signs_nonsense_is_refused(
    roster: Roster, members: dict[str, Member]
) -> None:
    twin = Member("south", members["north"].identity, members["south"].node_key)
    other = STRANGER.public_key().public_bytes_raw().hex()
    for sites in (
        [members["north"], members["east"]],
        [members["north"], members["north"]],
        [members["north"], twin],
        [Member("../north", members["north"].identity, members["north"].node_key)],
        [Member("north", "00", members["north"].node_key)],
        [Member("north", members["north"].identity, "ssh-ed25519 AAAA")],
    ):
        content = roster_file(Roster(2, roster.coordinator, sites, ""), COORDINATOR)
        assert code(lambda c=content: parse_roster(c, COORDINATOR.public_key())) == "LF4166"  # type: ignore[misc]
    content = roster_file(Roster(2, other, [], ""), COORDINATOR)
    assert code(lambda: parse_roster(content, COORDINATOR.public_key())) == "LF4166"


def test_an_enrolment_shows_that_the_site_has_its_key(
    members: dict[str, Member], tmp_path: Path
) -> None:
    file = tmp_path / "north.enrol.json"
    file.write_bytes(enrolment_file(members["north"], SITES[0]))
    assert parse_enrolment(file) == members["north"]
    file.write_bytes(enrolment_file(members["north"], STRANGER))
    assert code(lambda: parse_enrolment(file)) == "LF4168"
    changed = json.loads(enrolment_file(members["north"], SITES[0]))
    changed["enrolment"]["site"]["name"] = "east"
    file.write_text(json.dumps(changed))
    assert code(lambda: parse_enrolment(file)) == "LF4168"


def test_one_key_cannot_stand_under_two_names(roster: Roster, members: dict[str, Member]) -> None:
    copied = Member("west", members["north"].identity, members["south"].node_key)
    assert code(lambda: enrol(roster, copied)) == "LF4169"
    assert code(lambda: enrol(roster, members["north"])) == "LF4169"
    assert code(lambda: remove(roster, "west")) == "LF4170"


def test_a_change_is_shown_with_the_words_of_the_key(
    roster: Roster, members: dict[str, Member]
) -> None:
    renewed = Member("east", members["south"].identity, members["south"].node_key)
    after = enrol(remove(roster, "north"), renewed)
    words = key_words(SITES[2].public_key())
    assert changes(roster, after) == ["removed  north", f"new key  east  {words}"]
    assert changes(None, roster)[0].startswith("added    east  ")
    assert len(words.split()) == 8


class Site:
    """What a site has pinned."""

    def __init__(self, folder: Path, roster: Roster) -> None:
        self.handed, self.state = folder / "roster.json", folder / "state"
        write_roster(self.handed, roster, COORDINATOR)

    def pinned(self, *, follow: bool = False) -> PinnedRoster:
        return PinnedRoster(self.handed, self.state, COORDINATOR.public_key(), follow)


def test_a_changed_roster_waits_for_a_person(
    roster: Roster, members: dict[str, Member], tmp_path: Path
) -> None:
    site, after = Site(tmp_path, roster), enrol(roster, members["south"])
    pinned = site.pinned()
    assert pinned.consider(roster_file(roster, COORDINATOR)) == []
    assert code(lambda: pinned.consider(roster_file(after, COORDINATOR))) == "LF4176"
    assert pinned.current == roster
    assert site.pinned().offered() == after
    assert site.pinned().accept(after)[0].startswith("added    south")
    assert site.pinned().current == after
    assert code(lambda: site.pinned().accept(after)) == "LF4177"
    assert code(lambda: site.pinned().accept(site.pinned().offered())) == "LF4177"


def test_a_roster_that_came_while_a_person_looked_at_another_is_not_taken(
    roster: Roster, members: dict[str, Member], tmp_path: Path
) -> None:
    site = Site(tmp_path, enrol(remove(roster, "north"), members["south"]))
    before = site.pinned().current
    shown = remove(before, "east")
    later = enrol(shown, members["north"])
    same_version = remove(before, "south")
    assert code(lambda: site.pinned().consider(roster_file(shown, COORDINATOR))) == "LF4176"
    looking = site.pinned()
    assert looking.offered() == shown
    for meanwhile in (later, same_version):
        content = roster_file(meanwhile, COORDINATOR)
        assert code(partial(site.pinned().consider, content)) == "LF4176"
        assert code(lambda: looking.accept(shown)) == "LF4180"
        assert looking.current == site.pinned().current == before
        assert site.pinned().offered() == meanwhile, "it waits to be looked at"
    assert site.pinned().accept(same_version) == ["removed  south"]
    assert site.pinned().current == same_version


def test_a_site_that_follows_takes_what_is_signed(
    roster: Roster, members: dict[str, Member], tmp_path: Path
) -> None:
    site, after = Site(tmp_path, roster), enrol(roster, members["south"])
    pinned = site.pinned(follow=True)
    assert code(lambda: pinned.consider(roster_file(after, STRANGER))) == "LF4167"
    assert pinned.consider(roster_file(after, COORDINATOR))[0].startswith("added    south")
    assert site.pinned().current == after


def test_an_older_or_a_second_roster_of_a_version_is_refused(
    roster: Roster, members: dict[str, Member], tmp_path: Path
) -> None:
    site, after = Site(tmp_path, roster), enrol(roster, members["south"])
    pinned = site.pinned(follow=True)
    pinned.consider(roster_file(after, COORDINATOR))
    assert code(lambda: pinned.consider(roster_file(roster, COORDINATOR))) == "LF4175"
    fork = remove(roster, "north")
    assert fork.version == after.version
    assert code(lambda: pinned.consider(roster_file(fork, COORDINATOR))) == "LF4175"
    assert site.pinned(follow=True).current == after


def test_a_tampered_copy_in_the_state_folder_is_refused(
    roster: Roster, members: dict[str, Member], tmp_path: Path
) -> None:
    site = Site(tmp_path, roster)
    site.state.mkdir()
    (site.state / "roster.json").write_bytes(roster_file(enrol(roster, members["south"]), STRANGER))
    assert code(site.pinned) == "LF4167"
