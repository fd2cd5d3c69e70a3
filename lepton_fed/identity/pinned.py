"""The roster as a site pinned it, and changes of it that wait for a person."""

from __future__ import annotations

from pathlib import Path

from lepton_fed.errors import Problem, Refused
from lepton_fed.identity.roster import (
    Roster,
    changes,
    parse_roster,
    read_roster,
    read_roster_file,
    write_file,
)
from lepton_fed.identity.signature import PublicKey

__all__ = ["PinnedRoster"]


class PinnedRoster:
    """What a site knows of who takes part.

    Args:
        handed: The roster file that the site was handed when it enrolled.
        state: The site's state folder; a newer roster that it took is kept there.
        coordinator: The pinned key.
        follow: Take a newer roster as soon as it is signed, without a person.

    Raises:
        Refused: LF4166 or LF4167, one of the files is malformed or not signed.
    """

    def __init__(self, handed: Path, state: Path, coordinator: PublicKey, follow: bool) -> None:
        self._kept = state / "roster.json"
        self._waiting = state / "roster.offered.json"
        self._coordinator = coordinator
        self._follow = follow
        known = [read_roster(p, coordinator) for p in (handed, self._kept) if p.exists()]
        if not known:
            read_roster(handed, coordinator)  # says that there is no such file
        self.current: Roster = max(known, key=lambda roster: roster.version)

    def consider(self, content: bytes) -> list[str]:
        """Look at the roster that an offer came with.

        Args:
            content: The signed file.

        Returns:
            What changed by taking it, for the site's log; empty when it is the one known.

        Raises:
            Refused: LF4166 or LF4167, it is malformed or not signed; LF4175, it is older than the
                one known; LF4176, it is newer, and a person has to look at it first.
        """
        offered = parse_roster(content, self._coordinator, "the coordinator's offer")
        if offered == self.current:
            return []
        if offered.version <= self.current.version:
            raise Refused(
                Problem("LF4175", f"the offer came with roster version {offered.version}, this "
                        f"site knows version {self.current.version}",
                        remedy="the coordinator must use its newest roster")
            )  # fmt: skip
        if not self._follow:
            write_file(self._waiting, content)
            raise Refused(
                Problem("LF4176", f"the roster changed to version {offered.version}, and nobody "
                        "at this site has looked at it yet",
                        remedy="at the site: lepton-fed keys accept --conf conf/client.yaml")
            )  # fmt: skip
        return self._take(offered, content)

    def offered(self) -> Roster | None:
        """Return the roster that waits for a person; None when none does.

        Raises:
            Refused: LF4166 or LF4167, it is malformed or not signed.
        """
        if not self._waiting.exists():
            return None
        found = read_roster(self._waiting, self._coordinator)
        return found if found.version > self.current.version else None

    def accept(self, seen: Roster | None) -> list[str]:
        """Take the roster that waits, if it is the one a person has seen.

        The coordinator may have offered another one while they looked.

        Args:
            seen: What :meth:`offered` returned, and was shown.

        Returns:
            What changed by it.

        Raises:
            Refused: LF4177, none waits; LF4180, another one waits by now.
        """
        if seen is None or not self._waiting.exists():
            raise Refused(Problem("LF4177", "no changed roster waits to be accepted"))
        waiting, content = read_roster_file(self._waiting, self._coordinator)
        if waiting != seen:
            raise Refused(
                Problem("LF4180", f"while version {seen.version} was looked at, the coordinator "
                        f"offered another roster, of version {waiting.version}; none was taken",
                        remedy="look at that one: lepton-fed keys accept")
            )  # fmt: skip
        changed = self._take(waiting, content)
        self._waiting.unlink(missing_ok=True)
        return changed

    def _take(self, offered: Roster, content: bytes) -> list[str]:
        changed = changes(self.current, offered)
        write_file(self._kept, content)
        self.current = offered
        return changed
