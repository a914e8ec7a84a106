"""The Redis commands of a ring, and the scripts that carry its protocol (`lua/`, where each states its contract).

Keys, all with the ring's name as hash tag, so that a ring is one slot of a Redis Cluster:

| key | type | holds |
| --- | --- | --- |
| `sb:{ring}:samples` | stream | one entry per live sample, ids 1-0, 2-0, 3-0, … (`wire`) |
| `sb:{ring}:part:<uid>:<i>` | string | payload parts of one send attempt |
| `sb:{ring}:meta` | hash | version, epoch, policy, capacities, schema, first, next, bytes, counters |
| `sb:{ring}:index` | list | for each live sample: cost in bytes, uid, parts; so that evicting reads no payload |
| `sb:{ring}:group:<g>`, `:uses:<g>` | hash, sorted set | a group's counters; how often it used what it may reuse |
| `sb:{ring}:producers`, `:consumers` | sorted sets | who, by last heartbeat; details in the hashes `…:about` |
| `sb:{ring}:seqs`, `:leases` | hashes | for each producer: incarnation and last sequence number; its lease on room |
| `sb:{ring}:room` | stream | a line when room was made or the ring ended; waiting producers block on it |
| `sb:{ring}:closed` | set | names of the producers that are done, where the ring was declared with `producers=N` |
| `sb:{ring}:quarantine` | stream | bad samples: reason, producer, recipe |
"""

import itertools
import json
import random
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from synthbroker import replies
from synthbroker.connection import LONGEST_BLOCK_MS, Connection, Line
from synthbroker.errors import (
    RingEndedError,
    RingMismatchError,
    RingMissingError,
    ServerFullError,
    ServerRefusedError,
    ShutOutError,
)
from synthbroker.replies import Answer, Given, Incarnation, Memory, Meta, Reply, Settings, Taken
from synthbroker.wire import Encoded

LEASE_S = 60
BEAT_S = 5.0
FOLD_AFTER_S = 3600
MOST_NAMED = 1000
MOST_QUARANTINED = 1000
_PART_EXPIRY_S = 60
_SLOWEST_LINK_BYTES_PER_S = 10_000_000  # a payload of many GiB is given this much longer to arrive
_WINDOW_BYTES = 32 * 2**20
_READ_AHEAD = 4
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)


class Ring:
    """One ring on one server.

    Args:
        connection: The way to the server.
        name: Letters, digits, `_` and `-`, at most 64.

    Raises:
        ValueError: Not such a name.
    """

    def __init__(self, connection: Connection, name: str) -> None:
        self.connection = connection
        self.name = check_name("ring", name)
        self.prefix = f"sb:{{{name}}}:"
        self.epoch = ""

    # -- the ring itself

    def open(self, settings: Settings, *, default_capacity_bytes: int, reopen: bool) -> Meta:
        """Make the ring, or check that the one that is there is the one asked for.

        Raises:
            RingMismatchError: It was made with another setting; names both values.
            RingEndedError: It has ended, and `reopen` is not set.
        """
        pairs = [item for pair in settings.arguments() for item in pair]
        reply = self.connection.script(
            "open", self._key("meta"), secrets.token_hex(4), default_capacity_bytes, int(reopen), *pairs
        )
        if reply[0] == b"MISMATCH":
            raise self._mismatch(reply)
        if reply[0] == b"ENDED":
            raise RingEndedError(f"ring {self.name!r} has ended; say reopen=True to begin a new run on it")
        meta = replies.read_meta(reply[1:])
        self.epoch = meta.epoch
        return meta

    def read_meta(self) -> Meta:
        """Read the ring's record, and believe its epoch from now on.

        Raises:
            RingMissingError: There is no such ring.
        """
        reply = self.connection.call("HGETALL", self._key("meta"))
        if not reply:
            raise RingMissingError(f"there is no ring {self.name!r} on {self.connection.where}")
        meta = replies.read_meta(reply)
        self.epoch = meta.epoch
        return meta

    def end(self) -> None:
        """End the ring."""
        self._script("end")

    def drop(self, group: str = "") -> None:
        """Remove the ring with all its samples, or one group of it."""
        while self._script("drop", group)[0] == b"MORE":
            pass

    def is_drained(self, group: str) -> bool:
        """Say whether the ring has ended and a group has been given, and has acknowledged, everything."""
        meta = self.read_meta()
        found = {name.decode(): (int(delivered), int(pending)) for name, delivered, pending, *_ in self.snapshot()[5]}
        delivered, pending = found.get(group, (0, 0))
        return meta.ended and max(delivered, meta.first - 1) >= meta.next - 1 and not pending

    def snapshot(self) -> Reply:
        """Read everything about the ring at one instant, as `snapshot.lua` says it."""
        return self._checked(self.connection.script("snapshot", self._key("meta"), ""))

    # -- who is there

    def join_producer(self, who: Incarnation, last: int, about: Mapping[str, Any]) -> None:
        """Register a producer whose samples up to `last` count as taken; shuts an older one of that name out."""
        self._script("join", "producer", who.name, who.word, json.dumps(about), last)

    def join_group(self, who: Incarnation, group: str, reuse: str, about: Mapping[str, Any]) -> None:
        """Register a consumer, and make its group if it is not there.

        Raises:
            RingMismatchError: The group was made with another `reuse`.
        """
        reply = self._script("join", "consumer", who.name, who.word, json.dumps(about), group, reuse)
        if reply[0] == b"MISMATCH":
            raise self._mismatch(reply, f"group {group!r} of ")

    def beat(self, role: str, member: str, about: Mapping[str, Any] | None, word: str = "") -> bool:
        """Say that a process lives; False where the server does not know it (any more), or another life of it."""
        text = "" if about is None else json.dumps(about)
        reply = self._script("beat", role, member, text, LEASE_S, FOLD_AFTER_S, MOST_NAMED, word)
        return bool(reply[0] == b"OK")

    def leave_producer(self, who: Incarnation, about: Mapping[str, Any], *, closed: bool) -> None:
        """Say goodbye; `closed` means done, else only gone."""
        self._script("leave", "producer", who.name, json.dumps(about), who.word, int(closed))

    def members(self, group: str) -> list[str]:
        """List the registered consumers of a group, as `str(Incarnation)` writes them."""
        found = (
            member.decode().split(" ", 1) for member in self.connection.call("ZRANGE", self._key("consumers"), 0, -1)
        )
        return [who for name, who in found if name == group]

    def leave_group(self, who: Incarnation | str, group: str) -> None:
        """Say goodbye; what this consumer has not acknowledged is given to others."""
        self._script("leave", "consumer", f"{group} {who}", "{}")

    # -- producing

    def room(self, who: Incarnation, cost_bytes: int, samples: int, *, free_bytes: int = 0) -> Answer:
        """Ask for a lease on room: OK, FULL or TOOBIG.

        Args:
            who: The producer.
            cost_bytes: For so much server memory.
            samples: In so many samples.
            free_bytes: What must leave the ring first, because the server is out of memory.
        """
        reply = self._producing("room", who, cost_bytes, samples, LEASE_S, free_bytes)
        if reply[0] == b"TOOBIG":
            return Answer("TOOBIG", capacity_bytes=int(reply[1]))
        return replies.full(reply, 1) if reply[0] == b"FULL" else Answer("OK")

    def commit(self, who: Incarnation, samples: Sequence[tuple[int, Encoded]]) -> Answer:
        """Send samples and make a prefix of them visible.

        Args:
            who: The producer.
            samples: Sequence number and sample, rising by one. What was taken before is passed over, so that this may
                be repeated when the answer was lost.

        Returns:
            OK, FULL, GAP or MISSING; `last` says how far it came.

        Raises:
            ServerFullError: The server has no memory for them; nothing of the first that did not fit is visible.
        """
        uids = ["-" if sample.inline else secrets.token_hex(8) for _, sample in samples]
        arguments = [_commit_arguments(seq, sample, uid) for (seq, sample), uid in zip(samples, uids, strict=True)]
        try:
            with self.connection.line() as line:
                for (_, sample), uid in zip(samples, uids, strict=True):
                    self._send_parts(line, uid, sample)
                flat = itertools.chain.from_iterable(arguments)
                reply = line.script("commit", self._key("meta"), self.epoch, who.name, who.word, *flat)
        except ServerFullError:
            self._forget_parts(samples, uids, 0)
            raise
        self._checked_producing(reply, who)
        word = reply[0].decode()
        if word == "OOM":
            self._forget_parts(samples, uids, int(reply[1]))
            raise ServerFullError(f"{self.connection.where} is out of memory")
        if word == "ERROR":
            raise ServerRefusedError(f"{self.connection.where} answers: {reply[3].decode()}")
        return replies.full(reply, 3) if word == "FULL" else Answer(word, last=int(reply[1]))

    def wait_for_room(self, room_id: str) -> None:
        """Block until somebody makes room after `room_id`, at most a second."""
        self.connection.call("XREAD", "COUNT", 1, "BLOCK", LONGEST_BLOCK_MS, "STREAMS", self._key("room"), room_id)

    def quarantine(self, *, reason: str, producer: str, recipe: Mapping[str, Any], number: int | None = None) -> None:
        """Keep a note of a bad sample; of a ring that is gone, none is kept."""
        at = "" if number is None else number
        notes = (at, reason, producer, json.dumps(recipe), MOST_QUARANTINED)
        self.connection.script("quarantine", self._key("meta"), self.epoch, *notes)

    def _forget_parts(self, samples: Sequence[tuple[int, Encoded]], uids: Sequence[str], last: int) -> None:
        """Remove the parts behind sequence number `last`: until they expire they would take the memory that lacks."""
        for (seq, sample), uid in zip(samples, uids, strict=True):
            if seq > last and not sample.inline:
                self.connection.call("UNLINK", *(self._key(f"part:{uid}:{i}") for i in range(len(sample.part_sizes))))

    def _send_parts(self, line: Line, uid: str, sample: Encoded) -> None:
        if sample.inline:
            return
        expiry_s = _PART_EXPIRY_S + sample.payload_bytes // _SLOWEST_LINK_BYTES_PER_S
        commands = [
            ("SET", self._key(f"part:{uid}:{i}"), pieces, "EX", expiry_s) for i, pieces in enumerate(sample.parts())
        ]
        per_window = max(1, _WINDOW_BYTES // max(sample.part_sizes))
        for start in range(0, len(commands), per_window):
            window = commands[start : start + per_window]
            line.send(*window)
            line.replies(len(window))

    # -- consuming

    def take(
        self, who: Incarnation, group: str, count: int, *, min_fill: int, claim_after_s: float, producers: Sequence[str]
    ) -> Taken | None:
        """Take up to `count` samples for a group; None where the consumer or its group must join first.

        Args:
            who: The consumer.
            group: Its group.
            count: At most so many.
            min_fill: Nothing is given before so many samples are in the ring.
            claim_after_s: Members silent for longer are dead, and theirs is given first; negative: do not look now.
            producers: Take only from these, if any are named.
        """
        seed = random.getrandbits(31)
        reply = self._script("take", group, who, count, min_fill, claim_after_s, seed, *producers)
        if reply[0] in (b"NOGROUP", b"REJOIN"):
            return None
        samples = tuple(
            Given(replies.number_of(i), int(uses), replies.fields_of(fields)) for i, uses, fields in reply[4:]
        )
        return Taken(reply[0].decode(), float(reply[1]), reply[2].decode(), reply[3] == b"1", samples)

    def held_by(self, who: Incarnation, group: str, most: int) -> list[tuple[int, int]]:
        """List what a consumer was given and has not acknowledged: number, and how often it was given to anybody."""
        pending = self.connection.call("XPENDING", self._key("samples"), group, "-", "+", most, who)
        return [(replies.number_of(entry), int(times)) for entry, _, _, times in pending]

    def acknowledge(self, group: str, numbers: Sequence[int]) -> None:
        """Say that a group is done with samples."""
        self._script("ack", group, *numbers)

    def wait_for_sample(self, after_id: str) -> None:
        """Block until there is an entry behind `after_id`, at most a second."""
        self.connection.call("XREAD", "COUNT", 1, "BLOCK", LONGEST_BLOCK_MS, "STREAMS", self._key("samples"), after_id)

    def read(self, first: int, last: int, most: int) -> list[Given]:
        """Read live entries without taking them, oldest first."""
        reply = self.connection.call("XRANGE", self._key("samples"), f"{first}-0", f"{last}-0", "COUNT", most)
        return [Given(replies.number_of(entry[0]), 0, replies.fields_of(entry[1])) for entry in reply]

    def now_s(self) -> float:
        """Read the server's clock, in seconds."""
        seconds, microseconds = self.connection.call("TIME")
        return int(seconds) + int(microseconds) / 1e6

    def fetch(self, parts: Sequence[tuple[str, Sequence[memoryview]]]) -> list[bool]:
        """Receive parts into memory.

        Args:
            parts: For each its name (uid and number, a colon between) and the memory it goes to.

        Returns:
            For each whether it was there, in that length.
        """
        there: list[bool] = []
        names = [self._key(f"part:{name}") for name, _ in parts]
        with self.connection.line() as line:
            line.send(*(("GET", name) for name in names[:_READ_AHEAD]))
            for i, (_, pieces) in enumerate(parts):
                there.append(line.receive(pieces))
                line.send(*(("GET", name) for name in names[i + _READ_AHEAD : i + _READ_AHEAD + 1]))
        return there

    # -- within

    def _key(self, name: str) -> str:
        return self.prefix + name

    def _script(self, name: str, *arguments: Any) -> Reply:
        return self._checked(self.connection.script(name, self._key("meta"), self.epoch, *arguments))

    def _producing(self, name: str, who: Incarnation, *arguments: Any) -> Reply:
        return self._checked_producing(self._script(name, who.name, who.word, *arguments), who)

    def _checked(self, reply: Reply) -> Reply:
        if reply[0] == b"NORING":
            once = ", or not the same one any more" if self.epoch else ""
            raise RingMissingError(f"there is no ring {self.name!r} on {self.connection.where}{once}")
        return reply

    def _checked_producing(self, reply: Reply, who: Incarnation) -> Reply:
        self._checked(reply)
        if reply[0] == b"SHUT":
            raise ShutOutError(f"a newer producer named {who.name!r} took this one's place on ring {self.name!r}")
        if reply[0] == b"ENDED":
            raise RingEndedError(f"ring {self.name!r} has ended and takes no more samples")
        if reply[0] == b"UNKNOWN":
            raise RingMissingError(f"ring {self.name!r} does not know producer {who.name!r} (any more)")
        return reply

    def _mismatch(self, reply: Reply, of: str = "") -> RingMismatchError:
        setting, theirs, ours = (item.decode() for item in reply[1:4])
        return RingMismatchError(
            f"{of}ring {self.name!r} was made with {setting}={theirs}, asked for was {ours}: "
            f"ask for {setting}={theirs}, use another name, or remove it with `synthbroker drop`"
        )


def check_name(what: str, name: object) -> str:
    """Check the name of a ring or group.

    Raises:
        TypeError: Not a string.
        ValueError: Not made of 1 to 64 letters, digits, `_` and `-`.
    """
    if not isinstance(name, str):
        raise TypeError(f"the name of a {what} must be a string, got {name!r}")
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} cannot name a {what}: 1 to 64 letters, digits, _ and - are allowed")
    return name


def server_memory(connection: Connection) -> Memory | None:
    """Ask the server how much memory it has; None if it does not say."""
    try:
        text = connection.call("INFO", "memory").decode()
    except ServerRefusedError:
        return None
    found = dict(re.findall(r"^(maxmemory|total_system_memory|used_memory):(\d+)", text, re.MULTILINE))
    return Memory(*(int(found.get(name, 0)) for name in ("maxmemory", "total_system_memory", "used_memory")))


def _commit_arguments(seq: int, sample: Encoded, uid: str) -> list[Any]:
    inline = list(sample.payload) if sample.inline else b""
    parts = 0 if sample.inline else len(sample.part_sizes)
    size = sample.payload_bytes
    return [seq, sample.cost_bytes, size, sample.raw_bytes, uid, parts, sample.spec, sample.head, inline]
