"""The coordinator goes away and comes back: sites find it again without a restart of theirs."""

from __future__ import annotations

import json
import shutil
import signal
import time

from tests.faults.rows import Fault, fault
from tests.faults.running import Event, Mark, Running

EAST = "east"
AWAY_S = 10.0
Rows = tuple[Fault, ...]


def answered_by_all_but_one(running: Running) -> Event:
    """Hold a round up in which the others have answered, and return its beginning."""
    running.signal(EAST, signal.SIGSTOP, "trainer")
    others = set(running.sites) - {EAST}

    def found() -> Event | None:
        events = running.events()
        newest = max(i for i, event in enumerate(events) if event["event"] == "round.started")
        begun = events[newest]
        if running.secure:
            key = begun["run"], begun["round"]
            answered = {site for site in others if shared(running, site, key)}
        else:
            since = [event for event in events[newest:] if event["event"] == "reply.accepted"]
            answered = {event["site"] for event in since}
        return begun if others == answered else None

    return dict(running.wait_for("a round that waits for one site", found, 60))


def shared(running: Running, site: str, key: tuple[str, int]) -> int:
    """Return how often a site has trained and handed out shares for a round."""
    run, number = key
    folder = running.root / "state" / site / "receipts"
    receipts = [
        json.loads(path.read_text()) for path in folder.glob(f"*-{run}-round-{number:04d}.json")
    ]
    return sum(
        receipt["numbers"].get("phase", "").startswith("share") and not receipt["refusal"]
        for receipt in receipts
    )


def goes_on(running: Running, mark: Mark, begun: Event) -> None:
    """Assert that the run goes on with the round it was in, which costs no site a second time."""
    run, number = begun["run"], begun["round"]
    resumed = running.happened(mark, "run.resumed")
    assert (resumed["run"], resumed["round"]) == (run, number - 1), "no finished round is lost"
    (closed,) = running.since(mark, "round.closed", run=run, round=number)
    assert set(closed["sites"]) == set(running.sites)
    for site in running.sites:
        running.told(mark, site, "connection.up")
        running.records_hold(site)
        records = running.records(site)
        assert records.charged()[run, number] == 1, "what is asked twice is trained once"
        if running.secure:
            times = shared(running, site, (run, number))
        else:
            (update,) = records.left()[run, number].values()
            times = update.times
        assert times == 2 or site == EAST, "the answer of before was sent again"


@fault(
    name="the coordinator is killed and started again: its sites",
    where="coordinator",
    sees="sites: `connection.failed the coordinator cannot be reached`, later `connection.up`; "
    "coordinator: `run.resumed`",
    lost="nothing: the round in progress is done again, and a site that had trained for it sends "
    "the same answer again, at no further cost (its receipt says `sent again`)",
    normal_s=60,
    rounds=("masked", "plain"),
)
def test_sites_find_a_coordinator_that_was_killed_again(running: Running, rows: Rows) -> None:
    pids = {site: running.pid(site, "supervisor") for site in running.sites}
    begun = answered_by_all_but_one(running)
    mark = running.mark()
    running.kill("coordinator")
    running.free(EAST)
    time.sleep(AWAY_S)
    running.start("coordinator")
    running.normal(*((site, rows[0]) for site in running.sites))
    goes_on(running, mark, begun)
    for site in running.sites:
        running.told(mark, site, "connection.failed the coordinator cannot be reached")
        assert running.pid(site, "supervisor") == pids[site]


@fault(
    name="the coordinator is set up anew, on an empty state folder: its sites",
    where="coordinator",
    sees="sites: `connection.refused ... it was set up anew`, `connection.ended`, `connection.up`",
    lost="which run was in progress: `lepton-fed server --resume RUN` goes on with it, and then "
    "nothing is lost",
    normal_s=60,
    rounds=("masked", "plain"),
)
def test_sites_find_a_coordinator_without_memory_again(running: Running, rows: Rows) -> None:
    begun = answered_by_all_but_one(running)
    mark = running.mark()
    running.kill("coordinator")
    running.free(EAST)
    shutil.rmtree(running.root / "state" / "coordinator")
    running.start("coordinator", "--resume", begun["run"])
    running.normal(*((site, rows[0]) for site in running.sites))
    goes_on(running, mark, begun)
    for site in running.sites:
        running.told(mark, site, "connection.ended status=")


@fault(
    name="a site is started before its coordinator",
    where="coordinator",
    sees="site: `connection.failed the coordinator cannot be reached: ... Connection refused`, "
    "later `connection.up`",
    lost="nothing",
    normal_s=60,
)
def test_a_site_that_is_there_first_waits_for_its_coordinator(running: Running, rows: Rows) -> None:
    running.kill("coordinator")
    mark = running.mark()
    for site in running.sites:
        running.stop_site(site)
        running.start_site(site)
        running.told(mark, site, "connection.failed the coordinator cannot be reached")
    running.start("coordinator")
    running.normal(*((site, rows[0]) for site in running.sites))
    for site in running.sites:
        running.told(mark, site, "connection.up")
        running.records_hold(site)
