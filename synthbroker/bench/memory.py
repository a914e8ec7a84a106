"""Measures 12 and 13: the server's memory for what it holds, and that of processes that run for long."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import synthbroker as sb
from synthbroker.bench.loads import PATIENCE_S, Figures, RingPlan
from synthbroker.bench.place import Place
from synthbroker.bench.processes import Part, Stage
from synthbroker.bench.samples import KIB, MIB, floats, size_name
from synthbroker.bench.table import Block, Bound, Line
from synthbroker.errors import MissingExtraError, SynthbrokerError

RING_BYTES = 256 * MIB
SIZES = (64 * KIB, 1 * MIB, 3 * MIB // 2, 4 * MIB, 16 * MIB, 64 * MIB)
_QUICK_BYTES = 16 * MIB  # of the ring
LONG_RUNS = ((4 * KIB, 10**5), (16 * MIB, 10**3))  # size and number of samples
_QUICK_COUNT = 50
_WARM_UP = 0.1
_SETTLE_S = 10.0  # what was evicted is freed in the background
MOST_GROWTH = 1.05


def fill(stage: Stage, ring: RingPlan, size_bytes: int, count: int) -> None:
    """Put more than the ring holds."""
    sample = floats(size_bytes)
    stage.begin()
    with sb.Producer(ring.url, ring=ring.name, wait_s=PATIENCE_S, **ring.options) as out:
        for _ in range(count):
            out.put(sample)


def server_share(size_bytes: int, place: Place) -> Figures:
    """Fill a ring and divide what the server uses more than before by the payload that it holds."""
    if not str(place.memory().get("mem_allocator")).startswith("jemalloc"):
        raise SynthbrokerError("the server's allocator is not jemalloc")
    capacity = max(place.scaled(RING_BYTES, _QUICK_BYTES), size_bytes * 2)
    with place.ring() as name:
        empty = _used_bytes(place)
        options = {"codec": "raw", "when_full": "drop-oldest", "capacity": capacity}
        part = Part(fill, (RingPlan(place.url, name, options), size_bytes, capacity * 5 // 4 // size_bytes + 1))
        place.troupe.play(part, patience_s=place.patience_s)
        used = _used_bytes(place) - empty
        payload = sb.status(name, url=place.url).live * size_bytes
    return {"used_share": used / payload, "capacity_share": used / capacity}


def _used_bytes(place: Place) -> int:
    """Read the used memory when it no longer changes."""
    deadline = time.monotonic() + _SETTLE_S
    before: dict[str, Any] = {}
    memory = place.memory()
    while _in_use(before) != _in_use(memory) and time.monotonic() < deadline:
        time.sleep(0.1)
        before, memory = memory, place.memory()
    return int(memory["used_memory"])


def _in_use(memory: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(memory.get(name) for name in ("used_memory", "mem_clients_normal", "lazyfree_pending_objects"))


class _Watch:
    """Notes the resident memory of this process when a tenth of its samples are through, and at the end."""

    def __init__(self, count: int) -> None:
        import psutil

        self._resident: Callable[[], int] = lambda: psutil.Process().memory_info().rss
        self._count = count
        self._seen = 0
        self._marks: list[int] = []

    def see(self, samples: int) -> None:
        step = self._count * _WARM_UP
        self._seen += samples
        if self._seen >= step * (len(self._marks) + 1):
            self._marks.append(self._resident())

    @property
    def figures(self) -> Figures:
        first, last = self._marks[0], self._marks[-1]
        return {"growth": last / first, "peak_growth": max(self._marks) / first, "warm_mb": first / 1e6}


def put_for_long(stage: Stage, ring: RingPlan, size_bytes: int, count: int) -> Figures:
    """Put so many samples."""
    sample, watch = floats(size_bytes), _Watch(count)
    with sb.Producer(ring.url, ring=ring.name, wait_s=PATIENCE_S, **ring.options) as out:
        stage.begin()
        for _ in range(count):
            out.put(sample)
            watch.see(1)
    return watch.figures


def take_for_long(stage: Stage, ring: RingPlan, batch_size: int, count: int) -> Figures:
    """Take all of them."""
    dataset = sb.RingDataset(ring.url, ring=ring.name, group="bench", batch_size=batch_size, wait_s=PATIENCE_S)
    watch = _Watch(count)
    stage.begin()
    for batch in dataset.loader():
        watch.see(len(batch.info.ids))
    dataset.close()
    return watch.figures


def resident(size_bytes: int, count: int, place: Place) -> Figures:
    """Run a producer and a trainer for long."""
    _need_psutil()
    batch_size = 1 if size_bytes >= MIB else 8
    with place.ring() as name:
        ring = RingPlan(place.url, name, {"codec": "raw", "producers": 1, "capacity": RING_BYTES})
        trainer = Part(take_for_long, (ring, batch_size, count))
        producer = Part(put_for_long, (ring, size_bytes, count))
        patience_s = place.patience_s + count * size_bytes / 50e6  # even a tenth of the speed is fast enough
        taken, put = place.troupe.play(trainer, producer, patience_s=patience_s)
    return {f"producer_{name}": value for name, value in put.items()} | {
        f"trainer_{name}": value for name, value in taken.items()
    }


def _need_psutil() -> None:
    try:
        import psutil  # noqa: F401 - for the processes
    except ImportError as error:
        raise MissingExtraError("resident memory is measured with psutil: pip install 'synthbroker[bench]'") from error


SERVER = Block(
    {f"full ring of {size_name(size)}": partial(server_share, size) for size in SIZES},
    tuple(
        Line(
            12,
            f"server's used memory ÷ payload, full ring of {size_name(size)} samples",
            "",
            (f"full ring of {size_name(size)}", "used_share"),
            bound=Bound(1.1, most=True),
        )
        for size in SIZES
    ),
    most_repeats=1,
)


def resident_block(*, quick: bool) -> Block:
    """Make the block of measure 13."""
    runs = [(size, min(count, _QUICK_COUNT) if quick else count) for size, count in LONG_RUNS]
    return Block(
        {f"long run of {size_name(size)}": partial(resident, size, count) for size, count in runs},
        tuple(
            Line(
                13,
                f"{who}'s resident memory, {count:,} of {size_name(size)}: end ÷ after a tenth",
                "",
                (f"long run of {size_name(size)}", f"{who}_growth"),
                bound=Bound(MOST_GROWTH, most=True),
            )
            for size, count in runs
            for who in ("producer", "trainer")
        ),
        most_repeats=1,
    )
