"""Counting at the trainer's side: steady state only."""

import time

from synthbroker.errors import SynthbrokerError

WARM_UP = 0.2  # of a run's time is not counted


class Meter:
    """Counts samples per second between arrivals, after a warm-up.

    Args:
        seconds: How long a run takes, from the first arrival; at least one arrival is counted.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._first = self._mark = self._last = 0.0
        self._samples = 0

    def count(self, samples: int) -> bool:
        """Count a batch that has just come; says whether the run goes on."""
        now = time.perf_counter()
        self._first = self._first or now
        if self._mark:
            self._samples += samples
            self._last = now
        elif now - self._first >= WARM_UP * self._seconds:
            self._mark = now
        return not (self._samples and now - self._first >= self._seconds)

    @property
    def counting(self) -> bool:
        """Whether the warm-up is over."""
        return self._mark > 0

    @property
    def counted_s(self) -> float:
        """Seconds that were counted."""
        return self._last - self._mark

    @property
    def per_s(self) -> float:
        """Samples per second.

        Raises:
            SynthbrokerError: The stream ended before there was anything to count.
        """
        if not self._samples:
            raise SynthbrokerError("the samples ended before there was anything to count")
        return self._samples / self.counted_s
