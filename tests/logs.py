"""A server that comes back with less than it had: as after a power cut, or as a replica that lacks the last commits."""

from pathlib import Path

import redis

from servers import RealServer, eventually

KEEPS_ALL = {"appendonly": "yes", "appendfsync": "always"}  # what it answered is in its log
Mark = dict[Path, int]


def mark(server: RealServer) -> Mark:
    """Remember how far the server's log is now."""
    return {path: path.stat().st_size for path in server.directory.rglob("*.aof")}


def come_back_as_of(server: RealServer, then: Mark) -> None:
    """Kill the server and start it with what it knew at an earlier time."""
    server.kill()
    for path, size in then.items():
        with path.open("r+b") as log:
            log.truncate(size)
    server.restart()
    eventually(lambda: _has_read(server), "it has read its log")


def _has_read(server: RealServer) -> bool:
    try:
        return bool(server.client().ping())
    except redis.exceptions.BusyLoadingError:
        return False
