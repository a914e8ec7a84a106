"""Measures 1 to 4: samples of one size as fast as they go, one producer, one trainer."""

import multiprocessing
import os
from collections.abc import Callable
from functools import partial

from synthbroker.bench import baselines, inside, loads
from synthbroker.bench.loads import Figures, Reading, RingPlan
from synthbroker.bench.place import Place
from synthbroker.bench.processes import Part
from synthbroker.bench.samples import KIB, MIB, floats, size_name
from synthbroker.bench.table import Block, Bound, Line

WINDOW_BYTES = 256 * MIB  # of samples that may be on their way, ours and theirs
LEAST_SAMPLES = 4
OVERHEAD = 1.1  # a ring's capacity counts the server's memory
CONTENDERS = ("ours", "plain redis-py", "relay", "multiprocessing.Queue", "DataLoader")
# Size; the number of each measure, what ours is divided by, and how much it should be more.
SIZES: dict[int, tuple[tuple[int, str, float | None], ...]] = {
    64 * MIB: ((1, "relay", 0.6), (2, "plain redis-py", 6)),
    4 * MIB: ((3, "plain redis-py", 3),),
    400 * KIB: ((4, "plain redis-py", 2),),
    40 * KIB: ((4, "plain redis-py", 3),),
    4 * KIB: ((4, "plain redis-py", 8),),
}
QUICK_SIZES = (4 * KIB,)  # for these a quick bench has all contenders beside each other


def most_samples(size_bytes: int) -> int:
    """Say how many samples may be on their way."""
    return max(WINDOW_BYTES // size_bytes, LEAST_SAMPLES)


def batch_size(size_bytes: int) -> int:
    """Choose a batch as one would have it for samples of this size."""
    return 1 if size_bytes >= 4 * MIB else 8 if size_bytes >= 400 * KIB else 32


def ours(size_bytes: int, place: Place) -> Figures:
    """From `put` to a decoded torch batch."""
    capacity = int(OVERHEAD * most_samples(size_bytes) * size_bytes)
    options = {"capacity": capacity, "codec": "raw", "when_full": "block", "producers": 1}
    with place.ring() as name:
        ring = RingPlan(place.url, name, options)
        reading = Reading(place.seconds, options={"batch_size": batch_size(size_bytes), "reuse": 1})
        trainer = Part(loads.train, (ring, reading))
        producer = Part(loads.produce, (ring, partial(floats, size_bytes)))
        return _trainers(place, trainer, producer)


def plain_redis(size_bytes: int, place: Place) -> Figures:
    """The same with redis-py, as a first program would be written."""
    make = partial(floats, size_bytes)
    key = f"bench-plain-{os.urandom(6).hex()}"
    trainer = Part(baselines.redis_train, (place.url, key, make, place.seconds))
    producer = Part(baselines.redis_produce, (place.url, key, make, most_samples(size_bytes)))
    try:
        return _trainers(place, trainer, producer)
    finally:
        baselines.redis_remove(place.url, key)


def relay(size_bytes: int, place: Place) -> Figures:
    """The same bytes through two bare sockets with a process between them."""
    make = partial(floats, size_bytes)
    trainer = Part(baselines.relay_train, (place.folder, make, place.seconds))
    producer = Part(baselines.relay_produce, (place.folder, make))
    return _trainers(place, trainer, producer, Part(baselines.relay, (place.folder,)))


def queue(size_bytes: int, place: Place) -> Figures:
    """The same samples through a multiprocessing.Queue."""
    shared = multiprocessing.get_context("spawn").Queue(most_samples(size_bytes))
    trainer = Part(baselines.queue_train, (place.seconds,))
    producer = Part(baselines.queue_produce, (partial(floats, size_bytes),))
    try:
        figures: Figures = place.troupe.play(trainer, producer, patience_s=place.patience_s, shared=shared)[0]
        return figures
    finally:
        shared.close()


def loader(size_bytes: int, place: Place) -> Figures:
    """The same samples made in a worker of a DataLoader."""
    make = partial(floats, size_bytes)
    return _trainers(place, Part(inside.train, (make, batch_size(size_bytes), place.seconds)))


def _trainers(place: Place, *parts: Part) -> Figures:
    figures: Figures = place.troupe.play(*parts, patience_s=place.patience_s)[0]
    return figures


_RUNS: dict[str, Callable[[int, Place], Figures]] = dict(
    zip(CONTENDERS, (ours, plain_redis, relay, queue, loader), strict=True)
)


def block(size_bytes: int, *, beside: bool) -> Block:
    """Make the block of one size: what is judged and, if asked for, what else is there beside it."""
    size = size_name(size_bytes)
    judged = SIZES[size_bytes]
    others = [name for name in CONTENDERS[1:] if beside and name not in [against for _, against, _ in judged]]
    lines = [*judged, *((judged[-1][0], name, None) for name in others)]
    return Block(
        {f"{name} {size}": partial(run, size_bytes) for name, run in _RUNS.items()},
        tuple(
            Line(
                number,
                f"{size} samples, raw: ours ÷ {against}",
                "samples/s",
                (f"ours {size}", "samples_per_s"),
                (f"{against} {size}", "samples_per_s"),
                None if least is None else Bound(least),
            )
            for number, against, least in lines
        ),
    )
