"""Ask whether a server is there, in a few bytes of RESP2 on a socket of its own."""

import socket

from synthbroker.endpoint import Endpoint


def answers(endpoint: Endpoint, *, patience_s: float) -> bool:
    """Say whether this very server is there: it takes the password and knows its identity.

    Args:
        endpoint: Which server; an endpoint file of TLS servers is not asked, they are none of ours.
        patience_s: How long each step (connecting, an answer) may take.
    """
    commands = [("CONFIG", "GET", "syslog-ident")]
    expected = f"*2\r\n$12\r\nsyslog-ident\r\n${len(endpoint.identity)}\r\n{endpoint.identity}\r\n"  # ASCII, if ours
    if endpoint.password:
        commands.insert(0, ("AUTH", endpoint.user, endpoint.password))
        expected = "+OK\r\n" + expected
    try:
        with _connect(endpoint, patience_s) as connection, connection.makefile("rb") as replies:
            connection.sendall(b"".join(_pack(command) for command in commands))
            return all(replies.readline(4096) == line for line in expected.encode().splitlines(keepends=True))
    except (OSError, UnicodeError):  # a host name that cannot be one is a UnicodeError
        return False


def _connect(endpoint: Endpoint, patience_s: float) -> socket.socket:
    if endpoint.unix_socket is None:
        return socket.create_connection((endpoint.host, endpoint.port or 0), timeout=patience_s)
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(patience_s)
    try:
        connection.connect(endpoint.unix_socket)
    except OSError:
        connection.close()
        raise
    return connection


def _pack(command: tuple[str, ...]) -> bytes:
    words = [word.encode() for word in command]
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)
