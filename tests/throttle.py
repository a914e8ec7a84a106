"""A wire to a server that passes so many bits in a second, as a network would, and a program that measures over it.

`python tests/throttle.py` compares codecs over it, on brain-like samples and a server that it starts. The relay, the
producer and the reader are processes of their own.
"""

import argparse
import multiprocessing
import socket
import statistics
import threading
import time
from contextlib import suppress
from typing import Any

import numpy as np

import synthbroker as sb
from servers import RealServer, any_binary
from synthbroker.schema import Array

_PIECE_BYTES = 64 * 1024
_LATE_S = 0.002  # so far a sleep may have gone beyond its end; made up for by the next ones
_spawn = multiprocessing.get_context("spawn")


class Pace:
    """One direction of a link: what passes it is spread over time, that of all connections together."""

    def __init__(self, bits_per_s: float) -> None:
        self._s_per_byte = 8 / bits_per_s
        self._free_at = 0.0
        self._lock = threading.Lock()

    def pass_on(self, nbytes: int) -> None:
        """Wait until so many bytes are through."""
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic() - _LATE_S) + nbytes * self._s_per_byte
            until = self._free_at
        left = until - time.monotonic()
        if left > 0:
            time.sleep(left)


def relay(path: str, mbit: float, told: Any) -> None:
    """Stand between clients and a server on a unix socket for ever, each direction at its own pace; tells its port."""
    up, down = Pace(mbit * 1e6), Pace(mbit * 1e6)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        told.put(listener.getsockname()[1])
        while True:
            client, _ = listener.accept()
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            server = socket.socket(socket.AF_UNIX)
            server.connect(path)
            for way in (client, server, up), (server, client, down):
                threading.Thread(target=_pump, args=way, daemon=True).start()


def _pump(source: socket.socket, target: socket.socket, pace: Pace) -> None:
    memory = memoryview(bytearray(_PIECE_BYTES))
    with suppress(OSError):
        while (count := source.recv_into(memory)) > 0:
            pace.pass_on(count)
            target.sendall(memory[:count])
    for one in source, target:
        with suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)


def brain(seed: int, side: int = 64) -> dict[str, Array]:
    """Make a sample that packs as the demo's do: a smooth image with noise, clipped at 0, and its labels."""
    noise = np.random.default_rng(seed).standard_normal((side,) * 3, np.float32)
    axis = np.linspace(-1, 1, side, dtype=np.float32)
    x, y, z = np.meshgrid(axis, axis, axis, indexing="ij")
    label = np.digitize(x * x + 1.2 * y * y + 0.9 * z * z + 0.1 * np.sin(5 * x), [0.15, 0.3, 0.45, 0.6, 1.0])
    level = np.array([1, 0.8, 0.6, 0.4, 0.2, 0], np.float32)[label]
    return {"image": np.clip(level + 0.05 * noise, 0, None)[None], "label": label.astype(np.uint8)}


def produce(url: str, ring: str, codec: str, samples: int, told: Any) -> None:
    """Put samples as fast as they go."""
    some = [brain(seed) for seed in range(8)]
    with sb.Producer(url, ring=ring, capacity="256MB", producers=1, codec=codec, groups=["g"]) as out:
        for i in range(samples):
            out.put(some[i % len(some)])
        out.flush()
        chooser = out._chooser
        told.put(f"{codec}: {chooser.described()}, probes {chooser.probes()}, link {chooser._link}")


def rate(url: str, ring: str, codec: str, samples: int) -> tuple[float, float]:
    """Samples per second, of all and of the later half, as the reader sees them."""
    told = _spawn.Queue()
    producer = _spawn.Process(target=produce, args=(url, ring, codec, samples, told))
    producer.start()
    times: list[float] = []
    for batch in sb.Consumer(url, ring=ring, group="g", batch_size=4):
        times += [time.monotonic()] * len(batch["label"])
    print("   ", told.get(), flush=True)  # noqa: T201
    producer.join()
    half = samples // 2
    return (samples - 1) / (times[-1] - times[0]), (samples - 1 - half) / (times[-1] - times[half])


def main() -> None:
    """Print samples per second for each codec, medians of interleaved repeats."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--mbit", type=float, default=1000, help="pace of each direction; 0: no relay")
    arguments.add_argument("--codecs", nargs="+", default=["raw", "auto"])
    arguments.add_argument("--samples", type=int, default=800)
    arguments.add_argument("--repeats", type=int, default=3)
    asked = arguments.parse_args()
    server = RealServer(any_binary())
    url, told = server.url, _spawn.Queue()
    if asked.mbit:
        _spawn.Process(target=relay, args=(str(server.socket_path), asked.mbit, told), daemon=True).start()
        url = f"redis://127.0.0.1:{told.get()}/0"
    found: dict[str, list[tuple[float, float]]] = {codec: [] for codec in asked.codecs}
    try:
        for repeat in range(asked.repeats):
            for codec in asked.codecs:
                found[codec].append(rate(url, f"{codec}-{repeat}", codec, asked.samples))
                server.client().flushall()
    finally:
        server.stop()
    for codec, rates in found.items():
        whole, half = (statistics.median(column) for column in zip(*rates, strict=True))
        print(f"{codec}: {whole:.1f}/s, its later half {half:.1f}/s")  # noqa: T201


if __name__ == "__main__":
    main()
