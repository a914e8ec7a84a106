"""A generator for the cluster's tests: tiny tensors, quick or slow, for ever."""

import os
import threading

import numpy as np


def endless(worker):
    pause = threading.Event()
    pause_s = float(os.environ.get("PAUSE_S", "0.02"))
    n = 0
    while True:
        x = np.full(4, n % 7, np.float32)
        yield {"x": x, "y": x.sum(keepdims=True), "n": n, "task": worker.array_task_id or 0}
        n += 1
        pause.wait(pause_s)
