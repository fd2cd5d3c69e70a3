"""A process that hangs is found; a slow one, and one on a machine that slept, is left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from lepton_fed.clients.stall import StallWatch, cpu_ticks


def looks(*seen, allowed=3):
    """Return what each look finds, given the CPU time of each process at each look."""
    steps = iter(seen)
    watch = StallWatch(7, allowed, lambda group: next(steps))
    return [watch.hung() for _ in seen]


def test_a_group_that_uses_no_cpu_time_look_after_look_hangs():
    assert looks(*[{7: 500, 8: 20}] * 5) == [False, False, False, True, True]


def test_a_thread_that_only_looks_whether_its_parent_lives_does_not_hide_a_hang():
    assert looks({7: 500}, {7: 501}, {7: 502}, {7: 503}) == [False, False, False, True]


def test_a_slow_group_is_left_alone():
    assert not any(looks(*[{7: 500 + 5 * (look // 3)} for look in range(40)]))


def test_work_of_any_process_of_the_group_counts():
    assert not any(looks(*[{7: 500, 8: 10 * look} for look in range(10)]))


def test_a_process_that_comes_or_goes_counts():
    assert looks({7: 5}, {7: 5}, {7: 5, 9: 0}, {7: 5, 9: 0}, {7: 5}, {7: 5}) == [False] * 6


def test_where_nothing_can_be_seen_nothing_hangs():
    assert looks(*[{}] * 9) == [False] * 9


def test_ticks_are_those_of_the_group_and_of_all_its_processes():
    code = (
        "import os, sys\nif os.fork() == 0:\n    print(os.getpid(), flush=True)\nsys.stdin.read()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        child = int(parent.stdout.readline())
        assert set(cpu_ticks(parent.pid)) == {parent.pid, child}
        assert os.getpid() not in cpu_ticks(parent.pid)
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
        parent.communicate()
    assert os.getpid() in cpu_ticks(os.getpgrp())
    assert cpu_ticks(os.getpgrp())[os.getpid()] > 0
