"""What went wrong with the jobs of a run, read off their logs, in words that a person can act on.

The end of a log is mostly what others did when the first of them had failed: torchrun and srun end all ranks, and each
says so at length. So the first line that tells of an error is looked for as well, in what the job's last life wrote.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from synthbroker.jobs import Job

_READ_BYTES = 256 * 1024
_TAIL_LINES = 8
_MOST = 5  # kinds of trouble that are told
_NEW_LIFE = "DUE TO JOB REQUEUE"
# The death of a rank, as torchrun or the kernel tells it: the others then raise; else an exception of Python's.
_KILLED = re.compile(r"^\w+ .* failed \(exitcode: -(?!15\b)\d+\).*|.*oom-kill.*")  # -15: told to end by others
_RAISED = re.compile(r"^(\[rank\d+\]: ?)?[\w.]*(Error|Exception)\b.*")
_FOLLOWS = re.compile(r"\btorch\.distributed\.")
_VARIES = re.compile(r"\d+")  # times, process ids, tasks: what differs between jobs that fail for the same reason


def of_jobs(found: Iterable[Job], log_of: Callable[[Job], Path]) -> Iterator[str]:
    """Say of each job that failed what happened, and show the end of its log; jobs that are alike are told once."""
    alike: dict[str, list[tuple[Job, str]]] = {}
    for job in found:
        log = log_of(job)
        what = _trouble(job, log)
        if what:
            alike.setdefault(_VARIES.sub("", what.replace(str(log), "")), []).append((job, what))
    for ones in list(alike.values())[:_MOST]:
        more = f" (and {len(ones) - 1} more like it)" if len(ones) > 1 else ""
        job, what = ones[0]
        yield f"job {job.id}{more} {what}"
    left = list(alike.values())[_MOST:]
    if left:
        yield f"and {sum(map(len, left))} more jobs failed, {left[0][0][0].id} for example: see their logs"


def _trouble(job: Job, log: Path) -> str:
    if job.state in ("COMPLETED", "CANCELLED"):
        return ""
    if not log.parent.is_dir():
        return f"fails without a word: there is no folder {log.parent} for its log"
    return f"ended as {job.state}; {_end_of(log)}" if job.ended else ""


def _end_of(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _READ_BYTES))
            text = file.read().decode(errors="replace")
    except OSError as error:
        return f"its log cannot be read: {error}"
    lines = text.rpartition(_NEW_LIFE)[2].splitlines()
    tail = lines[-_TAIL_LINES:]
    told = (line for pattern in (_KILLED, _RAISED) for line in lines if pattern.match(line))
    first = next((line for line in told if not _FOLLOWS.search(line)), None)
    head = [] if first is None or first in tail else [first, "..."]
    return f"the end of {log}:\n" + ("\n".join(f"  {line}" for line in [*head, *tail]) or "  (it is empty)")
