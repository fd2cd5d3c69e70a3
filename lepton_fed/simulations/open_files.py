"""Room for the files that a simulation holds open: one ledger a site, all in one process."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

from lepton_fed.errors import ConfError, Problem

__all__ = ["room_for_ledgers"]

_OTHERS = 64  # event log, checkpoint, libraries, devices


@contextmanager
def room_for_ledgers(sites: int) -> Iterator[None]:
    """Raise this process's soft limit of open files as far as that many ledgers need, for a while.

    Args:
        sites: Ledgers that will be open together.

    Raises:
        ConfError: The hard limit is too small; only the system's administrator can raise it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _open_now() + sites + _OTHERS
    if _fits(wanted, soft):
        yield
        return
    if not _fits(wanted, hard):
        raise ConfError(
            Problem("LF1105", f"{sites} sites with record-level DP hold {sites} ledgers open, and "
                    f"this process may open no more than {hard} files", key="sites.count",
                    remedy=f"simulate fewer sites, or raise the limit (ulimit -Hn) to {wanted}")
        )  # fmt: skip
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _fits(count: int, limit: int) -> bool:
    return limit == resource.RLIM_INFINITY or count <= limit


def _open_now() -> int:
    try:
        return len(os.listdir("/dev/fd"))
    except OSError:  # a system without it
        return 0
