"""The bench: what it prints and writes, never how fast anything is."""

import json
import os
import signal
import subprocess
import sys
import tempfile

import psutil
import pytest
import torch

from servers import any_binary, eventually
from synthbroker import cli
from synthbroker.bench import outputs, place, plots, run, table, workers

PATIENCE_S = 200  # less than pytest's own
SOON_S = 30


@pytest.fixture(autouse=True)
def _surroundings(tmp_path, monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SYNTHBROKER_", "SLURM_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SYNTHBROKER_REDIS_SERVER", str(any_binary().path))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def short_folder():
    """Give a folder with room for a socket's path, which pytest's own may be too long for."""
    with tempfile.TemporaryDirectory(prefix="sbt-", ignore_cleanup_errors=True) as folder:
        yield folder


def bench(*words):
    command = [sys.executable, "-m", "synthbroker", "bench", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def troubles(done):
    """Give the lines of stderr that do not only say how far it is."""
    return [line for line in done.stderr.splitlines() if not line.endswith("runs done")]


def refused(capsys, *words):
    """Run one in this process, where it ends before it has begun; gives exit code and stderr."""
    try:
        code = cli.main(["bench", *words])
    except SystemExit as end:
        code = end.code
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    return code, stderr


@pytest.mark.slow
@pytest.mark.parametrize("only", [range(1, 6), range(6, 11), range(11, 16)])
def test_a_quick_bench_measures_everything_once(tmp_path, only):
    done = bench("--quick", "--only", ",".join(map(str, only)), "--json", "bench.json")
    assert (done.returncode, troubles(done)) == (0, [])
    head, about, note, *_ = lines = done.stdout.splitlines()
    assert "cores of" in head
    assert "redis" in about
    assert "no measures" in note
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["how"] == {"quick": True, "repeats": 1, "seconds": 0.1}
    assert written["about"]["note"] == note
    assert written["failures"] == {}
    assert {row["number"] for row in written["rows"]} == set(only)
    numbers = [line[:2].strip() for line in lines[lines.index(table.HEAD) + 1 :]]
    assert numbers == [str(row["number"]) for row in written["rows"]]
    assert all(row["ours"] > 0 and row["note"] is None for row in written["rows"])
    assert all((row["ratio"] is None) == (row["baseline"] is None) for row in written["rows"])
    assert {(row["bound"], row["ok"]) for row in written["rows"]} == {(None, None)}, "bounds are for the full sizes"


def test_a_quick_bench_measures_what_needs_a_gpu_or_says_that_there_is_none(tmp_path):
    done = bench("--quick", "--only", "16,17", "--json", "bench.json")
    assert (done.returncode, troubles(done)) == (0, [])
    written = json.loads((tmp_path / "bench.json").read_text())
    assert [row["number"] for row in written["rows"]] == [16] * 3 + [17] * 3
    if torch.cuda.is_available():
        assert all(row["ours"] > 0 and row["baseline"] > 0 for row in written["rows"])
        assert written["failures"] == {}
    else:
        assert {row["note"] for row in written["rows"]} == {"torch sees no GPU"}
        assert done.stdout.splitlines()[-1] == "16, 17  6 lines cannot run here: torch sees no GPU"
        assert done.stdout.count("no GPU") == 1


@pytest.mark.slow
def test_only_with_plot_draws_the_pictures_of_these_measures(tmp_path):
    done = bench("--quick", "--only", "4", "--plot", "new/pictures", "--json", "bench.json")
    assert (done.returncode, troubles(done)) == (0, [])
    assert done.stdout.splitlines()[-2:] == ["", "drawn in new/pictures/throughput.png"]
    assert [path.name for path in (tmp_path / "new/pictures").iterdir()] == ["throughput.png"]
    runs = json.loads((tmp_path / "bench.json").read_text())["runs"]
    assert {name.split()[-2] for name in runs} == {"400", "40", "4"}, "no size that was not asked for"


@pytest.mark.slow
def test_a_quick_bench_draws_the_time_by_num_workers(tmp_path):
    outcome, block = run.Outcome(), workers.block(quick=True)
    with place.at(None, seconds=0.1, quick=True) as here:
        run.complete([block], here, outcome, repeats=1)
        outcome.runs["ours 4 KiB"] = [{"samples_per_s": 1.0}]
        drawn = plots.draw(outcome, place.describe(here), tmp_path, ())
    assert outcome.failures == {}
    assert outcome.runs.keys() == {*block.contenders, "ours 4 KiB"}
    assert [path.name for path in drawn] == ["throughput.png", "num_workers.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_a_server_that_is_given_is_left_as_it_was(own_server):
    server = own_server()
    before = server.client().keys("*")
    done = bench("--quick", "--only", "4,5", "--url", server.url)
    assert (done.returncode, troubles(done)) == (0, [])
    assert "4 KiB samples, raw: ours ÷ plain redis-py" in done.stdout
    assert "cannot run here: it needs a server that is reached by plain TCP" in done.stdout
    assert server.client().keys("*") == before


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_bench_that_is_stopped_leaves_no_process(number, status, short_folder, monkeypatch):
    monkeypatch.setenv("TMPDIR", short_folder)  # a killed one cannot tidy up
    words = [sys.executable, "-m", "synthbroker", "bench", "--only", "4", "--seconds", "60"]
    running = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    try:
        parent = psutil.Process(running.pid)
        eventually(lambda: len(parent.children(recursive=True)) >= 4, "server, tracker, trainer and producer")
        family = parent.children(recursive=True)
        running.send_signal(number)
        assert running.wait(SOON_S) == status
    finally:
        running.kill()
        running.wait()
    eventually(lambda: not any(_runs(one) for one in family), "the end of all that it had started")


def _runs(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "18"], "must be numbers from 1 to 17"),
        (["--repeats", "0"], "a whole number from 1"),
        (["--seconds", "-1"], "a number of seconds"),
    ],
)
def test_what_cannot_be_asked_for_is_said(capsys, words, said):
    code, stderr = refused(capsys, *words)
    assert code == 2
    assert said in stderr


GENERATOR = """
import numpy as np, time
def slow(worker):
    while True:
        time.sleep(0.01)
        yield {"x": np.ones(8, np.float32)}
def bad(worker):
    raise RuntimeError("no more brains")
    yield
def short(worker):
    yield {"x": np.ones(8, np.float32)}
    raise RuntimeError("no more brains")
def empty(worker):
    return iter(())
def numbers(worker):
    yield 3
NUMBER = 3
"""


def test_a_fake_step_times_a_generator_of_the_user(tmp_path):
    (tmp_path / "gen.py").write_text(GENERATOR)
    done = bench("--quick", "--fake-step", "0.01", "--generator", "gen:slow", "--json", "bench.json")
    assert (done.returncode, troubles(done)) == (0, [])
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [row["unit"] for row in rows] == ["steps/s", "ms", "ms", "ms", "of time"]
    assert all(row["ours"] > 0 and row["baseline"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("gen", "'gen' names no generator: write module:function"),
        ("nope:x", "there is no module 'nope' in "),
        ("gen:x", "module 'gen' has no function 'x'"),
        ("gen:NUMBER", "module 'gen' has no function 'NUMBER'"),
        ("gen:bad", "RuntimeError: no more brains"),
        ("gen:empty", "it yields no sample"),
        ("gen:numbers", "a sample must be a dict of arrays or tensors, got int"),
    ],
)
def test_a_generator_that_cannot_be_used_is_refused_once_before_anything_is_measured(capsys, tmp_path, target, said):
    (tmp_path / "gen.py").write_text(GENERATOR)
    code, stderr = refused(capsys, "--fake-step", "0.01", "--generator", target)
    assert code == 1
    assert stderr.startswith(f"synthbroker: error: --generator {target} cannot be used: ")
    assert said in stderr
    assert len(stderr.splitlines()) == 1


def test_a_generator_that_fails_later_is_one_error(tmp_path):
    (tmp_path / "gen.py").write_text(GENERATOR)
    done = bench("--quick", "--fake-step", "0.01", "--generator", "gen:short")
    assert done.returncode == 1
    said = "synthbroker: error: worker 0 of gen:short failed: RuntimeError: no more brains"
    assert done.stderr.splitlines()[-1] == said
    assert done.stdout.splitlines()[-1] == table.HEAD, "no rows without figures"


def test_where_a_socket_has_no_room_the_server_is_reached_by_tcp(tmp_path, monkeypatch):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    done = bench("--quick", "--only", "7")
    assert (done.returncode, troubles(done)) == (0, [])
    assert ") by redis; " in done.stdout


def test_a_server_that_does_not_answer_is_an_error_in_one_line(capsys, tmp_path):
    code, stderr = refused(capsys, "--url", f"unix://{tmp_path}/nobody")
    assert code == 1
    assert stderr.startswith("synthbroker: error: ")
    assert len(stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--json", "nope/x.json"], "--json: nope/x.json cannot be written (No such file or directory): name a place"),
        (["--json", "."], "--json: . cannot be written (Is a directory): name a place"),
        (["--plot", "/proc/nope"], "--plot: there can be no folder /proc/nope (No such file or directory): name one"),
        (["--plot", "taken"], "--plot: there can be no folder taken (File exists): name one"),
        (["--plot", "full"], "--plot: full/throughput.png cannot be written (Is a directory): name a place"),
        (
            ["--plot", "p", "--only", "5,11"],
            "--plot has no picture of --only 5,11: throughput.png is of measures 1 to 4",
        ),
    ],
)
def test_results_that_cannot_be_kept_are_refused_before_anything_is_measured(capsys, tmp_path, words, said):
    (tmp_path / "taken").write_text("")
    (tmp_path / "full/throughput.png").mkdir(parents=True)
    code, stderr = refused(capsys, *words)
    assert code == 1
    assert stderr.startswith(f"synthbroker: error: {said}")
    assert not (tmp_path / "p").exists()


def test_looking_whether_a_file_can_be_written_leaves_it_as_it_was(tmp_path):
    (tmp_path / "old.json").write_text("{}")
    outputs.check("--json", tmp_path / "old.json")
    outputs.check("--json", tmp_path / "new.json")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("old.json", "{}")]


def test_a_generator_without_a_step_is_refused(capsys):
    code, stderr = refused(capsys, "--generator", "gen:slow")
    assert code == 1
    assert "--generator goes with --fake-step" in stderr
