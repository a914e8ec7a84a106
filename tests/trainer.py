"""A training program that makes checkpoints and can be killed anywhere; what it has "learnt" is which samples it had.

A checkpoint is one file with marks and state. It tells the seconds until its first batch. At SIGUSR2 it makes a
checkpoint after the batch in hand, as README.md tells, and exits with 75.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import synthbroker as sb


class Trainer:
    """Trains, and dies by its own hand where `die_at` says so: a point in its work and how often it is passed."""

    def __init__(
        self,
        folder: Path,
        told: Any,
        *,
        url: str,
        kind: str,
        every: int,
        die_at: tuple[str, int] | None,
        **options: Any,
    ):
        self.path, self.told, self.every, self.die_at = folder / "checkpoint.json", told, every, die_at
        self.num_workers = options.pop("num_workers", 0)
        self.marks: list[int] = []
        self.passed: dict[str, int] = {}
        if kind == "consumer":
            self.reader = self.batches = sb.Consumer(url, **options)
        else:
            self.reader = sb.RingDataset(url, **options).loader(num_workers=self.num_workers)
            self.batches = self.reader

    def resume(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            saved = json.loads(self.path.read_text())
            self.marks = saved["marks"]
            self.reader.load_state_dict(saved["state"])

    def train(self) -> None:
        began, stop = time.monotonic(), list[int]()
        signal.signal(signal.SIGUSR2, lambda number, _: stop.append(number))
        for step, batch in enumerate(self.batches, 1):
            if step == 1:
                self.told.put(time.monotonic() - began)
            self.marks += [int(n) for n in batch["n"]]
            self.here("trained")
            threading.Event().wait(0.001)
            if stop or step % self.every == 0:
                self.save()
            if stop:
                sys.exit(75)
        self.save()

    def save(self) -> None:
        state = self.reader.state_dict()
        self.here("staged")
        written = self.path.with_suffix(".new")
        written.write_text(json.dumps({"marks": self.marks, "state": state}))
        os.replace(written, self.path)  # noqa: PTH105 - the atomic one
        self.here("written")
        self.reader.acknowledge()
        self.here("acknowledged")

    def here(self, point: str) -> None:
        self.passed[point] = self.passed.get(point, 0) + 1
        if self.die_at is not None and (point, self.passed[point]) == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Path, told: Any, **options: Any) -> None:
    """Train from the last checkpoint on, in a session of its own; for a process of its own."""
    os.setsid()
    trainer = Trainer(folder, told, **options)
    trainer.resume()
    trainer.train()
