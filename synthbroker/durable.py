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
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from synthbroker import endpoint as endpoint_file
from synthbroker.endpoint import Endpoint
from synthbroker.errors import EndpointError, ServerStartError
from synthbroker.units import format_size

FSYNC = ("everysec", "always")
MEMORY_SHARE = 0.4
DISK_SHARE = 3  # times the memory of a full ring
REWRITE_GROWTH_PERCENT = 100
REWRITE_FROM_BYTES = 256 * 2**20
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
            lock = (self.folder / "lock").open("ab")
        except OSError as error:
            raise ServerStartError(f"cannot keep rings in {self.folder}: {error}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            raise ServerStartError(f"another server keeps its rings in {self.folder}: give this one another") from error
        return lock

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
