"""What answers on a port without being a Redis, or not a good one: servers of the tests, each a few lines long."""

import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

Serve = Callable[[socket.socket], None]
HANDSHAKE = {b"CLIENT": b"+OK\r\n", b"AUTH": b"+OK\r\n", b"INFO": b"+redis_version:7.0.0\r\n"}


@contextmanager
def peer(serve: Serve) -> Iterator[str]:
    """Listen, hand each client to `serve` in a thread of its own; give the URL."""
    clients: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def run(client: socket.socket) -> None:
        with client, suppress(OSError):
            serve(client)

    def accept() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                clients.append(client)
                threads.append(threading.Thread(target=run, args=(client,)))
                threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        acceptor = threading.Thread(target=accept)
        acceptor.start()
        try:
            yield f"redis://127.0.0.1:{listener.getsockname()[1]}/0"
        finally:
            for one in (listener, *clients):
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
            for thread in (acceptor, *threads):
                thread.join(10)


def says(greeting: bytes) -> Serve:
    """Answer whatever comes with the same bytes, once, and hang up."""

    def serve(client: socket.socket) -> None:
        client.recv(1 << 16)
        client.sendall(greeting)
        client.shutdown(socket.SHUT_WR)
        while client.recv(1 << 16):
            pass

    return serve


def is_mute(client: socket.socket) -> None:
    """Read and never answer."""
    while client.recv(1 << 16):
        pass


def hangs_up(client: socket.socket) -> None:
    """Say goodbye before anything was said."""


def answers(replies: Mapping[bytes, bytes]) -> Serve:
    """Answer Redis commands by their first word; what is not named gets `+OK`."""

    def serve(client: socket.socket) -> None:
        with client.makefile("rb") as stream:
            while header := stream.readline():
                words = [stream.read(int(stream.readline()[1:]) + 2)[:-2] for _ in range(int(header[1:]))]
                client.sendall((HANDSHAKE | dict(replies)).get(words[0].upper(), b"+OK\r\n"))

    return serve
