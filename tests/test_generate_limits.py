"""`generate` stops by itself: before its job ends, by the signal that announces that, or when nobody needs more."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from generating import committed, finish, states, stderr, work_in
from servers import eventually
from synthbroker.errors import RingFullError

GENERATORS = '''
    """Generators that write down, in the current directory, what they begin."""

    import os
    import threading
    from pathlib import Path

    import numpy as np


    def begin(worker, n):
        Path(f"begun-{worker.index}-{n}").touch()
        return {"n": n, "x": np.zeros(20, np.float32)}


    def steady(worker):
        for n in range(1000):
            sample = begin(worker, n)
            threading.Event().wait(float(os.environ.get("TAKES_S", "0.5")))
            yield sample


    def stuck(worker):
        yield begin(worker, 0)
        begin(worker, 1)
        threading.Event().wait()


    def endless(worker):
        for n in range(10**9):
            yield begin(worker, n) if n < 50 else {"n": n, "x": np.zeros(20, np.float32)}


    def one_slow(worker):
        if worker.index == 0:
            while not Path("go").exists():
                threading.Event().wait(0.01)
        yield from endless(worker)
'''


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    work_in(tmp_path, monkeypatch, GENERATORS)


@pytest.fixture
def start_s():
    """Say how long a process takes to start, here and now: time limits of the tests follow it."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import synthbroker"], check=True, timeout=60)
    return time.monotonic() - began


def begun():
    return len(list(Path().glob("begun-*")))


# -- the job's end


def test_no_sample_is_begun_that_would_not_be_done_before_the_job_ends(run, status, start_s):
    ends_in_s = 3.0 + 2.0 + 8 * start_s
    end_s = time.time() + ends_in_s
    outcome = run("gen:steady", workers=2, ends_in_s=ends_in_s, margin_s=3.0)
    assert time.time() < end_s
    assert (outcome.stopped, outcome.unsent, outcome.ended, outcome.signal) == ("time", 0, False, None)
    assert outcome.samples == begun() == status().committed > 2, "what was begun was finished and sent"
    assert states(status()) == ["left", "left"]
    assert not status().ended, "the job may be started again and go on"


def test_a_sample_that_takes_longer_than_ever_is_given_up_before_the_job_ends(run, status, caplog, start_s):
    margin_s = 3.0 + 4 * start_s  # a third of it is for the goodbye
    ends_in_s = margin_s + 1.0 + 8 * start_s
    end_s = time.time() + ends_in_s
    outcome = run("gen:stuck", ends_in_s=ends_in_s, margin_s=margin_s)
    assert time.time() < end_s
    assert (outcome.stopped, outcome.samples, outcome.unsent) == ("time", 1, 1)
    assert "gave the sample in hand up" in caplog.text
    assert states(status()) == ["left"]


def test_what_a_full_ring_does_not_take_before_the_job_ends_is_counted(run, status, start_s):
    ends_in_s = 9.0 + 1.0 + 8 * start_s  # after 6 of the 9 s what waits for room sees that it need not
    end_s = time.time() + ends_in_s
    outcome = run("gen:endless", max_samples=5, in_flight="1kB", ends_in_s=ends_in_s, margin_s=9.0)
    assert time.time() < end_s
    assert (outcome.stopped, outcome.samples) == ("time", 5)
    assert outcome.unsent == begun() - 5 > 0
    assert states(status()) == ["left"]


def test_a_job_that_is_over_already_begins_nothing(run, status, caplog, capfd):
    outcome = run("gen:steady", workers=2, ends_in_s=1.0, margin_s=30.0)
    assert (outcome.stopped, outcome.samples, outcome.unsent, begun()) == ("time", 0, 0, 0)
    assert "gave the sample in hand up" not in caplog.text
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("ends_in_s", [None, float("inf")])
def test_where_no_end_is_known_or_asked_for_nothing_ends_early(run, monkeypatch, ends_in_s):
    if ends_in_s is not None:
        monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time())))
    monkeypatch.setenv("TAKES_S", "0")
    outcome = run("gen:steady", ends_in_s=ends_in_s)
    assert (outcome.stopped, outcome.samples, outcome.ended) == (None, 1000, True)


def test_slurm_says_when_the_job_ends_and_the_exit_code_says_that_it_was_not_done(command, start_s):
    end_s = int(time.time() + 4.0 + 2.0 + 8 * start_s)
    process = command("gen:steady", "--margin-s", "4", SLURM_JOB_END_TIME=str(end_s))
    code, said = finish(process)
    assert code == 75, stderr()
    assert said.endswith("; stopped because the job ends, start it again to go on (exit code 75)\n")
    assert "(SLURM_JOB_END_TIME): no sample is begun that would probably not be done 4 s before" in stderr()
    assert "worker 0: no other sample: it usually takes" in stderr()


def test_an_end_that_is_no_time_is_refused_by_name(run, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", "tomorrow")
    with pytest.raises(ValueError, match="SLURM_JOB_END_TIME must be a whole number, got 'tomorrow'"):
        run("gen:steady")


# -- the signal that announces it


@pytest.mark.parametrize("name", ["USR1", "USR2"])
@pytest.mark.parametrize("to_all", [False, True])
def test_the_stop_signal_finishes_the_samples_in_hand(command, status, name, to_all):
    number = signal.Signals[f"SIG{name}"]
    process = command("gen:steady", "--workers", "2", "--stop-signal", name)
    eventually(lambda: begun() >= 4, "both are at work")
    if to_all:
        os.killpg(process.pid, number)  # as `scancel --signal` and srun: to all processes of the step
    else:
        process.send_signal(number)
    code, said = finish(process)
    assert code == 128 + number, stderr()
    assert said.startswith(f"{begun()} samples in ring ")
    assert "were not sent" not in said
    assert f"SIG{name}: finishing the samples in hand" in stderr()
    assert "resource_tracker" not in stderr(), "whatever was sent to all processes did not end Python's helper"
    assert states(status()) == ["left", "left"]
    assert not status().ended


def test_term_stops_too_whatever_the_stop_signal_is(command):
    process = command("gen:steady", "--stop-signal", "HUP")
    eventually(lambda: begun() >= 2, "it is at work")
    process.terminate()
    assert finish(process)[0] == 143


# -- nodes that nobody needs


def test_a_job_whose_ring_stays_full_ends_and_says_how_to_ask_for_more(command, status, ring_name):
    process = command("gen:endless", "--workers", "2", "--max-samples", "5", "--idle-s", "1.5", "--grace-s", "0.5")
    code, said = finish(process)
    assert code == 0, stderr()
    for words in (
        f"ring {ring_name} had had no room for ",
        "--idle-s",
        "--capacity",
        f"synthbroker status {ring_name}",
    ):
        assert words in said
    assert states(status()) == ["left", "left"]
    assert not status().ended
    assert status().committed == 5


def test_while_there_is_no_room_nothing_is_made_that_would_be_given_up(run, monkeypatch):
    monkeypatch.setenv("TAKES_S", "0.2")
    outcome = run("gen:steady", max_samples=5, idle_s=4.0, grace_s=0.5)
    assert (outcome.stopped, outcome.samples) == ("idle", 5)
    assert outcome.idle_for_s >= 4.0
    assert begun() == 5 + outcome.unsent
    assert outcome.unsent < 8, "what was on its way when the ring was found full, not the twenty of four seconds"


def test_a_worker_that_makes_its_sample_keeps_the_job(command, status):
    process = command("gen:one_slow", "--workers", "2", "--max-samples", "5", "--idle-s", "0.5", "--grace-s", "0.5")
    eventually(lambda: committed(status) == 5 and _blocked_s(status) > 3, "one is blocked for long")
    assert process.poll() is None, "the other may find room"
    Path("go").touch()
    assert finish(process)[0] == 0, stderr()


def test_room_now_and_then_keeps_the_job(command, status, reader):
    process = command("gen:endless", "--max-samples", "3", "--idle-s", "2.5", "--grace-s", "0.5")
    taken, began = iter(reader(prefetch=0, batch_size=1)), time.monotonic()
    while time.monotonic() - began < 8:
        next(taken)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.5)
        assert process.poll() is None, "it had room half a second ago"
    assert finish(process)[0] == 0, "and ends when nobody reads any more"
    assert "no room" not in stderr()


def _blocked_s(status):
    """Say how long ago somebody put something in the ring."""
    with contextlib.suppress(Exception):
        return status().newest_age_s or 0.0
    return 0.0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"idle_s": 600.0}, r"idle_s=600 must be less than wait_s=600.*raise wait_s"),
        ({"idle_s": 5.0, "wait_s": 4.0}, r"idle_s=5 must be less than wait_s=4"),
        ({"idle_s": -1.0}, "idle_s must not be negative"),
        ({"margin_s": -1.0}, "margin_s must not be negative"),
        ({"ends_in_s": -1.0}, "ends_in_s must not be negative"),
        ({"stop_signal": "KILL"}, r"stop_signal must be one of .*USR1.*'KILL'"),
    ],
)
def test_limits_that_cannot_be_are_refused(run, options, words):
    with pytest.raises(ValueError, match=words):
        run("gen:steady", **options)


def test_without_idle_s_a_full_ring_is_an_error_after_wait_s(run):
    with pytest.raises(RingFullError, match="no room in ring"):
        run("gen:endless", max_samples=5, wait_s=0.5)
