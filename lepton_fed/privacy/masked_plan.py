"""What the parties of a run have to have in common before they mask anything.

All of it follows from what the site agreed to and from the task: never from a message of the
coordinator's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from lepton_fed.config.agreement import Agreement
from lepton_fed.core.digests import digest_of
from lepton_fed.core.encoding import plan_encoding
from lepton_fed.errors import Problem, TaskError
from lepton_fed.identity.signature import PublicKey
from lepton_fed.privacy.client import client_noise, least_clip
from lepton_fed.privacy.dp.shared import LEAST_SHARE, shared_noise
from lepton_fed.privacy.secagg.context import Context
from lepton_fed.privacy.secagg.keys import post_quantum_available
from lepton_fed.privacy.secagg.vector import MaskedLayout

__all__ = [
    "Shape",
    "context_of",
    "masked_layout",
    "require_one_vector",
    "require_post_quantum",
    "roster_digest",
    "serial_of",
]


@dataclass(frozen=True)
class Shape:
    """What an update of the task is made of.

    Args:
        layout: Digest of the model's layout.
        vectors: Names of the vectors of an update.
        size: Length of each, in elements.
        counts: Number of evaluation counts.
    """

    layout: str
    vectors: tuple[str, ...]
    size: int
    counts: int


def serial_of(agreement: Agreement, round_number: int, *, train: bool) -> int:
    """Return the number of a round among all that are masked: the last evaluation comes after.

    Args:
        agreement: What was agreed to.
        round_number: Round, from 1.
        train: Whether it trains.
    """
    return round_number if train else agreement.rounds + 1


def masked_layout(
    agreement: Agreement, shape: Shape, *, train: bool, evaluate: bool
) -> MaskedLayout:
    """Return where everything lies in what is masked, and how it is encoded.

    Args:
        agreement: What was agreed to; its task's bounds and its cohort decide.
        shape: What an update is made of.
        train: Whether the round trains.
        evaluate: Whether it evaluates.

    Raises:
        TaskError: LF3401, the ring has no room for the cohort at the task's bounds, and for the
            noise where sites share it, or is too coarse for a norm that moves; LF3340, client-level
            DP covers one vector, and there are others.
        Refused: LF4620, the shared noise is not sound; LF4630, client-level DP is not.
    """
    bits, cohort = agreement.privacy.secure_aggregation.bits, agreement.cohort
    noise = shared_noise(agreement, shape.size) if train else None
    room = (lambda grid: noise.room(grid, cohort)) if noise else None
    encoding = plan_encoding(agreement.task, cohort, bits, room)
    if noise and noise.share_std(encoding.grid) < LEAST_SHARE:
        raise TaskError(
            Problem("LF3401", f"a ring of {bits} bits is too coarse for a share of the noise",
                    key="privacy.secure_aggregation.bits",
                    remedy="more bits, or a smaller task.aggregation.norm_bound")
        )  # fmt: skip
    names, size = (shape.vectors, shape.size) if train else ((), 0)
    client = client_noise(agreement, shape.size) if train else None
    if client:
        require_one_vector(agreement, shape.vectors)
        size = client.shares.padded if client.shares else client.coordinates
        least = (
            0.0
            if client.shares or client.quantile is None
            else least_clip(encoding.grid, client.coordinates)
        )
        if client.clip < least:
            raise TaskError(
                Problem("LF3401", f"a ring of {bits} bits is too coarse for updates of norm "
                        f"{client.clip:g}: at least {least:.2g}", key="privacy.client.clip",
                        remedy="a larger norm, more privacy.secure_aggregation.bits, or a smaller "
                        "task.aggregation.norm_bound")
            )  # fmt: skip
    try:
        return MaskedLayout(encoding, names, size, shape.counts if evaluate else 0)
    except ValueError as error:
        raise TaskError(
            Problem("LF3401", str(error), key="privacy.secure_aggregation.bits",
                    remedy="more bits, or fewer sites in a round")
        ) from error  # fmt: skip


def require_one_vector(agreement: Agreement, vectors: Sequence[str]) -> None:
    """Refuse client-level DP with a strategy that sends more than the difference of the model.

    Args:
        agreement: What is agreed to.
        vectors: Names of the vectors of an update.

    Raises:
        TaskError: LF3340, it does.
    """
    if agreement.privacy.client.enabled and len(vectors) != 1:
        raise TaskError(
            Problem("LF3340", f"strategy {agreement.strategy.name!r} sends {len(vectors)} vectors, "
                    "and client-level DP is accounted for one", key="strategy.name",
                    remedy="fedavg, fedprox, or a server optimiser")
        )  # fmt: skip


def require_post_quantum(agreement: Agreement) -> None:
    """Refuse a run whose keys cannot be agreed on here as it wants.

    Raises:
        TaskError: LF3405, there is no ML-KEM-768 on this machine.
    """
    if agreement.privacy.secure_aggregation.post_quantum and not post_quantum_available():
        raise TaskError(
            Problem("LF3405", "there is no ML-KEM-768 on this machine",
                    key="privacy.secure_aggregation.post_quantum",
                    remedy="a newer `cryptography` with OpenSSL 3.5 or later, or set it to false")
        )  # fmt: skip


def roster_digest(keys: Mapping[str, PublicKey]) -> str:
    """Return a digest of who is on a roster, 64 hexadecimal digits.

    Args:
        keys: Public identity key of each site, by name.
    """
    known = {name: key.public_bytes_raw().hex() for name, key in keys.items()}
    return digest_of("lepton-fed secure aggregation roster 1", known)


def context_of(
    agreement: Agreement,
    shape: Shape,
    layout: MaskedLayout,
    roster: str,
    *,
    serial: int,
    attempt: int,
) -> Context:
    """Return what everything of an attempt is bound to.

    Args:
        agreement: What was agreed to.
        shape: What an update is made of.
        layout: Where everything lies in what is masked.
        roster: :func:`roster_digest`.
        serial: :func:`serial_of`.
        attempt: Attempt at the round, from 1.
    """
    about = {
        "model": shape.layout,
        "vectors": list(layout.names),
        "size": layout.size,
        "counts": layout.counts,
        "encoding": asdict(layout.encoding),
    }
    digest = digest_of("lepton-fed masked layout 1", about)
    # The agreement's digest covers run, task, strategy, seed and what is protected.
    return Context(agreement.run, serial, attempt, roster, agreement.digest, digest)
