"""A SuperLink in this process, on two listeners.

Stock Flower answers nodes and administrators on one port, and without its enterprise plug-in takes
anyone for an administrator: whoever reaches the port starts runs and enrols keys. Here the public
listener (TLS) answers the Fleet API only, with node authentication; everything else is on a
loopback listener that is silent without a secret made at start.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import secrets
import socket
import ssl
import threading
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import uvicorn

from lepton_fed.errors import Problem, RunError
from lepton_fed.flower import compat
from lepton_fed.flower.failures import check_database, telling
from lepton_fed.flower.heap import give_large_blocks_back, settle
from lepton_fed.flower.listener import SECRET_HEADER, Bell, FleetOnly, WithSecret
from lepton_fed.flower.parcels import Post as Grid
from lepton_fed.flower.quota import Quota

__all__ = ["APP_ID", "Grid", "SuperLink", "codeless_app"]

APP_ID = "lepton/fed"
"""The app that every run of lepton-fed names; sites answer no other."""

_LOOPBACK = "127.0.0.1"

_log = logging.getLogger("lepton_fed.server")
_START_S = 30.0
_MOST_LINES = 800  # below the 1024 files that a process has where nobody gives it more


class SuperLink:
    """Flower's registry, object store and message queue, for one coordinator.

    Args:
        listen: Public address and port.
        certificate: TLS certificate, PEM.
        key: Its private key, PEM.
        database: SQLite file; what is large in a reply is put beside it while it is read.

    Raises:
        RunError: LF5011, the address cannot be listened on, or the SuperLink does not start;
            LF5017, LF5018, LF5019 or LF5209, also from each method: its database cannot be used.
    """

    def __init__(self, listen: tuple[str, int], certificate: Path, key: Path, database: Path):
        check_database(database)
        _tell_in_lines()
        compat.hasten_pulls()
        give_large_blocks_back()
        self._taken = secrets.token_bytes(32)
        secret = secrets.token_hex(32)
        self._header = compat.SecretHeader(SECRET_HEADER, secret)
        self._bell = Bell()
        self._quota = Quota()
        self._replies = database.with_name("replies")
        public = _listening(listen)
        private = _listening((_LOOPBACK, 0))
        port = private.getsockname()[1]
        self._address = f"{_LOOPBACK}:{port}"
        self._app = app = compat.superlink_app(
            host=_LOOPBACK, port=port, database=str(database), secret=self._taken
        )
        quiet: dict[str, Any] = {"log_level": "error", "access_log": False, "ws": "none"}
        self._sockets = (private, public)
        self._fleet = FleetOnly(app, self._bell, quota=self._quota)
        self._servers = (
            uvicorn.Server(uvicorn.Config(WithSecret(app, secret), **quiet)),
            uvicorn.Server(
                uvicorn.Config(
                    self._fleet,
                    lifespan="off",
                    limit_concurrency=_MOST_LINES,
                    ssl_certfile=str(certificate),
                    ssl_keyfile=str(key),
                    **quiet,
                )
            ),
        )
        self._shown: ssl.SSLContext | None = None
        self._threads: list[threading.Thread] = []
        self._control: Any = None

    def start(self, keys: Mapping[str, bytes]) -> None:
        """Answer from now on.

        The public listener opens last: a site that waits for the coordinator would otherwise be
        turned away by a register that is still empty.

        Args:
            keys: Public key of each site's node, PEM, by the site's name; see :meth:`enrol`.
        """
        private, public = zip(self._servers, self._sockets, strict=True)
        self._serve(*private)
        self._control = compat.control_client(self._address, self._header)
        self.enrol(keys)
        public[0].config.load()
        # Asked at each handshake, also of a client that names no host. A context of its own for
        # each certificate: in one that is changed, a handshake could meet half of each pair.
        if public[0].config.ssl is not None:
            public[0].config.ssl.sni_callback = self._show
        settle()
        self._serve(*public)

    def show(self, certificate: ssl.SSLContext) -> None:
        """Show another certificate from the next handshake on; connections go on as they are.

        Args:
            certificate: Holds it, with its key.
        """
        self._shown = certificate

    def _show(self, connection: ssl.SSLObject, host: str | None, first: ssl.SSLContext) -> None:
        del host, first
        if self._shown is not None:
            connection.context = self._shown

    def _serve(self, server: uvicorn.Server, listening: socket.socket) -> None:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        self._threads.append(thread)
        until = time.monotonic() + _START_S
        while not server.started:
            if not thread.is_alive() or time.monotonic() > until:
                raise RunError(
                    Problem("LF5011", "Flower's SuperLink did not start",
                            remedy="look at the lines above, and at the state folder's disk")
                )  # fmt: skip
            time.sleep(0.02)

    def stop(self) -> None:
        """Answer no more."""
        self._bell.close()
        if self._control is not None:
            self._control.close()
        for server in reversed(self._servers):
            server.should_exit = True
        for thread in self._threads:
            thread.join(5)
        for listening in self._sockets:
            listening.close()

    @telling()
    def enrol(self, keys: Mapping[str, bytes]) -> None:
        """Make the register hold these node keys and no others.

        New ones come first: if one is not taken, none is taken off, which would be for good.

        Args:
            keys: Public key of each site's node, PEM, by the site's name.

        Raises:
            RunError: LF5015, a key was taken off before.
        """
        there = compat.registered_nodes(self._control)
        known = {pem for pem, _ in there.values()}
        for name, pem in keys.items():
            if pem not in known and not compat.register_node(self._control, pem, name):
                raise RunError(
                    Problem("LF5015", f"{name}'s node key was taken off the roster before, and "
                            "Flower takes no key back", where=name, key="roster",
                            remedy="let the site make a new node key and enrol with it")
                )  # fmt: skip
        self._fleet.let_in(known | set(keys.values()))
        for node, (pem, _) in there.items():
            if pem not in keys.values():
                compat.unregister_node(self._control, node)
        self._fleet.let_in(keys.values())

    @telling()
    def nodes(self, keys: Mapping[str, bytes]) -> dict[str, int]:
        """Return the node id of each site, by name.

        Args:
            keys: Public key of each site's node, PEM, by the site's name.
        """
        by_key = {pem: node for node, (pem, _) in compat.registered_nodes(self._control).items()}
        return {name: by_key[pem] for name, pem in keys.items() if pem in by_key}

    @telling()
    def online(self, keys: Mapping[str, bytes]) -> list[str]:
        """Return the names of the sites whose node is online.

        Args:
            keys: Public key of each site's node, PEM, by the site's name.
        """
        status = dict(compat.registered_nodes(self._control).values())
        return sorted(name for name, pem in keys.items() if status.get(pem) == "online")

    @contextmanager
    def grid(self) -> Iterator[Grid]:
        """Open a Flower run, execute its ServerApp task here, and yield the task's Grid.

        The app that the run names holds no code; what runs is the body of the ``with``.

        Raises:
            RunError: LF5012, the task could not be taken.
        """
        app = codeless_app()
        with telling():
            run = compat.start_run(self._control, app, hashlib.sha256(app).hexdigest())
            executor = compat.executor_client(self._address, self._taken, self._header)
            try:
                grid, context = self._take(executor, run)
            finally:
                executor.close()
            grid.end_earlier_runs()
        heartbeat = compat.Heartbeat(grid.runtime)
        heartbeat.start()
        completed = False
        try:
            yield Grid(grid, self._replies, self._bell.ring, self._quota)
            completed = True
        finally:
            # What the SuperLink fails of now, the body has met before it, or never will.
            with suppress(RunError):
                self._end(grid, context, heartbeat, completed=completed)

    @telling()
    def _end(
        self,
        grid: compat.PrivateGrid,
        context: Any,
        heartbeat: compat.Heartbeat,
        *,
        completed: bool,
    ) -> None:
        heartbeat.stop()
        try:
            compat.finish_server_task(grid, context, completed=completed)
        finally:
            grid.close()

    def _take(self, executor: Any, run: int) -> tuple[compat.PrivateGrid, Any]:
        """Take tasks until it is that of our run: one that an earlier process left is ended."""
        until = time.monotonic() + _START_S
        while time.monotonic() < until:
            token = compat.take_server_task(executor)
            if not token:
                time.sleep(0.05)
                continue
            grid = compat.PrivateGrid(self._address, token, self._header, self._app)
            found, context = grid.begin()
            if found == run:
                return grid, context
            compat.finish_server_task(grid, context, completed=False)
            grid.close()
        raise RunError(
            Problem("LF5012", "the SuperLink did not hand out the run's task",
                    remedy="start the coordinator again")
        )  # fmt: skip


class _Line(logging.Handler):
    """Hands what Flower logs on to the coordinator's log, a line each."""

    def emit(self, record: logging.LogRecord) -> None:
        """Hand a record on: without colours, statements and values."""
        said = record.getMessage().strip().splitlines() or [""]
        _log.log(record.levelno, "flower: %s", said[0])


def _tell_in_lines() -> None:
    flower = logging.getLogger("flwr")
    for handler in list(flower.handlers):
        flower.removeHandler(handler)
    line = _Line()
    line.setLevel(os.environ["FLWR_LOG_LEVEL"].upper())
    flower.addHandler(line)


def _listening(address: tuple[str, int]) -> socket.socket:
    """Return a socket that listens; taken first, so that a port in use is one clear error."""
    host, port = address
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)
    except OSError as error:
        listening.close()
        raise RunError(
            Problem("LF5011", f"cannot listen on {host}:{port}: {error.strerror or error}",
                    key="listen", remedy="take a free port and an address of this machine")
        ) from error  # fmt: skip
    return listening


def codeless_app() -> bytes:
    """Return a Flower app bundle that holds its name and nothing that could be run."""
    publisher, name = APP_ID.split("/")
    manifest = "\n".join(
        (
            "[project]",
            f'name = "{name}"',
            'version = "1.0.0"',
            'description = ""',
            "[tool.flwr.app]",
            f'publisher = "{publisher}"',
            "[tool.flwr.app.components]",
            f'serverapp = "{name}:none"',
            f'clientapp = "{name}:none"',
        )
    )
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(zipfile.ZipInfo("pyproject.toml", (2024, 10, 1, 0, 0, 0)), manifest)
    return packed.getvalue()
