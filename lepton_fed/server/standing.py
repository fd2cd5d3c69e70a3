"""Where a run stands after a round: everything that the rounds after it follow from.

A checkpoint is one safetensors file, written aside, synced and renamed before anybody is told that
the round is over. A run that was killed goes on from the newest; the choice of sites follows from
the run's seed and the round, so no state of a generator is needed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from lepton_fed.core.decode import decode, strict_json
from lepton_fed.core.digests import canonical_json
from lepton_fed.core.exchange import MODEL
from lepton_fed.core.layout import Vector
from lepton_fed.errors import Problem, RunError
from lepton_fed.runs.folder import RunFolder
from lepton_fed.strategies.base import ServerState

__all__ = ["Record", "SiteRecord", "Standing"]

_STATE = "state/"


@dataclass
class SiteRecord:
    """What the coordinator knows of a site.

    Args:
        rounds: Rounds in which its update was used.
        metrics: Metrics of the newest model it evaluated.
        epsilon: Epsilon it says its records have spent; None when it says nothing.
        noise_multiplier: Noise multiplier it says it uses.
        update_bytes: Bytes of the vectors of its largest update.
        held_out: Rows it says it evaluates on; None before the first counts.
        took_s: Seconds that its last answer took; None before the first.
    """

    rounds: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    epsilon: float | None = None
    noise_multiplier: float | None = None
    update_bytes: int = 0
    held_out: float | None = None
    took_s: float | None = None


@dataclass
class Record:
    """The part of a standing that is no array.

    Args:
        contributors: Sites whose updates the last round used, sorted.
        used: Rounds whose quorum was reached.
        seconds: Time that the run has taken, without interruptions.
        sent_bytes: Bytes of the vectors that the last round sent to its whole cohort.
        sites: What is known of each site, by name.
        clip: Norm to which the next round's updates are clipped, where it moves; 0 where it does
            not, and before the first round.
    """

    contributors: list[str] = field(default_factory=list)
    used: int = 0
    seconds: float = 0.0
    sent_bytes: int = 0
    sites: dict[str, SiteRecord] = field(default_factory=dict)
    clip: float = 0.0


@dataclass
class Standing:
    """A run after a round.

    Args:
        round_number: The finished round; 0 before the first.
        model: The model, ``[layout.size]`` float32.
        state: The strategy's state, by name.
        digest: Run digest so far.
        record: What else is known.
    """

    round_number: int
    model: Vector
    state: ServerState
    digest: str
    record: Record = field(default_factory=Record)

    def save(self, folder: RunFolder, task: str, layout: str) -> None:
        """Write the checkpoint.

        Args:
            folder: The run's folder.
            task: Digest of the task.
            layout: Digest of the layout.

        Raises:
            RunError: It cannot be written; those before are there still.
        """
        about = {
            "round": str(self.round_number),
            "digest": self.digest,
            "task": task,
            "layout": layout,
            "record": canonical_json(self.record).decode(),
        }
        arrays = {MODEL: self.model, **{_STATE + name: a for name, a in self.state.items()}}
        folder.write_checkpoint(self.round_number, arrays, about)

    @classmethod
    def load(cls, folder: RunFolder, task: str, layout: str, size: int) -> Standing | None:
        """Read the newest checkpoint that is whole.

        Args:
            folder: The run's folder.
            task: Digest that the task must have.
            layout: Digest that the layout must have.
            size: Length of the model, in elements.

        Returns:
            Where the run stands; None when no round was finished.

        Raises:
            RunError: LF5216, there are checkpoints, and none can be gone on from.
        """
        why = ""
        for path, arrays, about in folder.checkpoints():
            try:
                if (about.get("task"), about.get("layout")) != (task, layout):
                    raise ValueError("it is of another task or layout")
                return _standing(arrays, about, size)
            except (KeyError, ValueError) as error:
                why = why or f"{path.name}: {error}"
        if not why:
            return None
        raise RunError(
            Problem("LF5216", f"no checkpoint of this run can be gone on from: {why}",
                    where=str(folder.path / "checkpoints"),
                    remedy="restore the folder from a backup, with the versions and plug-ins the "
                    "run was made with, or begin a new run: --new")
        )  # fmt: skip


def _standing(
    arrays: dict[str, npt.NDArray[np.generic]], about: dict[str, str], size: int
) -> Standing:
    model = arrays[MODEL]
    if model.dtype != np.float32 or model.shape != (size,):
        raise ValueError("its model has another form")
    state = {n.removeprefix(_STATE): a for n, a in arrays.items() if n.startswith(_STATE)}
    record = decode(Record, strict_json(about["record"].encode()))
    return Standing(int(about["round"]), model.view(np.float32), state, about["digest"], record)
