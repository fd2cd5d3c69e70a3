"""What `lepton-fed check` looks at for a coordinator: everything but the sites."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lepton_fed.config.agreement import Agreement
from lepton_fed.config.schema import ServerConf, SimulationConf, StrategyConf
from lepton_fed.core.encoding import PLAIN_BITS, plan_encoding
from lepton_fed.core.task import Task
from lepton_fed.errors import Problem, Refused
from lepton_fed.identity.certificates import check_certificate
from lepton_fed.identity.keys import load_private_key
from lepton_fed.identity.roster import read_roster
from lepton_fed.identity.server_certificate import load_server_certificate
from lepton_fed.identity.signature import fingerprint
from lepton_fed.privacy.client import ClientNoise, client_noise, with_client_noise
from lepton_fed.privacy.dp.shared import noise_to_agree_on, shared_noise
from lepton_fed.privacy.masked_plan import Shape, masked_layout
from lepton_fed.runs.checks import Checklist
from lepton_fed.server.intake import plan_aggregation, require_sites, shape_of
from lepton_fed.strategies.base import Strategy
from lepton_fed.strategies.build import build_strategy
from lepton_fed.training.kit import TaskKit, build_kit

__all__ = ["check_server", "check_strategy", "check_sums", "check_task"]


def check_server(conf: ServerConf) -> Checklist:
    """Check a coordinator's conf.

    Args:
        conf: The conf.
    """
    checks = Checklist()
    kit = check_task(checks, conf.task, conf.seed)
    strategy = check_strategy(checks, conf.strategy)
    checks.add(
        "signing key",
        lambda: load_private_key(Path(conf.signing_key)),
        lambda key: fingerprint(key.public_key()),
    )
    checks.add("roster", lambda: _check_roster(conf), str)
    if kit is not None and strategy is not None:
        check_sums(checks, conf, kit, strategy, lambda: _sites_of(conf))
    checks.add(
        "certificate",
        lambda: check_certificate(Path(conf.tls.certificate)),
        str,
    )
    checks.add(
        "certificate key",
        lambda: load_server_certificate(Path(conf.tls.certificate), Path(conf.tls.key)),
        lambda _: "the certificate's; only its owner reads it",
    )
    return checks


def _sites_of(conf: ServerConf) -> int:
    key = load_private_key(Path(conf.signing_key)).public_key()
    return max(1, len(read_roster(Path(conf.roster), key).sites))


def _check_roster(conf: ServerConf) -> str:
    roster = read_roster(Path(conf.roster), load_private_key(Path(conf.signing_key)).public_key())
    count = len(roster.sites)
    if count < conf.rounds.quorum:
        raise Refused(
            Problem("LF4216", f"the roster has {count} sites, the quorum is {conf.rounds.quorum}",
                    where=conf.roster, key="rounds.quorum",
                    remedy="enrol the sites: lepton-fed keys enrol NAME.enrol.json")
        )  # fmt: skip
    return f"version {roster.version}: {', '.join(site.name for site in roster.sites)}"


def check_task(checks: Checklist, task: Task, seed: int) -> TaskKit | None:
    """Check that a task's preprocessing and model can be built, and say what they are."""
    return checks.add(
        "task",
        lambda: build_kit(task, seed),
        lambda kit: f"{kit.layout.size:,} parameters, digest {task.digest[:12]}",
    )


def check_strategy(checks: Checklist, conf: StrategyConf) -> Strategy | None:
    """Check that a strategy can be made, and say what it needs."""
    return checks.add(
        "strategy",
        lambda: build_strategy(conf),
        lambda strategy: f"{strategy.name}, needs {strategy.server.needs}",
    )


def check_sums(
    checks: Checklist,
    conf: ServerConf | SimulationConf,
    kit: TaskKit,
    strategy: Strategy,
    sites: Callable[[], int],
) -> None:
    """Check that updates can be added, and noised in the sum if they are to be, as in a run.

    Args:
        checks: Where the lines go.
        conf: The conf.
        kit: The task's kit.
        strategy: The strategy.
        sites: Returns the number of sites; it may raise.
    """
    privacy, size = conf.privacy, kit.layout.size

    def offer() -> Agreement:
        cohort = conf.rounds.cohort_size(sites())
        rounds = conf.rounds.count
        noise = noise_to_agree_on(privacy, rounds)
        agreement = Agreement(
            "check", conf.task, conf.strategy, rounds, conf.seed, privacy, cohort, noise
        )
        return with_client_noise(agreement, size)

    planned = True
    if privacy.record.is_shared:
        shown = checks.add("shared noise", lambda: _describe_shared_noise(offer(), size), str)
        planned = shown is not None
    if privacy.client.enabled:
        shown = checks.add("client-level DP", lambda: _describe_client_noise(offer(), size), str)
        planned = planned and shown is not None
    if planned:  # what is wrong with the noise is said once

        def sums() -> str:
            require_sites(privacy.secure_aggregation, conf.rounds.cohort_size(sites()), sites())
            agreement = offer()
            plan_aggregation(agreement, strategy, kit.layout, kit.plan, sites())
            return _describe_encoding(agreement, shape_of(strategy, kit.layout, kit.plan))

        checks.add("aggregation", sums, str)


def _describe_encoding(agreement: Agreement, shape: Shape) -> str:
    """Return how updates are added, in words."""
    task, secure = agreement.task, agreement.privacy.secure_aggregation
    encoding = (
        masked_layout(agreement, shape, train=True, evaluate=True).encoding
        if secure.enabled
        else plan_encoding(task, agreement.cohort, PLAIN_BITS)
    )
    error = encoding.error_bound(1, 1.0)
    how = "masked: the coordinator sees sums alone" if secure.enabled else "plain"
    client = client_noise(agreement, shape.size)
    if client and client.shares:
        # Updates are on a grid of their own, which the noise is made for.
        first = "" if client.quantile is None else " in the first round"
        return f"{how}; {encoding.bits}-bit ring, grid {client.shares.grid:.1e}{first}"
    text = (
        f"{how}; {encoding.bits}-bit ring, grid {encoding.grid:.1e}, error of a mean below "
        f"{error:.1e}"
    )
    if task.aggregation.weight == "equal":
        return text
    lost = encoding.bits_lost_to_weight(1.0)
    return f"{text}; a site of one row loses {lost:.1f} bits to its weight"


def _describe_shared_noise(agreement: Agreement, size: int) -> str:
    """Return what record-level noise that the sites share takes, in words."""
    noise, record = shared_noise(agreement, size), agreement.privacy.record
    if noise is None:
        return "off"
    return (
        f"epsilon {record.epsilon:g} for all rounds; noise multiplier "
        f"{noise.noise_multiplier:.3g} in the sum of a round while {noise.honest} of "
        f"{agreement.cohort} sites add their share; holds against the coordinator and the others"
    )


def _describe_client_noise(agreement: Agreement, size: int) -> str:
    """Return what client-level DP takes, in words."""
    noise, cohort = client_noise(agreement, size), agreement.cohort
    if noise is None:
        return "off"
    return (
        f"epsilon {noise.epsilon:.3g} for all rounds; noise multiplier "
        f"{noise.noise_multiplier:.3g}, {noise.mean_deviation(cohort):.2g} on each coordinate of a "
        f"mean of {cohort} updates of norm {noise.clip:g}{_followed(noise, cohort)}; holds against "
        f"{noise.against}"
    )


def _followed(noise: ClientNoise, cohort: int) -> str:
    """Return in words what moves the norm, and how well it is known; empty where it stays."""
    if noise.quantile is None:
        return ""
    return (
        f" at first; the norm then follows the {noise.quantile:g} quantile of theirs (the fraction "
        f"within it is known to {noise.fraction_deviation(cohort):.2g} in a round)"
    )
