"""Generators for the cluster's tests: tiny tensors, some or for ever."""

import itertools
import json
import os
import threading
from pathlib import Path

import numpy as np

_PAUSE = threading.Event()


def _make(worker, n):
    x = np.full(4, n % 7, np.float32)
    return {"x": x, "y": x.sum(keepdims=True), "n": n, "task": worker.array_task_id or 0}


def endless(worker):
    for n in itertools.count():
        yield _make(worker, n)
        _PAUSE.wait(float(os.environ.get("PAUSE_S", "0.02")))


def thirty(worker):
    for n in range(30):
        yield _make(worker, n)
        _PAUSE.wait(float(os.environ.get("PAUSE_S", "0.02")))


def environment(worker):
    """Tell what the job was given."""
    Path("environment.json").write_text(json.dumps(dict(os.environ)))
    yield _make(worker, 0)
