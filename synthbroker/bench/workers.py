"""Time for 100 batches against `num_workers`: out of a ring, and generated inside the DataLoader's workers."""

import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from itertools import count
from typing import Any

import numpy as np

import synthbroker as sb
from synthbroker.bench.loads import PATIENCE_S, Figures, RingPlan
from synthbroker.bench.place import Place
from synthbroker.bench.processes import Part, Stage
from synthbroker.bench.samples import MIB
from synthbroker.bench.table import Block
from synthbroker.bench.throughput import OVERHEAD

WORKERS, QUICK_WORKERS = (0, 1, 2, 4), (0, 2)
BATCHES, QUICK_BATCHES = 100, 8
TRANSFORMS = ("cheap", "costly")
SOURCES = ("out of a ring", "generated in the workers")
BATCH_SIZE = 4
SAMPLE_BYTES = MIB
_HELD = 5  # batches that a worker may hold: two in DataLoader's queue, two ready, one in the making
_WARM_UP = 0.3  # of the batches: more than a full ring of the most workers holds
_seeds = count()


def volume() -> dict[str, Any]:
    """Generate a sample anew, as a quick generator would."""
    return {"x": np.random.default_rng(next(_seeds)).standard_normal(SAMPLE_BYTES // 4, np.float32)}


def produce(stage: Stage, ring: RingPlan) -> None:
    """Put new samples until the scene is over."""
    with sb.Producer(ring.url, ring=ring.name, wait_s=PATIENCE_S, **ring.options) as out:
        stage.begin()
        while not stage.over:
            out.put(volume())


def train(stage: Stage, ring: RingPlan, transform: str, num_workers: int, batches: int) -> Figures:
    """Time batches out of a ring."""
    from synthbroker.bench.endless import TRANSFORMS as FUNCTIONS

    dataset = sb.RingDataset(
        ring.url,
        ring=ring.name,
        group="bench",
        batch_size=BATCH_SIZE,
        transform=FUNCTIONS[transform],
        wait_s=PATIENCE_S,
    )
    return _timed(stage, lambda: dataset.loader(num_workers=num_workers), batches)


def train_inside(stage: Stage, transform: str, num_workers: int, batches: int) -> Figures:
    """Time batches that the DataLoader's own workers generate."""
    from synthbroker.bench import endless

    dataset = endless.Endless(volume, anew=True, transform=endless.TRANSFORMS[transform])
    loader = partial(endless.loader, dataset, batch_size=BATCH_SIZE, num_workers=num_workers)
    return _timed(stage, loader, batches, drain=False)


def _timed(stage: Stage, loader: Callable[[], Iterable[Any]], batches: int, *, drain: bool = True) -> Figures:
    """Time so many batches, after some that are not counted: workers start, and what was made ahead is used up."""
    first = max(int(_WARM_UP * batches), 1)
    begun = ended = 0.0
    warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)  # more than there are cores
    stage.begin()
    for number, _ in enumerate(loader(), 1):
        if number == first:
            begun = time.perf_counter()
        if number == first + batches:
            ended = time.perf_counter()
            stage.stop()
            if not drain:
                break
    return {"seconds": ended - begun, "batches": batches}


def _out_of_ring(transform: str, num_workers: int, place: Place) -> Figures:
    # Little room: what is made ahead while workers start must not be what is timed. But room for what all workers hold,
    # the training loop's batch, and one in the making: a ring that is full of these has to break batches up.
    batches = _HELD * max(num_workers, 1) + 2
    capacity = int(OVERHEAD * batches * BATCH_SIZE * SAMPLE_BYTES)
    options = {"producers": 1, "capacity": capacity, "in_flight": "16MB"}
    with place.ring() as name:
        ring = RingPlan(place.url, name, options)
        trainer = Part(train, (ring, transform, num_workers, place.scaled(BATCHES, QUICK_BATCHES)))
        figures: Figures = place.troupe.play(trainer, Part(produce, (ring,)), patience_s=place.patience_s)[0]
        return figures


def _inside(transform: str, num_workers: int, place: Place) -> Figures:
    part = Part(train_inside, (transform, num_workers, place.scaled(BATCHES, QUICK_BATCHES)))
    figures: Figures = place.troupe.play(part, patience_s=place.patience_s)[0]
    return figures


def block(*, quick: bool) -> Block:
    """Make the block: no lines, only figures for the picture."""
    runs = dict(zip(SOURCES, (_out_of_ring, _inside), strict=True))
    return Block(
        {
            name_of(source, transform, workers): partial(function, transform, workers)
            for transform in TRANSFORMS
            for workers in (QUICK_WORKERS if quick else WORKERS)
            for source, function in runs.items()
        },
        (),
    )


def name_of(source: str, transform: str, workers: int) -> str:
    """Name a contender."""
    return f"{source}, {transform} transform, {workers} workers"
