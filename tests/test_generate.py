"""`generate`: worker processes that put what a user's generator yields."""

import multiprocessing
import signal
import threading

import pytest

from generating import finish, states, stderr, work_in
from synthbroker.errors import GeneratorError, RingEndedError, SchemaError
from synthbroker.generate import worker_infos
from synthbroker.peek import peek
from synthbroker.settings import Job


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    work_in(tmp_path, monkeypatch)
    (tmp_path / "broken.py").write_text("import numpy\n\n1 / 0\n")
    (tmp_path / "lacking.py").write_text("import no_such_package\n")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


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


def test_the_processes_of_a_slurm_step_share_a_name_and_number_their_workers_through(run, status, monkeypatch):
    for process in ("0", "2"):
        monkeypatch.setenv("SLURM_PROCID", process)
        run("gen:few", workers=2, name="atlas", keep_open=True)
    assert set(status().producers) == {"atlas-w0", "atlas-w1", "atlas-w4", "atlas-w5"}


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
        ("gen:changing", SchemaError, r"does not fit the ring: .*; its recipe is .*'n': 1\}"),
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


def test_fields_are_cast_as_the_command_line_says(command, status):
    process = command("gen:few", "--cast", "x:bitround:10")
    assert finish(process)[0] == 0, stderr()
    assert status().schema == "x:f32~10[4,5]"


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


def test_an_exception_reaches_the_terminal_once_and_the_exit_code_is_one(command):
    process = command("gen:raises", "--workers", "2")
    returncode, stdout = finish(process)
    assert (returncode, stdout) == (1, "")
    assert stderr().count("Traceback (most recent call last)") == 1
    assert 'raise RuntimeError("no more brains")' in stderr()
    assert (
        stderr().splitlines()[-1] == "synthbroker: error: worker 0 of gen:raises failed: RuntimeError: no more brains"
    )
