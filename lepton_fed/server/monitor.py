"""What a monitoring system sees of a coordinator: Prometheus metrics and a health endpoint.

It listens on loopback only, because it asks nobody who they are. Labels come from bounded sets:
codes of errors, phases, outcomes, and names of the roster; what a site makes up is counted as
``other``, so that no site can grow the number of time series.
"""

from __future__ import annotations

import json
import logging
import re
import socket
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from importlib.metadata import version
from ipaddress import ip_address
from socketserver import TCPServer, ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.exposition import make_wsgi_app

from lepton_fed.errors import Problem, RunError
from lepton_fed.runs.events import Event
from lepton_fed.runs.status import NOT_HEARD
from lepton_fed.server.laps import PHASES

__all__ = ["Monitor"]

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 60, 180, 600, 1800, 3600, 10800)
_CODE = re.compile(r"LF[1-6][0-9]{3}")
_OWN_CODE = re.compile(r"LF44[0-9]{2}|LF530[0-9]")  # that the coordinator itself gives
_HOST = re.compile(r"(?P<name>\[[0-9a-f:]+\]|[^][:]+)(:[0-9]{1,5})?", re.IGNORECASE)
_MOST_CODES = 64
_OTHER = "other"
_PATIENCE_S = 10.0
_STOP_S = 5.0
_LOOK_S = 0.1  # between two looks whether to stop

_log = logging.getLogger("lepton_fed.server")

Environment = dict[str, Any]
StartResponse = Callable[..., Any]


class Monitor:
    """Counts what happens in runs, and answers ``/metrics`` and ``/health``.

    A listener of a run's events. It has a registry of its own, so that two in one process do not
    mix.

    Args:
        online: Returns the names of the sites that are online; fails when Flower's SuperLink does
            not answer.
        roster: Returns the names of all sites of the roster.
    """

    def __init__(
        self, online: Callable[[], Sequence[str]], roster: Callable[[], Sequence[str]]
    ) -> None:
        self._online = online
        self._roster = roster
        self._lock = threading.Lock()  # events come in one thread, questions in others
        self._run = self._last_error = self._kept_as_it_was = ""
        self._round = 0
        self._failed = False
        self._codes: set[str] = set()
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None
        self._make_metrics()
        self._takes: Mapping[str, Callable[[Event], None]] = {
            "run.started": self._started,
            "run.resumed": self._resumed,
            "site.agreed": self._note_seen,
            "site.refused": self._offer_refused,
            "reply.accepted": self._accepted,
            "reply.refused": self._refused,
            "reply.late": self._late,
            "counts.refused": self._counts_refused,
            "round.below_quorum": self._below_quorum,
            "round.model_not_finite": self._not_finite,
            "round.closed": self._closed,
            "run.finished": self._finished,
            "run.failed": self._run_failed,
        }

    def _make_metrics(self) -> None:
        own = self._registry = CollectorRegistry()
        self._rounds = Counter(
            "lepton_fed_rounds", "Rounds that are over, by what came of them.", ["outcome"],
            registry=own,
        )  # fmt: skip
        self._phases = Histogram(
            "lepton_fed_round_phase_seconds", "Seconds of each part of a round.", ["phase"],
            buckets=_SECONDS, registry=own,
        )  # fmt: skip
        self._replies = Counter(
            "lepton_fed_replies", "Replies of sites, by what came of them and the error's code.",
            ["outcome", "code"], registry=own,
        )  # fmt: skip
        self._bytes = Counter(
            "lepton_fed_bytes", "Bytes of vectors sent to sites, and of replies that were used.",
            ["direction"], registry=own,
        )  # fmt: skip
        self._runs = Counter(
            "lepton_fed_runs", "Runs that ended, by how.", ["outcome"], registry=own
        )
        enrolled = Gauge("lepton_fed_sites_enrolled", "Sites of the roster.", registry=own)
        enrolled.set_function(lambda: float(len(self._roster())))
        sites_online = Gauge("lepton_fed_sites_online", "Sites that are online.", registry=own)
        sites_online.set_function(self._count_online)
        self._seen = Gauge(
            "lepton_fed_site_last_seen_timestamp_seconds",
            "When something last came from a site in a run.", ["site"], registry=own,
        )  # fmt: skip
        self._last_round = Gauge(
            "lepton_fed_last_round_timestamp_seconds", "When the last round was over.",
            registry=own,
        )  # fmt: skip
        self._round_of_run = Gauge(
            "lepton_fed_run_round", "Rounds of the present or last run that are over.",
            registry=own,
        )  # fmt: skip
        self._rounds_of_run = Gauge(
            "lepton_fed_run_rounds", "Rounds that the present or last run has.", registry=own
        )
        self._running = Gauge("lepton_fed_run_running", "1 while a run goes on.", registry=own)
        self._certificate = Gauge(
            "lepton_fed_certificate_expires_timestamp_seconds",
            "When the TLS certificate in use is valid no more.", registry=own,
        )  # fmt: skip
        self._info = Info("lepton_fed_run", "The present or last run.", registry=own)
        build = Info("lepton_fed_build", "The coordinator's version.", registry=own)
        build.info({"version": version("lepton-fed")})
        for phase in PHASES:  # there from the start, so that a rate has a zero to start from
            self._phases.labels(phase)
        for outcome in ("updated", "below_quorum", "model_not_finite"):
            self._rounds.labels(outcome)
        for outcome in ("finished", "failed"):
            self._runs.labels(outcome)
        for direction in ("sent", "received"):
            self._bytes.labels(direction)
        self._replies.labels("accepted", "")

    def __call__(self, event: Event) -> None:
        """Count an event."""
        take = self._takes.get(event["event"])
        if take is None:
            return
        with self._lock:
            try:
                take(event)
            except Exception:  # noqa: BLE001 - who only watches must not end the run
                _log.exception("monitor: %s was not counted", event["event"])

    def certificate_ends(self, timestamp: float) -> None:
        """Note until when the TLS certificate in use is valid.

        Args:
            timestamp: Seconds since the epoch.
        """
        self._certificate.set(timestamp)

    def failed(self, code: str) -> None:
        """Note what ended a run, also one that had no event yet.

        Args:
            code: Code of the error.
        """
        with self._lock:
            self._failed, self._last_error = True, code

    def listen(self, address: tuple[str, int]) -> int:
        """Answer from now on; return the port.

        Args:
            address: A loopback address and a port; 0 takes a free one.

        Raises:
            RunError: LF5011, the address cannot be listened on.
        """
        host, port = address
        try:
            self._server = _Server(address)
        except OSError as error:
            raise RunError(
                Problem("LF5011", f"cannot listen on {host}:{port}: {error.strerror or error}",
                        key="monitor", remedy="take a free port, or leave it empty for no monitor")
            ) from error  # fmt: skip
        self._server.set_app(self._answer)
        serve = self._server.serve_forever
        self._thread = threading.Thread(target=serve, args=(_LOOK_S,), daemon=True)
        self._thread.start()
        taken = int(self._server.server_address[1])
        _log.info("monitor on http://%s:%s/metrics and /health", _bracketed(host), taken)
        return taken

    def close(self) -> None:
        """Answer no more."""
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._thread.join(_STOP_S)
            self._server.server_close()

    def health(self) -> dict[str, Any]:
        """Return what ``/health`` says; its status is ``ok`` or ``degraded``."""
        online, reached = self._look()
        with self._lock:
            return {
                "status": "ok" if reached and not self._failed else "degraded",
                "version": version("lepton-fed"),
                "run": self._run,
                "round": self._round,
                "sites_online": online,
                "superlink": reached,
                "last_error": self._last_error,
            }

    def _look(self) -> tuple[int, bool]:
        """Return how many sites are online, and whether the SuperLink answered."""
        try:
            return len(self._online()), True
        except Exception as error:  # noqa: BLE001 - of whatever kind: it did not answer
            _log.warning("monitor: Flower's SuperLink does not answer: %s", type(error).__name__)
            return 0, False

    def _count_online(self) -> float:
        return float(self._look()[0])

    def _answer(self, environment: Environment, start: StartResponse) -> Iterable[bytes]:
        if not _is_loopback(environment.get("HTTP_HOST", "")):
            said = b"only this machine's own names: 127.0.0.1, ::1, localhost\n"
            return _said(start, "421 Misdirected Request", said)
        path = environment.get("PATH_INFO", "")
        if environment.get("REQUEST_METHOD") != "GET":
            return _said(start, "405 Method Not Allowed", b"only GET\n", ("Allow", "GET"))
        if path == "/metrics":
            answered: Iterable[bytes] = make_wsgi_app(self._registry)(environment, start)
            return answered
        if path == "/health":
            found = self.health()
            status = "200 OK" if found["status"] == "ok" else "503 Service Unavailable"
            body = json.dumps(found).encode() + b"\n"
            return _said(start, status, body, ("Content-Type", "application/json"))
        return _said(start, "404 Not Found", b"/metrics and /health\n")

    def _started(self, event: Event) -> None:
        self._begin(event["run"], 0)
        self._rounds_of_run.set(event["rounds"])
        self._info.info({"run": event["run"], "strategy": event["strategy"]})

    def _resumed(self, event: Event) -> None:
        self._begin(event.get("run", self._run), event["round"])
        if "run" in event:
            self._info.info({"run": event["run"], "strategy": event.get("strategy", "")})

    def _begin(self, run: str, done: int) -> None:
        self._run, self._round, self._failed = run, done, False
        self._round_of_run.set(done)
        self._running.set(1)

    def _accepted(self, event: Event) -> None:
        self._replies.labels("accepted", "").inc()
        self._bytes.labels("received").inc(event["bytes"])
        self._note_seen(event)

    def _refused(self, event: Event) -> None:
        self._replies.labels("refused", self._known(event["code"])).inc()
        if event["code"] not in NOT_HEARD:
            self._note_seen(event)

    def _counts_refused(self, event: Event) -> None:
        self._replies.labels("counts_refused", self._known(event["code"])).inc()

    def _late(self, event: Event) -> None:
        self._replies.labels("late", "").inc()
        self._note_seen(event)

    def _offer_refused(self, event: Event) -> None:
        self._replies.labels("offer_refused", self._known(event["code"])).inc()

    def _below_quorum(self, event: Event) -> None:
        self._kept_as_it_was = "below_quorum"

    def _not_finite(self, event: Event) -> None:
        self._kept_as_it_was = "model_not_finite"

    def _closed(self, event: Event) -> None:
        self._rounds.labels(self._kept_as_it_was or "updated").inc()
        self._kept_as_it_was = ""
        self._round = event["round"]
        self._round_of_run.set(event["round"])
        self._rounds_of_run.set(event["rounds"])
        self._last_round.set(_timestamp(event))
        self._bytes.labels("sent").inc(event["sent_bytes"])
        for phase in PHASES:
            self._phases.labels(phase).observe(event["seconds"][phase])

    def _finished(self, event: Event) -> None:
        self._runs.labels("finished").inc()
        self._running.set(0)
        self._failed, self._last_error = False, ""

    def _run_failed(self, event: Event) -> None:
        self._runs.labels("failed").inc()
        self._running.set(0)
        self._failed, self._last_error, self._kept_as_it_was = True, event["code"], ""

    def _note_seen(self, event: Event) -> None:
        if event["site"] in self._roster():
            self._seen.labels(event["site"]).set(_timestamp(event))

    def _known(self, code: str) -> str:
        """Return a code that may become a label: a site may send any."""
        if _OWN_CODE.fullmatch(code) or code in self._codes:
            return code
        if _CODE.fullmatch(code) and len(self._codes) < _MOST_CODES:
            self._codes.add(code)
            return code
        return _OTHER


class _Quiet(WSGIRequestHandler):
    """Writes no access log, and waits for nobody for ever."""

    timeout = _PATIENCE_S

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name it is called by
        """Say nothing."""


class _Server(ThreadingMixIn, WSGIServer):
    """An HTTP server with a thread for each question."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, _Quiet)

    def server_bind(self) -> None:
        """Bind, without asking a name server who this address is, as the stock one does."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Forget a connection that broke."""


def _said(
    start: StartResponse, status: str, body: bytes, *headers: tuple[str, str]
) -> Iterable[bytes]:
    plain = [] if "Content-Type" in dict(headers) else [("Content-Type", "text/plain")]
    start(status, [*plain, *headers, ("Content-Length", str(len(body)))])
    return [body]


def _is_loopback(host: str) -> bool:
    """Return whether a request's Host is a loopback address or localhost, whatever its port.

    A web page whose name was made to point here (DNS rebinding) asks under that name. Who sends no
    Host is no browser.
    """
    found = _HOST.fullmatch(host)
    if found is None:
        return not host
    name = found["name"].lower()
    try:
        return name == "localhost" or ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def _timestamp(event: Event) -> float:
    return datetime.fromisoformat(event["time"]).timestamp()


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
