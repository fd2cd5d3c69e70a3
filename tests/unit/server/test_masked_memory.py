"""What the coordinator needs of memory for a masked sum: its words once, whatever comes."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from lepton_fed.core.layout import Layout, TensorEntry
from lepton_fed.core.ring import RingEncoding
from lepton_fed.privacy.secagg.collector import Collector
from lepton_fed.privacy.secagg.member import Rules
from lepton_fed.privacy.secagg.vector import MaskedLayout
from lepton_fed.runs.files import read_tensors, write_tensors
from lepton_fed.server.groups import GroupSum
from lepton_fed.server.intake import MaskedIntake
from lepton_fed.strategies.base import DELTA
from lepton_fed.strategies.fedavg import fedavg
from tests.unit.privacy.secagg.test_protocol import ROUND, Federation

SIZE = 2_000_000
RING = 4 * SIZE
"""Bytes of a ring vector."""
SMALL = RING // 8


@contextmanager
def peak() -> Iterator[Callable[[], int]]:
    """Yield what tells the most memory that was taken since."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        yield lambda: tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


class Filed:
    """A packed vector that is made where it is read, as one that is in a file."""

    size = RING

    def __getitem__(self, part: slice) -> npt.NDArray[np.uint8]:
        start, stop, _ = part.indices(self.size)
        return np.full(stop - start, 1, dtype=np.uint8)


def added(names: list[str]) -> int:
    """Return the most memory that adding the vectors of some sites takes, in bytes."""
    federation = Federation(names)
    members = {name: federation.member(name) for name in names}
    with peak() as taken:
        collector = Collector(ROUND, federation.roster, SIZE)
        for name, member in members.items():
            collector.add_advert(name, member.advertise(ROUND))
        cohort = collector.form(Rules(3, federation.threshold).least(len(names)))
        for name, member in members.items():
            made = member.share(ROUND, cohort.adverts, cohort.threshold)
            collector.add_envelopes(name, made)
        collector.close_envelopes()
        for name in names:
            collector.add_masked(name, Filed())
        assert collector.close_masked() == tuple(names)
        assert collector.total[-1] == len(names) * 0x01010101 % 2**32
        return taken()


def test_the_sum_takes_one_ring_vector_however_many_sites_there_are() -> None:
    few, many = added(list("abc")), added([f"site-{number:02}" for number in range(12)])
    assert RING <= few < RING + SMALL
    assert RING <= many < RING + 2 * SMALL
    assert many - few < SMALL


def test_a_sum_is_written_from_where_it_is(tmp_path: Path) -> None:
    total = np.arange(SIZE, dtype=np.uint32)
    with peak() as taken:
        write_tensors(tmp_path / "sum.safetensors", {"total": total}, {"whose": "x"})
        assert taken() < SMALL
    arrays, about = read_tensors(tmp_path / "sum.safetensors")
    np.testing.assert_array_equal(arrays["total"], total)
    assert about == {"whose": "x"}


@pytest.mark.parametrize("groups", [1, 2])
def test_the_next_model_takes_its_own_memory_and_no_other(tmp_path: Path, groups: int) -> None:
    """In double precision the mean alone would be two ring vectors more."""
    encoding = RingEncoding.plan(cohort=8, coordinate_bound=1.0, weight_bound=1.0, bits=32)
    masked = MaskedLayout(encoding, (DELTA,), SIZE)
    ones, _ = masked.encode({DELTA: np.full(SIZE, 0.5, np.float32)}, 1.0)
    sums = [GroupSum(n, (f"s{n}",), masked.open(ones.copy()), RING) for n in range(1, groups + 1)]
    layout = Layout((TensorEntry("weight", (SIZE,), "float32", "shared", 0),))
    model = np.ones(SIZE, np.float32)
    intake = MaskedIntake(fedavg(), layout, encoding, 1, 3, tmp_path, sums)
    with peak() as taken:
        _, moved = fedavg().server.step({}, model, intake.aggregate())
        assert model.nbytes <= taken() < model.nbytes + SMALL
    assert (moved == 1.5).all()
    found = intake.aggregate()
    whole = found.mean[DELTA]  # type: ignore[union-attr]
    assert (whole.dtype, whole.shape) == (np.float64, (SIZE,))
    assert (whole == 0.5).all()
    assert list(found.mean) == [DELTA]  # type: ignore[union-attr]
    assert len(found.mean) == 1  # type: ignore[union-attr]
