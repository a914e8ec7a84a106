"""A slow network on one machine: a process that passes TCP on at a given rate."""

import socket
import threading
import time
from contextlib import suppress
from urllib.parse import urlsplit

from synthbroker.bench.processes import Stage
from synthbroker.errors import SynthbrokerError

_PIECE_BYTES = 64 * 1024
_BUFFER_BYTES = 256 * 1024  # of each socket: what waits in the kernel must not look like a fast link
_BURST_S = 0.002  # sleeping is no more exact than that
_WAKE_S = 0.1


class Valve:
    """Lets a number of bytes per second through, for all connections together.

    Args:
        bytes_per_s: The rate.
    """

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_at = 0.0
        self._lock = threading.Lock()

    def pass_through(self, size_bytes: int) -> None:
        """Wait until so many bytes are through."""
        with self._lock:
            now = time.monotonic()
            self._free_at = max(self._free_at, now - _BURST_S) + size_bytes / self._bytes_per_s
            wait_s = self._free_at - now
        if wait_s > 0:
            time.sleep(wait_s)


def address_of(url: str) -> tuple[str, int]:
    """Say where a server listens.

    Raises:
        SynthbrokerError: Not by plain TCP.
    """
    parts = urlsplit(url)
    if parts.scheme != "redis" or parts.hostname is None:
        raise SynthbrokerError("it needs a server that is reached by plain TCP, redis://")
    return parts.hostname, parts.port or 6379


def through(url: str, port: int) -> str:
    """Write the URL of a server as it is behind a relay on this machine."""
    parts = urlsplit(url)
    login, at, _ = parts.netloc.rpartition("@")
    return parts._replace(netloc=f"{login}{at}127.0.0.1:{port}").geturl()


def free_port() -> int:
    """Choose a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def relay(stage: Stage, url: str, port: int, bytes_per_s: float) -> None:
    """Pass connections on until the scene is over and they are closed; each direction has its own rate."""
    target, valves = address_of(url), (Valve(bytes_per_s), Valve(bytes_per_s))
    lines: list[threading.Thread] = []
    closed = threading.Event()
    with socket.create_server(("127.0.0.1", port), backlog=128) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)  # those that it accepts have it from it
        listener.settimeout(_WAKE_S)
        door = threading.Thread(target=_accept, args=(listener, target, valves, lines, closed), daemon=True)
        door.start()  # at once: the others connect before they begin
        stage.begin()
        while not stage.over or any(line.is_alive() for line in lines):
            time.sleep(_WAKE_S)
        closed.set()
        door.join()


def _accept(
    listener: socket.socket,
    target: tuple[str, int],
    valves: tuple[Valve, Valve],
    lines: list[threading.Thread],
    closed: threading.Event,
) -> None:
    while not closed.is_set():
        with suppress(TimeoutError):
            near, _ = listener.accept()
            near.settimeout(None)
            lines.append(threading.Thread(target=_connect, args=(near, target, valves), daemon=True))
            lines[-1].start()


def _connect(near: socket.socket, target: tuple[str, int], valves: tuple[Valve, Valve]) -> None:
    with near, socket.create_connection(target) as far:
        for end in near, far:
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        down = threading.Thread(target=_pump, args=(far, near, valves[1]), daemon=True)
        down.start()
        _pump(near, far, valves[0])
        down.join()


def _pump(source: socket.socket, sink: socket.socket, valve: Valve) -> None:
    piece = memoryview(bytearray(_PIECE_BYTES))
    with suppress(OSError):
        while got := source.recv_into(piece):
            valve.pass_through(got)
            sink.sendall(piece[:got])
    for end in source, sink:
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
