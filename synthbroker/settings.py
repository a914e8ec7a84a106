"""What the environment says: the only module that reads it.

Nothing is read at import; every function reads anew, so that a changed environment counts.
"""

import os
import socket
from dataclasses import dataclass
from pathlib import Path

from synthbroker.errors import EndpointError

_MOST_RESTARTS = 1000  # by torchrun, in one life of a job

# What SLURM tells a process of the allocation that it runs in, which is none of a new job's business.
_OF_ALLOCATION = ("SLURM_", "SLURMD_", "SRUN_", "PMI_", "PMIX_", "CUDA_VISIBLE_DEVICES",
                  "GPU_DEVICE_ORDINAL", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")  # fmt: skip
_OF_CLUSTER = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")


@dataclass(frozen=True)
class Job:
    """Who this process is, for the records on the server and for the logs.

    Attributes:
        host: Short name of the machine.
        pid: Process id.
        job_id: SLURM job id (of an array's task: the task's own), None outside of SLURM.
        array_task_id: Number within a job array, None outside of one.
        restart_count: How often SLURM requeued the job.
        process: Number of this process within a job step that runs several (`srun -n`).
        array_job_id: SLURM id of the job array, None outside of one.
    """

    host: str
    pid: int
    job_id: str | None
    array_task_id: int | None
    restart_count: int
    process: int
    array_job_id: str | None = None

    @property
    def label(self) -> str:
        """Which life of which job: "4711r0", in an array "4711_3r0"; r1 after a restart; "" outside of a job."""
        if self.job_id is None:
            return ""
        array = self.array_job_id is not None and self.array_task_id is not None
        name = f"{self.array_job_id}_{self.array_task_id}" if array else self.job_id
        return f"{name}r{self.restart_count}"


def default_url() -> str:
    """Say where the server is when nobody said it.

    Returns:
        SYNTHBROKER_URL, else the URL of the default endpoint file.

    Raises:
        EndpointError: Neither is there.
    """
    url = _read("SYNTHBROKER_URL")
    if url is not None:
        return url
    path = default_endpoint_path()
    if not path.exists():
        raise EndpointError(
            f"no server is known: SYNTHBROKER_URL is not set and there is no endpoint file {path}. "
            "Start a server with `synthbroker serve`, or set SYNTHBROKER_URL to the URL of one"
        )
    return path.absolute().as_uri()


def default_endpoint_path() -> Path:
    """Say where `serve` writes the endpoint file: SYNTHBROKER_ENDPOINT, else ~/.synthbroker/broker.json.

    Raises:
        EndpointError: The path needs a home directory and there is none.
    """
    path = Path(_read("SYNTHBROKER_ENDPOINT") or "~/.synthbroker/broker.json")
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise EndpointError(f"no home directory for {path}: set SYNTHBROKER_ENDPOINT to a path") from error


def redis_server_path() -> str | None:
    """Name the Redis server program that the user asked for with SYNTHBROKER_REDIS_SERVER, if any."""
    return _read("SYNTHBROKER_REDIS_SERVER")


def job() -> Job:
    """Describe this process and the SLURM job that it belongs to, if any.

    Raises:
        ValueError: A SLURM variable that must be a whole number is none.
    """
    return Job(
        host=socket.gethostname().partition(".")[0],
        pid=os.getpid(),
        job_id=_read("SLURM_JOB_ID"),
        array_task_id=_read_int("SLURM_ARRAY_TASK_ID"),
        restart_count=_read_int("SLURM_RESTART_COUNT") or 0,
        process=_read_int("SLURM_PROCID") or 0,
        array_job_id=_read("SLURM_ARRAY_JOB_ID"),
    )


def job_end() -> float | None:
    """Say when SLURM ends this job, in seconds since 1970: SLURM_JOB_END_TIME; None where that is not said.

    SLURM says it since 23.02, and says it once: a time limit that is changed later does not count.

    Raises:
        ValueError: It is no whole number.
    """
    end = _read_int("SLURM_JOB_END_TIME")
    return None if end is None else float(end)


def rank() -> tuple[int, int] | None:
    """Say which of how many ranks this process is, as torchrun tells it; None where that is not said.

    Raises:
        ValueError: RANK or WORLD_SIZE is no whole number.
    """
    number, count = _read_int("RANK"), _read_int("WORLD_SIZE")
    return None if number is None or count is None else (number, count)


def run() -> tuple[str, int]:
    """Name the run that all ranks of a training belong to, and say which attempt at it this is.

    Returns:
        torchrun's run id, else SLURM's job, else the master's address and port, else nothing: ""; and a number that
        rises with each restart by SLURM, or by torchrun within one life of the job.

    Raises:
        ValueError: A count of restarts is no whole number.
    """
    elastic, job = _read("TORCHELASTIC_RUN_ID"), _read("SLURM_JOB_ID")
    requeued, restarted = _read_int("SLURM_RESTART_COUNT") or 0, _read_int("TORCHELASTIC_RESTART_COUNT") or 0
    attempt = requeued * _MOST_RESTARTS + restarted if job is not None else restarted
    if elastic not in (None, "none"):  # "none" is what torchrun says where the user did not name the run
        return f"torchrun-{elastic}", attempt
    if job is not None:
        return f"slurm-{job}", attempt
    address, port = _read("MASTER_ADDR"), _read("MASTER_PORT")
    return (f"{address or 'localhost'}-{port}" if port else ""), attempt


def job_memory_bytes() -> int | None:
    """Say how much memory SLURM gave this job on this node; None outside of one, and where it gave all there is.

    Raises:
        ValueError: A SLURM variable that must be a whole number is none.
    """
    per_node_mb, per_cpu_mb = _read_int("SLURM_MEM_PER_NODE"), _read_int("SLURM_MEM_PER_CPU")
    total_mb = per_node_mb or (per_cpu_mb or 0) * (_read_int("SLURM_CPUS_ON_NODE") or 0)
    return total_mb * 2**20 or None


def submission_environment() -> dict[str, str]:
    """Give the environment for SLURM's commands: ours, less what describes an allocation that we run in ourselves.

    A job would inherit how many nodes, tasks or CPUs the allocation has, and mix that up with its own. Filters for
    squeue, which would hide jobs, stay out as well.
    """
    out = ("SQUEUE_", *(_OF_ALLOCATION if _read("SLURM_JOB_ID") is not None else ()))
    return {name: value for name, value in os.environ.items() if name in _OF_CLUSTER or not name.startswith(out)}


def visible_gpus() -> int | None:
    """Count the GPUs that CUDA_VISIBLE_DEVICES names; None where it does not say."""
    text = _read("CUDA_VISIBLE_DEVICES")
    return None if text is None else len([name for name in text.split(",") if name.strip()])


def _read(name: str) -> str | None:
    """Read a variable; an empty one counts as not set."""
    return os.environ.get(name) or None


def _read_int(name: str) -> int | None:
    text = _read(name)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name} must be a whole number, got {text!r}") from None
