"""Room for many samples at once: the longest prefix that fits is granted, and who waits is told in portions."""

from typing import Any

import pytest

from rings import Rig
from synthbroker.replies import Answer, Incarnation
from wires import sample_of

COST = sample_of(8, 1).cost_bytes
SHARE = 16  # ack.lua: waiting producers are told when this part of a full ring is free


def ask(rig: Rig, who: Incarnation, *costs: int, free_bytes: int = 0) -> Answer:
    return rig.ring.room(who, sum(costs), len(costs), costs=costs, free_bytes=free_bytes)


def waiting(rig: Rig) -> str:
    return rig.snapshot().meta["waiting"]


# -- the longest prefix


@pytest.mark.parametrize("policy", ["block", "drop-oldest"])
def test_room_is_granted_for_all_where_there_is_room_for_all(rig: Rig, policy: str) -> None:
    rig.open(policy, capacity=1000)
    who = rig.producer()
    answer = ask(rig, who, 400, 300, 300)
    assert (answer.word, answer.granted) == ("OK", 3)
    assert rig.balance().leases == {"p": (1000, 3)}


@pytest.mark.parametrize("policy", ["block", "drop-oldest"])
@pytest.mark.parametrize(
    ("costs", "granted"),
    [
        ((400, 300, 301), 2),
        ((400, 700, 1), 1),  # a prefix: what stands behind the first that does not fit is not looked at
        ((1000, 1), 1),
        ((999, 1001, 1), 1),
    ],
)
def test_what_can_never_fit_together_is_granted_in_part(
    rig: Rig, policy: str, costs: tuple[int, ...], granted: int
) -> None:
    rig.open(policy, capacity=1000)
    answer = ask(rig, rig.producer(), *costs)
    assert (answer.word, answer.granted) == ("OK", granted)
    assert rig.balance().leases == {"p": (sum(costs[:granted]), granted)}


@pytest.mark.parametrize("policy", ["block", "drop-oldest"])
def test_no_more_samples_are_granted_than_the_ring_may_hold(rig: Rig, policy: str) -> None:
    rig.open(policy, max_samples=3)
    answer = ask(rig, rig.producer(), *[10] * 5)
    assert (answer.word, answer.granted) == ("OK", 3)
    assert rig.balance().leases == {"p": (30, 3)}


@pytest.mark.parametrize("policy", ["block", "drop-oldest"])
@pytest.mark.parametrize("costs", [(1001,), (1001, 1), (2000, 2000)])
def test_a_first_sample_that_can_never_fit_is_too_big(rig: Rig, policy: str, costs: tuple[int, ...]) -> None:
    rig.open(policy, capacity=1000)
    who = rig.producer()
    assert ask(rig, who, 500).word == "OK"
    answer = ask(rig, who, *costs)
    assert (answer.word, answer.capacity_bytes, answer.granted) == ("TOOBIG", 1000, 0)


def test_block_grants_what_is_free_and_what_can_leave(rig: Rig) -> None:
    rig.open(max_samples=10)
    who, reader = rig.producer(), rig.reader()
    rig.put(who, *range(1, 9))
    assert ask(rig, who, *[COST] * 5).granted == 2, "two places are free"
    rig.ring.acknowledge("train", rig.numbers(reader, 2))
    assert ask(rig, who, *[COST] * 5).granted == 4, "two may leave"
    assert rig.balance().live == range(3, 9)
    assert rig.put(who, 9, 10, 11, 12).word == "OK"
    assert rig.balance().leases == {}


def test_block_grants_by_bytes_what_is_free_and_what_can_leave(rig: Rig) -> None:
    rig.open(capacity=10 * COST)
    who, reader = rig.producer(), rig.reader()
    rig.put(who, *range(1, 9))
    assert ask(rig, who, COST, 2 * COST).granted == 1
    rig.ring.acknowledge("train", rig.numbers(reader, 1))
    assert ask(rig, who, COST, 2 * COST).granted == 2
    assert rig.balance().leases == {"p": (3 * COST, 2)}


def test_a_full_ring_that_blocks_says_so_and_remembers_one_sample(rig: Rig) -> None:
    """Were the whole batch remembered, room for the first of it would seem too little."""
    rig.open(max_samples=4)
    who = rig.producer()
    rig.reader()
    rig.fill(who)
    answer = ask(rig, who, 70, 60, 50)
    assert (answer.word, answer.holder, answer.live, answer.granted) == ("FULL", "train", 4, 0)
    assert waiting(rig) == "70 1"
    assert rig.balance().leases == {}


def test_asking_for_many_lets_go_of_what_was_granted_before(rig: Rig) -> None:
    rig.open(capacity=1000)
    who = rig.producer()
    for costs, granted in (((600, 600), 1), ((300, 300, 300, 300), 3), ((1000, 1), 1)):
        assert ask(rig, who, *costs).granted == granted
        assert rig.balance().leases == {"p": (sum(costs[:granted]), granted)}


def test_drop_oldest_makes_room_for_as_many_as_can_be_at_once(rig: Rig) -> None:
    rig.open("drop-oldest", max_samples=6)
    who = rig.producer()
    rig.put(who, *range(1, 7))
    assert ask(rig, who, *[COST] * 4).granted == 4
    assert rig.balance().live == range(5, 7), "no more than needed leaves"
    assert ask(rig, who, *[COST] * 9).granted == 6
    assert rig.balance().live == range(7, 7)


def test_the_number_granted_goes_through_one_commit(rig: Rig) -> None:
    rig.open(capacity=5 * COST)
    who, reader = rig.producer(), rig.reader()
    sent = 0
    while sent < 40:
        granted = ask(rig, who, *[COST] * 7).granted
        assert 0 < granted <= 5
        answer = rig.put(who, *range(sent + 1, sent + 1 + granted))
        assert (answer.word, answer.last) == ("OK", sent + granted)
        assert rig.balance().leases == {}
        sent += granted
        rig.ring.acknowledge("train", rig.numbers(reader))


def test_a_refused_commit_uses_up_the_lease_for_all_that_it_was_asked_to_take(rig: Rig) -> None:
    rig.open(max_samples=4)
    who = rig.producer()
    rig.put(who, 1, 2)
    assert ask(rig, who, COST, COST).granted == 2
    answer = rig.put(who, 3, 4, 5, 6)
    assert (answer.word, answer.last) == ("FULL", 4)
    assert rig.balance().leases == {}


def test_a_gap_uses_up_the_lease_only_for_what_stands_before_it(rig: Rig) -> None:
    rig.open()
    who = rig.producer()
    assert ask(rig, who, *[COST] * 4).granted == 4
    assert rig.put(who, 1, 3, 4).word == "GAP"
    assert rig.balance().leases == {"p": (3 * COST, 3)}


@pytest.mark.parametrize("policy", ["block", "drop-oldest"])
def test_what_others_have_reserved_is_not_granted(rig: Rig, policy: str) -> None:
    rig.open(policy, max_samples=6)
    one, two = rig.producer("one"), rig.producer("two")
    assert ask(rig, one, *[COST] * 4).granted == 4
    assert ask(rig, two, *[COST] * 4).granted == 2
    answer = ask(rig, rig.producer("three"), *[COST] * 4)
    assert (answer.word, answer.granted) == ("FULL", 0)
    assert rig.balance().leases == {"one": (4 * COST, 4), "two": (2 * COST, 2)}


@pytest.mark.parametrize("policy", ["block", "drop-oldest"])
def test_beside_what_others_have_reserved_room_is_made_for_as_many_as_can_be(rig: Rig, policy: str) -> None:
    """All six fit never, as long as another's lease is there; five do where five leave that may."""
    rig.open(policy, max_samples=10)
    one, two, reader = rig.producer("one"), rig.producer("two"), rig.reader()
    assert ask(rig, one, *[COST] * 5).granted == 5
    rig.put(two, 1, 2, 3, 4, 5)
    rig.ring.acknowledge("train", rig.numbers(reader))
    answer = ask(rig, two, *[COST] * 6)
    assert (answer.word, answer.granted) == ("OK", 5)
    assert rig.balance().leases == {"one": (5 * COST, 5), "two": (5 * COST, 5)}


def test_nothing_is_granted_before_as_much_has_left_as_the_server_lacks(rig: Rig) -> None:
    """The ring has room, the server has not; were room granted, the next commit would fail as the last one did."""
    rig.open(max_samples=10)
    who = rig.producer()
    rig.reader()
    rig.put(who, 1, 2)
    assert rig.ring.room(who, COST, 1, free_bytes=COST).word == "FULL"
    assert ask(rig, who, COST, COST, free_bytes=COST).word == "FULL"


# -- telling those who wait


def full_ring(rig: Rig, count: int = 64, **more: Any) -> tuple[Incarnation, Incarnation, Answer]:
    """Fill a ring of so many samples, all of which a reader holds, and wait for room; more come behind them."""
    rig.open(max_samples=count, **more)
    who, reader = rig.producer(), rig.reader()
    rig.put(who, *range(1, count + 1))
    answer = ask(rig, who, *[COST] * 8)
    assert answer.word == "FULL"
    return who, reader, answer


def told(rig: Rig, answer: Answer) -> bool:
    return bool(rig.keys.xread({rig.key("room"): answer.room_id}, count=1))


def test_waiting_producers_are_told_when_a_portion_of_the_ring_is_free(rig: Rig) -> None:
    who, reader, answer = full_ring(rig)
    held = rig.numbers(reader, 32)
    for number in held[: 64 // SHARE - 1]:
        rig.ring.acknowledge("train", [number])
        assert not told(rig, answer), "for so little nobody is woken"
        assert waiting(rig) != "0"
    rig.ring.acknowledge("train", [held[64 // SHARE - 1]])
    assert told(rig, answer)
    assert waiting(rig) == "0"
    assert ask(rig, who, *[COST] * 8).granted == 64 // SHARE


def test_waiting_producers_are_told_at_once_where_the_group_has_read_all(rig: Rig) -> None:
    who, reader, answer = full_ring(rig)
    assert len(rig.numbers(reader)) == 64
    rig.ring.acknowledge("train", [1])
    assert told(rig, answer)
    assert ask(rig, who, *[COST] * 8).granted == 1


def test_what_is_held_in_front_is_no_portion(rig: Rig) -> None:
    _, reader, answer = full_ring(rig)
    held = rig.numbers(reader, 32)
    rig.ring.acknowledge("train", held[1:])
    assert not told(rig, answer), "the oldest is still held: no room was made"
    rig.ring.acknowledge("train", held[:1])
    assert told(rig, answer)


def test_the_slowest_group_says_how_much_is_free(rig: Rig) -> None:
    _, reader, answer = full_ring(rig, groups=("train", "val"))
    late = rig.reader("val", "1")
    rig.ring.acknowledge("train", rig.numbers(reader, 32))
    assert not told(rig, answer)
    rig.ring.acknowledge("val", rig.numbers(late, 3, "val"))
    assert not told(rig, answer)
    rig.ring.acknowledge("val", rig.numbers(late, 1, "val"))
    assert told(rig, answer)


def test_in_a_small_ring_every_sample_is_a_portion(rig: Rig) -> None:
    who, reader, answer = full_ring(rig, SHARE)
    rig.ring.acknowledge("train", rig.numbers(reader, 1))
    assert told(rig, answer)
    assert ask(rig, who, *[COST] * 8).granted == 1


def test_who_does_not_wait_to_be_told_gets_what_is_free(rig: Rig) -> None:
    """Waiting ends after a second at most; then less than a portion is enough."""
    who, reader, answer = full_ring(rig)
    rig.ring.acknowledge("train", rig.numbers(reader, 1))
    assert not told(rig, answer)
    assert ask(rig, who, *[COST] * 8).granted == 1
