"""A wire between client and server that can be told to lose one answer."""

import select
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from peers import peer
from servers import RealServer
from synthbroker import connection


class Lossy:
    """Passes everything on in both directions, save an answer that it is told to lose.

    Attributes:
        url: Where clients connect to.
        lost: How many answers were lost.
    """

    url: str

    def __init__(self, server: RealServer) -> None:
        self.lost = 0
        self._path = str(server.socket_path)
        self._needle: bytes | None = None
        self._keep_bytes = 0
        self._lock = threading.Lock()

    def lose_answer_to(self, needle: str, *, keep_bytes: int = 0) -> None:
        """Hang up instead of answering the next request that has `needle` in it, when the server has carried it out.

        Args:
            needle: What is looked for: the name of a script, or a word of a command.
            keep_bytes: So much of the answer still comes through.
        """
        is_script = needle.islower()
        self._keep_bytes = keep_bytes
        self._needle = (connection._script(needle)[1] if is_script else needle).encode()

    def serve(self, client: socket.socket) -> None:
        with socket.socket(socket.AF_UNIX) as server:
            server.connect(self._path)
            while self._pass_on(client, server):
                pass

    def _pass_on(self, client: socket.socket, server: socket.socket) -> bool:
        ready, _, _ = select.select([client, server], [], [])
        for source, target in (client, server), (server, client):
            if source in ready:
                data = source.recv(1 << 20)
                if not data:
                    return False
                target.sendall(data)
                if source is client and self._is_it(data):
                    self._hang_up(client, server)
                    return False
        return True

    def _is_it(self, data: bytes) -> bool:
        with self._lock:
            if self._needle is None or self._needle not in data:
                return False
            self._needle = None
            return True

    def _hang_up(self, client: socket.socket, server: socket.socket) -> None:
        left = self._keep_bytes
        answer = server.recv(left or 1)  # its first byte says that the request was carried out
        while left and answer:
            client.sendall(answer)
            left -= len(answer)
            answer = server.recv(left) if left else b""
        self.lost += 1


@contextmanager
def lossy(server: RealServer) -> Iterator[Lossy]:
    """Stand between the clients and a server on a unix socket."""
    wire = Lossy(server)
    with peer(wire.serve) as url:
        wire.url = url
        yield wire
