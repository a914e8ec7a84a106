"""A run on a SLURM cluster: a broker, generators and a training, submitted together, looked at, and torn down.

A run is a folder on the file system that all nodes share. `init` puts the templates of `slurm/` there, for the user to
edit; `up` submits them. Beside them then lie `logs/`; `broker.json`, by which all find the broker; and `jobs.json`, one
JSON object that says which jobs are this run's:

```
{"format": "synthbroker-run", "version": 1,
 "jobs": {"broker": "12", "generators": "13", "train": "14"},      numbers of SLURM jobs
 "logs": {"broker": "logs/broker-%j.out", …}}                        where they write, as sbatch takes it
```
"""

import json
import logging
import re
import shlex
import shutil
import threading
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from synthbroker import claim, endpoint, jobs, monitor, probe, settings, troubles
from synthbroker.errors import EndpointError, SlurmError, SynthbrokerError
from synthbroker.jobs import Job
from synthbroker.states import RingStatus

ROLES = ("broker", "generators", "train")
DOWN_S = 120.0
_FORMAT = "synthbroker-run"
_VERSION = 1
_LOGS = {
    "broker": "broker-%j.out",
    "generators": "generators-%A_%a.out",
    "train": "train-%j.out",
    "down": "down-%j.out",
}
_LOG_FLAGS = {"-o": "output", "--output": "output", "-e": "error", "--error": "error"}
_LARGEST_FILE_BYTES = 64 * 1024

Flags = str | Sequence[str]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """The jobs of one run.

    Attributes:
        folder: Where it lives; absolute.
        jobs: Number of the SLURM job, by role: "broker", "generators", "train", "down".
        logs: Where that job writes, relative to `folder`, with sbatch's %j and the like.
    """

    folder: Path
    jobs: dict[str, str]
    logs: dict[str, str]

    def log(self, job: Job) -> Path:
        """Say where a job, or a task of an array, writes."""
        role = next(role for role, number in self.jobs.items() if number == job.job)
        task = job.id.partition("_")[2]
        return self._log(role, task if task.isdigit() else "%a")

    def logs_of(self, role: str) -> Path:
        """Say where a role's job writes; an array's with a * for the task, as a shell takes it."""
        return self._log(role, "*")

    def _log(self, role: str, task: str) -> Path:
        words = {"%j": self.jobs[role], "%A": self.jobs[role], "%a": task}
        return self.folder / re.sub("%[jAa]", lambda found: words[found[0]], self.logs[role])


@dataclass(frozen=True)
class RunStatus:
    """A run at one instant.

    Attributes:
        run: Its jobs.
        jobs: What SLURM says of them; those that ended some minutes ago are forgotten.
        troubles: A sentence for each job that failed, or that wrote nothing, with the end of its log.
        broker: Where the broker answers, or why it does not, as a sentence.
        rings: What it holds; empty where it does not answer.
    """

    run: Run
    jobs: tuple[Job, ...]
    troubles: tuple[str, ...]
    broker: str
    rings: tuple[RingStatus, ...] = field(default=())


def templates() -> Path:
    """Say where the templates are: in the installed package, or in the clone that it is run from."""
    package = Path(__file__).parent
    return next(folder for folder in (package / "slurm_templates", package.parent / "slurm") if folder.is_dir())


def init(folder: str | Path = ".") -> list[Path]:
    """Copy the templates into a folder, to be edited there; files that are there already are left as they are.

    Returns:
        What was copied.

    Raises:
        ValueError: The folder's name would not do in an endpoint file's URL.
    """
    there = _folder(folder)
    there.mkdir(parents=True, exist_ok=True)
    missing = [path for path in sorted(templates().iterdir()) if not (there / path.name).exists()]
    return [Path(shutil.copy(path, there / path.name)) for path in missing]


def up(
    folder: str | Path = ".",
    *,
    sbatch: Flags = (),
    broker: Flags = (),
    generators: Flags = (),
    train: Flags = (),
    without: Collection[str] = (),
    down_after: bool = False,
) -> Run:
    """Submit the jobs of a run; generators and training start after the broker has.

    Works on a login node, in a notebook, and within an allocation, of which the jobs know nothing. They get the
    environment of this process, so that variables of the templates can be set there.

    Args:
        folder: Holds the templates, on the file system that all nodes share; `init` puts them there.
        sbatch: More flags of sbatch for all jobs, as a shell would take them or one by one.
        broker, generators, train: More for that one job.
        without: Roles that are left out; of a run that is up those stay as they are, so that what has ended can be
            submitted again by itself.
        down_after: Cancel the others when the training has ended, by a small job that waits for that.

    Raises:
        ValueError: The folder lacks a template, or an argument cannot be.
        SlurmError: A job was refused, and those before it are cancelled; or the run is up already.
    """
    there, flags = _folder(folder), {"broker": broker, "generators": generators, "train": train}
    roles = _chosen(there, without, down_after=down_after)
    kept = _still_up(there, roles)
    run = Run(there, dict(kept.jobs), dict(kept.logs))
    try:
        for role in roles:
            _submit(run, role, [*_words(sbatch), *_words(flags[role])])
        if down_after:
            _submit_down(run, _words(sbatch))
    except BaseException:
        submitted = [number for role, number in run.jobs.items() if number != kept.jobs.get(role)]
        if submitted:
            jobs.cancel(submitted)
            _write(kept)
        raise
    return run


def status(folder: str | Path = ".") -> RunStatus:
    """Look at a run: its jobs, its broker, and how full its rings are; of jobs submitted by hand: the latter two.

    Raises:
        ValueError: There is no run in the folder.
        SlurmError: SLURM does not answer.
    """
    there = _folder(folder)
    by_hand = not _state_path(there).exists() and (there / "broker.json").exists()
    run = Run(there, {}, {}) if by_hand else read(there)
    order = list(run.jobs.values())
    found = tuple(sorted(jobs.find(order), key=lambda job: order.index(job.job)))
    broker, rings = _look_at_broker(run.folder)
    return RunStatus(run, found, tuple(troubles.of_jobs(found, run.log)), broker, rings)


def down(folder: str | Path = ".", *, wait_s: float = DOWN_S) -> list[str]:
    """Cancel all jobs of a run, wait until they are gone, and remove its endpoint file. Logs and rings on disk stay.

    A job of the run that this is called from is left to end by itself.

    Args:
        folder: The run's.
        wait_s: How long the jobs may take to end, in seconds.

    Returns:
        Numbers of the jobs that were still there.

    Raises:
        ValueError: There is no run in the folder.
        SlurmError: SLURM refuses, or jobs are still there after `wait_s`.
    """
    run = read(folder)
    living = _living(run)
    if living:
        jobs.cancel(living)
        _await_end(run, wait_s)
    _remove_endpoint(run.folder / "broker.json")
    _state_path(run.folder).unlink(missing_ok=True)
    return living


def read(folder: str | Path) -> Run:
    """Read which jobs belong to the run in a folder.

    Raises:
        ValueError: There is no run, or the file is none of ours.
    """
    there = _folder(folder)
    path = _state_path(there)
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(_LARGEST_FILE_BYTES))
    except FileNotFoundError as error:
        raise ValueError(f"no run was started in {there}: `synthbroker slurm up {there}` does") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict) or (content.get("format"), content.get("version")) != (_FORMAT, _VERSION):
        raise ValueError(f"{path} is not of this version of `synthbroker slurm`")
    run = Run(there, content.get("jobs", {}), content.get("logs", {}))
    if not _are_like(r"[0-9]{1,20}", run.jobs) or not _are_like(r"[^\0]+", run.logs) or {*run.jobs} != {*run.logs}:
        raise ValueError(f"{path} names no jobs that could be")
    return run


def _are_like(pattern: str, value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(text, str) and re.fullmatch(pattern, text, re.ASCII) for text in value.values()
    )


def _write(run: Run) -> None:
    path = _state_path(run.folder)
    if not run.jobs:
        path.unlink(missing_ok=True)
        return
    content = {"format": _FORMAT, "version": _VERSION, "jobs": run.jobs, "logs": run.logs}
    new = path.with_name(f".{path.name}.new")
    new.write_text(json.dumps(content, indent=1) + "\n")
    new.replace(path)


def _state_path(folder: Path) -> Path:
    return folder / "jobs.json"


def _folder(folder: str | Path) -> Path:
    there = Path(folder).expanduser().absolute()
    if re.search(r"[%#?|\s]", str(there)):
        raise ValueError(f"a run's path becomes part of a URL: it may hold no space and none of %#?|, got {there}")
    return there


def _words(flags: Flags) -> list[str]:
    return shlex.split(flags) if isinstance(flags, str) else list(flags)


def _after(kind: str, number: str | None) -> list[str]:
    # Without the second word, a job whose predecessor was cancelled would wait for ever.
    return [f"--dependency={kind}:{number}", "--kill-on-invalid-dep=yes"] if number else []


def _chosen(folder: Path, without: Collection[str], *, down_after: bool) -> list[str]:
    unknown = set(without) - set(ROLES)
    if unknown:
        raise ValueError(f"there is no job {min(unknown)!r} to leave out, only {', '.join(ROLES)}")
    roles = [role for role in ROLES if role not in without]
    if down_after and "train" not in roles:
        raise ValueError("what is taken down after the training needs a training")
    missing = [name for name in (*(f"{role}.sbatch" for role in roles), "env.sh") if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} has no {missing[0]}: `synthbroker slurm init {folder}` puts it there")
    return roles


def _still_up(folder: Path, roles: Collection[str]) -> Run:
    """Give what lives of the run in the folder; none of it may be what is to be submitted."""
    nothing = Run(folder, {}, {})
    if not _state_path(folder).exists():
        return nothing
    run = read(folder)
    living = _living(run)
    kept = {role: number for role, number in run.jobs.items() if number in living}
    if not kept:
        return nothing
    if not kept.keys().isdisjoint(roles):
        leave = " ".join(f"--without={role}" for role in ROLES if role in kept)
        raise SlurmError(
            f"{folder} has a run already, jobs {', '.join(living)}: `synthbroker slurm down {folder}` ends it; "
            f"{leave} leaves these as they are; another run needs a folder of its own"
        )
    return Run(folder, kept, {role: run.logs[role] for role in kept})


def _submit(run: Run, role: str, words: Sequence[str]) -> None:
    run.logs[role] = _prepare_log(run.folder, words, f"logs/{_LOGS[role]}")
    options = [f"--output={run.logs[role]}", *_after("after", run.jobs.get("broker")), *words]
    run.jobs[role] = jobs.submit(run.folder / f"{role}.sbatch", run.folder, options)
    _write(run)


def _submit_down(run: Run, words: Sequence[str]) -> None:
    others = [number for role, number in run.jobs.items() if role != "train"]
    run.logs["down"] = f"logs/{_LOGS['down']}"
    options = ["--job-name=sb-down", f"--output={run.logs['down']}", *_after("afterany", run.jobs["train"]), *words]
    run.jobs["down"] = jobs.submit_cancelling(others, run.folder, options)
    _write(run)


def _prepare_log(folder: Path, words: Sequence[str], usual: str) -> str:
    """Make the folder that the log goes to: without it a job fails, and nothing says why."""
    said = {"output": usual}
    for word, following in zip(words, [*words, ""][1:], strict=True):
        flag, _, value = word.partition("=")
        if flag in _LOG_FLAGS:
            said[_LOG_FLAGS[flag]] = value or following
    for log in said.values():
        parent = (folder / log).parent
        if "%" not in str(parent):
            parent.mkdir(parents=True, exist_ok=True)
    return said["output"]


def _of_run(run: Run) -> list[Job]:
    """List the run's jobs that are still there; a stranger's, where SLURM counts anew, has another folder."""
    here = str(run.folder.resolve())
    own = settings.job().job_id
    found = [job for job in jobs.find(run.jobs.values()) if not job.ended and job.job != own]
    return [job for job in found if str(Path(job.folder).resolve()) == here]


def _living(run: Run) -> list[str]:
    return list(dict.fromkeys(job.job for job in _of_run(run)))


def _await_end(run: Run, wait_s: float) -> None:
    """Ask until they are gone; squeue is the only one that tells, and it should not be asked all the time."""
    end, pause_s = time.monotonic() + wait_s, 0.2
    while left := _of_run(run):
        if time.monotonic() > end:
            names = ", ".join(f"{job.id} ({job.state})" for job in left)
            raise SlurmError(f"still there {wait_s:.0f} s after they were cancelled: {names}; `squeue --me` shows them")
        threading.Event().wait(pause_s)
        pause_s = min(2 * pause_s, 5.0)


def _remove_endpoint(path: Path) -> None:
    with suppress(EndpointError):
        left = endpoint.read(path)
        if not probe.answers(left, patience_s=3.0):
            claim.remove_own(path, left.identity)
        else:
            ending = f"`scancel {left.job_id}` ends it" if left.job_id else f"it is process {left.pid} there"
            _log.warning(
                "%s stays: a server that this run did not start answers on %s; %s", path, left.host_name, ending
            )


def _look_at_broker(folder: Path) -> tuple[str, tuple[RingStatus, ...]]:
    path = folder / "broker.json"
    try:
        named = endpoint.read(path)
        rings = monitor.rings(url=path.as_uri())
    except SynthbrokerError as error:
        return str(error), ()
    of_job = f", job {named.job_id}" if named.job_id else ""
    return f"{endpoint.redact(named.url())} on {named.host_name}{of_job}, since {named.started}", rings
