"""Memory that is used again once nobody holds it any more.

Fresh pages cost about as much as what is read into them (measured on 64 MiB: the kernel clears every page first, a
fifth of the time of producer and consumer each), so payloads lie in blocks that come back by themselves: what `take`
gives is a numpy array, and when the last view of it is gone, in whatever library, its block is free again.
"""

from collections import deque
from collections.abc import Callable
from typing import Any
from weakref import ref

import numpy as np

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

SMALLEST_BYTES = 64 * 1024  # below this the C library's allocator reuses memory by itself


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

    @property
    def free_bytes(self) -> int:
        """Bytes that lie free."""
        return sum(size * len(blocks) for size, blocks in list(self._free.items()))

    def take(self, nbytes: int) -> Bytes:
        """Give so many bytes, whose values are whatever they are; they come back when the last view of them is gone."""
        if nbytes < SMALLEST_BYTES:
            return self._allocate(nbytes)
        size = size_class(nbytes)
        try:
            block = self._free.setdefault(size, deque()).pop()
        except IndexError:
            block = self._allocate(size)
        # By way of its memoryview: views of an array refer to the first one that is no view of another array.
        lent: Bytes = np.frombuffer(block.data[:nbytes], np.uint8)
        key = id(lent)

        def back(_: object) -> None:
            self._lent.pop(key, None)
            self._give(block)

        self._lent[key] = ref(lent, back)
        return lent

    def _give(self, block: Bytes) -> None:
        if self.free_bytes + block.nbytes <= self._keep_bytes:
            self._free.setdefault(block.nbytes, deque()).append(block)


def size_class(nbytes: int) -> int:
    """Round up by at most an eighth, so that samples of varying size find each other's blocks."""
    step = 1 << max((nbytes - 1).bit_length() - 4, 12)
    return -(-nbytes // step) * step
