"""What the scripts make of samples that share a part: it lasts as long as the last of them."""

from collections.abc import Sequence
from typing import Any

import pytest

from rings import Rig, run_arguments
from synthbroker import cutting, wire
from synthbroker.errors import RingEndedError, ShutOutError
from synthbroker.payload import fetch_shared, receive
from synthbroker.pool import Pool
from synthbroker.replies import Answer, Incarnation
from synthbroker.sharing import Shared
from wires import sample_of

SMALL = 20_000  # bytes of a sample that shares where there are several


def burst(first: int, count: int, nbytes: int = SMALL) -> list[tuple[int, Shared]]:
    """Make samples that share one part, with their sequence numbers."""
    seqs = range(first, first + count)
    cost_bytes = cutting.cost((), 300) + -(-cutting.allocated(count * nbytes) // count)
    return [(seq, Shared(sample_of(nbytes, seq), 0, (seq - first) * nbytes, cost_bytes)) for seq in seqs]


def cost_of(samples: Sequence[tuple[int, Shared]]) -> int:
    return sum(one.cost_bytes for _, one in samples)


def payload(seq: int, nbytes: int) -> bytes:
    return bytes([seq % 256]) + bytes(nbytes - 1)


def read(rig: Rig, who: Incarnation, count: int = 1000, group: str = "train") -> list[int]:
    """Take samples, whose bytes must be right; gives their numbers."""
    samples = rig.take(who, count, group).samples
    return [given.number for given in samples if check(rig, given)]


def live(rig: Rig) -> list[int]:
    """Look at everything that is in the ring, whose bytes must be right; gives its numbers."""
    seen = rig.balance().live
    return [given.number for given in rig.ring.read(seen.start, seen.stop - 1, 1000) if check(rig, given)]


def check(rig: Rig, given: Any) -> bool:
    entry = wire.read_entry(given.fields)
    memory = bytearray(entry.head.payload_bytes)
    with rig.ring.inflow() as inflow:
        (whole,) = fetch_shared(inflow, [entry], Pool(0))
        assert whole is not None, "its part is there"
        inflow.want(whole.slices(["x"]))
        receive(whole, {"x": memoryview(memory)}, Pool(0), inflow.receive)
    assert bytes(memory) == payload(int(entry.head.recipe["value"]), len(memory))
    return True


def lasting(rig: Rig) -> list[bytes]:
    return sorted(part for part in rig.part_keys() if rig.keys.pttl(part) == -1)


def evict(rig: Rig, who: Incarnation, seq: int, count: int) -> None:
    """Let so many of the oldest leave, in a ring of `max_samples`, for inline ones."""
    assert rig.put(who, *range(seq, seq + count)).word == "OK"


def test_samples_of_one_part_are_readable_and_the_part_lasts(rig: Rig) -> None:
    rig.open()
    who, reader = rig.producer(), rig.reader()
    assert rig.ring.commit(who, burst(1, 10)) == Answer("OK", last=10, newest=10)
    (part,) = rig.part_keys()
    assert rig.keys.pttl(part) == -1
    assert rig.keys.strlen(part) == 10 * SMALL
    seen = rig.balance()
    assert seen["bytes"] == cost_of(burst(1, 10))
    assert read(rig, reader) == list(range(1, 11))


def test_neighbours_are_received_together(rig: Rig) -> None:
    rig.open()
    who, reader = rig.producer(), rig.reader()
    samples = [*burst(1, 10), (11, sample_of(SMALL, 11)), (12, sample_of(8, 12)), *burst(13, 8)]
    again = [(seq, one._replace(part=7) if isinstance(one, Shared) and seq > 12 else one) for seq, one in samples]
    assert rig.ring.commit(who, again).last == 20
    assert len(lasting(rig)) == 3
    entries = [wire.read_entry(given.fields) for given in rig.take(reader).samples]
    some = [entries[i] for i in (0, 1, 2, 5, 6, 3, 10, 11, 12, 13)]
    with rig.ring.inflow() as inflow:
        found = fetch_shared(inflow, some, Pool(0))
    for entry, whole in zip(some, found, strict=True):
        assert whole is not None
        assert whole.start is None
        if entry.start is not None:
            assert bytes(whole.data) == payload(int(entry.head.recipe["value"]), SMALL)
    rig.balance()


@pytest.mark.parametrize("when_full", ["block", "drop-oldest"])
def test_the_part_leaves_with_the_last_of_its_samples(rig: Rig, when_full: str) -> None:
    rig.open(when_full, max_samples=10)
    who, reader = rig.producer(), rig.reader()
    assert rig.ring.commit(who, burst(1, 10)).last == 10
    parts = lasting(rig)
    if when_full == "block":
        rig.ring.acknowledge("train", read(rig, reader))
    evict(rig, who, 11, 9)
    assert live(rig) == [*range(10, 20)]
    assert lasting(rig) == parts
    evict(rig, who, 20, 1)
    assert live(rig) == [*range(11, 21)]
    assert rig.part_keys() == set()


def test_the_part_leaves_with_the_last_of_its_samples_where_bytes_are_short(rig: Rig) -> None:
    first, second = burst(1, 10), burst(11, 10)
    rig.open("drop-oldest", capacity=cost_of(first) + cost_of(second[:9]))
    who = rig.producer()
    rig.ring.commit(who, first)
    (part,) = lasting(rig)
    rig.ring.commit(who, second[:9])
    assert part in lasting(rig)
    assert rig.balance().live == range(1, 20)
    rig.ring.commit(who, [(20, Shared(sample_of(8, 20), None, 0, cost_of(first[:9])))])
    assert live(rig) == [*range(10, 21)]
    assert part in lasting(rig)
    rig.ring.commit(who, [(21, Shared(sample_of(8, 21), None, 0, cost_of(first[:1])))])
    assert live(rig) == [*range(11, 22)]
    assert part not in lasting(rig)


def motley(first: int, count: int) -> list[tuple[int, Shared]]:
    """Make samples of several kinds that share one part: runs of 2, 2, 1, 1, ... that have little in common."""
    made, start = [], 0
    for seq in range(first, first + count):
        nbytes = (9_000, 9_000, 7_000, 7_000, 8_000, 6_500)[(seq - first) % 6]
        made.append((seq, Shared(sample_of(nbytes, seq), 0, start, 10_000 + seq % 2 if seq % 6 == 0 else 10_000)))
        start += nbytes
    return made


@pytest.mark.parametrize("known", range(8))
def test_several_kinds_share_a_part_and_some_of_them_were_taken_before(rig: Rig, known: int) -> None:
    rig.open("drop-oldest", max_samples=14)
    who, reader = rig.producer(), rig.reader()
    if known:
        assert rig.ring.commit(who, motley(1, known)).last == known
    assert rig.ring.commit(who, motley(1, 14)) == Answer("OK", last=14, newest=14)
    assert rig.balance()["duplicates"] == known
    assert len(lasting(rig)) == len(rig.part_keys()) == (2 if known else 1)
    assert rig.balance()["bytes"] == cost_of(motley(1, 14))
    assert read(rig, reader) == live(rig) == [*range(1, 15)]
    evict(rig, who, 15, 13)
    assert live(rig) == [*range(14, 28)]
    assert len(lasting(rig)) == 1
    evict(rig, who, 28, 1)
    assert rig.part_keys() == set()


@pytest.mark.parametrize("limit", ["max_samples", "capacity"])
def test_what_is_taken_of_a_part_owns_it_and_the_rest_comes_in_another(rig: Rig, limit: str) -> None:
    samples = burst(1, 10)
    rig.open(max_samples=6) if limit == "max_samples" else rig.open(capacity=cost_of(samples[:6]))
    who, reader = rig.producer(), rig.reader()
    answer = rig.ring.commit(who, samples)
    assert (answer.word, answer.last) == ("FULL", 6)
    (part,) = lasting(rig)
    rig.balance()
    rig.ring.acknowledge("train", read(rig, reader))
    rest = [(seq, one._replace(start=one.start - 6 * SMALL)) for seq, one in samples[6:]]
    assert rig.ring.commit(who, rest).last == 10
    assert part in lasting(rig), "the sixth is live"
    assert read(rig, reader) == [7, 8, 9, 10]
    if limit == "max_samples":
        assert live(rig) == [5, 6, 7, 8, 9, 10]
        rig.ring.acknowledge("train", [7, 8, 9, 10])
        rig.put(who, *range(11, 17))
        assert lasting(rig) == []


def test_what_is_sent_again_leaves_nothing_behind(rig: Rig) -> None:
    rig.open()
    who, reader = rig.producer(), rig.reader()
    rig.ring.commit(who, burst(1, 10))
    parts = rig.part_keys()
    assert rig.ring.commit(who, burst(1, 10)) == Answer("OK", last=10, newest=10)
    assert rig.part_keys() == parts
    assert rig.balance()["duplicates"] == 10
    assert read(rig, reader) == list(range(1, 11))


def test_a_part_of_old_and_new_samples_lives_for_the_new_ones(rig: Rig) -> None:
    rig.open("drop-oldest", max_samples=14)
    who, reader = rig.producer(), rig.reader()
    rig.ring.commit(who, burst(1, 6))
    (old,) = lasting(rig)
    assert rig.ring.commit(who, burst(1, 10)).last == 10
    assert len(lasting(rig)) == 2
    assert rig.balance()["duplicates"] == 6
    assert read(rig, reader) == list(range(1, 11))
    evict(rig, who, 11, 10)
    assert len(lasting(rig)) == 1
    assert old not in lasting(rig)
    evict(rig, who, 21, 4)
    assert rig.part_keys() == set()


@pytest.mark.parametrize("attempts", [1, 2])
def test_a_part_of_old_samples_and_new_ones_that_do_not_fit_goes(rig: Rig, attempts: int) -> None:
    rig.open(max_samples=6)
    who, reader = rig.producer(), rig.reader()
    rig.ring.commit(who, burst(1, 6))
    parts = rig.part_keys()
    for _ in range(attempts):
        answer = rig.ring.commit(who, burst(1, 10))
        assert (answer.word, answer.last) == ("FULL", 6)
    assert rig.part_keys() == parts
    assert read(rig, reader) == list(range(1, 7))


def test_what_is_not_taken_at_all_leaves_no_lasting_part(rig: Rig) -> None:
    rig.open(max_samples=20)
    who = rig.producer()
    assert rig.ring.commit(who, burst(3, 10)).word == "GAP"
    rig.put(who, 1, 2)
    rig.producer(word="w2")
    with pytest.raises(ShutOutError):
        rig.ring.commit(who, burst(3, 10))
    newer = Incarnation("p", "w2")
    rig.put(newer, *range(1, 19))
    assert rig.ring.commit(newer, burst(19, 10)).word == "FULL"
    rig.ring.end()
    with pytest.raises(RingEndedError):
        rig.ring.commit(newer, burst(19, 10))
    assert lasting(rig) == []
    assert rig.part_keys(), "under expiry"


def test_where_a_number_is_left_out_what_comes_before_it_is_taken(rig: Rig) -> None:
    rig.open()
    who, reader = rig.producer(), rig.reader()
    samples = burst(1, 10)
    answer = rig.ring.commit(who, [*samples[:4], *samples[5:]])
    assert (answer.word, answer.last) == ("GAP", 4)
    rig.balance()
    assert len(lasting(rig)) == 1
    assert rig.ring.read_meta().live == 4
    assert [given.number for given in rig.take(reader).samples] == [1, 2, 3, 4]


def test_of_a_part_that_is_not_there_nothing_is_taken(rig: Rig) -> None:
    rig.open()
    who = rig.producer()
    arguments = run_arguments(1, [one.sample for _, one in burst(1, 5)], "never", 1, 0)
    reply = rig.script("commit", rig.ring.epoch, who.name, who.word, "0 0 0 0", *arguments)
    assert reply[:2] == ["MISSING", "0"]
    assert rig.part_keys() == set()
    rig.balance()


def test_a_dropped_ring_takes_shared_parts_along(rig: Rig) -> None:
    rig.open()
    who = rig.producer()
    for first in range(1, 201, 10):
        rig.ring.commit(who, burst(first, 10))
    assert len(lasting(rig)) == 20
    rig.balance()
    rig.ring.drop()
    assert rig.all_keys() == set()


@pytest.mark.parametrize("entry_id", ["10-7", "99-0"])
def test_what_somebody_wrote_by_hand_harms_no_shared_part(rig: Rig, entry_id: str) -> None:
    rig.open("drop-oldest", max_samples=30)
    who, reader = rig.producer(), rig.reader()
    rig.ring.commit(who, burst(1, 10))
    assert read(rig, reader, 4) == [1, 2, 3, 4]
    rig.keys.xadd(rig.key("samples"), {"hello": "world"}, entry_id)
    assert rig.ring.commit(who, burst(11, 10)).last == 20
    rig.foreign = 1 - rig.balance(foreign=1 - rig.snapshot()["foreign"])["foreign"]
    assert read(rig, reader) == list(range(5, 21))
    rig.foreign = 0
    assert rig.balance()["foreign"] == 1
    assert len(lasting(rig)) == 2
    evict(rig, who, 21, 30)
    assert rig.part_keys() == set()


def test_a_ring_smaller_than_what_shares_a_part_takes_it_bit_by_bit(rig: Rig) -> None:
    """A sample's line in the index is written when it is known what comes behind it: it cannot leave before."""
    rig.open("drop-oldest", max_samples=1)
    who, last, rounds = rig.producer(), 0, 0
    while last < 5:
        last = rig.ring.commit(who, burst(last + 1, 9)[: 5 - last]).last
        rig.balance()
        rounds += 1
        assert rounds <= 5
    assert live(rig) == [5]
    assert len(lasting(rig)) == 1
