"""Samples that tell whose they are, and what was written down about them: loss, doubling, mixing and damage show.

A sample is `mark`, int64 (5,): producer, life (how often that producer had been started before), sequence number, when
it was made in ns since 1970, xxh3 of `x`; and `x`, int64 (n,), whose values rise by one from a number that only this
sample has. So a whole `x` under another's mark (mixed) can be told from one that is no sample's (corrupt).

Everybody writes into a file of his own, one line for each event, past all buffers: kill -9 takes none of it back.
"""

import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

SCHEMA = "mark:i64[5] x:i64[*]"
WHOLE, MIXED, CORRUPT = "whole", "mixed", "corrupt"

# Numbers in `x`, and how often: in their entries, in parts that they share, in a part of their own, in several parts.
SIZES = {
    "mixed": ((16, 700, 50), (1_000, 12_000, 30), (13_000, 80_000, 17), (260_000, 640_000, 3)),
    "tiny": ((16, 600, 1),),
    "small": ((16, 700, 60), (1_000, 8_000, 40)),
    "big": ((150_000, 640_000, 1),),
}

Id = tuple[int, int, int]  # producer, life, sequence number


def base_of(one: Id) -> int:
    """Give the first value of a sample's `x`; no two samples' values overlap."""
    producer, life, seq = one
    return (producer << 52) | (life << 40) | (seq << 20)


def make(one: Id, count: int) -> dict[str, Any]:
    """Make a sample of so many numbers."""
    x = np.arange(count, dtype=np.int64) + base_of(one)
    return {"mark": np.array([*one, time.time_ns(), _digest(x)], np.int64), "x": x}


def sizes(profile: str, seed: object) -> Iterator[int]:
    """Draw sizes for ever."""
    draw = random.Random(str(seed))
    ranges = SIZES[profile]
    while True:
        (least, most, _) = draw.choices(ranges, [weight for *_, weight in ranges])[0]
        yield draw.randint(least, most)


def verdict(mark: Any, x: Any) -> str:
    """Say what a sample is that came out of a ring."""
    if len(x) and int(x[0]) == base_of((int(mark[0]), int(mark[1]), int(mark[2]))) and _digest(x) == int(mark[4]):
        return WHOLE
    rises = len(x) > 0 and int(x[0]) % (1 << 20) == 0 and bool((x - np.arange(len(x)) == x[0]).all())
    return MIXED if rises else CORRUPT


def _digest(x: Any) -> int:
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(x)) >> 1


class Diary:
    """Writes lines that stay, whatever becomes of the writer."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(self, *words: object) -> None:
        """Write one line, words between blanks."""
        os.write(self._file, (" ".join(map(str, words)) + "\n").encode())


@dataclass(frozen=True)
class Trained:
    """One sample that a training loop was given."""

    one: Id
    verdict: str
    uses: int
    number: int
    epoch: str
    made_ns: int
    at_ns: int
    reader: str


@dataclass
class Account:
    """What all diaries together say.

    Attributes:
        made: Samples that generators had in hand.
        committed: Those that a flush said are in the ring.
        stats: The last word of each generator that ended in order.
        trained: What training loops were given, in the order of each diary.
        ended: Readers that came to the end of the ring.
        errors: What processes died of, as "who: type: message".
        survived: What they went on after.
    """

    made: set[Id] = field(default_factory=set)
    committed: set[Id] = field(default_factory=set)
    stats: list[dict[str, Any]] = field(default_factory=list)
    trained: list[Trained] = field(default_factory=list)
    ended: set[str] = field(default_factory=set)
    errors: list[str] = field(default_factory=list)
    survived: list[str] = field(default_factory=list)
    _read_to: dict[str, int] = field(default_factory=dict)
    _flushed: dict[tuple[int, int], int] = field(default_factory=dict)

    @property
    def delivered(self) -> Counter[Id]:
        """How often each sample was trained on."""
        return Counter(item.one for item in self.trained)

    @property
    def lost(self) -> set[Id]:
        """Those that were committed and never trained on."""
        return self.committed - self.delivered.keys()

    @property
    def doubled(self) -> Counter[Id]:
        """How often samples came again for no reason.

        Reasons are that they were claimed, because a reader seemed dead (uses 0), or that they fill a round (uses 2).
        """
        claimed = Counter(item.one for item in self.trained if item.uses != 1)
        return self.delivered - claimed - Counter(self.delivered.keys())

    @property
    def damaged(self) -> list[Trained]:
        """Those that are not what was put."""
        return [item for item in self.trained if item.verdict != WHOLE]

    def read_on(self, folder: Path) -> None:
        """Read what was written into all diaries of a folder since this was asked for last."""
        for path in sorted(folder.glob("*.diary")):
            with path.open() as file:
                file.seek(self._read_to.get(path.stem, 0))
                text = file.read()
            whole = text[: text.rfind("\n") + 1]
            self._read_to[path.stem] = self._read_to.get(path.stem, 0) + len(whole)
            for line in whole.splitlines():
                word, _, rest = line.partition(" ")
                self._read(path.stem, word, rest)

    def _read(self, who: str, word: str, rest: str) -> None:
        if word == "made":
            producer, life, seq = map(int, rest.split())
            self.made.add((producer, life, seq))
        elif word == "committed":
            producer, life, count = map(int, rest.split())
            self.committed.update((producer, life, seq) for seq in range(self._flushed.get((producer, life), 0), count))
            self._flushed[producer, life] = count
        elif word == "trained":
            producer, life, seq, found, uses, number, epoch, made_ns, at_ns = rest.split()
            one = (int(producer), int(life), int(seq))
            self.trained.append(Trained(one, found, int(uses), int(number), epoch, int(made_ns), int(at_ns), who))
        elif word == "stats":
            self.stats.append(json.loads(rest))
        elif word == "ended":
            self.ended.add(who)
        elif word == "survived":
            self.survived.append(rest)
        elif word == "error":
            self.errors.append(f"{who}: {rest}")
