"""One round of single sites, trained as in a run, and what its coordinator receives of it.

The sites are the ones of any run: sampler, engine, clipping, noise, ledger, and under secure
aggregation the encoding. The model is the one that the run begins with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from lepton_fed.audit.mechanism import Mechanism, composed
from lepton_fed.audit.received import MaskedSum
from lepton_fed.clients.site import Site
from lepton_fed.config.agreement import Agreement
from lepton_fed.core.exchange import MODEL, Ask, Reply
from lepton_fed.core.layout import Vector
from lepton_fed.data.dataset import Dataset
from lepton_fed.errors import Problem, RunError
from lepton_fed.privacy.dp.shared import honest_of
from lepton_fed.strategies.base import DELTA
from lepton_fed.strategies.build import build_strategy
from lepton_fed.training.kit import TaskKit

__all__ = ["OneRound", "as_trained_by", "of_one_record"]

_CPU = torch.device("cpu")


def as_trained_by(agreement: Agreement, mechanism: Mechanism | None, rows: int) -> Agreement:
    """Return an agreement under which a site of so many rows does what the run's sites did.

    Args:
        agreement: The run's.
        mechanism: What its sites did in a round of record-level DP; None without.
        rows: Rows of the site, about.
    """
    if mechanism is None or agreement.privacy.record.is_shared:
        return agreement
    batch = max(1, round(mechanism.rate * rows))
    training = replace(
        agreement.task.training, epochs=None, steps=mechanism.steps, batch_size=batch
    )  # fmt: skip
    return replace(agreement, task=replace(agreement.task, training=training))


def of_one_record(agreement: Agreement, mechanism: Mechanism | None) -> Agreement:
    """Return an agreement under which a site of one record trains on it as the run's sites would.

    It is in as many steps as it would be expected to be in, alone, with the run's noise multiplier.

    Args:
        agreement: The run's.
        mechanism: What its sites did in a round of record-level DP; None without.
    """
    privacy, training = agreement.privacy, agreement.task.training
    if mechanism is None:
        return agreement
    alone = replace(mechanism, rate=1.0, steps=max(1, round(mechanism.rate * mechanism.steps)))
    epsilon = 1.0001 * composed(alone, privacy.record.delta)  # whatever it is: none is claimed
    record = replace(privacy.record, epsilon=epsilon)
    if record.is_shared:
        record = replace(record, sampling_rate=1.0)
    else:
        training = replace(training, epochs=None, steps=alone.steps, batch_size=1)
    return replace(
        agreement,
        task=replace(agreement.task, training=training),
        privacy=replace(privacy, record=record),
    )


class OneRound:
    """Has sites train for the first round of a run.

    Args:
        agreement: What they agreed to.
        kit: The task's kit.
        folder: Receives their ledgers.

    Raises:
        LeptonError: The run cannot be as the agreement has it.
    """

    def __init__(self, agreement: Agreement, kit: TaskKit, folder: Path) -> None:
        strategy = build_strategy(agreement.strategy)
        self._agreement = agreement
        self._kit = replace(kit, task=agreement.task)
        self._rule = strategy.site
        self._folder = folder
        self._number = 0
        sent = strategy.server.sends(strategy.server.init(kit.initial))
        self._ask = Ask(
            agreement.digest, kit.layout.digest, 1, True, False, {MODEL: kit.initial, **sent}
        )  # fmt: skip
        secure = agreement.privacy.secure_aggregation
        self._sums = (
            MaskedSum(agreement, kit.layout, self._rule.vectors) if secure.enabled else None
        )
        self.sites = agreement.cohort // secure.groups if secure.enabled else 1

    def noise_variance(self, mechanism: Mechanism | None) -> float:
        """Return the variance of the noise in what is received, in one coordinate.

        Args:
            mechanism: What sites do in a round of record-level DP; None without.

        Returns:
            Over the square of what a record that is in adds, in units of the clipping norm.
        """
        if mechanism is None:
            return 0.0
        record = self._agreement.privacy.record
        times = self.sites / honest_of(self._agreement) if record.is_shared else self.sites
        added = mechanism.steps * mechanism.rate
        return times * mechanism.steps * (mechanism.noise_multiplier * record.clip / added) ** 2

    @property
    def received(self) -> str:
        """Return in words what the coordinator receives of a site."""
        record, client = self._agreement.privacy.record, self._agreement.privacy.client
        noised = record.enabled and not record.is_shared
        update = "updates with all of the noise in each" if noised else "updates"
        if self._sums is None:
            return "each update, with noise" if noised else "each update as it is"
        shared = record.is_shared or client.is_shared
        return f"the sum of {self.sites} {update}" + (" and shares of the noise" if shared else "")

    def train(self, rows: Dataset) -> Reply:
        """Return what a site of these rows answers.

        Args:
            rows: As read.

        Raises:
            RunError: LF5231, it refused.
            LeptonError: The task does not go with what is protected.
        """
        self._number += 1
        site = Site(
            f"attacked-{self._number}", self._kit, self._rule, rows, rows.take(np.arange(0)),
            self._agreement, devices=[_CPU], folder=self._folder / str(self._number),
        )  # fmt: skip
        try:
            reply = site.answer(self._ask)
        finally:
            site.close()
        if reply.refusal is not None or reply.update is None:
            code = reply.refusal.code if reply.refusal else "no update"
            raise RunError(
                Problem("LF5231", f"the training that is attacked was refused ({code})",
                        where="round 1", remedy="see what the site's log says above")
            )  # fmt: skip
        return reply

    def receive(self, reply: Reply, others: Sequence[Reply]) -> Vector:
        """Return what the coordinator has of a site's answer, ``[layout.size]`` float32.

        Under secure aggregation it is the mean of all, each with its own noise.

        Args:
            reply: The site's.
            others: Those of the others in the sum; shares of noise are drawn anew.
        """
        if self._sums is not None:
            words = [self._sums.encode(self._ask, each) for each in (reply, *others)]
            return self._sums.mean(1, words).astype(np.float32)
        if reply.update is None:
            raise ValueError("a reply without an update")
        return reply.update.vectors[DELTA]
