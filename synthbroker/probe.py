"""Ask whether a server is there, in a few bytes of RESP2 on a socket of its own."""

import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from typing import BinaryIO

from synthbroker import tls
from synthbroker.endpoint import Endpoint


def answers(endpoint: Endpoint, *, patience_s: float, at: str | None = None) -> bool:
    """Say whether this very server is there: it takes the password and knows its identity.

    Args:
        endpoint: Which server.
        patience_s: How long each step (connecting, an answer) may take.
        at: Where it is to be reached, if not at its host; its certificate must hold the host's name all the same.

    Raises:
        ssl.SSLCertVerificationError: Something is there whose certificate clients would refuse.
    """
    identity = endpoint.identity  # ASCII, if it is ours
    expected = f"*2\r\n$12\r\nsyslog-ident\r\n${len(identity)}\r\n{identity}\r\n".encode().splitlines(keepends=True)
    try:
        with _asked(endpoint, ("CONFIG", "GET", "syslog-ident"), patience_s, at) as replies:
            return all(replies.readline(4096) == line for line in expected)
    except ssl.SSLCertVerificationError:
        raise
    except (OSError, UnicodeError):  # a host name that cannot be one is a UnicodeError
        return False


def loads(endpoint: Endpoint, *, patience_s: float, at: str | None = None) -> bool:
    """Say whether a server still reads its data from disk: it says so, or does not come to answering."""
    try:
        with _asked(endpoint, ("PING",), patience_s, at) as replies:
            return replies.readline(4096).startswith(b"-LOADING")
    except OSError:
        return True


def rewrite_log(endpoint: Endpoint, *, patience_s: float, at: str | None = None) -> bool:
    """Have a server begin to write its log anew; False if it does not."""
    with suppress(OSError), _asked(endpoint, ("BGREWRITEAOF",), patience_s, at) as replies:
        return replies.readline(4096).startswith(b"+")
    return False


@contextmanager
def _asked(endpoint: Endpoint, command: tuple[str, ...], patience_s: float, at: str | None) -> Iterator[BinaryIO]:
    """Give a command; what is read from the result is the answer, or it is empty where the password is refused."""
    with _connect(endpoint, patience_s, at) as connection, connection.makefile("rb") as replies:
        if endpoint.password:
            connection.sendall(_pack(("AUTH", endpoint.user, endpoint.password)) + _pack(command))
            yield replies if replies.readline(4096) == b"+OK\r\n" else BytesIO()
        else:
            connection.sendall(_pack(command))
            yield replies


def _connect(endpoint: Endpoint, patience_s: float, at: str | None) -> socket.socket:
    if endpoint.unix_socket is None:
        plain = socket.create_connection((at or endpoint.host, endpoint.port or 0), timeout=patience_s)
        return _encrypt(plain, endpoint) if endpoint.tls else plain
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(patience_s)
    try:
        connection.connect(endpoint.unix_socket)
    except OSError:
        connection.close()
        raise
    return connection


def _encrypt(plain: socket.socket, endpoint: Endpoint) -> socket.socket:
    try:
        return tls.client_context(endpoint.ca).wrap_socket(plain, server_hostname=endpoint.host)
    except BaseException:
        plain.close()
        raise


def _pack(command: tuple[str, ...]) -> bytes:
    words = [word.encode() for word in command]
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)
