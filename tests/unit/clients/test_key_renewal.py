"""A site whose keys or CA are replaced while it runs takes them in by itself, or says why not."""

from __future__ import annotations

import logging
import os
import shutil
import stat
import sys
import threading
import time
from pathlib import Path

import pytest

from lepton_fed.clients import supervisor
from lepton_fed.clients.site_keys import SuperNodeFiles, load_site_keys
from lepton_fed.clients.supervisor import run_site
from lepton_fed.clients.training_child import TrainingChild
from lepton_fed.errors import Problem, RunError
from lepton_fed.identity.certificates import make_certificates
from lepton_fed.identity.keys import generate_key, load_private_key
from lepton_fed.identity.node_key import generate_node_key
from lepton_fed.identity.roster import write_roster
from lepton_fed.runs.files import write_atomic
from tests.unit.clients.conftest import agreement_for

SLEEPER = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]


class Site:
    """A site that runs in a thread, with stand-ins for SuperNode and worker."""

    def __init__(self, conf):
        self.conf = conf
        self.folder = Path(conf.identity_key).parent
        self.serving, self.busy = [], threading.Event()
        self.commands = []
        self.interrupted = []
        self.stop, self.error = threading.Event(), None
        self.thread = threading.Thread(target=self._run)

    def serve(self, agent, **given):
        interrupt = agent.interrupt

        def noted():
            self.interrupted.append(agent)
            self.busy.clear()
            interrupt()

        agent.interrupt = noted
        self.serving.append((agent, given))
        given["stop"].wait()
        while self.busy.is_set():
            time.sleep(0.01)

    def command(self, **given):
        self.commands.append((given["node_key"].read_bytes(), given["ca"].read_bytes()))
        return SLEEPER

    def _run(self):
        try:
            run_site(self.conf, self.stop)
        except Exception as error:  # noqa: BLE001 - the test looks at it
            self.error = error

    def put(self, conf_name, content):
        """Replace one of its files, as a whole."""
        path = Path(getattr(self.conf, conf_name))
        aside = path.with_name("aside")
        aside.touch(mode=stat.S_IMODE(path.stat().st_mode))
        aside.write_bytes(content)
        os.replace(aside, path)

    def new_keys(self):
        """Make a new pair of keys and put both in place."""
        generate_key(self.folder / "new.pem")
        generate_node_key(self.folder / "new.node")
        self.put("identity_key", (self.folder / "new.pem").read_bytes())
        self.put("node_key", (self.folder / "new.node").read_bytes())
        return load_private_key(self.folder / "new.pem")

    def other_authority(self):
        make_certificates(self.folder / "other", [])
        return (self.folder / "other" / "ca.crt").read_bytes()


@pytest.fixture
def site(conf, parties, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "lepton_fed.site")
    made = Site(conf)
    monkeypatch.setattr(supervisor, "serve", made.serve)
    monkeypatch.setattr(supervisor, "supernode_command", made.command)
    monkeypatch.setattr(supervisor, "_LOOK_S", 0.02)
    monkeypatch.setattr(supervisor, "_HAND_ON_S", 0.0)
    made.thread.start()
    until(lambda: made.serving and made.commands)
    yield made
    made.busy.clear()
    made.stop.set()
    made.thread.join(15)
    assert not made.thread.is_alive()
    assert made.error is None
    assert not (Path(conf.state) / "supernode.key").exists(), "no copy is left"


def until(found, seconds=20):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to that")


def said(caplog, word):
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith(word)]


def test_new_keys_are_taken_in_by_both_halves_and_what_trains_stays(site, caplog):
    old_agent, old = site.serving[0]
    new = site.new_keys()
    until(lambda: len(site.serving) == 2 and len(site.commands) == 2)
    agent, given = site.serving[1]
    assert given["identity"].private_bytes_raw() == new.private_bytes_raw()
    assert agent._identity == new.public_key().public_bytes_raw().hex()
    assert agent._child is old_agent._child, "it holds the ledger"
    assert (given["secret"], given["port"]) == (old["secret"], old["port"])
    assert site.commands[1][0] == (site.folder / "new.node").read_bytes() != site.commands[0][0]
    (line,) = said(caplog, "keys.")
    assert line.startswith("keys.renewed changed=identity_key,node_key identity: ")
    assert said(caplog, "connection.ended") == []


def test_the_supernode_reads_copies_that_only_the_owner_reads(site, conf):
    copy = Path(conf.state) / "supernode.key"
    assert copy.read_bytes() == Path(conf.node_key).read_bytes()
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600


@pytest.mark.parametrize("name", ["identity_key", "node_key", "coordinator_key", "ca"])
def test_a_half_written_file_is_told_once_and_the_keys_in_use_stay(site, caplog, name):
    path = Path(getattr(site.conf, name))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    until(lambda: said(caplog, "keys.refused"))
    looked = threading.Event()
    looked.wait(0.3)  # some fifteen looks
    (line,) = said(caplog, "keys.refused")
    assert str(path) in line
    assert "those in use stay in use" in line
    path.write_bytes(whole)
    looked.wait(0.3)
    assert len(said(caplog, "keys.")) == 1
    assert (len(site.serving), len(site.commands)) == (1, 1)


def test_what_was_bad_and_is_good_then_is_taken(site, caplog):
    site.put("identity_key", b"none")
    until(lambda: said(caplog, "keys.refused"))
    generate_key(site.folder / "new.pem")
    site.put("identity_key", (site.folder / "new.pem").read_bytes())
    until(lambda: said(caplog, "keys.renewed changed=identity_key "))


def test_keys_that_came_while_the_disk_was_full_are_taken_afterwards(site, caplog, monkeypatch):
    full = threading.Event()
    full.set()
    tries = []
    write = SuperNodeFiles.write

    def written(files, keys):
        tries.append(keys)
        if full.is_set():
            raise RunError(Problem("LF5209", "no space left", where="supernode.key"))
        write(files, keys)

    monkeypatch.setattr(SuperNodeFiles, "write", written)
    new = site.new_keys()
    until(lambda: len(tries) > 3)
    (line,) = said(caplog, "keys.refused")
    assert "LF5209" in line
    assert len(site.serving) == 1
    full.clear()
    until(lambda: len(site.serving) == 2)
    assert site.serving[1][1]["identity"].private_bytes_raw() == new.private_bytes_raw()
    assert len(said(caplog, "keys.refused")) == 1


def test_a_pinned_key_that_the_roster_does_not_fit_changes_nothing_until_it_does(
    site, caplog, parties
):
    public = generate_key(site.folder / "stranger.pem")
    site.put("coordinator_key", (site.folder / "stranger.pub").read_bytes())
    until(lambda: said(caplog, "keys.refused"))
    assert "LF4167" in said(caplog, "keys.refused")[0]
    assert len(site.serving) == 1
    roster = parties.roster.__class__(1, public.public_bytes_raw().hex(), [], "")
    write_roster(Path(site.conf.roster), roster, load_private_key(site.folder / "stranger.pem"))
    until(lambda: len(site.serving) == 2)
    assert site.serving[1][1]["coordinator"].public_bytes_raw() == public.public_bytes_raw()


def test_the_same_keys_again_are_no_news(site, caplog):
    for name in ("identity_key", "node_key", "ca"):
        site.put(name, Path(getattr(site.conf, name)).read_bytes())
    threading.Event().wait(0.3)
    assert not said(caplog, "keys.")
    assert len(site.serving) == 1


def test_an_answer_in_progress_leaves_before_another_ca_is_used(site, caplog):
    site.busy.set()
    both = Path(site.conf.ca).read_bytes() + site.other_authority()
    site.put("ca", both)
    until(lambda: site.serving[0][1]["stop"].is_set())
    threading.Event().wait(0.2)
    assert len(site.commands) == 1, "the line is left as it is"
    site.busy.clear()
    until(lambda: len(site.serving) == 2 and len(site.commands) == 2)
    assert site.commands[1][1] == both
    assert not site.interrupted
    until(lambda: said(caplog, "keys.renewed changed=ca "))


def test_new_keys_do_not_wait_for_a_long_answer(site, monkeypatch):
    monkeypatch.setattr(supervisor, "_FINISH_S", 0.05)
    site.busy.set()
    site.new_keys()
    until(lambda: len(site.serving) == 2)
    assert site.interrupted == [site.serving[0][0]]


def test_stopping_in_the_middle_of_a_renewal_ends_everything(site):
    site.busy.set()
    site.put("ca", Path(site.conf.ca).read_bytes() + site.other_authority())
    until(lambda: site.serving[0][1]["stop"].is_set())
    site.stop.set()
    site.busy.clear()
    site.thread.join(15)
    assert not site.thread.is_alive()
    assert len(site.serving) == 1


def test_what_differs_is_named_by_the_conf_s_keys(conf, parties, tmp_path):
    old = load_site_keys(conf)
    assert load_site_keys(conf).changed(old) == []
    assert "PRIVATE" not in repr(old)
    make_certificates(tmp_path / "other", [])
    shutil.copy(tmp_path / "other" / "ca.crt", conf.ca)
    assert load_site_keys(conf).changed(old) == ["ca"]


def test_an_interrupted_child_is_replaced_when_it_is_asked_next(
    conf, parties, plugins_installed, monkeypatch
):
    child = TrainingChild(conf)
    try:
        child.interrupt()  # nothing is in progress
        first = agreement_for("run-1")
        child.begin(first)
        failed = []

        def ask():
            try:
                child._ask({"do": "sleep"}, {}, 60.0, 60)
            except RunError as error:
                failed.append(error.code)

        monkeypatch.setattr("lepton_fed.clients.training_child.write_frame", lambda *given: None)
        asking = threading.Thread(target=ask)
        asking.start()
        until(lambda: child._busy)
        child.interrupt()
        asking.join(20)
        assert failed == ["LF5311"]
        monkeypatch.undo()
        child.begin(first)
    finally:
        child.close()


def test_a_file_is_private_from_its_first_byte(tmp_path):
    before = os.umask(0)
    try:
        write_atomic(tmp_path / "key", b"secret", 0o600)
        write_atomic(tmp_path / "open", b"")
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("key", "open")]
    assert modes == [0o600, 0o666]
