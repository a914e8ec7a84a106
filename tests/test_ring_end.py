"""The ring's scripts, on the side of the readers: the end, and a full ring that waits for its own reader."""

import pytest

from rings import Rig
from synthbroker.replies import Incarnation

# -- the end


def test_the_end_comes_when_everything_was_given(rig: Rig) -> None:
    rig.open()
    who, reader = rig.producer(), rig.reader()
    assert rig.take(reader).word == "EMPTY"
    rig.put(who, 1, 2, 3)
    rig.ring.end()
    assert rig.numbers(reader, 2) == [1, 2]
    assert rig.numbers(reader, 2) == [3]
    assert rig.take(reader).word == "END", "what it holds itself, it need not wait for"
    rig.open(reopen=True)
    assert rig.take(reader).word == "EMPTY"
    assert rig.put(rig.producer("p", "w2"), 1).last == 1
    assert rig.numbers(reader) == [4]


def test_the_end_comes_also_where_everything_was_evicted_unseen(rig: Rig) -> None:
    rig.open("drop-oldest", max_samples=3)
    who, reader = rig.producer(), rig.reader()
    rig.put(who, 1, 2, 3)
    assert rig.ring.room(who, 1000, 3).word == "OK", "everything leaves for what never comes"
    assert rig.take(reader).word == "EMPTY"
    rig.ring.end()
    assert rig.take(reader).word == "END"
    assert rig.balance().groups["train"]["lost"] == 3


def test_the_end_waits_for_what_others_hold_and_may_leave_behind(rig: Rig) -> None:
    rig.open()
    reader, worker, other = rig.reader(), rig.reader(name="f/1"), rig.reader(name="g/0")
    rig.put(rig.producer(), 1, 2, 3)
    rig.ring.end()
    assert [rig.numbers(one, 1) for one in (reader, worker, other)] == [[1], [2], [3]]
    assert rig.take(reader).word == "DRAINED"
    assert rig.take(worker).word == "DRAINED"
    assert rig.take(other).word == "DRAINED", "the two of the other family hold samples"
    rig.ring.acknowledge("train", [3])
    assert (rig.take(reader).word, rig.take(worker).word) == ("END", "END"), "of one family none waits for the other"
    rig.ring.leave_group(reader, "train")
    assert rig.numbers(other, claim_after_s=30) == [1]
    rig.ring.acknowledge("train", [1, 2])
    assert rig.take(other).word == "END"


@pytest.mark.parametrize("closings", [["a", "b"], ["b", "a"]])
def test_a_ring_ends_when_as_many_producers_as_declared_have_closed(rig: Rig, closings: list[str]) -> None:
    rig.open(producers=2)
    everybody = {name: rig.producer(name) for name in ("a", "b", "c")}
    rig.ring.leave_producer(everybody["c"], {}, closed=False)
    rig.ring.leave_producer(everybody[closings[0]], {}, closed=True)
    assert not rig.ring.read_meta().ended
    rig.ring.leave_producer(everybody[closings[1]], {}, closed=True)
    assert rig.ring.read_meta().ended
    assert rig.take(rig.reader()).word == "END"
    assert not rig.open(producers=2, reopen=True).ended
    rig.ring.leave_producer(rig.producer("a", "w2"), {}, closed=True)
    assert not rig.ring.read_meta().ended, "a reopened ring counts anew"
    rig.ring.leave_producer(rig.producer("b", "w2"), {}, closed=True)
    assert rig.ring.read_meta().ended


def test_a_goodbye_said_twice_counts_once(rig: Rig) -> None:
    """The answer to the first was lost, or the job was put into the queue again: one producer all the same."""
    rig.open(producers=2)
    first, again = rig.producer("a", "w1"), Incarnation("a", "w2")
    for _ in range(2):
        rig.ring.leave_producer(first, {}, closed=True)
    rig.ring.join_producer(again, 0, {})
    rig.ring.leave_producer(again, {}, closed=True)
    assert not rig.ring.read_meta().ended
    rig.ring.leave_producer(rig.producer("b"), {}, closed=True)
    assert rig.ring.read_meta().ended


def test_an_older_life_cannot_say_goodbye_for_a_newer_one(rig: Rig) -> None:
    rig.open(producers=1)
    older, newer = rig.producer("p", "w1"), rig.producer("p", "w2")
    rig.ring.room(newer, 100, 1)
    rig.ring.leave_producer(older, {}, closed=True)
    assert not rig.ring.read_meta().ended
    assert rig.balance().leases == {"p": (100, 1)}


def test_ending_wakes_who_waits_for_room(rig: Rig) -> None:
    rig.open(max_samples=1)
    who = rig.producer()
    rig.fill(who)
    answer = rig.put(who, 2)
    rig.ring.end()
    assert rig.keys.xread({rig.key("room"): answer.room_id}, count=1)


# -- a full ring that waits for its own reader


def held(rig: Rig, who: Incarnation, group: str = "train") -> bool:
    return rig.take(who, group=group).held


def test_a_reader_whose_unacknowledged_samples_fill_the_ring_is_told(rig: Rig) -> None:
    rig.open(max_samples=3)
    who, reader = rig.producer(), rig.reader()
    rig.put(who, 1, 2, 3)
    assert not held(rig, reader), "nobody waits for room"
    rig.put(who, 4)
    assert held(rig, reader)
    rig.ring.acknowledge("train", [1])
    assert not held(rig, reader)
    rig.put(who, 4)
    assert rig.numbers(reader) == [4]


def test_a_reader_is_not_told_so_for_what_another_group_holds(rig: Rig) -> None:
    rig.open(max_samples=3)
    who, quick, slow = rig.producer(), rig.reader(), rig.reader("slow")
    rig.fill(who)
    rig.ring.acknowledge("train", rig.numbers(quick))
    assert not held(rig, quick)
    rig.numbers(slow, group="slow")
    rig.put(who, 4)
    assert not held(rig, quick)
    assert held(rig, slow, "slow")


def test_a_reader_is_not_told_so_for_room_that_is_only_reserved(rig: Rig) -> None:
    rig.open(capacity=1000)
    reader = rig.reader()
    rig.ring.room(rig.producer("a"), 900, 1)
    assert rig.ring.room(rig.producer("b"), 900, 1).word == "FULL"
    assert not held(rig, reader)
