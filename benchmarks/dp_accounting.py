"""What accounting takes: a run of equal rounds, and one in which every round is another.

CPU seconds and seconds, with nothing remembered from before; the epsilon beside it. Run it as
`python -m benchmarks.dp_accounting`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from lepton_fed.privacy.dp import accounting
from lepton_fed.privacy.dp.accounting import SampledGaussian, epsilon_of

DELTA = 1e-5
RUNS: dict[str, Sequence[SampledGaussian]] = {
    "1000 equal rounds": [SampledGaussian(2.0, 0.05, 20)] * 1000,
    "1000 equal rounds, small batches": [SampledGaussian(1.1, 256 / 60000, 234)] * 1000,
    "50 different rounds": [
        SampledGaussian(1.0 + 0.02 * n, 0.02 + 0.001 * n, 20) for n in range(50)
    ],
}


def main() -> None:
    """Print a table: seconds and epsilon."""
    epsilon_of([SampledGaussian(1.0, 0.5, 2)], DELTA)  # imports what it needs
    print(f"{'rounds':<34} {'CPU s':>7} {'s':>7} {'epsilon':>9}")
    for name, events in RUNS.items():
        for known in (accounting._epsilon, accounting._losses, accounting._grid):
            known.cache_clear()
        processor, wall = time.process_time(), time.perf_counter()
        epsilon = epsilon_of(events, DELTA)
        processor, wall = time.process_time() - processor, time.perf_counter() - wall
        print(f"{name:<34} {processor:>7.2f} {wall:>7.2f} {epsilon:>9.3f}")


if __name__ == "__main__":
    main()
