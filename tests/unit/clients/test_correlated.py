"""A site with correlated noise: one run of the mechanism, whatever is killed or taken away."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from lepton_fed.clients.answers import Answers
from lepton_fed.config.schema import Budget, Policy, Privacy, RecordPrivacy
from lepton_fed.core.task import ModelSpec, TrainingSpec
from lepton_fed.errors import Problem, Refused, RunError, TaskError
from lepton_fed.privacy.dp.accounting import epsilon_of, event_of
from lepton_fed.privacy.dp.step_noise import CorrelatedSteps
from lepton_fed.privacy.factorisation.mechanism import FixedOrder, largest_band
from lepton_fed.privacy.factorisation.noise import CorrelatedNoise
from lepton_fed.privacy.factorisation.toeplitz import square_root
from lepton_fed.privacy.ledger.ledger import Ledger
from lepton_fed.strategies.base import DELTA, PlainSite
from lepton_fed.training import local
from lepton_fed.training.kit import build_kit
from tests.ledger_entries import charges_in, entries_in
from tests.unit.clients.test_site import SEED, TASK, agreed, ask, build, dataset, refusal

__all__ = ["build"]  # a fixture

ROUNDS = 12
RECORD = RecordPrivacy(
    enabled=True, epsilon=3.0, delta=1e-5, clip=0.5, mechanism="dp_ftrl", sampler="full"
)
FTRL = Privacy(RECORD)
STEPS = 3
ROWS = 40
TRAINING = TrainingSpec(steps=STEPS, epochs=None, batch_size=8, learning_rate=1.0)
SMALL = replace(TASK, training=TRAINING)
WIDE = replace(SMALL, model=ModelSpec("mlp", {"hidden": [3000]}))
BUDGET = Budget(epsilon=3.0, delta=1e-5)


def offered(task=SMALL, privacy=FTRL):
    return replace(agreed(task, privacy), rounds=ROUNDS)


def wanted(number, task=SMALL, privacy=FTRL, **changes):
    asked = ask(task, number, privacy=privacy, **changes)
    return replace(asked, agreement=offered(task, privacy).digest)


@pytest.fixture
def restart(build, tmp_path):
    """Build the site as a new process would: nothing is shared but its folder."""
    sites = []

    def one(task=SMALL, privacy=FTRL, rule=None, budget=BUDGET, **more):
        for site in sites:
            site.close()
        agreement = offered(task, privacy)
        answers = Answers(tmp_path / "answers", agreement.digest)
        given = {"agreement": agreement, "answers": answers, "budget": budget, **more}
        sites.append(build(task, rule, privacy, **given))
        return sites[-1]

    return one


@pytest.fixture
def drawn(monkeypatch):
    """Take down which rows each step had."""
    seen = []
    sound = FixedOrder.batches

    def watched(self, steps, entropy):
        for rows in sound(self, steps, entropy):
            seen.append(rows.tolist())
            yield rows

    monkeypatch.setattr(FixedOrder, "batches", watched)
    return seen


def charges(tmp_path):
    return [event_of(body["event"]) for body in charges_in(tmp_path / "north")]


def trained(reply):
    assert reply.refusal is None
    return reply.update.vectors[DELTA]


def stored(tmp_path):
    (path,) = (tmp_path / "answers").glob("*.safetensors")
    return path


def silence(monkeypatch):
    """Let no record contribute, so that what leaves is noise alone."""
    sound = CorrelatedSteps.add

    def silent(self, sums):
        for total in sums:
            total.zero_()
        sound(self, sums)

    monkeypatch.setattr(CorrelatedSteps, "add", silent)


def whitened(noise, order):
    """Return ``C w`` over the deviation it is to have: independent, of deviation 1."""
    coefficients = square_root(order.band)
    fresh = np.zeros_like(noise)
    for back, coefficient in enumerate(coefficients[: len(noise)]):
        fresh[back:] += coefficient * noise[: len(noise) - back]
    return fresh


@pytest.mark.parametrize("killed", [False, True])
def test_what_leaves_has_the_noise_of_one_mechanism(restart, monkeypatch, killed):
    """Of single steps: covariance C**-1 C**-T, over rounds, restarts and repeated asks."""
    silence(monkeypatch)
    task = replace(WIDE, training=replace(TRAINING, steps=1))
    site, left = restart(task), []
    for number in range(1, ROUNDS + 1):
        left.append(trained(site.answer(wanted(number, task))))
        if killed:
            site = restart(task)
            again = site.answer(wanted(number, task))
            assert again.again
            assert trained(again).tobytes() == left[-1].tobytes()
    order = FixedOrder.of(ROWS, 8, ROUNDS, 10**6)
    assert order.band > 3
    noise = -8 * np.stack(left).astype(np.float64)  # the mean over 8 records, times minus the rate
    deviation = site.noise_multiplier * order.mechanism.sensitivity * RECORD.clip
    fresh = whitened(noise, order) / deviation
    size = fresh.shape[1]
    assert size > 10_000
    covariance = fresh @ fresh.T / size
    assert np.abs(covariance - np.eye(ROUNDS)).max() < 6 * np.sqrt(2 / size)
    # And not by chance: the steps themselves are far from independent.
    raw = np.corrcoef(noise)
    assert raw[3, 2] < -0.2


def test_the_order_goes_on_over_rounds_and_restarts(restart, drawn):
    site = restart()
    for number in (1, 2, 5, 6):  # it had no part in two rounds
        site.answer(wanted(number))
        site = restart()
    batches = [list(range(start, start + 8)) for start in range(0, ROWS, 8)]
    assert drawn == [batches[step % 5] for step in range(4 * STEPS)]


def test_the_charges_are_one_gaussian_and_the_reservation_is_the_whole(restart, tmp_path):
    site = restart()
    (reserved,) = entries_in(tmp_path / "north", "reserved")
    whole = event_of(reserved["event"]).times(ROUNDS)
    assert whole.steps == whole.planned == ROUNDS * STEPS
    left = site.budget_left
    for number in range(1, ROUNDS + 1):
        reply = site.answer(wanted(number))
        assert trained(reply).any()
        assert site.budget_left == left, "what is charged was reserved"
    found = charges(tmp_path)
    assert [event.first for event in found] == [STEPS * n for n in range(ROUNDS)]
    assert epsilon_of(found, 1e-5) == epsilon_of([whole], 1e-5) == reply.epsilon
    assert 2.99 < reply.epsilon <= 3.0
    assert reply.noise_multiplier == whole.noise_multiplier
    assert refusal(site.answer(wanted(ROUNDS + 1))).code == "LF4503"


@pytest.mark.parametrize("band", [1, 2, 100])
def test_any_band_goes_on_after_a_restart(restart, tmp_path, band):
    privacy = Privacy(replace(RECORD, band=band))
    for number in range(1, ROUNDS + 1):
        assert trained(restart(privacy=privacy).answer(wanted(number, privacy=privacy))).any()
    found = charges(tmp_path)
    assert 2.99 < epsilon_of(found, 1e-5) <= 3.0
    assert found[-1].band <= band


def test_rounds_without_the_site_are_free_again(restart, tmp_path):
    site = restart(budget=Budget(epsilon=4.0))
    site.answer(wanted(2))
    site.answer(wanted(9))
    found = charges(tmp_path)
    assert [(event.first, event.end) for event in found] == [(0, 3), (3, 6)]
    ledger = site._ledger
    rest = replace(found[0], first=6, steps=9)  # three rounds are left
    assert ledger.left == pytest.approx(4.0 - epsilon_of([*found, rest], 1e-5), abs=1e-9)
    assert ledger.release("run", "the owner")
    assert ledger.left == pytest.approx(4.0 - epsilon_of(found, 1e-5), abs=1e-9)


class Killed(BaseException):
    """The process ends here."""


def kill(*given, **named):
    raise Killed


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("when", ["before training", "before the answer is kept"])
def test_a_round_of_which_nothing_left_is_done_again_and_costs_nothing_more(
    restart, tmp_path, monkeypatch, drawn, number, when
):
    site = restart()
    for before in range(1, number):
        site.answer(wanted(before))
    spent = len(drawn)
    with monkeypatch.context() as patched:
        if when == "before training":
            patched.setattr(site, "_train", kill)
        else:
            patched.setattr(Answers, "keep", kill)
        with pytest.raises(Killed):
            site.answer(wanted(number))
    assert len(charges(tmp_path)) == number
    first = drawn[spent:]
    site = restart()
    epsilon = site.epsilon
    reply = site.answer(wanted(number))
    assert trained(reply).any()
    assert reply.epsilon == epsilon
    assert not first or drawn[-STEPS:] == first
    assert charges(tmp_path)[-1].steps == 0
    for after in range(number + 1, ROUNDS + 1):
        assert site.answer(wanted(after)).refusal is None
    assert site.epsilon <= 3.0


def test_what_is_done_again_has_fresh_noise_and_goes_on_from_before(restart, monkeypatch):
    silence(monkeypatch)
    task = replace(WIDE, training=replace(TRAINING, steps=1))
    site = restart(task)
    left, aborted = [], []
    sound = Answers.keep

    def once(self, kept):
        if kept.round_number == 4 and not aborted:
            aborted.append(kept.reply.update.vectors[DELTA])
            raise Killed
        sound(self, kept)

    monkeypatch.setattr(Answers, "keep", once)
    for number in range(1, ROUNDS + 1):
        try:
            reply = site.answer(wanted(number, task))
        except Killed:
            site = restart(task)
            reply = site.answer(wanted(number, task))
        left.append(trained(reply))
    order = FixedOrder.of(ROWS, 8, ROUNDS, 10**6)
    fresh = whitened(np.stack([*left, aborted[0]]).astype(np.float64)[:ROUNDS], order)
    assert np.abs(np.corrcoef(fresh) - np.eye(ROUNDS)).max() < 0.06
    other = whitened(np.stack([*left[:3], aborted[0]]).astype(np.float64), order)[3]
    assert abs(np.corrcoef(other, fresh[3])[0, 1]) < 0.06, "nothing of it is in what left"


def test_a_full_disk_keeps_the_answer_back_and_the_round_is_done_again(
    restart, tmp_path, monkeypatch
):
    site = restart()
    site.answer(wanted(1))
    past = stored(tmp_path).read_bytes()
    with monkeypatch.context() as patched:

        def full(self, kept):
            raise RunError(Problem("LF5209", "no space"))

        patched.setattr(Answers, "keep", full)
        assert refusal(site.answer(wanted(2))).code == "LF5209"
    assert stored(tmp_path).read_bytes() == past
    assert trained(site.answer(wanted(2))).any()
    found = charges(tmp_path)
    assert [(event.first, event.end) for event in found] == [(0, 3), (3, 6), (6, 6)]


def test_an_answer_that_was_kept_but_could_not_be_noted_is_repeated(restart, tmp_path, monkeypatch):
    site = restart()
    with monkeypatch.context() as patched:

        def broken(self, run, number, training):
            raise RunError(Problem("LF4202", "no space"))

        patched.setattr(Ledger, "note_answer", broken)
        assert refusal(site.answer(wanted(1))).code == "LF4202"
        assert refusal(site.answer(wanted(1))).code == "LF4202"
    assert entries_in(tmp_path / "north", "answered") == []
    for process in (lambda: site, restart):
        reply = process().answer(wanted(1))
        assert reply.again
        assert [body["round"] for body in entries_in(tmp_path / "north", "answered")] == [1]
    assert len(charges(tmp_path)) == 1


@pytest.mark.parametrize("how", ["answer", "answer and record", "broken", "older", "other noise"])
def test_without_the_noise_of_before_no_round_is_trained_any_more(restart, tmp_path, how):
    site = restart()
    folder = tmp_path / "answers"
    site.answer(wanted(1))
    if how == "older":
        shutil.copytree(folder, tmp_path / "copy")
    site.answer(wanted(2))
    if how in ("answer", "answer and record"):
        stored(tmp_path).unlink()
    if how == "answer and record":
        shutil.rmtree(folder)
    if how == "broken":
        stored(tmp_path).write_bytes(stored(tmp_path).read_bytes()[:-3])
    if how == "older":
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "copy", folder)
    site = restart(rows=dataset(ROWS, seed=7)) if how == "other noise" else restart()
    for number in (3, 4):
        assert refusal(site.answer(wanted(number))).code == "LF3350"
    assert len(charges(tmp_path)) == 2
    assert site.epsilon < 3.0


def test_noise_that_is_not_as_it_was_kept_is_refused(restart, tmp_path):
    restart().answer(wanted(1))
    answers = Answers(tmp_path / "answers", offered().digest)
    kept = answers.kept()
    answers.keep(replace(kept, noise=replace(kept.noise, past=kept.noise.past[:-1])))
    assert refusal(restart().answer(wanted(2))).code == "LF3350"
    answers.keep(replace(kept, noise=None))
    assert refusal(restart().answer(wanted(2))).code == "LF3350"
    answers.keep(kept)
    assert restart().answer(wanted(2)).refusal is None


def test_more_charges_than_the_noise_on_disk_is_for_are_refused(restart, tmp_path):
    site = restart()
    site.answer(wanted(1))
    (first,) = charges(tmp_path)
    ahead = replace(first, first=first.end, steps=4 * STEPS)
    site._ledger.charge(ahead, site._run, 2, "another state of this site")
    assert refusal(site.answer(wanted(3))).code == "LF3350"


@dataclass(frozen=True)
class Failing(PlainSite):
    """Fails in its second round, after the steps."""

    calls: list = field(default_factory=list)

    def update(self, memory, delta, steps, learning_rate):
        self.calls.append(steps)
        if len(self.calls) == 2:
            raise ValueError("something of this site")
        return super().update(memory, delta, steps, learning_rate)


def test_a_round_that_failed_after_its_noise_was_drawn_ends_the_training(restart, tmp_path):
    """Its refusal is made of noise that another attempt would not have."""
    rule = Failing()
    site = restart(rule=rule)
    assert site.answer(wanted(1)).refusal is None
    assert refusal(site.answer(wanted(2))).code == "LF5301"
    for _ in range(2):
        for number in (2, 3):
            assert refusal(site.answer(wanted(number))).code == "LF3350"
        site = restart(rule=rule)
    assert len(charges(tmp_path)) == 2
    assert len(rule.calls) == 2


def test_more_steps_than_were_planned_are_refused_and_never_trained_without_noise(
    restart, monkeypatch
):
    site = restart()
    site._correlated._order = replace(site._correlated._order, planned=STEPS, band=1)
    assert site.answer(wanted(1)).refusal is None
    calls = []
    monkeypatch.setattr(local, "DpSgd", lambda *a, **k: calls.append(1))
    assert refusal(site.answer(wanted(2))).code == "LF3351"
    assert calls == []


def test_the_noise_on_disk_takes_what_the_documentation_says(restart, tmp_path):
    site = restart(WIDE)
    site.answer(wanted(1, WIDE))
    kept = Answers(tmp_path / "answers", offered(WIDE).digest).kept()
    size = build_kit(WIDE, SEED).noised_size
    band = FixedOrder.of(ROWS, 8, ROUNDS * STEPS, 10**6).band
    assert kept.noise.past.nbytes == (band - 1) * 4 * size
    assert kept.noise.step == STEPS
    few = Privacy(replace(RECORD, band=3))
    site = restart(WIDE, few, budget=Budget(epsilon=9.0))
    site.answer(wanted(1, WIDE, few))
    kept = Answers(tmp_path / "answers", offered(WIDE, few).digest).kept()
    assert kept.noise.past.shape == (2, size)
    assert charges(tmp_path)[-1].band in (2, 3)


def test_after_the_last_step_no_noise_is_on_disk(restart, tmp_path):
    site = restart()
    for number in range(1, ROUNDS + 1):
        site.answer(wanted(number))
        kept = Answers(tmp_path / "answers", offered().digest).kept()
        assert bool(kept.noise.past.size) is (number < ROUNDS)
    last = kept.reply.update.vectors[DELTA]
    again = restart().answer(wanted(ROUNDS))
    assert again.again
    assert trained(again).tobytes() == last.tobytes()


def test_a_second_state_folder_cannot_train_at_the_cost_of_the_first(build, tmp_path):
    """Both have charged and drawn noise for the same steps before either has answered."""
    budget = Budget(epsilon=9.0, delta=1e-5)
    common = {"agreement": offered(), "budget": budget}

    def at(folder):
        answers = Answers(tmp_path / folder, offered().digest)
        return build(SMALL, None, FTRL, answers=answers, **common)

    one, two = at("one"), at("two")
    sound, late = two._train, []

    def overtaken(*given):
        late.append(one.answer(wanted(1)))
        return sound(*given)

    two._train = overtaken
    assert refusal(two.answer(wanted(1))).code == "LF3350"
    assert trained(late[0]).any()
    assert [event.steps for event in charges(tmp_path)] == [STEPS, 0]
    for site in (two, at("two")):  # what it kept does not leave later either
        for number in (1, 2):
            assert refusal(site.answer(wanted(number))).code == "LF3350"
    assert trained(at("one").answer(wanted(2))).any()
    assert [event.end for event in charges(tmp_path)] == [STEPS, STEPS, 2 * STEPS]


def test_what_another_plan_was_charged_pays_for_nothing(restart, tmp_path, monkeypatch):
    """Rows came between a charge and its answer: of them, as many steps cost something else."""
    with monkeypatch.context() as patched:
        site = restart(rows=dataset(8), budget=Budget(epsilon=9.0))
        patched.setattr(Answers, "keep", kill)
        with pytest.raises(Killed):
            site.answer(wanted(1))
    site = restart(budget=Budget(epsilon=9.0))
    assert trained(site.answer(wanted(1))).any()
    before, after = charges(tmp_path)
    assert (before.first, before.steps, before.separation) == (0, STEPS, 1)
    assert (after.first, after.steps, after.separation) == (0, STEPS, 5)
    assert epsilon_of([after], 1e-5) > 1.15 * epsilon_of([before], 1e-5), "or this tests nothing"


def test_what_another_data_set_was_charged_pays_for_nothing(restart, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        site = restart()
        patched.setattr(Answers, "keep", kill)
        with pytest.raises(Killed):
            site.answer(wanted(1))
    site = restart()
    site._ledger._dataset = "south"
    assert trained(site.answer(wanted(1))).any()
    assert [event.steps for event in charges(tmp_path)] == [STEPS, STEPS]


def test_the_owner_bounds_what_past_noise_takes_before_any_is_made(restart, tmp_path, monkeypatch):
    size = build_kit(WIDE, SEED).noised_size
    wide = Privacy(replace(RECORD, band=8))
    most = FixedOrder.of(ROWS, 8, ROUNDS * STEPS, 8).past_bytes(size)
    assert most > size, "or this tests nothing"
    with monkeypatch.context() as patched:
        patched.setattr(CorrelatedNoise, "__init__", kill)
        with pytest.raises(Refused, match="LF4623") as refused:
            restart(WIDE, wide, noise_bytes=most - 1)
        assert refused.value.problems[0].key == "policy.noise_bytes"
    assert not (tmp_path / "north" / "ledger.sqlite").exists(), "nothing was set aside"
    site = restart(WIDE, wide, noise_bytes=most)
    assert trained(site.answer(wanted(1, WIDE, wide))).any()
    kept = Answers(tmp_path / "answers", offered(WIDE, wide).digest).kept()
    assert kept.noise.past.nbytes == most
    alone = Privacy(replace(RECORD, band=1))
    assert restart(WIDE, alone, noise_bytes=0, budget=Budget(epsilon=9.0)).noise_multiplier


def test_the_default_band_takes_what_owners_allow_by_default():
    for size in (1, 40, 10**6, 2**26, 2**26 + 1, 10**9):
        order = FixedOrder(10**5, 1, 10**5, min(largest_band(size), 10**5))
        assert order.past_bytes(size) <= Policy().noise_bytes


def test_noise_beyond_the_machines_memory_is_a_clear_error(restart, monkeypatch):
    monkeypatch.setattr("lepton_fed.training.noise.os.sysconf", lambda name: 100)
    with pytest.raises(TaskError, match="LF3352"):
        restart(WIDE)
