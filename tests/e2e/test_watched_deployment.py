"""What is seen of a running federation: its health, its metrics, and the commands that show it."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.federation import SITES, Deployment, free_port, lepton

ROUNDS = 4
TASK = (f"rounds.count={ROUNDS}",)


class Watched(Deployment):
    """A deployment whose monitor answers and whose sites say what is left of their budgets."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, *TASK)
        self.monitor = free_port()
        for name in SITES:
            path = root / f"{name}.yaml"
            conf = yaml.safe_load(path.read_text())
            conf["policy"]["leaves"].append("budget")
            path.write_text(yaml.safe_dump(conf))

    def ask(self, path: str) -> tuple[int, str]:
        url = f"http://127.0.0.1:{self.monitor}/{path}"
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def health(self) -> tuple[int, dict[str, Any]]:
        status, said = self.ask("health")
        return status, json.loads(said) if said else {}


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """A deployment with a run that is finished, followed from its beginning."""
    found = Watched(tmp_path_factory.mktemp("watched"))
    follower = None
    try:
        found.start("coordinator", f"monitor=127.0.0.1:{found.monitor}")
        found.wait_for("health", lambda: found.health()[0] == 200)
        found.wait_for("a run folder", lambda: list(found.root.glob("runs/*/events.jsonl")))
        follower = subprocess.Popen(
            [sys.executable, "-m", "lepton_fed", "runs", "follow"],
            cwd=found.root, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        found.followed = follower  # type: ignore[attr-defined]
        running = json.loads(lepton("runs", "list", "--json", cwd=found.root).stdout)
        found.before = running[0]["state"]  # type: ignore[attr-defined]
        for name in SITES:
            found.start(name)
        found.wait_for_event("run.finished")
        yield found
    finally:
        if follower is not None:
            follower.kill()
            follower.wait()
        found.stop()


def test_the_run_is_running_while_it_waits_for_its_sites(watched: Any) -> None:
    assert watched.before == "running"


def test_following_it_prints_every_event_and_ends_with_the_run(watched: Any) -> None:
    told, _ = watched.followed.communicate(timeout=60)
    assert watched.followed.returncode == 0
    assert [json.loads(line)["event"] for line in told.splitlines()] == [
        event["event"] for event in watched.events()
    ]


def test_health_says_what_runs_and_who_is_there(watched: Watched) -> None:
    status, said = watched.health()
    (run,) = watched.root.glob("runs/*")
    assert status == 200
    assert (said["status"], said["run"], said["round"]) == ("ok", run.name, ROUNDS)
    assert (said["sites_online"], said["superlink"], said["last_error"]) == (3, True, "")


def test_the_metrics_are_those_of_the_events(watched: Watched) -> None:
    status, text = watched.ask("metrics")
    assert status == 200
    samples = {
        (sample.name, tuple(sorted(sample.labels.values()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    events = watched.events()
    accepted = [event for event in events if event["event"] == "reply.accepted"]
    closed = [event for event in events if event["event"] == "round.closed"]
    assert samples["lepton_fed_rounds_total", ("updated",)] == len(closed) == ROUNDS
    assert samples["lepton_fed_replies_total", ("", "accepted")] == len(accepted)
    assert samples["lepton_fed_bytes_total", ("received",)] == sum(e["bytes"] for e in accepted)
    assert samples["lepton_fed_bytes_total", ("sent",)] == sum(e["sent_bytes"] for e in closed)
    assert samples["lepton_fed_sites_online", ()] == 3
    assert samples["lepton_fed_run_running", ()] == 0
    total = sum(event["seconds"]["exchange"] for event in closed)
    assert samples["lepton_fed_round_phase_seconds_sum", ("exchange",)] == pytest.approx(total)
    for name in SITES:
        assert samples["lepton_fed_site_last_seen_timestamp_seconds", (name,)] > 0


def test_the_run_shows_each_site_with_its_version_and_what_is_left_of_its_budget(
    watched: Watched,
) -> None:
    shown = json.loads(lepton("runs", "show", "last", "--json", cwd=watched.root).stdout)
    version = lepton("--version", cwd=watched.root).stdout.split()[-1]
    assert [site["name"] for site in shown["sites"]] == sorted(SITES)
    for site in shown["sites"]:
        assert (site["rounds"], site["version"]) == (ROUNDS, version)
        assert 0 <= site["budget_left"] < 0.08, "the run's whole cost is reserved before round 1"
        assert 0 < site["epsilon"] <= 8.0
        assert site["received_bytes"] > 0
    assert shown["sent_bytes"] == ROUNDS * 3 * 4 * shown["summary"]["parameters"]


def test_a_monitor_s_port_that_is_taken_is_one_clear_error(watched: Watched) -> None:
    words = (f"monitor=127.0.0.1:{watched.monitor}", f"listen=127.0.0.1:{free_port()}")
    done = lepton(
        "server", "--conf", "server.yaml", *words, "state=other", cwd=watched.root, code=5
    )
    assert "cannot listen on 127.0.0.1" in done.stderr
    assert "[LF5011]" in done.stderr
    assert "Traceback" not in done.stderr
