"""Run a generator in worker processes and put what it yields into a ring.

The workers are fresh interpreters ("spawn"): a fork of a process with threads or a GPU breaks, and a fresh one holds
nothing but what the generator itself imports.
"""

import hashlib
import logging
import math
import re
import secrets
import signal
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from synthbroker import admin, monitor, settings
from synthbroker.crew import Crew
from synthbroker.limits import DEFAULT_MARGIN_S, Limits
from synthbroker.options import check_choice, check_seconds
from synthbroker.producer import Producer
from synthbroker.settings import Job
from synthbroker.units import format_duration
from synthbroker.worker import SIGNALS, Order, Target, WorkerInfo, name_of

log = logging.getLogger("synthbroker")

DEFAULT_GRACE_S = 20.0
STOP_SIGNALS = ("USR1", "USR2", "HUP", "XCPU")
_TARGET = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


@dataclass(frozen=True)
class Outcome:
    """What all workers of one `generate` did.

    Attributes:
        samples: Committed samples.
        lost: Those of them that were lost with what the server held, or with a ring that was dropped.
        raw_bytes, payload_bytes: Their size as tensors and on the wire.
        quarantined: Samples that failed the checks of the ring, or their cast.
        unsent: Samples that were made, or half made, when the workers were stopped.
        blocked_s: Seconds that they waited for room in the ring, all together.
        signal: The signal that stopped them; None where none did.
        ended: Whether the ring was ended, because the generator had no more samples.
        stopped: Why they stopped: "signal", "time" (their job ends), "idle" (no room in the ring), "ended" (somebody
            else has ended the ring); None where the generator had no more samples.
        idle_for_s: How long the ring had had no room for any of them, where they stopped for that.
    """

    samples: int
    lost: int
    raw_bytes: int
    payload_bytes: int
    quarantined: int
    unsent: int
    blocked_s: float
    signal: int | None
    ended: bool
    stopped: str | None
    idle_for_s: float | None


def generate(
    target: Target,
    *,
    ring: str,
    url: str | None = None,
    workers: int = 1,
    seed: int | None = None,
    device: str | None = None,
    keep_open: bool = False,
    grace_s: float = DEFAULT_GRACE_S,
    stop_signal: str = "USR1",
    ends_in_s: float | None = None,
    margin_s: float = DEFAULT_MARGIN_S,
    idle_s: float | None = None,
    name: str | None = None,
    **options: Any,
) -> Outcome:
    """Run a generator in worker processes until it has no more samples, a signal, a limit, or the end of the ring.

    SIGINT, SIGTERM and `stop_signal` let every worker finish its sample, send what is on its way and leave; a second
    one ends all at once. The handlers are put back before this returns; outside of the main thread there are none.
    Where the job's end is known, no sample is begun that would probably not be done by then (`limits`). Whoever stops
    for one of these reasons has left, and is not done: the ring stays open, since the job may be started again.

    Args:
        target: `module:callable`, found with the current directory on `sys.path`, or an importable callable. It is
            called with a `WorkerInfo` and yields samples: dicts, tuples where `fields` are named, or `Sample`s.
        ring: Name of the ring.
        url: The server, None for what the environment says.
        workers: How many processes.
        seed: Seed that all workers' seeds are derived from; None draws one.
        device: For `WorkerInfo.device`; "cuda" deals out the GPUs in CUDA_VISIBLE_DEVICES.
        keep_open: Leave the ring open when all workers are done, because others will put more.
        grace_s: How long workers may take to finish, in seconds.
        stop_signal: A signal that stops them beside SIGINT and SIGTERM, as batch systems send one before the end: USR1,
            USR2, HUP or XCPU.
        ends_in_s: Seconds until this job ends, math.inf: it does not; None: SLURM_JOB_END_TIME says so, if it is set.
        margin_s: How long before that everything shall be over, in seconds.
        idle_s: Stop when none of the workers has had room in the ring for so many seconds; less than `wait_s`.
        name: Worker i is the producer `{name}-w{i}`, counted on over the processes of a SLURM step; None makes names
            of job, restart, host and process.
        options: As for `Producer`.

    Raises:
        GeneratorError: The generator raised, or a worker died; its traceback is logged at once, and a note of this.
        TypeError, ValueError: An argument that cannot be, or a target that is not there.
        SynthbrokerError: What a worker's producer met.
    """
    check_target(target)
    _check(workers, stop_signal)
    limits = _limits(ends_in_s, grace_s=grace_s, margin_s=margin_s, idle_s=idle_s, wait_s=options.get("wait_s", 600.0))
    options |= {"ring": ring, "url": url}
    Producer(name=None if name is None else f"{name}-w{workers - 1}", **options)  # opens nothing: checks all arguments
    job = settings.job()
    infos = worker_infos(workers, job, seed=seed, device=device)
    level, signals = log.getEffectiveLevel(), (*SIGNALS, signal.Signals[f"SIG{stop_signal}"])
    names = [None if name is None else f"{name}-w{job.process * workers + info.index}" for info in infos]
    orders = [
        Order(target, info, options | {"name": one}, grace_s, level, limits, signals)
        for info, one in zip(infos, names, strict=True)
    ]
    crew = Crew(orders, grace_s=grace_s)
    crew.run()
    return _outcome(crew, ended=crew.stopped is None and not keep_open and _end(ring, url))


def _outcome(crew: Crew, *, ended: bool) -> Outcome:
    stats = [result.stats for result in crew.results if result.stats is not None]
    return Outcome(
        samples=sum(one.samples for one in stats),
        lost=sum(one.lost_by_server for one in stats),
        raw_bytes=sum(one.raw_bytes for one in stats),
        payload_bytes=sum(one.payload_bytes for one in stats),
        quarantined=sum(one.quarantined for one in stats),
        unsent=sum(result.unsent for result in crew.results),
        blocked_s=sum(one.blocked_s for one in stats),
        signal=crew.signal,
        ended=ended,
        stopped=crew.stopped,
        idle_for_s=crew.idle_for_s,
    )


def check_target(target: Target) -> None:
    """See that a target may name a generator; whether there is one is known when it is loaded.

    Raises:
        ValueError: It cannot.
    """
    if not _TARGET.fullmatch(name_of(target)):
        if isinstance(target, str):
            raise ValueError(f"{target!r} names no generator: write module:function, for example my.module:brains")
        raise ValueError(f"{target!r} cannot be sent to a worker: give a function of a module")


def _check(workers: int, stop_signal: str) -> None:
    if workers < 1:
        raise ValueError(f"at least one worker is needed, got {workers}")
    check_choice("stop_signal", stop_signal, STOP_SIGNALS)


def _limits(ends_in_s: float | None, *, grace_s: float, margin_s: float, idle_s: float | None, wait_s: float) -> Limits:
    """Check all limits, and find out when the job ends."""
    given = {"ends_in_s": ends_in_s, "grace_s": grace_s, "margin_s": margin_s, "idle_s": idle_s}
    for what, value in given.items():
        if value is not None:
            check_seconds(what, value)
    if idle_s is not None and idle_s >= wait_s:
        raise ValueError(
            f"idle_s={idle_s:g} must be less than wait_s={wait_s:g}: after that a full ring is an error; raise wait_s"
        )
    end_s = settings.job_end() if ends_in_s is None else time.time() + ends_in_s
    if end_s is None or math.isinf(end_s):
        return Limits(None, margin_s, idle_s)
    said = "" if ends_in_s is not None else " (SLURM_JOB_END_TIME)"
    log.info("this job ends in %s%s: no sample is begun that would probably not be done %s before",
             format_duration(end_s - time.time()), said, format_duration(margin_s))  # fmt: skip
    return Limits(end_s, margin_s, idle_s)


def worker_infos(count: int, job: Job, *, seed: int | None, device: str | None) -> list[WorkerInfo]:
    """Describe all workers; their seeds differ over workers, jobs, array tasks and restarts.

    Raises:
        ValueError: The seed is negative.
    """
    if seed is not None and seed < 0:
        raise ValueError(f"a seed must be a whole number from 0, got {seed}")
    base = secrets.randbits(63) if seed is None else seed
    task = 0 if job.array_task_id is None else job.array_task_id + 1
    words = [base, _as_number(job.job_id or ""), task, job.restart_count, job.process]
    return [
        WorkerInfo(
            index=index,
            count=count,
            seed=int(np.random.SeedSequence([*words, index]).generate_state(1, np.uint64)[0] >> np.uint64(1)),
            array_task_id=job.array_task_id,
            device=_device(device, index),
        )
        for index in range(count)
    ]


def _as_number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _device(device: str | None, index: int) -> str | None:
    """Deal out the GPUs that the environment lists; asking torch would cost the parent 1.4 s and 220 MB."""
    gpus = settings.visible_gpus() or 0
    return f"cuda:{index % gpus}" if device == "cuda" and gpus > 1 else device


def _end(ring: str, url: str | None) -> bool:
    """End the ring; one that counts its closed producers ends by itself."""
    if monitor.status(ring, url=url).expected_producers:
        return False
    admin.end(ring, url=url)
    return True
