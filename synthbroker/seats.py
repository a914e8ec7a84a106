"""What a reader and where its samples come from have in common."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from synthbroker.ranks import Place
from synthbroker.replies import Given, Meta
from synthbroker.runs import Run
from synthbroker.shares import Stopwatch


@dataclass(frozen=True)
class Seat:
    """Which of several readers this is.

    Attributes:
        family: Readers that one training loop waits for together; none of them waits for what the others hold.
        worker: Number of this one.
        workers: How many there are.
        word: Where it is set, the training process acknowledges and says goodbye for this one, and knows it by this.
        run: Whose samples these are, and who may take this one's place.
        place: Which of several ranks that training process is.
        starved: Where the training process measures for this one how long its loop waits for batches.
    """

    family: str
    worker: int = 0
    workers: int = 1
    word: str = ""
    run: Run | None = None
    place: Place | None = None
    starved: Stopwatch | None = None

    @property
    def acknowledges(self) -> bool:
        """Whether this one acknowledges, and says goodbye, itself."""
        return not self.word


@dataclass(frozen=True)
class Found:
    """Entries that were given, and the server's time then.

    Attributes:
        samples: The entries; there are none only with one of the following.
        now_s: The server's time.
        gone: How many had left the ring before they could be read.
        ended: Nothing comes any more.
        drained: Nothing comes but what others hold, who may wait for what is in the batch in the making.
        stuck: Nothing comes before the samples of the batch in the making are acknowledged: they are the oldest of a
            full ring, which cannot make room while they are held; as when a dead reader's samples were taken over.
        whole: The batch in the making gets no more; its round was small.
        others: Numbers of what the other ranks were dealt in the same round.
        round: The sitting (`ranks`) and the number of that round.
    """

    samples: Sequence[Given]
    now_s: float = 0.0
    gone: int = 0
    ended: bool = False
    drained: bool = False
    stuck: bool = False
    whole: bool = False
    others: tuple[int, ...] = ()
    round: tuple[int, int] | None = None


@dataclass
class Counts:
    """Running totals of one reader; `waiting_s` is its own wait for samples, `starved` the training loop's for it."""

    samples: int = 0
    raw_bytes: int = 0
    damaged: int = 0
    overrun: int = 0
    waiting_s: float = 0.0
    starved: Stopwatch = field(default_factory=Stopwatch)
    extra: dict[str, Any] = field(default_factory=dict)


class Source(Protocol):
    """What a reader needs of where its samples come from."""

    meta: Meta

    def start(self) -> None:
        """Get ready; blocks until there is a ring."""

    def begin(self) -> None:
        """Get ready for another batch."""

    def take(self, count: int, most: int, holding: Sequence[int]) -> Found:
        """Give samples for a batch that has those in `holding` and needs `count`; blocks until there is one.

        Where many are waiting, it may be as many as `most`.
        """

    def ahead(self, count: int, most: int) -> None:
        """Ask for what the next batch will want, if nothing is under way; the numbers as for `take`."""

    def arrived(self) -> Found | None:
        """Give what was asked for ahead, if it is here and in order; else `take` will see to it."""

    def acknowledge(self, epoch: str, numbers: Sequence[int]) -> None:
        """Say that samples are done with."""

    def missed(self, sample: Given) -> None:
        """Hear that the ring has evicted, or the server lost, a sample before it could be received."""

    def holds(self, numbers: Collection[int]) -> bool:
        """Say whether any of these samples is held by this reader."""

    def close(self, *, leave: bool) -> None:
        """Stop, and say goodbye if asked to."""
