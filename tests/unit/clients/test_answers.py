"""What is asked twice is trained once: also after the site was killed in between."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from lepton_fed.clients.answers import Answers
from lepton_fed.config.schema import Budget
from lepton_fed.core.exchange import MODEL, ask_digest
from lepton_fed.core.task import ModelSpec, TrainingSpec
from lepton_fed.errors import Refused
from lepton_fed.strategies.base import DELTA, PlainSite
from tests.unit.clients.test_site import DP, TASK, agreed, ask, build, charged, refusal

__all__ = ["build"]  # a fixture

BUDGET = Budget(epsilon=30.0, delta=1e-5)


@dataclass(frozen=True)
class Counting(PlainSite):
    """Keeps at the site how often it trained, and sends it."""

    def begin(self, start, received, state):
        return state

    def update(self, memory, delta, steps, learning_rate):
        times = memory.get("times", np.zeros(1, np.float32)) + np.float32(1)
        return {DELTA: delta * times}, {"times": times}


@pytest.fixture
def restart(build, tmp_path):
    """Build the site as a new process would: nothing is shared but its folder."""
    sites = []

    def one(privacy=None, task=TASK, rule=None, folder="answers", **more):
        for site in sites:
            site.close()
        agreement = agreed(task, privacy)
        answers = Answers(tmp_path / folder, agreement.digest)
        sites.append(build(task, rule, privacy, agreement=agreement, answers=answers, **more))
        return sites[-1]

    return one


def same(one, other):
    vectors, others = one.update.vectors, other.update.vectors
    assert {n: v.tobytes() for n, v in vectors.items()} == {
        n: v.tobytes() for n, v in others.items()
    }
    assert replace(one.update, vectors={}) == replace(other.update, vectors={})
    assert (one.epsilon, one.noise_multiplier) == (other.epsilon, other.noise_multiplier)
    assert (one.counts is None) == (other.counts is None)
    assert one.counts is None or one.counts.tobytes() == other.counts.tobytes()


def test_the_same_ask_after_a_restart_gets_the_same_noise_and_is_charged_once(restart, tmp_path):
    wanted = ask(privacy=DP)
    first = restart(DP, budget=BUDGET).answer(wanted)
    again = restart(DP, budget=BUDGET).answer(replace(wanted, limit_s=77.0))
    same(first, again)
    assert (first.again, again.again) == (False, True)
    assert len(charged(tmp_path)) == 1


def test_without_the_stored_answer_it_is_charged_twice_and_has_other_noise(restart, tmp_path):
    wanted = ask(privacy=DP)
    first = restart(DP, budget=Budget(epsilon=100.0)).answer(wanted)
    again = restart(DP, budget=Budget(epsilon=100.0), folder="others").answer(wanted)
    assert not again.again
    assert again.update.vectors[DELTA].tobytes() != first.update.vectors[DELTA].tobytes()
    assert len(charged(tmp_path)) == 2


def test_the_same_ask_is_answered_again_by_the_same_process_too(restart):
    site = restart()
    same(site.answer(ask(evaluate=True)), site.answer(ask(evaluate=True)))


@pytest.mark.parametrize("change", ["model", "evaluate", "earlier round", "another vector"])
def test_another_ask_for_a_trained_round_is_refused_after_a_restart_too(restart, tmp_path, change):
    first = ask(privacy=DP, round_number=2)
    restart(DP, budget=BUDGET).answer(first)
    other = {
        "model": replace(first, vectors={MODEL: first.vectors[MODEL] + np.float32(1e-3)}),
        "evaluate": replace(first, evaluate=True),
        "earlier round": replace(first, round_number=1),
        "another vector": replace(first, vectors={**first.vectors, "c": first.vectors[MODEL]}),
    }[change]
    assert refusal(restart(DP, budget=BUDGET).answer(other)).code == "LF4506"
    assert len(charged(tmp_path)) == 1


def test_what_stays_at_a_site_is_there_after_a_restart(restart):
    undisturbed = restart(rule=Counting(), folder="one")
    expected = [undisturbed.answer(ask(round_number=number)) for number in (1, 2, 3)]
    found = [restart(rule=Counting(), folder="two").answer(ask(round_number=n)) for n in (1, 2, 3)]
    for one, other in zip(expected, found, strict=True):
        same(one, other)


def test_local_tensors_are_those_after_the_round_also_when_it_is_asked_again(restart):
    task = replace(TASK, model=ModelSpec("linear", local=["1.bias"]))
    task = replace(task, training=TrainingSpec(batch_size=8, learning_rate=0.5))
    undisturbed = restart(task=task, folder="one")
    expected = [undisturbed.answer(ask(task, round_number=number)) for number in (1, 2)]
    restart(task=task, folder="two").answer(ask(task))
    same(restart(task=task, folder="two").answer(ask(task)), expected[0])
    same(restart(task=task, folder="two").answer(ask(task, round_number=2)), expected[1])


def test_what_cannot_be_kept_does_not_leave(restart, tmp_path):
    (tmp_path / "answers").write_text("in the way")
    assert refusal(restart(folder="answers").answer(ask())).code in ("LF5209", "LF5210")


@pytest.mark.parametrize("how", ["cut", "zeros", "gone"])
@pytest.mark.parametrize("changed", [False, True])
def test_a_round_without_its_answer_is_refused_and_the_next_is_trained(
    restart, tmp_path, how, changed
):
    budget, wanted = Budget(epsilon=100.0), ask(privacy=DP)
    restart(DP, budget=budget).answer(wanted)
    (path,) = (tmp_path / "answers").glob("*.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[:-3] if how == "cut" else bytes(len(content)))
    if how == "gone":
        path.unlink()
    if changed:
        wanted = replace(wanted, vectors={MODEL: wanted.vectors[MODEL] + np.float32(1e-3)})
    site = restart(DP, budget=budget)
    assert refusal(site.answer(wanted)).code == "LF4506"
    assert len(charged(tmp_path)) == 1
    assert site.answer(ask(privacy=DP, round_number=2)).update is not None
    assert len(charged(tmp_path)) == 2


def test_an_answer_that_goes_while_the_site_runs_is_not_trained_anew(restart, tmp_path):
    site = restart(DP, budget=BUDGET)
    site.answer(ask(privacy=DP))
    (path,) = (tmp_path / "answers").glob("*.safetensors")
    path.unlink()
    assert refusal(site.answer(ask(privacy=DP))).code == "LF4506"
    assert len(charged(tmp_path)) == 1


def test_an_older_answer_put_back_is_not_taken_for_the_newest(restart, tmp_path):
    site = restart(DP, budget=Budget(epsilon=100.0))
    site.answer(ask(privacy=DP))
    (path,) = (tmp_path / "answers").glob("*.safetensors")
    older = path.read_bytes()
    site.answer(ask(privacy=DP, round_number=2))
    path.write_bytes(older)
    site = restart(DP, budget=Budget(epsilon=100.0))
    for number in (1, 2):
        assert refusal(site.answer(ask(privacy=DP, round_number=number))).code == "LF4506"
    assert len(charged(tmp_path)) == 2


@pytest.mark.parametrize("content", [None, b"", bytes(90), b'{"ask": "x"}'])
def test_killed_before_the_record_the_answer_tells_and_the_record_is_made_up_for(
    restart, tmp_path, content
):
    first = restart(DP, budget=BUDGET).answer(ask(privacy=DP))
    (record,) = (tmp_path / "answers").glob("*.json")
    expected = record.read_bytes()
    record.unlink() if content is None else record.write_bytes(content)
    same(first, restart(DP, budget=BUDGET).answer(ask(privacy=DP)))
    assert record.read_bytes() == expected
    assert len(charged(tmp_path)) == 1


def test_a_record_of_the_round_before_is_made_up_for(restart, tmp_path):
    site = restart()
    site.answer(ask())
    (record,) = (tmp_path / "answers").glob("*.json")
    before = record.read_bytes()
    second = site.answer(ask(round_number=2))
    after = record.read_bytes()
    record.write_bytes(before)
    same(second, restart().answer(ask(round_number=2)))
    assert record.read_bytes() == after != before


def test_without_answer_and_with_a_broken_record_the_run_is_refused(restart, tmp_path):
    restart(DP, budget=BUDGET).answer(ask(privacy=DP))
    folder = tmp_path / "answers"
    (path,), (record,) = folder.glob("*.safetensors"), folder.glob("*.json")
    path.unlink()
    record.write_bytes(bytes(90))
    with pytest.raises(Refused) as caught:
        restart(DP, budget=BUDGET)
    assert caught.value.code == "LF4506"
    assert len(charged(tmp_path)) == 1
    record.unlink()
    restart(DP, budget=BUDGET)  # the ledger was let go of


def test_answers_of_the_newest_runs_are_kept_and_nothing_half_written(build, tmp_path):
    folder = tmp_path / "answers"
    folder.mkdir()
    (folder / ".0123.partial").write_text("half")
    for number in range(6):
        agreement = replace(agreed(), run=f"run-{number}")
        site = build(agreement=agreement, answers=Answers(folder, agreement.digest))
        assert site.answer(ask(agreement=agreement.digest)).update is not None
    names = {path.stem for path in folder.glob("*.safetensors")}
    assert len(names) == 4
    assert len(list(folder.glob("*.json"))) == 6
    assert replace(agreed(), run="run-5").digest in names
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("changed", [False, True])
def test_after_many_other_runs_an_answered_round_is_refused_and_costs_nothing(
    build, tmp_path, changed
):
    folder = tmp_path / "answers"

    def asked(run, **changes):
        agreement = replace(agreed(privacy=DP), run=run)
        site = build(
            privacy=DP, agreement=agreement, answers=Answers(folder, agreement.digest),
            budget=Budget(epsilon=1000.0),
        )  # fmt: skip
        reply = site.answer(ask(agreement=agreement.digest, **changes))
        site.close()
        return reply

    for number in range(6):
        assert asked(f"run-{number}").update is not None
    before = charged(tmp_path)
    other = {"vectors": {MODEL: ask().vectors[MODEL] + np.float32(1e-3)}} if changed else {}
    assert refusal(asked("run-0", **other)).code == "LF4506"
    assert charged(tmp_path) == before
    assert asked("run-0", round_number=2).update is not None
    assert asked("run-5").again


def test_the_digest_of_an_ask_is_over_all_that_decides_the_answer():
    one = ask()
    changes = [
        {"agreement": "a"}, {"layout": "l"}, {"round_number": 2}, {"train": False},
        {"evaluate": True}, {"vectors": {}}, {"vectors": {"c": one.vectors[MODEL]}},
        {"vectors": {MODEL: one.vectors[MODEL] + 1}}, {"clip": 1.0},
    ]  # fmt: skip
    digests = {ask_digest(replace(one, **change)) for change in changes}
    assert len(digests | {ask_digest(one)}) == len(changes) + 1
    assert ask_digest(replace(one, limit_s=3.0)) == ask_digest(one)
