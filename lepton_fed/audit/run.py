"""The audit of a run, whole: rehearse its training with canaries, measure, compare."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from lepton_fed import __version__
from lepton_fed.audit.checks import (
    check_accounting,
    check_bound,
    check_contribution,
    check_noise,
)
from lepton_fed.audit.claims import Claims, require_auditable
from lepton_fed.audit.contribution import largest_contribution
from lepton_fed.audit.lower_bound import lower_bound
from lepton_fed.audit.report import AuditReport
from lepton_fed.audit.training import Mechanism, rehearse
from lepton_fed.privacy.dp.accounting import adjacency_of, noise_multiplier_for
from lepton_fed.privacy.dp.sampling import sampler_of
from lepton_fed.training.kit import build_kit
from lepton_fed.training.local import steps_of

__all__ = ["audit", "mechanism_of"]

_ROWS = 1000  # of a site of which only the coordinator's record is at hand


def audit(claims: Claims, canaries: int = 1000) -> AuditReport:
    """Audit a run.

    Args:
        claims: What the run says, and its ledgers.
        canaries: How many; more prove more and take longer.

    Raises:
        RunError: LF5232, it had no record-level DP.
        LeptonError: The run's task cannot be trained here, or its record is not whole.
    """
    require_auditable(claims)
    began = time.perf_counter()
    agreement = claims.agreement
    kit = build_kit(agreement.task, agreement.seed)
    mechanism = mechanism_of(claims)
    largest = largest_contribution(
        kit, agreement, np.random.default_rng(), claims.model(kit.layout)
    )
    with TemporaryDirectory(prefix="lepton-fed-audit-") as folder:
        watched = rehearse(
            kit, agreement, mechanism.shortened(), Path(folder),
            canaries=canaries, honest=claims.honest,
        )  # fmt: skip
    bound = lower_bound(watched.noised.sum(axis=0), watched.included, watched.delta)
    checks = [
        check_noise(watched),
        check_contribution(largest, watched),
        check_bound(bound, watched),
        check_accounting(watched, claims),
    ]
    return AuditReport(
        run=agreement.run,
        passed=all(check.passed for check in checks),
        checks=checks,
        epsilon=watched.claimed,
        lower_bound=bound.epsilon,
        confidence=bound.confidence,
        delta=watched.delta,
        adjacency=adjacency_of(mechanism.sampler),
        sampler=mechanism.sampler,
        steps=len(watched.noised),
        canaries=canaries,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=time.perf_counter() - began,
        version=__version__,
    )


def mechanism_of(claims: Claims) -> Mechanism:
    """Return what the site with the least noise did in a round, as its ledger has it.

    Where no ledger is at hand it is what a site of 1000 rows would have done.

    Args:
        claims: The run's.
    """
    events = [event for site in claims.sites for event in site.charged or ()]
    if events:
        least = min(events, key=lambda event: event.noise_multiplier)
        return Mechanism(
            least.noise_multiplier,
            least.sampling_rate,
            least.steps,
            claims.agreement.rounds,
            claims.record.sampler,
        )
    agreement, record = claims.agreement, claims.record
    training, rounds = agreement.task.training, agreement.rounds
    if record.is_shared:
        rate = record.sampling_rate or 1.0
        return Mechanism(agreement.noise_multiplier, rate, 1, rounds, record.sampler)
    sampler = sampler_of(record.sampler, _ROWS, training.batch_size)
    steps = steps_of(training, _ROWS, sampler)
    run = sampler.event(1.0, steps).times(rounds)
    noise = noise_multiplier_for(record.epsilon, record.delta, run)
    return Mechanism(noise, sampler.rate, steps, rounds, record.sampler)
