"""A network that can be broken: a proxy that delays, throttles, cuts, loses answers, and leads somewhere else."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from lossy import Lossy
from peers import peer
from servers import RealServer, connect
from synthbroker.bench.throttle import Valve

TO_SERVER, TO_CLIENT = "to the server", "to the client"
_PIECE_BYTES = 64 * 1024


class Proxy(Lossy):
    """Passes bytes on between clients and `server`, each connection in a thread of its own, until told otherwise.

    Attributes:
        delay_s: Every piece of up to 64 KiB waits so long, in either direction.
        valve: Lets so many bytes per second through, for all connections together; None: all at once.
        open: False: new connections are closed at once, as by a server that is gone.
        cuts: How many connections were cut in the middle of something by `cut_after`.
    """

    def __init__(self, server: RealServer) -> None:
        super().__init__(server)
        self.delay_s = 0.0
        self.valve: Valve | None = None
        self.open = True
        self.cuts = 0
        self._left: dict[str, int] = {}  # bytes until the cut, by direction
        self._live: set[socket.socket] = set()
        self._guard = threading.Lock()

    def serve(self, client: socket.socket) -> None:
        if not self.open:
            return
        with connect(self.server.url) as server:
            for end in client, server:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _PIECE_BYTES)
            with self._guard:
                self._live |= {client, server}
            try:
                before = bytearray()
                while self._pass_on(client, server, before):
                    pass
            finally:
                with self._guard:
                    self._live -= {client, server}

    def cut(self) -> None:
        """Cut all connections, whatever goes on in them."""
        with self._guard:
            for end in self._live:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def cut_after(self, nbytes: int, direction: str) -> None:
        """Cut the connection over which the n-th byte from now on goes in that direction, behind that byte."""
        with self._guard:
            self._left[direction] = nbytes

    def lead_to(self, server: RealServer) -> None:
        """Lead new connections to another server, and cut those to the old one."""
        self.server = server
        self.cut()

    def _send(self, data: bytes, target: socket.socket, *, to_server: bool) -> bool:
        direction = TO_SERVER if to_server else TO_CLIENT
        if self.delay_s:
            time.sleep(self.delay_s)
        if self.valve is not None:
            self.valve.pass_through(len(data))
        with self._guard:
            left = self._left.get(direction)
            if left is not None and left < len(data):
                del self._left[direction]
                self.on_loss()
                self.cuts += 1
            elif left is not None:
                self._left[direction], left = left - len(data), None
        target.sendall(data if left is None else data[:left])
        return left is None


@contextmanager
def proxy(server: RealServer) -> Iterator[Proxy]:
    """Stand between the clients and a server."""
    between = Proxy(server)
    with peer(between.serve) as url:
        between.url = url
        yield between
