"""The way to the server: a pool of redis-py's connections, payloads past its parser, one owner of retries.

redis-py connects, authenticates, speaks TLS and parses small replies. Payloads go around it: `Line.send` hands
memoryviews to the socket, `Line.receive` reads from the socket into memory that is there (measured on 64 MiB samples,
producer to Redis to consumer: 0.25 GB/s through redis-py, 1.2 to 1.9 GB/s this way). That needs protocol 2, and a
parser whose buffer is empty whenever a payload is read.
"""

import hashlib
import logging
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Event, Lock
from typing import Any, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from synthbroker import endpoint
from synthbroker.errors import (
    EndpointError,
    ServerError,
    ServerFullError,
    ServerGoneError,
    ServerRefusedError,
)

log = logging.getLogger("synthbroker")

Buffer = bytes | bytearray | memoryview
T = TypeVar("T")

LONGEST_BLOCK_MS = 1000
_SOCKET_TIMEOUT_S = 15.0  # well above the longest block
_CONNECT_TIMEOUT_S = 5.0
_FIRST_WAIT_S = 0.05
_LONGEST_WAIT_S = 5.0
_OLDEST_VERSION = (6, 2)
_LONGEST_LINE_BYTES = 64 * 1024
_STRING_HEADER = re.compile(rb"\$(-1|[0-9]{1,18})")

# What an error reply begins with, or says: which of our errors it is. The first that fits counts.
_REPLIES: tuple[tuple[str, type[ServerError], str], ...] = (
    (r"OOM", ServerFullError, "it is at its memory limit"),
    (
        r"LOADING|MASTERDOWN|CLUSTERDOWN|TRYAGAIN|READONLY|MISCONF|BUSY |UNBLOCKED",
        ServerGoneError,
        "it cannot serve now",
    ),
    (r"NOAUTH|WRONGPASS|.*invalid password|.*without any password", ServerRefusedError, "wrong or missing password"),
    (r"NOPERM|.*no permissions", ServerRefusedError, "this user may not do that"),
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
_IN_SCRIPT = re.compile(r"Error running script \(call to \w+\): (?:@user_script: ?\d+: )*-?")


class Connection:
    """A server that is connected to when it is first needed, and again whenever it went away.

    Args:
        url: A Redis URL, an endpoint file's URL, or None for what the environment says; read anew at each reconnect.
    """

    def __init__(self, url: str | None) -> None:
        self._url = url
        self._pool: redis.ConnectionPool | None = None
        self._lock = Lock()
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
    def line(self) -> Iterator["Line"]:
        """Borrow one connection for commands and payloads; any error closes it."""
        with self._translate():
            pool = self._open()
            connection = pool.get_connection()
            try:
                yield Line(connection, self.where)
            except BaseException:
                connection.disconnect()  # type: ignore[no-untyped-call]
                raise
            finally:
                pool.release(connection)

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
        """Repeat an attempt, which must be safe to repeat, while the server is gone.

        Args:
            attempt: What to do.
            reconnect_s: How long to try, counted from the first failure.
            stop: Ends the trying at once.

        Raises:
            ServerGoneError: Still gone after `reconnect_s`; names the server and the last cause.
        """
        gone_since: float | None = None
        wait_s = _FIRST_WAIT_S
        while True:
            try:
                result = attempt()
            except (ServerGoneError, EndpointError) as error:
                if stop.is_set() or (isinstance(error, EndpointError) and gone_since is None):
                    raise
                now = time.monotonic()
                if gone_since is None:
                    gone_since = now
                    log.warning("%s; trying again for up to %.0f s", error, reconnect_s)
                left_s = gone_since + reconnect_s - now
                if left_s <= 0 or stop.wait(min(wait_s * random.uniform(0.5, 1.0), left_s)):
                    raise ServerGoneError(f"{error} (tried for {now - gone_since:.0f} s)") from error
                wait_s = min(wait_s * 2, _LONGEST_WAIT_S)
                self._renew()
            else:
                if gone_since is not None:
                    log.warning("%s is back after %.1f s", self.where, time.monotonic() - gone_since)
                return result

    def _open(self) -> redis.ConnectionPool:
        with self._lock:
            if self._pool is None:
                url = endpoint.resolve(self._url)
                self.where = endpoint.redact(url)
                self._pool = _checked(_make_pool(url), self.where)
            return self._pool

    @contextmanager
    def _translate(self) -> Iterator[None]:
        """Turn what redis-py and sockets raise into our own errors: the only place where that is done."""
        try:
            yield
        except redis.RedisError as error:
            raise translate(error, self.where) from error
        except OSError as error:
            raise ServerGoneError(f"{self.where} does not answer: {error}") from error


class Line:
    """One borrowed connection. Commands may be sent ahead; replies come in the order of the commands."""

    def __init__(self, connection: Any, where: str) -> None:
        self._connection = connection
        self._where = where
        self._ahead = memoryview(b"")  # what was read beyond a header
        self._small = memoryview(bytearray(64))

    def send(self, *commands: Sequence[Any]) -> None:
        """Send commands. An argument may be text, a number, bytes, or a list of memoryviews that make up one value."""
        self._connection.send_packed_command(_join(_pack(command) for command in commands))

    def reply(self) -> Any:
        """Read one small reply, undecoded.

        Raises:
            ServerError: The server answered with an error.
            redis.ResponseError: Likewise, of a kind that the caller must tell apart.
        """
        if self._ahead:
            raise ServerGoneError(f"{self._where} sent more than was asked for")
        return self._connection.read_response(disable_decoding=True)

    def replies(self, count: int) -> None:
        """Read as many replies and throw them away; of several errors the first is raised, after all are read."""
        errors = []
        for _ in range(count):
            try:
                self.reply()
            except redis.ResponseError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def script(self, name: str, key: str, *arguments: Any) -> Any:
        """Run a script; the server learns its text when it does not know it yet."""
        text, digest = _script(name)
        self.send(("EVALSHA", digest, 1, key, *arguments))
        try:
            return self.reply()
        except redis.exceptions.NoScriptError:
            self.send(("EVAL", text, 1, key, *arguments))
            return self.reply()

    def receive(self, pieces: Sequence[memoryview]) -> bool:
        """Read one string reply into memory, which may be in pieces.

        Returns:
            Whether the key held a string of exactly that length. What it has instead is read and thrown away.
        """
        header = self._read_line()
        if header.startswith(b"-WRONGTYPE"):
            return False
        if header[:1] == b"-":
            raise redis.ResponseError(header[1:].decode(errors="replace"))
        if not _STRING_HEADER.fullmatch(header):
            raise redis.InvalidResponse(f"Protocol Error: {header[:40]!r} instead of a string")
        size = int(header[1:])
        if size < 0:
            return False
        fits = size == sum(piece.nbytes for piece in pieces)
        if fits:
            for piece in pieces:
                self._read_into(piece)
        else:
            self._discard(size)
        self._discard(2)
        return fits

    def _read_line(self) -> bytes:
        line = bytearray()
        while True:
            if not self._ahead:
                self._ahead = self._small[: self._receive(self._small)]
            head, end, _ = bytes(self._ahead).partition(b"\n")
            line += head + end
            self._ahead = self._ahead[len(head) + len(end) :]
            if end:
                return bytes(line[:-2])
            if len(line) > _LONGEST_LINE_BYTES:
                raise redis.InvalidResponse("Protocol Error: a line without an end")

    def _read_into(self, piece: memoryview) -> None:
        done = min(len(self._ahead), piece.nbytes)
        piece[:done] = self._ahead[:done]
        self._ahead = self._ahead[done:]
        while done < piece.nbytes:
            done += self._receive(piece[done:])

    def _discard(self, size: int) -> None:
        skipped = min(len(self._ahead), size)
        self._ahead = self._ahead[skipped:]
        size -= skipped
        if size:
            waste = memoryview(bytearray(min(size, 1 << 20)))
            while size:
                size -= self._receive(waste[:size])

    def _receive(self, into: memoryview) -> int:
        # The socket is redis-py's own; it offers no other way to read without copying.
        count = self._connection._sock.recv_into(into)  # noqa: SLF001
        if not count:
            raise ConnectionError("the connection was closed")
        return int(count)


def translate(error: redis.RedisError, where: str) -> ServerError:
    """Find our error for one of redis-py's."""
    text = str(error) or type(error).__name__
    if isinstance(error, redis.AuthenticationError | redis.exceptions.AuthorizationError):
        return ServerRefusedError(f"{where} refuses: wrong or missing password ({text})")
    for pattern, kind, meaning in _REPLIES:
        if re.match(pattern, _with_code(error, text), re.IGNORECASE):
            return kind(f"{where} answers: {text} ({meaning})")
    if isinstance(error, redis.InvalidResponse):
        return ServerRefusedError(f"{where} is not a Redis server: {text}")
    if isinstance(error, redis.ConnectionError | redis.TimeoutError):
        return ServerGoneError(f"{where} does not answer: {text}")
    return ServerRefusedError(f"{where} answers: {text}")


def _with_code(error: redis.RedisError, text: str) -> str:
    """Put back the word that redis-py takes off the front of some errors; drop what 6.2 puts before a script's."""
    code = next((f"{code} " for kind, code in _CODES.items() if isinstance(error, kind)), "")
    return code + _IN_SCRIPT.sub("", text)


def _make_pool(url: str) -> redis.ConnectionPool:
    return redis.ConnectionPool.from_url(
        url,
        protocol=2,
        retry=Retry(NoBackoff(), 0),
        socket_timeout=_SOCKET_TIMEOUT_S,
        socket_connect_timeout=_CONNECT_TIMEOUT_S,
        max_connections=1000,
    )


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


def _pack(command: Sequence[Any]) -> list[Buffer]:
    """Write one command of the Redis protocol; payloads stay where they are."""
    out: list[Buffer] = [b"*%d\r\n" % len(command)]
    for argument in command:
        pieces = argument if isinstance(argument, list) else [_as_bytes(argument)]
        out += [b"$%d\r\n" % sum(memoryview(piece).nbytes for piece in pieces), *pieces, b"\r\n"]
    return out


def _as_bytes(argument: Any) -> Buffer:
    if isinstance(argument, bytes | bytearray | memoryview):
        return argument
    return str(argument).encode()


def _join(commands: Iterator[list[Buffer]], large_bytes: int = 16 * 1024) -> list[Buffer]:
    """Gather small pieces into one buffer between the large ones: each buffer costs a call of the kernel."""
    out: list[Buffer] = []
    small = bytearray()
    for command in commands:
        for piece in command:
            if memoryview(piece).nbytes < large_bytes:
                small += piece
            else:
                out += [small, piece]
                small = bytearray()
    return [*out, small]


@cache
def _script(name: str) -> tuple[str, str]:
    """Read a script, with what all share put in front, and its digest."""
    folder = Path(__file__).parent / "lua"
    text = (folder / "lib.lua").read_text() + (folder / f"{name}.lua").read_text()
    return text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
