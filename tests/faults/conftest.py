"""One federation in the middle of a run, for all faults after which it goes on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.rows import Fault, rows_of
from tests.faults.running import Running


@pytest.fixture(scope="package")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A coordinator and three sites that train."""
    found = Running(tmp_path_factory.mktemp("faults"))
    try:
        found.start_all()
        yield found
    finally:
        found.stop()


@pytest.fixture
def running(federation: Running) -> Iterator[Running]:
    """The federation, in a round that all sites contribute to; afterwards, no fault is left."""
    federation.whole()
    try:
        yield federation
    finally:
        federation.mend()


@pytest.fixture
def rows(request: pytest.FixtureRequest) -> tuple[Fault, ...]:
    """The rows that the test carries, the upper first."""
    return rows_of(request.function)
