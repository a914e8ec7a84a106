"""Measure 15: what it costs that a server keeps its rings on disk."""

import shutil
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

from synthbroker import server
from synthbroker.bench import throughput
from synthbroker.bench.loads import Figures
from synthbroker.bench.place import Place
from synthbroker.bench.samples import KIB, MIB, size_name
from synthbroker.bench.table import Block, Line
from synthbroker.durable import FSYNC, Durable
from synthbroker.server import ServerConfig

SIZES = (4 * MIB, 400 * KIB, 4 * KIB)
PLAIN = "in memory only"


def ours(size_bytes: int, fsync: str | None, place: Place) -> Figures:
    """Measure samples of one size through a server of its own, which keeps its rings or not."""
    folder = Path(tempfile.mkdtemp(dir=place.folder))
    kept = Durable(folder / "kept", fsync) if fsync else None
    try:
        with server.start(ServerConfig(unix_socket=folder / "s", durable=kept)) as own:
            near = replace(own.endpoint, host=None, port=None, unix_socket=str(folder / "s")).url()
            figures = throughput.ours(size_bytes, replace(place, url=near, tcp_url=None))
            return figures | ({"log_bytes": kept.log_bytes()} if kept else {})
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _name(size_bytes: int, how: str) -> str:
    return f"{how}, {size_name(size_bytes)}"


def block(size_bytes: int) -> Block:
    """Make the block of one size."""
    contenders = {_name(size_bytes, PLAIN): partial(ours, size_bytes, None)}
    contenders |= {_name(size_bytes, fsync): partial(ours, size_bytes, fsync) for fsync in FSYNC}
    return Block(
        contenders,
        tuple(
            Line(
                15,
                f"{size_name(size_bytes)} samples: serve --durable {fsync} ÷ {PLAIN}",
                "samples/s",
                (_name(size_bytes, fsync), "samples_per_s"),
                (_name(size_bytes, PLAIN), "samples_per_s"),
            )
            for fsync in FSYNC
        ),
    )
