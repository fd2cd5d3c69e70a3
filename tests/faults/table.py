"""Writes docs/reference/faults.md from the rows of the tests: python -m tests.faults.table."""

from __future__ import annotations

from pathlib import Path

from tests.faults.rows import Fault, all_rows

__all__ = ["PAGE", "page"]

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "faults.md"

_HEAD = """\
# Faults

What goes wrong in a federation, what you see of it, what it costs, and when all is as before.
Each row is a test with real processes, lines and disks (`make test-faults`): it injects the fault
in the middle of a run and holds the row against what happens. This page is written from those
tests: `python -m tests.faults.table`.

The rounds are masked: secure aggregation is on, with five sites of which three have to stay. Rows
with a star are tried on rounds without secure aggregation too, of three sites: what is kept and
sent again after the fault is something else there. Rows with two stars are of such rounds alone.

**What you have to do: usually nothing.** A site comes back by itself, without its owner and
without the coordinator's, as long as its service manager starts it again whenever it ends,
whatever its exit code (systemd: `Restart=always`, `RestartSec=5`). Mend what the site's log names
(a disk, a clock, an install); the next round takes it in again. The other sites' rounds go on
meanwhile: they wait for a lost site `patience` times the expected time of a round at most, and
not at all once it is known to be offline, some 20 s after it was last heard of.

**What is never lost.** After each of these faults the test reads the site's receipts, ledger and
bundle: their chains are whole, every update that the coordinator accepted has its receipt and its
charge, and the pushed bundle verifies. Of a masked round one sum is opened at most, and each site's
update is in it once or not at all. An update that was charged and did not arrive stays charged: the
ledger may count a round too many, never one too few.

The times are bounds that the tests assert, from the moment at which the fault itself is over (for
a killed process: from the kill) until the site has contributed to a whole round again. The tests'
rounds take a few seconds; with rounds that are longer than the time in the last column, "one
round" is what is lost altogether.

**Over a long time** (`make test-soak`): 200 masked rounds in which one of these faults happens
every few rounds, drawn from a seed; SuperNodes, services and the coordinator are killed as a phase
of a round begins, too. Every round is closed once and in order, all sites are there in the last,
and memory, threads and open files of each process, the coordinator's database, what is kept for
asks and replies, and the files of masked rounds at both ends stay as they are.
"""

_TITLES = {
    "site": "## At a site",
    "network": "## Between a site and the coordinator",
    "coordinator": "## At the coordinator",
}
_COLUMNS = "| fault | what you see | what is lost | normal again within |\n|---|---|---|---|\n"


def page() -> str:
    """Return the page as the rows have it."""
    found = all_rows()
    parts = [_HEAD]
    for where, title in _TITLES.items():
        lines = [_line(row) for row in found if row.where == where]
        if lines:
            parts.append(f"{title}\n\n{_COLUMNS}{''.join(lines)}")
    return "\n".join(parts)


def _line(row: Fault) -> str:
    star = {("masked",): "", ("plain",): r" \*\*"}.get(row.rounds, r" \*")
    cells = (row.name + star, row.sees, row.lost, f"{row.normal_s:g} s")
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


if __name__ == "__main__":
    PAGE.write_text(page())
