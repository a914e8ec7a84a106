"""What a producer knows of the room in its ring: what it was granted ahead, and why there is none."""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

from synthbroker import units
from synthbroker.replies import Answer

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


def why_none(answer: Answer) -> str:
    """Say what a ring without room holds, and who or what holds a producer up."""
    return f"{answer.live} samples, {units.format_size(answer.capacity_bytes)}: {_why(answer)}"


def _why(answer: Answer) -> str:
    """Say who holds a full ring up; where the server lacks memory, nobody holds an empty one up."""
    if not answer.detail:
        return f"group {answer.holder!r} holds it up" if answer.holder else _NOBODY_HOLDS
    used = f", or have group {answer.holder!r} use samples up" if answer.holder and answer.live else ""
    return f"{answer.detail}; raise its maxmemory, or remove what else it holds{used}"
