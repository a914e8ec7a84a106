"""`generate` in tests: generators in a file, calls of it here and as a command, and what became of them."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest

from servers import RunningServer
from synthbroker.states import RingStatus

Status = Callable[[], RingStatus]

GENERATORS = '''
    """Generators for the tests; files in the current directory are how the tests talk to them."""

    import os
    import signal
    import sys
    import time
    from pathlib import Path

    import numpy as np

    from synthbroker.sample import Sample

    __version__ = "1.2"


    def sample(value):
        return {"x": np.full((4, 5), value, np.float32)}


    def touch(name):
        Path(name).touch()


    def wait_for(name):
        while not Path(name).exists():
            time.sleep(0.01)


    def few(worker):
        for i in range(3):
            yield sample(10 * worker.index + i)


    def none(worker):
        yield from ()


    def endless(worker):
        while True:
            yield sample(0)


    def told(worker):
        for i in range(10**6):
            touch(f"made-{worker.index}-{i}")
            yield sample(i)


    def rich(worker):
        yield Sample(sample(1), recipe={"seed": 7, "blur": 0.5}, metadata={"site": "A"})


    def pairs(worker):
        yield np.zeros(3), np.ones(2)


    def modules(worker):
        yield {"torch": "torch" in sys.modules, "rich": "rich" in sys.modules}


    def seeds(worker):
        yield {"seed": worker.seed, "count": worker.count, "task": worker.array_task_id or -1}


    def slow(worker):
        yield sample(1)
        touch(f"begun-{worker.index}")
        wait_for("go")
        yield sample(2)
        touch("too-far")
        yield sample(3)


    def stuck(worker):
        touch(f"pid-{os.getpid()}")
        yield sample(1)
        wait_for("never")


    def stubborn(worker):
        touch(f"pid-{os.getpid()}")
        yield sample(1)
        while True:
            try:
                wait_for("never")
            except BaseException:
                pass


    def deaf(worker):
        yield sample(1)
        wait_for("committed")
        touch(f"pid-{os.getpid()}")
        os.kill(os.getpid(), signal.SIGSTOP)


    def raises(worker):
        yield sample(1)
        if worker.index == 0:
            wait_for("begun-1")
            raise RuntimeError("no more brains")
        touch("begun-1")
        while True:
            yield sample(2)
            time.sleep(0.01)


    def exits(worker):
        yield sample(1)
        sys.exit("enough")


    def killed(worker):
        yield sample(1)
        os.kill(os.getpid(), signal.SIGKILL)


    def number(worker):
        return 3


    def one_dict(worker):
        return sample(1)


    def text(worker):
        yield "a sample"


    def changing(worker):
        yield sample(1)
        yield {"y": 1}


    class Maker:
        @staticmethod
        def make(worker):
            yield sample(5)
'''


class Start(Protocol):
    """Starts `synthbroker generate TARGET` with options and environment variables; stderr goes to a file."""

    def __call__(self, target: str, *options: str, **variables: str) -> "subprocess.Popen[str]": ...


def work_in(folder: Path, monkeypatch: pytest.MonkeyPatch, generators: str = GENERATORS) -> None:
    """Work where the generators are, outside of any SLURM job."""
    (folder / "gen.py").write_text(textwrap.dedent(generators))
    monkeypatch.chdir(folder)
    for name in list(os.environ):
        if name.startswith(("SLURM_", "SYNTHBROKER_")):
            monkeypatch.delenv(name)


def commands(server: RunningServer, ring: str) -> Iterator[Start]:
    """Give what starts the command line, each time in a session of its own, as a terminal or SLURM would."""
    started: list[subprocess.Popen[str]] = []

    def start(target: str, *options: str, **variables: str) -> "subprocess.Popen[str]":
        words = ["generate", target, "--ring", ring, "--url", server.url, *options]
        with Path("stderr").open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "synthbroker", *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,
                env=os.environ | variables,
            )
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def finish(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """Wait for the end; gives exit code and output."""
    stdout, _ = process.communicate(timeout=60)
    return process.returncode, stdout


def stderr() -> str:
    return Path("stderr").read_text()


def states(status: RingStatus) -> list[str]:
    return sorted(producer.state for producer in status.producers.values())


def committed(status: Status) -> int:
    """Say how many samples are in the ring; -1 while there is none."""
    try:
        return status().committed
    except Exception:  # noqa: BLE001 - there is no ring yet
        return -1
