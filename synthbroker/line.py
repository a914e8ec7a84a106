"""One connection to the server: commands and small replies by redis-py, payloads past its parser.

`Line.send` hands memoryviews to the socket, `Line.receive` reads from the socket into memory that is there. That needs
protocol 2, and a parser whose buffer is empty whenever a payload is read. Sockets block, with the kernel's own
timeouts: one call moves a whole part, and the interpreter is not woken for every piece of it.
"""

import contextlib
import hashlib
import os
import re
import select
import socket
import ssl
import struct
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import redis

from synthbroker.errors import ServerGoneError, ServerRefusedError

Buffer = bytes | bytearray | memoryview

SOCKET_TIMEOUT_S = 15.0  # well above the longest block
_LONGEST_LINE_BYTES = 64 * 1024
_WINDOW_BYTES = 32 * 2**20
_LARGE_BYTES = 16 * 1024  # from here on a buffer of its own costs less than copying
_WAIT_BYTES = 64 * 1024  # from here on one call waits for all of it; what comes behind is read by another one
_MOST_BUFFERS = 512  # in one call of the kernel, which takes 1024
_ABOUT_RUNS = {"join", "stage", "finish", "resume", "keep"}
_STRING_HEADER = re.compile(rb"\$(-1|[0-9]{1,18})")


class Line:
    """One borrowed connection. Commands may be sent ahead; replies come in the order of the commands."""

    def __init__(self, connection: Any, where: str, pool: Any = None) -> None:
        self.pool, self.pid, self.is_cut = pool, os.getpid(), False
        self._connection = connection
        self._where = where
        # The socket is redis-py's own; it offers no other way to send and read without copying.
        self._socket = connection._sock  # noqa: SLF001
        self._scatters = isinstance(self._socket, socket.socket) and not isinstance(self._socket, ssl.SSLSocket)
        if self._scatters:
            limit = struct.pack("ll", int(SOCKET_TIMEOUT_S), round(SOCKET_TIMEOUT_S % 1 * 1e6))
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            if (
                self._socket.family == socket.AF_UNIX
            ):  # TCP finds its own size; here it is a tenth more for 4 MiB samples
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            self._socket.settimeout(None)
        self._small = memoryview(bytearray(64))
        self._ahead = self._small[:0]  # what was read beyond a payload

    def drop(self) -> None:
        """Close it: what is under way on it is not known any more."""
        self._connection.disconnect()
        if self.pool is not None:
            self.pool.release(self._connection)

    def cut(self) -> None:
        """Make whoever waits for it in another thread fail; it serves nobody any more."""
        self.is_cut = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def send(self, *commands: Sequence[Any]) -> None:
        """Send commands. An argument may be text, a number, bytes, or a list of memoryviews that make up one value."""
        buffers = _pack(commands)
        if not self._scatters:
            for buffer in buffers:
                self._socket.sendall(buffer)
            return
        while buffers:
            buffers = _behind(buffers, self._socket.sendmsg(buffers[:_MOST_BUFFERS]))

    def send_windows(self, commands: Sequence[Sequence[Any]], most_bytes: int) -> Sequence[Sequence[Any]]:
        """Send commands of at most so many bytes each, some at a time; what is left may go with what follows.

        More at a time would have the server, and a slow link, hold as much.
        """
        at_once = max(_WINDOW_BYTES // most_bytes, 1)
        first = 0
        while len(commands) - first > at_once:
            self.send(*commands[first : first + at_once])
            self.replies(at_once)
            first += at_once
        return commands[first:]

    def reply(self) -> Any:
        """Read one small reply, undecoded.

        Raises:
            ServerError: The server answered with an error.
            redis.ResponseError: Likewise, of a kind that the caller must tell apart.
        """
        if self._ahead:
            raise ServerGoneError(f"{self._where} sent more than was asked for")
        return self._connection.read_response(disable_decoding=True)

    def has_come(self) -> bool:
        """Say whether a reply has begun to come, or none will; what comes through TLS may be something else."""
        if self._socket.fileno() < 0:
            return True
        if isinstance(self._socket, ssl.SSLSocket) and self._socket.pending():
            return True
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(0))

    def replies(self, count: int) -> None:
        """Read as many replies and throw them away; of several errors the first is raised, after all are read."""
        errors = self._errors(count)
        if errors:
            raise errors[0]

    def script(self, name: str, key: str, *arguments: Any) -> Any:
        """Run a script; the server learns its text when it does not know it yet."""
        return self.script_after((), name, key, *arguments)[0]

    def script_after(
        self, first: Sequence[Sequence[Any]], name: str, key: str, *arguments: Any
    ) -> tuple[Any, list[redis.ResponseError]]:
        """Carry out commands, and a script behind them whatever became of them, in one go.

        Returns:
            What the script answered, and the errors among the answers to the commands.
        """
        self.send_script(name, key, *arguments, first=first)
        errors = self._errors(len(first))
        return self.script_reply(name, key, *arguments), errors

    def send_script(self, name: str, key: str, *arguments: Any, first: Sequence[Sequence[Any]] = ()) -> None:
        """Send what `script_reply` reads the answer to, behind other commands."""
        self.send(*first, ("EVALSHA", script_text(name)[1], 1, key, *arguments))

    def script_reply(self, name: str, key: str, *arguments: Any) -> Any:
        """Read a script's answer; a server that does not know its text learns it."""
        try:
            return self.reply()
        except redis.exceptions.NoScriptError:
            return self._script_by_text(script_text(name)[0], key, *arguments)

    def _script_by_text(self, text: str, key: str, *arguments: Any) -> Any:
        self.send(("EVAL", text, 1, key, *arguments))
        try:
            return self.reply()
        except redis.exceptions.NoPermissionError as error:
            raise ServerRefusedError(
                f"{self._where} does not know this version's scripts (any more), and this user may not load them: "
                "`synthbroker acl`, by who made the user, loads them again"
            ) from error

    def receive(self, pieces: Sequence[memoryview], *, more: bool = False) -> bool:
        """Read one string reply into memory, which may be in pieces.

        Args:
            pieces: The memory.
            more: Another string reply follows, whose first bytes may be read along.

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
        fits = size == sum([piece.nbytes for piece in pieces])
        if fits:
            self._fill(pieces, more=more)
        else:
            self._discard(size)
        self._discard(2)
        return fits

    def _errors(self, count: int) -> list[redis.ResponseError]:
        """Read as many replies and keep the errors among them."""
        errors = []
        for _ in range(count):
            try:
                self.reply()
            except redis.ResponseError as error:
                errors.append(error)
        return errors

    def _read_line(self) -> bytes:
        line = bytearray()
        while True:
            if not self._ahead:
                self._ahead = self._small[: self._receive([self._small])]
            head, end, _ = bytes(self._ahead).partition(b"\n")
            line += head + end
            self._ahead = self._ahead[len(head) + len(end) :]
            if end:
                return bytes(line[:-2])
            if len(line) > _LONGEST_LINE_BYTES:
                raise redis.InvalidResponse("Protocol Error: a line without an end")

    def _fill(self, pieces: Sequence[memoryview], *, more: bool) -> None:
        """Fill memory; where more is to come, some bytes behind it may be read along."""
        for piece in pieces:
            count = min(len(self._ahead), piece.nbytes)
            piece[:count] = self._ahead[:count]
            self._ahead = self._ahead[count:]
            pieces = _behind(pieces, count)
        missing = sum([piece.nbytes for piece in pieces])
        while missing > 0:
            wait = missing >= _WAIT_BYTES
            tail = self._small if more and not wait else self._small[:2]
            count = self._receive([*pieces[:_MOST_BUFFERS], tail], wait=wait)
            self._ahead = tail[: max(count - missing, 0)]
            missing -= count
            pieces = _behind(pieces, count)

    def _discard(self, size: int) -> None:
        skipped = min(len(self._ahead), size)
        self._ahead = self._ahead[skipped:]
        size -= skipped
        if size:
            waste = memoryview(bytearray(min(size, 1 << 20)))
            while size:
                size -= self._receive([waste[:size]])

    def _receive(self, buffers: Sequence[memoryview], *, wait: bool = False) -> int:
        if self._scatters and len(buffers) > 1:
            count = self._socket.recvmsg_into(buffers, 0, socket.MSG_WAITALL if wait else 0)[0]
        else:
            count = self._socket.recv_into(buffers[0])
        if not count:
            raise ConnectionError("the connection was closed")
        return int(count)


def _pack(commands: Sequence[Sequence[Any]]) -> list[Buffer]:
    """Write commands of the Redis protocol; large payloads stay where they are, all else is gathered between them."""
    out: list[Buffer] = []
    small = bytearray()
    for command in commands:
        small += b"*%d\r\n" % len(command)
        for argument in command:
            if type(argument) is list:
                small += b"$%d\r\n" % sum([memoryview(piece).nbytes for piece in argument])
                for piece in argument:
                    if memoryview(piece).nbytes < _LARGE_BYTES:
                        small += piece
                    else:
                        out += [small, memoryview(piece)]
                        small = bytearray()
                small += b"\r\n"
            else:
                text = bytes(argument) if isinstance(argument, Buffer) else str(argument).encode()
                small += b"$%d\r\n%b\r\n" % (len(text), text)
    return [*out, small]


def _behind(buffers: Sequence[Any], count: int) -> list[Any]:
    """Give what is left of buffers behind so many bytes."""
    for i, buffer in enumerate(buffers):
        size = memoryview(buffer).nbytes
        if count < size:
            return [memoryview(buffer)[count:], *buffers[i + 1 :]]
        count -= size
    return []


def script_names() -> list[str]:
    """List the scripts that a server is asked to run."""
    return sorted({path.stem for path in (Path(__file__).parent / "lua").glob("*.lua")} - {"lib", "runs"})


@cache
def script_text(name: str) -> tuple[str, str]:
    """Read a script, with what it shares with others put in front, and its digest."""
    folder = Path(__file__).parent / "lua"
    names = ["lib", *(["runs"] if name in _ABOUT_RUNS else []), name]
    text = "".join([(folder / f"{one}.lua").read_text() for one in names])
    if name == "deal":  # takes as take does
        take, end, _ = (folder / "take.lua").read_text().partition("-- What follows is take's alone")
        assert end
        text = (folder / "lib.lua").read_text() + take + (folder / "deal.lua").read_text()
    return text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
