"""A server that keeps its rings on disk: what is written there, how much of it, and what is kept between its lives.

Redis appends each command to a log (AOF), payloads included, and reads it when it starts. A ring overwrites itself all
the time, so the log grows with what went through, not with what is there; it is written anew, as short as it can be,
when it has grown by `REWRITE_GROWTH_PERCENT` since the last time (and beyond `REWRITE_FROM_BYTES`). So, with a
full ring of R bytes, and W bytes that come while a rewrite runs, the log is at most 3 R + W: the last rewrite, as much
again since then, and the next rewrite in the making. Memory: a rewrite is a fork, which keeps the ring as it was when
it began while the ring goes on; what is overwritten meanwhile is there twice, at worst the whole ring. So a durable
server takes less of the machine's memory (`MEMORY_SHARE`).

When the log reaches the disk is `fsync`'s to say:

| `fsync` | a killed server loses | a power cut loses | a full disk |
| --- | --- | --- | --- |
| "everysec" | nothing; up to 2 s where the disk is busy | up to 2 s | nothing is taken (MISCONF) until there is room |
| "always" | nothing | nothing | Redis ends by itself: it cannot keep its word |

Beside the log, the folder holds `endpoint.json`: address and password, so that a server that is started again there is
found by those who knew it before.
"""

import fcntl
import logging
import shutil
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from synthbroker import claim
from synthbroker import endpoint as endpoint_file
from synthbroker.endpoint import Endpoint
from synthbroker.errors import EndpointError, ServerStartError
from synthbroker.units import format_size

FSYNC = ("everysec", "always")
MEMORY_SHARE = 0.4
DISK_SHARE = 3  # times the memory of a full ring
REWRITE_GROWTH_PERCENT = 100
REWRITE_FROM_BYTES = 256 * 2**20
LEAVES_S = 180.0  # a lock of a node that is off is let go by the file system's server, NFS after 90 s
TORN = "aof-load-truncated is enabled"  # what Redis says when it has cut a log, of whatever version
REWRITTEN = "Background AOF rewrite finished successfully"
_LOOK_EVERY_S = 0.5
_SLOWEST_DISK_BYTES_PER_S = 50_000_000

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Durable:
    """Keep rings over the end of the server.

    Attributes:
        folder: Where; only one server at a time.
        fsync: "everysec" or "always"; see the table above.
    """

    folder: Path
    fsync: str = "everysec"

    def __post_init__(self) -> None:
        if self.fsync not in FSYNC:
            raise ValueError(f"fsync must be one of {FSYNC}, got {self.fsync!r}")

    def settings(self) -> list[tuple[object, ...]]:
        """List the lines of redis.conf that make it so."""
        return [
            ("appendonly", "yes"),
            ("appendfsync", self.fsync),
            ("no-appendfsync-on-rewrite", "no"),
            ("auto-aof-rewrite-percentage", REWRITE_GROWTH_PERCENT),
            ("auto-aof-rewrite-min-size", REWRITE_FROM_BYTES),
            ("aof-load-truncated", "yes"),  # what was being written when the power went
        ]

    def occupy(self) -> IO[bytes]:
        """Make the folder, and take it for this process, until the file that comes back is closed.

        Raises:
            ServerStartError: Another server has it, or it cannot be made.
        """
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = self._try_lock()
        except OSError as error:
            raise ServerStartError(f"cannot keep rings in {self.folder}: {error}") from error
        if lock is None:
            raise ServerStartError(
                f"another server keeps its rings in {self.folder}{self._who()}: stop that one, or give this one "
                f"another folder. If that one's node is off for certain: remove {self.folder / 'lock'}"
            )
        return lock

    def take_over(self, path: Path, stop: threading.Event) -> None:
        """Have the former life of this job leave the folder, if it is there, and wait for that.

        It lingers on a node that SLURM has lost; `claim.check_own` ends it. Where it does not leave, `occupy` says so.

        Args:
            path: The endpoint file of both.
            stop: Ends the wait.

        Raises:
            EndpointError: The endpoint file cannot be written.
        """
        former, end = self.former(), time.monotonic() + LEAVES_S
        if former is None or not claim.is_of_former_life(former) or not self._is_occupied():
            return
        claim.announce_successor(path, former)
        _log.warning("a former life of this job%s still has %s: waiting up to %.0f s until it has ended",
                     self._who(), self.folder, LEAVES_S)  # fmt: skip
        while self._is_occupied() and time.monotonic() < end and not stop.is_set():
            threading.Event().wait(_LOOK_EVERY_S)

    def _is_occupied(self) -> bool:
        with suppress(OSError):
            lock = self._try_lock()
            if lock is None:
                return True
            lock.close()
        return False

    def _try_lock(self) -> IO[bytes] | None:
        lock = (self.folder / "lock").open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return None
        except BaseException:
            lock.close()
            raise
        return lock

    def _who(self) -> str:
        former = self.former()
        if former is None:
            return ""
        of_job = f" of job {former.job_id}" if former.job_id else ""
        return f" (process {former.pid}{of_job} on {former.host_name}, since {former.started})"

    def former(self) -> Endpoint | None:
        """Read the endpoint of the server that was here before."""
        with suppress(EndpointError):
            return endpoint_file.read(self.folder / "endpoint.json")
        return None

    def remember(self, endpoint: Endpoint) -> None:
        """Keep the endpoint for the next server here."""
        endpoint_file.write(self.folder / "endpoint.json", endpoint)

    def check_disk(self, maxmemory_bytes: int) -> None:
        """Warn where a full server would not fit the disk."""
        free = shutil.disk_usage(self.folder).free + self.log_bytes()
        if free < DISK_SHARE * maxmemory_bytes:
            _log.warning(
                "%s has room for %s, but rings of %s, which this server may hold, take up to %s there. When the "
                "disk is full nothing more is taken: use a larger disk, or --maxmemory %s",
                self.folder,
                format_size(free),
                format_size(maxmemory_bytes),
                format_size(DISK_SHARE * maxmemory_bytes),
                format_size(free // DISK_SHARE).replace(" ", ""),
            )

    def log_bytes(self) -> int:
        """Say how large the log is now."""
        total = 0
        for path in self.folder.rglob("*"):
            if path.suffix in (".aof", ".rdb"):
                with suppress(OSError):  # a rewrite has just removed it
                    total += path.stat().st_size
        return total

    def loading_s(self) -> float:
        """Say how long reading the log may take."""
        return self.log_bytes() / _SLOWEST_DISK_BYTES_PER_S
