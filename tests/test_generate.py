"""`generate`: worker processes that put what a user's generator yields, and how they end."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import psutil
import pytest

from servers import eventually
from synthbroker import crew, monitor
from synthbroker.errors import GeneratorError, RingEndedError, SchemaError
from synthbroker.generate import generate, worker_infos
from synthbroker.peek import peek
from synthbroker.settings import Job

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


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Work where the generators are, outside of any SLURM job."""
    (tmp_path / "gen.py").write_text(textwrap.dedent(GENERATORS))
    (tmp_path / "broken.py").write_text("import numpy\n\n1 / 0\n")
    (tmp_path / "lacking.py").write_text("import no_such_package\n")
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith(("SLURM_", "SYNTHBROKER_")):
            monkeypatch.delenv(name)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


@pytest.fixture
def run(server, ring_name):
    """Call `generate` in this process."""

    def call(target, **options):
        return generate(target, url=server.url, ring=ring_name, **options)

    return call


@pytest.fixture
def command(server, ring_name):
    """Start the command line in a session of its own, as a terminal would."""
    started = []

    def start(target, *options):
        with Path("stderr").open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "synthbroker", "generate", target, "--ring", ring_name, "--url", server.url,
                 *options],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, start_new_session=True,
            )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def status(server, ring_name):
    return lambda: monitor.status(ring_name, url=server.url)


def stderr():
    return Path("stderr").read_text()


def finish(process, deadline_s=30):
    stdout, _ = process.communicate(timeout=deadline_s)
    return process.returncode, stdout.decode()


def states(status):
    return sorted(producer.state for producer in status.producers.values())


def gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_every_sample_of_every_worker_arrives_and_the_ring_ends(run, server, ring_name, status):
    outcome = run("gen:few", workers=2, seed=1)
    assert (outcome.samples, outcome.unsent, outcome.signal, outcome.ended) == (6, 0, None, True)
    samples = peek(ring_name, 10, url=server.url)
    assert sorted(sample["x"][0, 0] for sample in samples) == [0, 1, 2, 10, 11, 12]
    assert outcome.raw_bytes == 6 * samples[0]["x"].nbytes
    assert status().ended
    assert states(status()) == ["closed", "closed"]


def test_the_recipe_says_how_to_make_the_sample_again(run, server, ring_name):
    run("gen:few", workers=2, seed=1)
    recipes = [sample.info.recipes[0] for sample in peek(ring_name, 10, url=server.url)]
    assert all(recipe["generator"] == "gen:few" and recipe["version"] == "1.2" for recipe in recipes)
    seeds = {info.index: info.seed for info in worker_infos(2, Job("h", 1, None, None, 0, 0), seed=1, device=None)}
    assert sorted((recipe["worker"], recipe["n"], recipe["seed"]) for recipe in recipes) == [
        (worker, n, seeds[worker]) for worker in (0, 1) for n in range(3)
    ]


def test_a_sample_may_bring_its_own_recipe_and_metadata(run, server, ring_name):
    run("gen:rich")
    (sample,) = peek(ring_name, url=server.url)
    assert sample.info.metadata == ({"site": "A"},)
    recipe = sample.info.recipes[0]
    assert (recipe["seed"], recipe["blur"], recipe["n"]) == (7, 0.5, 0)


def test_tuples_are_taken_with_names(run, server, ring_name):
    run("gen:pairs", fields=("image", "label"))
    (sample,) = peek(ring_name, url=server.url)
    assert {name: array.shape for name, array in sample.items()} == {"image": (3,), "label": (2,)}


def test_workers_load_neither_torch_nor_the_command_line(run, server, ring_name):
    run("gen:modules")
    (sample,) = peek(ring_name, url=server.url)
    assert not sample["torch"]
    assert not sample["rich"]


def test_a_method_of_a_class_is_found_as_well(run):
    assert run("gen:Maker.make").samples == 1


def test_a_function_may_be_given_in_place_of_its_name(run, server, ring_name, monkeypatch):
    monkeypatch.syspath_prepend(".")
    import gen

    run(gen.few)
    assert peek(ring_name, 1, url=server.url)[0].info.recipes[0]["generator"] == "gen:few"


def test_seeds_differ_over_workers_jobs_array_tasks_restarts_and_processes_and_come_again_with_the_same():
    jobs = [
        Job("h", 1, job_id, task, restart, process)
        for job_id in (None, "0", "4711")
        for task in (None, 0, 1)
        for restart in (0, 1)
        for process in (0, 1)
    ]
    seeds = [info.seed for job in jobs for info in worker_infos(5, job, seed=3, device=None)]
    assert len(set(seeds)) == len(seeds) == 36 * 5
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeds[:5] == [info.seed for info in worker_infos(5, jobs[0], seed=3, device=None)]
    assert len({worker_infos(1, jobs[0], seed=None, device=None)[0].seed for _ in range(9)}) == 9


def test_a_generator_learns_its_seed_its_number_and_its_array_task(run, server, ring_name, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4")
    run("gen:seeds", workers=2, seed=11)
    infos = worker_infos(2, Job("h", 1, "9", 4, 0, 0), seed=11, device=None)
    samples = peek(ring_name, url=server.url)
    assert {int(sample["seed"]) for sample in samples} == {info.seed for info in infos}
    assert {(int(sample["count"]), int(sample["task"])) for sample in samples} == {(2, 4)}


@pytest.mark.parametrize(
    ("visible", "device", "expected"),
    [
        (None, "cuda", ["cuda", "cuda", "cuda"]),
        ("", "cuda", ["cuda", "cuda", "cuda"]),
        ("3", "cuda", ["cuda", "cuda", "cuda"]),
        ("0,1", "cuda", ["cuda:0", "cuda:1", "cuda:0"]),
        ("GPU-a,GPU-b,GPU-c", "cuda", ["cuda:0", "cuda:1", "cuda:2"]),
        ("0,1", "cuda:1", ["cuda:1", "cuda:1", "cuda:1"]),
        ("0,1", "cpu", ["cpu", "cpu", "cpu"]),
        ("0,1", None, [None, None, None]),
    ],
)
def test_gpus_are_dealt_out_where_their_number_is_known(monkeypatch, visible, device, expected):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    infos = worker_infos(3, Job("h", 1, None, None, 0, 0), seed=0, device=device)
    assert [info.device for info in infos] == expected


def test_a_ring_may_be_left_open(run, status):
    assert not run("gen:few", keep_open=True).ended
    assert not status().ended
    assert states(status()) == ["closed"]


def test_a_ring_that_counts_its_producers_ends_by_itself(run, status):
    assert not run("gen:few", workers=2, producers=3).ended
    assert not status().ended
    run("gen:few", workers=1)
    assert status().ended


def test_a_generator_without_samples_makes_and_ends_an_empty_ring(run, status):
    assert run("gen:none").samples == 0
    assert (status().live, status().ended) == (0, True)


def test_workers_have_the_names_that_were_asked_for(run, status):
    run("gen:few", workers=2, name="atlas")
    assert set(status().producers) == {"atlas-w0", "atlas-w1"}


def test_an_exception_stops_all_and_its_traceback_is_the_users_own(run, status, caplog):
    with pytest.raises(GeneratorError, match=r"worker 0 of gen:raises failed: RuntimeError: no more brains") as caught:
        run("gen:raises", workers=2)
    (note,) = caught.value.__notes__
    assert note.startswith('Traceback (most recent call last):\n  File "')
    assert 'raise RuntimeError("no more brains")' in note
    assert "worker.py" not in note
    assert note in caplog.text
    assert states(status()) == ["left", "left"]
    assert not status().ended
    assert status().committed >= 2


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        ("gen", ValueError, "module:function"),
        ("gen:", ValueError, "module:function"),
        (":few", ValueError, "module:function"),
        ("gen.py:few", ValueError, r"no module 'gen\.py'"),
        ("../gen:few", ValueError, "module:function"),
        ("no_such:few", ValueError, r"no module 'no_such' in .* or on sys\.path"),
        ("gen:no_such", ValueError, "module 'gen' has no function 'no_such'"),
        ("gen:__version__", ValueError, "module 'gen' has no function '__version__'"),
        ("gen:text", TypeError, "sample must be a dict"),
        ("gen:changing", SchemaError, "does not fit the ring"),
        ("gen:number", GeneratorError, "must yield samples"),
        ("gen:one_dict", GeneratorError, "must yield samples"),
        ("gen:exits", GeneratorError, "SystemExit: enough"),
        ("gen:killed", GeneratorError, "worker 0 was ended by SIGKILL"),
        ("broken:few", GeneratorError, "ZeroDivisionError"),
        ("lacking:few", GeneratorError, "No module named 'no_such_package'"),
        (lambda worker: (), ValueError, "a function of a module"),
    ],
)
def test_what_cannot_work_is_named(run, target, error, message):
    with pytest.raises(error, match=message):
        run(target)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"workers": 0}, ValueError),
        ({"seed": -1}, ValueError),
        ({"grace_s": -1.0}, ValueError),
        ({"name": "a b"}, ValueError),
        ({"capacity": "8 potatoes"}, ValueError),
        ({"colour": "green"}, TypeError),
    ],
)
def test_a_wrong_argument_starts_nothing(run, options, error):
    with pytest.raises(error):
        run("gen:few", **options)
    assert multiprocessing.active_children() == []


def test_an_ended_ring_is_refused_unless_it_is_reopened(run, status):
    run("gen:few")
    with pytest.raises(RingEndedError, match="worker 0 of gen:few"):
        run("gen:few")
    assert run("gen:few", reopen=True).samples == 3
    assert status().committed == 6


def test_the_callers_signal_handlers_are_put_back(run):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    run("gen:few")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_it_may_run_outside_of_the_main_thread(run):
    outcomes = []
    thread = threading.Thread(target=lambda: outcomes.append(run("gen:few")))
    thread.start()
    thread.join(30)
    assert outcomes[0].samples == 3


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
    eventually(lambda: "synthbroker" not in stderr() and _committed(status) > 50, "samples come")
    process.terminate()
    assert finish(process)[0] == 143
    assert states(status()) == ["left", "left"]
    assert status().ledger.balanced


def _committed(status):
    try:
        return status().committed
    except Exception:  # noqa: BLE001 - there is no ring yet
        return -1


def test_what_a_full_ring_does_not_take_within_the_grace_is_reported(command, status):
    process = command("gen:endless", "--max-samples", "5", "--in-flight", "10kB", "--grace-s", "0.3")
    eventually(lambda: _committed(status) == 5 and status().waiting, "the ring is full")
    process.terminate()
    returncode, stdout = finish(process)
    assert returncode == 143
    assert "were not sent" in stdout
    assert "gave the sample in hand up" in stderr()
    assert "Traceback" not in stderr()
    assert "leaked" not in stderr()
    assert states(status()) == ["left"]


@pytest.mark.parametrize("target", ["gen:stuck", "gen:stubborn"])
def test_a_generator_that_does_not_come_back_is_given_up_after_the_grace(command, status, target):
    process = command(target, "--grace-s", "0.2")
    eventually(lambda: _committed(status) == 1, "the first sample is there")
    process.terminate()
    returncode, stdout = finish(process)
    assert returncode == 143
    assert "1 samples in ring" in stdout
    assert "1 were not sent" in stdout
    assert states(status()) == ["left"]


def test_a_worker_that_does_not_even_see_the_signal_is_killed(run, status, monkeypatch, caplog):
    monkeypatch.setattr(crew, "_KILL_AFTER_S", 0.1)

    def interrupt():
        eventually(lambda: _committed(status) == 1, "the first sample is there")
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
    eventually(lambda: len(list(Path().glob("pid-*"))) == 2 and _committed(status) == 2, "both are stuck")
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
    eventually(lambda: len(list(Path().glob("pid-*"))) == 2 and _committed(status) == 2, "both are stuck")
    pids = [int(path.name.removeprefix("pid-")) for path in Path().glob("pid-*")]
    process.kill()
    eventually(lambda: all(gone(pid) for pid in pids), "no orphans")
    assert states(status()) == ["left", "left"]


def test_an_exception_reaches_the_terminal_once_and_the_exit_code_is_one(command):
    process = command("gen:raises", "--workers", "2")
    returncode, stdout = finish(process)
    assert (returncode, stdout) == (1, "")
    assert stderr().count("Traceback (most recent call last)") == 1
    assert 'raise RuntimeError("no more brains")' in stderr()
    assert (
        stderr().splitlines()[-1] == "synthbroker: error: worker 0 of gen:raises failed: RuntimeError: no more brains"
    )
