"""What a producer knows of the room in its ring: what it was granted ahead, and how long it has waited."""

import itertools
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from synthbroker import units
from synthbroker.errors import RingFullError
from synthbroker.replies import Answer

log = logging.getLogger("synthbroker")

WARN_EVERY_S = 60.0
_NOBODY_HOLDS = "no group reads it yet, or other producers have reserved what is left"


@dataclass(frozen=True)
class Lease:
    """Room that was granted together with a commit."""

    cost_bytes: int = 0
    samples: int = 0
    until_s: float = 0.0

    def covers(self, costs: Sequence[int]) -> int:
        """Say for how many of the first samples it is enough, given what each takes; for none if it is about to end."""
        if time.monotonic() >= self.until_s:
            return 0
        sums = itertools.accumulate(costs[: self.samples])
        return sum(1 for cost_bytes in sums if cost_bytes <= self.cost_bytes)


NO_LEASE = Lease()


class Patience:
    """How long one sample has waited for room, and when to say so."""

    def __init__(self, ring: str, wait_s: float) -> None:
        self._ring, self._wait_s = ring, wait_s
        self._since: float | None = None
        self._next_warning_s = WARN_EVERY_S

    def check(self, answer: Answer) -> None:
        """Count from the first call; warn each minute; raise RingFullError after `wait_s`."""
        now = time.monotonic()
        self._since = self._since or now
        waited_s = now - self._since
        size = units.format_size(answer.capacity_bytes)
        text = f"no room in ring {self._ring!r} ({answer.live} samples, {size}): {_why(answer)}"
        if waited_s >= self._wait_s:
            raise RingFullError(f"{text}; waited {units.format_duration(waited_s)}")
        if waited_s >= self._next_warning_s:
            self._next_warning_s += WARN_EVERY_S
            log.warning("%s; waiting since %s", text, units.format_duration(waited_s))


def _why(answer: Answer) -> str:
    """Say who or what holds a producer up; where the server lacks memory, an empty ring is held up by nobody."""
    if not answer.detail:
        return f"group {answer.holder!r} holds it up" if answer.holder else _NOBODY_HOLDS
    used = f", or have group {answer.holder!r} use samples up" if answer.holder and answer.live else ""
    return f"{answer.detail}; raise its maxmemory, or remove what else it holds{used}"
