from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lepton_fed.config.load import load_values
from lepton_fed.config.schema import SimulationConf
from lepton_fed.config.templates import template
from lepton_fed.errors import Refused, RunError
from lepton_fed.runs.events import EventLog
from lepton_fed.runs.folder import RunFolder
from lepton_fed.runs.progress import LineView, follow
from lepton_fed.runs.status import RunStatus, SiteStatus, outline, read_status
from lepton_fed.simulations.sequential import simulate

if TYPE_CHECKING:
    from tests.unit.runs.conftest import Written

Make = Callable[[], "Written"]


def status(run: Written) -> RunStatus:
    found, events = read_status(run.folder)
    assert len(events) == len(run.told)
    assert found == outline(run.folder)
    return found


def site(run: Written, name: str) -> SiteStatus:
    return next(each for each in status(run).sites if each.name == name)


def test_a_run_goes_on_while_its_log_is_written_and_is_interrupted_when_nobody_writes(
    written: Make,
) -> None:
    run = written().started().round(1)
    assert status(run).state == "running"
    run.close()
    assert status(run).state == "interrupted"


def test_a_run_that_failed_says_why_and_one_that_was_resumed_goes_on(written: Make) -> None:
    run = written().started().round(1).closed(1).emit("run.failed", code="LF5002").close()
    assert (status(run).state, status(run).code) == ("failed", "LF5002")
    run.open()
    assert status(run).state == "running"
    run.emit("run.resumed", round=1)
    assert (status(run).state, status(run).code) == ("running", "")
    run.close()
    assert (status(run).state, status(run).code) == ("interrupted", "")


@pytest.mark.parametrize("code", ["LF5209", "LF5211", "LF5018"])
def test_a_run_that_the_next_start_goes_on_with_is_interrupted(written: Make, code: str) -> None:
    run = written().started().emit("sites.awaited", sites=["north"], agreed=[]).round(1)
    run.emit("run.failed", code=code).close()
    assert (status(run).state, status(run).code) == ("interrupted", code)
    assert status(run).waiting == []
    assert follow(run.folder, LineView(StringIO()), lambda: None) == "interrupted"


@pytest.mark.parametrize("code", ["LF5209", "LF5211"])
def test_a_simulation_has_no_next_start(written: Make, code: str) -> None:
    run = written().started().round(1).emit("run.failed", code=code).close()
    assert (status(run).state, status(run).code) == ("failed", code)
    assert follow(run.folder, LineView(StringIO()), lambda: None) == "failed"


def test_a_run_whose_log_does_not_exist_was_interrupted_before_its_first_event(
    written: Make,
) -> None:
    run = written().close()
    run.folder.events.unlink()
    assert status(run) == RunStatus(run.folder.name, "interrupted")


def test_rounds_bytes_times_and_who_is_waited_for(written: Make) -> None:
    run = written().started().round(1)
    for name in ("north", "east", "south"):
        run.accepted(1, name)
    run.closed(1).round(2).accepted(2, "east")
    found = status(run)
    assert (found.round, found.rounds) == (1, 5)
    assert found.waiting == ["north", "south"]
    assert (found.sent_bytes, found.received_bytes) == (6000, 4000)
    assert found.began == "2026-01-01T12:00:00.000+00:00"
    assert found.newest == "2026-01-01T12:01:10.000+00:00"
    assert found.seconds == 70.0
    assert found.digest == "1" * 64
    run.close()
    assert status(run).waiting == []


def test_a_site_was_seen_when_something_came_from_it(written: Make) -> None:
    run = written()
    run.emit("site.agreed", site="north", version="0.1.0", budget_left=3.5)  # 12:00:00
    run.started().round(1)
    run.refused(1, "north", "LF5306").refused(1, "east", "LF4405")  # 12:00:30, 12:00:40
    run.refused(1, "south", "LF5304")
    assert site(run, "north").seen == "2026-01-01T12:00:00.000+00:00"
    assert site(run, "east").seen == "2026-01-01T12:00:40.000+00:00"
    assert site(run, "south").seen == ""
    run.emit("reply.late", round=2, site="north", asked_in_round=1)  # 12:01:00
    assert site(run, "north").seen == "2026-01-01T12:01:00.000+00:00"


def test_what_a_site_says_of_itself_when_it_agrees_is_kept(written: Make) -> None:
    run = written().emit("site.agreed", site="north", version="0.1.0", budget_left=3.5)
    run.emit("site.agreed", site="east", version="", budget_left=None).started()
    assert (site(run, "north").version, site(run, "north").budget_left) == ("0.1.0", 3.5)
    assert (site(run, "east").version, site(run, "east").budget_left) == ("", None)
    assert (site(run, "south").version, site(run, "south").budget_left) == ("", None)
    run.emit("site.agreed", site="north", version="0.2.0", budget_left=2.5)
    assert (site(run, "north").version, site(run, "north").budget_left) == ("0.2.0", 2.5)


def test_who_was_late_refused_or_absent_is_counted_with_the_newest_reason(written: Make) -> None:
    run = written().started().round(1)
    run.refused(1, "north", "LF5306", "no reply").refused(1, "east", "LF4405", "NaN")
    run.closed(1, ("south",)).round(2, ("east", "south"), absent=["north"])
    run.emit("counts.refused", round=2, site="south", code="LF4408", why="-1 rows")
    run.refused(2, "east", "LF4201", "no budget")
    north, east, south = (site(run, name) for name in ("north", "east", "south"))
    assert (north.late, north.refused, north.absent) == (1, 0, 1)
    assert (east.late, east.refused, east.absent) == (0, 2, 0)
    assert (south.late, south.refused, south.absent) == (0, 1, 0)
    assert (south.rounds, north.rounds) == (1, 0)
    lasts = [each.last for each in (north, east, south)]
    assert [(last.kind, last.round, last.code, last.why) for last in lasts if last] == [
        ("absent", 2, "", "it was not online"),
        ("refused", 2, "LF4201", "no budget"),
        ("refused", 2, "LF4408", "its counts: -1 rows"),
    ]


def test_a_round_that_was_begun_twice_counts_once(written: Make) -> None:
    run = written().started().round(1).refused(1, "north", "LF5306").accepted(1, "east").close()
    run.open().emit("run.resumed", round=0)
    run.round(1).refused(1, "north", "LF5306").accepted(1, "east").accepted(1, "south")
    run.closed(1, ("east", "south"))
    found = status(run)
    assert [(s.name, s.rounds, s.late) for s in found.sites] == [
        ("east", 1, 0), ("north", 0, 1), ("south", 1, 0)
    ]  # fmt: skip
    assert found.received_bytes == 3000  # what came before the interruption came all the same


def test_a_site_that_never_came_is_absent_until_it_comes(written: Make) -> None:
    run = written().emit("sites.awaited", sites=["north", "south"], agreed=["east"])
    assert {s.name: s.last.why for s in status(run).sites if s.last} == {
        "north": "it has not agreed to the run yet", "south": "it has not agreed to the run yet"
    }  # fmt: skip
    run.emit("site.agreed", site="north", version="", budget_left=None)
    run.emit("site.refused", site="south", code="LF4603", why="rounds: 5 asked for")
    assert site(run, "north").last is None
    last = site(run, "south").last
    assert last is not None
    assert (last.kind, last.round, last.code) == ("refused", 0, "LF4603")
    assert status(run).rounds == 0


def test_an_offer_that_did_not_reach_a_site_is_no_refusal(written: Make) -> None:
    run = written().emit("site.refused", site="north", code="LF5306", why="no reply").started()
    assert (site(run, "north").refused, site(run, "north").last) == (0, None)


def test_epsilon_is_the_largest_that_a_site_said(written: Make) -> None:
    run = written().started().round(1).accepted(1, "north", 0.5).accepted(1, "east", None)
    run.closed(1).round(2).accepted(2, "north", 0.75)
    assert site(run, "north").epsilon == 0.75
    assert site(run, "east").epsilon is None


def test_a_changed_log_is_damaged_in_a_list_and_refused_when_it_is_read(written: Make) -> None:
    run = written().started().round(1).close()
    content = run.folder.events.read_bytes()
    run.folder.events.write_bytes(content.replace(b'"rounds":5', b'"rounds":9', 1))
    with pytest.raises(Refused, match="LF4301"):
        read_status(run.folder)
    assert outline(run.folder) == RunStatus(run.folder.name, "damaged", "LF4301")


def test_a_run_without_its_new_fields_is_read_all_the_same(written: Make) -> None:
    """Logs of before ``absent``, ``sent_bytes`` and ``version`` were written."""
    run = written().emit("site.agreed", site="north").started().round(1)
    run.emit("round.closed", round=1, rounds=5, sites=["north"], model="m", digest="d")
    assert (status(run).sent_bytes, site(run, "north").rounds) == (0, 1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A real run of two rounds."""
    runs = tmp_path_factory.mktemp("real") / "runs"
    words = ["rounds.count=2", "privacy.record.enabled=false", f"runs={runs}"]
    return simulate(load_values(SimulationConf, template("simulation"), words)).folder


def test_a_real_run_is_finished_and_then_exported(finished: RunFolder) -> None:
    found, events = read_status(finished)
    summary = finished.read_summary()
    assert summary is not None
    assert (found.state, found.round, found.rounds) == ("finished", 2, 2)
    assert [(s.name, s.rounds) for s in found.sites] == [("east", 2), ("north", 2), ("south", 2)]
    assert (found.digest, found.metrics) == (summary.digest, summary.metrics)
    accepted = [event for event in events if event["event"] == "reply.accepted"]
    assert found.received_bytes == sum(event["bytes"] for event in accepted) > 0
    assert found.sent_bytes == 2 * 3 * 4 * summary.parameters
    assert all(s.seen >= found.began for s in found.sites)
    finished.bundle.mkdir()
    try:
        assert read_status(finished)[0] == replace(found, state="exported")
        assert outline(finished).state == "exported"
    finally:
        finished.bundle.rmdir()


def test_an_outline_says_the_same_as_the_whole(finished: RunFolder) -> None:
    short, (whole, _) = outline(finished), read_status(finished)
    for name in ("run", "state", "round", "rounds", "seconds", "metrics", "digest"):
        assert getattr(short, name) == getattr(whole, name)
    assert [(s.name, s.rounds) for s in short.sites] == [(s.name, s.rounds) for s in whole.sites]
    apart = datetime.fromisoformat(short.began) - datetime.fromisoformat(whole.began)
    # A summary says when it was written and how long the run took, which leaves out its beginning.
    assert abs(apart.total_seconds()) <= 60


def test_seconds_of_a_real_round_are_those_of_its_parts(finished: RunFolder) -> None:
    events = [json.loads(line) for line in finished.events.read_text().splitlines()]
    closed = [event for event in events if event["event"] == "round.closed"]
    for event in closed:
        assert list(event["seconds"]) == ["aggregate", "checkpoint", "exchange", "select"]
        assert all(seconds >= 0 for seconds in event["seconds"].values())
        assert event["seconds"]["exchange"] > 0


def test_a_finished_run_without_its_log_is_refused(finished: RunFolder, tmp_path: Path) -> None:
    copy = RunFolder(tmp_path / finished.name)
    copy.path.mkdir()
    (copy.path / "summary.json").write_bytes((finished.path / "summary.json").read_bytes())
    with pytest.raises(Refused, match="LF4302"):
        read_status(copy)
    (copy.path / "summary.json").write_text("{}")
    with pytest.raises(RunError, match="LF5204"):
        read_status(copy)
    assert (outline(copy).state, outline(copy).code) == ("damaged", "LF5204")


def test_a_log_that_is_being_opened_by_a_writer_does_not_disturb_a_reader(written: Make) -> None:
    run = written().started().close()
    log = EventLog(run.folder.events)
    assert read_status(run.folder)[0].state == "running"
    log.close()
