"""Receipts: what left is written down first, exactly, and no later change goes unseen."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lepton_fed.clients import receipts as receipts_module
from lepton_fed.clients.receipts import Receipt, Receipts, receipt_of, receipt_of_phase
from lepton_fed.core.exchange import Ask, PhaseAsk, PhaseReply, Reply, Update
from lepton_fed.errors import Problem, Refused, RunError
from lepton_fed.privacy.dp.accounting import terms
from lepton_fed.runs import files

ASK = Ask("a" * 64, "l", 3, True, True, {})
ABOUT = {
    "time": "2026-01-05T12:00:00+00:00",
    "site": "north",
    "coordinator": "lusab-babad",
    "address": "fed.example.org:9092",
    "run": "20260105T120000Z-digits-24fe",
    "task": "b" * 64,
    "policy": "c" * 64,
}
VECTOR = np.array([3, 4], np.float32)
REPLY = Reply(
    "north",
    Update("l", {"delta": VECTOR}, 1.0, {"delta": 50.0}),
    np.ones(7),
    epsilon=0.1234567890123,
    noise_multiplier=1.5,
)


def receipt(**changes):
    return replace(receipt_of(REPLY, ASK, ABOUT), **changes)


@pytest.fixture
def kept(tmp_path):
    """Three receipts, written."""
    found = Receipts(tmp_path / "state" / "receipts")
    for number in (1, 2, 3):
        found.write(receipt(round=number))
    return found


def paths(kept):
    return sorted(kept._folder.glob("*.json"))


def test_what_an_epsilon_depends_on_stands_beside_it_and_nowhere_else():
    said = terms("poisson", 1e-5)
    numbers = receipt_of(REPLY, ASK, ABOUT, said).numbers
    assert numbers["epsilon holds for"] == said
    for part in ("delta 1e-05", "add-or-remove-one", "poisson", "PLD at grid 0.001"):
        assert part in said
    assert "zero-out-one" in terms("full", 1e-5)
    silent = replace(REPLY, epsilon=None)
    assert "epsilon holds for" not in receipt_of(silent, ASK, ABOUT, said).numbers


def test_what_covers_a_whole_site_stands_beside_its_update_and_nowhere_else():
    said = {"client-level DP": "this site's whole part in the run", "client-level epsilon": "8.0"}
    numbers = receipt_of(REPLY, ASK, ABOUT, client=said).numbers
    assert {name: numbers.get(name) for name in said} == said
    counts = replace(REPLY, update=None)
    for bare in (receipt_of(counts, ASK, ABOUT, client=said), receipt_of(REPLY, ASK, ABOUT)):
        assert not said.keys() & bare.numbers.keys()


def test_a_receipt_holds_what_left_with_every_digit():
    found = receipt_of(REPLY, ASK, ABOUT)
    vector = found.vectors["delta"]
    assert (vector.elements, vector.bytes) == (2, 8)
    assert (vector.norm_before, vector.norm_after) == (50.0, 5.0)
    assert vector.sha256 == hashlib.sha256(VECTOR.astype("<f4").tobytes()).hexdigest()
    assert found.numbers == {
        "weight": "1.0",
        "evaluation": "7 counts on held-out rows",
        "epsilon": "0.1234567890123",
        "noise multiplier": "1.5",
    }
    assert (found.run, found.round, found.agreement) == (ABOUT["run"], 3, "a" * 64)
    assert (found.task, found.policy, found.refusal) == ("b" * 64, "c" * 64, "")


def test_under_dp_a_receipt_lists_what_epsilon_does_not_cover():
    listed = receipt_of(REPLY, ASK, ABOUT, noised=True).numbers["outside epsilon"]
    assert [word.split(" (")[0] for word in listed.split(", ")] == [
        "evaluation", "epsilon", "noise multiplier",
    ]  # fmt: skip
    silent = replace(REPLY, counts=None, epsilon=None, noise_multiplier=None)
    for numbers in (
        receipt_of(silent, ASK, ABOUT, noised=True).numbers,
        receipt_of(REPLY, ASK, ABOUT).numbers,  # without DP there is no epsilon to be outside of
    ):
        assert "outside epsilon" not in numbers


def test_a_row_count_as_weight_is_written_in_full():
    counted = replace(REPLY, update=replace(REPLY.update, weight=12_345_678.0))
    assert receipt_of(counted, ASK, ABOUT).numbers["weight"] == "12345678.0"


def test_of_a_refusal_the_code_is_written_and_what_leaves_with_it():
    found = receipt_of(Reply("north", refusal=Problem("LF4605", "x"), epsilon=1.0), ASK, ABOUT)
    assert (found.refusal, found.vectors, found.numbers) == ("LF4605", {}, {"epsilon": "1.0"})


def test_a_vector_that_was_not_clipped_has_its_norm_twice():
    plain = replace(REPLY, update=replace(REPLY.update, norms={}))
    vector = receipt_of(plain, ASK, ABOUT).vectors["delta"]
    assert vector.norm_before == vector.norm_after == 5.0


def test_receipts_are_read_back_as_they_were_written_in_order(kept):
    assert [found.round for found in kept.read()] == [1, 2, 3]
    assert replace(kept.read()[2], previous="") == receipt(round=3)
    assert [path.name for path in paths(kept)] == [
        f"0000000{number}-{ABOUT['run']}-round-000{number}.json" for number in (1, 2, 3)
    ]


def test_receipts_of_before_they_had_a_ledger_s_head_are_read_and_gone_on_from(tmp_path):
    found = Receipts(tmp_path / "receipts")
    path = found.write(receipt(round=1))
    content = path.read_bytes()
    assert b'"ledger":"",' in content
    path.write_bytes(content.replace(b'"ledger":"",', b""))
    again = Receipts(tmp_path / "receipts")
    again.write(receipt(round=2))
    assert [(each.round, each.ledger) for each in again.read()] == [(1, ""), (2, "")]


def test_another_process_goes_on_with_the_chain(kept):
    Receipts(kept._folder).write(receipt(round=4))
    assert [found.round for found in kept.read()] == [1, 2, 3, 4]


def test_no_receipts_are_no_error(tmp_path):
    none = Receipts(tmp_path / "nowhere")
    assert none.read() == []
    assert none.head() == hashlib.sha256(b"lepton-fed receipts 1").hexdigest()


def test_the_chain_is_the_hash_of_the_file_before(kept):
    previous = hashlib.sha256(b"lepton-fed receipts 1").hexdigest()
    for path in paths(kept):
        assert json.loads(path.read_bytes())["previous"] == previous
        previous = hashlib.sha256(path.read_bytes()).hexdigest()
    assert kept.head() == previous


def test_another_answer_in_a_round_makes_another_receipt_and_overwrites_none(kept):
    before = [path.read_bytes() for path in paths(kept)]
    kept.write(receipt(round=3, numbers={"sent again": "the stored answer"}))
    assert [path.read_bytes() for path in paths(kept)][:3] == before
    assert [found.round for found in kept.read()] == [1, 2, 3, 3]


def test_what_leaves_again_has_its_receipt_already_after_a_restart_too(kept, monkeypatch):
    said = []
    monkeypatch.setattr(receipts_module._log, "info", lambda text, *of: said.append(text % of))
    first = paths(kept)[1]
    for writer in (kept, Receipts(kept._folder)):
        assert writer.write(receipt(round=2, time="2026-01-06T12:00:00+00:00")) == first
    assert len(paths(kept)) == 3
    assert [first.name in line for line in said] == [True, True]


@pytest.mark.parametrize("field", sorted(set(Receipt.__dataclass_fields__) - {"time", "previous"}))
def test_a_receipt_that_differs_in_anything_but_its_time_is_written(kept, field):
    others = {"round": 9, "vectors": {}, "numbers": {}}
    kept.write(replace(receipt(round=3), **{field: others.get(field, "other")}))
    assert len(kept.read()) == 4


def refused(attempt, number=3, run=ABOUT["run"]):
    asked = PhaseAsk("share", attempt, b"", replace(ASK, round_number=number))
    reply = PhaseReply("north", refusal=Problem("LF4514", "x"))
    return receipt_of_phase(reply, asked, {**ABOUT, "run": run})


def test_refusals_of_a_round_are_counted_and_no_more_are_written_than_so_many(tmp_path):
    kept = Receipts(tmp_path / "receipts")
    for attempt in range(40):
        path = kept.write(refused(attempt))
        assert (path is None) == (attempt >= 32)
    assert len(kept.read()) == 32
    again = Receipts(kept._folder)
    assert again.write(refused(99)) is None, "nor by the process after it"
    assert again.write(refused(5)) is not None, "what has a receipt has it"
    assert len(kept.read()) == 32
    for other in (
        refused(1, number=4),
        refused(1, run="another"),
        receipt(),
        replace(refused(99), numbers={"phase": "share, attempt 99", "epsilon": "1.0"}),
        replace(refused(99), vectors=receipt().vectors),
    ):
        before = len(kept.read())
        assert again.write(other) is not None
        assert len(kept.read()) == before + 1, "more than a code of that round has left"


def test_the_folder_is_listed_once_however_many_receipts_are_written(kept, monkeypatch):
    listed, listdir = [], os.listdir
    monkeypatch.setattr(
        receipts_module.os, "listdir", lambda path: listed.append(path) or listdir(path)
    )
    again = Receipts(kept._folder)
    for number in range(10, 30):
        again.write(receipt(round=number))
    assert len(listed) == 1
    assert len(again.read()) == 23


def test_after_a_write_that_failed_late_the_chain_goes_on_from_what_is_on_disk(kept, monkeypatch):
    write = receipts_module.write_atomic

    def late(path, content):
        write(path, content)
        raise RunError(Problem("LF5209", "its folder cannot be synced"))

    monkeypatch.setattr(receipts_module, "write_atomic", late)
    with pytest.raises(RunError):
        kept.write(receipt(round=4))
    monkeypatch.undo()
    kept.write(receipt(round=5))
    assert [found.round for found in kept.read()] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("tamper", "place"),
    [
        (lambda files: files[0].unlink(), "00000002"),
        (lambda files: files[1].unlink(), "00000003"),
        (lambda files: _replace(files[0], b"50.0", b"5.0"), "00000002"),
        (lambda files: _replace(files[1], b"}", b"} "), "00000003"),
        (lambda files: files[2].write_bytes(b"{}"), "00000003"),
        (lambda files: files[2].write_bytes(b"\xff"), "00000003"),
        (lambda files: files[2].write_bytes(b"[" * 100_000), "00000003"),
        (lambda files: files[1].rename(files[1].with_name("00000004-x.json")), "00000003"),
        (lambda files: _copy(files[0], "00000000-x.json"), "00000001"),
        (lambda files: _copy(files[2], "00000004-x.json"), "00000004"),
    ],
)
def test_a_changed_missing_moved_or_added_receipt_is_found_where_the_chain_breaks(
    kept, tamper, place
):
    tamper(paths(kept))
    with pytest.raises(Refused) as caught:
        kept.read()
    (problem,) = caught.value.problems
    assert problem.code == "LF4641"
    assert Path(problem.where).name.startswith(place)


def _replace(path, old, new):
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))


def _copy(path, name):
    path.with_name(name).write_bytes(path.read_bytes())


def test_a_receipt_taken_off_the_end_shows_only_in_the_hash_of_the_last(kept):
    head = kept.head()
    paths(kept)[-1].unlink()
    assert len(kept.read()) == 2
    assert kept.head() != head


@pytest.mark.parametrize(
    "run", ["../../../etc/cron.d/x", "/etc/passwd", "a/b", "..", "", "\x00", "x" * 5000, "a\n", "é"]
)
def test_the_coordinator_s_name_of_a_run_chooses_no_path(tmp_path, run):
    kept = Receipts(tmp_path / "receipts")
    path = kept.write(receipt_of(REPLY, ASK, {**ABOUT, "run": run}))
    assert path.parent == tmp_path / "receipts"
    assert path.name.isascii()
    assert len(path.name) < 200
    assert os.listdir(tmp_path) == ["receipts"]
    (found,) = kept.read()
    assert found.run.isprintable()
    assert len(found.run) <= 128


@pytest.mark.parametrize("number", [-1, 0, 1_000_001, 2**63, 2**64 - 1])
def test_a_round_that_no_run_has_is_written_as_0_and_can_be_read_again(tmp_path, number):
    kept = Receipts(tmp_path / "receipts")
    kept.write(receipt_of(REPLY, replace(ASK, round_number=number), ABOUT))
    kept.write(receipt())
    assert [found.round for found in kept.read()] == [0, 3]


@pytest.mark.parametrize("agreement", ["\ud800", "\x1b[2J", "x" * 100_000, ""], ids=range(4))
def test_an_unknown_agreement_is_cut_to_size(tmp_path, agreement):
    kept = Receipts(tmp_path / "receipts")
    kept.write(receipt_of(REPLY, replace(ASK, agreement=agreement), ABOUT))
    (found,) = kept.read()
    assert found.agreement.isprintable()
    assert len(found.agreement) <= 64


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_what_could_not_be_read_again_is_refused_before_it_leaves(kept, norm):
    wrong = replace(REPLY, update=replace(REPLY.update, norms={"delta": norm}))
    with pytest.raises(Refused) as caught:
        kept.write(receipt_of(wrong, ASK, ABOUT))
    assert caught.value.code == "LF4642"
    kept.write(receipt(round=4))
    assert [found.round for found in kept.read()] == [1, 2, 3, 4]


def test_a_receipt_after_the_last_number_is_refused_not_lost(kept):
    last = paths(kept)[-1]
    last.rename(last.with_name(last.name.replace("00000003", "99999999")))
    with pytest.raises(Refused) as caught:
        Receipts(kept._folder).write(receipt())
    assert caught.value.code == "LF4642"
    assert len(kept.read()) == 3


def test_file_and_folder_are_synced_before_write_returns(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync

    def watched(number):
        synced.append(os.readlink(f"/proc/self/fd/{number}"))
        fsync(number)

    monkeypatch.setattr(files.os, "fsync", watched)
    folder = tmp_path / "state" / "receipts"
    Receipts(folder).write(receipt())
    assert [path for path in synced if not path.endswith(".partial")] == [
        str(folder.parent),
        str(folder),
    ]
    assert sum(path.endswith(".partial") for path in synced) == 1


def test_the_folder_is_the_owner_s_only(kept):
    assert kept._folder.stat().st_mode & 0o777 == 0o700


def test_a_disk_that_fails_is_a_located_error_and_nothing_is_half_written(kept, monkeypatch):
    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(receipts_module.os, "fsync", full)
    with pytest.raises(RunError) as caught:
        kept.write(receipt(round=4))
    assert caught.value.code == "LF5209"
    monkeypatch.undo()
    assert len(kept.read()) == 3
    assert len(os.listdir(kept._folder)) == 3


def test_a_receipt_is_json_that_holds_no_row_and_all_its_fields(kept):
    content = json.loads(paths(kept)[0].read_bytes())
    assert set(content) == set(Receipt.__dataclass_fields__)


def test_a_receipt_of_a_phase_says_what_left_and_who_signed():
    packed = np.arange(12, dtype=np.uint8)
    reply = PhaseReply(
        "north", b"{}", packed, sent_bytes=12, words=3, norms=(50.0, 5.0),
        notes={"signed by": "north, south"},
    )  # fmt: skip
    found = receipt_of_phase(reply, PhaseAsk("mask", 2, b"{}", ASK), ABOUT)
    vector = found.vectors["masked"]
    assert (vector.elements, vector.bytes) == (3, 12)
    assert (vector.norm_before, vector.norm_after) == (50.0, 5.0)
    assert vector.sha256 == hashlib.sha256(packed.tobytes()).hexdigest()
    assert found.numbers == {
        "phase": "mask, attempt 2",
        "message": f"2 bytes, SHA-256 {hashlib.sha256(b'{}').hexdigest()}",
        "signed by": "north, south",
    }
    assert (found.run, found.round, found.agreement) == (ABOUT["run"], 3, "a" * 64)
    assert found.refusal == ""


def test_messages_that_read_alike_and_differ_have_a_receipt_each(kept):
    """Envelopes for the same sites, of a round and of the evaluation after it."""
    asked, notes = PhaseAsk("share", 1, b"{}", ASK), {"cohort": "north, south"}
    replies = [PhaseReply("north", body, notes=notes) for body in (b"[1]", b"[2]", b"[1]")]
    first, second, again = (kept.write(receipt_of_phase(r, asked, ABOUT)) for r in replies)
    assert first == again != second


@pytest.mark.parametrize(("number", "attempt"), [(0, 0), (-1, -9), (2**63 - 1, 2**63 - 1)])
def test_a_receipt_of_a_phase_can_be_read_again_whatever_was_asked(kept, number, attempt):
    asked = PhaseAsk(
        "reveal", attempt, b"", replace(ASK, round_number=number, agreement="\x1b" * 99)
    )
    refused = PhaseReply("north", refusal=Problem("LF4514", "x"), accused="south")
    kept.write(receipt_of_phase(refused, asked, {**ABOUT, "run": "../" * 99}))
    found = kept.read()[-1]
    assert (found.round, found.refusal, found.vectors) == (0, "LF4514", {})
    assert found.numbers == {"phase": f"reveal, attempt {attempt}"}
    assert found.agreement == "?" * 64
