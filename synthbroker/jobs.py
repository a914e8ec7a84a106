"""SLURM's own commands: only this module runs sbatch, squeue, scancel and sinfo, and turns their words into ours."""

import os
import re
import subprocess
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from synthbroker import settings
from synthbroker.errors import SlurmError

PATIENCE_S = 120.0  # SLURM's own, for a controller that is busy, is about as long
ENDED = frozenset({
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT",
})  # fmt: skip
_COLUMNS = "%F|%i|%T|%r|%N|%M|%L|%Z"  # the folder comes last: it may hold anything

# What SLURM says, and what a person can do about it.
_CURES: tuple[tuple[str, str], ...] = (
    (r"invalid partition|No partition specified", "partitions here: {partitions}; say --partition=NAME"),
    (r"invalid (account|qos)", "`sacctmgr show associations user=$USER` lists yours; say --account=NAME or --qos=NAME"),
    (r"node configuration is not available|CPU count|Memory specification|More processors",
        "no node of that partition has so much; `sinfo -o '%P %D %c %m %G'` lists what they have (CPUs, MB, GPUs)"),
    (r"time limit", "`sinfo -o '%P %l'` lists the longest; say --time=H:MM:SS"),
    (r"contact slurm controller|Unable to contact|DNS SRV|configuration source", "does `sinfo` work on this machine?"),
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One job, or one task of an array, as SLURM has it.

    Attributes:
        job: Number of the job; of the array, for a task.
        id: The same, or like "13_2"; "13_[3-9%2]" are tasks that have not begun.
        state: SLURM's word: PENDING, RUNNING, COMPLETING, FAILED, …
        reason: Why it is pending, or has failed; "None" where there is nothing to say.
        nodes: Where it runs.
        elapsed, left: How long it has run, and may still run, as SLURM writes it.
        folder: Its working directory.
    """

    job: str
    id: str
    state: str
    reason: str
    nodes: str
    elapsed: str
    left: str
    folder: str

    @property
    def ended(self) -> bool:
        """Whether it is over; a job that is being stopped is not."""
        return self.state in ENDED


def submit(script: Path, folder: Path, options: Sequence[str]) -> str:
    """Submit a script to run in a folder; returns the number of the job.

    Raises:
        SlurmError: SLURM does not take it; says why, and what to do about it.
    """
    return _submit(["--chdir", str(folder), *options, str(script)], script.name)


def submit_cancelling(numbers: Sequence[str], folder: Path, options: Sequence[str]) -> str:
    """Submit a job that cancels others, otherwise as `submit`."""
    return _submit(["--chdir", str(folder), *options, "--wrap", f"scancel {' '.join(numbers)}"], "scancel")


def find(numbers: Collection[str]) -> list[Job]:
    """List what SLURM still knows of these jobs of ours, ended ones for some minutes; one line a task of an array.

    Raises:
        SlurmError: SLURM does not answer.
    """
    said = _run("squeue", "--noheader", "--states=all", f"--user={os.getuid()}", f"--format={_COLUMNS}")
    jobs = [Job(*line.split("|", 7)) for line in said.splitlines() if line.count("|") >= 7]
    return [job for job in jobs if job.job in numbers]


def cancel(numbers: Collection[str]) -> None:
    """Cancel jobs; those that have ended are passed over.

    Raises:
        SlurmError: SLURM refuses.
    """
    try:
        _run("scancel", *numbers)
    except SlurmError as error:
        if "Invalid job id" not in str(error):
            raise


def _submit(words: Sequence[str], what: str) -> str:
    said = _run("sbatch", "--parsable", *words, what=what).splitlines()
    number = said[-1].partition(";")[0].strip() if said else ""
    if not number.isdigit():
        raise SlurmError(f"sbatch took {what} and named no job: it said {said!r}")
    return number


def _run(program: str, *words: str, what: str = "") -> str:
    try:
        done = subprocess.run(
            [program, *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PATIENCE_S,
            check=False,
            env=settings.submission_environment(),
        )
    except FileNotFoundError as error:
        raise SlurmError(
            f"there is no {program} on the PATH: `synthbroker slurm` runs where you submit jobs, on a login node"
        ) from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SlurmError(f"cannot run {program}: {error}") from error
    if done.returncode != 0:
        raise SlurmError(_explain(program, what, done.stderr.strip() or done.stdout.strip()))
    return done.stdout.strip()


def _explain(program: str, what: str, said: str) -> str:
    lines = [line.partition("error: ")[2] or line for line in said.splitlines() if line.strip()]
    text = f"{program} refuses{f' {what}' if what else ''}: {'; '.join(lines) or 'it does not say why'}"
    for pattern, cure in _CURES:
        if re.search(pattern, said, re.IGNORECASE):
            return f"{text}. {cure.format(partitions=_partitions())}" if "{partitions}" in cure else f"{text}. {cure}"
    return text


def _partitions() -> str:
    with suppress(SlurmError):
        return ", ".join(dict.fromkeys(_run("sinfo", "--noheader", "--format=%R").split()))
    return "see `sinfo`"
