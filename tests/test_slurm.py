"""The launcher where there is no SLURM: its templates, its file, its environment. The rest is in tests/cluster."""

import json
import os
import re
import subprocess

import pytest

from synthbroker import jobs, settings, slurm
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
