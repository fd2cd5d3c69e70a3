"""The audit of a run, whole: rehearse its training with canaries, measure, compare."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from lepton_fed import __version__
from lepton_fed.audit.attacks import attack
from lepton_fed.audit.checks import (
    check_accounting,
    check_bound,
    check_contribution,
    check_noise,
)
from lepton_fed.audit.claims import Claims, require_auditable
from lepton_fed.audit.contribution import largest_contribution
from lepton_fed.audit.lower_bound import lower_bound
from lepton_fed.audit.mechanism import mechanism_of
from lepton_fed.audit.report import AuditReport
from lepton_fed.audit.training import rehearse
from lepton_fed.privacy.dp.accounting import adjacency_of
from lepton_fed.training.kit import build_kit

__all__ = ["audit"]


def audit(claims: Claims, canaries: int = 1000, shadows: int = 0) -> AuditReport:
    """Audit a run.

    Args:
        claims: What the run says, and its ledgers.
        canaries: How many; more prove more and take longer.
        shadows: Models to train for attacks; 0 attacks nothing.

    Raises:
        RunError: LF5232, it had no record-level DP, and nothing is to be attacked.
        LeptonError: The run's task cannot be trained here, its record is not whole, or rows to
            attack cannot be read.
    """
    if claims.record.enabled or not shadows:
        report = _checked(claims, canaries)
    else:
        report = AuditReport(
            claims.agreement.run, True, [], None, None, None, None, "", "", 0, 0, _now(), 0.0,
            __version__,
        )  # fmt: skip
    if not shadows:
        return report
    report = replace(report, attacks=attack(claims, shadows))
    return replace(report, passed=not report.failed)


def _checked(claims: Claims, canaries: int) -> AuditReport:
    """Rehearse the training with canaries, and hold what is seen against the claims."""
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
        time=_now(),
        seconds=time.perf_counter() - began,
        version=__version__,
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
