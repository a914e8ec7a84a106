"""Memory that comes back by itself."""

import random
from typing import Any

import numpy as np
import torch

from synthbroker.pool import SMALLEST_BYTES, Pool, size_class

MIB = 2**20


def test_a_block_is_used_again_once_nobody_holds_it() -> None:
    pool = Pool(keep_bytes=8 * MIB)
    first = pool.take(MIB)
    address = first.ctypes.data
    del first
    assert pool.take(MIB).ctypes.data == address


def test_a_view_in_another_library_holds_the_block() -> None:
    pool = Pool(keep_bytes=8 * MIB)
    lent = pool.take(MIB)
    tensor = torch.from_numpy(lent.view(np.float32).reshape(4, -1))[2:]
    address = lent.ctypes.data
    del lent
    assert pool.take(MIB).ctypes.data != address
    del tensor
    assert pool.free_bytes == 2 * size_class(MIB)


def test_a_slice_of_an_array_holds_the_block() -> None:
    pool = Pool(keep_bytes=8 * MIB)
    part = pool.take(MIB)[:10].view(np.uint16)
    assert pool.free_bytes == 0
    del part
    assert pool.free_bytes == size_class(MIB)


def test_no_more_lies_free_than_is_kept() -> None:
    pool = Pool(keep_bytes=3 * MIB)
    lent = [pool.take(MIB) for _ in range(5)]
    lent.clear()
    assert pool.free_bytes == 3 * MIB


def test_where_sizes_vary_a_pool_takes_at_most_twice_what_was_lent_at_once() -> None:
    draw, pool, most = random.Random(1), Pool(keep_bytes=1000 * MIB), 0
    lent: list[np.ndarray] = []
    for _ in range(3000):
        lent.append(pool.take(draw.randrange(SMALLEST_BYTES, 4 * MIB)))
        now = sum(size_class(len(one)) for one in lent)
        most = max(most, now)
        assert pool.free_bytes + now <= 2 * most
        del lent[: max(len(lent) - draw.randrange(6), 0)]


def test_what_is_reserved_is_there_when_it_is_wanted() -> None:
    made: list[int] = []

    def allocate(nbytes: int) -> Any:
        made.append(nbytes)
        return np.empty(nbytes, np.uint8)

    pool = Pool(8 * MIB, allocate)
    held = [pool.take(MIB)]
    pool.reserve(MIB, 4)
    assert len(made) == 4, "one of them was lent"
    pool.reserve(MIB, 3)
    held += [pool.take(MIB) for _ in range(3)]
    assert len(made) == 4


def test_small_memory_is_left_to_the_allocator() -> None:
    pool = Pool(keep_bytes=MIB)
    pool.take(SMALLEST_BYTES - 1)
    assert pool.free_bytes == 0


def test_sizes_that_differ_a_little_share_a_block_and_little_is_wasted() -> None:
    assert size_class(64 * MIB) == 64 * MIB
    for nbytes in range(SMALLEST_BYTES, 4 * MIB, 12_347):
        assert nbytes <= size_class(nbytes) <= max(nbytes * 9 / 8, nbytes + 4096)
