"""What `lepton-fed check` looks at for a coordinator: everything but the sites."""

from __future__ import annotations

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
from lepton_fed.privacy.masked_plan import Shape, masked_layout
from lepton_fed.runs.checks import Checklist
from lepton_fed.server.intake import require_sites
from lepton_fed.strategies.base import DELTA
from lepton_fed.strategies.build import build_strategy
from lepton_fed.training.kit import TaskKit, build_kit

__all__ = [
    "check_server",
    "check_strategy",
    "check_task",
    "describe_client_noise",
    "describe_encoding",
]


def check_server(conf: ServerConf) -> Checklist:
    """Check a coordinator's conf.

    Args:
        conf: The conf.
    """
    checks = Checklist()
    kit = check_task(checks, conf.task, conf.seed)
    check_strategy(checks, conf.strategy)
    checks.add(
        "signing key",
        lambda: load_private_key(Path(conf.signing_key)),
        lambda key: fingerprint(key.public_key()),
    )
    checks.add("roster", lambda: _check_roster(conf), str)
    checks.add("aggregation", lambda: _describe_sums(conf), str)
    if kit is not None and conf.privacy.client.enabled:
        checks.add(
            "client-level DP", lambda: describe_client_noise(conf, kit, _sites_of(conf)), str
        )
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


def _describe_sums(conf: ServerConf) -> str:
    return describe_encoding(conf, _sites_of(conf))


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


def check_strategy(checks: Checklist, conf: StrategyConf) -> None:
    """Check that a strategy can be made, and say what it needs."""
    checks.add(
        "strategy",
        lambda: build_strategy(conf),
        lambda strategy: f"{strategy.name}, needs {strategy.server.needs}",
    )


def describe_encoding(conf: ServerConf | SimulationConf, sites: int) -> str:
    """Return how updates are added, in words.

    Args:
        conf: The conf.
        sites: Number of sites.

    Raises:
        TaskError: The ring has no room for the cohort, or the cohort is too small to hide an
            update.
    """
    secure, task = conf.privacy.secure_aggregation, conf.task
    require_sites(secure, conf.rounds.cohort_size(sites), sites)
    bits = secure.bits if secure.enabled else PLAIN_BITS
    encoding = plan_encoding(task, conf.rounds.cohort_size(sites), bits)
    error = encoding.error_bound(1, 1.0)
    how = "masked: the coordinator sees sums alone" if secure.enabled else "plain"
    text = (
        f"{how}; {encoding.bits}-bit ring, grid {encoding.grid:.1e}, error of a mean below "
        f"{error:.1e}"
    )
    if task.aggregation.weight == "equal":
        return text
    lost = encoding.bits_lost_to_weight(1.0)
    return f"{text}; a site of one row loses {lost:.1f} bits to its weight"


def describe_client_noise(conf: ServerConf | SimulationConf, kit: TaskKit, sites: int) -> str:
    """Return what client-level DP takes, in words.

    Args:
        conf: The conf, with client-level DP.
        kit: The task's kit.
        sites: Number of sites.

    Raises:
        TaskError: It does not go with the rest, no amount of noise reaches the target, or the ring
            is too coarse.
    """
    cohort, size = conf.rounds.cohort_size(sites), kit.layout.size
    offer = Agreement(
        "check", conf.task, conf.strategy, conf.rounds.count, conf.seed, conf.privacy, cohort
    )
    agreement = with_client_noise(offer, size)
    noise = client_noise(agreement, size)
    if noise is None:
        return "off"
    if noise.masked:  # a run with counts or other vectors is looked at when it starts
        shape = Shape(kit.layout.digest, (DELTA,), size, 0)
        masked_layout(agreement, shape, train=True, evaluate=False)
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
