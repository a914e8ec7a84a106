"""Memory that is used again once nobody holds it any more.

Fresh pages cost about as much as what is read into them (measured on 64 MiB: the kernel clears every page first, a
fifth of the time of producer and consumer each), so payloads lie in blocks that come back by themselves: what `take`
gives is a numpy array, and when the last view of it is gone, in whatever library, its block is free again.

Where sizes vary, each of them would in time keep as many blocks as were ever lent of it at once: it grew for hours.
So all together is at most twice what was ever lent at once; what was wanted longest ago goes to the system.
"""

import itertools
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from weakref import ref

import numpy as np

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

SMALLEST_BYTES = 64 * 1024  # below this the C library's allocator reuses memory by itself
_PAGE_BYTES = 4096


def _fresh(nbytes: int) -> Bytes:
    return np.empty(nbytes, np.uint8)


class Pool:
    """Blocks of memory, kept by size.

    Args:
        keep_bytes: So much may lie free; what comes back beyond that is given to the system.
        allocate: Makes a block of so many bytes; numpy's memory unless said otherwise.
    """

    def __init__(self, keep_bytes: int, allocate: Callable[[int], Bytes] = _fresh) -> None:
        self._keep_bytes, self._allocate = keep_bytes, allocate
        # Blocks come back from whatever thread lets go of them last, also in the middle of another call here: no lock,
        # only operations that the interpreter does in one step.
        self._free: dict[int, deque[Bytes]] = {}
        self._lent: dict[int, Any] = {}
        self._sizes: dict[int, int] = {}  # of what is lent
        self._most_lent = 0
        self._clock = itertools.count()
        self._wanted: dict[int, int] = {}  # when a size was wanted last

    @property
    def free_bytes(self) -> int:
        """Bytes that lie free."""
        return sum(size * len(blocks) for size, blocks in list(self._free.items()))

    def keep_nothing(self) -> None:
        """From now on give back at once what nobody holds, and what lies free: to whatever `allocate` has it from."""
        self._keep_bytes = 0
        for blocks in list(self._free.values()):
            blocks.clear()

    def take(self, nbytes: int) -> Bytes:
        """Give so many bytes, whose values are whatever they are; they come back when the last view of them is gone."""
        if nbytes < SMALLEST_BYTES:
            return self._allocate(nbytes)
        size = size_class(nbytes)
        self._wanted[size] = next(self._clock)
        fresh = False
        try:
            block = self._free.setdefault(size, deque()).pop()
        except IndexError:
            block, fresh = self._allocate(size), True
        # By way of its memoryview: views of an array refer to the first one that is no view of another array.
        lent: Bytes = np.frombuffer(block.data[:nbytes], np.uint8)
        key = id(lent)

        def back(_: object) -> None:
            self._lent.pop(key, None)
            self._sizes.pop(key, None)
            self._give(block)

        self._sizes[key] = size
        self._lent[key] = ref(lent, back)
        if fresh:
            self._shrink()
        return lent

    def reserve(self, nbytes: int, count: int) -> None:
        """Have so many blocks, lent ones included, in memory and not only promised by the system."""
        lent = list(self._sizes.values()).count(size_class(nbytes))
        blocks = [self.take(nbytes) for _ in range(count - lent)]
        for block in blocks:
            block[::_PAGE_BYTES] = 0

    def _shrink(self) -> None:
        """Let go of what was wanted longest ago, where more lies free than was ever lent at once."""
        self._most_lent = max(self._most_lent, sum(list(self._sizes.values())))
        over = self.free_bytes - self._most_lent
        for size in sorted(self._free, key=self._wanted.__getitem__):
            while over > 0 and (blocks := self._free[size]):
                with suppress(IndexError):  # another thread was quicker
                    blocks.popleft()
                over -= size

    def _give(self, block: Bytes) -> None:
        if self.free_bytes + block.nbytes <= self._keep_bytes:
            self._free.setdefault(block.nbytes, deque()).append(block)


def size_class(nbytes: int) -> int:
    """Round up by at most an eighth, so that samples of varying size find each other's blocks."""
    step = 1 << max((nbytes - 1).bit_length() - 4, 12)
    return -(-nbytes // step) * step
