"""The way to the server: a pool of redis-py's connections, payloads past its parser, one owner of retries.

redis-py connects, authenticates, speaks TLS and parses small replies; `line` moves payloads.
"""

import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Lock, local
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from synthbroker import endpoint, tls
from synthbroker.errors import (
    EndpointError,
    EndpointMissingError,
    ServerError,
    ServerFullError,
    ServerGoneError,
    ServerRefusedError,
)
from synthbroker.line import SOCKET_TIMEOUT_S, Line

log = logging.getLogger("synthbroker")
_chance = random.SystemRandom()  # the state of the others is the user's

T = TypeVar("T")

LONGEST_BLOCK_MS = 1000
_CONNECT_TIMEOUT_S = 5.0
_FIRST_WAIT_S = 0.05
_LONGEST_WAIT_S = 5.0
_OLDEST_VERSION = (6, 2)
_RUN_ID = re.compile(rb"run_id:(\w+)")

# What an error reply begins with, or says: which of our errors it is. The first that fits counts.
_REPLIES: tuple[tuple[str, type[ServerError], str], ...] = (
    (r"OOM", ServerFullError, "it is at its memory limit"),
    (
        r"LOADING|MASTERDOWN|CLUSTERDOWN|TRYAGAIN|READONLY|MISCONF|BUSY |UNBLOCKED",
        ServerGoneError,
        "it cannot serve now",
    ),
    (r"NOAUTH|WRONGPASS|.*invalid password|.*without any password", ServerRefusedError, "wrong or missing password"),
    (r"NOPERM|.*no permissions|.*user executing the script can't", ServerRefusedError, "this user may not do that"),
    (r"MOVED|ASK ", ServerRefusedError, "it is one node of a cluster and another one holds this ring: give its URL"),
    (r".*unknown (command|subcommand)", ServerRefusedError, "it is older than Redis 6.2, or no Redis"),
    (r"WRONGTYPE", ServerRefusedError, "something else uses the ring's keys there"),
    (r"Protocol Error", ServerRefusedError, "it is not a Redis server"),
)
# The words that redis-py takes off, by the class of error that it makes of them.
_CODES = {
    redis.exceptions.AskError: "ASK",
    redis.exceptions.BusyLoadingError: "LOADING",
    redis.exceptions.ClusterDownError: "CLUSTERDOWN",
    redis.exceptions.NoPermissionError: "NOPERM",
    redis.exceptions.OutOfMemoryError: "OOM",
    redis.exceptions.ReadOnlyError: "READONLY",
    redis.exceptions.TryAgainError: "TRYAGAIN",
}
# What 6.2 puts before the error of a command in a script.
_IN_SCRIPT = re.compile(r"Error running script \(call to \w+\): (?:@user_script: ?\d+: )*-?")


class Connection:
    """A server that is connected to when it is first needed, and again whenever it went away.

    Args:
        url: A Redis URL, an endpoint file's URL, or None for what the environment says; read anew at each reconnect.
    """

    def __init__(self, url: str | None) -> None:
        self._url = url
        self._pool: redis.ConnectionPool | None = None
        self._identity: str | None = None  # of the server that the endpoint file names, if there is one
        self._lock = Lock()
        self._mine = local()  # each thread keeps the line it used last
        self.greet: Callable[[Line], None] | None = None  # what is said first on each new line
        self.where = endpoint.redact(url) if url else "the server"

    def call(self, *command: Any) -> Any:
        """Send one command with small arguments and return its reply, undecoded.

        Raises:
            ServerGoneError: No answer. It is unknown whether the command was carried out.
            ServerRefusedError: It will not serve us.
            ServerFullError: It is out of memory.
        """
        with self.line() as line:
            line.send(command)
            return line.reply()

    def script(self, name: str, key: str, *arguments: Any) -> Any:
        """Run one of the scripts on a ring's meta key; errors as for `call`."""
        with self.line() as line:
            return line.script(name, key, *arguments)

    @contextmanager
    def line(self) -> Iterator[Line]:
        """Borrow a line for commands and payloads; any error closes it."""
        with self.translating():
            line = self.borrow()
            try:
                yield line
            except BaseException:
                line.drop()
                raise
            self.give_back(line)

    def borrow(self) -> Line:
        """Give the line that this thread used last, or a new one. It comes back, or is dropped where it failed."""
        pool = self._open()
        idle = self._idle()
        line = idle.pop() if idle else None
        if line is not None and line.pid != os.getpid():
            line = None  # the parent's
        if line is not None and line.pool is not pool:
            line.drop()
            line = None
        return line or self._new_line(pool)

    def _new_line(self, pool: redis.ConnectionPool) -> Line:
        with self._strangers_are_passing():
            line = Line(pool.get_connection(), self.where, pool)
        try:
            if self.greet is not None:
                self.greet(line)
        except BaseException:
            line.drop()
            raise
        return line

    def give_back(self, line: Line) -> None:
        """Keep a line, on which nothing is under way, for this thread."""
        if line.is_cut:
            line.drop()
        else:
            self._idle().append(line)

    def _idle(self) -> list[Line]:
        idle: list[Line] = self._mine.__dict__.setdefault("idle", [])
        return idle

    def close(self) -> None:
        """Close all connections, also under threads that wait for an answer; the next call opens new ones."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.disconnect()

    def _renew(self) -> None:
        """Read the URL again at the next call; connections that other threads are using stay theirs."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.disconnect(inuse_connections=False)

    def keep_trying(self, attempt: Callable[[], T], reconnect_s: float, stop: Event) -> T:
        """Repeat an attempt, which must be safe to repeat, while the server is gone, or not there yet.

        Args:
            attempt: What to do.
            reconnect_s: How long to try, counted from the first failure.
            stop: Ends the trying at once.

        Raises:
            ServerGoneError: Still gone after `reconnect_s`; names the server and the last cause.
        """
        gone_since: float | None = None
        told = ""
        wait_s = _FIRST_WAIT_S
        while True:
            try:
                result = attempt()
            except (ServerGoneError, EndpointError) as error:
                if stop.is_set() or (gone_since is None and _is_mistake(error)):
                    raise
                now = time.monotonic()
                gone_since = gone_since or now
                left_s = gone_since + reconnect_s - now
                if str(error) != told:  # the cause changes: gone, then loading
                    told = str(error)
                    log.warning("%s; trying again for up to %.0f s", error, max(left_s, 0.0))
                if left_s <= 0 or stop.wait(min(wait_s * _chance.uniform(0.5, 1.0), left_s)):
                    raise ServerGoneError(f"{error} (tried for {now - gone_since:.0f} s)") from error
                wait_s = min(wait_s * 2, _LONGEST_WAIT_S)
                self._renew()
            else:
                if gone_since is not None:
                    log.warning("%s is back after %.1f s", self.where, time.monotonic() - gone_since)
                return result

    def keep_telling(self, tell: Callable[[bool], T], reconnect_s: float, stop: Event) -> T:
        """As `keep_trying`, of something that is told whether it was tried before."""
        before = False

        def attempt() -> T:
            nonlocal before
            again, before = before, True
            return tell(again)

        return self.keep_trying(attempt, reconnect_s, stop)

    def _open(self) -> redis.ConnectionPool:
        with self._lock:
            if self._pool is None:
                address = endpoint.locate(self._url)
                self.where, self._identity = endpoint.redact(address.url), address.identity
                _check_ca(address.url)
                pool = _make_pool(address.url)
                with self._strangers_are_passing():
                    _check_identity(pool, self.where, address.identity)
                self._pool = _checked(pool, self.where)
            return self._pool

    @contextmanager
    def _strangers_are_passing(self) -> Iterator[None]:
        """Take who answers where an endpoint file leads, and does not know its password, for a server that is gone.

        The server that wrote the file has ended, and another one took its port; its successor will replace the file.
        """
        try:
            yield
        except redis.RedisError as error:
            known = translate(error, self.where)
            if self._identity is None or tls.distrust(error) or not isinstance(known, ServerRefusedError):
                raise
            raise ServerGoneError(f"{known}; it is not the server that the endpoint file names") from error

    @contextmanager
    def translating(self) -> Iterator[None]:
        """Turn what redis-py and sockets raise into our own errors: the only place where that is done."""
        try:
            yield
        except redis.RedisError as error:
            raise translate(error, self.where) from error
        except OSError as error:
            raise ServerGoneError(f"{self.where} does not answer: {_told(error, str(error))}") from error


def translate(error: redis.RedisError, where: str) -> ServerError:
    """Find our error for one of redis-py's."""
    text = _IN_SCRIPT.sub("", str(error)).removesuffix(".") or type(error).__name__
    if isinstance(error, redis.AuthenticationError | redis.exceptions.AuthorizationError):
        return ServerRefusedError(f"{where} refuses: wrong or missing password ({text})")
    said = _with_code(error, text)
    for pattern, kind, meaning in _REPLIES:
        if re.match(pattern, said, re.IGNORECASE):
            return kind(f"{where} answers: {said} ({meaning})")
    if isinstance(error, redis.InvalidResponse):
        return ServerRefusedError(f"{where} is not a Redis server: {text}")
    distrust = tls.distrust(error)
    if distrust:
        return ServerRefusedError(
            f"{where} does not prove who it is: {distrust} (reach it by a name that its certificate holds, and check "
            "that with the certificate of the authority that signed it: ?ssl_ca_certs=FILE)"
        )
    if isinstance(error, redis.ConnectionError | redis.TimeoutError):
        return ServerGoneError(f"{where} does not answer: {_told(error, text)}")
    return ServerRefusedError(f"{where} answers: {text}")


def _told(error: BaseException, text: str) -> str:
    """Say in words what the kernel calls a temporary lack of resources where a timeout is over."""
    timed_out = isinstance(error, BlockingIOError) or isinstance(error.__cause__ or error.__context__, BlockingIOError)
    return f"nothing for {SOCKET_TIMEOUT_S:g} s" if timed_out else text


def _check_ca(url: str) -> None:
    parts = urlsplit(url)
    for ca in parse_qs(parts.query).get("ssl_ca_certs", []) if parts.scheme == "rediss" else []:
        tls.check_ca(ca)


def run_id(line: Line) -> str:
    """Ask which server process this is: another one after each start. Empty where it does not say."""
    line.send(("INFO", "server"))
    try:
        text = line.reply()
    except redis.ResponseError as error:
        if translate(error, "").__class__ is not ServerRefusedError:
            raise
        return ""
    found = _RUN_ID.search(text if isinstance(text, bytes) else b"")
    return found[1].decode() if found else ""


def _with_code(error: redis.RedisError, text: str) -> str:
    """Put back the word that redis-py takes off the front of some errors."""
    code = next((f"{code} " for kind, code in _CODES.items() if isinstance(error, kind)), "")
    return code + text


def _make_pool(url: str) -> redis.ConnectionPool:
    return redis.ConnectionPool.from_url(
        url,
        protocol=2,
        retry=Retry(NoBackoff(), 0),
        socket_timeout=SOCKET_TIMEOUT_S,
        socket_connect_timeout=_CONNECT_TIMEOUT_S,
        max_connections=1000,
    )


def _is_mistake(error: Exception) -> bool:
    """Say whether time will not mend it: an endpoint file may come, a wrong one stays wrong."""
    return isinstance(error, EndpointError) and not isinstance(error, EndpointMissingError)


def _check_identity(pool: redis.ConnectionPool, where: str, identity: str | None) -> None:
    """See that this is the server which wrote the endpoint file; who may not ask has its password, which must do.

    Raises:
        ServerGoneError: It is another one.
    """
    if identity is None:
        return
    connection = pool.get_connection()
    try:
        connection.send_command("CONFIG", "GET", "syslog-ident")  # type: ignore[no-untyped-call]
        found = connection.read_response(disable_decoding=True)
    except redis.ResponseError as error:
        if translate(error, where).__class__ is not ServerRefusedError:
            raise
        return
    finally:
        pool.release(connection)
    if found[1:] != [identity.encode()]:
        raise ServerGoneError(f"{where} is not the server that the endpoint file names: that one has ended")


def _checked(pool: redis.ConnectionPool, where: str) -> redis.ConnectionPool:
    """Refuse a server that is too old for us, or none at all, before anything is sent."""
    connection = pool.get_connection()
    try:
        connection.send_command("INFO", "server")  # type: ignore[no-untyped-call]
        text = connection.read_response(disable_decoding=True)
    except redis.ResponseError as error:
        if translate(error, where).__class__ is not ServerRefusedError:
            raise
        return pool  # INFO is forbidden or unknown: the scripts will tell
    finally:
        pool.release(connection)
    match = re.search(rb"redis_version:(\d+)\.(\d+)", text if isinstance(text, bytes) else b"")
    if match and (int(match[1]), int(match[2])) < _OLDEST_VERSION:
        raise ServerRefusedError(f"{where} is Redis {match[1].decode()}.{match[2].decode()}: 6.2 or newer is needed")
    return pool
