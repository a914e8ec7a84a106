"""Measure 11: how long a sample takes from `put` to the trainer, when nothing else goes on."""

import time
from functools import partial

import numpy as np

import synthbroker as sb
from synthbroker.bench.loads import PATIENCE_S, Figures, RingPlan
from synthbroker.bench.place import Place
from synthbroker.bench.processes import Part, Stage
from synthbroker.bench.samples import KIB, size_name
from synthbroker.bench.table import Block, Bound, Line

COUNT, QUICK_COUNT = 1000, 50
SIZE_BYTES = 4 * KIB
_IDLE_S = 0.002  # between a sample and the next, so that the ring is idle again and the reader waits
_LOOK_EVERY_S = 0.0002


def put_singly(stage: Stage, ring: RingPlan, count: int) -> None:
    """Put a sample that says when it was put, each after the trainer has had the one before."""
    stamp = np.zeros(1, np.int64)
    sample = {"put_ns": stamp, "x": np.zeros(SIZE_BYTES - stamp.nbytes, np.uint8)}
    with sb.Producer(ring.url, ring=ring.name, wait_s=PATIENCE_S, **ring.options) as out:
        stage.begin()
        for number in range(count):
            while stage.turn < number:
                time.sleep(_LOOK_EVERY_S)
            time.sleep(_IDLE_S)
            stamp[0] = time.monotonic_ns()
            out.put(sample)
            out.flush()


def take_singly(stage: Stage, ring: RingPlan) -> Figures:
    """Take each, and note how old it is by the clock that all processes of a machine share."""
    dataset = sb.RingDataset(ring.url, ring=ring.name, group="bench", wait_s=PATIENCE_S)
    ages_ms: list[float] = []
    stage.begin()
    for batch in dataset.loader():
        ages_ms.append((time.monotonic_ns() - int(batch["put_ns"][0, 0])) / 1e6)
        stage.turn = len(ages_ms)
    dataset.close()
    return {"p50_ms": float(np.percentile(ages_ms, 50)), "p99_ms": float(np.percentile(ages_ms, 99))}


def latency(place: Place) -> Figures:
    """Send samples one by one."""
    with place.ring() as name:
        ring = RingPlan(place.url, name, {"producers": 1, "capacity": "64MB"})
        trainer = Part(take_singly, (ring,))
        producer = Part(put_singly, (ring, place.scaled(COUNT, QUICK_COUNT)))
        figures: Figures = place.troupe.play(trainer, producer, patience_s=place.patience_s)[0]
        return figures


_line = partial(Line, 11, unit="ms")
LATENCY = Block(
    {"one by one": latency},
    (
        _line(
            f"commit to the trainer's hands, idle ring, {size_name(SIZE_BYTES)}: p99",
            ours=("one by one", "p99_ms"),
            bound=Bound(10, most=True),
        ),
        _line("the same: median", ours=("one by one", "p50_ms")),
    ),
)
