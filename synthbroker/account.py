"""What a producer says of itself: how much it sent, how fast, and what it spent its time on."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from synthbroker import units
from synthbroker.pace import Pace
from synthbroker.settings import Job
from synthbroker.shares import Share


@dataclass(frozen=True)
class ProducerStats:
    """What one producer has done so far.

    Attributes:
        samples: Committed samples.
        payload_bytes: Their size on the wire.
        raw_bytes: Their size as tensors.
        blocked_s: Seconds spent waiting for room in the ring.
        quarantined: Samples that failed the checks of the ring, or their cast.
        rejoined: How often the server had lost the ring, or may have lost samples.
        lost_by_server: Committed samples that the server lost: those that it does not know after it came back with less
            than it had (exactly). Where it came back empty: those that at the last heartbeat were neither evicted
            nor acknowledged by all groups, so that some of them may have been used since.
    """

    samples: int = 0
    payload_bytes: int = 0
    raw_bytes: int = 0
    blocked_s: float = 0.0
    quarantined: int = 0
    rejoined: int = 0
    lost_by_server: int = 0


class Account:
    """Keeps one producer's account.

    Args:
        job: Who it is.
        stats: Gives what it has done so far.
        pace: How its samples get through.
        codecs: Gives the codec of each field, as far as one was chosen.

    Attributes:
        state: "alive", "closed" or "left".
    """

    def __init__(
        self, job: Job, stats: Callable[[], ProducerStats], pace: Pace, codecs: Callable[[], Mapping[str, str]]
    ) -> None:
        self.state = "alive"
        self._job, self._stats, self._pace, self._codecs = job, stats, pace, codecs
        self._began = time.monotonic()
        self._blocked, self._sending = Share(), Share()
        self._marks: dict[str, tuple[float, ProducerStats]] = {}  # what was sent when it was last told, and to whom
        self._generation_s, self._generated = 0.0, 0

    def generated(self, seconds: float) -> None:
        """Count a sample that was made in so many seconds."""
        self._generation_s += seconds
        self._generated += 1
        self._pace.generation_s = self._generation_s / self._generated

    def record(self) -> dict[str, Any]:
        """Write the record that `status` shows; rates are over the time since the last heartbeat."""
        job = self._job
        about: dict[str, Any] = {"host": job.host, "pid": job.pid, "state": self.state}
        if job.job_id is not None:
            about |= {"job_id": job.job_id, "array_task_id": job.array_task_id, "restart": job.restart_count}
        if self._generated:
            about["generation_s"] = round(self._pace.generation_s, 6)
        chosen = self._codecs()
        return about | self._since("heartbeat") | self._shares() | ({"codec": dict(chosen)} if chosen else {})

    def report(self) -> str:
        """Write a line for the log; rates are over the time since the last one."""
        sent, job = self._since("report"), self._job
        of = f" job {job.job_id}" if job.job_id is not None else ""
        return (
            f"{of}: {sent['samples']} samples, {sent['samples_per_s']:.1f}/s, "
            f"{units.format_size(sent['bytes_per_s'])}/s, blocked {sent['blocked_share']:.0%}, "
            f"quarantined {sent['quarantined']}, lost by the server {sent['lost_by_server']}"
        )

    def _shares(self) -> dict[str, Any]:
        """Say what it spends its time on."""
        self._blocked.update(self._stats().blocked_s)
        self._sending.update(self._pace.sending_s)
        return {
            "blocked_share": round(self._blocked.lately, 3),
            "blocked_ever_share": round(self._blocked.ever, 3),
            "sending_share": round(self._sending.lately, 3),
            "age_s": round(self._blocked.age_s, 1),
        }

    def _since(self, what: str) -> dict[str, Any]:
        """Say how much was sent, and at what rates since this was last asked for the same purpose."""
        sent, now = self._stats(), time.monotonic()
        then, before = self._marks.get(what, (self._began, ProducerStats()))
        self._marks[what] = (now, sent)
        passed_s = max(now - then, 1e-3)
        return {
            "samples": sent.samples,
            "samples_per_s": round((sent.samples - before.samples) / passed_s, 3),
            "bytes_per_s": round((sent.payload_bytes - before.payload_bytes) / passed_s),
            "blocked_share": round(min((sent.blocked_s - before.blocked_s) / passed_s, 1.0), 3),
            "quarantined": sent.quarantined,
            "lost_by_server": sent.lost_by_server,
        }
