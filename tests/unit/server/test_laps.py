from __future__ import annotations

from lepton_fed.server.laps import PHASES, Laps


def test_each_part_of_a_round_has_its_own_seconds() -> None:
    now = [100.0]
    laps = Laps(lambda: now[0])
    now[0] = 500.0  # what was before the round is no part of it
    laps.start()
    for phase, seconds in zip(PHASES, (1.0, 20.0004, 0.3, 4.0), strict=True):
        now[0] += seconds
        laps.done(phase)
    assert laps.seconds() == {
        "select": 1.0, "exchange": 20.0, "aggregate": 0.3, "checkpoint": 4.0
    }  # fmt: skip


def test_a_round_begins_anew_and_a_part_that_was_left_out_took_no_time() -> None:
    now = [0.0]
    laps = Laps(lambda: now[0])
    laps.start()
    now[0] = 7.0
    laps.done("select")
    laps.start()
    now[0] = 9.0
    laps.done("checkpoint")
    assert laps.seconds() == {"select": 0.0, "exchange": 0.0, "aggregate": 0.0, "checkpoint": 2.0}
