"""What a finished run has to say, as plain data: `summary.json` in its folder."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["ClientGuarantee", "RunSummary", "SiteSummary"]


@dataclass(frozen=True)
class SiteSummary:
    """One site's part in a run.

    Args:
        name: Name of the site.
        rounds: Rounds in which its update was used.
        metrics: Metrics of the final model on the site's held-out rows, by name; empty when the
            site sends none.
        epsilon: Epsilon its records spent in this run, or may have spent at most where sites say
            nothing of one alone; None without record-level DP.
        noise_multiplier: Noise standard deviation over the clipping norm; None without DP.
        update_bytes: Bytes of the vectors of its largest update.
    """

    name: str
    rounds: int
    metrics: dict[str, float] = field(default_factory=dict)
    epsilon: float | None = None
    noise_multiplier: float | None = None
    update_bytes: int = 0


@dataclass(frozen=True)
class ClientGuarantee:
    """Client-level DP of a run: what one site's whole part in it is protected by.

    Args:
        epsilon: What the rounds of the run cost a site, at most.
        delta: Delta of the guarantee.
        adjacency: Which runs are neighbours.
        against: Whom it holds against, in words.
        noise: Who added the noise: ``coordinator`` or ``shared``.
        mechanism: Its distribution.
        clip: Norm to which updates were clipped, where it moved in the first round.
        noise_multiplier: Standard deviation of the noise that is counted on, over the norm of what
            a site added to the sum: ``clip``, or 1.05 times a round's norm where it moved.
        honest: Sites that are counted on to add a share; 0 where the coordinator added the noise.
        quantile: Which quantile of the updates' norms the norm followed; None where it stayed.
        last_clip: The norm after the last round; None in runs of before it could move.
    """

    epsilon: float
    delta: float
    adjacency: str
    against: str
    noise: str
    mechanism: str
    clip: float
    noise_multiplier: float
    honest: int = 0
    quantile: float | None = None
    last_clip: float | None = None


@dataclass(frozen=True)
class RunSummary:
    """A finished run.

    Args:
        run: Name of the run (its folder's name).
        task: Digest of the task.
        layout: Digest of the model's layout.
        model: Digest of the final model.
        digest: Run digest: task, seed, contributors and models of every round.
        repeatable: Whether a second run promises the same run digest (CPU and no DP noise).
        seed: Seed of the run.
        rounds: Rounds finished.
        strategy: Name of the strategy.
        parameters: Numbers of the model that are trained together.
        metrics: Metrics of the final model over all sites' held-out rows.
        error_bounds: Error bound of a metric that is not exact (AUC), by name.
        delta: Delta of every site's epsilon; None without record-level DP.
        clip: Per-record clipping norm; None without record-level DP.
        outside_epsilon: Numbers derived from rows that left the sites uncovered by epsilon.
        finished: UTC time, ISO 8601.
        seconds: Wall-clock seconds of the run.
        versions: Versions of the libraries used, by name.
        sites: The sites, by name.
        events: Hash of the event log's last line: what the log is held to.
        masked: Whether the coordinator saw the sums of updates alone.
        honest: How many sites of a sum are counted on to add their share of the noise; 0 where each
            adds all of it, and without record-level DP.
        sampler: How record-level DP drew a step's records; empty without it.
        randomness: Where its noise and batches came from: ``system``, or ``insecure_seeded``, which
            protects nobody; empty without it.
        client: Client-level DP; None without.
        mechanism: Record-level DP's: ``dp_sgd`` or ``dp_ftrl``; empty without it.
    """

    run: str
    task: str
    layout: str
    model: str
    digest: str
    repeatable: bool
    seed: int
    rounds: int
    strategy: str
    parameters: int
    metrics: dict[str, float]
    error_bounds: dict[str, float]
    delta: float | None
    clip: float | None
    outside_epsilon: list[str]
    finished: str
    seconds: float
    versions: dict[str, str]
    sites: list[SiteSummary]
    events: str = ""
    masked: bool = False
    honest: int = 0
    sampler: str = ""
    randomness: str = ""
    client: ClientGuarantee | None = None
    mechanism: str = ""
