"""Whether files were replaced, so that a service takes new keys without being started again."""

from __future__ import annotations

from pathlib import Path

__all__ = ["FileWatch"]

Stamp = tuple[int, ...] | None


class FileWatch:
    """Tells once of each change of some files, when it is over.

    A change is over when the files look the same for a while: a file that is being written is left
    alone, and whoever replaces two that belong together is given the time between them.

    Args:
        paths: The files; one that is not there counts too.
        still: So many looks in a row must find no further change.
    """

    def __init__(self, *paths: Path, still: int = 1) -> None:
        self._paths = paths
        self._still = still
        self._told = self._seen = self._stamps()
        self._same = 0

    def look(self) -> bool:
        """Return whether they are others than when that was told last."""
        now = self._stamps()
        self._same = self._same + 1 if now == self._seen else 0
        self._seen = now
        if now == self._told or self._same < self._still:
            return False
        self._told = now
        return True

    def _stamps(self) -> tuple[Stamp, ...]:
        return tuple(map(_stamp, self._paths))


def _stamp(path: Path) -> Stamp:
    """Return what changes with a file, its rights included; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
