"""Small samples that share parts: who shares, and that every value comes back right."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import synthbroker as sb
from sharers import md5, put_all, right, shares
from synthbroker import cutting
from synthbroker.ring import Ring
from synthbroker.sharing import LARGEST_SHARER_BYTES, SMALLEST_SHARER_BYTES, Shared, alone, share
from synthbroker.wire import INLINE_BYTES, Encoded
from tools import (
    SOON_S,
    background,
    check_ledger,
    commit_raw,
    key,
    lasting_parts,
    owned_parts,
    pending,
    raw_ring,
    reasons,
)
from wires import encode

MB = 10**6


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


# -- from end to end


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
