"""A training run that is killed anywhere, again and again: at its end every sample was trained on exactly once."""

import itertools
import os
import random
import signal
import threading
from pathlib import Path

import psutil
import pytest

from servers import RealServer, eventually
from tools import background, check_ledger, counters, fill, pending
from trainings import DEADLINE_S, KINDS, Run, check_all_once

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
        run.die_at(*point)
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
    first_batches_s = []
    for _ in range(kills):
        delay_s, while_it_starts = draw.uniform(0, 0.3), draw.random() < 0.2
        with run.start() as life:
            if not while_it_starts:
                first_batches_s.append(life.first_batch_s())
            assert life.kill(delay_s) == -signal.SIGKILL
    before = run.marks()
    stop.set()
    marks = run.empty()
    assert marks[: len(before)] == before
    check_all_once(server, ring_name, marks, made.result(DEADLINE_S).samples)
    assert max(first_batches_s[1:]) < 2, "a restarted run has its first batch soon"


def test_a_run_without_a_name_is_known_by_its_state(server: RealServer, ring_name: str, tmp_path: Path) -> None:
    fill(server, ring_name, range(60), groups=("train",))
    run = Run(server, ring_name, tmp_path, kind="consumer", name=None)
    for point in ("written", 1), ("trained", 6), ("trained", 3):
        run.die_at(*point)
    check_all_once(server, ring_name, run.finish(), 60)


@pytest.mark.parametrize(("before", "after"), [(0, 3), (3, 0), (1, 4)])
def test_a_run_goes_on_with_another_number_of_workers(
    server: RealServer, ring_name: str, tmp_path: Path, before: int, after: int
) -> None:
    fill(server, ring_name, range(150), groups=("train",))
    run = Run(server, ring_name, tmp_path, kind="dataset")
    run.die_at("written", 2, num_workers=before)
    run.options["num_workers"] = after
    check_all_once(server, ring_name, run.finish(), 150)


def test_a_run_that_was_stopped_for_long_is_doubled_and_counted(
    server: RealServer, ring_name: str, tmp_path: Path
) -> None:
    fill(server, ring_name, range(40), groups=("train",))
    run = Run(server, ring_name, tmp_path, kind="consumer", name="slow", every=1000, batch_size=4)
    with run.start() as life:
        life.first_batch_s()
        os.kill(life.pid, signal.SIGSTOP)
        try:
            stopped = psutil.Process(life.pid)
            eventually(lambda: stopped.status() == psutil.STATUS_STOPPED, "it stands still")
            server.client().ping()  # behind what it may have asked for just before
            held = set(pending(server, ring_name, "train"))
            silent = server.client().zrange(f"sb:{{{ring_name}}}:consumers", 0, 0)[0]
            server.client().zadd(f"sb:{{{ring_name}}}:consumers", {silent: 5})  # for longer than claim_after_s
            other = Run(server, ring_name, tmp_path / "other", kind="consumer", name="other")
            other.folder.mkdir()
            theirs = other.finish()
        finally:
            os.kill(life.pid, signal.SIGCONT)
        assert life.wait() == 0
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
    with run.start() as life:
        life.first_batch_s()
        life.kill()
    check_all_once(server, ring_name, run.finish(), 90)
    eventually(lambda: server.client().zcard(f"sb:{{{ring_name}}}:consumers") == 0, "all have left")
