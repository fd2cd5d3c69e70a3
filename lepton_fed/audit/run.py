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
from lepton_fed.audit.claims import Claims
from lepton_fed.audit.contribution import largest_contribution
from lepton_fed.audit.lower_bound import lower_bound
from lepton_fed.audit.report import AuditReport
from lepton_fed.audit.training import Mechanism, rehearse
from lepton_fed.privacy.dp.accounting import adjacency_of, noise_multiplier_for
from lepton_fed.privacy.dp.events import CorrelatedGaussian
from lepton_fed.privacy.dp.planning import fixed_order
from lepton_fed.privacy.dp.sampling import Sampler, sampler_of
from lepton_fed.privacy.factorisation.mechanism import FixedOrder
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
        LeptonError: The run's task cannot be trained here, or its record is not whole.
    """
    began = time.perf_counter()
    kit = build_kit(claims.task, claims.seed)
    mechanism = mechanism_of(claims)
    largest = largest_contribution(
        kit, claims.record, np.random.default_rng(), claims.model(kit.layout)
    )
    with TemporaryDirectory(prefix="lepton-fed-audit-") as folder:
        watched = rehearse(
            kit, claims.record, mechanism.shortened(), Path(folder), canaries
        )  # fmt: skip
    bound = lower_bound(watched.noised.sum(axis=0), watched.included, watched.delta)
    checks = [
        check_noise(watched),
        check_contribution(largest, watched),
        check_bound(bound, watched),
        check_accounting(watched, claims),
    ]
    return AuditReport(
        run=claims.run,
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
    # One without steps was a round that had been charged before.
    charged = [event for site in claims.sites for event in site.charged or () if event.steps]
    if charged:
        least = min(charged, key=lambda event: event.noise_multiplier)
        return Mechanism(
            least.noise_multiplier,
            least.sampling_rate,
            least.steps,
            claims.rounds,
            claims.record.sampler,
            least.band if isinstance(least, CorrelatedGaussian) else 0,
        )
    training, record = claims.task.training, claims.record
    sampler: Sampler = sampler_of(record.sampler, _ROWS, training.batch_size)
    if record.is_correlated:
        sampler = fixed_order(
            _ROWS, training.batch_size, training.epochs, training.steps, claims.rounds,
            size=build_kit(claims.task, claims.seed).noised_size, band=record.band,
        )  # fmt: skip
    steps = steps_of(training, _ROWS, sampler)
    run = sampler.event(1.0, steps).times(claims.rounds)
    noise = noise_multiplier_for(record.epsilon, record.delta, run)
    band = sampler.band if isinstance(sampler, FixedOrder) else 0
    return Mechanism(noise, sampler.rate, steps, claims.rounds, record.sampler, band)
