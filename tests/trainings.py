"""A training run whose processes follow each other, each from the last checkpoint on, and the account of it."""

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from servers import RunningServer
from tools import check_ledger, counters, pending, processes
from trainer import train

DEADLINE_S = 60.0
KINDS = {
    "consumer": {"kind": "consumer"},
    "dataset": {"kind": "dataset"},
    "workers": {"kind": "dataset", "num_workers": 2},
}


class Life:
    """One of the processes."""

    def __init__(self, process: Any, told: Any) -> None:
        self.pid: int = process.pid
        self._process, self._told = process, told

    def first_batch_s(self) -> float:
        """Block until it trains; gives how long that took."""
        seconds: float = self._told.get(timeout=DEADLINE_S)
        return seconds

    def kill(self, after_s: float = 0.0) -> int | None:
        """Let it go on for so long, then kill it; gives its exit code."""
        self._process.join(after_s)
        self._process.kill()
        return self.wait()

    def wait(self) -> int | None:
        """Block until it ends; gives its exit code, None where it goes on."""
        self._process.join(DEADLINE_S)
        code: int | None = self._process.exitcode
        return code


class Run:
    """All of them."""

    def __init__(self, server: RunningServer, ring: str, folder: Path, **options: Any) -> None:
        self.folder = folder
        fixed = {"url": server.url, "ring": ring, "group": "train", "wait_s": DEADLINE_S, "ack": "checkpoint"}
        self.options = fixed | {"every": 4, "batch_size": 3, "name": "trainer", "die_at": None} | options

    @contextmanager
    def start(self, **options: Any) -> Iterator[Life]:
        with processes(train, (self.folder,), **self.options | options) as ((process,), told):
            yield Life(process, told)

    def die_at(self, *point: Any, **options: Any) -> None:
        """Let it die by its own hand at a point of its work."""
        with self.start(die_at=point, **options) as life:
            assert life.wait() == -signal.SIGKILL, f"it dies at {point}"

    def finish(self, **options: Any) -> list[int]:
        """Let it come to its end; gives what is in the last checkpoint."""
        with self.start(**options) as life:
            assert life.wait() == 0
        return self.marks()

    def empty(self) -> list[int]:
        """As `finish`, of a ring that has been full: with a checkpoint after each batch.

        A worker that is late with an old sample, by as much as the ring holds, has it full until the next checkpoint.
        That must not take more samples, for none comes before it.
        """
        return self.finish(every=1)

    def marks(self) -> list[int]:
        path = self.folder / "checkpoint.json"
        found: list[int] = json.loads(path.read_text())["marks"] if path.exists() else []
        return found


def check_all_once(server: RunningServer, ring: str, marks: list[int], count: int) -> None:
    assert sorted(marks) == list(range(count)), "each sample was trained on once"
    assert pending(server, ring, "train") == []
    assert counters(server, ring, "train")["acknowledged"] == count
    check_ledger(server, ring, "train")
