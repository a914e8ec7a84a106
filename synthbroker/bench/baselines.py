"""What people would use instead, and what the machine allows: the figures that ours are divided by."""

import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import redis

from synthbroker.bench.loads import PATIENCE_S, Figures, Maker
from synthbroker.bench.meter import Meter
from synthbroker.bench.processes import Stage

RELAY_BUFFER_BYTES = 1024 * 1024
_POLL_S = 0.001
_GROUP = "bench"


def _one(make: Maker) -> Any:
    return next(iter(make().values()))


# -- two bare sockets with a process between them: no protocol, nothing kept, nothing checked


def relay(stage: Stage, folder: Path) -> None:
    """Pass on what comes in, a buffer at a time."""
    with _listener(folder / "in") as entry, _listener(folder / "out") as way_out:
        stage.begin()
        source, target = entry.accept()[0], way_out.accept()[0]
        buffer = memoryview(bytearray(RELAY_BUFFER_BYTES))
        with source, target, suppress(OSError):
            while got := source.recv_into(buffer):
                target.sendall(buffer[:got])


def relay_produce(stage: Stage, folder: Path, make: Maker) -> None:
    """Send one sample again and again, until nobody listens."""
    payload = memoryview(_one(make)).cast("B")
    stage.begin()
    with _connected(folder / "in") as line, suppress(OSError):
        while not stage.over:
            line.sendall(payload)


def relay_train(stage: Stage, folder: Path, make: Maker, seconds: float) -> Figures:
    """Receive into memory that is there."""
    array = np.empty_like(_one(make))
    view = memoryview(array).cast("B")
    meter = Meter(seconds)
    stage.begin()
    with _connected(folder / "out") as line:
        while True:
            _fill(line, view)
            if not meter.count(1):
                break
        stage.stop()
    return {"samples_per_s": meter.per_s}


def _fill(line: socket.socket, view: memoryview) -> None:
    done = 0
    while done < len(view):
        got = line.recv_into(view[done:])
        if not got:
            raise ConnectionResetError("the relay went away")
        done += got


def _listener(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.settimeout(PATIENCE_S)
    listener.bind(str(path))
    listener.listen(1)
    return listener


def _connected(path: Path) -> socket.socket:
    line = socket.socket(socket.AF_UNIX)
    line.connect(str(path))
    return line


# -- plain redis-py, with hiredis: a stream, one field, a group


def redis_produce(stage: Stage, url: str, key: str, make: Maker, most: int) -> None:
    """Add one sample again and again, at most `most` in the stream."""
    array = _one(make)
    with redis.Redis.from_url(url) as client:
        stage.begin()
        while not stage.over:
            if client.xlen(key) >= most:
                time.sleep(_POLL_S)
                continue
            client.xadd(key, {"x": array.tobytes()})


def redis_train(stage: Stage, url: str, key: str, make: Maker, seconds: float) -> Figures:
    """Take one at a time, and delete it."""
    dtype = _one(make).dtype
    meter = Meter(seconds)
    with redis.Redis.from_url(url) as client:
        client.xgroup_create(key, _GROUP, id="0", mkstream=True)
        stage.begin()
        going = True
        while going:
            for _, entries in client.xreadgroup(_GROUP, "me", {key: ">"}, count=1, block=1000):
                for number, fields in entries:
                    np.frombuffer(fields[b"x"], dtype)
                    client.xack(key, _GROUP, number)
                    client.xdel(key, number)
                    going = meter.count(1)
        stage.stop()
    return {"samples_per_s": meter.per_s}


def redis_remove(url: str, key: str) -> None:
    """Leave nothing behind."""
    with redis.Redis.from_url(url) as client:
        client.delete(key)


# -- multiprocessing.Queue


def queue_produce(stage: Stage, make: Maker) -> None:
    """Put one sample again and again into `stage.shared`."""
    sample, queue = make(), stage.shared
    queue.cancel_join_thread()  # nobody reads the rest
    stage.begin()
    while not stage.over:
        with suppress(Exception):  # full: look whether the scene is over
            queue.put(sample, timeout=0.1)


def queue_train(stage: Stage, seconds: float) -> Figures:
    """Take one at a time."""
    meter = Meter(seconds)
    stage.begin()
    while True:
        stage.shared.get(timeout=PATIENCE_S)
        if not meter.count(1):
            break
    stage.stop()
    return {"samples_per_s": meter.per_s}


# -- one process


def alternate(stage: Stage, pause_s: float, step_s: float, seconds: float) -> Figures:
    """Generate and train in turn, both by sleeping."""
    meter = Meter(seconds)
    stage.begin()
    while True:
        time.sleep(pause_s)
        if not meter.count(1):
            break
        time.sleep(step_s)
    return {"samples_per_s": meter.per_s}
