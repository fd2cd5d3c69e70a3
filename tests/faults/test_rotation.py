"""Certificate and keys are replaced in the middle of a run; nobody is started again by hand."""

from __future__ import annotations

import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import yaml
from cryptography import x509

from lepton_fed.identity.certificates import make_certificates, make_next_certificate
from lepton_fed.identity.keys import generate_key, load_private_key
from lepton_fed.identity.node_key import load_node_key, node_public_line
from lepton_fed.identity.roster import Member, enrolment_file
from tests.e2e.federation import lepton
from tests.faults.rows import Fault, fault
from tests.faults.running import Running

NORTH, EAST, SOUTH = "north", "east", "south"
Rows = tuple[Fault, ...]


def shown(running: Running) -> int:
    """Return the serial number of the certificate that the coordinator shows."""
    context = ssl.create_default_context(cafile=str(running.root / "keys" / "tls" / "ca.crt"))
    with (
        socket.create_connection(("127.0.0.1", running.port), timeout=10) as line,
        context.wrap_socket(line, server_hostname="127.0.0.1") as tls,
    ):
        content = tls.getpeercert(binary_form=True)
    assert content is not None
    return x509.load_der_x509_certificate(content).serial_number


def supervisors(running: Running) -> dict[str, int]:
    return {who: process.pid for who, process in running.processes.items()}


def put(source: Path, folder: Path, *names: str) -> None:
    """Put files in place as a person does, one after another."""
    for name in names:
        shutil.move(source / name, folder / name)


def reconnect(running: Running) -> None:
    """Cut the lines of two sites and end the SuperNode of the third: all connect anew."""
    mark = running.mark()
    for line in running.lines.values():
        line.cut("refusing")
    for site in running.lines:
        running.told(mark, site, "connection.failed")
    for line in running.lines.values():
        line.heal()
    running.signal(EAST, signal.SIGTERM, "supernode")


@fault(
    name="the coordinator's TLS certificate is replaced, under the same authority",
    where="coordinator",
    sees="coordinator: `certificate.renewed`; connections that are there go on, new ones get it",
    lost="nothing",
    normal_s=40,
)
def test_a_certificate_is_renewed_and_sites_connect_with_it(running: Running, rows: Rows) -> None:
    mark, before = running.mark(), supervisors(running)
    old, tls = shown(running), running.root / "keys" / "tls"
    lepton("keys", "certificate", cwd=running.root)
    put(running.root / "keys" / "tls-next", tls, "server.crt", "server.key")
    running.told(mark, "coordinator", "certificate.renewed")
    new = shown(running)
    assert new != old
    running.normal(*((site, rows[0]) for site in running.sites))
    running.survived(mark, north=0, east=0, south=0)
    mark = running.mark()
    reconnect(running)
    running.normal(*((site, rows[0]) for site in running.sites))
    for site in running.sites:
        running.told(mark, site, "connection.up")
    assert supervisors(running) == before
    assert shown(running) == new


@fault(
    name="an expired certificate, or half of a pair, is put in place",
    where="coordinator",
    sees="coordinator: `certificate.refused` with LF4164 or LF4178, once; the one before stays",
    lost="nothing",
    normal_s=40,
)
def test_an_expired_certificate_is_told_of_and_not_used(running: Running, rows: Rows) -> None:
    tls = running.root / "keys" / "tls"
    kept = {name: (tls / name).read_bytes() for name in ("server.crt", "server.key")}
    mark, old = running.mark(), shown(running)
    aside = running.root / "ended"
    make_next_certificate(tls, aside, now=datetime.now(UTC) - timedelta(days=900))
    try:
        shutil.copy(aside / "server.crt", tls / "server.crt")
        running.told(mark, "coordinator", "LF4164")
        ended = (aside / "server.crt").read_bytes()
        assert (tls / "server.crt").read_bytes() == ended, (
            "nothing is put back, nothing overwritten"
        )
        half = running.mark()
        (tls / "server.crt").write_bytes(kept["server.crt"])
        (tls / "server.key").write_bytes((aside / "server.key").read_bytes())
        running.told(half, "coordinator", "LF4178")
        assert shown(running) == old
        reconnect(running)
        running.normal(*((site, rows[0]) for site in running.sites))
    finally:
        for name, content in kept.items():
            (tls / name).write_bytes(content)
        shutil.rmtree(aside)
    said = running.said("coordinator")[mark.said["coordinator"] :]
    assert said.count("LF4164") == 1, "told once"


@fault(
    name="the coordinator's certificate comes from another authority; sites had both in `ca`",
    where="coordinator",
    sees="sites: `keys.renewed changed=ca`, `connection.up`; coordinator: `certificate.renewed`",
    lost="at most its contribution to one round for each change of `ca`",
    normal_s=40,
)
def test_the_authority_changes_while_sites_trust_both(running: Running, rows: Rows) -> None:
    mark, before = running.mark(), supervisors(running)
    tls, other = running.root / "keys" / "tls", running.root / "keys" / "tls-other"
    make_certificates(other, [])
    both = (tls / "ca.crt").read_bytes() + (other / "ca.crt").read_bytes()
    (tls / "ca.crt").write_bytes(both)  # the file that the sites' confs name
    for site in running.sites:
        running.told(mark, site, "keys.renewed changed=ca")
    running.normal(*((site, rows[0]) for site in running.sites))
    change = running.mark()
    put(other, tls, "server.crt", "server.key", "ca.key")
    running.told(change, "coordinator", "certificate.renewed")
    reconnect(running)
    running.normal(*((site, rows[0]) for site in running.sites))
    (tls / "ca.crt").write_bytes((other / "ca.crt").read_bytes())  # the old one is trusted no more
    shutil.rmtree(other)
    for site in running.sites:
        running.told(change, site, "keys.renewed changed=ca")
    running.normal(*((site, rows[0]) for site in running.sites))
    assert supervisors(running) == before
    running.survived(mark, north=4, east=3, south=4)


@contextmanager
def thief(running: Running, keys: Path) -> Iterator[Path]:
    """Be north with keys that were taken from it; yield the log of what is said."""
    conf = yaml.safe_load((running.root / "north.yaml").read_text())
    conf |= {
        "coordinator": f"127.0.0.1:{running.port}",
        "identity_key": str(keys / "north.pem"),
        "node_key": str(keys / "north.node"),
        "state": "state/thief",
    }
    (running.root / "thief.yaml").write_text(yaml.safe_dump(conf))
    log = running.root / "thief.log"
    with log.open("w") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "lepton_fed", "client", "--conf", "thief.yaml"],
            cwd=running.root,
            stdout=said,
            stderr=said,
        )
    try:
        yield log
    finally:
        process.terminate()
        process.wait(30)


@fault(
    name="a site's two keys are replaced: enrolled at the coordinator, then put in place",
    where="site",
    sees="coordinator: `roster.changed new key`, the event `roster.changed`, later `site.agreed`; "
    "site: `connection.refused` in between, `keys.renewed`, `connection.up`",
    lost="its contribution to the rounds in between, and to one or two more",
    normal_s=40,
    rounds=("plain",),
)
@fault(
    name="somebody connects with a site's keys that were replaced",
    where="site",
    sees="whoever it is: `connection.refused`; at the coordinator nothing: it is not let in",
    lost="nothing",
    normal_s=20,
    rounds=("plain",),
)
def test_a_site_has_new_keys_and_the_old_ones_open_nothing(running: Running, rows: Rows) -> None:
    mark, before = running.mark(), supervisors(running)
    keys, stolen = running.root / "keys", running.root / "stolen"
    stolen.mkdir()
    for name in ("north.pem", "north.node"):
        shutil.copy2(keys / name, stolen)
    lepton("keys", "site", NORTH, "--out", "keys-new", cwd=running.root)
    lepton("keys", "enrol", "keys-new/north.enrol.json", cwd=running.root)
    running.told(mark, "coordinator", "roster.changed new key")
    change = running.happened(mark, "roster.changed")
    assert (change["renewed"], change["removed"], change["added"]) == ([NORTH], [], [])
    running.told(mark, NORTH, "connection.refused")  # it is out until it has the new ones too
    put(running.root / "keys-new", keys, "north.pem", "north.node")
    running.told(mark, NORTH, "keys.renewed changed=identity_key,node_key")
    placed = running.mark()
    running.normal((NORTH, rows[0]))
    running.told(mark, NORTH, "connection.up")
    running.happened(mark, "site.agreed", site=NORTH)
    assert running.asked_in_vain(placed, NORTH) <= 2
    assert supervisors(running) == before
    running.others_go_on(mark, NORTH)
    running.records_hold(NORTH)
    mark = running.mark()
    with thief(running, stolen) as log:
        running.wait_for("a refused thief", lambda: "connection.refused" in log.read_text(), 90)
        running.normal((NORTH, rows[1]))
        assert "connection.up" not in log.read_text()
    running.survived(mark, north=0)


@fault(
    name="the roster changes in a run with secure aggregation, as a site has new keys",
    where="site",
    sees="coordinator: `roster.changed new key`, `site.refused` LF4176 of each site; sites: the "
    "same, until their owner has taken the new roster (`lepton-fed keys accept`); then "
    "`site.agreed`",
    lost="the rounds until enough owners have: whose keys masks are agreed on with is each owner's "
    "to say",
    normal_s=40,
)
def test_masked_rounds_wait_for_owners_to_look_at_a_changed_roster(
    running: Running, rows: Rows
) -> None:
    mark, before = running.mark(), supervisors(running)
    lepton("keys", "site", NORTH, "--out", "keys-new", cwd=running.root)
    lepton("keys", "enrol", "keys-new/north.enrol.json", cwd=running.root)
    running.happened(mark, "roster.changed", renewed=[NORTH])
    put(running.root / "keys-new", running.root / "keys", "north.pem", "north.node")
    for site in running.sites:
        running.happened(mark, "site.refused", site=site, code="LF4176")
    waiting = running.mark()
    for agreed, site in enumerate(running.sites):
        assert agreed > 2 or not running.since(waiting, "round.closed"), "three have to agree"
        lepton("keys", "accept", "--yes", "--conf", f"{site}.yaml", cwd=running.root)
    for site in running.sites:
        running.happened(waiting, "site.agreed", site=site)
    running.normal(*((site, rows[0]) for site in running.sites))
    assert supervisors(running) == before
    for site in running.sites:
        running.records_hold(site)


@fault(
    name="a site has a new identity on the roster, and still signs with the old one",
    where="site",
    sees="coordinator: `reply.refused` or `site.refused` LF4414, until the site has the new key: "
    "`site.agreed`",
    lost="its contribution to the rounds in between, and to one or two more",
    normal_s=40,
    rounds=("plain",),
)
def test_what_is_sealed_with_the_old_identity_is_refused(running: Running, rows: Rows) -> None:
    mark, before = running.mark(), supervisors(running)
    keys, fresh = running.root / "keys", running.root / "south-new"
    generate_key(fresh / "south.pem")
    identity = load_private_key(fresh / "south.pem")
    node = node_public_line(load_node_key(keys / "south.node"))  # its line stays as it is
    member = Member(SOUTH, identity.public_key().public_bytes_raw().hex(), node)
    (fresh / "south.enrol.json").write_bytes(enrolment_file(member, identity))
    lepton("keys", "enrol", "south-new/south.enrol.json", cwd=running.root)
    running.happened(mark, "roster.changed", renewed=[SOUTH])
    running.happened(mark, "site.refused", site=SOUTH, code="LF4414")
    between = running.mark()
    running.wait_for("two rounds", lambda: len(running.since(between, "round.closed")) >= 2)
    assert not running.since(between, "reply.accepted", site=SOUTH)
    put(fresh, keys, "south.pem")
    running.told(mark, SOUTH, "keys.renewed changed=identity_key ")
    running.normal((SOUTH, rows[0]))
    assert supervisors(running) == before
    running.others_go_on(mark, SOUTH)
    running.records_hold(SOUTH)


@fault(
    name="a site is taken off the roster in the middle of a run, and enrolled with new keys later",
    where="site",
    sees="coordinator: `roster.changed removed`, later `roster.changed added`; site: "
    "`connection.refused`, later `keys.renewed`, `connection.up`",
    lost="its contribution to the rounds in between, and to one or two more",
    normal_s=40,
    rounds=("plain",),
)
def test_a_site_that_is_withdrawn_is_out_at_once_and_back_with_new_keys(
    running: Running, rows: Rows
) -> None:
    mark, before = running.mark(), supervisors(running)
    lepton("keys", "remove", EAST, cwd=running.root)
    running.happened(mark, "roster.changed", removed=[EAST])
    out = running.mark()
    running.wait_for("three rounds", lambda: len(running.since(out, "round.closed")) >= 3)
    assert not running.since(out, "reply.accepted", site=EAST)
    assert all(EAST not in event["cohort"] for event in running.since(out, "round.started"))
    running.told(mark, EAST, "connection.refused")
    lepton("keys", "site", EAST, "--out", "keys-east", cwd=running.root)
    lepton("keys", "enrol", "keys-east/east.enrol.json", cwd=running.root)
    running.happened(out, "roster.changed", added=[EAST])
    put(running.root / "keys-east", running.root / "keys", "east.pem", "east.node")
    running.told(mark, EAST, "keys.renewed changed=identity_key,node_key")
    running.normal((EAST, rows[0]))
    running.told(mark, EAST, "connection.up")
    assert supervisors(running) == before
    running.others_go_on(mark, EAST)
    running.records_hold(EAST)
