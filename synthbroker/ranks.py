"""Several ranks of one training: which one this process is, and which run they all belong to."""

import os
import re
import secrets
from collections import Counter
from dataclasses import dataclass, replace

from synthbroker import settings
from synthbroker.options import ReadOptions

_lives: dict[int, str] = {}  # by process id: a fork lives a life of its own
_sittings: Counter[tuple[int, int, str | None, str, str | None]] = Counter()


@dataclass(frozen=True)
class Place:
    """One rank's place in a run whose ranks are dealt whole rounds, a batch for each of them.

    Attributes:
        rank: Number of this rank, from 0.
        ranks: How many there are.
        run: Name of the run, the same for all ranks.
        attempt: Which attempt at it this is; "" where nobody says.
        word: This life of the rank's process.
        sitting: Counts the lives of this process's readers; readers of one sitting are dealt the same rounds.
    """

    rank: int
    ranks: int
    run: str
    attempt: str
    word: str
    sitting: int = 0

    @property
    def family(self) -> str:
        """Name the readers of this rank."""
        return f"{self.run}.r{self.rank}"


def find(rank: int | None, ranks: int | None, name: str | None) -> Place | None:
    """Say which rank this process is; None where it is the only one.

    Args:
        rank: What the user or torch.distributed says, if anything; else the environment does.
        ranks: Likewise.
        name: What the user calls this training, if anything.

    Raises:
        ValueError: What the environment says cannot be.
    """
    if rank is None or ranks is None:
        rank, ranks = settings.rank() or (0, 1)
        check_rank(rank, ranks)
    if ranks == 1:
        return None
    run, restarts = settings.run()
    # Under one name another job is another attempt, and neither comes before the other.
    attempt = f"{run}.{restarts}" if name is not None and run else str(restarts)
    word = _lives.setdefault(os.getpid(), secrets.token_hex(4))
    return Place(rank, ranks, re.sub(r"[\s/:]", "_", name or run or "ranks")[:100], attempt, word)


def seated(place: Place, options: ReadOptions) -> Place:
    """Begin another sitting: new readers, which are dealt rounds from the first on."""
    of = (os.getpid(), place.rank, options.url, options.ring, options.group)
    _sittings[of] += 1
    return replace(place, sitting=_sittings[of])


def check_rank(rank: object, ranks: object) -> None:
    """Check what a user, or the environment, says of ranks; both are None where nobody says anything.

    Raises:
        TypeError, ValueError: They cannot be.
    """
    if rank is None and ranks is None:
        return
    if rank is None or ranks is None:
        raise ValueError(f"rank and world_size go together, got rank={rank!r} and world_size={ranks!r}")
    for what, value in ("rank", rank), ("world_size", ranks):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{what} must be a whole number, got {value!r}")
    if not 0 <= rank < ranks:  # type: ignore[operator]
        raise ValueError(f"rank must be from 0 to below world_size, got rank={rank} of world_size={ranks}")
