"""A site as a service: kept up, ended cleanly, one at a time, and plain about its connection."""

from __future__ import annotations

import itertools
import logging
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from lepton_fed.clients import connection, supervisor
from lepton_fed.clients.connection import ConnectionNews, why_refused, why_unreachable
from lepton_fed.clients.first_contact import Contact
from lepton_fed.clients.supervisor import Keeper, _put_aside_when_large, run_site
from lepton_fed.errors import Refused
from lepton_fed.flower.supernode import REFUSED_SIGNATURE
from lepton_fed.identity.certificates import make_certificates

SLEEPER = [
    sys.executable,
    "-c",
    "import time; print('SuperNode ID: 1', flush=True); time.sleep(600)",
]
DEAF = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); "
    "time.sleep(600)",
]


class StandIn:
    """A process that lives for so many seconds of a clock."""

    pid = 1

    def __init__(self, clock, life_s):
        self.clock, self.end = clock, clock.now + life_s
        self.ended = self.killed = False

    def poll(self):
        return 0 if self.clock.now >= self.end else None

    def terminate(self):
        self.ended = True

    def kill(self):
        self.killed = True
        self.end = self.clock.now

    def wait(self, timeout=None):
        return 0


class Clock:
    """A clock that goes on only when somebody waits."""

    def __init__(self, stop_at):
        self.now, self.stop_at, self.stop = 0.0, stop_at, threading.Event()
        self.pauses = []

    def wait(self, seconds):
        self.pauses.append(seconds)
        self.now += seconds
        if self.now >= self.stop_at:
            self.stop.set()
        return self.stop.is_set()


class Looks:
    """Takes a process for hung after so many looks; never with None."""

    def __init__(self, looks):
        self.left = looks

    def hung(self):
        if self.left is not None:
            self.left -= 1
        return self.left == 0


def starts(lives, stop_at, hung_after=None):
    """Return when processes with these lives are started, and the clock."""
    clock = Clock(stop_at)
    started = []

    def start():
        started.append(clock.now)
        life = lives[min(len(started), len(lives)) - 1]
        if isinstance(life, Exception):
            raise life
        return StandIn(clock, life)

    Keeper(
        start,
        clock.stop,
        clock=lambda: clock.now,
        wait=clock.wait,
        watch=lambda group, looks: Looks(hung_after),
    ).run()
    return started, clock


def test_a_connection_that_ends_at_once_is_tried_again_after_longer_and_longer_waits():
    started, _ = starts([0], 300)
    waits = [later - earlier for earlier, later in itertools.pairwise(started)]
    assert waits == [1, *[2] * 8, *[5] * 4, 10, *[30] * 8]
    soon = [when for when in started if when <= 40]
    gaps = [later - earlier for earlier, later in itertools.pairwise(soon)]
    assert max(gaps) <= 5, "a killed one is let in again within half a minute"


def test_one_that_lived_well_is_tried_again_at_once():
    started, _ = starts([0, 0, 0, 200, 0], 260)
    assert started[:5] == [0, 1, 3, 5, 206]
    assert started[5] == 207, "the waits begin anew"


def test_a_connection_that_cannot_be_started_is_tried_again(caplog):
    started, _ = starts([OSError(12, "Cannot allocate memory"), 0], 6)
    assert started == [0, 1, 3, 5]
    assert "Cannot allocate memory" in caplog.text


def test_one_that_hangs_is_killed_and_started_again(caplog):
    started, _ = starts([1e9], 61, hung_after=30)
    assert started == [0, 31]
    assert "connection.hung" in caplog.text


def test_what_it_ended_of_is_said(caplog):
    clock = Clock(3)
    errors = iter(["ModuleNotFoundError: No module named 'flwr'", ""])
    Keeper(
        lambda: StandIn(clock, 0),
        clock.stop,
        ended=lambda: next(errors, ""),
        clock=lambda: clock.now,
        wait=clock.wait,
    ).run()
    assert "status=0: ModuleNotFoundError: No module named 'flwr'; started again" in caplog.text
    assert "status=0; started again in 2 s" in caplog.text


def test_one_that_is_told_to_stop_ends_its_process():
    clock = Clock(5)
    child = StandIn(clock, 1e9)
    Keeper(
        lambda: child,
        clock.stop,
        clock=lambda: clock.now,
        wait=clock.wait,
        watch=lambda group, looks: Looks(None),
    ).run()
    assert child.ended


@pytest.fixture
def service(conf, parties, monkeypatch):
    """Run sites with stand-ins for SuperNode and worker."""
    seen = {"serving": threading.Event(), "agents": [], "given": {}}
    ended = []

    def serve(agent, **given):
        seen["agents"].append(agent)
        seen["given"] = given
        seen["serving"].set()
        given["stop"].wait()

    def command(**given):
        seen["command"] = given
        return SLEEPER

    monkeypatch.setattr(supervisor, "serve", serve)
    monkeypatch.setattr(supervisor, "supernode_command", command)

    class Running:
        def __init__(self, of=conf):
            self.stop, self.error = threading.Event(), None
            self.thread = threading.Thread(target=self._run, args=(of,))
            self.thread.start()
            ended.append(self)

        def _run(self, of):
            try:
                run_site(of, self.stop)
            except Exception as error:  # noqa: BLE001 - the test looks at it
                self.error = error

        def end(self):
            self.stop.set()
            self.thread.join(15)
            assert not self.thread.is_alive()

    Running.seen = seen
    yield Running
    for each in ended:
        each.end()


def until(found, seconds=20):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found():
            return
        time.sleep(0.02)
    raise AssertionError("it did not come to that")


def log_of(conf):
    path = Path(conf.state) / "supernode.log"
    return path.read_text() if path.exists() else ""


def test_a_site_starts_both_halves_with_a_secret_that_nobody_else_reads(service, conf, parties):
    running = service()
    assert service.seen["serving"].wait(20)
    given, command = service.seen["given"], service.seen["command"]
    assert given["name"] == "north"
    assert given["port"] == command["port"]
    assert given["coordinator"].public_bytes_raw() == (
        parties.coordinator.public_key().public_bytes_raw()
    )
    secret = command["secret"]
    assert secret.read_bytes() == given["secret"]
    assert len(given["secret"]) == 32
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert stat.S_IMODE(Path(conf.state).stat().st_mode) == 0o700
    running.end()
    assert running.error is None


def test_a_second_site_on_one_state_folder_is_refused_and_the_first_goes_on(service, conf):
    first = service()
    assert service.seen["serving"].wait(20)
    with pytest.raises(Refused) as caught:
        run_site(conf, threading.Event())
    assert caught.value.code == "LF4513"
    assert first.thread.is_alive()
    first.end()
    again = service()
    until(lambda: len(service.seen["agents"]) == 2)
    again.end()
    assert again.error is None


def test_what_a_kill_left_half_written_goes_with_the_next_start_and_nothing_else(service, conf):
    state = Path(conf.state)
    places = ("", "receipts", "agreements", "bundles", "bundles/incoming/" + "d" * 64)
    left, kept = [], []
    for place in places:
        (state / place).mkdir(parents=True, exist_ok=True)
        left.append(state / place / ".0123456789abcdef.partial")
        kept += [state / place / ".hidden", state / place / "whole.partial"]
    for path in (*left, *kept):
        path.write_text("a key, perhaps")
    running = service()
    assert service.seen["serving"].wait(20)
    assert not [path for path in left if path.exists()]
    assert all(path.exists() for path in kept)
    running.end()
    assert running.error is None


def test_a_site_that_is_refused_sweeps_nothing_of_the_one_that_works_there(service, conf):
    running = service()
    assert service.seen["serving"].wait(20)
    half = Path(conf.state) / ".0123456789abcdef.partial"
    half.write_text("being written")
    with pytest.raises(Refused):
        run_site(conf, threading.Event())
    assert half.exists()
    running.end()


@pytest.mark.parametrize("command", [SLEEPER, DEAF])
def test_stopping_ends_everything_within_ten_seconds_also_in_the_middle_of_a_round(
    service, conf, monkeypatch, command
):
    pids, hanging = [], threading.Event()
    start = subprocess.Popen

    def remembered(*given, **named):
        pids.append(start(*given, **named))
        return pids[-1]

    def hang(agent, **given):
        close = agent.close
        agent.close = lambda: closed.append(close())
        hanging.set()
        time.sleep(30)  # a round, and nobody can be told

    closed = []
    monkeypatch.setattr(supervisor.subprocess, "Popen", remembered)
    monkeypatch.setattr(supervisor, "serve", hang)
    monkeypatch.setattr(supervisor, "supernode_command", lambda **given: command)
    running = service()
    assert hanging.wait(20)
    until(lambda: log_of(conf).strip())
    began = time.monotonic()
    running.end()
    assert time.monotonic() - began < 10
    assert closed, "what trains was ended"
    assert [process.poll() is not None for process in pids] == [True, True], "training child too"


def test_a_connection_that_ends_comes_back_whatever_its_exit_code(service, conf, monkeypatch):
    quick = [sys.executable, "-c", "print('once', flush=True)"]
    monkeypatch.setattr(supervisor, "supernode_command", lambda **given: quick)
    running = service()
    until(lambda: log_of(conf).count("once") >= 2)
    assert running.thread.is_alive()


def test_what_the_worker_cannot_go_on_from_ends_the_site_with_its_error(service, monkeypatch):
    def broken(agent, **given):
        raise RuntimeError("no such thing")

    monkeypatch.setattr(supervisor, "serve", broken)
    running = service()
    running.thread.join(20)
    assert isinstance(running.error, RuntimeError)


@pytest.mark.parametrize("missing", ["identity_key", "node_key", "coordinator_key", "ca", "roster"])
def test_a_missing_key_is_found_before_anything_is_started(service, conf, missing):
    with pytest.raises(Refused) as caught:
        run_site(replace(conf, **{missing: conf.state + "-nowhere"}), threading.Event())
    assert caught.value.code == "LF4151"
    assert not service.seen["agents"]
    assert "command" not in service.seen


def test_a_key_that_others_may_read_is_refused(service, conf):
    os.chmod(conf.node_key, 0o644)
    with pytest.raises(Refused) as caught:
        run_site(conf, threading.Event())
    assert caught.value.code == "LF4152"


def test_the_log_of_the_last_life_is_kept_beside_the_new_one(service, conf):
    state = Path(conf.state)
    state.mkdir(mode=0o700)
    (state / "supernode.log").write_text("an earlier life\n")
    service()
    until(lambda: "SuperNode ID" in log_of(conf))
    assert (state / "supernode.log.1").read_text() == "an earlier life\n"
    assert "earlier" not in log_of(conf)


def test_a_log_that_grew_large_is_put_aside_while_it_is_written_to(tmp_path):
    log = tmp_path / "supernode.log"
    with log.open("ab", buffering=0) as written:
        written.write(b"early lines\n")
        _put_aside_when_large(log, 100)
        assert not (tmp_path / "supernode.log.1").exists()
        _put_aside_when_large(log, 10)
        written.write(b"late\n")
    assert log.read_text() == "late\n"
    assert (tmp_path / "supernode.log.1").read_text() == "early lines\n"
    _put_aside_when_large(tmp_path / "none.log", 10)


def test_a_large_log_is_emptied_where_there_is_no_room_to_keep_it(tmp_path):
    (tmp_path / "supernode.log.1").mkdir()
    log = tmp_path / "supernode.log"
    log.write_text("early lines\n")
    _put_aside_when_large(log, 10)
    assert log.read_text() == ""


FAILED = "WARNING : Connection attempt failed, retrying in 1.21 seconds\n"
REFUSED = f"ERROR : {REFUSED_SIGNATURE}\n"


class News:
    """The news of a connection, with a log that a test writes."""

    def __init__(self, folder, caplog):
        self.log = folder / "supernode.log"
        self.reason, self.clocks, self.caplog = (
            "Connection refused",
            "the clock is 600 s ahead",
            caplog,
        )
        caplog.set_level(logging.INFO, "lepton_fed.site")
        self.news = ConnectionNews(
            self.log, "fed.example.org:9092", lambda: self.reason, lambda: self.clocks
        )

    def after(self, content):
        """Write to the log and return what is said then."""
        self.caplog.clear()
        with self.log.open("a") as file:
            file.write(content)
        self.news.look()
        return self.caplog.messages


@pytest.fixture
def news(tmp_path, caplog):
    return News(tmp_path, caplog)


def test_news_of_the_connection_are_told_once_and_in_plain_words(news):
    news.news.look()  # there is no log yet
    (said,) = news.after(FAILED * 3 + "INFO : Connection succ")
    assert said == "connection.failed Connection refused (fed.example.org:9092); trying on"
    (said,) = news.after("essful after 3.00 seconds and 3 tries.\nINFO : SuperNode ID: 5\n")
    assert "connected to the coordinator at fed.example.org:9092" in said
    assert news.after("") == []
    (said,) = news.after("ERROR : SSL/TLS handshake error detected.\n" + FAILED)
    assert "connection.failed Connection refused" in said
    news.log.write_text("")
    (said,) = news.after("ERROR: Failed to activate SuperNode.\n")  # a new log
    assert "roster" in said


def test_a_site_that_was_there_before_its_coordinator_says_nothing_that_is_not_so(news):
    news.reason = ""  # when we look, it is there
    assert news.after(FAILED) == []
    (said,) = news.after("INFO : SuperNode ID: 5\n")
    assert "connection.up" in said


def test_coming_back_is_news_after_an_end(news):
    up = "INFO : SuperNode ID: 5\n"
    assert len(news.after(up)) == 1
    assert news.after(up) == []
    news.news.ended()
    assert len(news.after(up)) == 1


def test_what_is_received_and_sent_says_that_the_connection_is_up(news):
    assert "connection.failed" in news.after(FAILED)[0]
    (said,) = news.after("INFO : Received successfully\nINFO : Sent successfully\n")
    assert "connection.up" in said


def test_calls_that_failed_once_in_a_while_are_no_news(news):
    news.after("INFO : SuperNode ID: 5\n")
    news.reason = ""
    for _ in range(5):
        assert news.after(FAILED + "INFO : Received successfully\n") == []


def test_a_coordinator_that_answers_us_and_never_the_supernode_is_told_of(news):
    news.reason = ""
    assert news.after(FAILED * 2) == []
    (said,) = news.after(FAILED)
    assert "supernode.log" in said


def test_a_refused_signature_is_told_of_with_the_clocks(news):
    (said,) = news.after(REFUSED * 3)
    assert said == (
        "connection.refused the coordinator at fed.example.org:9092 does not accept this site's "
        "signature: the clock is 600 s ahead; trying on"
    )


def test_the_exception_that_a_supernode_ended_of_is_told_once(news):
    news.after("Traceback\nModuleNotFoundError: No module named 'flwr'\nINFO : bye\n")
    assert news.news.ended() == "ModuleNotFoundError: No module named 'flwr'"
    assert news.news.ended() == ""


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    make_certificates(folder, [])
    return folder / "ca.crt"


def test_why_a_coordinator_cannot_be_reached_is_said(authority):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for why in (why_unreachable, why_refused):
            assert "Connection refused" in why(address, authority)
    assert why_unreachable("no-such-host.invalid:1", authority)


@pytest.mark.parametrize(
    ("contact", "said"), [(Contact(600.0), "600 s ahead of"), (Contact(2.0), "the clocks agree")]
)
def test_a_refused_site_is_told_how_far_its_clock_is_off(authority, monkeypatch, contact, said):
    monkeypatch.setattr(connection, "reach", lambda *given, **named: contact)
    assert said in why_refused("fed.example.org:9092", authority)
    assert why_unreachable("fed.example.org:9092", authority) == ""
