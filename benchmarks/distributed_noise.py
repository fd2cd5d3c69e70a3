"""What noise on an integer grid costs: against torch.normal, and a site's whole step.

Run it as `python -m benchmarks.distributed_noise`. Times are CPU seconds of the process.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from benchmarks.timing import in_turn
from lepton_fed.privacy.distributed.plan import SharesPlan
from lepton_fed.privacy.distributed.rotation import Rotation
from lepton_fed.privacy.distributed.shares import NoisySum
from lepton_fed.privacy.dp.discrete_gaussian import discrete_gaussian
from lepton_fed.privacy.dp.entropy import Entropy
from lepton_fed.privacy.dp.skellam import skellam

SAMPLES = 4_000_000
PARAMETERS = 10_000_000
SIGMAS = (0.5, 20.0, 1e3, 1e6, 1e9)


def samples() -> None:
    """Time samples against floating-point ones, which can be seeded and are not exact."""
    entropy = Entropy.from_system()
    torch.set_num_threads(1)
    print("| sigma | discrete Gaussian, ns | Skellam, ns | against torch.normal, median (range) |")
    print("|---|---|---|---|")

    def normal() -> torch.Tensor:
        return torch.normal(0.0, 1.0, (SAMPLES,))

    for sigma in SIGMAS:
        ours, _, ratio = in_turn(
            lambda of=sigma: discrete_gaussian(of, SAMPLES, entropy),  # type: ignore[misc]
            normal,
            5,
            time.process_time,
        )
        skellam_text = "-"
        if sigma < 2**25:
            other, _, _ = in_turn(
                lambda of=sigma: skellam(of**2, SAMPLES, entropy),  # type: ignore[misc]
                normal,
                3,
                time.process_time,
            )
            skellam_text = f"{other / SAMPLES * 1e9:.1f}"
        least, median, most = ratio
        each = f"{ours / SAMPLES * 1e9:.1f}"
        spread = f"{median:.1f} ({least:.1f} to {most:.1f})"
        print(f"| {sigma:g} | {each} | {skellam_text} | {spread} |")


def steps() -> None:
    """Time what a site and the coordinator do with an update of ten million coordinates."""
    plan = SharesPlan(10, 7, PARAMETERS, 1.0, 10.0, 20)
    ends = NoisySum(plan, Rotation.of_round(1, 1, PARAMETERS))
    entropy = Entropy.from_system()
    update = np.full(PARAMETERS, 1e-5, dtype=np.float32)
    words = ends.encode(update, entropy)
    print("\n| step of 10,000,000 coordinates | seconds | ns a coordinate |")
    print("|---|---|---|")
    for name, call in (
        ("rotate", lambda: ends.rotation.apply(update)),
        ("clip, rotate, round", lambda: ends.quantised(update, entropy)),
        ("share of noise", lambda: ends.share(entropy)),
        ("all that a site does", lambda: ends.encode(update, entropy)),
        ("decode the sum", lambda: ends.decode(words)),
    ):
        seconds, _, _ = in_turn(call, lambda: None, 3, time.process_time)
        print(f"| {name} | {seconds:.2f} | {seconds / PARAMETERS * 1e9:.1f} |")


def main() -> None:
    """Print the tables."""
    samples()
    steps()


if __name__ == "__main__":
    main()
