"""How many of a producer's latest samples failed; a generator of mostly bad ones is stopped."""

from collections import deque

from synthbroker.errors import BadSamplesError

LOOKED_AT = 100
FEWEST_BAD = 20


class Quality:
    """Counts over the last `LOOKED_AT` samples: too bad when at least `FEWEST_BAD` of them, and more than half, failed.

    Args:
        ring, producer: Whose samples.
    """

    def __init__(self, ring: str, producer: str) -> None:
        self._ring, self._producer = ring, producer
        self._good: deque[bool] = deque(maxlen=LOOKED_AT)
        self._error: BadSamplesError | None = None
        self.reason = ""

    def add(self, good: bool) -> None:
        """Count one sample in, in the order in which they were put."""
        self._good.append(good)
        if good or self._error is not None:
            return
        bad = len(self._good) - sum(self._good)
        if bad >= FEWEST_BAD and 2 * bad > len(self._good):
            self._error = BadSamplesError(
                f"producer {self._producer!r} of ring {self._ring!r} is stopped: {bad} of its last {len(self._good)} "
                f"samples went to quarantine (at most half may), the last one because {self.reason}; mend the "
                f"generator, or the ring's checks (`synthbroker quarantine {self._ring}` lists them with their recipes)"
            )

    def check(self) -> None:
        """Raise BadSamplesError once too many have failed."""
        if self._error is not None:
            raise BadSamplesError(*self._error.args)
