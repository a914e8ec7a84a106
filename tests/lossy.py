"""A wire between client and server that can be told to lose one answer."""

import secrets
import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from peers import peer
from servers import RealServer, connect
from synthbroker import line as lines


class Lossy:
    """Passes everything on in both directions, save an answer that it is told to lose.

    Attributes:
        url: Where clients connect to.
        lost: How many answers were lost.
        server: Where new connections lead.
        on_loss: Called when an answer, or a request, is about to be lost.
    """

    url: str

    def __init__(self, server: RealServer) -> None:
        self.lost = 0
        self.server = server
        self.on_loss: Callable[[], None] = lambda: None
        self._needle: bytes | None = None
        self._keep_bytes = 0
        self._carried_out = True
        self._lock = threading.Lock()

    def lose_answer_to(self, needle: str, *, keep_bytes: int = 0, carried_out: bool = True) -> None:
        """Hang up instead of answering the next request that has `needle` in it, when the server has carried it out.

        Args:
            needle: What is looked for: the name of a script, or a word of a command.
            keep_bytes: So much of the answers still comes through.
            carried_out: False: hang up before the server has all of the request.
        """
        self._carried_out = carried_out
        is_script = needle.islower()
        self._keep_bytes = keep_bytes
        self._needle = (lines.script_text(needle)[1] if is_script else needle).encode()

    def serve(self, client: socket.socket) -> None:
        with connect(self.server.url) as server:
            before = bytearray()
            while self._pass_on(client, server, before):
                pass

    def _pass_on(self, client: socket.socket, server: socket.socket, before: bytearray) -> bool:
        ready, _, _ = select.select([client, server], [], [])
        for source, target in (client, server), (server, client):
            if source in ready:
                data = source.recv(1 << 16)
                if source is client and not self._carried_out and self._is_it(before + data):
                    self.on_loss()
                    self.lost += 1
                    return False
                if not data or not self._send(data, target, to_server=source is client):
                    return False
                if source is client:
                    before += data  # what is looked for may come in two pieces
                    if self._is_it(before):
                        self._hang_up(client, server)
                        return False
                    del before[:-100]
        return True

    def _send(self, data: bytes, target: socket.socket, *, to_server: bool) -> bool:
        """Pass something on; False where the connection ends with it."""
        target.sendall(data)
        return True

    def _is_it(self, data: bytearray) -> bool:
        with self._lock:
            if self._needle is None or self._needle not in data:
                return False
            self._needle = None
            return True

    def _hang_up(self, client: socket.socket, server: socket.socket) -> None:
        while select.select([client], [], [], 0.1)[0] and (rest := client.recv(1 << 20)):
            server.sendall(rest)  # a client that waits for the answer has sent all of the request
        # It may be one of several sent together: what is asked behind them is answered when all are carried out.
        mark = secrets.token_hex(8).encode()
        server.sendall(b"*2\r\n$4\r\nECHO\r\n$16\r\n" + mark + b"\r\n")
        answers = b""
        while mark not in answers and (more := server.recv(1 << 20)):
            answers += more
        self.on_loss()
        client.sendall(answers.partition(b"$16\r\n" + mark)[0][: self._keep_bytes])
        self.lost += 1


@contextmanager
def lossy(server: RealServer) -> Iterator[Lossy]:
    """Stand between the clients and a server on a unix socket."""
    wire = Lossy(server)
    with peer(wire.serve) as url:
        wire.url = url
        yield wire
