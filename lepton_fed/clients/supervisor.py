"""A site as a service: one outgoing connection, kept up; a worker; a child that trains.

The SuperNode is a process of its own and is started again whenever it ends, whatever its exit code:
it ends with 0 when the coordinator was restarted without its memory, and after a kill it is let in
again only once the coordinator no longer takes it for alive, some 20 s later. One that hangs is
ended. When the site's keys or the CA are replaced, SuperNode and worker begin anew with them; the
training child, which holds ledger and rows, stays.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from lepton_fed.clients.agent import Agent
from lepton_fed.clients.connection import ConnectionNews, why_refused, why_unreachable
from lepton_fed.clients.site_keys import SiteKeys, SuperNodeFiles, key_files, load_site_keys
from lepton_fed.clients.stall import StallWatch
from lepton_fed.clients.training_child import TrainingChild
from lepton_fed.clients.vault import prune
from lepton_fed.config.schema import ClientConf
from lepton_fed.core.exchange import legible
from lepton_fed.core.retry import Retry
from lepton_fed.errors import LeptonError, Problem, Refused
from lepton_fed.flower.supernode import supernode_command, supernode_environment
from lepton_fed.flower.worker import serve
from lepton_fed.identity.watch import FileWatch
from lepton_fed.identity.words import key_words
from lepton_fed.runs.files import sweep, writing

__all__ = ["Keeper", "run_site"]

# Short for the first minute: a killed SuperNode is refused for some 20 s and then let in at once.
_BACK_OFF_S = (1.0, *[2.0] * 8, *[5.0] * 4, 10.0, 30.0)
_WELL_S = 120.0
_STOP_S = 4.0
_LOOK_S = 0.5
_LOOKS_A_SECOND = 2
_HUNG_LOOKS = 60
_STILL_LOOKS = 4
_FINISH_S = 60.0
_HAND_ON_S = 2.0
_WATCH_S = 0.1
_LARGEST_LOG = 16 * 1024 * 1024
_SECRET_BYTES = 32

_log = logging.getLogger("lepton_fed.site")


class Child(Protocol):
    """A process that was started, at the head of a process group."""

    @property
    def pid(self) -> int:
        """Return its number."""

    def poll(self) -> int | None:
        """Return its exit code; None while it runs."""

    def terminate(self) -> None:
        """Ask it to end."""

    def kill(self) -> None:
        """End it."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it ended and return its exit code."""


class Keeper(threading.Thread):
    """Starts a process, and starts it again whenever it ends, waiting longer each time.

    Args:
        start: Starts it.
        stop: Set to end it and this thread.
        look: Called again and again while it runs, and once when it has ended.
        ended: Called when it ended; tells of which exception, for the log.
        clock: Tells seconds that never go back.
        wait: Waits so many seconds, or until stop is set.
        watch: From its process group and a number of looks to what tells that it hangs.
    """

    def __init__(
        self,
        start: Callable[[], Child],
        stop: threading.Event,
        look: Callable[[], None] = lambda: None,
        ended: Callable[[], str] = lambda: "",
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], bool] | None = None,
        watch: Callable[[int, int], StallWatch] = StallWatch,
    ) -> None:
        super().__init__(daemon=True)
        self._start_child = start
        self._stopping = stop
        self._look = look
        self._ended = ended
        self._watch = watch
        self._clock = clock
        self._pause = wait or stop.wait

    def run(self) -> None:
        """Keep it up."""
        failures = 0
        while not self._stopping.is_set():
            started = self._clock()
            try:
                child: Child | None = self._start_child()
            except (OSError, LeptonError) as error:  # no memory, no disk: it may be better later
                _log.error("connection.failed it cannot be started: %s", error)
                child = None
            if child:
                self._follow(child)
            self._look()
            if self._stopping.is_set():
                if child:
                    _end(child)
                return
            failures = 0 if self._clock() - started >= _WELL_S else failures + 1
            delay = _BACK_OFF_S[min(failures, len(_BACK_OFF_S)) - 1] if failures else 1.0
            status = child.poll() if child else None
            why = legible(self._ended(), 200)
            _log.warning(
                "connection.ended status=%s%s; started again in %g s",
                status,
                f": {why}" if why else "",
                delay,
            )
            self._pause(delay)

    def _follow(self, child: Child) -> None:
        """Look after it until it has ended or is to end; end one that hangs."""
        watch = self._watch(child.pid, _HUNG_LOOKS)
        looks = 0
        while child.poll() is None and not self._stopping.is_set():
            self._pause(_LOOK_S)
            self._look()
            looks += 1
            if looks % _LOOKS_A_SECOND == 0 and watch.hung():
                _log.error("connection.hung it used no CPU time for a minute, and is ended")
                child.kill()
                child.wait()


def _end(child: Child) -> None:
    child.terminate()
    try:
        child.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def run_site(conf: ClientConf, stop: threading.Event) -> None:
    """Take part until told to stop.

    Args:
        conf: The site's conf.
        stop: Set to end.

    Raises:
        LeptonError: A key, the roster or the state folder is wrong; nothing was started.
    """
    watch = FileWatch(*key_files(conf), still=_STILL_LOOKS)
    keys = load_site_keys(conf)
    with _owned(Path(conf.state)):
        _sweep(Path(conf.state))
        site = _Site(conf, keys, stop)
        site.start()
        _log.info("site.started name=%s coordinator=%s", conf.name, conf.coordinator)
        try:
            while not stop.wait(_LOOK_S):
                if site.retry.due(watch.look()):
                    site.renew()
        finally:
            stop.set()
            site.close()
            _log.info("site.stopped name=%s", conf.name)
        if site.failures:
            raise site.failures[0]


class _Site:
    """SuperNode and worker, with the keys that are in use.

    Args:
        conf: The site's conf.
        keys: Its keys.
        stop: Set to end; set when the worker cannot go on.
    """

    def __init__(self, conf: ClientConf, keys: SiteKeys, stop: threading.Event) -> None:
        self._conf = conf
        self._stopping = stop
        self._keys = keys
        self._child = TrainingChild(conf)
        self._agent = self._agent_with(keys)
        self._state = Path(conf.state)
        self._files = SuperNodeFiles(self._state)
        self._files.write(keys)
        self._secret = _new_secret(self._state / "supernode.secret")
        _keep_one_older(self._state / "supernode.log", 0)
        self._port = _free_port()
        ca = self._files.ca
        self._news = ConnectionNews(
            self._state / "supernode.log",
            conf.coordinator,
            lambda: why_unreachable(conf.coordinator, ca),
            lambda: why_refused(conf.coordinator, ca),
        )
        self.failures: list[BaseException] = []
        self.retry = Retry()

    def _agent_with(self, keys: SiteKeys) -> Agent:
        return Agent(self._conf, keys.identity, keys.node_line, keys.coordinator, self._child)

    def start(self) -> None:
        """Start both, and the training child, which needs as long as the line to come up."""
        self._child.warm()
        self._worker_stop, self._keeper_stop = threading.Event(), threading.Event()
        self._keeper = Keeper(
            lambda: _supernode(self._conf, self._files, self._port),
            self._keeper_stop,
            self._look,
            self._news.ended,
        )
        # A thread that nobody waits for longer than a while: it may be in the middle of a round.
        self._worker = threading.Thread(
            target=self._work, args=(self._agent, self._keys, self._worker_stop), daemon=True
        )
        self._keeper.start()
        self._worker.start()

    def _look(self) -> None:
        self._news.look()
        _put_aside_when_large(self._state / "supernode.log", _LARGEST_LOG)

    def _work(self, agent: Agent, keys: SiteKeys, stop: threading.Event) -> None:
        try:
            serve(
                agent,
                name=self._conf.name,
                identity=keys.identity,
                coordinator=keys.coordinator,
                port=self._port,
                secret=self._secret,
                stop=stop,
            )
        except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
            self.failures.append(error)
            self._stopping.set()
        if not stop.is_set():
            self._stopping.set()

    def renew(self) -> None:
        """Begin anew with the keys as they are now, if they are good and others than before."""
        try:
            keys = load_site_keys(self._conf)
            changed = keys.changed(self._keys)
            agent = self._agent_with(keys)
            if changed:
                self._files.write(keys)
        except LeptonError as error:
            problem = error.problems[0]
            if self.retry.failed(error):
                _log.error(
                    "keys.refused %s: %s; %s; those in use stay in use [%s]",
                    problem.where,
                    problem.what,
                    problem.remedy,
                    problem.code,
                )
            return
        self.retry.succeeded()
        if not changed:
            return
        # What is signed with a key that is replaced may be of no use by now; the line is good.
        only_ca = changed == ["ca"]
        self._finish(self._conf.policy.seconds_per_round if only_ca else _FINISH_S)
        if self._stopping.is_set():
            return
        self._keys, self._agent = keys, agent
        self.start()
        _log.info(
            "keys.renewed changed=%s identity: %s",
            ",".join(changed),
            key_words(keys.identity.public_key()),
        )

    def _finish(self, patience_s: float) -> None:
        """End both, the worker first: an answer that is in progress leaves, if it comes in time."""
        self._worker_stop.set()
        if not self._ended_within(patience_s):
            self._agent.interrupt()
            while self._worker.is_alive() and not self._stopping.wait(_LOOK_S):
                pass
        self._stopping.wait(_HAND_ON_S)  # the SuperNode has the answer, and sends it
        self._keeper_stop.set()
        self._keeper.join()
        self._news.ended()

    def _ended_within(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while self._worker.is_alive() and time.monotonic() < until:
            if self._stopping.wait(_WATCH_S):
                break
        return not self._worker.is_alive()

    def close(self) -> None:
        """End everything."""
        self._worker_stop.set()
        self._keeper_stop.set()
        self._agent.close()
        self._worker.join(_STOP_S)
        self._keeper.join(_STOP_S)
        self._files.remove()


def _supernode(conf: ClientConf, files: SuperNodeFiles, port: int) -> subprocess.Popen[bytes]:
    state = Path(conf.state)
    command = supernode_command(
        coordinator=conf.coordinator,
        ca=files.ca,
        node_key=files.node_key,
        secret=state / "supernode.secret",
        port=port,
    )
    log_file = state / "supernode.log"
    _keep_one_older(log_file, _LARGEST_LOG)
    with log_file.open("ab") as log:
        return subprocess.Popen(  # noqa: S603 - our own module
            command,
            env=supernode_environment(state),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


@contextmanager
def _owned(state: Path) -> Iterator[None]:
    with writing(state):
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(state / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Refused(
                Problem("LF4513", "another process of this site works on this state folder",
                        where=str(state), key="state",
                        remedy="stop it first; each site has a state folder of its own")
            ) from None  # fmt: skip
        yield
    finally:
        os.close(lock)


def _sweep(state: Path) -> None:
    """Remove what a killed process left half written: a copy of the node key may be among it.

    Nobody may work in the folder meanwhile.
    """
    bundles = state / "bundles"
    below = [state / "receipts", state / "agreements", bundles, *bundles.glob("incoming/*")]
    sweep(state, *below)
    prune(state / "masked", time.time())  # a run that is over asks for nothing that would do so


def _new_secret(path: Path) -> bytes:
    secret = secrets.token_bytes(_SECRET_BYTES)
    with writing(path):
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb") as file:
            file.write(secret)
    return secret


def _keep_one_older(log: Path, largest: int) -> None:
    """Put a log aside that is larger than that, in place of the one before."""
    with writing(log):
        if log.exists() and log.stat().st_size > largest:
            log.replace(log.with_suffix(".log.1"))


def _put_aside_when_large(log: Path, largest: int) -> None:
    """Do so with a log that a process writes to: what it appends then comes first in it again."""
    with suppress(OSError):
        if log.stat().st_size > largest:
            with suppress(OSError):  # a full disk needs the room more than anybody the old lines
                shutil.copyfile(log, log.with_suffix(".log.1"))
            os.truncate(log, 0)


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])
