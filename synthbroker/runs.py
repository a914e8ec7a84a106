"""The Redis commands of training runs: who a run is now, and what its checkpoints hold (`lua/runs.lua`).

A run is a training process together with its former selves, known by a name; each of its processes is a life of it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from synthbroker import ranges
from synthbroker.errors import RingMissingError, ShutOutError, UnacknowledgedError
from synthbroker.ranges import Range
from synthbroker.replies import Reply
from synthbroker.ring import Ring

MOST_STAGED = 1000


@dataclass
class Run:
    """A training run, as one of its processes sees it; travels to worker processes.

    Attributes:
        name: What all its processes have in common.
        life: The word of this process; without one it shuts nobody out, and nobody shuts it out.
        checkpoints: Whether it acknowledges by checkpoints.
        settled: Whether the server knows that this process is the run now.
        serial: The newest checkpoint of it that is known.
        staged: How many checkpoints are staged and not finished; their acknowledgement may be under way.
        rank, ranks: Which of several ranks this process is, and of how many; 0 ranks: it is alone.
        whole: Name of the run whose rank this is, and whose checkpoints these are; empty where it is alone.
    """

    name: str
    life: str = ""
    checkpoints: bool = False
    settled: bool = False
    serial: int = 0
    staged: int = 0
    rank: int = 0
    ranks: int = 0
    whole: str = ""

    @property
    def known_as(self) -> str:
        """What checkpoints call it, whatever the number of ranks."""
        return self.whole or self.name

    def become(self, name: str) -> None:
        """Be the run of that name, or one of its ranks."""
        self.name, self.whole = (f"{name}.r{self.rank}", name) if self.ranks else (name, "")


@dataclass(frozen=True)
class Resumed:
    """What the server knew when a run was resumed.

    Attributes:
        gone: Nothing was done, because samples are gone.
        known: Whether the checkpoint in question is.
        later: Numbers that checkpoints after it have acknowledged, as far as that is remembered.
        evicted: Numbers that left the ring before the run was done with them, as far as that is remembered.
    """

    gone: bool
    known: bool
    later: Sequence[Range]
    evicted: Sequence[Range]


def shut_out(ring: Ring, group: str, run: Run) -> None:
    """Make this process the run: former lives get ShutOutError, and what they hold is for others at once."""
    _resume(ring, group, run, "-", go_on=True)
    run.settled = True


def resume(ring: Ring, group: str, run: Run, token: str, *, go_on: bool) -> Resumed | None:
    """Shut former lives out, and go on from a checkpoint: finish what it holds, forget what was staged later.

    Args:
        ring: The ring, which believes in the epoch of the checkpoint.
        group: The group.
        run: The run.
        token: The checkpoint's; empty where nothing was staged when it was made.
        go_on: Also where samples are gone; else nothing is done then.

    Returns:
        What the server knew; None where there is no such group.
    """
    resumed = _resume(ring, group, run, token, go_on=go_on)
    run.settled = run.settled or (resumed is not None and not resumed.gone)
    return resumed


def _resume(ring: Ring, group: str, run: Run, token: str, *, go_on: bool) -> Resumed | None:
    who = (run.name, run.life, int(run.checkpoints))
    reply = ring.script("resume", group, *who, token, int(go_on), run.whole, run.ranks)
    if reply[0] == b"NOGROUP":
        return None
    run.serial = max(run.serial, int(reply[1]))
    later, evicted = (tuple(ranges.parse(text.decode())) for text in reply[3:5])
    return Resumed(reply[0] == b"GONE", reply[2] == b"1", later, evicted)


def stage(
    ring: Ring, group: str, run: Run, token: str, numbers: Sequence[Range], rounds: Mapping[int, int] = {}
) -> list[Range]:
    """Write down what a run has trained on since its last checkpoint; may be repeated.

    Args:
        ring: The ring.
        group: The group.
        run: The run.
        token: Names the checkpoint.
        numbers: What it has trained on, and what the other ranks were dealt in the same rounds.
        rounds: For each sitting that they were dealt in the last of those rounds.

    Returns:
        What is staged: also what other ranks took in those rounds in place of bad samples.

    Raises:
        RingMissingError: There is no such ring or group.
        ShutOutError: A newer life of the run took over.
        UnacknowledgedError: Too many are staged and none is finished.
    """
    last = " ".join(f"{sitting}:{number}" for sitting, number in rounds.items())
    told = (token, ranges.text(numbers), MOST_STAGED, run.whole, last)
    reply = ring.script("stage", group, run.name, run.life, *told)
    if reply[0] == b"MANY":
        raise UnacknowledgedError(
            f"run {run.name!r} has made {reply[1]} checkpoints of ring {ring.name!r} and acknowledged none of them: "
            "call acknowledge() when a checkpoint is safely written"
        )
    _checked(reply, ring, group, run)
    return ranges.merge([*numbers, *ranges.parse(reply[1].decode())])


def finish(ring: Ring, group: str, run: Run, token: str) -> None:
    """Acknowledge what was staged under the token's word up to it; may be repeated.

    Raises:
        RingMissingError: There is no such ring or group.
        ShutOutError: A newer life of the run took over.
    """
    _checked(ring.script("finish", group, run.name, run.life, token, run.whole), ring, group, run)


def keep(ring: Ring, group: str, consumer: str, about: Mapping[str, Any], numbers: Sequence[Range]) -> None:
    """Give samples that a reader holds, as far as it does, to another consumer, which is registered with that.

    Raises:
        RingMissingError: There is no such ring or group.
    """
    reply = ring.script("keep", group, consumer, json.dumps(about), ranges.text(numbers))
    if reply[0] == b"NOGROUP":
        raise RingMissingError(f"ring {ring.name!r} has no group {group!r} (any more)")


def _checked(reply: Reply, ring: Ring, group: str, run: Run) -> None:
    if reply[0] == b"SHUT":
        raise ShutOutError(
            f"a newer reader named {run.name!r} took this one's place in group {group!r} of ring {ring.name!r}"
        )
    if reply[0] == b"NOGROUP":
        raise RingMissingError(f"ring {ring.name!r} has no group {group!r} (any more)")
