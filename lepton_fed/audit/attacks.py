"""Attacks on a run: what can be told of records from what its coordinator receives in a round."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt
import torch

from lepton_fed.audit.claims import Claims
from lepton_fed.audit.inversion import class_means, divided, error_of, matched
from lepton_fed.audit.mechanism import Mechanism, mechanism_of
from lepton_fed.audit.membership import confidence, lira, most_true_positives
from lepton_fed.audit.one_round import OneRound, as_trained_by, of_one_record
from lepton_fed.audit.report import Attack, Attacks
from lepton_fed.audit.rows import mislabelled, rows_for
from lepton_fed.audit.unmixing import Unmixing
from lepton_fed.core.exchange import Reply
from lepton_fed.core.layout import Vector
from lepton_fed.data.dataset import Dataset
from lepton_fed.models.build import write_local, write_vector
from lepton_fed.privacy.client import with_client_noise
from lepton_fed.training.kit import TaskKit, build_kit

__all__ = ["attack"]

_CPU = torch.device("cpu")
_MOST_RECORDS = 400
_LEAST_RECORDS = 40
_MOST_OTHERS = 2000  # rows of the other sites, and for class means
_SITES = 8  # whose updates stand for those of the others in a sum
_TRIALS = 8


@dataclass(frozen=True)
class _Setting:
    """What both attacks go by.

    Args:
        claims: The run's.
        mechanism: What its sites did in a round of record-level DP; None without.
        kit: The task's kit.
        draws: Whom is attacked.
        rows: Rows to attack, in random order.
        others: Updates of other sites; empty where updates are received one by one.
    """

    claims: Claims
    mechanism: Mechanism | None
    kit: TaskKit
    draws: np.random.Generator
    rows: Dataset
    others: tuple[Reply, ...]

    def drawn(self, count: int) -> list[Reply]:
        """Return updates of so many other sites."""
        if not count:
            return []
        picked = self.draws.choice(len(self.others), count, replace=count > len(self.others))
        return [self.others[number] for number in picked]


def attack(claims: Claims, shadows: int = 64) -> Attacks:
    """Attack a round of a run, trained anew.

    Args:
        claims: What the run says, and its ledgers.
        shadows: How many models are trained to tell members; each is attacked too.

    Raises:
        LeptonError: The run's task cannot be trained here, its record is not whole, or its rows
            cannot be read.
    """
    began = time.perf_counter()
    draws = np.random.default_rng()
    agreement = claims.agreement
    kit = build_kit(agreement.task, agreement.seed)
    agreement = with_client_noise(agreement, kit.layout.size)
    mechanism = mechanism_of(claims) if claims.record.enabled else None
    data, whose = rows_for(claims, draws)
    records = min(_MOST_RECORDS, len(data) // 2)
    if mechanism is not None:  # a site refuses more rows than one over delta
        records = min(records, int(1.0 / claims.record.delta))
    rows = data.take(np.arange(records))
    rest = data.take(np.arange(records, min(len(data), records + _MOST_OTHERS)))
    with TemporaryDirectory(prefix="lepton-fed-attack-") as folder:
        one = OneRound(as_trained_by(agreement, mechanism, records // 2), kit, Path(folder) / "a")
        lone = OneRound(of_one_record(agreement, mechanism), kit, Path(folder) / "b")
        others = []
        if one.sites > 1 and records >= _LEAST_RECORDS:
            picked = [draws.choice(len(rest), records // 2, replace=False) for _ in range(_SITES)]
            others = [one.train(rest.take(which)) for which in picked]
        setting = _Setting(claims, mechanism, kit, draws, rows, tuple(others))
        found = [_membership(setting, one, shadows), _inversion(setting, lone, rest)]
    return Attacks(
        found, one.received, whose, records, shadows, time.perf_counter() - began
    )  # fmt: skip


def _membership(setting: _Setting, one: OneRound, shadows: int) -> Attack:
    """Tell members from others by what is received: its share of each, and what it learned."""
    records, kit, record = len(setting.rows), setting.kit, setting.claims.record
    if records < _LEAST_RECORDS:
        return _not_done("membership", f"{records} records are too few to tell rates of")
    rows = mislabelled(setting.rows, setting.draws)
    prepared = kit.prepare(rows, _CPU)
    clip = record.clip if record.enabled else math.inf
    # What suits the noise that is claimed, and what suits none: it may not be there.
    noises = sorted({0.0, one.noise_variance(setting.mechanism)})
    unmixing = [Unmixing(kit, prepared, clip, noise, setting.draws) for noise in noises]
    included = setting.draws.random((shadows, records)) < 0.5
    told, epsilon = [], 0.0
    for inside in included:
        reply = one.train(rows.take(np.flatnonzero(inside)))
        epsilon = max(epsilon, reply.epsilon or 0.0)
        received = one.receive(reply, setting.drawn(one.sites - 1))
        outputs = _outputs(kit, kit.initial + received, prepared.inputs)
        shares = [each.shares(received) for each in unmixing]
        told.append(np.stack([confidence(outputs, prepared.targets, kit.task), *shares]))
    found = lira(np.stack(told, axis=1), included, setting.draws)
    what = (
        f"{found.tpr:.1%} of members are told (95%: {found.low:.1%} to {found.high:.1%}) at 1% "
        f"false alarms, AUC {found.auc:.2f}"
    )
    numbers = {
        "tpr": found.tpr, "low": found.low, "high": found.high, "auc": found.auc,
        "members": float(found.members),
    }  # fmt: skip
    if not record.enabled:
        return Attack("membership", None, f"{what}; nothing is claimed of records", numbers)
    most = most_true_positives(epsilon, record.delta)
    numbers |= {"epsilon": epsilon, "most": most}
    claim = f"a round claims epsilon {epsilon:.2f}"
    if most >= 1.0:
        return Attack("membership", None, f"{what}; {claim}, which bounds nothing here", numbers)
    return Attack("membership", found.low <= most, f"{what}; {claim}: at most {most:.1%}", numbers)


def _outputs(kit: TaskKit, weights: Vector, inputs: torch.Tensor) -> torch.Tensor:
    write_vector(kit.model, kit.layout, weights)
    write_local(kit.model, kit.initial_local)
    kit.model.eval()
    with torch.no_grad():
        outputs: torch.Tensor = kit.model(inputs)
    return outputs


def _inversion(setting: _Setting, lone: OneRound, rest: Dataset) -> Attack:
    """Rebuild the record of a site that has no other."""
    kit, task = setting.kit, setting.claims.agreement.task
    categories = [column.name for column in task.data.columns if column.kind == "category"]
    if categories:
        return _not_done("inversion", f"{categories[0]} has words, which have no mean to guess")
    if len(setting.rows) < _LEAST_RECORDS:
        return _not_done("inversion", f"{len(setting.rows)} records are too few for class means")
    known, prepared = kit.prepare(rest, _CPU), kit.prepare(setting.rows, _CPU)
    means = class_means(kit, known)
    bounds = (float(known.inputs.min()), float(known.inputs.max()))
    errors: dict[str, list[float]] = {"division": [], "matching": [], "guess": []}
    for number in range(_TRIALS):
        reply = lone.train(setting.rows.take(np.array([number])))
        received = lone.receive(reply, setting.drawn(lone.sites - 1))
        true: npt.NDArray[np.float64] = prepared.inputs[number : number + 1].double().numpy()
        target = prepared.targets[number : number + 1]
        try:
            found = matched(kit, received, target, bounds, setting.draws)
        except RuntimeError as error:
            return _not_done("inversion", f"no gradient leads to the inputs: {error}")
        errors["matching"].append(error_of(found, true))
        quotient = divided(kit, received, bounds)
        if quotient is not None:
            errors["division"].append(error_of(quotient[None], true))
        guess = means[int(target[0]) if task.data.target.kind == "classes" else 0]
        errors["guess"].append(error_of(guess[None], true))
    numbers = {name: float(np.median(of)) for name, of in errors.items() if of}
    guess_error = numbers["guess"]
    best = min(error for name, error in numbers.items() if name != "guess")
    tried = ", ".join(f"{numbers[n]:.3g} by {n}" for n in ("division", "matching") if n in numbers)
    verdict = "no better than" if best >= guess_error else "BETTER than"
    what = (
        f"a site's only record is rebuilt {verdict} by guessing its class mean: error {tried}, "
        f"{guess_error:.3g} by guessing"
    )
    return Attack("inversion", None, what, {**numbers, "trials": float(_TRIALS)})


def _not_done(name: str, why: str) -> Attack:
    return Attack(name, None, f"not done: {why}", {})
