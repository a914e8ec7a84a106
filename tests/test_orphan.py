"""Workers of a training process that was killed go, whatever they are at; those of one that lives stay."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

import synthbroker as sb
from servers import RealServer, eventually
from tools import SOON_S, background, number

TRAINER = """
import multiprocessing, os, signal, sys, threading, time
import synthbroker as sb

url, ring, kind = sys.argv[1:]
trainer = os.getpid()  # in workers that are forked, too


def outlive_parent(*_):
    print("started", flush=True)
    while os.getppid() == trainer:
        time.sleep(0.001)


def hang(*_):
    print("started", flush=True)
    threading.Event().wait()


def hang_if_second(worker):
    hang() if worker else outlive_parent()


def read_deaf():
    signal.signal(signal.SIGTERM, lambda *_: None)
    for _ in sb.Consumer(url, ring=ring, group="train"):
        print("started", flush=True)


def read_unasked():
    outlive_parent()
    iter(sb.RingDataset(url, ring=ring, group="train"))
    threading.Event().wait()


def train(transform=None, **how):
    for _ in sb.RingDataset(url, ring=ring, group="train", transform=transform).loader(num_workers=2, **how):
        print("started", flush=True)


def start(target):
    multiprocessing.get_context("fork").Process(target=target, daemon=True).start()
    threading.Event().wait()


if __name__ == "__main__":
    {
        "was slow to start": lambda: train(worker_init_fn=outlive_parent),
        "hangs": lambda: train(hang),
        "has another one that hangs": lambda: train(worker_init_fn=hang_if_second),
        "is not a DataLoader's and ends on no signal": lambda: start(read_deaf),
        "is never asked for a batch": lambda: start(read_unasked),
    }.get(kind, lambda: train(multiprocessing_context=kind))()
"""


@contextmanager
def training(server: RealServer, ring: str, folder: Path, kind: str, lines: int = 1) -> Iterator[tuple[Any, list[Any]]]:
    """Start a trainer; gives it, and its workers, when they have said so many lines. No process is left behind."""
    with sb.Producer(server.url, ring=ring) as out:
        out.put({"x": 1.0})
    script = folder / "trainer.py"  # which processes that are not forked import
    script.write_text(TRAINER)
    command = [sys.executable, script, server.url, ring, kind]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        assert [trainer.stdout.readline() for _ in range(lines)] == ["started\n"] * lines
        workers = psutil.Process(trainer.pid).children(recursive=True)
        assert workers
        try:
            yield trainer, workers
        finally:
            trainer.kill()
            for worker in filter(runs, workers):
                worker.kill()


def runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    "kind",
    [
        "fork",
        "spawn",
        "forkserver",
        "was slow to start",
        "hangs",
        "is not a DataLoader's and ends on no signal",
        "is never asked for a batch",
    ],
)
def test_a_worker_goes_with_a_trainer_that_was_killed(
    server: RealServer, ring_name: str, tmp_path: Path, kind: str
) -> None:
    with training(server, ring_name, tmp_path, kind) as (trainer, workers):
        trainer.kill()  # and is a zombie meanwhile, as where nobody waits for it
        eventually(lambda: not any(map(runs, workers)), "the workers are gone")


def test_a_worker_goes_though_another_one_holds_its_pipe_to_the_trainer(
    server: RealServer, ring_name: str, tmp_path: Path
) -> None:
    with training(server, ring_name, tmp_path, "has another one that hangs", lines=2) as (trainer, workers):
        first, second = sorted(workers, key=lambda worker: worker.pid)
        trainer.kill()
        trainer.wait()
        eventually(lambda: not runs(first), "the first worker is gone")
        assert runs(second), "it never came to where we could look for it"


def test_a_worker_stays_when_the_thread_that_started_it_ends(
    server: RealServer, ring_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("synthbroker.orphan._GLANCE_S", 0.001)
    with sb.Producer(server.url, ring=ring_name, producers=1) as out:
        out.put(number(0))
        batches = iter(sb.RingDataset(server.url, ring=ring_name, group="train").loader(num_workers=1))
        background(lambda: next(batches)).result(SOON_S)
        for i in range(1, 20):
            out.put(number(i))
            next(batches)
    assert list(batches) == []
