"""The processes of a fault test: generators and trainers that do what users' do, and write down what they saw."""

import ctypes
import dataclasses
import json
import logging
import os
import signal
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np

import synthbroker as sb
from faults import marks
from faults.marks import Diary
from synthbroker import connection, line, ring

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def _begin(folder: str, who: str, patience: Mapping[str, float]) -> Diary:
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    ring.BEAT_S = patience.get("beat_s", 0.5)  # readers are taken for dead after two of them
    line.SOCKET_TIMEOUT_S = connection.SOCKET_TIMEOUT_S = patience.get("socket_s", line.SOCKET_TIMEOUT_S)
    log = os.open(Path(folder, f"{who}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 2)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO, force=True)
    return Diary(Path(folder, f"{who}.diary"))


def _stop_on(number: int) -> Event:
    stop = Event()
    # In a thread: the handler runs in the middle of `stop.wait`, which may hold the lock that `set` takes.
    signal.signal(number, lambda *_: Thread(target=stop.set, daemon=True).start())
    return stop


def generate(
    url: str,
    ring_name: str,
    folder: str,
    *,
    number: int,
    life: int,
    seed: int,
    sizes: str = "mixed",
    flush_every: int = 8,
    pause_s: float = 0.0,
    count: int | None = None,
    patience: Mapping[str, float] = {},
    **options: Any,
) -> None:
    """Put samples until told to stop by SIGTERM, or until so many are put; flush now and then, and write that down."""
    diary = _begin(folder, f"g{number}-{life}", patience)
    stop = _stop_on(signal.SIGTERM)
    try:
        with sb.Producer(url, ring=ring_name, name=f"g{number}", schema=marks.SCHEMA, **options) as out:
            for seq, size in enumerate(marks.sizes(sizes, (seed, number, life))):
                if stop.is_set() or seq == count:
                    break
                diary.write("made", number, life, seq)
                out.put(marks.make((number, life, seq), size), recipe={"seq": seq})
                if (seq + 1) % flush_every == 0 and out.flush():
                    diary.write("committed", number, life, seq + 1)
                stop.wait(pause_s)
            out.flush()
            diary.write("committed", number, life, seq)
        diary.write("stats", json.dumps(dataclasses.asdict(out.stats)))
    except sb.SynthbrokerError as error:
        diary.write("error", f"{type(error).__name__}: {error}")
        raise


def train(
    url: str,
    ring_name: str,
    folder: str,
    *,
    name: str,
    life: int = 0,
    workers: int = 0,
    torch: bool = False,
    step_s: float = 0.0,
    persist: bool = False,
    patience: Mapping[str, float] = {},
    **options: Any,
) -> None:
    """Train until the ring has ended; write down each sample before the next batch is asked for.

    Where it is to `persist`, it goes on with new workers when one of them died.
    """
    diary = _begin(folder, f"{name}-{life}", patience)
    stop = _stop_on(signal.SIGTERM)
    try:
        while True:
            try:
                for batch in _batches(url, ring_name, workers=workers, torch=torch, **options):
                    _note(diary, batch)
                    if stop.wait(step_s) if step_s else stop.is_set():
                        return
            except (RuntimeError, OSError, EOFError) as error:  # a worker died; OSError: what it shared went with it
                if not persist:
                    raise
                diary.write("survived", f"{error}".replace("\n", " "))
            else:
                diary.write("ended", "")
                return
    except Exception as error:
        diary.write("error", f"{type(error).__name__}: {error}".replace("\n", " "))
        raise


def _batches(
    url: str, ring_name: str, *, workers: int, torch: bool, context: str = "fork", **options: Any
) -> Iterable[Any]:
    if not (workers or torch):
        return sb.Consumer(url, ring=ring_name, **options)
    return sb.RingDataset(url, ring=ring_name, **options).loader(
        num_workers=workers, multiprocessing_context=context if workers else None
    )


def _note(diary: Diary, batch: Any) -> None:
    info = batch.info
    for mark, x, uses, number in zip(batch["mark"], batch["x"], info.uses, info.ids, strict=True):
        found = marks.verdict(np.asarray(mark), np.asarray(x))
        diary.write("trained", *mark[:3].tolist(), found, uses, number, info.epoch, int(mark[3]), time.time_ns())
