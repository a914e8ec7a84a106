"""What share of its time a process spends waiting: measured where it waits, told with its heartbeat."""

import math
import time
from ctypes import Array, c_double

WINDOW_S = 30.0
_LEAST_S = 0.1  # of less than that no share is told: a process that has just begun would be all wait


class Stopwatch:
    """Adds up the time between `start` and `stop`, and what has passed of it while it runs.

    Args:
        cells: Two numbers, total and beginning: memory that processes share, where one waits and another tells of it.
            All processes of a machine have the same `time.monotonic`.
    """

    def __init__(self, cells: "Array[c_double] | None" = None) -> None:
        self._cells: Array[c_double] | list[float] = [0.0, 0.0] if cells is None else cells

    def start(self) -> None:
        """Begin to wait."""
        self._cells[1] = time.monotonic()

    def stop(self) -> None:
        """End waiting."""
        since, self._cells[1] = self._cells[1], 0.0
        self._cells[0] += time.monotonic() - since

    @property
    def total_s(self) -> float:
        """Seconds so far."""
        total_s, since = self._cells
        return total_s + (time.monotonic() - since if since else 0.0)


class Share:
    """Share of the time that a total of seconds takes up: lately, and in all.

    "Lately" is a mean over all time in which what was t seconds ago counts exp(-t / 30): a short wait shows and fades,
    and in the first half minute it is the mean since the beginning. It may be updated at any time.

    Args:
        total_s: What the total is at the beginning.

    Attributes:
        lately, ever: From 0 to 1; 0 in the first tenth of a second.
        age_s: Seconds since the beginning.
    """

    def __init__(self, total_s: float = 0.0) -> None:
        self.lately = self.ever = self.age_s = 0.0
        self._first_s = self._total_s = total_s
        self._began = time.monotonic()
        self._weighted_s = self._weight_s = 0.0

    def update(self, total_s: float) -> None:
        """Learn what the total is now."""
        age_s = time.monotonic() - self._began
        fading = math.exp(-(age_s - self.age_s) / WINDOW_S)
        passed_s, spent_s = age_s - self.age_s, total_s - self._total_s
        self._weighted_s = fading * self._weighted_s + spent_s
        self._weight_s = fading * self._weight_s + passed_s
        self.age_s, self._total_s = age_s, total_s
        if age_s >= _LEAST_S:
            self.lately = min(max(self._weighted_s / self._weight_s, 0.0), 1.0)
            self.ever = min(max((total_s - self._first_s) / age_s, 0.0), 1.0)
