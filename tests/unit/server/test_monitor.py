"""The monitor over real HTTP on loopback: what it counts, says, and refuses to be made to say."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lepton_fed.errors import RunError
from lepton_fed.server.monitor import Monitor
from tests.unit.server.conftest import SITES

TIME = "2026-01-01T00:01:40.000+00:00"
SECONDS = {"select": 0.5, "exchange": 20.0, "aggregate": 0.02, "checkpoint": 0.2}


def event(name: str, **fields: Any) -> dict[str, Any]:
    return {"event": name, "time": TIME, "previous": "0" * 64, **fields}


STARTED = event(
    "run.started", run="run-1", rounds=5, strategy="fedavg", sites=list(SITES), task="t" * 64
)


def closed(number: int, **fields: Any) -> dict[str, Any]:
    return event("round.closed", round=number, rounds=5, sites=["a"], seconds=SECONDS,
                 sent_bytes=3000, **fields)  # fmt: skip


def accepted(site: str) -> dict[str, Any]:
    return event("reply.accepted", round=1, site=site, bytes=1000, norm=0.5, epsilon=None)


def refused(site: str, code: str) -> dict[str, Any]:
    return event("reply.refused", round=1, site=site, code=code, why="no")


class Watched:
    """A monitor that listens, and what is asked of it."""

    def __init__(self) -> None:
        self.online: Callable[[], Sequence[str]] = lambda: ["a", "b"]
        self.monitor = Monitor(lambda: self.online(), lambda: SITES)
        self.port = self.monitor.listen(("127.0.0.1", 0))

    def tell(self, *events: dict[str, Any]) -> None:
        for each in events:
            self.monitor(each)

    def ask(self, path: str, method: str = "GET", host: str = "") -> tuple[int, str, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request(method, path, headers={"Host": host} if host else {})
        answer = connection.getresponse()
        body = answer.read().decode()
        connection.close()
        return answer.status, answer.getheader("Content-Type", ""), body

    def health(self) -> tuple[int, dict[str, Any]]:
        status, kind, body = self.ask("/health")
        assert kind == "application/json"
        return status, json.loads(body)

    def samples(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        status, kind, body = self.ask("/metrics")
        assert (status, kind.split(";")[0]) == (200, "text/plain")
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(body)
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float:
        return self.samples()[name, tuple(sorted(labels.items()))]


@pytest.fixture
def watched() -> Iterator[Watched]:
    made = Watched()
    yield made
    made.monitor.close()


def test_before_any_run_it_is_well_and_every_counter_is_there(watched: Watched) -> None:
    status, said = watched.health()
    assert status == 200
    assert said == {
        "status": "ok", "version": said["version"], "run": "", "round": 0, "sites_online": 2,
        "superlink": True, "last_error": "",
    }  # fmt: skip
    samples = watched.samples()
    assert samples["lepton_fed_rounds_total", (("outcome", "updated"),)] == 0
    assert samples["lepton_fed_bytes_total", (("direction", "sent"),)] == 0
    assert samples["lepton_fed_replies_total", (("code", ""), ("outcome", "accepted"))] == 0
    assert samples["lepton_fed_round_phase_seconds_count", (("phase", "exchange"),)] == 0
    assert samples["lepton_fed_sites_enrolled", ()] == 4
    assert samples["lepton_fed_sites_online", ()] == 2


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:9093", "127.0.0.1.evil.example", "localhost.evil.example:9093",
     "192.0.2.1:9093", "0.0.0.0:9093", "[::]:9093", "127.0.0.1:9093, evil.example", "localhost:x",
     "127.0.0.1@evil.example", "localhost:", "[localhost]", ":9093"],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/health", "/metrics"])
def test_a_web_page_under_another_name_reads_nothing(
    watched: Watched, host: str, path: str
) -> None:
    watched.tell(STARTED)
    status, _, body = watched.ask(path, host=host)
    assert status == 421
    assert "run" not in body


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.0.0.1:9093", "localhost", "LocalHost:80", "[::1]", "[::1]:9093",
             "127.0.0.2:1"],
)  # fmt: skip
def test_loopback_names_are_answered_under_any_port(watched: Watched, host: str) -> None:
    assert watched.ask("/health", host=host)[0] == 200


def test_who_sends_no_host_is_answered(watched: Watched) -> None:
    with socket.create_connection(("127.0.0.1", watched.port), timeout=10) as line:
        line.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert b" 200 OK" in line.recv(100).splitlines()[0]


def test_rounds_phases_replies_and_bytes_are_counted(watched: Watched) -> None:
    watched.tell(
        STARTED,
        accepted("a"), accepted("b"), refused("c", "LF4405"), refused("d", "LF5306"), closed(1),
        event("round.below_quorum", round=2, usable=1, quorum=2), closed(2),
        event("round.model_not_finite", round=3), closed(3),
        event("reply.late", round=4, site="d", asked_in_round=1),
        event("counts.refused", round=4, site="a", code="LF4408", why="no"),
        event("site.refused", site="c", code="LF4603", why="no"),
        closed(4),
    )  # fmt: skip
    value = watched.value
    assert value("lepton_fed_rounds_total", outcome="updated") == 2
    assert value("lepton_fed_rounds_total", outcome="below_quorum") == 1
    assert value("lepton_fed_rounds_total", outcome="model_not_finite") == 1
    assert value("lepton_fed_round_phase_seconds_sum", phase="exchange") == 80
    assert value("lepton_fed_round_phase_seconds_count", phase="select") == 4
    assert value("lepton_fed_round_phase_seconds_bucket", phase="aggregate", le="0.03") == 4
    assert value("lepton_fed_replies_total", outcome="accepted", code="") == 2
    assert value("lepton_fed_replies_total", outcome="refused", code="LF4405") == 1
    assert value("lepton_fed_replies_total", outcome="refused", code="LF5306") == 1
    assert value("lepton_fed_replies_total", outcome="late", code="") == 1
    assert value("lepton_fed_replies_total", outcome="counts_refused", code="LF4408") == 1
    assert value("lepton_fed_replies_total", outcome="offer_refused", code="LF4603") == 1
    assert value("lepton_fed_bytes_total", direction="received") == 2000
    assert value("lepton_fed_bytes_total", direction="sent") == 12000
    assert value("lepton_fed_last_round_timestamp_seconds") == 1767225700
    assert (value("lepton_fed_run_round"), value("lepton_fed_run_rounds")) == (4, 5)
    assert value("lepton_fed_run_info", run="run-1", strategy="fedavg") == 1


def test_a_site_was_seen_when_something_came_from_it(watched: Watched) -> None:
    agreed = event("site.agreed", site="b", version="0.1.0", budget_left=None)
    watched.tell(agreed, STARTED, accepted("a"), refused("c", "LF5306"), refused("d", "LF5304"))
    seen = {
        dict(labels)["site"]
        for name, labels in watched.samples()
        if name == "lepton_fed_site_last_seen_timestamp_seconds"
    }
    assert seen == {"a", "b"}


def test_a_second_run_takes_the_place_of_the_first(watched: Watched) -> None:
    watched.tell(STARTED, closed(1), event("run.finished", digest="d", metrics={}, seconds=1.0))
    assert watched.value("lepton_fed_run_running") == 0
    watched.tell(STARTED | {"run": "run-2", "rounds": 7})
    info = [labels for name, labels in watched.samples() if name == "lepton_fed_run_info"]
    assert info == [(("run", "run-2"), ("strategy", "fedavg"))]
    assert watched.value("lepton_fed_run_round") == 0
    assert watched.value("lepton_fed_run_running") == 1
    assert watched.value("lepton_fed_runs_total", outcome="finished") == 1
    assert watched.health()[1]["run"] == "run-2"


def test_the_end_of_the_certificate_in_use_is_told(watched: Watched) -> None:
    for end in (1_900_000_000.0, 1_950_000_000.0):
        watched.monitor.certificate_ends(end)
        assert watched.value("lepton_fed_certificate_expires_timestamp_seconds") == end


def test_a_run_that_failed_is_unhealthy_until_the_next_one_goes_on(watched: Watched) -> None:
    watched.tell(STARTED, closed(1), event("run.failed", code="LF5004"))
    status, said = watched.health()
    assert (status, said["status"], said["last_error"]) == (503, "degraded", "LF5004")
    assert watched.value("lepton_fed_runs_total", outcome="failed") == 1
    watched.tell(event("run.resumed", round=1))
    status, said = watched.health()
    assert (status, said["status"], said["round"]) == (200, "ok", 1)
    watched.tell(event("run.finished", digest="d", metrics={}, seconds=1.0))
    assert watched.health()[1]["last_error"] == ""


def test_a_run_that_could_not_begin_is_unhealthy_too(watched: Watched) -> None:
    watched.monitor.failed("LF4216")
    status, said = watched.health()
    assert (status, said["last_error"]) == (503, "LF4216")
    watched.tell(STARTED)
    assert watched.health()[0] == 200


def test_a_superlink_that_does_not_answer_is_unhealthy_and_metrics_go_on(watched: Watched) -> None:
    def broken() -> list[str]:
        raise ConnectionError("refused by /home/owner/secret")

    watched.online = broken
    status, said = watched.health()
    assert (status, said["status"], said["superlink"]) == (503, "degraded", False)
    assert watched.value("lepton_fed_sites_online") == 0
    assert "secret" not in json.dumps(said)


def test_a_hostile_site_cannot_grow_the_number_of_time_series(watched: Watched) -> None:
    watched.tell(STARTED)
    for number in range(10_000):
        code = f"LF{number:04d}"
        watched.tell(refused("a", code), event("site.refused", site="a", code=code, why="x"))
    made_up = ["", "lf4405", 'LF4405"} 1\nevil', "LF44O5", "LF44051", "x" * 10_000]
    made_up.append("LF4\u0664\u0660\u0665")  # digits to Python, not to us
    for code in made_up:
        watched.tell(refused("a", code))
    for number in range(1000):
        watched.tell(accepted(f"stranger-{number}"))
    samples = watched.samples()
    codes = {dict(labels)["code"] for name, labels in samples if name.endswith("replies_total")}
    assert len(codes) <= 64 + 110 + 2
    assert {"other", "LF4405", "LF5306"} <= codes, "the coordinator's own codes keep their place"
    assert all(len(code) <= 6 and code.isascii() for code in codes)
    sites = {dict(labels).get("site") for _, labels in samples} - {None}
    assert sites == {"a"}
    assert len(samples) < 900
    counted = sum(
        value for (name, labels), value in samples.items()
        if name == "lepton_fed_replies_total" and dict(labels)["outcome"] == "refused"
    )  # fmt: skip
    assert counted == 10_000 + len(made_up), "none is lost"


def test_an_event_that_cannot_be_counted_does_not_end_the_run(watched: Watched) -> None:
    watched.tell(event("round.closed", round=1), event("something.new"), STARTED, closed(1))
    assert watched.value("lepton_fed_rounds_total", outcome="updated") >= 1


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 404), ("GET", "/metrics/../health", 404), ("POST", "/metrics", 405),
     ("HEAD", "/health", 405), ("DELETE", "/", 405)],
)  # fmt: skip
def test_nothing_else_answers(watched: Watched, method: str, path: str, status: int) -> None:
    assert watched.ask(path, method)[0] == status


def test_two_monitors_in_one_process_do_not_mix(watched: Watched) -> None:
    other = Watched()
    watched.tell(STARTED, closed(1))
    assert other.value("lepton_fed_rounds_total", outcome="updated") == 0
    assert watched.value("lepton_fed_rounds_total", outcome="updated") == 1
    other.monitor.close()


def test_a_port_in_use_is_one_clear_error(watched: Watched) -> None:
    second = Monitor(list, list)
    with pytest.raises(RunError) as caught:
        second.listen(("127.0.0.1", watched.port))
    (problem,) = caught.value.problems
    assert (problem.code, problem.key) == ("LF5011", "monitor")
    assert problem.what == f"cannot listen on 127.0.0.1:{watched.port}: Address already in use"
    second.close()  # what does not listen closes without a word


def test_it_lets_go_of_its_port_and_asks_no_name_server(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> str:
        raise AssertionError("a look-up")

    monkeypatch.setattr(socket, "getfqdn", never)
    watched.monitor.close()
    again = Monitor(list, list)
    assert again.listen(("127.0.0.1", watched.port)) == watched.port
    again.close()


def test_it_answers_on_ipv6_loopback_too() -> None:
    made = Monitor(list, list)
    try:
        port = made.listen(("::1", 0))
    except RunError:
        pytest.skip("this machine has no IPv6 loopback")
    connection = http.client.HTTPConnection("::1", port, timeout=10)
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200
    connection.close()
    made.close()
