"""The ring's scripts, on the side of the producers: commit, room, leases, eviction."""

from typing import Any

import pytest

from rings import BIG, TWO_PARTS, Rig, commit_arguments, send_parts
from synthbroker.errors import RingEndedError, RingMissingError, ShutOutError
from synthbroker.replies import Incarnation
from wires import sample_of


def test_samples_are_numbered_without_gaps_and_stand_there_as_text(rig: Rig) -> None:
    rig.open()
    who = rig.producer("gen-1", "ab12")
    assert rig.put(who, 1, 2, 3).last == 3
    rig.put(who, 4, nbytes=TWO_PARTS)
    rig.put(who, 5, nbytes=BIG)
    entries = rig.keys.xrange(rig.key("samples"))
    assert [number for number, _ in entries] == [b"1-0", b"2-0", b"3-0", b"4-0", b"5-0"]
    tiny, beside, mixed = (list(entries[i][1]) for i in (0, 3, 4))
    assert tiny == [b"from", b"seq", b"t", b"spec", b"bytes", b"raw", b"parts", b"head", b"data"]
    assert beside == tiny[:-1]
    assert mixed == tiny
    assert [entries[i][1][b"parts"].rpartition(b":")[2] for i in (0, 3, 4)] == [b"0", b"2", b"1"]
    fields = entries[0][1]
    assert (fields[b"from"], fields[b"seq"], fields[b"spec"]) == (b"gen-1:ab12", b"1", b"x:u8[8]")
    assert (fields[b"bytes"], fields[b"raw"], fields[b"parts"]) == (b"8", b"8", b"-:0")
    assert abs(float(fields[b"t"]) - rig.ring.now_s()) < 60


# -- in order, each once


def test_samples_are_taken_strictly_in_order(rig: Rig) -> None:
    rig.open()
    who = rig.producer()
    answer = rig.put(who, 2, 3)
    assert (answer.word, answer.last) == ("GAP", 0)
    answer = rig.put(who, 1, 2, 4, 5)
    assert (answer.word, answer.last) == ("GAP", 2)
    assert rig.balance().live == range(1, 3)


def test_a_sample_that_was_never_taken_is_not_mistaken_for_a_duplicate(rig: Rig) -> None:
    rig.open()
    who = rig.producer()
    rig.put(who, 1)
    assert rig.put(who, 3).word == "GAP", "2 is lost on the way; were 3 taken, 2 would be refused for ever"
    answer = rig.put(who, 2, 3)
    assert (answer.word, answer.last) == ("OK", 3)
    seen = rig.balance()
    assert (len(seen.live), seen["duplicates"]) == (3, 0)


def test_a_duplicate_is_success_and_is_in_the_ring_once(rig: Rig) -> None:
    rig.open()
    who = rig.producer()
    rig.put(who, 1, 2, 3)
    answer = rig.put(who, 1, 2, 3)
    assert (answer.word, answer.last) == ("OK", 3)
    answer = rig.put(who, 3, 4)
    assert (answer.word, answer.last) == ("OK", 4)
    seen = rig.balance()
    assert (len(seen.live), seen["duplicates"]) == (4, 4)


def test_the_parts_of_another_attempt_are_removed_and_live_ones_stay(rig: Rig) -> None:
    rig.open()
    who = rig.producer()
    rig.put(who, 1, nbytes=BIG)
    live = rig.part_keys()
    rig.put(who, 1, nbytes=BIG)
    assert rig.part_keys() == live
    rig.balance()


def test_the_same_attempt_committed_again_leaves_its_parts_alive(rig: Rig) -> None:
    rig.open()
    rig.producer()
    sample = sample_of(BIG, 1)
    names = send_parts(rig, "a1", sample)
    for _ in range(3):
        reply = rig.script("commit", rig.ring.epoch, "p", "w1", "0 0 0 0", *commit_arguments(1, sample, "a1"))
        assert reply[:2] == ["OK", "1"]
    assert [rig.keys.pttl(name) for name in names] == [-1] * len(names)


def test_a_duplicate_of_what_left_the_ring_meanwhile_is_still_one(rig: Rig) -> None:
    rig.open("drop-oldest", max_samples=2)
    who = rig.producer()
    for seq in (1, 2, 3, 4):
        rig.put(who, seq, nbytes=BIG)
    answer = rig.put(who, 1, nbytes=BIG)
    assert (answer.word, answer.last) == ("OK", 4)
    assert rig.balance().live == range(3, 5)


@pytest.mark.parametrize("missing", [[0], [1], [0, 1]])
def test_a_sample_whose_parts_are_gone_is_not_taken_and_nothing_is_made_to_last(rig: Rig, missing: list[int]) -> None:
    rig.open()
    rig.producer()
    sample = sample_of(TWO_PARTS, 1)
    names = send_parts(rig, "a1", sample)
    assert len(names) == 2
    rig.keys.delete(*(names[i] for i in missing))
    reply = rig.script("commit", rig.ring.epoch, "p", "w1", "0 0 0 0", *commit_arguments(1, sample, "a1"))
    assert reply[:2] == ["MISSING", "0"]
    assert all(rig.keys.pttl(name) != -1 for name in names)
    assert rig.balance().live == range(1, 1)


def test_a_long_payload_has_thousands_of_parts(rig: Rig) -> None:
    rig.open()
    rig.producer()
    names = [rig.key(f"part:a1:{i}") for i in range(2500)]
    for start in range(0, len(names), 500):
        rig.keys.mset(dict.fromkeys(names[start : start + 500], b"x"))
    arguments = ["0 0 0 0", "1 1 5000 2500 2500 a1 2500 -", "x:u8[2500]", b"head", b"", b""]
    assert rig.script("commit", rig.ring.epoch, "p", "w1", *arguments)[:2] == ["OK", "1"]
    rig.balance()


def test_what_no_script_may_do_without_an_incarnation_that_is_the_newest(rig: Rig) -> None:
    rig.open()
    stranger = Incarnation("nobody", "w")
    with pytest.raises(RingMissingError, match="does not know producer 'nobody'"):
        rig.put(stranger, 1)
    with pytest.raises(RingMissingError, match="does not know producer 'nobody'"):
        rig.ring.room(stranger, 1, 1)
    older, newer = rig.producer("p", "w1"), rig.producer("p", "w2")
    assert rig.put(newer, 1).word == "OK"
    with pytest.raises(ShutOutError, match="newer producer named 'p'"):
        rig.put(older, 1)
    with pytest.raises(ShutOutError, match="newer producer named 'p'"):
        rig.ring.room(older, 1, 1)
    assert rig.balance().live == range(1, 2)


def test_joining_again_changes_nothing_and_a_new_life_may_begin_anywhere(rig: Rig) -> None:
    rig.open()
    who = rig.producer()
    rig.put(who, 1, 2)
    assert rig.put(rig.producer(), 2, 3).last == 3, "the last number stays what the ring knows"
    restarted = rig.producer("p", "w2", last=7)
    assert rig.put(restarted, 7).last == 7
    assert rig.put(restarted, 8).last == 8
    assert rig.balance().live == range(1, 5)


def test_an_ended_ring_takes_nothing_new_and_knows_its_duplicates(rig: Rig) -> None:
    rig.open()
    who = rig.producer()
    rig.put(who, 1)
    rig.ring.end()
    assert rig.put(who, 1).word == "OK"
    with pytest.raises(RingEndedError, match="has ended"):
        rig.put(who, 1, 2)
    with pytest.raises(RingEndedError, match="has ended"):
        rig.ring.room(who, 1, 1)
    assert rig.balance().live == range(1, 2)


# -- room


@pytest.mark.parametrize("policy", ["block", "drop-oldest"])
def test_what_can_never_fit_is_too_big(rig: Rig, policy: str) -> None:
    rig.open(policy, capacity=1000)
    who = rig.producer()
    answer = rig.ring.room(who, 1001, 1)
    assert (answer.word, answer.capacity_bytes) == ("TOOBIG", 1000)
    assert rig.ring.room(who, 1000, 1).word == "OK"


def test_a_lease_is_counted_and_asking_twice_is_asking_once(rig: Rig) -> None:
    rig.open(capacity=1000)
    one, two = rig.producer("one"), rig.producer("two")
    for cost in (900, 300, 600):
        assert rig.ring.room(one, cost, 2).word == "OK"
        assert rig.balance().leases == {"one": (cost, 2)}
    assert rig.ring.room(two, 401, 1).word == "FULL"
    assert rig.ring.room(two, 400, 1).word == "OK"
    assert rig.ring.room(one, 601, 1).word == "FULL", "who asks again lets go of what he had"
    assert rig.balance().leases == {"two": (400, 1)}


def test_48_waiting_producers_hold_nothing(rig: Rig) -> None:
    rig.open(capacity=rig.capacity_for(10, BIG))
    cost = sample_of(BIG, 1).cost_bytes
    everybody = [rig.producer(f"p{i}") for i in range(48)]
    for _ in range(2):  # asking again and again changes nothing
        answers = [rig.ring.room(who, cost, 1).word for who in everybody]
        seen = rig.balance()
        assert sum(size for size, _ in seen.leases.values()) <= seen["capacity"]
        assert answers.count("OK") == len(seen.leases) == 10
    holders = [who for who in everybody if who.name in seen.leases]
    assert all(rig.put(who, 1, nbytes=BIG).word == "OK" for who in holders)
    assert rig.put(next(who for who in everybody if who not in holders), 1, nbytes=BIG).word == "FULL"
    assert len(rig.balance().live) == 10


def test_a_commit_uses_its_lease_up(rig: Rig) -> None:
    rig.open()
    who = rig.producer()
    cost = sample_of(BIG, 1).cost_bytes
    rig.ring.room(who, 3 * cost, 3)
    rig.put(who, 1, nbytes=BIG)
    assert rig.balance().leases == {"p": (2 * cost, 2)}
    rig.put(who, 2, 3, 4, nbytes=BIG)
    assert rig.balance().leases == {}


def test_a_lease_ends_with_its_holder(rig: Rig) -> None:
    rig.open()
    for closed in (True, False):
        who = rig.producer()
        rig.ring.room(who, 100, 1)
        rig.ring.leave_producer(who, {}, closed=closed)
        assert rig.balance().leases == {}
    rig.ring.room(rig.producer("p", "w2"), 100, 1)
    rig.producer("p", "w3")
    assert rig.balance().leases == {}


def test_who_leaves_makes_room_and_says_so(rig: Rig) -> None:
    rig.open(capacity=1000)
    one, two = rig.producer("one"), rig.producer("two")
    rig.ring.room(one, 800, 1)
    answer = rig.ring.room(two, 800, 1)
    assert answer.word == "FULL"
    rig.ring.leave_producer(one, {}, closed=False)
    assert rig.keys.xread({rig.key("room"): answer.room_id}, count=1), "who waits is woken"
    assert rig.ring.room(two, 800, 1).word == "OK"


def lease(rig: Rig, who: Incarnation, cost: int, seconds: float) -> str:
    """Ask for room for so long; a lease of negative length has ended."""
    return str(rig.script("room", rig.ring.epoch, who.name, who.word, cost, 1, seconds, 0)[0])


def test_a_lease_that_is_not_renewed_ends(rig: Rig) -> None:
    rig.open(capacity=1000)
    one, two = rig.producer("one"), rig.producer("two")
    assert lease(rig, one, 800, -1) == "OK"
    assert lease(rig, two, 800, 60) == "OK"
    assert rig.balance().leases == {"two": (800, 1)}
    assert lease(rig, one, 800, 60) == "FULL"


def test_a_heartbeat_renews_a_lease(rig: Rig) -> None:
    rig.open(capacity=1000)
    one, two = rig.producer("one"), rig.producer("two")
    assert lease(rig, one, 800, -1) == "OK"
    assert rig.ring.beat("producer", "one", {})
    assert not rig.ring.beat("producer", "one", {}, "another life")
    assert lease(rig, two, 800, 60) == "FULL"
    assert rig.balance().leases == {"one": (800, 1)}


def test_whose_lease_has_ended_may_still_commit_where_there_is_room(rig: Rig) -> None:
    rig.open(capacity=rig.capacity_for(1, BIG))
    one, two = rig.producer("one"), rig.producer("two")
    cost = sample_of(BIG, 1).cost_bytes
    lease(rig, one, cost, -1)
    lease(rig, two, cost, -1)
    assert rig.put(one, 1, nbytes=BIG).word == "OK"
    assert rig.put(two, 1, nbytes=BIG).word == "FULL"


def test_a_full_answer_names_who_holds_the_ring_up_and_where_to_wait(rig: Rig) -> None:
    rig.open(max_samples=3)
    who = rig.producer()
    assert rig.fill(who) == 3
    answer = rig.put(who, 4)
    assert (answer.word, answer.last, answer.holder, answer.live) == ("FULL", 3, "", 3)
    reader = rig.reader("slow")
    assert rig.put(who, 4).holder == rig.ring.room(who, 1, 1).holder == "slow"
    rig.ring.acknowledge("slow", rig.numbers(reader, group="slow"))
    assert rig.put(who, 4).word == "OK"


# -- eviction


def test_drop_oldest_evicts_the_oldest_and_counts_what_was_never_seen(rig: Rig) -> None:
    rig.open("drop-oldest", max_samples=5)
    who, reader = rig.producer(), rig.reader()
    rig.put(who, 1, 2, 3, 4, 5)
    assert rig.numbers(reader, 2) == [1, 2]
    rig.ring.acknowledge("train", [1])
    assert rig.put(who, *range(6, 10)).word == "OK"
    group = rig.balance().groups["train"]
    assert rig.snapshot().live == range(5, 10)
    assert (group["delivered"], group["acknowledged"], group["evicted_pending"], group["lost"]) == (2, 1, 1, 2)


def test_drop_oldest_never_says_full_to_one_producer(rig: Rig) -> None:
    rig.open("drop-oldest", capacity=rig.capacity_for(4, BIG))
    who = rig.producer()
    for seq in range(1, 30):
        assert rig.ring.room(who, sample_of(BIG, seq).cost_bytes, 1).word == "OK"
        assert rig.put(who, seq, nbytes=BIG).word == "OK"
        rig.balance()
    assert len(rig.part_keys()) == 4 * len(sample_of(BIG, 1).parts)


def test_many_small_samples_leave_for_a_large_one(rig: Rig) -> None:
    rig.open("drop-oldest", capacity=rig.capacity_for(300, 8))
    who = rig.producer()
    rig.put(who, *range(1, 301))
    large = sample_of(BIG, 0)
    assert rig.ring.room(who, large.cost_bytes, 1).word == "OK"
    seen = rig.balance()
    assert 0 < len(seen.live) < 300
    assert seen["bytes"] + large.cost_bytes > seen["capacity"] - sample_of(8, 300).cost_bytes - 8, "no more than needed"


@pytest.mark.parametrize("limit", ["bytes", "samples"])
def test_nothing_is_evicted_for_what_would_not_fit_anyway(rig: Rig, limit: str) -> None:
    """What others have reserved cannot be evicted; emptying the ring would lose samples and give no room."""
    capacity, most = (rig.capacity_for(10, 8), None) if limit == "bytes" else (10**9, 10)
    rig.open("drop-oldest", capacity=capacity, max_samples=most)
    one, two = rig.producer("one"), rig.producer("two")
    cost = sample_of(8, 1).cost_bytes
    assert rig.ring.room(one, 5 * cost, 5).word == "OK"
    rig.put(two, *range(1, 6))
    assert rig.ring.room(two, 6 * cost, 6).word == "FULL"
    assert len(rig.balance().live) == 5
    if limit == "samples":
        assert rig.ring.room(one, 11 * cost, 11).word == "FULL"
        assert len(rig.balance().live) == 5


def test_block_keeps_what_is_only_prefetched(rig: Rig) -> None:
    """Given to a reader is not trained on: evicted then, it would be lost with a reader that dies."""
    rig.open(max_samples=4)
    who, reader = rig.producer(), rig.reader()
    rig.put(who, 1, 2, 3, 4)
    assert rig.numbers(reader) == [1, 2, 3, 4]
    assert rig.put(who, 5).word == "FULL"
    rig.ring.acknowledge("train", [2, 3, 4])
    assert rig.put(who, 5).word == "FULL", "the oldest is still in the reader's hands"
    rig.ring.acknowledge("train", [1])
    assert rig.put(who, 5, 6).word == "OK"
    assert rig.balance().live == range(3, 7)


def test_block_evicts_only_as_room_is_asked_for(rig: Rig) -> None:
    rig.open(max_samples=100)
    who, reader = rig.producer(), rig.reader()
    rig.put(who, *range(1, 101))
    rig.ring.acknowledge("train", rig.numbers(reader))
    assert len(rig.balance().live) == 100
    rig.put(who, 101)
    assert rig.balance().live == range(2, 102)


@pytest.mark.parametrize("by", ["bytes", "samples"])
def test_a_ring_is_bounded(rig: Rig, by: str) -> None:
    more: dict[str, Any] = {"max_samples": 7} if by == "samples" else {"capacity": rig.capacity_for(7, 8)}
    rig.open(**more)
    assert rig.fill(rig.producer()) == 7
    assert len(rig.balance().live) == 7


def test_numbers_may_be_beyond_32_bits(rig: Rig) -> None:
    rig.open("drop-oldest", max_samples=4)
    start = 2**40 + 1
    rig.keys.hset(rig.key("meta"), mapping={"first": start, "next": start})
    who, reader = rig.producer(last=2**40), rig.reader(reuse="inf")
    rig.put(who, start, start + 1)
    assert rig.numbers(reader, 2) == [start, start + 1]
    rig.put(who, *range(start + 2, start + 6))
    assert set(rig.numbers(reader)) <= set(range(start + 2, start + 6))
    again = rig.take(reader, 4)
    assert again.samples
    assert {sample.uses for sample in again.samples} == {2}
    assert rig.balance().live == range(start + 2, start + 6)
