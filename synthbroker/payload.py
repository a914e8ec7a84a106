"""The payload of a sample: received from the server, checked and unpacked where it stays."""

import itertools
from collections.abc import Callable, Sequence

from synthbroker import codec, cutting, wire
from synthbroker.errors import DamagedSampleError
from synthbroker.head import Head
from synthbroker.inflow import Inflow
from synthbroker.pool import Pool

Get = Callable[[Sequence[Sequence[memoryview]], Callable[[int], None]], list[bool]]


class MissingPartError(DamagedSampleError):
    """A part is not there: evicted while it was read, or never whole."""


def receive(entry: wire.Entry, targets: dict[str, memoryview], pool: Pool, get: Get) -> None:
    """Bring the payload of one sample into memory.

    Args:
        entry: The sample, checked against the ring's schema.
        targets: For each wanted field as many bytes of memory as its tensor has.
        pool: Where packed bytes stay meanwhile.
        get: Receives the parts that were asked for (`Inflow.receive`); all of them are, whatever is found.

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
    damage: dict[int, DamagedSampleError] = {}

    def check(i: int) -> None:
        try:
            wire.check_part(i, head.parts[i], pieces[i])
        except DamagedSampleError as error:
            damage[i] = error

    wanted = wire.parts_of(head, list(targets))
    beside = [i for i in wanted if i < entry.parts]
    there = get([pieces[i] for i in beside], lambda place: check(beside[place]))
    if len(beside) < len(wanted):  # the last one comes with the entry
        last = pieces[entry.parts]
        for piece, data in zip(last, _cut(entry.data, [piece.nbytes for piece in last]), strict=True):
            piece[:] = data
        check(entry.parts)
    if not all(there):
        raise MissingPartError(f"{there.count(False)} of {len(head.parts)} parts are gone")
    if damage:
        raise damage[min(damage)]
    return blocks


def _inline(head: Head, data: bytes | memoryview) -> list[memoryview]:
    """Check a payload that is here already; gives each tensor's packed bytes, where they are."""
    for i, part in enumerate(_cut(data, [size for size, _ in head.parts])):
        wire.check_part(i, head.parts[i], (part,))
    return _cut(data, [tensor.packed_bytes for tensor in head.tensors])


def _cut(data: bytes | memoryview, sizes: Sequence[int]) -> list[memoryview]:
    whole = memoryview(data)
    return [whole[end - size : end] for size, end in zip(sizes, itertools.accumulate(sizes), strict=True)]


def fetch_shared(inflow: Inflow, entries: Sequence[wire.Entry], pool: Pool) -> list[wire.Entry | None]:
    """Receive the payloads of samples that share parts, neighbours in one go.

    Args:
        inflow: The way to the parts; nothing is under way on it.
        entries: The samples.
        pool: Where their payloads stay.

    Returns:
        The entries, each with its payload as `data` where it lay in a shared part; None where that part is gone.
    """
    found: list[wire.Entry | None] = list(entries)
    runs = _runs(entries)
    missing = _fetch_runs(inflow, entries, runs, pool, found)
    # One that says what is not so, or a part cut short, costs no neighbour.
    _fetch_runs(inflow, entries, [[i] for run in missing if len(run) > 1 for i in run], pool, found)
    return found


def _fetch_runs(
    inflow: Inflow, entries: Sequence[wire.Entry], runs: Sequence[list[int]], pool: Pool, found: list[wire.Entry | None]
) -> list[list[int]]:
    """Receive runs into `found`; returns those that were not there as a whole."""
    sizes = [sum([entries[i].head.payload_bytes for i in run]) for run in runs]
    inflow.want(
        wire.Slice(f"{entries[run[0]].uid}:0", entries[run[0]].start, size)
        for run, size in zip(runs, sizes, strict=True)
    )
    memories = [pool.take(size).data for size in sizes]
    there = inflow.receive([[memory] for memory in memories])
    for run, memory, came in zip(runs, memories, there, strict=True):
        start = 0
        for i in run:
            entry = entries[i]
            end = start + entry.head.payload_bytes
            found[i] = entry.with_data(memory[start:end]) if came else None
            start = end
    return [run for run, came in zip(runs, there, strict=True) if not came]


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
