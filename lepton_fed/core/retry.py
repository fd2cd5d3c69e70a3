"""Whether something that failed is tried again by itself, and whether its error is news."""

from __future__ import annotations

from lepton_fed.errors import LeptonError, RunError

__all__ = ["Retry"]

_WITH_TIME = frozenset({"LF4164"})
"""A certificate is not valid yet, or no more; or the clock is wrong, and is set."""


class Retry:
    """What is done when files change, and again at each look while its error may pass by itself.

    A full disk and a locked database may pass; a file that somebody wrote badly stays bad until it
    is written again.
    """

    def __init__(self) -> None:
        self._due = self._changed = self._early = False
        self._told: tuple[str, str] | None = None

    def due(self, changed: bool) -> bool:
        """Return whether to try now; it stays due until one of the two others is called.

        Args:
            changed: Whether the files are others than at the last look.
        """
        self._changed = changed
        if changed:
            if not self._early:
                self._told = None
            self._due, self._early = True, False
        return self._due

    def succeeded(self) -> None:
        """Note that it turned out well."""
        self._due = self._early = False
        self._told = None

    def failed(self, error: LeptonError) -> bool:
        """Note an error; return whether it is another than the one before.

        Args:
            error: Why it failed.
        """
        self._due = isinstance(error, RunError) or error.code in _WITH_TIME
        before, self._told = self._told, (error.code, error.problems[0].where)
        news = self._told != before
        # Tried again in the middle of a change: when that is over, the same is no news.
        self._early = self._early or (news and not self._changed)
        return news
