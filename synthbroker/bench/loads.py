"""Our own side: what runs in producer and trainer processes, by the public API only."""

import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np

import synthbroker as sb
from synthbroker.bench.meter import Meter
from synthbroker.bench.processes import Stage

Figures = dict[str, float]
Maker = Callable[[], dict[str, Any]]
PATIENCE_S = 60.0  # for a sample, or for room


@dataclass(frozen=True)
class RingPlan:
    """A ring of the bench; `options` are for its producers."""

    url: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pace:
    """How a producer goes about it.

    Attributes:
        pause_s: What making a sample takes, slept.
        seed: Draws the moment of the first one, so that many producers do not march in step.
        steady: A sample each `pause_s`, however long `put` takes.
    """

    pause_s: float = 0.0
    seed: int = 0
    steady: bool = False


def produce(stage: Stage, ring: RingPlan, make: Maker, pace: Pace = Pace()) -> Figures:
    """Put one sample again and again until the scene is over; says what share of its time went into `put`."""
    sample = make()
    inside = took = 0.0
    with sb.Producer(ring.url, ring=ring.name, wait_s=PATIENCE_S, **ring.options) as out:
        stage.begin()
        began = time.perf_counter()
        time.sleep(Random(pace.seed).random() * pace.pause_s)
        while not stage.over:
            if pace.pause_s:
                time.sleep(max(pace.pause_s - took * pace.steady, 0.0))
            before = time.perf_counter()
            out.put(sample)
            took = time.perf_counter() - before
            inside += took
        wall = time.perf_counter() - began
    return {"share_in_put": inside / wall}


@dataclass(frozen=True)
class Reading:
    """How a trainer reads.

    Attributes:
        seconds: For so long.
        step_s: What training on a batch takes, slept.
        options: For its `RingDataset`.
        drain: Whether it then takes what is left, so that producers can end as they should.
        voice: Which of several trainers it is, and how many there are: all must have had their time.
    """

    seconds: float
    step_s: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    drain: bool = True
    voice: tuple[int, int] = (0, 1)


def train(stage: Stage, ring: RingPlan, reading: Reading) -> Figures:
    """Take batches until the time is up."""
    dataset = sb.RingDataset(ring.url, ring=ring.name, wait_s=PATIENCE_S, **({"group": "bench"} | reading.options))
    loader = dataset.loader()
    meter, waits_s = Meter(reading.seconds), array("d")
    going = True
    stage.begin()
    for batch, waited_s in timed(loader):
        if stage.over:
            continue
        if going and meter.counting:
            waits_s.append(waited_s)
        going = going and meter.count(len(batch.info.ids))
        if not going:
            stage.stop(*reading.voice)
            if not reading.drain:
                break
        elif reading.step_s:
            time.sleep(reading.step_s)
    dataset.close()
    return {"samples_per_s": meter.per_s, **of_waits(waits_s, meter)}


def of_waits(waits_s: "array[float]", meter: Meter) -> Figures:
    """Say how long a trainer waited for its batches."""
    values = np.frombuffer(waits_s)
    return {
        "waiting_share": float(values.sum()) / meter.counted_s,
        "wait_mean_ms": 1000 * float(values.mean()),
        "wait_p50_ms": 1000 * float(np.percentile(values, 50)),
        "wait_p99_ms": 1000 * float(np.percentile(values, 99)),
    }


def timed(source: Iterable[Any]) -> Iterator[tuple[Any, float]]:
    """Give each batch with the seconds that it was waited for."""
    batches = iter(source)
    while True:
        before = time.perf_counter()
        try:
            batch = next(batches)
        except StopIteration:
            return
        yield batch, time.perf_counter() - before
