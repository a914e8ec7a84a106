"""A training that is told that its job ends makes a checkpoint and exits; started again, it goes on where it was."""

import itertools
import os
import signal
import threading
from pathlib import Path

import pytest

from servers import RealServer
from tools import background, counters, fill
from trainings import DEADLINE_S, KINDS, Run, check_all_once


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_told_by_usr2_that_its_job_ends_goes_on_exactly_where_it_was(
    server: RealServer, ring_name: str, tmp_path: Path, kind: str
) -> None:
    stop = threading.Event()
    endless = itertools.takewhile(lambda _: not stop.is_set(), itertools.count())
    made = background(lambda: fill(server, ring_name, endless, capacity="150kB", groups=("train",)))
    run = Run(server, ring_name, tmp_path, every=30, **KINDS[kind])
    trained: list[int] = []
    for _ in range(2):
        with run.start() as life:
            life.first_batch_s()
            os.kill(life.pid, signal.SIGUSR2)
            assert life.wait() == 75
        marks = run.marks()
        assert marks[: len(trained)] == trained, "it goes on from its checkpoint"
        assert len(marks) > len(trained), "what it trained on before the signal is in the new one"
        trained = marks
    stop.set()
    marks = run.empty()
    assert marks[: len(trained)] == trained
    check_all_once(server, ring_name, marks, made.result(DEADLINE_S).samples)
    assert counters(server, ring_name, "train")["doubled"] == 0


def test_workers_that_are_told_too_do_no_harm(server: RealServer, ring_name: str, tmp_path: Path) -> None:
    fill(server, ring_name, range(300), groups=("train",))
    run = Run(server, ring_name, tmp_path, every=1000, **KINDS["workers"])
    with run.start() as life:
        life.first_batch_s()
        os.killpg(life.pid, signal.SIGUSR2)  # as srun does: to all processes of the step
        assert life.wait() == 75
    assert 0 < len(run.marks()) < 300
    check_all_once(server, ring_name, run.finish(), 300)
