"""Where a site's training with correlated noise stands: its next step, and noise still to come off.

Both are secret and belong to the answers that left. They are on disk in one file with the round's
answer, written before it leaves; and the ledger holds which round that was, written in between. So
a site that is killed has one of two things: the answer, which it repeats; or nothing of the round,
which nobody has seen, and trains it anew from the state before, with fresh noise. What left in the
end is the transcript of one mechanism, whose cost was charged once.

A state that is older than what left (a removed or restored file), or of other rows, would have the
noise of some steps made twice, of which the difference shows the gradients: it is refused.
So is a second training of the run, from another state folder of the same ledger, at the cost of
the first: the ledger names the one that the answers are of.
"""

from __future__ import annotations

import secrets

import numpy as np

from lepton_fed.clients.answers import Kept, KeptNoise
from lepton_fed.core.digests import digest_of
from lepton_fed.errors import Problem, Refused
from lepton_fed.privacy.dp.entropy import Entropy
from lepton_fed.privacy.dp.events import CorrelatedGaussian, charged_steps
from lepton_fed.privacy.dp.planning import NoisePlan
from lepton_fed.privacy.dp.step_noise import CorrelatedSteps
from lepton_fed.privacy.factorisation.mechanism import FixedOrder
from lepton_fed.privacy.factorisation.noise import CorrelatedNoise
from lepton_fed.privacy.ledger.book import RunName
from lepton_fed.privacy.ledger.ledger import Ledger

__all__ = ["CorrelatedTraining"]

_ANOTHERS = "something of this run has left from another state folder"


class CorrelatedTraining:
    """The training of one run at one site.

    Args:
        plan: Order, steps of a round, and noise multiplier.
        size: Coordinates of a gradient.
        clip: Norm to which a record's gradient is clipped.
        rows: Digest of the rows, in their order.
        entropy: Where fresh noise comes from.
        ledger: Where it is written down which rounds left.
        run: The run.
    """

    def __init__(
        self,
        plan: NoisePlan,
        size: int,
        clip: float,
        rows: str,
        entropy: Entropy,
        ledger: Ledger,
        run: RunName,
    ) -> None:
        if not isinstance(plan.sampler, FixedOrder):
            raise ValueError("correlated noise is for a fixed order")
        self._plan, self._order = plan, plan.sampler
        self._size, self._clip, self._entropy = size, clip, entropy
        self._ledger, self._run = ledger, run
        about = [size, clip, rows, plan.noise_multiplier, plan.steps, self._order]
        self._identity = digest_of("lepton-fed correlated noise 1", about)
        self._round = 0
        self._broken = ""
        self._training = secrets.token_hex(16)
        self._stream = self._stream_from(None)

    def restore(self, kept: Kept | None, newest_round: int) -> None:
        """Go on from what is on disk.

        Args:
            kept: The newest answer, if it is there.
            newest_round: The newest round that was answered, whether its answer is there or not.
        """
        noise = kept.noise if kept is not None else None
        self._round, self._broken = (0 if kept is None else kept.round_number), ""
        if self._round < newest_round or (kept is not None and noise is None):
            self._broken = "the noise of the rounds before is gone"
            return
        if noise is not None and noise.of != self._identity:
            self._broken = "the noise of the rounds before was for other rows or another plan"
            return
        if noise is not None:
            self._training = noise.training
        try:
            self._stream = self._stream_from(noise)
        except ValueError:
            self._broken = "the noise of the rounds before is not as it was kept"

    def state(self) -> KeptNoise:
        """Return what has to be on disk before the round's answer leaves."""
        step, past = self._stream.past()
        return KeptNoise(self._identity, step, past, self._training)

    def event(self) -> CorrelatedGaussian:
        """Return what the next round adds to what was charged.

        A round that was charged and of which nothing left is charged nothing more: what leaves in
        its place is the same steps of the same mechanism.

        Raises:
            Refused: LF3350, the noise of the rounds before is not there; LF3351, the round would
                have steps that were not planned.
        """
        if not self._broken and self._ledger.answered(self._run.agreement) > self._round:
            self._broken = "something has left that the noise on disk does not go with"
        if not self._broken and self._is_anothers():
            self._broken = _ANOTHERS
        end = self._stream.step + self._plan.steps
        own = self._order.event(self._plan.noise_multiplier, 0)
        charged = charged_steps(self._ledger.charged(self._run), own)
        if not self._broken and charged > end:
            self._broken = "more steps were charged than the noise on disk is for"
        if self._broken:
            raise self._refused()
        if end > self._order.planned:
            raise Refused(
                Problem("LF3351", f"{self._order.planned} steps were planned, and "
                        f"{self._stream.step} are done", key="rounds.count",
                        remedy="the run ends here for this site")
            )  # fmt: skip
        return self._order.at(charged).event(self._plan.noise_multiplier, end - charged)

    def steps(self) -> tuple[FixedOrder, CorrelatedSteps]:
        """Return what draws the next round's batches, and what adds their noise."""
        return self._order.at(self._stream.step), CorrelatedSteps(self._stream)

    def trained(self, round_number: int) -> None:
        """Take note that a round's answer is made, and on disk where there is one.

        Args:
            round_number: The round.
        """
        self._round = round_number

    def leaves(self, round_number: int) -> None:
        """Write into the ledger that something made in a round is about to leave.

        Args:
            round_number: The round.

        Raises:
            Refused: It cannot be written, or something has left that was made in another training
                of this run: LF3350. Nothing may leave.
        """
        if not self._ledger.note_answer(self._run, round_number, self._training):
            self._broken = _ANOTHERS
            raise self._refused()

    def failed(self, round_number: int) -> None:
        """End the training: a round failed after its noise was drawn.

        The refusal is made of what this noise covers. Were the steps done again with other noise,
        both would have left, and one was charged.

        Args:
            round_number: The round.
        """
        self._broken = "a round failed, and its noise cannot be drawn a second time"
        self.leaves(round_number)

    def _is_anothers(self) -> bool:
        return self._ledger.training(self._run.agreement) not in ("", self._training)

    def _refused(self) -> Refused:
        return Refused(
            Problem("LF3350", f"training cannot go on: {self._broken}", key="privacy.record",
                    remedy="the site has no further part in this run; a run under another name "
                    "is a new training, and costs anew")
        )  # fmt: skip

    def _stream_from(self, noise: KeptNoise | None) -> CorrelatedNoise:
        past = None if noise is None else (noise.step, np.array(noise.past, np.float32))
        return self._order.mechanism.noise(
            self._size, self._clip, self._plan.noise_multiplier, self._entropy, past
        )
