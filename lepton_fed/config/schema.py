"""The conf files as dataclasses: one class a file, every key documented where it is declared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lepton_fed.core.settings import setting
from lepton_fed.core.task import Task

__all__ = [
    "KINDS",
    "LEAST_GROUP",
    "AggregationFloor",
    "Budget",
    "ClientConf",
    "ClientFloor",
    "ClientPrivacy",
    "Conf",
    "Partition",
    "Policy",
    "Privacy",
    "PrivacyFloor",
    "RecordPrivacy",
    "Rounds",
    "SecureAggregation",
    "ServerConf",
    "SimulationConf",
    "Sites",
    "Source",
    "StrategyConf",
    "Tls",
]


@dataclass(frozen=True)
class StrategyConf:
    """How updates become the next model."""

    name: str = setting("fedavg", "Name of an installed strategy: fedavg, fedprox, ...")
    arguments: dict[str, Any] = setting(factory=dict, doc="Arguments of the strategy.")


@dataclass(frozen=True)
class Rounds:
    """How long the run is and who takes part in a round."""

    count: int = setting(10, "Number of rounds.", at_least=1, at_most=1_000_000)
    fraction: float = setting(
        1.0, "Fraction of the sites that is selected for a round.", above=0, at_most=1
    )
    quorum: int = setting(
        1, "Smallest number of usable updates; a round with fewer leaves the model as it is.",
        at_least=1,
    )  # fmt: skip
    evaluate: bool = setting(
        True, "Sites evaluate the model they receive on their held-out rows and send the counts."
    )

    def cohort_size(self, sites: int) -> int:
        """Return how many sites are selected for a round, at least one.

        Args:
            sites: How many there are, from 1.

        Example:
            >>> Rounds(fraction=0.3).cohort_size(10), Rounds(fraction=0.3).cohort_size(1)
            (3, 1)
        """
        return max(1, round(self.fraction * sites))


LEAST_CLIP, LARGEST_CLIP = 1e-6, 1e6
"""Norms to clip to at which noise and sums are numbers of float32, far from where it ends: noise of
1e-46 is none, and whether a sum is infinite no noise hides."""


@dataclass(frozen=True)
class RecordPrivacy:
    """Record-level differential privacy: DP-SGD, or DP-FTRL, at the site."""

    enabled: bool = setting(False, "Train with record-level differential privacy.")
    epsilon: float = setting(
        8.0, "Epsilon that one record may cost over the whole run.", above=0, at_most=100
    )
    delta: float = setting(
        1e-5, "Delta of the guarantee; keep it below 1 / rows of a site.", above=0, below=0.1
    )
    clip: float = setting(
        1.0,
        "Euclidean norm to which the gradient of one record is clipped.",
        at_least=LEAST_CLIP,
        at_most=LARGEST_CLIP,
    )
    engine: Literal["hooks", "ghost", "bookkeeping"] = setting(
        "hooks",
        "What clips and sums, all to the same sum: `hooks` (Opacus, every gradient in full), "
        "`ghost` (Opacus, for simulations only), `bookkeeping` (one backward pass and the least "
        "memory).",
    )
    most_records: int | None = setting(
        None,
        "Most records that go through the model at once, to fit into memory; a larger batch is "
        "taken in parts, with the same sum and the noise added once. None sets no limit.",
        at_least=1,
    )
    sampler: Literal["poisson", "shuffled", "full"] = setting(
        "poisson",
        "How a step's records are drawn: `poisson` (each by itself, which epsilon gains from), "
        "`shuffled` (pass after pass, each in a new order) or `full` (pass after pass, in the "
        "order of the rows). Orders are charged a Gaussian a pass: no sampling counts.",
    )
    mechanism: Literal["dp_sgd", "dp_ftrl"] = setting(
        "dp_sgd",
        "Noise of the steps: `dp_sgd` (fresh in each) or `dp_ftrl` (each step takes back some of "
        "the noise of the steps before, so that their sum has far less). `dp_ftrl` goes with "
        "`sampler: full`, an order that goes on over the rounds: for sites that cannot draw "
        "Poisson samples.",
    )
    band: int | None = setting(
        None,
        "With `dp_ftrl`: over how many steps noise is correlated, at most. A site keeps the noise "
        "of one fewer, 4 bytes for each parameter. None takes what fits into 256 MiB.",
        at_least=1,
        at_most=100_000,
    )
    randomness: Literal["system", "insecure_seeded"] = setting(
        "system",
        "Where noise and batches come from: the operating system's entropy, or, in simulations "
        "only, the run's seed. Whoever knows the seed takes the noise off again: INSECURE.",
    )
    noise: Literal["site", "shared"] = setting(
        "site",
        "Who adds the noise. `site`: each site the whole of it, which holds against everyone. "
        "`shared`: each site its share of one noise in the sum, which holds against the "
        "coordinator and all but `honest` sites, and is far more accurate; one step a round, under "
        "secure aggregation.",
    )
    sampling_rate: float | None = setting(
        None,
        "With shared noise: probability with which each record is in a round's step, the same "
        "public number at every site.",
        above=0,
        at_most=1,
    )
    honest: int = setting(
        0,
        "With shared noise: how many sites of a sum are counted on to add their share; no sum of "
        "fewer is opened. 0 takes the sites that have to stay to a round's end.",
        at_least=0,
    )

    @property
    def is_shared(self) -> bool:
        """Return whether sites add shares of one noise."""
        return self.enabled and self.noise == "shared"

    @property
    def is_correlated(self) -> bool:
        """Return whether the noise of a step depends on that of the steps before."""
        return self.enabled and self.mechanism == "dp_ftrl"


@dataclass(frozen=True)
class ClientPrivacy:
    """Client-level differential privacy: a site's whole contribution is protected."""

    enabled: bool = setting(
        False, "Clip each site's update and add noise to their sum (DP-FedAvg, distributed DP)."
    )
    epsilon: float = setting(
        8.0, "Epsilon that one site's part may cost over the whole run.", above=0, at_most=100
    )
    delta: float = setting(
        1e-5, "Delta of the guarantee; keep it below 1 / sites.", above=0, below=0.1
    )
    clip: float = setting(
        1.0,
        "Euclidean norm to which a site's update is clipped, with a `quantile` in the first round; "
        "at most task.aggregation.norm_bound.",
        above=0,
    )
    quantile: float | None = setting(
        None,
        "Fraction of the updates that shall be within the norm: it follows that quantile of their "
        "norms from round to round, for 5 % more noise. Null for a norm that stays.",
        above=0,
        below=1,
    )
    noise: Literal["coordinator", "shared"] = setting(
        "shared",
        "Who adds the noise. `shared`: each site its share, under secure aggregation, which holds "
        "against the coordinator too while `honest` sites of a sum add theirs. `coordinator`: the "
        "coordinator adds it, and is trusted.",
    )
    mechanism: Literal["discrete_gaussian", "skellam"] = setting(
        "discrete_gaussian",
        "Distribution of a share. `skellam` costs some percent more and needs a ring of at most 28 "
        "bits.",
    )
    honest: int = setting(
        0,
        "With shared noise: how many sites of a sum are counted on to add their share; no sum of "
        "fewer is opened. 0 takes the sites that have to stay to a round's end.",
        at_least=0,
    )

    @property
    def is_shared(self) -> bool:
        """Return whether sites add shares of the noise."""
        return self.enabled and self.noise == "shared"


LEAST_GROUP = 8
"""Fewest sites in one of several groups."""


@dataclass(frozen=True)
class SecureAggregation:
    """Secure aggregation: the coordinator learns the sum of the updates, and nothing else."""

    enabled: bool = setting(
        False, "Sites send masked updates, of which the coordinator can read the sum alone."
    )
    min_cohort: int = setting(
        3, "Fewest sites in a sum; a round with fewer leaves the model as it is.", at_least=3
    )
    threshold: float = setting(
        2 / 3,
        "Share of a round's sites that must stay to its end, and without which nothing is "
        "revealed: more than half.",
        above=0.5,
        at_most=1,
    )
    bits: int = setting(
        32,
        "Size of a masked number. With 20 an update is smaller by a third and coarser; the event "
        "log says how fine the grid is.",
        at_least=16,
        at_most=64,
    )
    groups: int = setting(
        1,
        "Groups that are summed each by itself, at least 8 sites in each, so that a robust "
        "strategy can compare them. More groups hide a site among fewer.",
        at_least=1,
        at_most=1000,
    )
    post_quantum: bool = setting(
        False, "Keys are agreed on with ML-KEM-768 too, so that a recording is of no use later."
    )

    def least_sites(self) -> int:
        """Return how many sites a round takes at least.

        Example:
            >>> SecureAggregation(groups=3).least_sites()
            24
        """
        if self.groups == 1:
            return self.min_cohort
        return self.groups * max(LEAST_GROUP, self.min_cohort)


@dataclass(frozen=True)
class Privacy:
    """What is protected, and which numbers leave a site beside the protected update."""

    record: RecordPrivacy = setting(factory=RecordPrivacy, doc="Record-level DP.")
    outside_epsilon: list[str] = setting(
        factory=list,
        doc="Numbers derived from rows that may leave a site although epsilon does not cover "
        "them: `evaluation` (counts on held-out rows). Empty: none leave while DP is on.",
    )
    secure_aggregation: SecureAggregation = setting(
        factory=SecureAggregation, doc="What the coordinator can read of an update."
    )
    client: ClientPrivacy = setting(factory=ClientPrivacy, doc="Client-level DP.")

    @property
    def is_noised(self) -> bool:
        """Return whether anything is noised, so that other numbers are outside an epsilon."""
        return self.record.enabled or self.client.enabled


@dataclass(frozen=True)
class Source:
    """Where rows come from."""

    reader: str = setting(
        "csv", "Name of an installed reader: digits, breast_cancer, wine, diabetes, csv, npz, idx."
    )
    path: str = setting("", "File or folder, read in place; empty for built-in data.")
    arguments: dict[str, Any] = setting(factory=dict, doc="Further arguments of the reader.")


@dataclass(frozen=True)
class Partition:
    """How a simulation splits one data set over its sites."""

    name: str = setting(
        "iid", "Name of an installed partitioner: iid, dirichlet, shards, quantity, column."
    )
    arguments: dict[str, Any] = setting(factory=dict, doc="Arguments of the partitioner.")


@dataclass(frozen=True)
class Sites:
    """The simulated sites."""

    count: int = setting(3, "Number of sites.", at_least=1, at_most=1_000_000)
    names: list[str] = setting(
        factory=list, doc="Names of the sites; empty names them site-1, site-2, ..."
    )
    source: Source = setting(factory=Source, doc="The data set that is split.")
    partition: Partition = setting(factory=Partition, doc="How it is split.")
    held_out: float = setting(
        0.2, "Fraction of each site's rows kept for evaluation.", at_least=0, below=1
    )


@dataclass(frozen=True)
class SimulationConf:
    """`lepton-fed simulate`: coordinator and sites in one process."""

    kind: Literal["simulation"] = setting("simulation", "What this file configures.")
    task: Task = setting(factory=Task, doc="What is learned.")
    strategy: StrategyConf = setting(factory=StrategyConf, doc="How updates become a model.")
    rounds: Rounds = setting(factory=Rounds, doc="Length of the run and choice of sites.")
    privacy: Privacy = setting(factory=Privacy, doc="What is protected.")
    sites: Sites = setting(factory=Sites, doc="The simulated sites and their data.")
    seed: int = setting(
        1, "Seed of every choice that privacy does not depend on.", at_least=0, below=2.0**53
    )
    device: str = setting(
        "cpu", "cpu, cuda, cuda:1, or several GPUs by index (cuda:0,1): sites take them in turn."
    )
    runs: str = setting("runs", "Folder that receives one folder a run.")


@dataclass(frozen=True)
class Tls:
    """What the coordinator shows its sites, so that they know whom they talk to."""

    certificate: str = setting("keys/tls/server.crt", "The coordinator's TLS certificate, PEM.")
    key: str = setting("keys/tls/server.key", "Its private key, PEM, not encrypted.")
    ca: str = setting(
        "keys/tls/ca.crt",
        "Certificate of the authority that signed it, PEM; two while one takes over from another.",
    )


@dataclass(frozen=True)
class ServerConf:
    """The coordinator."""

    kind: Literal["server"] = setting("server", "What this file configures.")
    task: Task = setting(factory=Task, doc="What is learned.")
    strategy: StrategyConf = setting(factory=StrategyConf, doc="How updates become a model.")
    rounds: Rounds = setting(factory=Rounds, doc="Length of the run and choice of sites.")
    privacy: Privacy = setting(factory=Privacy, doc="What is protected.")
    seed: int = setting(
        1, "Seed of every choice that privacy does not depend on.", at_least=0, below=2.0**53
    )
    listen: str = setting(
        "0.0.0.0:9092",
        "Address and port that sites connect to; nothing but their own API answers there.",
    )
    tls: Tls = setting(factory=Tls, doc="What the coordinator shows its sites.")
    monitor: str = setting(
        "127.0.0.1:9093",
        "Loopback address and port that answer /health and /metrics (Prometheus); nobody is asked "
        "who they are. Empty for none.",
    )
    roster: str = setting(
        "keys/roster.json", "The signed list of sites; `lepton-fed keys enrol` adds to it."
    )
    gather_s: float = setting(
        600.0, "Wait this long for the sites of the roster before a run begins with the quorum.",
        at_least=0, unit="s",
    )  # fmt: skip
    patience: float = setting(
        3.0, "A site is late when it takes this many times as long as is expected of a round.",
        at_least=1, at_most=1000,
    )  # fmt: skip
    runs: str = setting("runs", "Folder that receives one folder a run.")
    state: str = setting("state/coordinator", "Folder of the coordinator's own records.")
    signing_key: str = setting(
        "keys/coordinator.pem",
        "The coordinator's private Ed25519 key; it signs what sites are asked, the roster and "
        "bundles.",
    )


@dataclass(frozen=True)
class Budget:
    """What one record of the site's data set may cost in its life."""

    dataset: str = setting(
        "main",
        "Name of the data set: what is spent belongs to it, whatever the source holds later.",
    )
    epsilon: float = setting(0.0, "Largest epsilon; 0 allows no training with DP.", at_least=0)
    delta: float = setting(1e-5, "Delta that goes with it.", above=0, below=0.1)


@dataclass(frozen=True)
class AggregationFloor:
    """What the owner asks of secure aggregation."""

    required: bool = setting(True, "Updates leave masked only.")
    min_cohort: int = setting(3, "Fewest sites in a sum that this site is part of.", at_least=3)
    threshold: float = setting(
        2 / 3,
        "Least share of a round's sites without which nothing is revealed: more than half.",
        above=0.5,
        at_most=1,
    )
    rounds_per_hour: int = setting(
        60, "Most rounds in which this site sends a masked update within an hour.", at_least=0
    )
    post_quantum: bool = setting(False, "Keys must be agreed on with ML-KEM-768 too.")


@dataclass(frozen=True)
class ClientFloor:
    """What the owner asks of client-level DP."""

    epsilon: float = setting(
        0.0, "Largest epsilon that a run may cost this site; 0 asks for none.", at_least=0
    )
    delta: float = setting(1e-5, "Largest delta that goes with it.", above=0, below=0.1)
    trust_coordinator: bool = setting(
        False, "Noise that the coordinator adds counts too: it is trusted with what it reads."
    )


@dataclass(frozen=True)
class PrivacyFloor:
    """The least protection under which the site trains."""

    record: bool = setting(True, "Record-level DP must be on.")
    epsilon: float = setting(
        0.0, "Largest epsilon that a whole run may cost a record; 0 allows none.", at_least=0
    )
    delta: float = setting(1e-5, "Largest delta that goes with it.", above=0, below=0.1)
    secure_aggregation: AggregationFloor = setting(
        factory=AggregationFloor, doc="Under which secure aggregation."
    )
    honest: float = setting(
        0.0,
        "Largest fraction of a round's sites that a run may count on to add their share of the "
        "noise; 0 asks for the whole noise at this site. It is of those who are in the sum: of 10 "
        "sites with 7 counted on, 3 that are not honest leave 4 shares when 3 others drop out.",
        at_least=0,
        at_most=1,
    )
    client: ClientFloor = setting(factory=ClientFloor, doc="Under which client-level DP.")


@dataclass(frozen=True)
class Policy:
    """What the site's owner allows; what is not allowed here is refused, whoever asks."""

    tasks: list[str] = setting(
        factory=list,
        doc="Digests of the tasks that may be trained, whole or their first 12 digits; "
        "`lepton-fed check` prints a task's.",
    )
    models: list[str] = setting(
        factory=list, doc="Names of models that may be trained, in any task that fits the data."
    )
    strategies: list[str] = setting(
        factory=lambda: ["fedavg", "fedprox"], doc="Strategies whose site half may run here."
    )
    rounds: int = setting(0, "Most rounds of a run; 0 allows none.", at_least=0)
    epochs: int = setting(0, "Most passes over the rows in a round; 0 allows none.", at_least=0)
    steps: int = setting(
        0, "Most optimiser steps in a round, for tasks that count steps; 0 allows none.", at_least=0
    )
    batch_size: int = setting(0, "Most rows in a step; 0 allows none.", at_least=0)
    seconds_per_round: float = setting(
        0.0, "Training that takes longer is killed; 0 allows none.", at_least=0, unit="s"
    )
    noise_bytes: int = setting(
        2**28,
        "Most memory, and disk, for the noise that later steps take back "
        "(`privacy.record.mechanism: dp_ftrl`); 0 allows independent noise only.",
        at_least=0,
        unit="bytes",
    )
    hours: list[str] = setting(
        factory=list, doc="When training may begin, local time: 18:00-06:00. Empty: never."
    )
    privacy: PrivacyFloor = setting(factory=PrivacyFloor, doc="The least protection.")
    leaves: list[str] = setting(
        factory=list,
        doc="Numbers that may leave beside the update: `evaluation` (counts on held-out rows), "
        "`epsilon` (what was spent, and the noise multiplier), `rows` (row count, as weight), "
        "`budget` (epsilon of the data set's budget that is neither spent nor reserved, told when "
        "a run is agreed to).",
    )
    roster: Literal["confirm", "follow"] = setting(
        "confirm",
        "A changed roster is taken only after `lepton-fed keys accept`, or as soon as the "
        "coordinator signed it.",
    )


@dataclass(frozen=True)
class LedgerFiles:
    """Where the site keeps what its records have spent."""

    file: str = setting(
        "",
        "The ledger; empty for ledger.sqlite in `state`. Sites of one owner under several "
        "coordinators name the same file.",
    )
    head: str = setting(
        "",
        "A file on another disk that keeps where the ledger stands, so that an older copy is "
        "found. Empty for none.",
    )


@dataclass(frozen=True)
class ClientConf:
    """A site."""

    kind: Literal["client"] = setting("client", "What this file configures.")
    name: str = setting("site-1", "Name of the site in the roster.")
    coordinator: str = setting(
        "localhost:9092", "The coordinator's address and port: the one connection that is made."
    )
    ca: str = setting(
        "keys/tls/ca.crt",
        "Certificate of the authority that signed the coordinator's, PEM; two while one takes "
        "over from another.",
    )
    coordinator_key: str = setting(
        "keys/coordinator.pub",
        "The coordinator's public key, pinned: what it asks, the roster and bundles must carry it.",
    )
    roster: str = setting(
        "keys/roster.json", "The list of sites, signed by the coordinator, as the site pinned it."
    )
    identity_key: str = setting(
        "keys/site-1.pem", "The site's private Ed25519 key; it signs what leaves."
    )
    node_key: str = setting(
        "keys/site-1.node", "The site's private key for the connection (EC, OpenSSH format)."
    )
    task: str = setting(
        "conf/server.yaml",
        "File with the task: a server or simulation conf, whose `task` section is read. "
        "`lepton-fed check` holds the site's data against it before the first contact.",
    )
    source: Source = setting(factory=Source, doc="The site's own rows, read in place.")
    held_out: float = setting(0.2, "Fraction of the rows kept for evaluation.", at_least=0, below=1)
    device: str = setting("cpu", "cpu, cuda, cuda:1, or several GPUs by index (cuda:0,1).")
    policy: Policy = setting(factory=Policy, doc="What the owner allows; empty allows nothing.")
    budget: Budget = setting(factory=Budget, doc="Privacy budget of the data set.")
    ledger: LedgerFiles = setting(factory=LedgerFiles, doc="The record of what was spent.")
    state: str = setting("state", "Folder for the ledger, receipts and bundles.")


Conf = SimulationConf | ServerConf | ClientConf

KINDS: dict[str, type[SimulationConf] | type[ServerConf] | type[ClientConf]] = {
    "simulation": SimulationConf,
    "server": ServerConf,
    "client": ClientConf,
}
