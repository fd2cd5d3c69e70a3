from __future__ import annotations

from lepton_fed.flower.quota import Quota

MIB = 1024 * 1024


def test_a_node_may_store_about_twice_what_it_was_asked_with() -> None:
    quota = Quota()
    assert not quota.has_room(7)
    quota.ask(7, 1000 * MIB)
    quota.store(7, 2000 * MIB)
    assert quota.has_room(7), "heads and metrics come beside"
    quota.store(7, 16 * MIB)
    assert not quota.has_room(7)
    quota.ask(8, 0)
    assert quota.has_room(8), "each node has a room of its own"
    quota.store(9, 1)  # nobody asked it
    assert not quota.has_room(9)


def test_room_that_was_not_used_is_not_kept() -> None:
    quota = Quota()
    for _ in range(3):
        quota.ask(7, MIB)
        quota.end(7, MIB)
    assert not quota.has_room(7)
    quota.ask(7, MIB)
    quota.store(7, 18 * MIB)
    assert not quota.has_room(7)
    quota.end(7, MIB)
    quota.ask(7, MIB)
    assert quota.has_room(7), "what it stored was removed with the answer"


def test_two_answers_have_room_side_by_side() -> None:
    quota = Quota()
    quota.ask(7, MIB)
    quota.ask(7, MIB)
    quota.store(7, 18 * MIB)
    assert quota.has_room(7)
    quota.end(7, MIB)
    assert quota.has_room(7)
    quota.store(7, 18 * MIB)
    assert not quota.has_room(7)


def test_an_answer_of_many_parts_is_announced_a_few_times() -> None:
    quota = Quota(most_parts=10)
    assert not quota.may_announce(7, 1)
    quota.ask(7, 0)
    assert not quota.may_announce(7, 11)
    for _ in range(3):
        assert quota.may_announce(7, 10)
        quota.announce(7, 10)
    assert not quota.may_announce(7, 1)
    quota.ask(7, 0)
    quota.end(7, 0)
    assert quota.may_announce(7, 10), "a late answer says that the site is free"


def test_the_answer_of_a_large_model_has_few_enough_parts() -> None:
    quota = Quota()
    quota.ask(7, 0)
    chunks = 4 * 4 * 1024**3 // (5 * MIB)  # four arrays of a thousand million float32 each
    assert quota.may_announce(7, chunks + 100)
