from __future__ import annotations

import gc
import platform
import subprocess
import sys
import weakref

import pytest

from lepton_fed.flower import heap
from lepton_fed.flower.heap import Sweeper, settle

_RESIDENT = """
import pathlib, threading
from lepton_fed.flower.heap import give_large_blocks_back

def resident():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024

def take(blocks, size):
    held = [bytes([1]) * size for _ in range(blocks)]
    held.append(bytes(1000))  # what lies above on the heap, and stays
    return held.pop()

def work():
    kept.append(take(1, 20_000_000))  # the first that is freed moves the C library's own bound up
    for _ in range(4):
        kept.append(take(8, 5_000_000))

kept = []
assert give_large_blocks_back()
before = resident()
workers = [threading.Thread(target=work) for _ in range(4)]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
print(resident() - before)
"""


class Part:
    """A part of a message that a cycle holds."""

    def __init__(self) -> None:
        self.itself = self


def test_cycles_are_looked_for_each_time_so_many_bytes_have_passed() -> None:
    swept: list[str] = []
    sweeper = Sweeper(100, lambda: swept.append("swept"))
    sweeper.passed(99)
    assert not swept
    sweeper.passed(1)
    assert swept == ["swept"]
    sweeper.passed(99)
    assert swept == ["swept"]
    sweeper.passed(500)
    assert len(swept) == 2


def test_a_sweep_frees_what_a_cycle_holds() -> None:
    gc.disable()
    try:
        part = weakref.ref(Part())
        assert part() is not None
        Sweeper(1).passed(1)
        assert part() is None
    finally:
        gc.enable()


def test_what_is_there_at_the_start_is_taken_for_lasting() -> None:
    gc.disable()
    try:
        left = weakref.ref(Part())
        lasting = Part()
        settle()
        assert left() is None
        assert gc.get_freeze_count() > 1000
        there = weakref.ref(lasting)
        del lasting
        gc.collect()
        assert there() is not None
    finally:
        gc.unfreeze()
        gc.enable()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of GNU's C library only")
def test_large_blocks_that_threads_freed_are_no_longer_resident() -> None:
    command = [sys.executable, "-c", _RESIDENT]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(found.stdout) < 5_000_000


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not heap.give_large_blocks_back()
