"""Measures 6 to 10 and 14: producers and trainers at a pace, as generators and training steps have one."""

from dataclasses import replace
from functools import partial
from typing import Any

from synthbroker import machine
from synthbroker.bench import baselines, loads, samples
from synthbroker.bench.loads import Figures, Maker, Pace, Reading, RingPlan
from synthbroker.bench.place import Place
from synthbroker.bench.processes import Part
from synthbroker.bench.samples import KIB, MIB, size_name
from synthbroker.bench.table import Block, Bound, Line
from synthbroker.errors import SynthbrokerError
from synthbroker.units import format_size, parse_size

_SLOW_S, _FAST_S, _EVEN_S = 0.1, 0.01, 0.05  # what a sample, or a step, takes
PACED_S = 8.0  # at least: ten samples per second are few
QUICK_S = 0.4
_WIREHEAD_PER_S = 20.4  # pairs of 256³ volumes: its best, on eight nodes
_CROWD_BYTES = 64 * KIB
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
    reading = Reading(_paced(place), step_s=_FAST_S, options={"reuse": reuse})
    return play(place, partial(samples.floats, MIB), [Pace(_SLOW_S)], reading, when_full="drop-oldest")[0]


def overlapped(place: Place) -> Figures:
    """Generate and train at the same time."""
    return play(place, partial(samples.floats, MIB), [Pace(_EVEN_S)], Reading(_paced(place), step_s=_EVEN_S))[0]


def alternating(place: Place) -> Figures:
    """Generate and train in turn, in one process."""
    part = Part(baselines.alternate, (_EVEN_S, _EVEN_S, _paced(place)))
    figures: Figures = place.troupe.play(part, patience_s=place.patience_s)[0]
    return figures


def crowd(count: int, groups: tuple[str, ...], place: Place) -> Figures:
    """Let many slow generators fill one ring; the figures are those of the slowest group."""
    paces = [Pace(_SLOW_S, seed) for seed in range(count)]
    done = play(place, partial(samples.floats, _CROWD_BYTES), paces, Reading(_paced(place)), groups)
    return {"samples_per_s": min(figures["samples_per_s"] for figures in done[: len(groups)])}


def many(count: int, side: int, place: Place) -> Figures:
    """Let many processes put pairs of volumes, as fast as they go, and read them all."""
    limit = machine.memory_limit_bytes()
    if not place.quick and limit < _MANY_NEED_BYTES:
        raise SynthbrokerError(f"it needs {format_size(_MANY_NEED_BYTES)} of memory, here is {format_size(limit)}")
    options: dict[str, Any] = {
        "codec": "raw",
        "in_flight": place.scaled(64 * MIB, MIB),  # 64 times the default would be more than most machines have
        "capacity": place.scaled(2048 * MIB, 8 * MIB),
    }
    return play(place, partial(samples.volumes, side), [Pace()] * count, Reading(_paced(place)), **options)[0]


def in_put(size_bytes: int, place: Place) -> Figures:
    """Give the producer's figures, with a sample each `_SLOW_S`."""
    pace = Pace(_SLOW_S, steady=True)
    return play(place, partial(samples.floats, size_bytes), [pace], Reading(_paced(place)))[1]


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:g} ms"


REUSE = Block(
    {"reuse=inf": partial(reused, "inf"), "reuse=1": partial(reused, 1)},
    (
        Line(
            6,
            f"generator {_ms(_SLOW_S)}, trainer {_ms(_FAST_S)}: reuse=inf ÷ reuse=1",
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
            f"generating and training, {_ms(_EVEN_S)} each: overlapped ÷ in turn",
            "batches/s",
            ("overlapped", "samples_per_s"),
            ("alternating", "samples_per_s"),
            Bound(1.7),
        ),
    ),
)


def crowd_block(*, quick: bool) -> Block:
    """Make the block of measures 8 and 10."""
    count = 2 if quick else 16
    several, shared = f"{count} producers", f"{count} producers, 2 groups"
    return Block(
        {
            several: partial(crowd, count, ("bench",)),
            "1 producer": partial(crowd, 1, ("bench",)),
            shared: partial(crowd, count, ("bench", "second")),
        },
        (
            Line(
                8,
                f"{several}, {_ms(_SLOW_S)} per {size_name(_CROWD_BYTES)} sample ÷ one of them",
                "samples/s",
                (several, "samples_per_s"),
                ("1 producer", "samples_per_s"),
                Bound(15.5),
            ),
            Line(
                10,
                "the same with two groups, the slower one ÷ one group alone",
                "samples/s",
                (shared, "samples_per_s"),
                (several, "samples_per_s"),
                Bound(0.95),
            ),
        ),
    )


def many_block(*, quick: bool) -> Block:
    """Make the block of measure 9."""
    count, side = (3, 32) if quick else (64, 256)
    name = f"{count} producers of volumes"
    what = f"{count} producers, two {side}³ uint8 volumes each sample, one reader"
    line = Line(9, what, "samples/s", (name, "samples_per_s"), bound=Bound(_WIREHEAD_PER_S))
    return Block({name: partial(many, count, side)}, (line,))


def in_put_block(*, quick: bool) -> Block:
    """Make the block of measure 14."""
    size_bytes = 256 * KIB if quick else 16 * MIB
    name = f"{size_name(size_bytes)} every {_ms(_SLOW_S)}"
    what = f"generator's time inside put, {name}"
    line = Line(14, what, "of time", (name, "share_in_put"), bound=Bound(0.05, most=True))
    return Block({name: partial(in_put, size_bytes)}, (line,))
