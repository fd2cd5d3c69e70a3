"""The federation that is measured, as small as it gets: that it runs, not how fast."""

from __future__ import annotations

import math

import pytest

from benchmarks.federation import beside_stock, measure


@pytest.mark.parametrize("stand_ins", [True, False])
def test_a_federation_is_measured(stand_ins: bool) -> None:
    found = measure(2, 5, 2, database=False, stand_ins=stand_ins)
    assert len(found.rounds_s) == len(found.resident_kib) == 2
    # The kernel counts pages in batches, by thread: the two differ by some of them.
    assert found.peak_kib >= max(found.resident_kib) - 4096 > 0
    assert found.database_bytes == [0, 0]


@pytest.mark.slow
def test_stock_flower_does_rounds_in_turn_with_lepton_fed() -> None:
    found, pairs = beside_stock(2, 5, 1, database=True)
    assert len(found.rounds_s) == 2
    ((ours, stock),) = pairs
    assert ours == found.rounds_s[1]
    assert math.isfinite(stock)
