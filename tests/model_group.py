"""One group of the model of a ring: how far it was given samples, who holds what, and its runs."""

import math
from dataclasses import dataclass, field

COUNTERS = ("delivered", "acknowledged", "lost", "evicted_pending", "doubled", "reused", "redelivered", "skipped")
Drawn = tuple[int, int]  # number and uses of a sample that was given


@dataclass
class Checkpoint:
    """What a run has staged, or is done with."""

    serial: int
    token: str
    numbers: list[int]
    done: bool = False


@dataclass
class TrainingRun:
    """A training process and its former selves."""

    life: int = 0
    checkpoints: list[Checkpoint] = field(default_factory=list)

    def find(self, token: str) -> list[Checkpoint]:
        return [one for one in self.checkpoints if one.token == token]


@dataclass
class Group:
    """One group: how far it was given samples, who holds what, what may be given again."""

    reuse: str
    since: int
    reach: int
    front: int
    pending: dict[int, str] = field(default_factory=dict)
    uses: dict[int, int] = field(default_factory=dict)
    registered: dict[str, bool] = field(default_factory=dict)  # by reader: whether it is silent
    consumers: set[str] = field(default_factory=set)
    runs: dict[str, TrainingRun] = field(default_factory=dict)
    evicted: set[tuple[str, int]] = field(default_factory=set)  # run and number
    counters: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTERS, 0))

    @property
    def limit(self) -> float:
        return math.inf if self.reuse == "inf" else int(self.reuse)

    def count(self, counter: str, by: int = 1) -> None:
        self.counters[counter] += by

    def held_by(self, reader: str) -> list[int]:
        return sorted(number for number, holder in self.pending.items() if holder == reader)

    def keep(self) -> int:
        """The lowest number that this group still needs."""
        return min([self.reach + 1, *self.pending])

    def claim(self, reader: str, count: int, given: list[Drawn]) -> list[Drawn]:
        """Take over from the dead, in the order in which the server knows them: the one that the answer shows."""
        claimed: list[Drawn] = []
        holders = [self.pending.get(number, "") for number, uses in given if uses == 0]
        for other in sorted(self.consumers - {reader}, key=[*holders, *sorted(self.consumers)].index):
            if other in self.registered and not self.registered[other]:
                continue
            for number in self.held_by(other)[: count - len(claimed)]:
                self.pending[number] = reader
                self.count("redelivered")
                claimed.append((number, 0))
            if not self.held_by(other):
                self.consumers.discard(other)
                self.registered.pop(other, None)
        return claimed

    def draw_again(self, again: list[Drawn], room: int, live: range) -> None:
        """Check what was given once more, of what lives, where there was room for so many; and count it."""
        self.count("reused", len(again))
        if self.limit == math.inf:
            possible = range(live.start, min(self.reach, live.stop - 1) + 1)
            assert len(set(again)) == len(again) <= max(room, 0)
            assert all(number in possible and uses == 2 for number, uses in again)
            assert again or not possible or room <= 0
            return
        left = sum(int(self.limit) - uses for uses in self.uses.values())
        assert len(again) == min(max(room, 0), left)
        for number, uses in again:
            assert self.uses[number] == min(self.uses.values()) == uses - 1
            self.uses[number] = uses
            if uses >= self.limit:
                del self.uses[number]

    def awaited_by(self, reader: str) -> bool:
        """Say whether somebody who is not of the reader's family holds samples, or somebody of it who has left."""
        family = reader.partition("/")[0]
        others = set(self.pending.values()) - {reader}
        return any(other.partition("/")[0] != family or other not in self.registered for other in others)

    def stage(self, run: str, token: str, numbers: list[int]) -> None:
        serial = int(token.partition(".")[0])
        self.runs[run].checkpoints.append(Checkpoint(serial, token, numbers))

    def begin(self, run: str) -> None:
        """Begin another life of a run: what was staged is forgotten, its former readers are shut out."""
        mine = self.runs.setdefault(run, TrainingRun())
        mine.life += 1
        mine.checkpoints = [one for one in mine.checkpoints if one.done]
        self.evicted = {one for one in self.evicted if one[0] != run}
        for reader in [reader for reader in self.registered if reader.startswith(f"{run}/")]:
            del self.registered[reader]
