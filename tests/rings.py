"""One ring under test: who produces, who reads, and whether the ledger adds up."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from servers import RunningServer
from synthbroker import dealing, taking
from synthbroker.connection import Connection
from synthbroker.dealing import Busy, Rules
from synthbroker.replies import Answer, Incarnation, Meta, Settings, Taken, pairs
from synthbroker.ring import Ring
from synthbroker.wire import Encoded
from wires import sample_of

GROUP_COUNTERS = ("since", "delivered", "acknowledged", "lost", "evicted_pending", "doubled", "reused", "redelivered")
BIG = 50_000  # bytes of a sample whose first part lies beside the stream, and the last rides in its entry
TWO_PARTS = 72_000  # bytes of a sample that has two parts, both beside the stream


@dataclass(frozen=True)
class Group:
    """One group in a snapshot: how far it read, what it holds, its counters, who its members are."""

    last_delivered: int
    pending: int
    counters: dict[str, int]
    reuse: str
    members: dict[str, int]

    def __getitem__(self, counter: str) -> int:
        return self.counters[counter]


@dataclass(frozen=True)
class Snapshot:
    """What `snapshot.lua` says, as values."""

    meta: dict[str, str]
    stream_length: int
    index_length: int
    groups: dict[str, Group]
    producers: dict[str, int]
    leases: dict[str, tuple[int, int]]

    def __getitem__(self, field: str) -> int:
        return int(self.meta[field])

    @property
    def live(self) -> range:
        """The numbers of the samples in the ring."""
        return range(self["first"], self["next"])


def read_snapshot(reply: list[Any]) -> Snapshot:
    """Turn the reply of `Ring.snapshot` into values."""
    _, _, meta, stream_length, index_length, groups, producers, leases, *_ = reply
    return Snapshot(
        meta=pairs(meta),
        stream_length=stream_length,
        index_length=index_length,
        groups={name.decode(): _read_group(*rest) for name, *rest in groups},
        producers={name.decode(): int(last) for name, _, last, _ in producers},
        leases={name: _read_lease(text) for name, text in pairs(leases).items()},
    )


def _read_group(delivered: bytes, pending: bytes, fields: list[bytes], members: list[Any]) -> Group:
    known = pairs(fields)
    return Group(
        last_delivered=int(delivered),
        pending=int(pending),
        counters={name: int(known[name]) for name in (*GROUP_COUNTERS, "skipped")},
        reuse=known["reuse"],
        members={name.decode(): int(held) for name, _, held, _ in members},
    )


def _read_lease(text: str) -> tuple[int, int]:
    size, count, _ = text.split()
    return int(size), int(count)


class Rig:
    """A ring on a server, and short words for what is done with it.

    Samples are tiny or `BIG`; which one it is can be told from its recipe, where the sequence number stands.
    """

    def __init__(self, server: RunningServer, name: str) -> None:
        self.way = Connection(server.url)
        self.ring = Ring(self.way, name)
        self.keys: Any = server.client()
        self.foreign = 0  # entries in the stream that are not ours, for the last look at the books

    def open(self, when_full: str = "block", *, capacity: int = 10**9, reopen: bool = False, **more: Any) -> Meta:
        """Make or open the ring."""
        asked = Settings(when_full=when_full, capacity_bytes=capacity, **more)
        return self.ring.open(asked, default_capacity_bytes=1, reopen=reopen)

    def producer(self, name: str = "p", word: str = "w1", last: int = 0) -> Incarnation:
        """Register a producer."""
        who = Incarnation(name, word)
        self.ring.join_producer(who, last, {})
        return who

    def reader(self, group: str = "train", reuse: str = "1", name: str = "f/0", word: str = "c1") -> Incarnation:
        """Register a reader, and its group."""
        who = Incarnation(name, word)
        self.ring.join_group(who, group, reuse, {})
        return who

    def put(self, who: Incarnation, *seqs: int, nbytes: int = 8) -> Answer:
        """Commit one sample for each sequence number."""
        return self.ring.commit(who, [(seq, sample_of(nbytes, seq)) for seq in seqs])

    def fill(self, who: Incarnation, *, nbytes: int = 8) -> int:
        """Commit from 1 on until the ring is full; returns how many were taken."""
        seq = 1
        while self.put(who, seq, nbytes=nbytes).word == "OK":
            seq += 1
        return seq - 1

    def take(
        self,
        who: Incarnation,
        count: int = 100,
        group: str = "train",
        *,
        min_fill: int = 1,
        claim_after_s: float = -1,
        producers: Sequence[str] = (),
        most: int = 0,
    ) -> Taken:
        """Take for a group that is there."""
        how = {"min_fill": min_fill, "claim_after_s": claim_after_s, "producers": producers, "most": most}
        taken = take(self.ring, who, group, count, **how)
        assert taken is not None
        return taken

    def numbers(self, who: Incarnation, count: int = 100, group: str = "train", **more: Any) -> list[int]:
        """Take, and give only the numbers."""
        return [sample.number for sample in self.take(who, count, group, **more).samples]

    def script(self, name: str, *arguments: Any) -> list[Any]:
        """Run a script by hand; its reply, with words as text."""
        reply = self.way.script(name, self.key("meta"), *arguments)
        return [item.decode() if isinstance(item, bytes) else item for item in reply]

    def key(self, suffix: str) -> str:
        """Name one of the ring's keys."""
        return f"{self.ring.prefix}{suffix}"

    def part_keys(self) -> set[bytes]:
        """List the parts that are on the server, live or not."""
        return set(self.keys.scan_iter(match=f"sb:{{{self.ring.name}}}:part:*", count=1000))

    def all_keys(self) -> set[bytes]:
        """List everything of the ring."""
        return set(self.keys.scan_iter(match=f"sb:{{{self.ring.name}}}:*", count=1000))

    def capacity_for(self, count: int, nbytes: int) -> int:
        """Say how many bytes so many samples take."""
        return count * sample_of(nbytes, 1).cost_bytes

    def snapshot(self) -> Snapshot:
        """Look at the ring."""
        return read_snapshot(self.ring.snapshot())

    def balance(self, *, foreign: int = 0) -> Snapshot:
        """Check the ledger and everything else that must always hold; `foreign` entries may lie in the stream."""
        seen = self.snapshot()
        check_books(seen, foreign)
        self._check_index(seen)
        self._check_pending(seen)
        return seen

    def _check_index(self, seen: Snapshot) -> None:
        lines = [line.decode().split() for line in self.keys.lrange(self.key("index"), 0, -1)]
        assert seen["bytes"] == sum(int(cost) for cost, *_ in lines)
        wanted = {self.key(f"part:{uid}:{i}").encode() for _, uid, parts, _ in lines for i in range(int(parts))}
        lasting = {key for key in self.part_keys() if self.keys.pttl(key) == -1}
        assert lasting == wanted, "live parts live for ever, all others are under expiry"

    def _check_pending(self, seen: Snapshot) -> None:
        for name, group in seen.groups.items():
            held = self.keys.xpending_range(self.key("samples"), name, "-", "+", 10_000) if group.pending else []
            assert {int(one["message_id"].split(b"-")[0]) for one in held} <= set(seen.live), (
                "none is held that is gone"
            )
            uses = dict(self.keys.zrange(self.key(f"uses:{name}"), 0, -1, withscores=True))
            assert {int(number) for number in uses} <= set(seen.live)
            assert all(1 <= count < float(group.reuse) for count in uses.values())


class Table:
    """Ranks of one run at a ring's table, one reader each; `sat` of them have come."""

    def __init__(
        self, rig: Rig, ranks: int, share: int, run: str = "run", word: str = "w", sat: int | None = None, **rules: int
    ) -> None:
        self.rig, self.ranks, self.run, self.word = rig, ranks, run, word
        defaults = {"rounds": 0, "last_share": share, "drop_last": False, "epoch_size": None}
        self.rules = Rules(ranks=ranks, share=share, **defaults | rules)  # type: ignore[arg-type]
        self.readers = [self.join(rank) for rank in range(ranks if sat is None else sat)]
        self.generations = [self.sit(rank) for rank in range(len(self.readers))]

    def join(self, rank: int, worker: int = 0) -> Incarnation:
        return self.rig.reader(name=f"{self.run}.r{rank}/{worker}", word=self.word)

    def sit(self, rank: int, attempt: str = "", had: str = "") -> str | Busy:
        who, word = Incarnation(f"{self.run}.r{rank}/0", self.word), self.word
        return dealing.sit(
            self.rig.ring,
            "train",
            who,
            run=self.run,
            attempt=attempt,
            rules=self.rules,
            rank=rank,
            word=word,
            claim_after_s=10,
            had=had,
        )

    def ask(
        self,
        rank: int,
        i: int,
        *,
        sitting: int = 1,
        received: int = -1,
        short: int = 0,
        reader: Incarnation | None = None,
    ) -> tuple[str, Taken | None]:
        rules = self.rules
        told = (rank, self.ranks, sitting, i, rules.share, rules.rounds, rules.last_share, received)
        order = ["ROUND", self.generations[rank], *told, int(rules.drop_last), short]
        return dealing.deal(
            self.rig.ring, "train", reader or self.readers[rank], " ".join(map(str, order)), claim_after_s=10
        )

    def share(self, rank: int, i: int, **more: int) -> list[tuple[int, int]] | str:
        """Give numbers and uses of a rank's share, or the word that came instead."""
        word, taken = self.ask(rank, i, **more)  # type: ignore[arg-type]
        return [(one.number, one.uses) for one in taken.samples] if taken and taken.samples else word

    def numbers(self, rank: int, i: int, **more: int) -> list[int] | str:
        share = self.share(rank, i, **more)
        return share if isinstance(share, str) else [number for number, _ in share]

    def read(self, **more: int) -> list[list[list[tuple[int, int]]]]:
        """Read all rounds to the end, acknowledging; a list of shares for each rank."""
        found: list[list[list[tuple[int, int]]]] = [[] for _ in range(self.ranks)]
        for i in itertools.count():
            shares = [self.share(rank, i, received=i - 1, **more) for rank in range(self.ranks)]
            if shares[0] == "END":
                assert shares == ["END"] * self.ranks
                return found
            for rank, share in enumerate(shares):
                assert isinstance(share, list), share
                found[rank].append(share)
                self.rig.ring.acknowledge("train", [number for number, uses in share if uses < 2])
        raise AssertionError


def check_books(seen: Snapshot, foreign: int = 0) -> None:
    """Check that what was committed is live or was evicted, and what became of it in every group."""
    last = seen["next"] - 1
    assert seen.stream_length == len(seen.live) + foreign
    assert seen.index_length == len(seen.live)
    assert seen["leased_bytes"] == sum(size for size, _ in seen.leases.values())
    assert seen["leased_samples"] == sum(count for _, count in seen.leases.values())
    assert 0 <= seen["bytes"] + seen["leased_bytes"] <= seen["capacity"]
    assert not seen["max_samples"] or len(seen.live) + seen["leased_samples"] <= seen["max_samples"]
    for group in seen.groups.values():
        unread = last - max(group.last_delivered, seen["first"] - 1)
        assert last - group["since"] == group["delivered"] + unread + group["lost"]
        assert group["delivered"] == group["acknowledged"] + group.pending + group["evicted_pending"]
        assert group.pending == sum(group.members.values())
        if seen.meta["when_full"] == "block":
            assert group["lost"] == group["evicted_pending"] == 0, "a ring that blocks loses nothing"


def take(ring: Ring, who: Incarnation, group: str, count: int, **how: Any) -> Taken | None:
    """Ask for samples and wait for the answer; None where something must be done first."""
    how = {"min_fill": 1, "claim_after_s": -1, "producers": ()} | how
    return taking.ask(ring, who, group, count, **how).answer()[1]


def commit_arguments(seq: int, sample: Encoded, uid: str) -> list[Any]:
    """Write the arguments of one sample for `commit.lua`."""
    return run_arguments(seq, [sample], uid, len(sample.parts))


def run_arguments(seq: int, samples: Sequence[Encoded], uid: str, parts: int, start: int | str = "-") -> list[Any]:
    """Write the arguments of samples of one kind for `commit.lua`."""
    one = samples[0]
    numbers = f"{seq} {len(samples)} {one.cost_bytes} {one.payload_bytes} {one.raw_bytes} {uid} {parts} {start}"
    data = [b"" if start != "-" else sample.data for sample in samples]
    return [
        numbers,
        one.spec,
        one.begin,
        *[text for i, sample in enumerate(samples) for text in (sample.ends, data[i])],
    ]


def send_parts(rig: Rig, uid: str, sample: Encoded) -> list[str]:
    """Send the parts of one attempt by hand; returns their keys."""
    names = [rig.key(f"part:{uid}:{i}") for i in range(len(sample.parts))]
    for name, pieces in zip(names, sample.parts, strict=True):
        rig.keys.set(name, b"".join(pieces), ex=60)
    return names


def rigs(server: RunningServer, name: str) -> Iterator[Rig]:
    """Give a rig; then check its books, drop the ring and see that nothing of it stays."""
    rig = Rig(server, name)
    yield rig
    if rig.keys.exists(rig.key("meta")):
        rig.balance(foreign=rig.foreign)
        rig.ring.drop()
        assert {key for key in rig.all_keys() if rig.keys.pttl(key) == -1} == set()
    rig.way.close()
