"""A ring that is moved by hand, command by command, for what `status` says of it."""

from contextlib import contextmanager

import numpy as np

from rings import take
from synthbroker import monitor, texts, wire
from synthbroker.connection import Connection
from synthbroker.replies import Incarnation, Settings
from synthbroker.ring import Ring

ABOUT = {"host": "node7", "pid": 4711, "job_id": "99", "samples_per_s": 2.5, "bytes_per_s": 1e6, "blocked_share": 0.25}


def encode(floats):
    return wire.encode({"x": np.full(floats, 7.0, np.float32)}, {"x": "raw"}, texts.pack_texts({}, {}))


BIG, TINY = encode(100_000), encode(100)


class Hands:
    """A ring, a producer and readers, moved by hand."""

    def __init__(self, url, name, **settings):
        self.connection = Connection(url)
        self.ring = Ring(self.connection, name)
        self.ring.open(Settings(**settings), default_capacity_bytes=10**8, reopen=False)
        self.producer = Incarnation("maker", "w1")
        self.ring.join_producer(self.producer, 0, ABOUT)
        self.seq = 0

    def put(self, sample, count=1):
        for _ in range(count):
            self.seq += 1
            if not sample.inline:
                assert self.ring.room(self.producer, sample.cost_bytes, 1).word == "OK"
            assert self.ring.commit(self.producer, [(self.seq, sample)]).word == "OK"

    def reader(self, name, group, reuse="1"):
        who = Incarnation(f"{name}/0", "r1")
        self.ring.join_group(who, group, reuse, {"host": "node8", "pid": 1, "job_id": None})
        return who

    def take(self, who, group, count):
        taken = take(self.ring, who, group, count)
        return [sample.number for sample in taken.samples]

    def status(self):
        return monitor.status_of(self.ring)


@contextmanager
def hands_on(url, name):
    """Give what makes such rings, and let go of them."""
    made = []

    def make(**settings):
        made.append(Hands(url, name, **settings))
        return made[-1]

    yield make
    for hands in made:
        hands.connection.close()
