"""What fails at the coordinator: it says what, overwrites nothing, and goes on with its run."""

from __future__ import annotations

import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.x509.oid import NameOID

from lepton_fed.config.load import load_conf
from lepton_fed.config.schema import ServerConf
from tests.e2e.federation import free_port
from tests.faults.rows import Fault, fault
from tests.faults.running import BUSY, PHASES, RESTART_S, Mark, Running
from tests.ledger_entries import charges_in

COORDINATOR = "coordinator"
SHORT_S = 8.0
LONG_S = 150.0 * BUSY  # SQLite waits 30 s for a lock, and several who ask wait one after another
ASLEEP_S = 75.0  # the SuperLink ends a task that it has not heard of for 60 s
END_S = 90.0 * BUSY
Rows = tuple[Fault, ...]


@dataclass(frozen=True)
class Since:
    """A moment before a fault of the coordinator.

    Args:
        mark: The moment.
        charges: How many entries each site's ledger had.
    """

    mark: Mark
    charges: dict[str, int]


@pytest.fixture
def conducted(running: Running) -> Running:
    """The federation with a coordinator whose words go to a journal, as a service's do."""
    running.kill(COORDINATOR)
    start(running)
    running.whole()
    return running


@pytest.fixture
def since(conducted: Running) -> Since:
    """The moment before the fault."""
    return Since(
        conducted.mark(), {site: len(charges(conducted, site)) for site in conducted.sites}
    )


def start(running: Running, **changes: str) -> subprocess.Popen[str]:
    """Start the coordinator, with other values in its conf if need be."""
    name = "server.yaml"
    if changes:
        name = "other.yaml"
        conf = yaml.safe_load((running.root / "server.yaml").read_text())
        (running.root / name).write_text(yaml.safe_dump(conf | changes))
    command = [sys.executable, "-m", "lepton_fed", "server", "--conf", name, *running.task]
    process = subprocess.Popen(
        command, cwd=running.root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    threading.Thread(target=keep_words, args=(running, process), daemon=True).start()
    if not changes:
        running.processes[COORDINATOR] = process
    return process


def keep_words(running: Running, process: subprocess.Popen[str]) -> None:
    """Append what a coordinator says to its log."""
    assert process.stdout is not None
    with (running.root / f"{COORDINATOR}.log").open("a") as log, process.stdout:
        for line in process.stdout:
            log.write(line)
            log.flush()


def ends(process: subprocess.Popen[str], code: int, seconds: float = END_S) -> None:
    """Assert that a coordinator ends by itself."""
    assert process.wait(seconds) == code


def restart(running: Running) -> None:
    """Start it again when it has ended, as a service manager does."""
    time.sleep(RESTART_S)
    start(running)


def charges(running: Running, site: str) -> list[tuple[str, int]]:
    """Return run and round of each entry of a site's ledger."""
    found = charges_in(running.root / "state" / site)
    return [(body["run"], body["round"]) for body in found]


def nothing_lost(running: Running, since: Since) -> None:
    """Assert that all sites contributed to each round, and none was charged for one twice."""
    closed = running.since(since.mark, "round.closed")
    assert all(len(event["sites"]) == len(running.sites) for event in closed), closed
    records_hold(running, since)


def records_hold(running: Running, since: Since) -> None:
    """Assert that the run's rounds follow each other, and no site was charged for one twice."""
    run = running.since(since.mark, "round.closed")[-1]["run"]
    numbers = [
        event["round"]
        for event in running.events()
        if event["event"] == "round.closed" and event["run"] == run
    ]
    assert numbers == list(range(1, len(numbers) + 1))
    for site in running.sites:
        running.records_hold(site)
        new = charges(running, site)[since.charges[site] :]
        assert new
        assert len(new) == len(set(new)), (site, new)


def state(running: Running) -> Path:
    """Return the coordinator's state folder."""
    return running.root / "state" / COORDINATOR


@fault(
    name="the coordinator is killed in the middle of a round (`kill -9`, out of memory, power cut)",
    where="coordinator",
    sees="coordinator, after the service manager's restart: `run.resumed`; sites: "
    "`connection.failed`, later `connection.up`; receipts of the round: `sent again`, and with "
    "secure aggregation the phases that were asked for twice",
    lost="nothing: the round is done again with the updates that the sites had made for it; with "
    "secure aggregation it goes on in the phase that it was in, with the same cohort",
    normal_s=45,
    rounds=("masked", "plain"),
)
def test_a_killed_coordinator_goes_on_with_its_run(
    conducted: Running, since: Since, rows: Rows
) -> None:
    for phase in PHASES if conducted.secure else ("",):
        if phase:
            number = conducted.asked_for(phase)
        else:
            conducted.happened(since.mark, "reply.accepted")
        killed = conducted.mark()
        conducted.kill(COORDINATOR)
        restart(conducted)
        conducted.normal(*((site, rows[0]) for site in conducted.sites))
        conducted.happened(killed, "run.resumed")
        if phase:
            formed = conducted.since(since.mark, "secagg.formed", round=number)
            assert len(formed) == 1, "it went on with the cohort that was there"
    nothing_lost(conducted, since)


@fault(
    name="the coordinator is stopped and started again (`systemctl restart`, an update, a boot)",
    where="coordinator",
    sees="coordinator: `run.resumed`; sites: `connection.failed`, later `connection.up`",
    lost="nothing",
    normal_s=45,
)
def test_a_coordinator_that_is_told_to_stop_goes_on_later(
    conducted: Running, since: Since, rows: Rows
) -> None:
    conducted.happened(since.mark, "round.started")
    process = conducted.processes[COORDINATOR]
    process.send_signal(signal.SIGTERM)
    ends(process, 0)
    restart(conducted)
    conducted.normal(*((site, rows[0]) for site in conducted.sites))
    conducted.happened(since.mark, "run.resumed")
    nothing_lost(conducted, since)


@fault(
    name="the coordinator's machine sleeps for minutes (a laptop, a stopped virtual machine)",
    where="coordinator",
    sees="coordinator: LF5019, exit code 5, and `run.resumed` after the service manager's restart; "
    "sites: `connection.failed`, later `connection.up`",
    lost="at most the round in progress",
    normal_s=60,
)
def test_a_coordinator_that_slept_goes_on(conducted: Running, since: Since, rows: Rows) -> None:
    process = conducted.processes[COORDINATOR]
    process.send_signal(signal.SIGSTOP)
    time.sleep(ASLEEP_S)
    process.send_signal(signal.SIGCONT)
    ends(process, 5)
    conducted.told(since.mark, COORDINATOR, "[LF5019]")
    restart(conducted)
    conducted.normal(*((site, rows[0]) for site in conducted.sites))
    records_hold(conducted, since)


@fault(
    name="the coordinator's database is locked for seconds (a backup, a database shell)",
    where="coordinator",
    sees="nothing",
    lost="nothing: everybody waits",
    normal_s=20,
)
def test_a_lock_for_seconds_is_waited_for(conducted: Running, since: Since, rows: Rows) -> None:
    process = conducted.processes[COORDINATOR]
    with closing(sqlite3.connect(state(conducted) / "flower.sqlite", timeout=30)) as other:
        other.execute("BEGIN IMMEDIATE")
        time.sleep(SHORT_S)
    conducted.normal(*((site, rows[0]) for site in conducted.sites))
    assert process.poll() is None
    nothing_lost(conducted, since)


@fault(
    name="the coordinator's database stays locked",
    where="coordinator",
    sees="coordinator: LF5018 or LF5019 after a minute or two, exit code 5; LF5018 at each start",
    lost="nothing: the round in progress is done again",
    normal_s=60,
)
def test_a_lock_that_stays_is_named_at_the_run_and_at_the_start(
    conducted: Running, since: Since, rows: Rows
) -> None:
    with closing(sqlite3.connect(state(conducted) / "flower.sqlite", timeout=30)) as other:
        other.execute("BEGIN IMMEDIATE")
        ends(conducted.processes[COORDINATOR], 5, LONG_S)
        again = conducted.mark()
        ends(start(conducted), 5)
        conducted.told(again, COORDINATOR, "[LF5018]")
    restart(conducted)
    conducted.normal(*((site, rows[0]) for site in conducted.sites))
    nothing_lost(conducted, since)


@fault(
    name="the coordinator's database is damaged",
    where="coordinator",
    sees="coordinator: LF5017, exit code 5; sites, once the file was moved away: "
    "`connection.refused ... it was set up anew`, `connection.up`",
    lost="nothing: the file is left as it is, and no run depends on it",
    normal_s=60,
)
def test_a_damaged_database_is_named_and_the_run_goes_on_without_it(
    conducted: Running, since: Since, rows: Rows
) -> None:
    conducted.kill(COORDINATOR)
    path = state(conducted) / "flower.sqlite"
    for beside in state(conducted).glob("flower.sqlite-*"):
        beside.unlink()
    content = bytearray(path.read_bytes())
    content[4096:16384] = b"\xff" * 12288
    path.write_bytes(content)
    ends(start(conducted), 5)
    conducted.told(since.mark, COORDINATOR, "[LF5017]")
    assert path.read_bytes() == content, "nothing was overwritten"
    path.rename(path.with_name("damaged.sqlite"))
    start(conducted)
    conducted.normal(*((site, rows[0]) for site in conducted.sites))
    conducted.happened(since.mark, "run.resumed")
    nothing_lost(conducted, since)


@fault(
    name="the coordinator's disk is full",
    where="coordinator",
    sees="coordinator: LF5209 with the file, exit code 5, and again at each start",
    lost="nothing: what was written stays whole, and the round in progress is done again",
    normal_s=60,
)
def test_a_coordinator_without_room_goes_on_when_there_is_some(
    conducted: Running, since: Since, rows: Rows
) -> None:
    process = conducted.processes[COORDINATOR]
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    ends(process, 5, LONG_S)
    conducted.told(since.mark, COORDINATOR, "[LF5209]")
    restart(conducted)
    conducted.normal(*((site, rows[0]) for site in conducted.sites))
    nothing_lost(conducted, since)


@fault(
    name="a second coordinator is started on the same state folder, or on the same port",
    where="coordinator",
    sees="the second: LF4215, exit code 4, or LF5011, exit code 5; the first: nothing",
    lost="nothing",
    normal_s=20,
)
def test_a_second_coordinator_ends_and_the_first_does_not_notice(
    conducted: Running, since: Since, rows: Rows
) -> None:
    first = conducted.processes[COORDINATOR]
    ends(start(conducted, listen=f"127.0.0.1:{free_port()}"), 4)
    conducted.told(since.mark, COORDINATOR, "[LF4215]")
    ends(start(conducted, state="state/second"), 5)
    conducted.told(since.mark, COORDINATOR, "[LF5011]")
    conducted.normal(*((site, rows[0]) for site in conducted.sites))
    assert first.poll() is None
    nothing_lost(conducted, since)


@fault(
    name="the coordinator's certificate has expired when it starts",
    where="coordinator",
    sees="coordinator: LF4164 with the date, exit code 4; sites: `connection.failed`",
    lost="nothing: the run goes on when there is a new certificate",
    normal_s=45,
)
def test_an_expired_certificate_is_named_at_the_start(
    conducted: Running, since: Since, rows: Rows
) -> None:
    conducted.kill(COORDINATOR)
    conf = load_conf(conducted.root / "server.yaml", [], kind=ServerConf).conf
    certificate = conducted.root / conf.tls.certificate
    kept = certificate.read_bytes()
    certificate.write_bytes(expired())
    try:
        ends(start(conducted), 4)
    finally:
        certificate.write_bytes(kept)
    conducted.told(since.mark, COORDINATOR, "[LF4164]")
    start(conducted)
    conducted.normal(*((site, rows[0]) for site in conducted.sites))
    conducted.happened(since.mark, "run.resumed")
    nothing_lost(conducted, since)


def expired() -> bytes:
    """Return a certificate of yesterday, PEM."""
    key = generate_private_key(SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "lepton-fed coordinator")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=30))
        .not_valid_after(now - timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    return made.public_bytes(serialization.Encoding.PEM)
