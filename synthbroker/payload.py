"""The payload of a sample: received from the server, checked and unpacked where it stays."""

import itertools
from collections.abc import Callable, Sequence

from synthbroker import codec, cutting, wire
from synthbroker.errors import DamagedSampleError
from synthbroker.head import Head
from synthbroker.pool import Pool
from synthbroker.ring import Ring

Get = Callable[[Sequence[memoryview]], bool]


class MissingPartError(DamagedSampleError):
    """A part is not there: evicted while it was read, or never whole."""


def receive(entry: wire.Entry, targets: dict[str, memoryview], pool: Pool, get: Get) -> None:
    """Bring the payload of one sample into memory.

    Args:
        entry: The sample, checked against the ring's schema.
        targets: For each wanted field as many bytes of memory as its tensor has.
        pool: Where packed bytes stay meanwhile.
        get: Receives the next of the parts that were asked for; all of them are received, whatever is found.

    Raises:
        MissingPartError: A part is not there any more.
        DamagedSampleError: The payload is not what the head says.
    """
    blocks = _receive_parts(entry, targets, pool, get) if entry.parts else _inline(entry.head, entry.data)
    for tensor, block in zip(entry.head.tensors, blocks, strict=True):
        target = targets.get(tensor.name)
        if target is None or block is target:
            continue
        if tensor.codec == codec.RAW:
            target[:] = block
        else:
            codec.decode(block, tensor.codec, target)


def _receive_parts(entry: wire.Entry, targets: dict[str, memoryview], pool: Pool, get: Get) -> list[memoryview]:
    """Receive and check what is wanted; gives each tensor's packed bytes, of raw ones the target itself."""
    head = entry.head
    blocks = [
        targets[tensor.name]
        if tensor.codec == codec.RAW and tensor.name in targets
        else pool.take(tensor.packed_bytes).data
        for tensor in head.tensors
    ]
    pieces = cutting.scatter([size for size, _ in head.parts], blocks)
    missing, damage = 0, None
    for i in wire.parts_of(head, list(targets)):
        if i == entry.parts:
            for piece, data in zip(pieces[i], _cut(entry.data, [piece.nbytes for piece in pieces[i]]), strict=True):
                piece[:] = data
        elif not get(pieces[i]):
            missing += 1
            continue
        try:
            wire.check_part(i, head.parts[i], pieces[i])
        except DamagedSampleError as error:
            damage = damage or error
    if missing:
        raise MissingPartError(f"{missing} of {len(head.parts)} parts are gone")
    if damage:
        raise damage
    return blocks


def _inline(head: Head, data: bytes | memoryview) -> list[memoryview]:
    """Check a payload that is here already; gives each tensor's packed bytes, where they are."""
    for i, part in enumerate(_cut(data, [size for size, _ in head.parts])):
        wire.check_part(i, head.parts[i], (part,))
    return _cut(data, [tensor.packed_bytes for tensor in head.tensors])


def _cut(data: bytes | memoryview, sizes: Sequence[int]) -> list[memoryview]:
    whole = memoryview(data)
    return [whole[end - size : end] for size, end in zip(sizes, itertools.accumulate(sizes), strict=True)]


def fetch_shared(ring: Ring, entries: Sequence[wire.Entry], pool: Pool) -> list[wire.Entry | None]:
    """Receive the payloads of samples that share parts, neighbours in one go.

    Returns:
        The entries, each with its payload as `data` where it lay in a shared part; None where that part is gone.
    """
    found: list[wire.Entry | None] = list(entries)
    runs = _runs(entries)
    missing = _fetch_runs(ring, entries, runs, pool, found)
    # One that says what is not so, or a part cut short, costs no neighbour.
    _fetch_runs(ring, entries, [[i] for run in missing if len(run) > 1 for i in run], pool, found)
    return found


def _fetch_runs(
    ring: Ring, entries: Sequence[wire.Entry], runs: Sequence[list[int]], pool: Pool, found: list[wire.Entry | None]
) -> list[list[int]]:
    """Receive runs into `found`; returns those that were not there as a whole."""
    sizes = [sum([entries[i].head.payload_bytes for i in run]) for run in runs]
    slices = [
        wire.Slice(f"{entries[run[0]].uid}:0", entries[run[0]].start, size)
        for run, size in zip(runs, sizes, strict=True)
    ]
    missing: list[list[int]] = []
    with ring.inflow(slices) as inflow:
        for run, size in zip(runs, sizes, strict=True):
            memory = pool.take(size).data
            there = inflow.receive([memory])
            if not there:
                missing.append(run)
            start = 0
            for i in run:
                entry = entries[i]
                end = start + entry.head.payload_bytes
                found[i] = entry.with_data(memory[start:end]) if there else None
                start = end
    return missing


def _runs(entries: Sequence[wire.Entry]) -> list[list[int]]:
    """Gather the indices of entries that lie one behind the other in the same shared part."""
    runs: list[list[int]] = []
    end = 0
    uid = None
    for i, entry in enumerate(entries):
        start = entry.start
        if start is None:
            continue
        if start == end and entry.uid == uid:
            runs[-1].append(i)
        else:
            runs.append([i])
            uid = entry.uid
        end = start + entry.head.payload_bytes
    return runs
