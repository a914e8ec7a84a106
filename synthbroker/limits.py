"""When workers of `generate` stop by themselves: because their job ends, or the ring has had no room for long.

A worker begins a sample only if it will be in the ring, as far as one can tell, `margin_s` before the end. What it
takes is reckoned as the usual time for making one (the generator's, and that of `put`) plus the usual time on its way
(encoded, waiting for room, sent, committed), each the 95 % quantile of the latest 50 (`pace`). The first sample is left
out once there is a second: it pays for setting up. Before there is any, a sample is begun.

One that takes longer than usual after all may go on for two thirds of the margin; then it is given up, and the last
third is for the goodbye, which must be said before the job is killed.
"""

import time
from dataclasses import dataclass

from synthbroker.pace import Durations, Pace

DEFAULT_MARGIN_S = 30.0  # SLURM looks at time limits twice a minute
_LAST_THIRD = 1 / 3


@dataclass(frozen=True)
class Limits:
    """What a worker is told.

    Attributes:
        end_s: When its job ends, in seconds since 1970; None where that is not known.
        margin_s: How long before everything shall be over, in seconds.
        idle_s: After how long without room all workers stop, in seconds; None: never. Where it is set, a worker begins
            no sample while the ring has no room.
    """

    end_s: float | None = None
    margin_s: float = DEFAULT_MARGIN_S
    idle_s: float | None = None


class Clock:
    """Tells one worker whether there is time for another sample; its times are those of `time.monotonic`.

    Attributes:
        over_at: When everything shall be over; None where no end is known.
        give_up_at: When the sample in hand is given up.
    """

    def __init__(self, limits: Limits) -> None:
        self.over_at: float | None = None
        self.give_up_at: float | None = None
        self._making = Durations()
        self._first_s: float | None = None
        if limits.end_s is not None:
            end_at = time.monotonic() + limits.end_s - time.time()
            self.over_at = end_at - limits.margin_s
            self.give_up_at = end_at - _LAST_THIRD * limits.margin_s

    def made(self, seconds: float) -> None:
        """Count a sample that was made and put in so many seconds."""
        if self._first_s is None:
            self._first_s = seconds
        else:
            self._making.add(seconds)

    def left_s(self) -> float | None:
        """Say how long it is until everything shall be over; None where no end is known."""
        return None if self.over_at is None else self.over_at - time.monotonic()

    def need_s(self, pace: Pace) -> float:
        """Say how long the next sample takes, as far as one can tell."""
        return (self._making.usual_s or self._first_s or 0.0) + pace.on_way.usual_s

    def fits(self, pace: Pace) -> bool:
        """Say whether there is time for another sample; while there is plenty, that costs one comparison."""
        left_s = self.left_s()
        if left_s is None or left_s > self._making.longest_s + (self._first_s or 0.0) + pace.on_way.longest_s:
            return True
        return left_s > 0 and left_s >= self.need_s(pace)
