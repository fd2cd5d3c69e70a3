from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from lepton_fed.core.digests import canonical_json
from lepton_fed.errors import Refused, RunError
from lepton_fed.runs import files
from lepton_fed.runs.events import Event, EventLog, GrowingLog, is_written, read_events

FIELDS = [{"round": r, "sites": ["a", "ä\n"], "why": 'no "rows"\r\n\u2028'} for r in range(5)]


@pytest.fixture
def ticking() -> Callable[[], str]:
    """A clock that ticks once a look."""
    ticks = count()
    return lambda: f"2026-01-01T00:00:{next(ticks):02d}Z"


@pytest.fixture
def path(tmp_path: Path, ticking: Callable[[], str]) -> Path:
    """A log of five events."""
    found = tmp_path / "events.jsonl"
    log = EventLog(found, clock=ticking)
    for fields in FIELDS:
        log.emit("round.closed", **fields)
    log.close()
    return found


def place_of_the_change(path: Path, head: str = "") -> str:
    with pytest.raises(Refused) as caught:
        read_events(path, head)
    (problem,) = caught.value.problems
    assert problem.remedy
    return f"{problem.code} {problem.where}"


def test_events_come_back_as_they_were_written(path: Path) -> None:
    events = read_events(path)
    assert [{k: e[k] for k in FIELDS[0]} for e in events] == FIELDS
    assert {event["event"] for event in events} == {"round.closed"}
    times = [event["time"] for event in events]
    assert times == sorted(set(times))


def test_each_line_is_one_json_object_and_carries_the_hash_of_the_one_before(path: Path) -> None:
    lines = path.read_bytes().splitlines()
    assert len(lines) == 5
    previous = hashlib.sha256(b"lepton-fed events 1").hexdigest()
    for line in lines:
        assert json.loads(line)["previous"] == previous
        previous = hashlib.sha256(line).hexdigest()


def changed_value(lines: list[bytes], at: int) -> None:
    lines[at] = lines[at].replace(b'"round":%d' % at, b'"round":9')


def removed(lines: list[bytes], at: int) -> None:
    del lines[at]


def swapped(lines: list[bytes], at: int) -> None:
    lines[at], lines[at + 1] = lines[at + 1], lines[at]


def repeated(lines: list[bytes], at: int) -> None:
    lines.insert(at, lines[at - 1])


def inserted(lines: list[bytes], at: int) -> None:
    forged = json.loads(lines[at]) | {"event": "reply.accepted"}
    lines.insert(at, canonical_json(forged) + b"\n")


def with_white_space(lines: list[bytes], at: int) -> None:
    lines[at] = lines[at].replace(b":", b": ", 1)


def with_a_repeated_key(lines: list[bytes], at: int) -> None:
    lines[at] = lines[at].replace(b'"event"', b'"event":"x","event"', 1)


def with_an_escape(lines: list[bytes], at: int) -> None:
    lines[at] = lines[at].replace(b"round.closed", b"round\\u002eclosed")


def blank(lines: list[bytes], at: int) -> None:
    lines.insert(at, b"\n")


def no_json(lines: list[bytes], at: int) -> None:
    lines[at] = b"\xff\xfe\n"


def no_object(lines: list[bytes], at: int) -> None:
    lines[at] = b'["previous"]\n'


def nested_deeper_than_a_parser_goes(lines: list[bytes], at: int) -> None:
    lines[at] = b"[" * 100_000 + b"\n"


def not_a_number(lines: list[bytes], at: int) -> None:
    lines[at] = lines[at].replace(b'"round":%d' % at, b'"round":NaN')


def two_in_one(lines: list[bytes], at: int) -> None:
    lines[at] = lines[at].rstrip(b"\n")


CHANGES = [
    changed_value,
    removed,
    swapped,
    repeated,
    inserted,
    with_white_space,
    with_a_repeated_key,
    with_an_escape,
    blank,
    no_json,
    no_object,
    nested_deeper_than_a_parser_goes,
    not_a_number,
    two_in_one,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_change_is_found_with_its_line(path: Path, change: object, at: int) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    change(lines, at)  # type: ignore[operator]
    path.write_bytes(b"".join(lines))
    # A changed value is still a line of its own kind: the next one does not follow from it.
    first = at + 2 if change in (changed_value, inserted) else at + 1
    assert place_of_the_change(path) == f"LF4301 {path}:{first}"


def test_a_flipped_bit_anywhere_before_the_last_line_is_found(path: Path) -> None:
    content = path.read_bytes()
    last = content.rindex(b"\n", 0, -1)
    for byte in range(0, last, 13):
        changed = bytearray(content)
        changed[byte] ^= 1
        path.write_bytes(changed)
        assert f"LF4301 {path}:" in place_of_the_change(path)


def test_the_first_line_cannot_be_cut_off(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[1:]))
    assert place_of_the_change(path) == f"LF4301 {path}:1"


CUTS = (1, 2, 40)


@pytest.mark.parametrize("cut", CUTS)
def test_a_line_that_a_crash_cut_off_counts_as_not_written(path: Path, cut: int) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    assert len(read_events(path)) == 4
    assert path.read_bytes() == content[:-cut]  # reading mends nothing


@pytest.mark.parametrize("cut", CUTS)
def test_a_log_that_a_crash_cut_off_is_continued_after_its_last_whole_line(
    path: Path, ticking: Callable[[], str], cut: int
) -> None:
    path.write_bytes(path.read_bytes()[:-cut])
    log = EventLog(path, clock=ticking)
    log.emit("run.resumed", round=4)
    log.close()
    events = read_events(path, log.head)
    assert [event["event"] for event in events] == [*["round.closed"] * 4, "run.resumed"]


@pytest.mark.parametrize("cut", CUTS)
def test_a_finished_runs_log_may_not_be_cut_off(path: Path, cut: int) -> None:
    content = path.read_bytes()
    lines = content.splitlines()
    heads = [hashlib.sha256(line).hexdigest() for line in lines]
    path.write_bytes(content[:-cut])
    for head in heads[-2:]:  # also when the summary names the line before
        assert place_of_the_change(path, head) == f"LF4301 {path}:5"


def test_a_log_of_nothing_but_the_start_of_a_line_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"event":"run.sta')
    assert read_events(path) == []
    log = EventLog(path)
    log.emit("run.started")
    log.close()
    assert len(read_events(path, log.head)) == 1


def test_lines_cut_off_at_the_end_are_found_by_the_hash_of_the_last(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    head = hashlib.sha256(lines[-1].rstrip(b"\n")).hexdigest()
    assert len(read_events(path, head)) == 5
    path.write_bytes(b"".join(lines[:-1]))
    assert len(read_events(path)) == 4
    assert place_of_the_change(path, head) == f"LF4302 {path}"
    path.write_bytes(b"")
    assert place_of_the_change(path, head) == f"LF4302 {path}"


def test_a_last_line_that_was_exchanged_is_found_by_its_hash(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    head = hashlib.sha256(lines[-1].rstrip(b"\n")).hexdigest()
    changed_value(lines, 4)
    path.write_bytes(b"".join(lines))
    assert place_of_the_change(path, head) == f"LF4302 {path}"


def test_a_log_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert place_of_the_change(path) == f"LF4302 {path}"


def test_an_existing_log_is_continued(path: Path, ticking: Callable[[], str]) -> None:
    log = EventLog(path, clock=ticking)
    head = log.head
    log.emit("run.resumed", round=3)
    log.close()
    events = read_events(path, log.head)
    assert [event["event"] for event in events][-2:] == ["round.closed", "run.resumed"]
    assert events[-1]["previous"] == head != log.head


def test_a_changed_log_is_not_continued(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    changed_value(lines, 2)
    before = b"".join(lines)
    path.write_bytes(before)
    with pytest.raises(Refused, match="LF4301"):
        EventLog(path)
    assert path.read_bytes() == before


def test_an_empty_log_has_the_head_that_the_first_line_carries(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    head = log.head
    log.emit("run.started")
    log.close()
    (event,) = read_events(tmp_path / "events.jsonl")
    assert event["previous"] == head


def test_listeners_hear_an_event_after_it_was_written(
    tmp_path: Path, ticking: Callable[[], str]
) -> None:
    path = tmp_path / "events.jsonl"
    heard: list[tuple[Event, int]] = []

    def listen(event: Event) -> None:
        heard.append((event, len(path.read_bytes().splitlines())))

    log = EventLog(path, (listen, listen), clock=ticking)
    for number in range(3):
        log.emit("round.started", round=number)
    log.close()
    assert [(event["round"], lines) for event, lines in heard] == [
        (number, number + 1) for number in range(3) for _ in range(2)
    ]
    assert [event for event, _ in heard[::2]] == read_events(path)


def test_a_listener_that_can_no_longer_be_told_is_left_out(tmp_path: Path) -> None:
    asked: list[str] = []
    heard: list[str] = []

    def gone(event: Event) -> None:
        asked.append(event["event"])
        raise BrokenPipeError(event["event"])

    log = EventLog(tmp_path / "events.jsonl", (gone, lambda event: heard.append(event["event"])))
    log.emit("run.started")
    log.emit("run.finished")
    log.close()
    assert asked == ["run.started"]
    assert heard == ["run.started", "run.finished"]
    assert len(read_events(tmp_path / "events.jsonl", log.head)) == 2


def test_a_listener_with_a_bug_does_not_lose_the_event(tmp_path: Path) -> None:
    def fail(event: Event) -> None:
        raise KeyError(event["event"])

    log = EventLog(tmp_path / "events.jsonl", (fail,))
    with pytest.raises(KeyError):
        log.emit("run.started")
    log.close()
    assert len(read_events(tmp_path / "events.jsonl", log.head)) == 1


def full(*_: object) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(RunError) as caught:
        action()
    (problem,) = caught.value.problems
    assert problem.remedy
    return f"{problem.code} {problem.where}: {problem.what}"


@pytest.mark.parametrize("stop", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_an_event_that_cannot_be_written_leaves_the_log_whole(
    path: Path, monkeypatch: pytest.MonkeyPatch, stop: BaseException
) -> None:
    heard: list[Event] = []
    log = EventLog(path, (heard.append,))
    head, before = log.head, path.read_bytes()

    class Half:
        """Takes a few bytes of a line, and no more."""

        def __init__(self, file: Any) -> None:
            self.file, self.calls = file, 0

        def write(self, content: Any) -> int:
            self.calls += 1
            if self.calls > 1:
                raise stop
            return int(self.file.write(content[:7]))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    with monkeypatch.context() as patched:
        append = files.append
        patched.setattr(
            "lepton_fed.runs.events.append", lambda file, line: append(Half(file), line)
        )
        if isinstance(stop, OSError):
            assert refusal(lambda: log.emit("x")) == f"LF5209 {path}: this cannot be written: full"
        else:
            with pytest.raises(KeyboardInterrupt):
                log.emit("x")
    assert (log.head, path.read_bytes(), heard) == (head, before, [])
    log.emit("run.failed", code="LF5209")
    log.close()
    assert [event["event"] for event in read_events(path, log.head)][-1] == "run.failed"


def test_a_log_that_cannot_be_synced_is_said_and_closed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = EventLog(path)
    monkeypatch.setattr(os, "fsync", full)
    assert refusal(log.close).startswith(f"LF5209 {path}: ")
    with pytest.raises(ValueError, match="closed"):
        log.emit("run.finished")


def test_a_log_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    path = tmp_path / "none" / "events.jsonl"
    assert refusal(lambda: EventLog(path)).startswith(f"LF5209 {path}: ")


def test_a_log_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for action in (read_events, is_written, lambda path: GrowingLog(path).take()):
        found = refusal(lambda action=action: action(tmp_path))  # type: ignore[misc]
        assert found == f"LF5210 {tmp_path}: this cannot be read: Is a directory"


def test_a_log_has_one_writer_and_says_whether_it_has_one(path: Path) -> None:
    assert not is_written(path)
    log = EventLog(path)
    assert is_written(path)
    assert refusal(lambda: EventLog(path)).startswith(f"LF5220 {path}: another process writes")
    log.emit("run.resumed", round=4)
    log.close()
    assert not is_written(path)
    EventLog(path).close()
    assert len(read_events(path, log.head)) == 6


def test_a_log_that_is_refused_is_let_go_of(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"round":2', b'"round":9'))
    with pytest.raises(Refused, match="LF4301"):
        EventLog(path)
    assert not is_written(path)


def test_the_lock_goes_with_its_process(path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path;"
        "from lepton_fed.runs.events import EventLog;"
        "log = EventLog(Path(sys.argv[1])); print('open', flush=True); signal.pause()"
    )
    writer: Any = subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True
    )
    with writer:
        assert writer.stdout.readline() == "open\n"
        assert is_written(path)
        writer.kill()
    assert not is_written(path)


def test_who_asks_whether_a_log_is_written_does_not_keep_its_writer_out(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asking = path.open("rb")
    fcntl.flock(asking, fcntl.LOCK_SH)
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        asking.close()

    monkeypatch.setattr("lepton_fed.runs.events.time.sleep", nap)
    EventLog(path).close()
    assert len(naps) == 1


def test_nobody_writes_a_log_that_is_not_there(tmp_path: Path) -> None:
    assert not is_written(tmp_path / "events.jsonl")
    assert GrowingLog(tmp_path / "events.jsonl").take() == []


def test_a_growing_log_is_read_a_piece_at_a_time_and_half_a_line_waits(path: Path) -> None:
    content = path.read_bytes()
    ends = [number for number, byte in enumerate(content, start=1) if byte == ord("\n")]
    growing = path.with_name("growing.jsonl")
    reader, found, calls = GrowingLog(growing), [], 0
    for size in range(0, len(content) + 1, 7):
        growing.write_bytes(content[:size])
        new = reader.take()
        calls += 1
        assert len(found) + len(new) == sum(end <= size for end in ends)
        found += new
    growing.write_bytes(content)
    assert [*found, *reader.take()] == read_events(path)
    assert calls > 100


def test_a_growing_log_that_is_changed_is_refused_with_its_line(path: Path) -> None:
    content = path.read_bytes()
    first, second, third = content.splitlines(keepends=True)[:3]
    growing = path.with_name("growing.jsonl")
    reader = GrowingLog(growing)
    growing.write_bytes(first + second)
    assert len(reader.take()) == 2
    growing.write_bytes(first + second + second)
    with pytest.raises(Refused, match="LF4301") as caught:
        reader.take()
    assert caught.value.problems[0].where == f"{growing}:3"
    growing.write_bytes(first)
    with pytest.raises(Refused, match="LF4301"):
        reader.take()
    growing.write_bytes(first + second + third)
    assert [event["round"] for event in reader.take()] == [2]


@pytest.mark.parametrize("value", [float("nan"), object(), b"bytes"])
def test_what_has_no_canonical_form_is_refused_and_leaves_the_log_whole(
    path: Path, value: object
) -> None:
    before = path.read_bytes()
    log = EventLog(path)
    head = log.head
    with pytest.raises((ValueError, TypeError)):
        log.emit("reply.accepted", epsilon=value)
    assert log.head == head
    log.emit("reply.accepted", epsilon=1.5)
    log.close()
    assert path.read_bytes().startswith(before)
    assert len(read_events(path, log.head)) == 6


def test_fields_cannot_pose_as_the_chain(tmp_path: Path, ticking: Callable[[], str]) -> None:
    log = EventLog(tmp_path / "events.jsonl", clock=ticking)
    log.emit("reply.refused", previous="0" * 64, time="never")
    log.close()
    (event,) = read_events(tmp_path / "events.jsonl", log.head)
    assert event["previous"] != "0" * 64
    assert event["time"] != "never"


def test_the_default_clock_is_utc_with_milliseconds(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.emit("run.started")
    log.close()
    (event,) = read_events(tmp_path / "events.jsonl")
    assert len(event["time"]) == len("2026-01-01T00:00:00.000+00:00")
    assert event["time"].endswith("+00:00")
