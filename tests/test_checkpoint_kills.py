"""A training run that is killed anywhere, again and again: at its end every sample was trained on exactly once."""

import contextlib
import itertools
import json
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from servers import RealServer, RunningServer, eventually
from tools import background, check_ledger, counters, fill, pending

TRAINER = Path(__file__).with_name("trainer.py")
DEADLINE_S = 60.0
KINDS = {
    "consumer": {"kind": "consumer"},
    "dataset": {"kind": "dataset"},
    "workers": {"kind": "dataset", "num_workers": 2},
}


class Run:
    """A run whose processes follow each other; each is started anew from the last checkpoint."""

    def __init__(self, server: RunningServer, ring: str, folder: Path, **options: Any) -> None:
        self.folder = folder
        fixed = {"url": server.url, "ring": ring, "group": "train", "wait_s": DEADLINE_S, "ack": "checkpoint"}
        self.options = fixed | {"every": 4, "batch_size": 3, "name": "trainer", "die_at": None} | options
        self.first_batch_s: list[float] = []

    def start(self, **options: Any) -> "subprocess.Popen[str]":
        command = [sys.executable, str(TRAINER), str(self.folder), json.dumps(self.options | options)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)

    def await_first_batch(self, process: "subprocess.Popen[str]") -> bool:
        """Block until it trains; False where it was killed or came to its end before."""
        assert process.stdout is not None
        line = background(process.stdout.readline).result(DEADLINE_S)
        if line.startswith("began"):
            self.first_batch_s.append(float(line.split()[1]))
        return line.startswith("began")

    def finish(self) -> list[int]:
        """Let it come to its end; gives what is in the last checkpoint."""
        with self.start() as process:
            assert process.stdout is not None
            said = background(process.stdout.read).result(DEADLINE_S)
            assert process.wait(DEADLINE_S) == 0
            assert said.endswith("done\n")
        return self.marks()

    def marks(self) -> list[int]:
        path = self.folder / "checkpoint.json"
        found: list[int] = json.loads(path.read_text())["marks"] if path.exists() else []
        return found


def check_all_once(server: RunningServer, ring: str, marks: list[int], count: int) -> None:
    assert sorted(marks) == list(range(count)), "each sample was trained on once"
    assert pending(server, ring, "train") == []
    assert counters(server, ring, "train")["acknowledged"] == count
    check_ledger(server, ring, "train")


# Where, and how often it gets there before.
POINTS = [
    ("trained", 1),
    ("trained", 7),
    ("staged", 1),
    ("staged", 2),
    ("written", 1),
    ("written", 3),
    ("acknowledged", 2),
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_dies_at_each_point_of_a_checkpoint_trains_on_every_sample_once(
    server: RealServer, ring_name: str, tmp_path: Path, kind: str
) -> None:
    count = 200
    fill(server, ring_name, range(count), groups=("train",))
    run = Run(server, ring_name, tmp_path, **KINDS[kind])
    for point in POINTS if kind == "consumer" else POINTS[1::2]:
        with run.start(die_at=point) as process:
            assert process.wait(DEADLINE_S) == -signal.SIGKILL, f"it dies at {point}"
    check_all_once(server, ring_name, run.finish(), count)
    assert counters(server, ring_name, "train")["doubled"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("kind", "kills"), [("consumer", 25), ("dataset", 8), ("workers", 8)])
def test_a_run_that_is_killed_at_any_instant_trains_on_every_sample_once(
    server: RealServer, ring_name: str, tmp_path: Path, kind: str, kills: int, seed: int
) -> None:
    draw = random.Random(f"{kind} {seed}")
    stop = threading.Event()
    endless = itertools.takewhile(lambda _: not stop.is_set(), itertools.count())
    made = background(lambda: fill(server, ring_name, endless, capacity="150kB", groups=("train",)))
    run = Run(server, ring_name, tmp_path, every=draw.choice([1, 3, 8]), **KINDS[kind])
    for _ in range(kills):
        delay_s, while_it_starts = draw.uniform(0, 0.3), draw.random() < 0.2
        with run.start() as process:
            assert while_it_starts or run.await_first_batch(process)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(delay_s)
            process.kill()
        assert process.returncode == -signal.SIGKILL
    before = run.marks()
    stop.set()
    marks = run.finish()
    assert marks[: len(before)] == before
    check_all_once(server, ring_name, marks, made.result(DEADLINE_S).samples)
    assert max(run.first_batch_s[1:]) < 2, "a restarted run has its first batch soon"


def test_a_run_without_a_name_is_known_by_its_state(server: RealServer, ring_name: str, tmp_path: Path) -> None:
    fill(server, ring_name, range(60), groups=("train",))
    run = Run(server, ring_name, tmp_path, kind="consumer", name=None)
    for point in ("written", 1), ("trained", 6), ("trained", 3):
        with run.start(die_at=point) as process:
            assert process.wait(DEADLINE_S) == -signal.SIGKILL
    check_all_once(server, ring_name, run.finish(), 60)


@pytest.mark.parametrize(("before", "after"), [(0, 3), (3, 0), (1, 4)])
def test_a_run_goes_on_with_another_number_of_workers(
    server: RealServer, ring_name: str, tmp_path: Path, before: int, after: int
) -> None:
    fill(server, ring_name, range(150), groups=("train",))
    run = Run(server, ring_name, tmp_path, kind="dataset")
    with run.start(die_at=("written", 2), num_workers=before) as process:
        assert process.wait(DEADLINE_S) == -signal.SIGKILL
    run.options["num_workers"] = after
    check_all_once(server, ring_name, run.finish(), 150)


def test_a_run_that_was_stopped_for_long_is_doubled_and_counted(
    server: RealServer, ring_name: str, tmp_path: Path
) -> None:
    fill(server, ring_name, range(40), groups=("train",))
    run = Run(server, ring_name, tmp_path, kind="consumer", name="slow", every=1000, batch_size=4)
    with run.start() as process:
        assert run.await_first_batch(process)
        process.send_signal(signal.SIGSTOP)
        try:
            stopped = psutil.Process(process.pid)
            eventually(lambda: stopped.status() == psutil.STATUS_STOPPED, "it stands still")
            server.client().ping()  # behind what it may have asked for just before
            held = set(pending(server, ring_name, "train"))
            silent = server.client().zrange(f"sb:{{{ring_name}}}:consumers", 0, 0)[0]
            server.client().zadd(f"sb:{{{ring_name}}}:consumers", {silent: 5})  # for longer than claim_after_s
            other = Run(server, ring_name, tmp_path / "other", kind="consumer", name="other")
            other.folder.mkdir()
            theirs = other.finish()
        finally:
            process.send_signal(signal.SIGCONT)
        assert process.wait(DEADLINE_S) == 0
    doubled = set(theirs) & set(run.marks())
    assert doubled
    assert {n + 1 for n in doubled} <= held
    assert set(theirs) | set(run.marks()) == set(range(40))
    assert counters(server, ring_name, "train")["doubled"] == len(doubled)
    check_ledger(server, ring_name, "train")


def test_killed_workers_do_not_outlive_their_trainer_in_the_group(
    server: RealServer, ring_name: str, tmp_path: Path
) -> None:
    fill(server, ring_name, range(90), groups=("train",))
    run = Run(server, ring_name, tmp_path, **KINDS["workers"])
    with run.start() as process:
        assert run.await_first_batch(process)
        process.kill()
    check_all_once(server, ring_name, run.finish(), 90)
    eventually(lambda: server.client().zcard(f"sb:{{{ring_name}}}:consumers") == 0, "all have left")
