"""The launcher where there is no SLURM: its templates, its file, its environment. The rest is in tests/cluster."""

import json
import os
import re
import subprocess
from dataclasses import replace

import pytest

from synthbroker import endpoint, jobs, report, server, settings, slurm, troubles
from synthbroker.errors import SlurmError

TEMPLATES = sorted(slurm.templates().glob("*.sbatch"))


@pytest.mark.parametrize("path", [*TEMPLATES, slurm.templates() / "env.sh"], ids=lambda path: path.name)
def test_a_template_is_shell(path):
    subprocess.run(["bash", "-n", path], check=True, timeout=20)


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_a_template_ties_nobody_to_a_partition_an_account_or_a_host(path):
    said = re.findall(r"^#SBATCH (.*)$", path.read_text(), re.MULTILINE)
    assert said
    words = {word.partition("=")[0] for line in said for word in line.split()}
    free = {"--job-name", "--nodes", "--ntasks", "--ntasks-per-node", "--array", "--signal", "--requeue"}
    assert words <= free | {"--open-mode", "--output"}


def test_templates_are_copied_once_and_edits_are_kept(tmp_path):
    copied = slurm.init(tmp_path / "run")
    assert {path.name for path in copied} >= {"env.sh", "broker.sbatch", "generators.sbatch", "train.sbatch"}
    (tmp_path / "run" / "env.sh").write_text("mine")
    (tmp_path / "run" / "train.sbatch").unlink()
    assert [path.name for path in slurm.init(tmp_path / "run")] == ["train.sbatch"]
    assert (tmp_path / "run" / "env.sh").read_text() == "mine"


@pytest.mark.parametrize("name", ["a run", "run#1", "100%", "what?", "a|b"])
def test_a_folder_whose_name_would_not_do_in_a_url_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="part of a URL"):
        slurm.init(tmp_path / name)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "nonsense",
        "[" * 100_000,
        '{"format": "synthbroker-run", "version": 2, "jobs": {}, "logs": {}}',
        '{"format": "synthbroker-run", "version": 1}[]',
        '{"format": "synthbroker-run", "version": 1, "jobs": {"broker": "--user=root"}, "logs": {"broker": "x"}}',
        '{"format": "synthbroker-run", "version": 1, "jobs": {"broker": "1"}, "logs": {}}',
        '{"format": "synthbroker-run", "version": 1, "jobs": ["1"], "logs": {}}',
    ],
)
def test_a_file_of_jobs_that_is_none_of_ours_is_refused(tmp_path, content):
    (tmp_path / "jobs.json").write_text(content)
    with pytest.raises(ValueError, match=r"jobs\.json"):
        slurm.read(tmp_path)


def test_a_folder_without_a_run_says_how_to_start_one(tmp_path):
    with pytest.raises(ValueError, match=f"synthbroker slurm up {tmp_path}"):
        slurm.status(tmp_path)


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"without": ["trainers"]}, "no job 'trainers'"),
        ({"without": ["train"], "down_after": True}, "needs a training"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_submitted(tmp_path, wrong, complaint):
    slurm.init(tmp_path)
    with pytest.raises(ValueError, match=complaint):
        slurm.up(tmp_path, **wrong)


def test_jobs_do_not_inherit_the_allocation_that_they_are_submitted_from(monkeypatch):
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    given = {
        "SLURM_NNODES": "2",
        "SLURMD_NODENAME": "n1",
        "PMIX_RANK": "0",
        "CUDA_VISIBLE_DEVICES": "0",
        "SLURM_CONF": "/etc/slurm.conf",
        "SBATCH_PARTITION": "long",
        "SQUEUE_PARTITION": "short",
        "TRAIN": "train.py",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    outside = settings.submission_environment()
    assert {name for name in given if name not in outside} == {"SQUEUE_PARTITION"}
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    inside = settings.submission_environment()
    assert {name for name in given if name in inside} == {"SLURM_CONF", "SBATCH_PARTITION", "TRAIN"}


def fake(folder, name, text):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified",
            "sacctmgr show associations"),
        ("sbatch: error: Batch job submission failed: Requested node configuration is not available", "sinfo -o"),
        ("sbatch: error: No partition specified or system default partition", "partitions here: day, night"),
        ("sbatch: error: Requested time limit is invalid (missing or exceeds some limit)", "say --time="),
        ("sbatch: error: something new", "refuses x.sbatch: something new"),
        ("", "does not say why"),
    ],
)  # fmt: skip
def test_what_sbatch_says_is_told_with_a_cure(tmp_path, monkeypatch, said, told):
    fake(tmp_path, "sbatch", f"echo '{said}' >&2; exit 1")
    fake(tmp_path, "sinfo", "echo day; echo night; echo day")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(SlurmError, match=re.escape(told)):
        jobs.submit(tmp_path / "x.sbatch", tmp_path, [])


@pytest.mark.parametrize(("said", "number"), [("12", "12"), ("12;west", "12"), ("note\n12", "12")])
def test_the_number_of_a_job_is_read_wherever_it_stands(tmp_path, monkeypatch, said, number):
    fake(tmp_path, "sbatch", f"echo '{said}'")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert jobs.submit(tmp_path / "x.sbatch", tmp_path, []) == number


def test_a_job_that_was_not_numbered_is_an_error(tmp_path, monkeypatch):
    fake(tmp_path, "sbatch", "echo hello")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(SlurmError, match="named no job"):
        jobs.submit(tmp_path / "x.sbatch", tmp_path, [])


def test_jobs_of_others_with_the_same_number_are_left_alone(tmp_path, monkeypatch):
    """Where SLURM has lost its state it counts from 1 again: the number of an old run is somebody's job by now."""
    fake(tmp_path, "squeue", "echo '1|1|RUNNING|None|n1|0:01|1:00|/somewhere/else'; echo '|'")
    fake(tmp_path, "scancel", f"touch {tmp_path}/cancelled")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    content = {"format": "synthbroker-run", "version": 1, "jobs": {"broker": "1"}, "logs": {"broker": "logs/x.out"}}
    (tmp_path / "jobs.json").write_text(json.dumps(content))
    assert slurm.down(tmp_path) == []
    assert not (tmp_path / "cancelled").exists()
    assert not (tmp_path / "jobs.json").exists()


def test_jobs_that_do_not_go_are_named(tmp_path, monkeypatch):
    fake(tmp_path, "squeue", f"echo '1|1|COMPLETING|None|n1|0:01|1:00|{tmp_path}'")
    fake(tmp_path, "scancel", "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    content = {"format": "synthbroker-run", "version": 1, "jobs": {"broker": "1"}, "logs": {"broker": "logs/x.out"}}
    (tmp_path / "jobs.json").write_text(json.dumps(content))
    with pytest.raises(SlurmError, match=r"still there 0 s after they were cancelled: 1 \(COMPLETING\)"):
        slurm.down(tmp_path, wait_s=0)
    assert (tmp_path / "jobs.json").exists()


# -- what is up, and what is submitted again


class Queue:
    """Stands for SLURM: numbers jobs from 11 on, says that they run, and refuses what has the flag --refuse."""

    def __init__(self, folder):
        self.folder, self.states, self.submitted, self.cancelled = folder, {}, {}, []

    def submit(self, script, folder, options):
        if "--refuse" in options:
            raise SlurmError("refused")
        number = str(11 + len(self.states))
        self.states[number] = "RUNNING"
        self.submitted[number] = (script.name, [word for word in options if word.startswith("--dependency")])
        return number

    def find(self, numbers):
        return [
            jobs.Job(number, number, self.states[number], "None", "n1", "0:01", "1:00", str(self.folder))
            for number in numbers
        ]


@pytest.fixture
def queue(tmp_path, monkeypatch):
    made = Queue(tmp_path)
    monkeypatch.setattr(jobs, "submit", made.submit)
    monkeypatch.setattr(jobs, "find", made.find)
    monkeypatch.setattr(jobs, "cancel", made.cancelled.extend)
    slurm.init(tmp_path)
    assert slurm.up(tmp_path).jobs == {"broker": "11", "generators": "12", "train": "13"}
    return made


def test_what_has_ended_is_submitted_again_beside_what_is_up(tmp_path, queue):
    queue.states["13"] = "FAILED"
    again = slurm.up(tmp_path, without=["broker", "generators"])
    assert queue.submitted["14"] == ("train.sbatch", ["--dependency=after:11"])
    assert again.jobs == {"broker": "11", "generators": "12", "train": "14"} == slurm.read(tmp_path).jobs
    queue.states["11"] = "TIMEOUT"
    assert slurm.up(tmp_path, without=["train", "generators"]).jobs == again.jobs | {"broker": "15"}
    assert queue.submitted["15"] == ("broker.sbatch", [])
    assert queue.cancelled == []


def test_what_is_up_is_not_submitted_twice_and_the_way_to_leave_it_is_told(tmp_path, queue):
    queue.states["13"] = "FAILED"
    with pytest.raises(SlurmError, match=r"jobs 11, 12: .*--without=broker --without=generators leaves these"):
        slurm.up(tmp_path, without=["broker"])
    assert set(queue.submitted) == {"11", "12", "13"}


def test_a_refusal_takes_only_what_was_submitted_with_it(tmp_path, queue):
    queue.states |= {"12": "COMPLETED", "13": "FAILED"}
    with pytest.raises(SlurmError, match="refused"):
        slurm.up(tmp_path, without=["broker"], train="--refuse")
    assert queue.cancelled == ["14"]
    assert slurm.read(tmp_path).jobs == {"broker": "11"}


def test_a_refusal_of_the_first_job_leaves_what_is_known_of_an_ended_run(tmp_path, queue):
    queue.states |= dict.fromkeys(queue.states, "FAILED")
    with pytest.raises(SlurmError, match="refused"):
        slurm.up(tmp_path, broker="--refuse")
    assert slurm.read(tmp_path).jobs == {"broker": "11", "generators": "12", "train": "13"}


def test_folders_for_both_kinds_of_log_are_made(tmp_path, queue):
    queue.states |= dict.fromkeys(queue.states, "FAILED")
    slurm.up(
        tmp_path, broker="--job-name error -o a/%j.out -e b/%j.err", train=["--error=c/%j.err", "--output=d/%j.out"]
    )
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"a", "b", "c", "d", "logs"}


def test_names_of_logs_are_told_as_they_are(tmp_path, queue):
    run = slurm.read(tmp_path)
    names = [run.logs_of(role).name for role in slurm.ROLES]
    assert names == ["broker-11.out", "generators-12_*.out", "train-13.out"]
    assert "logs/generators-12_*.out" in report.of_run(run)


# -- what went wrong

EARLIER = "ValueError: of an earlier life\n*** JOB 7 ON n1 CANCELLED AT 12:00:00 DUE TO JOB REQUEUE ***\n"
TORCHRUN = """\
step 10
[rank1]: Traceback (most recent call last):
[rank1]: synthbroker.errors.RingMissingError: redis://n1:1/0 lost ring 'brains'
E1126 18:08:26.306000 31982 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: 1) local_rank: 0
Traceback (most recent call last):
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
"""
KILLED = "E1126 18:08:26.3 1 torch/distributed/elastic/api.py:1] failed (exitcode: -9) local_rank: 0 (pid: 7)\n"
NOISE = "".join(f"srun: noise {i}\n" for i in range(20))


@pytest.mark.parametrize(
    ("text", "first"),
    [
        (EARLIER + TORCHRUN + NOISE, "[rank1]: synthbroker.errors.RingMissingError: redis://n1:1/0 lost ring 'brains'"),
        ("[rank0]: RuntimeError: closed by peer\n" + KILLED + NOISE, KILLED.strip()),
        (KILLED.replace("-9", "-15") + "torch.distributed.elastic.SignalException: 15\n" + NOISE, None),
        (
            "slurmstepd: error: Detected 1 oom-kill event(s)\n" + NOISE,
            "slurmstepd: error: Detected 1 oom-kill event(s)",
        ),
        (EARLIER + NOISE, None),
        (NOISE + "ValueError: at the end\n", None),
    ],
)
def test_the_first_error_is_shown_before_the_end_of_the_log(tmp_path, text, first):
    log = tmp_path / "train-7.out"
    log.write_text(text)
    job = jobs.Job("7", "7", "FAILED", "None", "n1", "0:01", "1:00", str(tmp_path))
    [told] = troubles.of_jobs([job], lambda _: log)
    lines = told.splitlines()
    assert lines[0] == f"job 7 ended as FAILED; the end of {log}:"
    assert lines[1:3] == ([f"  {first}", "  ..."] if first else lines[1:3])
    assert (len(lines), "earlier life" in told) == (11 if first else 9, False)


def test_jobs_that_fail_alike_are_told_once_and_many_kinds_are_cut_short(tmp_path):
    def log_of(job):
        return tmp_path / f"generators-{job.job}_{job.id}.out"

    found = [jobs.Job("3", str(i), "FAILED", "None", "n1", "0:01", "1:00", str(tmp_path)) for i in range(20)]
    for i, job in enumerate(found):
        why = "the simulator diverged" if i < 12 else chr(ord("a") + i)
        log_of(job).write_text(f"2026-11-26 18:07:{10 + i},420 ERROR worker 0 failed: RuntimeError: {why}\n")
    told = list(troubles.of_jobs(found, log_of))
    assert told[0].startswith("job 0 (and 11 more like it) ended as FAILED")
    assert told[-1] == "and 4 more jobs failed, 16 for example: see their logs"
    assert len(told) == 6


def test_of_jobs_submitted_by_hand_the_broker_is_shown(tmp_path, monkeypatch):
    fake(tmp_path, "squeue", "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with server.start() as running:
        endpoint.write(tmp_path / "broker.json", running.endpoint)
        seen = slurm.status(tmp_path)
        assert f":{running.endpoint.port}" in seen.broker
        assert (seen.run.jobs, seen.jobs) == ({}, ())


def test_a_server_that_is_none_of_the_run_is_named_and_left(tmp_path, queue, caplog):
    queue.states |= dict.fromkeys(queue.states, "COMPLETED")
    with server.start() as running:
        endpoint.write(tmp_path / "broker.json", replace(running.endpoint, job_id="99"))
        assert slurm.down(tmp_path) == []
        assert "`scancel 99` ends it" in caplog.text
    assert (tmp_path / "broker.json").exists()
