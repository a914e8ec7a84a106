"""How a producer gets on: how long its samples are on their way, and since when the ring has had no room for them."""

import math
import time
from collections import deque
from collections.abc import Iterable
from threading import Event

LATEST = 50  # of the latest so many durations the usual one is taken
USUAL_SHARE = 0.95  # which is longer than so many of them: one slow sample in twenty is not what is usual


def usual(durations_s: Iterable[float]) -> float:
    """Give the 95 % quantile (nearest rank, so that it is one of them: of fewer than 20 the longest); 0 of none."""
    ordered = sorted(durations_s)
    return ordered[math.ceil(USUAL_SHARE * len(ordered)) - 1] if ordered else 0.0


class Durations:
    """The latest of many durations.

    Attributes:
        longest_s: The longest that there ever was.
    """

    def __init__(self) -> None:
        self.longest_s = 0.0
        self._latest: deque[float] = deque(maxlen=LATEST)

    def add(self, seconds: float) -> None:
        """Count one."""
        self._latest.append(seconds)
        self.longest_s = max(self.longest_s, seconds)

    @property
    def usual_s(self) -> float:
        """How long it usually takes at most."""
        return usual(self._latest.copy())


class Pace:
    """Written by the sending thread, read by all.

    Attributes:
        on_way: How long samples were on their way, from `put` until they were committed: of each delivery the longest.
        sending_s: Seconds spent on asking for room, sending and committing.
        generation_s: What it takes to make a sample, the mean; 0 before the second. The generator's thread writes it.
    """

    def __init__(self) -> None:
        self.on_way = Durations()
        self.sending_s = 0.0
        self.generation_s = 0.0
        self._blocked_since: float | None = None
        self._room = Event()
        self._room.set()

    @property
    def blocked_for_s(self) -> float:
        """How long the ring has had no room for the next sample, without a break; 0 where it has."""
        since = self._blocked_since
        return 0.0 if since is None else time.monotonic() - since

    def wait_for_room(self, wait_s: float) -> bool:
        """Wait until something of ours went into the ring; False if that took longer than `wait_s` seconds."""
        return self._room.wait(wait_s)

    def blocked(self) -> None:
        """The ring has no room."""
        self._blocked_since = self._blocked_since or time.monotonic()
        self._room.clear()

    def moved(self) -> None:
        """Something went into the ring, or never will."""
        self._blocked_since = None
        self._room.set()
