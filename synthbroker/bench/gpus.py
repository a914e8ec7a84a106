"""Measures 16 and 17: what a generator on a GPU loses by `put`, and a training there by bringing its batches."""

import itertools
import statistics
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import synthbroker as sb
from synthbroker.bench import loads, samples
from synthbroker.bench.loads import PATIENCE_S, Figures, RingPlan
from synthbroker.bench.meter import Meter
from synthbroker.bench.place import Place
from synthbroker.bench.processes import Part, Stage
from synthbroker.bench.samples import MIB, size_name
from synthbroker.bench.table import Block, Bound, Line
from synthbroker.errors import SynthbrokerError

LEAST_S = 2.0
_OPTIONS = {"codec": "raw", "capacity": 256 * MIB, "producers": 1}


@dataclass(frozen=True)
class Task:
    """What a GPU does for a sample or a step: so many products of matrices of this side."""

    products: int
    side: int
    device: str = "cuda"


def _as_it_is(sample: Any) -> Any:
    return sample


def _to_host(sample: Any) -> Any:
    return sample.cpu()


def generate(
    stage: Stage, task: Task, seconds: float, ring: RingPlan | None, before: Callable[[Any], Any] = _as_it_is
) -> Figures:
    """Make samples on the GPU, with or without a ring to put them into, and count those that the GPU has finished.

    Args:
        stage: The others.
        task: What making one takes.
        seconds: For so long.
        ring: Where they go; None: nowhere.
        before: Called with each, inside what is timed as `put`.
    """
    from synthbroker.bench import cuda

    work, ahead = cuda.Work(task.device, task.side, task.products), cuda.Ahead(task.device)
    meter, inside_s = Meter(seconds), array("d")
    with _into(ring) as put:
        stage.begin()
        going = True
        while going:
            sample = work()
            began = time.perf_counter()
            put(before(sample))
            if meter.counting:
                inside_s.append(time.perf_counter() - began)
            going = not ahead.mark() or meter.count(1)
    return {"samples_per_s": meter.per_s, "put_ms": 1000 * statistics.median(inside_s)}


@contextmanager
def _into(ring: RingPlan | None) -> Iterator[Callable[[Any], object]]:
    if ring is None:
        yield _as_it_is
        return
    with sb.Producer(ring.url, ring=ring.name, wait_s=PATIENCE_S, **ring.options) as out:
        yield lambda sample: out.put({"x": sample})


def drain(stage: Stage, ring: RingPlan) -> None:
    """Take all batches until the ring ends, and do nothing with them."""
    dataset = sb.RingDataset(ring.url, ring=ring.name, group="bench", wait_s=PATIENCE_S)
    stage.begin()
    for _ in dataset.loader():
        pass
    dataset.close()


@dataclass(frozen=True)
class Way:
    """How batches come to the GPU: options of the dataset, and whether the loop copies, waiting or not."""

    device: bool = False
    pin_memory: bool = False
    non_blocking: bool = False


def train(stage: Stage, task: Task, seconds: float, ring: RingPlan | None, way: Way = Way()) -> Figures:
    """Take steps on the GPU that begin with the batch, and count those that it has finished.

    Args:
        stage: The others.
        task: What a step takes.
        seconds: For so long.
        ring: Where batches come from; None: one is on the GPU already, and used again and again.
        way: How they come to the GPU.
    """
    from synthbroker.bench import cuda

    work, ahead = cuda.Work(task.device, task.side, task.products), cuda.Ahead(task.device)
    meter, going = Meter(seconds), True
    stage.begin()
    for batch in itertools.repeat(work.start) if ring is None else _batches(ring, task, way):
        if not going:
            continue  # the rest is taken, so that the producer can end as it should
        work(batch)
        going = not ahead.mark() or meter.count(1)
        if not going:
            stage.stop()
            if ring is None:
                break
    return {"steps_per_s": meter.per_s}


def _batches(ring: RingPlan, task: Task, way: Way) -> Iterator[Any]:
    dataset = sb.RingDataset(
        ring.url,
        ring=ring.name,
        group="bench",
        wait_s=PATIENCE_S,
        pin_memory=way.pin_memory,
        device=task.device if way.device else None,
    )
    for batch in dataset.loader():
        there = batch if way.device else batch.to(task.device, non_blocking=way.non_blocking)
        yield there["x"].reshape(task.side, task.side)
    dataset.close()


def calibrate(stage: Stage, seconds: float, side: int) -> int:
    """Say how many products take a GPU so long; 0 where torch sees none."""
    from synthbroker.bench import cuda

    stage.begin()
    return cuda.products_for(seconds, "cuda", side) if cuda.is_there() else 0


# -- contenders


def _work(*, quick: bool) -> tuple[float, int]:
    """Say how many seconds a sample, or a step, takes a GPU, and the side of the float32 matrix that it is."""
    return (0.002, 256) if quick else (0.02, 2048)


@cache
def _products(place: Place) -> int:
    """Calibrate once, so that all contenders do the same."""
    part = Part(calibrate, _work(quick=place.quick))
    products: int = place.troupe.play(part, patience_s=place.patience_s)[0]
    return products


def _task(place: Place) -> Task:
    products = _products(place)
    if not products:
        raise SynthbrokerError("torch sees no GPU")
    return Task(products, _work(quick=place.quick)[1])


def _seconds(place: Place) -> float:
    return place.seconds if place.quick else max(place.seconds, LEAST_S)


def _play(place: Place, *parts: Part) -> Figures:
    figures: Figures = place.troupe.play(*parts, patience_s=place.patience_s)[0]
    return figures


def generating(before: Callable[[Any], Any] | None, place: Place) -> Figures:
    """Make samples on the GPU and put them, or do not; a trainer takes them as they are."""
    task = _task(place)
    if before is None:
        return _play(place, Part(generate, (task, _seconds(place), None)))
    with place.ring() as name:
        ring = RingPlan(place.url, name, _OPTIONS)
        return _play(place, Part(generate, (task, _seconds(place), ring, before)), Part(drain, (ring,)))


def training(way: Way | None, place: Place) -> Figures:
    """Train on the GPU, on what a producer on the CPU puts as fast as the ring takes it, or on one batch alone."""
    task = _task(place)
    if way is None:
        return _play(place, Part(train, (task, _seconds(place), None)))
    with place.ring() as name:
        ring = RingPlan(place.url, name, _OPTIONS)
        make = partial(samples.floats, 4 * task.side**2)
        return _play(place, Part(train, (task, _seconds(place), ring, way)), Part(loads.produce, (ring, make)))


_PUT, _BY_HAND, _NO_PUT = "put of a CUDA tensor", "put of x.cpu()", "samples on a GPU, no put"
_ALONE = "steps on a GPU, no ring"
WAYS = {
    "device='cuda'": Way(device=True),
    "pin_memory, to(non_blocking=True)": Way(pin_memory=True, non_blocking=True),
    "to('cuda')": Way(),
}


def _in_words(*, quick: bool) -> tuple[str, str]:
    """Say what a sample, or a step, takes a GPU, and how large the sample is."""
    work_s, side = _work(quick=quick)
    return f"{1000 * work_s:g} ms", size_name(4 * side**2)


def generator_block(*, quick: bool) -> Block:
    """Make the block of measure 16."""
    takes, size = _in_words(quick=quick)
    put, by_hand, no_put = ((name, "samples_per_s") for name in (_PUT, _BY_HAND, _NO_PUT))
    return Block(
        {
            _PUT: partial(generating, _as_it_is),
            _BY_HAND: partial(generating, _to_host),
            _NO_PUT: partial(generating, None),
        },
        (
            Line(16, f"{size} made on a GPU in {takes}: with put ÷ without", "samples/s", put, no_put, Bound(0.95)),
            Line(16, "the same: put(x.cpu()) ÷ without", "samples/s", by_hand, no_put),
            Line(16, "the same: host's time in put(x) ÷ in put(x.cpu())", "ms", (_PUT, "put_ms"), (_BY_HAND, "put_ms")),
        ),
    )


def trainer_block(*, quick: bool) -> Block:
    """Make the block of measure 17."""
    takes, size = _in_words(quick=quick)
    first = f"steps of {takes} on a GPU, {size} each"
    return Block(
        {name: partial(training, way) for name, way in WAYS.items()} | {_ALONE: partial(training, None)},
        tuple(
            Line(17, f"{what}: {name} ÷ no ring", "steps/s", (name, "steps_per_s"), (_ALONE, "steps_per_s"), bound)
            for name, what, bound in zip(WAYS, (first, "the same", "the same"), (Bound(0.95), None, None), strict=True)
        ),
    )
