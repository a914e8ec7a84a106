"""Where a bench runs: the machine, and a server of its own or one that is given."""

import os
import platform
import secrets
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import redis

import synthbroker as sb
from synthbroker import admin, books, endpoint, machine, server
from synthbroker.bench.loads import PATIENCE_S
from synthbroker.bench.processes import Troupe
from synthbroker.connection import Connection
from synthbroker.errors import RingMissingError, ServerRefusedError
from synthbroker.server import ServerConfig
from synthbroker.units import format_size

_QUICK_NOTE = "quick run: small and short, to see that it works; its figures are no measures"


@dataclass(frozen=True)
class Place:
    """Where and how long measures run.

    Attributes:
        url: The server, by its unix socket if it has one.
        tcp_url: The same server by TCP, None if it has no TCP port or is reached through TLS.
        folder: For sockets; gone afterwards.
        seconds: How long one run takes.
        quick: Everything once and small, for no accuracy.
        troupe: Its processes.
    """

    url: str
    tcp_url: str | None
    folder: Path
    seconds: float
    quick: bool
    troupe: Troupe = field(repr=False)

    @property
    def patience_s(self) -> float:
        """Say when a run is given up."""
        return 2 * PATIENCE_S + 10 * self.seconds

    def scaled(self, count: int, quick: int) -> int:
        """Choose between a full and a quick count."""
        return quick if self.quick else count

    @contextmanager
    def ring(self) -> Iterator[str]:
        """Give the name of a ring, and remove that afterwards."""
        name = f"bench-{secrets.token_hex(6)}"
        try:
            yield name
        finally:
            with suppress(RingMissingError):
                admin.drop(name, url=self.url)

    def memory(self) -> dict[str, Any]:
        """Ask the server what memory it uses."""
        return _info(self.url, "memory")


@contextmanager
def at(url: str | None, *, seconds: float, quick: bool) -> Iterator[Place]:
    """Use the server at `url`, or start one that ends afterwards.

    Raises:
        SynthbrokerError, ValueError: There is no server, or the URL is none.
    """
    troupe = Troupe(keep=quick)
    with tempfile.TemporaryDirectory(prefix="synthbroker-") as folder, _server(url, Path(folder)) as (near, tcp):
        try:
            yield Place(near, tcp, Path(folder), seconds, quick, troupe)
            troupe.close()
        finally:
            troupe.kill()


@contextmanager
def _server(url: str | None, folder: Path) -> Iterator[tuple[str, str | None]]:
    if url is not None:
        given = endpoint.resolve(url)
        _check(given)
        yield given, given if given.startswith("redis:") else None
        return
    path = folder / "redis.sock"
    if len(os.fsencode(path)) > server.LONGEST_SOCKET_PATH:
        with server.start() as own:
            yield own.url, own.url
        return
    with server.start(ServerConfig(unix_socket=path)) as own:
        yield replace(own.endpoint, host=None, port=None, unix_socket=str(path)).url(), own.url


def _check(url: str) -> None:
    """See that a server answers, with our own errors where it does not."""
    connection = Connection(url)
    try:
        books.server_memory(connection)
    finally:
        connection.close()


def describe(place: Place) -> dict[str, Any]:
    """Name the machine, the server and the versions, for the head of the table."""
    said = _info(place.url, "server")
    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu": _cpu(),
        "memory": format_size(machine.memory_limit_bytes()),
        "system": platform.system(),
        "server": f"{said.get('server_name', 'redis')} {said.get('valkey_version', said['redis_version'])}",
        "allocator": place.memory().get("mem_allocator", "unknown"),
        "reached_by": place.url.partition(":")[0],
        "python": sys.version.split()[0],
        "torch": _version("torch"),
        "redis_py": _version("redis"),
        "hiredis": _version("hiredis"),
        "synthbroker": sb.__version__,
        "note": _QUICK_NOTE if place.quick else None,
    }


def _info(url: str, section: str) -> dict[str, Any]:
    try:
        with redis.Redis.from_url(url) as client:
            return dict(client.info(section))
    except redis.RedisError as error:
        raise ServerRefusedError(f"{endpoint.redact(url)} does not say how it is (INFO {section}): {error}") from error


def _cpu() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None
