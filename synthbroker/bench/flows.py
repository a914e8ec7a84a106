"""Measures 6 to 10 and 14: producers and trainers at a pace, as generators and training steps have one."""

from dataclasses import replace
from functools import partial
from typing import Any

from synthbroker import machine
from synthbroker.bench import baselines, loads, samples
from synthbroker.bench.loads import Figures, Maker, Pace, Reading, RingPlan
from synthbroker.bench.place import Place
from synthbroker.bench.processes import Part
from synthbroker.bench.samples import KIB, MIB
from synthbroker.bench.table import Block, Bound, Line
from synthbroker.errors import SynthbrokerError
from synthbroker.units import format_size, parse_size

PACED_S = 8.0  # at least: ten samples per second are few
QUICK_S = 0.4
_WIREHEAD_PER_S = 20.4  # pairs of 256³ volumes: its best, on eight nodes
_MANY_NEED_BYTES = parse_size("16GB")  # of memory: 64 interpreters, a volume or two in each, and the ring


def play(
    place: Place,
    make: Maker,
    paces: list[Pace],
    reading: Reading,
    groups: tuple[str, ...] = ("bench",),
    **options: Any,
) -> list[Figures]:
    """Run a trainer for each group and a producer for each pace; the trainers' figures come first."""
    with place.ring() as name:
        ring = RingPlan(place.url, name, {"producers": len(paces), "capacity": 256 * MIB, **options})
        trainers = [
            Part(
                loads.train,
                (ring, replace(reading, options=reading.options | {"group": group}, voice=(i, len(groups)))),
            )
            for i, group in enumerate(groups)
        ]
        producers = [Part(loads.produce, (ring, make, pace)) for pace in paces]
        return place.troupe.play(*trainers, *producers, patience_s=place.patience_s)


def _paced(place: Place) -> float:
    return QUICK_S if place.quick else max(place.seconds, PACED_S)


def reused(reuse: object, place: Place) -> Figures:
    """Let a trainer be ten times as fast as its generator."""
    reading = Reading(_paced(place), step_s=0.01, options={"reuse": reuse})
    return play(place, partial(samples.floats, MIB), [Pace(0.1)], reading, when_full="drop-oldest")[0]


def overlapped(place: Place) -> Figures:
    """Generate and train at the same time."""
    return play(place, partial(samples.floats, MIB), [Pace(0.05)], Reading(_paced(place), step_s=0.05))[0]


def alternating(place: Place) -> Figures:
    """Generate and train in turn, in one process."""
    part = Part(baselines.alternate, (0.05, 0.05, _paced(place)))
    figures: Figures = place.troupe.play(part, patience_s=place.patience_s)[0]
    return figures


def crowd(count: int, groups: tuple[str, ...], place: Place) -> Figures:
    """Let many slow generators fill one ring; the figures are those of the slowest group."""
    paces = [Pace(0.1, seed) for seed in range(count)]
    done = play(place, partial(samples.floats, 64 * KIB), paces, Reading(_paced(place)), groups)
    return {"samples_per_s": min(figures["samples_per_s"] for figures in done[: len(groups)])}


def many(place: Place) -> Figures:
    """Let 64 processes put pairs of volumes, as fast as they go, and read them all."""
    limit = machine.memory_limit_bytes()
    if not place.quick and limit < _MANY_NEED_BYTES:
        raise SynthbrokerError(f"it needs {format_size(_MANY_NEED_BYTES)} of memory, here is {format_size(limit)}")
    count, side = (3, 32) if place.quick else (64, 256)
    options: dict[str, Any] = {
        "codec": "raw",
        "in_flight": place.scaled(64 * MIB, MIB),  # 64 times the default would be more than most machines have
        "capacity": place.scaled(2048 * MIB, 8 * MIB),
    }
    return play(place, partial(samples.volumes, side), [Pace()] * count, Reading(_paced(place)), **options)[0]


def in_put(place: Place) -> Figures:
    """Give the producer's figures, with 16 MiB every 100 ms."""
    size = 256 * KIB if place.quick else 16 * MIB
    pace = Pace(0.1, steady=True)
    return play(place, partial(samples.floats, size), [pace], Reading(_paced(place)))[1]


REUSE = Block(
    {"reuse=inf": partial(reused, "inf"), "reuse=1": partial(reused, 1)},
    (
        Line(
            6,
            "generator 100 ms, trainer 10 ms: reuse=inf ÷ reuse=1",
            "batches/s",
            ("reuse=inf", "samples_per_s"),
            ("reuse=1", "samples_per_s"),
            Bound(9),
        ),
        Line(
            6,
            "the same: trainer's time waiting, reuse=inf",
            "of time",
            ("reuse=inf", "waiting_share"),
            bound=Bound(0.05, most=True),
        ),
    ),
)
OVERLAP = Block(
    {"overlapped": overlapped, "alternating": alternating},
    (
        Line(
            7,
            "generating and training, 50 ms each: overlapped ÷ in turn",
            "batches/s",
            ("overlapped", "samples_per_s"),
            ("alternating", "samples_per_s"),
            Bound(1.7),
        ),
    ),
)
CROWD = Block(
    {
        "16 producers": lambda place: crowd(place.scaled(16, 2), ("bench",), place),
        "1 producer": partial(crowd, 1, ("bench",)),
        "16 producers, 2 groups": lambda place: crowd(place.scaled(16, 2), ("bench", "second"), place),
    },
    (
        Line(
            8,
            "16 producers, 100 ms per 64 KiB sample ÷ one of them",
            "samples/s",
            ("16 producers", "samples_per_s"),
            ("1 producer", "samples_per_s"),
            Bound(15.5),
        ),
        Line(
            10,
            "the same with two groups, the slower one ÷ one group alone",
            "samples/s",
            ("16 producers, 2 groups", "samples_per_s"),
            ("16 producers", "samples_per_s"),
            Bound(0.95),
        ),
    ),
)
MANY = Block(
    {"64 producers": many},
    (
        Line(
            9,
            "64 producers, two 256³ uint8 volumes each sample, one reader",
            "samples/s",
            ("64 producers", "samples_per_s"),
            bound=Bound(_WIREHEAD_PER_S),
        ),
    ),
)
IN_PUT = Block(
    {"16 MiB every 100 ms": in_put},
    (
        Line(
            14,
            "generator's time inside put, 16 MiB every 100 ms",
            "of time",
            ("16 MiB every 100 ms", "share_in_put"),
            bound=Bound(0.05, most=True),
        ),
    ),
)
