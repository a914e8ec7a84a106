"""What is asked of a ring and what its scripts answer, as values."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

Reply = list[Any]
Fields = dict[bytes, bytes]
_MOST_ARRIVALS = 20  # in an epoch's name, as in lib.lua


@dataclass(frozen=True)
class Incarnation:
    """One life of a producer or consumer: its name and a random word."""

    name: str
    word: str

    def __str__(self) -> str:
        return f"{self.name}:{self.word}"


@dataclass(frozen=True)
class Settings:
    """What is asked of a ring when it is opened; None takes what the ring has, or the default for a new one."""

    when_full: str | None = None
    capacity_bytes: int | None = None
    max_samples: int | None = None
    schema: str | None = None
    info: str | None = None
    checks: str | None = None
    producers: int | None = None
    groups: tuple[str, ...] = ()

    def arguments(self) -> Iterator[tuple[str, str]]:
        """Give name and value as `open.lua` takes them."""
        values = {
            "when_full": self.when_full,
            "capacity": self.capacity_bytes,
            "max_samples": self.max_samples,
            "schema": self.schema,
            "info": self.info,
            "checks": self.checks,
            "producers": self.producers,
            "groups": ",".join(self.groups),
        }
        for name, value in values.items():
            yield name, "" if value is None else str(value)


@dataclass(frozen=True)
class Meta:
    """A ring's own record."""

    epoch: str
    when_full: str
    capacity_bytes: int
    max_samples: int
    schema: str
    info: dict[str, Any]
    checks: str
    ended: bool
    first: int
    next: int
    bytes: int
    leased_bytes: int
    raw: dict[str, str]

    @property
    def live(self) -> int:
        """How many samples are in the ring."""
        return self.next - self.first

    def bound(self, other: str) -> int:
        """Give the first number that does not mean the same sample as in another epoch; 0: none does."""
        bound = _bound(other, self.epoch)
        return self.next if bound == math.inf else int(bound)

    @property
    def settings(self) -> Settings:
        """What it would have to be asked for to be made again; groups are not among it."""
        return Settings(
            when_full=self.when_full,
            capacity_bytes=self.capacity_bytes,
            max_samples=self.max_samples,
            schema=self.schema or None,
            info=self.raw["info"],
            checks=self.checks,
            producers=int(self.raw["producers"]),
        )


@dataclass(frozen=True)
class Memory:
    """A server's memory in bytes: its limit (0: none), the machine's, and what is used."""

    maxmemory: int
    total: int
    used: int

    @property
    def limit_bytes(self) -> int:
        """What it can use at most; 0 where it does not say."""
        return self.maxmemory or self.total


@dataclass(frozen=True)
class Answer:
    """What `room` and `commit` say.

    Attributes:
        word: OK, or what is in the way.
        last: The last sequence number taken (commit).
        holder: The group that holds a full ring up, empty where there is none.
        room_id: Where to wait for room from.
        live: Samples in a full ring.
        capacity_bytes: Its capacity.
        detail: What else the server said.
        granted: For how many samples there is room.
        newest: Number of the newest sample in the ring (commit).
    """

    word: str
    last: int = 0
    holder: str = ""
    room_id: str = "0-0"
    live: int = 0
    capacity_bytes: int = 0
    detail: str = ""
    granted: int = 0
    newest: int = 0


class Given(NamedTuple):
    """One entry that a group was given; `uses` counts this time, 0: somebody who died had it before."""

    number: int
    uses: int
    fields: Fields


@dataclass(frozen=True)
class Taken:
    """What `take` says.

    Attributes:
        word: OK, EMPTY (wait and ask again), DRAINED (likewise: others may leave something) or END (nothing
            comes any more).
        now_s: The server's time.
        wait_id: Where to wait for new samples from.
        held: Producers wait for room that this group's own pending samples take up.
        samples: What was given.
        gone: How many were given besides and had left the ring before their entries were read.
        others: Numbers of what other ranks were dealt in the same round, if that was asked for.
    """

    word: str
    now_s: float
    wait_id: str
    held: bool
    samples: tuple[Given, ...]
    gone: int = 0
    others: tuple[int, ...] = ()


def full(reply: Reply, at: int) -> Answer:
    """Read a FULL, whose four last items are the same for `room` and `commit`."""
    holder, room_id, live, capacity = (item.decode() for item in reply[at : at + 4])
    last, newest = (int(reply[1]), int(reply[2])) if at == 3 else (0, 0)
    return Answer("FULL", last, holder, room_id, int(live), int(capacity), newest=newest)


def pairs(reply: Reply) -> dict[str, str]:
    """Turn a flat reply of names and values into a dict of text."""
    return {reply[i].decode(): reply[i + 1].decode() for i in range(0, len(reply), 2)}


def read_meta(reply: Reply) -> Meta:
    """Read a ring's record from names and values."""
    raw = pairs(reply)
    return Meta(
        epoch=raw["epoch"],
        when_full=raw["when_full"],
        capacity_bytes=int(raw["capacity"]),
        max_samples=int(raw["max_samples"]),
        schema=raw["schema"],
        info=json.loads(raw["info"]),
        checks=raw["checks"],
        ended=raw["ended"] != "0",
        first=int(raw["first"]),
        next=int(raw["next"]),
        bytes=int(raw["bytes"]),
        leased_bytes=int(raw["leased_bytes"]),
        raw=raw,
    )


def _bound(other: str, current: str) -> float:
    """As `bound_of` in lib.lua: 0 for an epoch of another ring, infinity for the same one."""
    (base, *theirs), (same, *ours) = other.split("."), current.split(".")
    common = [arrival for arrival in theirs if arrival in ours]
    if base != same or (not common and max(len(theirs), len(ours)) == _MOST_ARRIVALS):
        return 0
    since = (*_after(theirs, common), *_after(ours, common))
    return min((int(arrival.partition("-")[0]) for arrival in since), default=math.inf)


def _after(arrivals: list[str], common: list[str]) -> list[str]:
    return arrivals[arrivals.index(common[-1]) + 1 :] if common else arrivals


def fields_of(flat: Reply) -> Fields:
    """Turn an entry's names and values into a dict."""
    items = iter(flat)
    return dict(zip(items, items, strict=True))


def number_of(entry_id: bytes) -> int:
    """Read a sample's number from its id."""
    return int(entry_id.partition(b"-")[0])
