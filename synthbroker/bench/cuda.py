"""Work for a GPU that takes a given time, and little of it ahead: imported where it is done only, for it loads torch.

With "cpu" for the device all of it runs there, for tests.
"""

import statistics
import time
from collections import deque
from typing import Any

import torch

_AT_ONCE = 32  # products that are timed together: one alone is as short as giving it to the GPU
_TIMES = 5
_WARM_UP_S = 0.5  # an idle GPU has a low clock


def is_there() -> bool:
    """Say whether torch sees a GPU."""
    return torch.cuda.is_available()


class Work:
    """Matrix products, one after the other, which need each other's results.

    Args:
        device: Where.
        side: Of the matrices, float32.
        products: How many.

    Attributes:
        start: A matrix to begin with.
    """

    def __init__(self, device: str, side: int, products: int) -> None:
        draws = torch.Generator().manual_seed(0)
        # So scaled, products neither grow nor vanish: on zeros and infinities a GPU is quicker.
        self._matrix = (torch.randn(side, side, generator=draws) / side**0.5).to(device)
        self.start = torch.randn(side, side, generator=draws).to(device)
        self._products = products

    def __call__(self, start: torch.Tensor | None = None) -> torch.Tensor:
        """Give the work to the current stream; its last product is new memory each time."""
        value = self.start if start is None else start
        for _ in range(self._products):
            value = self._matrix @ value
        return value


def products_for(seconds: float, device: str, side: int) -> int:
    """Say how many products take so long here; at least one. Takes a good half second."""
    work, took_s = Work(device, side, _AT_ONCE), list[float]()
    end = time.perf_counter() + _WARM_UP_S
    while len(took_s) < _TIMES or time.perf_counter() < end:
        before = time.perf_counter()
        work()
        finish(device)
        took_s.append(time.perf_counter() - before)
    return max(round(seconds * _AT_ONCE / statistics.median(took_s[-_TIMES:])), 1)


def finish(device: str) -> None:
    """Wait until a device has done all it was given."""
    if device != "cpu":
        torch.cuda.synchronize(device)


class Ahead:
    """Keeps a loop from running away from its GPU, as what it waits for elsewhere would.

    Args:
        device: The GPU.
        most: So many pieces of work may be unfinished.
    """

    def __init__(self, device: str, most: int = 2) -> None:
        self._device, self._most = device, most
        self._unfinished: deque[Any] = deque()

    def mark(self) -> bool:
        """End a piece of work, wait if there are too many, and say whether an earlier one is known to be finished."""
        if self._device == "cpu":
            return True
        make: Any = torch.cuda.Event
        event = make(blocking=True)  # a thread that waits sleeps
        event.record(torch.cuda.current_stream())
        self._unfinished.append(event)
        if len(self._unfinished) <= self._most:
            return False
        self._unfinished.popleft().synchronize()
        return True
