"""How the processes of `generate` end: by signals, by the grace that is over, with a parent that was killed."""

import os
import signal
import threading
from pathlib import Path

import psutil
import pytest

from generating import committed, finish, states, stderr, work_in
from servers import eventually
from synthbroker import admin, crew


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    work_in(tmp_path, monkeypatch)


def gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_sample_in_hand_and_says_left(command, status, number, code):
    process = command("gen:slow", "--workers", "2")
    eventually(lambda: Path("begun-0").exists() and Path("begun-1").exists(), "both make their second sample")
    os.killpg(process.pid, number)  # as Ctrl-C: to parent and workers alike
    eventually(lambda: "finishing the samples in hand" in stderr(), "the parent took the signal")
    Path("go").touch()
    returncode, stdout = finish(process)
    assert (returncode, "Traceback" in stderr()) == (code, False), stderr()
    assert stdout.startswith("4 samples in ring ")
    assert status().committed == 4
    assert states(status()) == ["left", "left"]
    assert not status().ended
    assert not Path("too-far").exists()


def test_the_parent_passes_a_signal_on(command, status):
    process = command("gen:endless", "--workers", "2", "--when-full", "drop-oldest", "--max-samples", "50")
    eventually(lambda: "synthbroker" not in stderr() and committed(status) > 50, "samples come")
    process.terminate()
    assert finish(process)[0] == 143
    assert states(status()) == ["left", "left"]
    assert status().ledger.balanced


def test_what_a_full_ring_does_not_take_within_the_grace_is_reported(command, status):
    process = command("gen:told", "--max-samples", "5", "--in-flight", "1", "--grace-s", "0.3")
    eventually(lambda: Path("made-0-6").exists(), "one waits for room in the ring, the next one for its turn")
    process.terminate()
    returncode, stdout = finish(process)
    assert returncode == 143
    assert "were not sent" in stdout
    assert "gave the sample in hand up" in stderr()
    assert "Traceback" not in stderr()
    assert "leaked" not in stderr()
    assert states(status()) == ["left"]


def test_somebody_may_end_the_ring_meanwhile(command, status, server, ring_name):
    process = command("gen:told", "--workers", "2", "--max-samples", "5", "--in-flight", "1")
    eventually(lambda: Path("made-0-1").exists() and Path("made-1-1").exists(), "both wait for room, in the end")
    admin.end(ring_name, url=server.url)
    returncode, stdout = finish(process)
    assert returncode == 0
    assert "were not sent; " in stdout
    assert stdout.endswith("the ring was ended meanwhile: nobody wants more (a new run says --reopen)\n")
    assert "ERROR" not in stderr()
    assert states(status()) == ["left", "left"]


@pytest.mark.parametrize("target", ["gen:stuck", "gen:stubborn"])
def test_a_generator_that_does_not_come_back_is_given_up_after_the_grace(command, status, target):
    process = command(target, "--grace-s", "0.2")
    eventually(lambda: committed(status) == 1, "the first sample is there")
    process.terminate()
    returncode, stdout = finish(process)
    assert returncode == 143
    assert "1 sample in ring" in stdout
    assert "1 was not sent" in stdout
    assert states(status()) == ["left"]


def test_a_worker_that_does_not_even_see_the_signal_is_killed(run, status, monkeypatch, caplog):
    monkeypatch.setattr(crew, "_KILL_AFTER_S", 0.1)

    def interrupt():
        eventually(lambda: committed(status) == 1, "the first sample is there")
        Path("committed").touch()
        eventually(lambda: [path.name for path in Path().glob("pid-*")], "its process is about to stand still")
        (name,) = [path.name for path in Path().glob("pid-*")]
        worker = psutil.Process(int(name.removeprefix("pid-")))
        eventually(lambda: worker.status() == psutil.STATUS_STOPPED, "its process stands still")
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    outcome = run("gen:deaf", grace_s=0.1)
    thread.join()
    assert outcome.signal == signal.SIGTERM
    assert "1 workers did not stop" in caplog.text
    assert all(gone(int(path.name.removeprefix("pid-"))) for path in Path().glob("pid-*"))


def test_a_second_signal_ends_at_once(command, status):
    process = command("gen:stuck", "--workers", "2", "--grace-s", "600")
    eventually(lambda: len(list(Path().glob("pid-*"))) == 2 and committed(status) == 2, "both are stuck")
    pids = [int(path.name.removeprefix("pid-")) for path in Path().glob("pid-*")]
    process.terminate()
    eventually(lambda: "finishing the samples in hand" in stderr(), "the parent took the signal")

    def again():
        # One that comes too soon counts as the same; one that comes too late would meet Python's own handler.
        if "ending at once" not in stderr():
            process.terminate()
        return process.poll() is not None

    eventually(again, "the second signal ends it")
    assert process.returncode == 143
    assert "ending at once" in stderr()
    assert all(gone(pid) for pid in pids)


def test_workers_end_and_say_left_when_their_parent_is_killed(command, status):
    process = command("gen:stuck", "--workers", "2", "--grace-s", "0.2")
    eventually(lambda: len(list(Path().glob("pid-*"))) == 2 and committed(status) == 2, "both are stuck")
    pids = [int(path.name.removeprefix("pid-")) for path in Path().glob("pid-*")]
    process.kill()
    eventually(lambda: all(gone(pid) for pid in pids), "no orphans")
    assert states(status()) == ["left", "left"]
