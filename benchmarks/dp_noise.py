"""What secure noise costs: AES-CTR and Box-Muller, added in place, against torch.normal.

One thread, CPU time, in turn. torch.normal only makes the numbers (seedable, not cryptographic);
ours are made and added to a sum
in float64, as a step of training does. Run it as `python -m benchmarks.dp_noise`.
"""

from __future__ import annotations

import functools
import time

import numpy as np
import torch

from benchmarks.timing import in_turn
from lepton_fed.privacy.dp.entropy import Entropy

SIZES = (10_000, 1_000_000, 10_000_000)


def main() -> None:
    """Print a table: nanoseconds a number, and the ratio."""
    torch.set_num_threads(1)
    entropy = Entropy.from_system()
    print(f"{'numbers':>12} {'ours ns':>9} {'torch.normal ns':>16} {'ratio':>22}")
    for size in SIZES:
        ours = functools.partial(entropy.add_normal, np.zeros(size), 1.0)
        theirs = functools.partial(torch.normal, 0.0, 1.0, (size,))
        own, floor, (low, middle, high) = in_turn(ours, theirs, 11, time.process_time)
        print(
            f"{size:>12,} {own / size * 1e9:>9.2f} {floor / size * 1e9:>16.2f} "
            f"{middle:>8.2f} ({low:.2f} to {high:.2f})"
        )


if __name__ == "__main__":
    main()
