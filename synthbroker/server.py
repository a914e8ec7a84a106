"""Find a Redis (or Valkey) server program and run it, set up for rings.

The server listens on loopback with a random password, keeps nothing on disk (unless it is `durable`), never evicts by
itself, and ends with the process that started it, also when that is killed (on Linux). All its files lie in a fresh
folder, removed by `stop` (only after a kill that folder stays: a log, and the password of a server that is no more).

Of the memory that the machine or the cgroup allows it takes `MEMORY_SHARE` at most: clients' buffers, parts under way
and fragmentation come on top of what Redis counts, and what is above the limit is killed without a word.
"""

import ipaddress
import logging
import os
import re
import secrets
import shutil
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from synthbroker import claim, durable, probe, settings
from synthbroker import endpoint as endpoint_file
from synthbroker.child import Child
from synthbroker.durable import Durable
from synthbroker.endpoint import Endpoint
from synthbroker.errors import ServerGoneError, ServerStartError
from synthbroker.machine import find_server, free_port, memory_limit_bytes
from synthbroker.tls import Tls
from synthbroker.units import format_duration, format_size

MEMORY_SHARE = 0.7
LEAST_MEMORY_BYTES = 4_000_000  # an empty Redis takes one or two
PORT_ATTEMPTS = 5
LOOK_EVERY_S = 5.0  # at the endpoint file
SIGNAL_COMES_S = 2.0  # SLURM tells all processes of a job to end: the server may have heard it first
_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # listening on all addresses: this one is then ours, too
_NO_TLS = r"tls-port|Failed finding TLS support"  # before Redis 8, and since
LONGEST_SOCKET_PATH = 103  # bytes; Linux takes 107, macOS 103

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerConfig:
    """How to run a server.

    Attributes:
        host: Address to listen on.
        port: TCP port; 0 chooses a free one, None listens on `unix_socket` only.
        unix_socket: Absolute path of a socket to listen on as well.
        password: None makes one up; an empty one is taken on loopback only.
        maxmemory_bytes: What Redis may hold; None takes `MEMORY_SHARE` of `memory_limit_bytes()`.
        start_s: How long it may take until it answers.
        tls: Encrypts what goes through the port, and only that.
        durable: Keeps its rings for the next server in the same folder; None keeps nothing.
    """

    host: str = "127.0.0.1"
    port: int | None = 0
    unix_socket: Path | None = None
    password: str | None = field(default=None, repr=False)
    maxmemory_bytes: int | None = None
    start_s: float = 30.0
    tls: Tls | None = None
    durable: Durable | None = None


class Server:
    """A running server of our own; a context manager that stops it.

    Attributes:
        endpoint: Where it is, and how to log in.
        ended: Set when its process has ended, for whatever reason.
    """

    def __init__(self, child: "Child", endpoint: Endpoint, home: "_Home") -> None:
        self.endpoint = endpoint
        self.ended = child.ended
        self._child = child
        self._home = home

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The Redis URL, password included."""
        return self.endpoint.url()

    @property
    def status(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        return self._child.status

    def log_tail(self) -> str:
        """Return the last lines that the server wrote."""
        return self._child.log_tail()

    def stop(self, *, wait_s: float = 10.0) -> None:
        """End the server and remove its folder; twice is fine.

        Args:
            wait_s: How long it may take to end by itself before it is killed.
        """
        self._child.stop(wait_s)
        self._home.leave()


def start(config: ServerConfig | None = None) -> Server:
    """Start a server and wait until it answers.

    Raises:
        ServerStartError: There is no program, the configuration is unsafe or cannot be, or the server did not come up;
            then the end of its log is in the message.
    """
    config = config or ServerConfig()
    program = find_server()
    maxmemory_bytes = _check(config)
    for _ in range(PORT_ATTEMPTS - 1):
        try:
            return _launch(program, config, maxmemory_bytes)
        except _PortTakenError:
            if config.port != 0:
                raise
            _log.info("another process took the port that was free a moment ago: choosing another")
    return _launch(program, config, maxmemory_bytes)


def serve(
    config: ServerConfig,
    path: Path,
    *,
    stop: threading.Event,
    announce: Callable[[Endpoint], None],
    more: Sequence[Path] = (),
) -> None:
    """Run a server until `stop` is set, with its endpoint file in place meanwhile.

    The caller's signal handler may set `stop`: this thread never holds that event's lock.

    Args:
        config: How to run it.
        path: Where the endpoint file goes.
        stop: Ends the server.
        announce: Called once, when the server answers and the file is there.
        more: Endpoint files that `announce` writes, for other users of the same server.

    Raises:
        ServerStartError: As `start`, or the endpoint file belongs to another server that still answers.
        ServerGoneError: The server ended by itself; the end of its log is in the message.
        EndpointError: The endpoint file cannot be written, or names another server by now.
    """
    claim.refuse_to_replace(path)
    if config.durable:
        config.durable.take_over(path, stop)
    with start(config) as server:
        endpoint_file.write(path, server.endpoint)
        try:
            announce(server.endpoint)
            look_at = time.monotonic() + LOOK_EVERY_S
            while not stop.is_set():
                if time.monotonic() > look_at:
                    claim.check_own(path, server.endpoint.identity)
                    look_at = time.monotonic() + LOOK_EVERY_S
                if server.ended.wait(0.2):
                    if server.status == 0 and stop.wait(SIGNAL_COMES_S):
                        break
                    raise ServerGoneError(
                        f"the server ended by itself, with status {server.status}; its last words:\n{server.log_tail()}"
                    )
        finally:
            if config.durable is None:  # else whoever comes meanwhile shall wait for the next server there
                for one in (path, *more):
                    claim.remove_own(one, server.endpoint.identity)


class _PortTakenError(ServerStartError):
    """The port was taken between choosing it and listening on it."""


class _Home:
    """The folder that a server's files lie in: a fresh one, or the one that it keeps its rings in."""

    def __init__(self, durable: Durable | None) -> None:
        self._lock = durable.occupy() if durable else None
        self.path = durable.folder.absolute() if durable else Path(tempfile.mkdtemp(prefix="synthbroker-"))  # mode 0700

    def leave(self) -> None:
        if self._lock is None:
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            self._lock.close()


def is_loopback(host: str) -> bool:
    """Say whether only this machine can reach what listens on an address."""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _check(config: ServerConfig) -> int:
    """Refuse what cannot be or would be unsafe; return the memory that the server gets, in bytes."""
    if config.password == "" and config.port is not None and not is_loopback(config.host):
        raise ServerStartError(
            f"a server on {config.host} without a password would be open to the network: leave the password out "
            "to have one made up, or listen on 127.0.0.1"
        )
    if config.port is None and config.unix_socket is None:
        raise ServerStartError("a server needs a port or a unix socket to listen on")
    if config.unix_socket and len(os.fsencode(config.unix_socket.absolute())) > LONGEST_SOCKET_PATH:
        raise ServerStartError(f"a socket's path has at most {LONGEST_SOCKET_PATH} bytes: {config.unix_socket}")
    if config.tls is not None:
        if config.port is None:
            raise ServerStartError("TLS is for a port: a server on a unix socket alone needs no certificates")
        config.tls.check()
    limit_bytes = memory_limit_bytes()
    if config.maxmemory_bytes is None:
        return int(limit_bytes * (durable.MEMORY_SHARE if config.durable else MEMORY_SHARE))
    if not LEAST_MEMORY_BYTES <= config.maxmemory_bytes <= limit_bytes:
        raise ServerStartError(
            f"maxmemory must lie between {format_size(LEAST_MEMORY_BYTES)} and the {format_size(limit_bytes)} that "
            f"this machine or cgroup has, got {format_size(config.maxmemory_bytes)}"
        )
    return config.maxmemory_bytes


def _launch(program: Path, config: ServerConfig, maxmemory_bytes: int) -> Server:
    home = _Home(config.durable)
    child = None
    try:
        if config.durable:
            config.durable.check_disk(maxmemory_bytes)
            config = replace(config, start_s=config.start_s + config.durable.loading_s())
        endpoint = _plan(config)
        config_path = home.path / "redis.conf"
        _write_private(config_path, _config_text(endpoint, config, home.path, maxmemory_bytes))
        child = Child(program, config_path, home.path / "redis.log")
        endpoint = replace(endpoint, pid=child.pid)
        _await_ready(child, endpoint, config)
        if config.durable:
            _mend_log(child, endpoint, config)
            config.durable.remember(endpoint)
    except BaseException:
        if child is not None:
            child.stop(0)
        home.leave()
        raise
    _log.info("server %s runs as process %d, at most %s", endpoint, endpoint.pid, format_size(maxmemory_bytes))
    return Server(child, endpoint, home)


def _plan(config: ServerConfig) -> Endpoint:
    """Choose port, password and identity; the process id is known later."""
    job = settings.job()
    former = config.durable.former() if config.durable else None
    password = config.password
    if password is None:
        password = former.password if former and former.password else secrets.token_urlsafe(24)
    port = config.port
    if port == 0:
        port = free_port(config.host, former.port if former else None)
    reachable = socket.gethostname() if config.host in _WILDCARDS else config.host
    return Endpoint(
        host=None if port is None else reachable,
        port=port,
        unix_socket=str(Path(config.unix_socket or "").absolute()) if port is None else None,
        tls=config.tls is not None,
        user="default",
        password=password,
        identity=secrets.token_hex(8),
        pid=1,
        host_name=job.host,
        job_id=job.job_id,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        ca=str(config.tls.ca.absolute()) if config.tls else None,
    )


def _config_text(endpoint: Endpoint, config: ServerConfig, directory: Path, maxmemory_bytes: int) -> str:
    lines: list[tuple[object, ...]] = [
        ("bind", config.host),
        *(config.tls.settings(endpoint.port or 0) if config.tls else [("port", endpoint.port or 0)]),
        ("protected-mode", "yes"),
        ("daemonize", "no"),
        ("dir", directory),
        ("logfile", ""),  # to its standard output, which is redis.log: so one file has what comes before the log, too
        ("syslog-ident", endpoint.identity),  # names this server, nothing else: it can be read but never be changed
        ("save", ""),
        *(config.durable.settings() if config.durable else [("appendonly", "no")]),
        ("maxmemory", maxmemory_bytes),
        ("maxmemory-policy", "noeviction"),
        # A reply is built in memory before it is sent: who asks for too much and does not read is cut off.
        ("client-output-buffer-limit", "normal", "1gb", 0, 0),
        ("proto-max-bulk-len", "512mb"),
        ("tcp-keepalive", 60),  # s; a node that lost power is noticed
        ("timeout", 0),  # nobody is cut off for being idle: a long validation is not a death
    ]
    if endpoint.password:
        lines.append(("requirepass", endpoint.password))
    if config.unix_socket is not None:
        lines += [("unixsocket", config.unix_socket.absolute()), ("unixsocketperm", "700")]
    return "".join(" ".join([str(name), *(_quote(value) for value in values)]) + "\n" for name, *values in lines)


def _quote(value: object) -> str:
    """Write a value as redis.conf takes it, whatever it holds."""
    plain = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789./_:-")
    return '"' + "".join(chr(byte) if byte in plain else f"\\x{byte:02x}" for byte in os.fsencode(str(value))) + '"'


def _write_private(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def _await_ready(child: Child, endpoint: Endpoint, config: ServerConfig) -> None:
    """Block until the server answers; its end wakes us at once."""
    end = time.monotonic() + config.start_s
    pause_s = 0.002
    while not _answers(endpoint, config):
        if child.ended.wait(pause_s):
            raise _ended_early(child)
        if time.monotonic() > end:
            raise ServerStartError(f"the server did not answer within {config.start_s} s; its log:\n{child.log_tail()}")
        pause_s = min(2 * pause_s, 0.1)


def _mend_log(child: Child, endpoint: Endpoint, config: ServerConfig) -> None:
    """Have a log written anew that was torn, as by a power cut, before anything is written behind what is left of it.

    Redis 7.0 leaves half a transaction in it where it was torn in the middle of one: it is not carried out now, but the
    next time that the log is read.
    """
    at = _WILDCARDS.get(config.host, config.host)
    while probe.loads(endpoint, patience_s=config.start_s, at=at):  # answers other questions meanwhile
        if child.ended.wait(0.05):
            raise _ended_early(child)
    if durable.TORN not in child.said():
        return
    _log.warning("the log in %s was torn in its last write; writing it anew", child.log_path.parent)
    end = time.monotonic() + config.start_s
    begun = probe.rewrite_log(endpoint, patience_s=config.start_s, at=at)
    while begun and durable.REWRITTEN not in child.said() and time.monotonic() < end:
        if child.ended.wait(0.05):
            raise _ended_early(child)
    if durable.REWRITTEN not in child.said():
        _log.warning("the log in %s was not written anew within %s: should the server end before it is, run "
                     "`redis-check-aof --fix` on it first; its log:\n%s",
                     child.log_path.parent, format_duration(config.start_s), child.log_tail())  # fmt: skip


def _ended_early(child: Child) -> ServerStartError:
    tail = child.log_tail()
    kind = _PortTakenError if "Address already in use" in tail else ServerStartError
    why = ": it was built without TLS (SYNTHBROKER_REDIS_SERVER names another one)" if re.search(_NO_TLS, tail) else ""
    return kind(f"{child.program} ended with status {child.status} while starting{why}; its last words:\n{tail}")


def _answers(endpoint: Endpoint, config: ServerConfig) -> bool:
    try:
        return probe.answers(endpoint, patience_s=1.0, at=_WILDCARDS.get(config.host, config.host))
    except ssl.SSLCertVerificationError as error:
        files = f"{config.tls.cert} and {config.tls.ca}" if config.tls else ""
        raise ServerStartError(
            f"clients that look for {endpoint.host} would refuse the certificate {files}: {error.verify_message}"
        ) from error
