"""What the environment says."""

import os
import socket

import pytest

from synthbroker import settings
from synthbroker.errors import EndpointError


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith(("SYNTHBROKER_", "SLURM_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_the_url_comes_from_the_environment_first(monkeypatch, tmp_path):
    (tmp_path / ".synthbroker").mkdir()
    (tmp_path / ".synthbroker" / "broker.json").touch()
    monkeypatch.setenv("SYNTHBROKER_URL", "redis://node7:6380")
    assert settings.default_url() == "redis://node7:6380"


def test_without_a_url_the_default_endpoint_file_counts_if_it_is_there(tmp_path):
    (tmp_path / ".synthbroker").mkdir()
    (tmp_path / ".synthbroker" / "broker.json").touch()
    assert settings.default_url() == f"file://{tmp_path}/.synthbroker/broker.json"


def test_the_endpoint_file_may_lie_elsewhere(monkeypatch, tmp_path):
    (tmp_path / "a b.json").touch()
    monkeypatch.setenv("SYNTHBROKER_ENDPOINT", "~/a b.json")
    assert settings.default_endpoint_path() == tmp_path / "a b.json"
    assert settings.default_url() == f"file://{tmp_path}/a%20b.json"


def test_an_endpoint_path_in_a_home_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setenv("SYNTHBROKER_ENDPOINT", "~nobody-of-this-name/broker.json")
    with pytest.raises(EndpointError, match="SYNTHBROKER_ENDPOINT"):
        settings.default_endpoint_path()


@pytest.mark.parametrize("value", [None, ""])
def test_no_server_known_names_both_cures(monkeypatch, value):
    if value is not None:
        monkeypatch.setenv("SYNTHBROKER_URL", value)
    with pytest.raises(EndpointError, match=r"synthbroker serve.*SYNTHBROKER_URL"):
        settings.default_url()


def test_the_server_program_is_named_by_the_environment(monkeypatch):
    assert settings.redis_server_path() is None
    monkeypatch.setenv("SYNTHBROKER_REDIS_SERVER", "/opt/redis-server")
    assert settings.redis_server_path() == "/opt/redis-server"


@pytest.mark.parametrize(
    ("variables", "run"),
    [
        ({"SLURM_JOB_ID": "7"}, ("slurm-7", 0)),
        ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}, ("slurm-7", 2000)),
        ({"SLURM_JOB_ID": "7", "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "3"}, ("torchrun-x", 3)),
        (
            {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1", "TORCHELASTIC_RUN_ID": "7"},
            ("torchrun-7", 1000),  # after all that torchrun tried in the job's former life
        ),
    ],
)
def test_each_life_of_a_job_is_a_later_attempt_than_all_of_the_former_one(monkeypatch, variables, run):
    for name in "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT":
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert settings.run() == run


def test_outside_of_slurm_there_is_no_job():
    job = settings.job()
    assert job == settings.Job(socket.gethostname().partition(".")[0], os.getpid(), None, None, 0, 0)


def test_a_requeued_array_task_is_described(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.setenv("SLURM_PROCID", "3")
    job = settings.job()
    assert (job.job_id, job.array_task_id, job.restart_count, job.process) == ("4711", 0, 2, 3)


def test_a_task_number_that_is_none_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7a")
    with pytest.raises(ValueError, match=r"SLURM_ARRAY_TASK_ID.*'7a'"):
        settings.job()
