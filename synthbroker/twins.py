"""Producers that send the same content, as an array job does in which every task has the same seed.

A producer tells the server digests of its first `FIRST` samples and of every `EVERY`th after them, of tensors before
they are packed: `AT_ONCE` of them as soon as there are so many, what there is with each heartbeat. The server
(`twins.lua`) remembers who sent a digest first, `MOST_DIGESTS` to twice as many of them, and names who has sent
`FEWEST_COMMON` or more that another sent before, if that is at least a quarter of what it has told. So identical
producers are noticed within their first 100 samples. A sample that a producer repeats counts once: one that sends
nothing but zeros has no twin; samples that can hold few values only may be alike by chance, and then are named, too.
A name that sends, in a later life, what it sent in a former one is named as its own twin: the generator begins again
with the same seed.
"""

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from threading import Lock

from synthbroker import codec, cutting, schema
from synthbroker.schema import Array

log = logging.getLogger("synthbroker")

FIRST = 128
EVERY = 64
AT_ONCE = 25
MOST_DIGESTS = 10_000
MOST_PAIRS = 1000
FEWEST_COMMON = 3
_BLOCKS, _BLOCK_BYTES = 16, 65536
_MOST_UNTOLD = 1000  # while the server is away; the oldest are forgotten


def digest(sample: Mapping[str, Array]) -> int:
    """Compute what tells the content of a sample from others: names, dtypes, shapes, and values.

    Of a large tensor `_BLOCKS` blocks are read, all over it: `put` has no time for more.
    """
    kinds = [f"{name}:{schema.dtype_name(array.dtype)}{array.shape}" for name, array in sample.items()]
    blocks: list[bytes | memoryview] = [" ".join(kinds).encode()]
    for array in sample.values():
        data = codec.as_bytes(array)
        step = max(data.nbytes // _BLOCKS, _BLOCK_BYTES)
        blocks += [data[start : start + _BLOCK_BYTES] for start in range(0, data.nbytes, step)]
    return cutting.checksum(blocks)


class TwinWatch:
    """Gathers one producer's digests and tells them.

    Args:
        ring: Name of the ring.

    Attributes:
        hurry: Called when there are enough to tell; another thread then calls `tell` soon.
    """

    def __init__(self, ring: str) -> None:
        self._ring = ring
        self.hurry: Callable[[], None] = lambda: None
        self._put = 0
        self._lock = Lock()
        self._untold: deque[int] = deque(maxlen=_MOST_UNTOLD)
        self._own: deque[int] = deque(maxlen=_MOST_UNTOLD)  # told or to be told: what is repeated counts once
        self._different = 0
        self._named: set[tuple[str, str]] = set()

    def wants(self) -> bool:
        """Count one sample, and say whether its digest is to be told."""
        self._put += 1
        return self._put <= FIRST or self._put % EVERY == 0

    def see(self, sample: Mapping[str, Array]) -> None:
        """Take the digest of a sample of C-contiguous arrays."""
        found = digest(sample)
        with self._lock:
            if found in self._own:
                return
            self._own.append(found)
            self._untold.append(found)
            self._different += 1
            enough = len(self._untold) >= AT_ONCE
        if enough:
            self.hurry()

    def tell(self, server: Callable[[int, list[int]], Sequence[tuple[str, str]]]) -> None:
        """Tell the server how many digests there were, and those that it does not know; warn of each twin once."""
        with self._lock:
            different, digests = self._different, list(self._untold)
        pairs = server(different, digests)
        with self._lock:
            for _ in digests[: len(self._untold)]:
                self._untold.popleft()
        for first, second in pairs:
            self._warn(first, second)

    def _warn(self, first: str, second: str) -> None:
        if (first, second) in self._named:
            return
        self._named.add((first, second))
        log.warning("%s", text_of(self._ring, first, second))


def text_of(ring: str, first: str, second: str) -> str:
    """Say of two producers that they are twins."""
    if first == second:
        return (
            f"ring {ring}: producer {first} sends what it sent in a former life: its generator begins again with the "
            "same seed"
        )
    return f"ring {ring}: producers {first} and {second} send identical samples: have they the same seed?"
