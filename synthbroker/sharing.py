"""Small samples that are sent together share parts.

A part of its own costs everybody about as much time as 40 KiB of payload do (samples of 40 KiB, two noisy cores:
10,000/s with a part for each, 13,000 to 17,000/s in shared ones), so those that wait to be sent go into parts of up to
a mebibyte, one behind the other. Below 6 KiB riding in the entry is as quick; above 96 KiB too few fit into a part to
fill it well. The samples of one part are committed by one script, so their numbers follow each other, and the last of
them owns the part: when it leaves the ring, so does the part.
"""

import itertools
import secrets
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from synthbroker import cutting
from synthbroker.wire import INLINE_BYTES, Encoded

LARGEST_SHARER_BYTES = 96 * 1024
_FEWEST = 4
_MOST_WASTE = 0.07
_RING_SHARE = 16  # a part stays until the last of its samples has left: it must be a small piece of the ring


class Shared(NamedTuple):
    """A sample to be committed.

    Attributes:
        sample: What it is.
        part: Number of the shared part that it lies in, None: it has parts of its own, or none.
        start: Where in that part.
        cost_bytes: Server memory that it takes.
    """

    sample: Encoded
    part: int | None
    start: int
    cost_bytes: int


def alone(samples: Sequence[Encoded]) -> list[Shared]:
    """Let no sample share."""
    return [Shared(sample, None, 0, sample.cost_bytes) for sample in samples]


def share(samples: Sequence[Encoded], capacity_bytes: int, max_samples: int) -> list[Shared]:
    """Say which of these samples share parts.

    Args:
        samples: Of one producer, in their order.
        capacity_bytes, max_samples: The ring's limits; 0: no such limit.
    """
    largest = min(cutting.LARGEST_PART_BYTES, capacity_bytes // _RING_SHARE)
    most = max_samples // _RING_SHARE if max_samples else len(samples)
    shared: list[Shared] = []
    for number, run in enumerate(_runs(samples, largest, most)):
        size = sum([sample.payload_bytes for sample in run])
        if len(run) < _FEWEST:
            shared += alone(run)
            continue
        allocated = cutting.allocated(size) + cutting.PART_OVERHEAD_BYTES
        start = 0
        for sample in run:
            share_bytes = -(-allocated * sample.payload_bytes // size)
            entry_bytes = cutting.cost((), len(sample.head) + len(sample.spec))
            shared.append(Shared(sample, number, start, share_bytes + entry_bytes))
            start += sample.payload_bytes
    return shared


def _runs(samples: Sequence[Encoded], largest: int, most: int) -> Iterator[Sequence[Encoded]]:
    """Cut samples into runs that fill an allocator's size class well; those that cannot share are runs of one."""
    at = 0
    while at < len(samples):
        size, best = 0, 1
        for count, sample in enumerate(samples[at : at + most], 1):
            size += sample.payload_bytes
            if not INLINE_BYTES < sample.payload_bytes <= LARGEST_SHARER_BYTES or size > largest:
                break
            if cutting.allocated(size) - size <= _MOST_WASTE * size:
                best = count
        yield samples[at : at + best]
        at += best


def uids(placed: Sequence[Shared]) -> list[str]:
    """Make a word for each send attempt of a sample, or of a part that several share."""
    words: dict[int, str] = {}
    return [
        words.setdefault(one.part, secrets.token_hex(8))
        if one.part is not None
        else secrets.token_hex(8)
        if one.sample.parts
        else "-"
        for one in placed
    ]


def strings(placed: Sequence[Shared], uids: Sequence[str]) -> list[tuple[str, list[memoryview]]]:
    """List the strings to be stored: name and pieces of each."""
    strings: list[tuple[str, list[memoryview]]] = []
    part: int | None = None
    for one, uid in zip(placed, uids, strict=True):
        if one.part is None:
            strings += [(f"{uid}:{i}", list(pieces)) for i, pieces in enumerate(one.sample.parts)]
        else:
            if one.part != part:
                strings.append((f"{uid}:0", []))
            strings[-1][1].extend(itertools.chain.from_iterable(one.sample.parts))
            if one.sample.data:
                strings[-1][1].append(memoryview(one.sample.data))
        part = one.part
    return strings


def commit_arguments(seq: int, one: Shared, uid: str) -> list[Any]:
    """Write what the commit script is told of a sample."""
    sample = one.sample
    sizes = (seq, one.cost_bytes, sample.payload_bytes, sample.raw_bytes, uid.encode())
    if one.part is not None:
        return [b"%d %d %d %d %b@%d:1" % (*sizes, one.start), sample.spec, sample.head, b""]
    return [b"%d %d %d %d %b:%d" % (*sizes, len(sample.parts)), sample.spec, sample.head, sample.data]
