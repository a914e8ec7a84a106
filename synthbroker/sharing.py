"""Small samples that are sent together share parts.

A part of its own costs everybody about as much time as 40 KiB of payload do (samples of 40 KiB, two noisy cores:
10,000/s with a part for each, 13,000 to 17,000/s in shared ones), so those that wait to be sent go into parts of up to
a mebibyte, one behind the other. What rides in the entry passes through Lua, which hashes each byte (server's time for
a sample of 4 KiB: 27 us in the entry, 18 in a shared part; of 1 KiB: 15 and 14); above 96 KiB too few fit into a part
to fill it well. The samples of one part are committed by one script, so their numbers follow each other, and the last
of them owns the part: when it leaves the ring, so does the part.
"""

import itertools
import secrets
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from synthbroker import cutting
from synthbroker.wire import Encoded

SMALLEST_SHARER_BYTES = 1024
LARGEST_SHARER_BYTES = 96 * 1024
_FEWEST = 4
_SMALLEST_PART_BYTES = 16 * 1024  # riding in the entries costs less time than a part of less
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
        if len(run) < _FEWEST or size < _SMALLEST_PART_BYTES:
            shared += alone(run)
            continue
        allocated = cutting.allocated(size) + cutting.PART_OVERHEAD_BYTES
        start = 0
        for sample in run:
            payload_bytes = sample.payload_bytes
            entry_bytes = cutting.cost((), len(sample.begin) + len(sample.ends) + len(sample.spec))
            cost_bytes = entry_bytes - (-allocated * payload_bytes // size)
            shared.append(Shared(sample, number, start, cost_bytes))
            start += payload_bytes
    return shared


def _runs(samples: Sequence[Encoded], largest: int, most: int) -> Iterator[Sequence[Encoded]]:
    """Cut samples into runs that fill an allocator's size class well; those that cannot share are runs of one."""
    at = 0
    while at < len(samples):
        size = 0
        ends: list[int] = []
        for sample in samples[at : at + most]:
            payload_bytes = sample.payload_bytes
            size += payload_bytes
            if not SMALLEST_SHARER_BYTES < payload_bytes <= LARGEST_SHARER_BYTES or size > largest:
                break
            ends.append(size)
        while len(ends) > 1 and cutting.allocated(ends[-1]) - ends[-1] > _MOST_WASTE * ends[-1]:
            ends.pop()
        count = max(len(ends), 1)
        yield samples[at : at + count]
        at += count


def uids(placed: Sequence[Shared]) -> list[str]:
    """Make a word for each send attempt of a sample, or of a part that several share."""
    words: list[str] = []
    part: int | None = None
    for one in placed:
        if one.part is None:
            words.append(secrets.token_hex(8) if one.sample.parts else "-")
        else:
            words.append(words[-1] if one.part == part else secrets.token_hex(8))
        part = one.part
    return words


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


def commit_arguments(seqs: Sequence[int], placed: Sequence[Shared], uids: Sequence[str]) -> list[Any]:
    """Write what the commit script is told of samples: of those that differ in little, together."""
    told: list[Any] = []
    for first, stop in _alike(seqs, placed, uids):
        one, uid = placed[first], uids[first].encode()
        sample = one.sample
        parts, start = (1, b"%d" % one.start) if one.part is not None else (len(sample.parts), b"-")
        sizes = (seqs[first], stop - first, one.cost_bytes, sample.payload_bytes, sample.raw_bytes)
        told += [b"%d %d %d %d %d %b %d %b" % (*sizes, uid, parts, start), sample.spec, sample.begin]
        for each in placed[first:stop]:
            told += [each.sample.ends, each.sample.data if each.part is None else b""]
    return told


def _alike(seqs: Sequence[int], placed: Sequence[Shared], uids: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Cut samples into runs that have all in common but their numbers, the ends of their heads, and their data."""
    first = 0
    for i in range(1, len(placed) + 1):
        if i < len(placed):
            one, before = placed[i], placed[first]
            if (
                seqs[i] == seqs[first] + i - first
                and uids[i] == uids[first]
                and (one.part is not None or one.sample.inline)
                and one.cost_bytes == before.cost_bytes
                and one.sample.begin == before.sample.begin
            ):
                continue
        yield first, i
        first = i
