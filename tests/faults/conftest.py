"""One federation in the middle of a run, for all faults after which it goes on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.rows import Fault, rounds_of, rows_of
from tests.faults.running import Running


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Try each fault on the kinds of rounds that its rows name."""
    if "federation" in metafunc.fixturenames:
        kinds = rounds_of(metafunc.function)
        metafunc.parametrize("federation", kinds, indirect=True, scope="package")


@pytest.fixture(scope="package")
def federation(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """A coordinator and sites that train: five whose updates are masked, or three."""
    found = Running(tmp_path_factory.mktemp("faults"), kind=request.param)
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
