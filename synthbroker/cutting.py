"""How a payload is cut into parts, and what it takes of the server's memory.

Parts are of about a mebibyte: jemalloc gives neighbouring free memory back to the system at once where it amounts to
8 MiB (its `oversize_threshold`), which a few parts of 4 MiB soon do, and then the server clears fresh pages for every
part (measured on Redis 7.0.15, 64 MiB samples: 1.5 GB/s with parts of 4 MiB, 2.1 with 2, 2.6 with 1 and with a half).
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import xxhash

LARGEST_PART_BYTES = 2**20 - 2**12

# What a stored string takes beside its bytes: header and line end inside the allocation, key, dictionary entry and
# object outside; and an entry beside its text: node of the stream, ids, line of the index. Measured with MEMORY USAGE
# and used_memory on Redis 7.0.15 (jemalloc), rounded up.
_STRING_SLACK_BYTES = 64
PART_OVERHEAD_BYTES = 176
_ENTRY_OVERHEAD_BYTES = 320
_ENTRY_FIELDS_BYTES = 160
_NODE_BYTES = 4096  # stream-node-max-bytes; smaller entries share a node, and it is full when no other fits
_VALUES_BYTES = 80
_SHARED_OVERHEAD_BYTES = 110
_OWN_NODE_BYTES = 1920  # from here on two entries no longer share a node of the stream, an allocation of 4096 bytes
_SMALLEST_CUT_BYTES = 8 * 1024
_IN_CACHE_BYTES = 128 * 1024
_MOST_WASTE = 0.04


@lru_cache(maxsize=1024)
def cut(size: int) -> tuple[int, ...]:
    """Cut a payload into parts whose length plus header fits an allocator's size class closely."""
    full, rest = divmod(size, LARGEST_PART_BYTES)
    sizes = [LARGEST_PART_BYTES] * full
    while rest:
        piece = rest
        if rest >= _SMALLEST_CUT_BYTES and allocated(rest) - rest > _MOST_WASTE * size:
            piece = _class_below(rest) - _STRING_SLACK_BYTES
        sizes.append(piece)
        rest -= piece
    return tuple(sizes)


def allocated(size: int) -> int:
    """Bytes that jemalloc gives for a stored string: four size classes for each doubling (jemalloc.net, manual)."""
    step = _class_step(size + _STRING_SLACK_BYTES)
    return -(-(size + _STRING_SLACK_BYTES) // step) * step


def _class_step(size: int) -> int:
    return max(16, 1 << max((size - 1).bit_length() - 3, 0))


def _class_below(size: int) -> int:
    step = _class_step(size)
    return size // step * step


@lru_cache(maxsize=1024)
def cost(part_sizes: tuple[int, ...], text_bytes: int) -> int:
    """Estimate the server memory of a sample, from above: its parts, and an entry of so many bytes of text."""
    if text_bytes < _OWN_NODE_BYTES:
        entry = _NODE_BYTES // (_NODE_BYTES // (text_bytes + _VALUES_BYTES)) + _SHARED_OVERHEAD_BYTES
    else:
        entry = allocated(text_bytes + _ENTRY_FIELDS_BYTES) + _ENTRY_OVERHEAD_BYTES
    return sum(allocated(size) + PART_OVERHEAD_BYTES for size in part_sizes) + entry


def scatter(part_sizes: Sequence[int], blocks: Sequence[memoryview]) -> list[list[memoryview]]:
    """Say for each part which pieces of the blocks, laid end to end, it covers. Nothing is copied."""
    pieces: list[list[memoryview]] = []
    block, offset = 0, 0
    for size in part_sizes:
        part: list[memoryview] = []
        missing = size
        while missing:
            while offset == blocks[block].nbytes:
                block, offset = block + 1, 0
            piece = blocks[block][offset : offset + missing]
            part.append(piece)
            offset += piece.nbytes
            missing -= piece.nbytes
        pieces.append(part)
    return pieces


def checksum(pieces: Sequence[bytes | memoryview]) -> int:
    """Compute xxh3-64 over pieces laid end to end."""
    if len(pieces) == 1:
        return xxhash.xxh3_64_intdigest(pieces[0])
    digest = xxhash.xxh3_64()
    for piece in pieces:
        digest.update(piece)
    return digest.intdigest()


def copy(source: Sequence[memoryview], target: Sequence[memoryview]) -> int:
    """Copy pieces, those that are not the same memory, and compute their checksum while they are in the cache."""
    digest = xxhash.xxh3_64()
    for old, new in zip(source, target, strict=True):
        for start in range(0, new.nbytes, _IN_CACHE_BYTES):
            piece = new[start : start + _IN_CACHE_BYTES]
            if old.obj is not new.obj:
                np.copyto(np.frombuffer(piece, np.uint8), np.frombuffer(old[start : start + _IN_CACHE_BYTES], np.uint8))
            digest.update(piece)
    return digest.intdigest()
