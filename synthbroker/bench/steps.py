"""A training loop that sleeps instead of training: how long does each of its steps wait for data?"""

import logging
import os
import signal
import threading
import time
from array import array
from collections.abc import Callable
from functools import partial

import synthbroker as sb
from synthbroker.bench import loads
from synthbroker.bench.loads import Figures, Reading, RingPlan
from synthbroker.bench.meter import Meter
from synthbroker.bench.place import Place
from synthbroker.bench.processes import Part, Stage
from synthbroker.bench.table import Block, Line
from synthbroker.errors import GeneratorError, SynthbrokerError
from synthbroker.generate import check_target, generate
from synthbroker.sample import Sample
from synthbroker.worker import WorkerInfo, load

OWN = "synthbroker.bench.samples:brains"
_CAPACITY = "256MB"
_ALONE = WorkerInfo(index=0, count=1, seed=0, array_task_id=None, device=None)
_GRACE_S = 1.0
_LOOK_EVERY_S = 0.05
_WARMEST_S = 5.0  # at least: a generator that takes seconds for a sample has its time too


def generate_until_over(stage: Stage, target: str, ring: RingPlan) -> None:
    """Run a generator as `synthbroker generate` does, and stop it as Ctrl-C would."""
    logging.getLogger("synthbroker").setLevel(logging.ERROR)  # that it was stopped is no news
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # but for the time in which `generate` takes it
    stage.begin()
    threading.Thread(target=_stop_when_over, args=(stage,), daemon=True).start()
    generate(target, ring=ring.name, url=ring.url, grace_s=_GRACE_S, **ring.options)


def _stop_when_over(stage: Stage) -> None:
    while not stage.over:
        time.sleep(_LOOK_EVERY_S)
    os.kill(os.getpid(), signal.SIGTERM)


def put_first(stage: Stage, target: str, ring: RingPlan) -> None:
    """Put the first sample of a generator.

    Raises:
        SynthbrokerError: There is none.
        Exception: What is wrong with the target, what it raises, or what the ring does not take.
    """
    check_target(target)
    stage.begin()
    with sb.Producer(ring.url, ring=ring.name, wait_s=loads.PATIENCE_S, **ring.options) as out:
        for item in load(target)(_ALONE):
            out.put((item if isinstance(item, Sample) else Sample(item)).fields)
            return
    raise SynthbrokerError("it yields no sample")


def check_generator(target: str, place: Place) -> None:
    """Try a generator out, in a process of its own, before anything is measured.

    Raises:
        GeneratorError: Its first sample could not be had and put; says why.
    """
    with place.ring() as name:
        ring = RingPlan(place.url, name, {"capacity": _CAPACITY})
        try:
            place.troupe.play(Part(put_first, (target, ring)), patience_s=place.patience_s)
        except SynthbrokerError as error:
            raise GeneratorError(f"--generator {target} cannot be used: {error} (-v shows where)") from error


def inside(stage: Stage, target: str, step_s: float, seconds: float) -> Figures:
    """Generate in the training loop itself."""
    samples = load(target)(_ALONE)
    meter, waits_s = Meter(seconds), array("d")
    stage.begin()
    for _, waited_s in loads.timed(samples):
        if meter.counting:
            waits_s.append(waited_s)
        if not meter.count(1):
            break
        time.sleep(step_s)
    return {"samples_per_s": meter.per_s, **loads.of_waits(waits_s, meter)}


def _through_ring(target: str, step_s: float, place: Place) -> Figures:
    with place.ring() as name:
        ring = RingPlan(place.url, name, {"capacity": _CAPACITY})
        trainer = Part(loads.train, (ring, Reading(_length_s(place), step_s, drain=False)))
        generator = Part(generate_until_over, (target, ring))
        figures: Figures = place.troupe.play(trainer, generator, patience_s=place.patience_s)[0]
        return figures


def _inside(target: str, step_s: float, place: Place) -> Figures:
    part = Part(inside, (target, step_s, _length_s(place)))
    figures: Figures = place.troupe.play(part, patience_s=place.patience_s)[0]
    return figures


def _length_s(place: Place) -> float:
    return place.seconds if place.quick else max(place.seconds, _WARMEST_S)


_FIGURES = (
    ("steps through a ring ÷ generating in the training loop", "steps/s", "samples_per_s"),
    ("data loading per step, mean", "ms", "wait_mean_ms"),
    ("data loading per step, median", "ms", "wait_p50_ms"),
    ("data loading per step, p99", "ms", "wait_p99_ms"),
    ("data loading, share of the time", "of time", "waiting_share"),
)


def block(target: str, step_s: float) -> Block:
    """Make the block that compares a ring with generating in the training loop."""
    runs: dict[str, Callable[[Place], Figures]] = {
        "through a ring": partial(_through_ring, target, step_s),
        "in the training loop": partial(_inside, target, step_s),
    }
    ours, other = runs
    lines = (Line(0, what, unit, (ours, key), (other, key)) for what, unit, key in _FIGURES)
    return Block(runs, tuple(lines))
