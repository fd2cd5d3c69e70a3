"""What would spend a budget twice: changed ledgers, full disks, and kill -9 at the worst moment."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest

from lepton_fed.clients.own_ledger import HeadFile
from lepton_fed.core.digests import canonical_json
from lepton_fed.errors import LeptonError, Refused
from lepton_fed.privacy.dp.accounting import SampledGaussian, epsilon_of
from lepton_fed.privacy.ledger import Ledger
from lepton_fed.privacy.ledger.book import RunName
from lepton_fed.privacy.ledger.chain import Chain, entry_hash
from lepton_fed.privacy.ledger.rows import KnownRows
from tests.ledger_entries import charges_in, entries_in

EVENTS = [SampledGaussian(1.0, 0.05, steps) for steps in (20, 11, 30)]
RUN = RunName("run", "a" * 64, "coordinator")
DELTA = 1e-5


def opened(path, epsilon=50.0, **more):
    return Ledger(path, dataset="main", content="c" * 64, epsilon=epsilon, delta=DELTA, **more)


def charge(ledger, event, number=1):
    return ledger.charge(event, RUN, number, "t" * 64)


def cost(events):
    return epsilon_of(events, DELTA)


@pytest.fixture
def path(tmp_path):
    """A ledger of three charges, with rows and a reservation."""
    path = tmp_path / "ledger.sqlite"
    rows = KnownRows(tmp_path / "ledger.key", lambda: [b"%d" % n for n in range(500)])
    ledger = opened(path, rows=rows)
    ledger.reserve(EVENTS[0], RUN, 5)
    for number, event in enumerate(EVENTS, start=1):
        charge(ledger, event, number)
    return path


def refusal(path):
    before = path.read_bytes()
    with pytest.raises(Refused) as caught:
        opened(path)
    assert path.read_bytes() == before, "what is found changed is evidence: it stays as it is"
    return caught.value.problems[0]


def test_a_changed_byte_is_found_or_changes_nothing_that_is_read(path):
    """SQLite's pages have room that nothing is read from; wherever else a byte is, it is found."""
    whole = path.read_bytes()
    truth = entries_in(path.parent)
    said = [(canonical_json(b), entry_hash(b)) for b in truth]
    inside = {
        place
        for text in (part for body, digest in said for part in (body, digest.encode()))
        for place in range(whole.index(text), whole.index(text) + len(text))
    }
    unnoticed, codes = set(), set()
    for place in range(len(whole)):
        if place % (3 if place in inside else 31):
            continue
        changed = bytearray(whole)
        changed[place] ^= 0x01
        path.write_bytes(changed)
        try:
            opened(path)
        except Refused as refused:
            codes.add(refused.code)
        else:
            unnoticed.add(place)
            assert entries_in(path.parent) == truth, place
    assert not unnoticed & inside
    assert codes == {"LF4204"}
    assert len(inside) > 2000


def test_a_changed_hash_of_a_row_is_found_before_new_rows_are_looked_up(path):
    with closing(sqlite3.connect(path)) as file:
        (before,) = file.execute("SELECT hashes FROM rows").fetchone()
    whole = path.read_bytes()
    place = whole.index(before[:200])  # a long one goes on on another page
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    other = Ledger(
        path, dataset="other", content="o" * 64, epsilon=50.0, delta=DELTA,
        rows=KnownRows(path.with_suffix(".key"), lambda: [b"1"]),
    )  # fmt: skip
    with pytest.raises(Refused) as caught:
        charge(other, EVENTS[0])
    assert caught.value.code == "LF4204"


def edit(path, *statements):
    """Change a ledger as somebody who removes its triggers first, and puts them back."""
    with closing(sqlite3.connect(path, isolation_level=None)) as file:
        triggers = file.execute("SELECT name, sql FROM sqlite_schema WHERE type='trigger'")
        triggers = triggers.fetchall()
        for name, _ in triggers:
            file.execute(f"DROP TRIGGER {name}")
        for statement, values in statements:
            file.execute(statement, values)
        for _, sql in triggers:
            file.execute(sql)


def rewritten(path, number, changes):
    """Return an entry with other fields and a hash that fits it."""
    with closing(sqlite3.connect(path)) as file:
        (body,) = file.execute("SELECT body FROM entries WHERE number=?", (number,)).fetchone()
    body = {**json.loads(body), **changes}
    return canonical_json(body), entry_hash(body)


@pytest.mark.parametrize(
    ("statement", "number"),
    [
        ("DELETE FROM entries WHERE number = 5", 5),
        ("DELETE FROM entries WHERE number = 1", 1),
        ("UPDATE entries SET number = 99 WHERE number = 6", 6),
        ("UPDATE entries SET body = CAST(CAST(body AS TEXT) || ' ' AS BLOB) WHERE number = 4", 4),
        ("UPDATE entries SET body = x'7b7d' WHERE number = 4", 4),
        ("UPDATE entries SET body = x'5b5d' WHERE number = 4", 4),
        ("UPDATE entries SET body = x'ff' WHERE number = 4", 4),
        ("UPDATE entries SET hash = upper(hash) WHERE number = 6", 6),
        ("INSERT INTO entries SELECT 7, body, hash FROM entries WHERE number = 6", 7),
    ],
)
def test_entries_that_are_missing_moved_doubled_or_made_up_are_found(path, statement, number):
    edit(path, (statement, ()))
    problem = refusal(path)
    assert problem.code == "LF4204"
    assert f"entry {number} " in problem.what


EVENT_NOW = {
    "adjacency": "add-or-remove-one", "noise_multiplier": 1.0, "sampler": "poisson",
    "sampling_rate": 0.05, "steps": 30,
}  # fmt: skip


@pytest.mark.parametrize(
    ("number", "changes", "found"),
    [
        (5, {"event": {**EVENT_NOW, "steps": 1}}, 6),  # its own hash fits, the next one's does not
        (6, {"event": {**EVENT_NOW, "steps": -40}}, 6),
        (6, {"event": {**EVENT_NOW, "sampling_rate": 0.0}}, 6),
        (6, {"event": {**EVENT_NOW, "noise_multiplier": "much"}}, 6),
        (6, {"event": {**EVENT_NOW, "sampler": "shuffled"}}, 6),
        (6, {"event": {**EVENT_NOW, "adjacency": "replace-one"}}, 6),
        (6, {"event": None}, 6),
        (6, {"kind": "given back"}, 6),
        (6, {"kind": "opened"}, 6),
        (6, {"round": -1}, 6),
        (6, {"round": True}, 6),
        (6, {"run": 3}, 6),
        (6, {"previous": "0" * 64}, 6),
        (6, {"number": 5}, 6),
        (3, {"rounds": 0}, 4),
    ],
)
def test_an_entry_whose_own_hash_was_made_to_fit_is_found(path, number, changes, found):
    body, digest = rewritten(path, number, changes)
    edit(path, ("UPDATE entries SET body=?, hash=? WHERE number=?", (body, digest, number)))
    problem = refusal(path)
    assert problem.code == "LF4204"
    assert f"entry {found} " in problem.what


def test_what_is_written_cannot_be_changed_by_mistake(path):
    with closing(sqlite3.connect(path)) as file:
        for statement in (
            "DELETE FROM entries",
            "DELETE FROM rows",
            "UPDATE entries SET hash = 0",
            "UPDATE rows SET digest = 0",
        ):
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                file.execute(statement)


@pytest.mark.parametrize(
    "statement",
    [
        "DROP TRIGGER no_update_of_entries",
        "CREATE TABLE more (x)",
        "CREATE VIEW shadow AS SELECT * FROM entries",
        "DROP TABLE rows",
    ],
)
def test_another_schema_is_found(path, statement):
    with closing(sqlite3.connect(path)) as file:
        file.execute(statement)
        file.commit()
    assert refusal(path).code == "LF4204"


@pytest.mark.parametrize("kept", [1, 100, 4096, 5000, -1])
def test_a_truncated_file_is_found(path, kept):
    path.write_bytes(path.read_bytes()[:kept])
    assert refusal(path).code in ("LF4204", "LF4206")


def test_something_else_in_its_place_is_found(path):
    path.write_bytes(b"not a ledger at all " * 500)
    assert refusal(path).code == "LF4204"


def test_a_charge_after_a_change_is_refused_though_the_ledger_is_open(path):
    ledger = opened(path)
    body, digest = rewritten(path, 6, {"round": 2})
    edit(path, ("UPDATE entries SET body=?, hash=? WHERE number=6", (body, digest)))
    with pytest.raises(Refused) as caught:
        charge(ledger, EVENTS[0], 4)
    assert caught.value.code == "LF4204"
    other = opened(path)  # the last entry has none after it: only a known head tells
    assert len(charges_in(path.parent)) == 3
    assert other.spent == cost(EVENTS)


def test_a_symbolic_link_is_not_followed(path, tmp_path):
    link = tmp_path / "link.sqlite"
    for target in (path, tmp_path / "nowhere"):
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        with pytest.raises(Refused) as caught:
            opened(link)
        assert caught.value.code == "LF4206"
    assert not (tmp_path / "nowhere").exists()


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "file" / "ledger.sqlite"):
        with pytest.raises(Refused) as caught:
            charge(opened(path), EVENTS[0])
        assert (caught.value.code, caught.value.problems[0].where) == ("LF4206", str(path))


def test_a_full_disk_refuses_the_charge_and_the_ledger_goes_on_afterwards(path):
    """The file may not grow, as on a full disk, and SQLite's own errors come up."""
    ledger = opened(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(Refused) as caught:
            charge(ledger, EVENTS[0], 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert caught.value.code == "LF4202"
    assert len(charges_in(path.parent)) == 3
    assert charge(ledger, EVENTS[0], 4) == cost([*EVENTS, EVENTS[0]])


def test_a_file_that_may_not_be_written_refuses_the_charge(path):
    ledger = opened(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode=EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lepton_fed.privacy.ledger.chain._PATIENCE_S", 0.01)
            with pytest.raises(Refused) as caught:
                charge(ledger, EVENTS[0], 4)
    assert caught.value.code == "LF4203"
    assert charge(ledger, EVENTS[0], 4) > 0


_STEPS = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <string.h>
#include <stdio.h>
#include <sys/types.h>
#include <unistd.h>

/* Counts the calls that change the disk, kills at one of them, and tells what was done. */
static int left = -1, torn = 0, telling = 0;
static char said[1 << 16];
void arm(int at, int half) { left = at; torn = half; telling = 1; said[0] = 0; }
const char *done(void) { telling = 0; left = -1; return said; }
static int now(const char *what, int fd) {
    if (telling && strlen(said) < sizeof(said) - 64)
        sprintf(said + strlen(said), "%s %d\n", what, fd);
    if (left < 0) return 0;
    return left-- == 0;
}
static void die(void) { kill(getpid(), SIGKILL); pause(); }
#define REAL(type, name, ...) type (*real)(__VA_ARGS__) = dlsym(RTLD_NEXT, name)
ssize_t pwrite64(int fd, const void *b, size_t n, off_t o) {
    REAL(ssize_t, "pwrite64", int, const void *, size_t, off_t);
    if (now("write", fd)) { if (torn) (void)!real(fd, b, n / 2, o); die(); }
    return real(fd, b, n, o);
}
ssize_t pwrite(int fd, const void *b, size_t n, off_t o) { return pwrite64(fd, b, n, o); }
ssize_t write(int fd, const void *b, size_t n) {
    REAL(ssize_t, "write", int, const void *, size_t);
    if (now("write", fd)) { if (torn) (void)!real(fd, b, n / 2); die(); }
    return real(fd, b, n);
}
int fsync(int fd) {
    REAL(int, "fsync", int); if (now("sync", fd)) die(); return real(fd);
}
int fdatasync(int fd) {
    REAL(int, "fdatasync", int); if (now("sync", fd)) die(); return real(fd);
}
int link(const char *p, const char *q) {
    REAL(int, "link", const char *, const char *); if (now("link", -1)) die(); return real(p, q);
}
int unlink(const char *p) {
    REAL(int, "unlink", const char *); if (now("unlink", -1)) die(); return real(p);
}
int rename(const char *p, const char *q) {
    REAL(int, "rename", const char *, const char *);
    if (now("rename", -1)) die();
    return real(p, q);
}
int ftruncate64(int fd, off_t n) {
    REAL(int, "ftruncate64", int, off_t); if (now("truncate", fd)) die(); return real(fd, n);
}
"""

_SITE = """
import ctypes, json, os, shutil, sys
from pathlib import Path
from lepton_fed.clients.own_ledger import HeadFile
from lepton_fed.privacy.dp.accounting import SampledGaussian
from lepton_fed.privacy.ledger import Ledger, book
from lepton_fed.privacy.ledger.book import RunName
from lepton_fed.privacy.ledger.rows import KnownRows

book.epsilon_of = lambda events, delta: 1.0  # within the budget, and at once
steps = ctypes.CDLL(None)
steps.done.restype = ctypes.c_char_p
base, work, fresh = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "fresh"
torn = int(sys.argv[4])
event, run = SampledGaussian(1.0, 0.05, 7), RunName("run", "a" * 64, "coordinator")
at = 0
while True:
    folder = work / str(at)
    shutil.copytree(base, folder)
    child = os.fork()
    if not child:
        steps.arm(at, torn)
        ledger = Ledger(
            folder / "ledger.sqlite", dataset="new" if fresh else "main", content="n" * 64,
            epsilon=50.0, delta=1e-5,
            rows=KnownRows(folder / "ledger.key", lambda: [b"1", b"2"]),
            keeper=HeadFile(folder / "second" / "head"),
        )
        if fresh:
            ledger.reserve(event, run, 3)
        ledger.charge(event, run, 4, "t")
        told = steps.done()
        (folder / "left").write_bytes(told)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        sys.exit(os.WEXITSTATUS(status))
    at += 1
"""


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """A library that kills its process at a given step on the disk."""
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler and Linux to kill within SQLite")
    folder = tmp_path_factory.mktemp("steps")
    (folder / "steps.c").write_text(_STEPS)
    command = [compiler, "-shared", "-fPIC", "-o", "steps.so", "steps.c", "-ldl"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder / "steps.so"


@pytest.mark.parametrize("torn", [0, 1])
@pytest.mark.parametrize("which", ["fresh", "known"])
def test_a_kill_at_any_write_or_sync_may_count_too_much_and_never_too_little(
    steps, tmp_path, which, torn
):
    base, work = tmp_path / "base", tmp_path / "work"
    (base / "second").mkdir(parents=True)
    work.mkdir()
    keeper = HeadFile(base / "second" / "head")
    if which == "known":
        path = base / "ledger.sqlite"
        rows = KnownRows(base / "ledger.key", lambda: [b"1"])
        ledger = opened(path, rows=rows, keeper=keeper)
        ledger.reserve(EVENTS[0], RUN, 5)
        charge(ledger, EVENTS[0])
    done = subprocess.run(
        [sys.executable, "-c", _SITE, base, work, which, str(torn)],
        env={**os.environ, "LD_PRELOAD": str(steps)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    runs = sorted(work.iterdir(), key=lambda folder: int(folder.name))
    before = 1 if which == "known" else 0
    counts = []
    for folder in runs:
        left = folder / "left"
        ledger = Ledger(
            folder / "ledger.sqlite", dataset="new" if which == "fresh" else "main",
            content="n" * 64, epsilon=50.0, delta=DELTA,
            rows=KnownRows(folder / "ledger.key", lambda: [b"1", b"2"]),
            keeper=HeadFile(folder / "second" / "head"),
        )  # fmt: skip
        count = len(ledger.of_run(RUN.agreement))
        assert count == before + 1 if left.exists() else count in (before, before + 1)
        counts.append(count)
        charge(ledger, EVENTS[1], 5)  # whatever happened, the site goes on
        assert len(charges_in(folder)) == count + 1
    assert len(runs) > 15
    assert counts == sorted(counts), "once it is counted, it stays so"
    assert counts[-1] == before + 1
    _everything_was_synced((runs[-1] / "left").read_text().splitlines())


def _everything_was_synced(told):
    """Assert that what was written to a file was synced before the charge returned."""
    unsynced = {}
    for line in told:
        call, file = line.split()
        if call in ("write", "truncate"):
            unsynced[file] = line
        elif call == "sync":
            unsynced.pop(file, None)
    assert any(line.startswith("sync") for line in told)
    assert told[-1].startswith("sync"), "the folder of the last file that was renamed"
    assert not unsynced, told


_CHARGING = """
import sys
from pathlib import Path
from lepton_fed.errors import BudgetExceeded
from lepton_fed.privacy.dp.accounting import SampledGaussian
from lepton_fed.privacy.ledger import Ledger, book
from lepton_fed.privacy.ledger.book import RunName

book.epsilon_of = lambda events, delta: float(sum(event.steps for event in events))
ledger = Ledger(Path(sys.argv[1]), dataset="main", content="c" * 64, epsilon=30.0, delta=1e-5)
print("ready", flush=True)
input()
run, charged = RunName(sys.argv[2], sys.argv[2] * 64, sys.argv[2]), 0
try:
    while True:
        ledger.charge(SampledGaussian(1.0, 0.5, 1), run, charged + 1, "t")
        charged += 1
except BudgetExceeded:
    print(charged)
"""


def test_processes_that_charge_at_once_spend_the_budget_together_and_no_more(tmp_path):
    path = tmp_path / "ledger.sqlite"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _CHARGING, path, name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for name in "abc"
    ]  # fmt: skip
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    counts = [int(process.communicate(timeout=120)[0]) for process in processes]
    assert sum(counts) == 30
    assert len(charges_in(tmp_path)) == 30


def test_a_second_place_that_is_full_or_broken_lets_nothing_leave(path, tmp_path, monkeypatch):
    second = tmp_path / "second"
    second.mkdir()
    keeper = HeadFile(second / "head")
    ledger = opened(path, keeper=keeper)
    charge(ledger, EVENTS[0], 4)
    with monkeypatch.context() as patch:
        patch.setattr(
            "lepton_fed.clients.own_ledger.write_atomic",
            lambda *given: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")),
        )
        with pytest.raises(LeptonError) as caught:
            charge(ledger, EVENTS[0], 5)
    assert caught.value.code == "LF5209"
    assert len(charges_in(tmp_path)) == 5, "and it is counted"
    (second / "head").write_text("{}")
    with pytest.raises(Refused) as caught:
        opened(path, keeper=keeper)
    assert caught.value.code == "LF4211"
    shutil.rmtree(second)
    with pytest.raises(Refused) as caught:
        opened(path, keeper=keeper)
    assert caught.value.code == "LF4211"


def test_a_file_that_is_no_chain_is_not_made_over(tmp_path):
    path = tmp_path / "ledger.sqlite"
    with closing(sqlite3.connect(path)) as file:
        file.execute("CREATE TABLE mine (x)")
        file.commit()
    with pytest.raises(Refused) as caught:
        charge(opened(path), EVENTS[0])
    assert caught.value.code == "LF4204"
    assert Chain(path).exists
