"""What the tests of producers and readers share: fill a ring, read it whole, and look at it with a plain client."""

import multiprocessing
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import count
from typing import Any

import numpy as np
import pytest
import redis

import synthbroker as sb
from servers import RunningServer, eventually
from synthbroker import texts, wire
from synthbroker.connection import Connection
from synthbroker.replies import Incarnation
from synthbroker.ring import Ring
from synthbroker.wire import Encoded

SOON_S = 30.0  # for what takes milliseconds on a quiet machine
IN_PARTS = 4000  # numbers in a sample whose payload lies beside the stream; less than 1500 ride in the entry
_words = count()
_context: Any = multiprocessing.get_context("forkserver")
# Imported once by the server, whoever starts it first, and not by each process; it finds no modules of the tests.
_context.set_forkserver_preload(["pytest", "synthbroker.dataset", "torch._dynamo", "torch.nn.parallel"])

# What torch says about this machine, or Python about forking a process with threads; neither is about us.
LOADER_MARKS = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create . worker processes:UserWarning"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.usefixtures("no_process_is_left"),
]


def number(i: int, size: int = 4) -> dict[str, Any]:
    """Make a sample that can be told from others, and from a damaged one."""
    return {"n": i, "x": np.full(size, i, np.float32)}


def fill(
    server: RunningServer, ring: str, numbers: Iterable[int], *, size: int = 4, **options: Any
) -> sb.ProducerStats:
    """Put one sample for each number and close; the ring ends unless told otherwise."""
    defaults = {"capacity": "50MB", "producers": 1, "codec": "raw"}
    with sb.Producer(server.url, ring=ring, **defaults | options) as out:
        for i in numbers:
            out.put(number(i, size), recipe={"n": i})
    return out.stats


def values(batch: Mapping[str, Any]) -> list[int]:
    """Read the numbers out of a batch of `number`s, each of which must be whole."""
    found = [int(n) for n in batch["n"]]
    for n, x in zip(found, batch["x"], strict=True):
        assert (np.asarray(x) == n).all(), f"sample {n} is not what was put"
    return found


def drain(batches: Iterable[Any]) -> list[int]:
    """Read to the end."""
    return [n for batch in batches for n in values(batch)]


def take(batches: Iterator[Any], count: int) -> list[int]:
    """Take so many batches, and stay in the loop."""
    return [n for _ in range(count) for n in values(next(batches))]


def same_bits(one: Any, other: Any) -> bool:
    """Say whether two arrays have the same dtype, shape and bytes."""
    return bool((one.dtype, one.shape) == (other.dtype, other.shape) and one.tobytes() == other.tobytes())


# -- a plain client's look at the ring


def key(ring: str, name: str) -> str:
    return f"sb:{{{ring}}}:{name}"


def meta(server: RunningServer, ring: str) -> dict[str, str]:
    return {k.decode(): v.decode() for k, v in server.client().hgetall(key(ring, "meta")).items()}


def counters(server: RunningServer, ring: str, group: str) -> dict[str, int]:
    """Read a group's counters."""
    flat = server.client().hgetall(key(ring, f"group:{group}"))
    return {k.decode(): int(v) for k, v in flat.items() if v.isdigit()}


def pending(server: RunningServer, ring: str, group: str) -> list[int]:
    """List the numbers that a group was given and has not acknowledged."""
    found = server.client().xpending_range(key(ring, "samples"), group, "-", "+", 10_000)
    return [int(entry["message_id"].split(b"-")[0]) for entry in found]


def holders(server: RunningServer, ring: str, group: str) -> list[str]:
    """Name the holder of each sample that a group was given and has not acknowledged."""
    found = server.client().xpending_range(key(ring, "samples"), group, "-", "+", 10_000)
    return [entry["consumer"].decode() for entry in found]


def members(server: RunningServer, ring: str, group: str) -> list[str]:
    """List the living consumers of a group."""
    found = server.client().zrange(key(ring, "consumers"), 0, -1)
    return [member.decode() for member in found if member.startswith(f"{group} ".encode())]


def reasons(server: RunningServer, ring: str) -> list[str]:
    """List why samples went to quarantine."""
    return [fields[b"reason"].decode() for _, fields in server.client().xrange(key(ring, "quarantine"))]


def lasting_parts(server: RunningServer, ring: str) -> set[str]:
    """List the keys of the parts that no expiry will remove."""
    client = server.client()
    found = client.scan_iter(match=key(ring, "part:*"), count=1000)
    return {part.decode() for part in found if client.pttl(part) == -1}


def owned_parts(server: RunningServer, ring: str) -> set[str]:
    """List the keys of the parts that leave with a sample of the ring."""
    lines = [line.decode().split() for line in server.client().lrange(key(ring, "index"), 0, -1)]
    return {key(ring, f"part:{uid}:{i}") for _, uid, parts, _ in lines for i in range(int(parts))}


def check_ledger(server: RunningServer, ring: str, *groups: str) -> None:
    """Check the conservation law of design.md with nothing but plain commands."""
    info = meta(server, ring)
    first, following = int(info["first"]), int(info["next"])
    assert server.client().xlen(key(ring, "samples")) == following - first
    delivered_ids = {
        group["name"].decode(): int(group["last-delivered-id"].split(b"-")[0])
        for group in server.client().xinfo_groups(key(ring, "samples"))
    }
    for group in groups:
        found = counters(server, ring, group)
        unread = following - 1 - max(delivered_ids[group], first - 1)
        assert following - 1 - found["since"] == found["delivered"] + unread + found["lost"], (found, info)
        held = len(pending(server, ring, group))
        assert found["delivered"] == found["acknowledged"] + held + found["evicted_pending"], (found, held)


def fill_up(server: RunningServer) -> list[str]:
    """Take all memory that is left, by other keys than the ring's."""
    ballast: list[str] = []
    for size in (1_000_000, 100_000, 10_000):
        try:
            while True:
                server.client().set(f"ballast:{len(ballast)}", b"x" * size)
                ballast.append(f"ballast:{len(ballast)}")
        except redis.exceptions.OutOfMemoryError:
            continue
    return ballast


# -- samples that no honest producer sends


def lose_a_part(server: RunningServer, ring: str, i: int) -> None:
    """Have the sample after the first i lose its payload, which is too large to share a part."""
    entry = server.client().xrange(f"sb:{{{ring}}}:samples", f"{i + 1}-0", count=1)[0][1]
    assert server.client().delete(f"sb:{{{ring}}}:part:{entry[b'parts'].decode()[:-2]}:0")


@contextmanager
def raw_ring(server: RunningServer, ring: str) -> Iterator[Ring]:
    """Open a ring that is there, for its commands one by one."""
    connection = Connection(server.url)
    opened = Ring(connection, ring)
    try:
        opened.read_meta()
        yield opened
    finally:
        connection.close()


def commit_raw(ring: Ring, samples: Sequence[Encoded], name: str = "hostile") -> int:
    """Commit what may not be a sample at all; returns the number of the last."""
    who = Incarnation(f"{name}-{next(_words)}", "00")
    ring.join_producer(who, 0, {})
    ring.room(who, sum(sample.cost_bytes for sample in samples), len(samples))
    answer = ring.commit(who, list(enumerate(samples, 1)))
    assert answer.word == "OK", answer
    return ring.read_meta().next - 1


def encoded(i: int, size: int = 4, codec: str = "raw") -> Encoded:
    """Encode a `number` as a producer would."""
    sample = {name: np.asarray(value) for name, value in number(i, size).items()}
    return wire.encode(sample, dict.fromkeys(sample, codec), texts.pack_texts({}, {"n": i}))


# -- threads


def background(work: Callable[[], Any]) -> "Future[Any]":
    """Run something in a thread of its own; its result or exception is the future's."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - handed to the test
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def waits(future: "Future[Any]", until: Callable[[], object], what: str) -> None:
    """Check that something has come to where it waits, and is not done."""
    eventually(until, what, deadline_s=SOON_S)
    assert not future.done(), future


# -- readers in processes of their own


def read_all(url: str, ring: str, told: Any, **options: Any) -> None:
    """Read to the end and tell the numbers; for a process of its own."""
    told.put(drain(sb.Consumer(url, ring=ring, **options)))


def read_with_workers(url: str, ring: str, told: Any, num_workers: int, *, plain: bool = False, **options: Any) -> None:
    """Read to the end through worker processes and tell the numbers; for a process of its own."""
    from torch.utils.data import DataLoader

    dataset = sb.RingDataset(url, ring=ring, **options)
    told.put(
        drain(
            DataLoader(dataset, batch_size=None, num_workers=num_workers)
            if plain
            else dataset.loader(num_workers=num_workers)
        )
    )


def read_and_hold(url: str, ring: str, told: Any, **options: Any) -> None:
    """Read one batch, tell its numbers, and keep it until killed."""
    consumer = sb.Consumer(url, ring=ring, **options)
    told.put(values(next(iter(consumer))))
    threading.Event().wait()


@contextmanager
def processes(target: Callable[..., None], *calls: tuple[Any, ...], **options: Any) -> Iterator[tuple[list[Any], Any]]:
    """Run a function in a process for each call; gives the processes and the queue that they tell things through."""
    told = _context.Queue()
    started = [_context.Process(target=_run, args=(target, *call, told), kwargs=options) for call in calls]
    for process in started:
        process.start()
    try:
        yield started, told
    finally:
        for process in started:
            process.kill()
            process.join()
        told.close()
        told.join_thread()


def _run(target: Callable[..., None], *arguments: Any, **options: Any) -> None:
    # As in a program of a user's: the workers of whom a fork server has started would be started by one of their own.
    multiprocessing.set_start_method("fork", force=True)
    target(*arguments, **options)
