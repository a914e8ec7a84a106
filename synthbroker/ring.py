"""The Redis commands of a ring, and the scripts that carry its protocol (`lua/`, where each states its contract).

`keys` says which keys there are.
"""

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from synthbroker import cutting, keys, replies, sharing
from synthbroker.connection import LONGEST_BLOCK_MS, Connection
from synthbroker.errors import (
    RingEndedError,
    RingMismatchError,
    RingMissingError,
    ServerFullError,
    ServerRefusedError,
    ShutOutError,
)
from synthbroker.inflow import Inflow
from synthbroker.replies import Answer, Given, Incarnation, Meta, Reply, Settings
from synthbroker.sharing import Shared, alone
from synthbroker.wire import Encoded, Slice

LEASE_S = 60
FEWEST_SHARE = 16  # the part of a full ring that is given back at a time (lib.lua)
BEAT_S = 5.0
FOLD_AFTER_S = 3600
MOST_NAMED = 1000
MOST_QUARANTINED = 1000
_PART_EXPIRY_S = 60
_SLOWEST_LINK_BYTES_PER_S = 10_000_000  # a payload of many GiB is given this much longer to arrive


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
        self.name = keys.check_name("ring", name)
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
            raise RingEndedError(
                f"ring {self.name!r} has ended; say reopen=True (`generate --reopen`) to begin a new run on it"
            )
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

    def is_drained(self, group: str, held: int | None = 0) -> bool:
        """Say whether the ring has ended and a group has been given all, and has acknowledged all but so many."""
        meta = self.read_meta()
        found = {name.decode(): (int(delivered), int(pending)) for name, delivered, pending, *_ in self.snapshot()[5]}
        delivered, pending = found.get(group, (0, 0))
        return meta.ended and max(delivered, meta.first - 1) >= meta.next - 1 and (held is None or pending <= held)

    def snapshot(self, *, books: bool = False) -> Reply:
        """Read everything about the ring at one instant, as `snapshot.lua` says it."""
        return self.checked(self.connection.script("snapshot", self._key("meta"), "", int(books)))

    def script(self, name: str, *arguments: Any) -> Reply:
        """Run one of the ring's scripts, for the modules that have commands of their own.

        Raises:
            RingMissingError: There is no such ring, or not the one that was opened.
        """
        return self._script(name, *arguments)

    # -- who is there

    def join_producer(self, who: Incarnation, last: int, about: Mapping[str, Any]) -> None:
        """Register a producer whose samples up to `last` count as taken; shuts an older one of that name out.

        Raises:
            ShutOutError: The one of that name is a later life of the same job.
        """
        self._checked_producing(self._script("join", "producer", who.name, who.word, json.dumps(about), last), who)

    def join_group(
        self,
        who: Incarnation,
        group: str,
        reuse: str,
        about: Mapping[str, Any],
        *,
        life: str = "",
        checkpoints: bool = False,
    ) -> None:
        """Register a consumer, and make its group if it is not there.

        Args:
            who: The consumer.
            group: Its group.
            reuse: How often the group may use a sample.
            about: The consumer's record.
            life: The life of its run, if others can take its place (`runs`).
            checkpoints: Whether its run keeps checkpoints.

        Raises:
            RingMismatchError: The group was made with another `reuse`.
            ShutOutError: A newer life of its run took over.
        """
        told = (json.dumps(about), group, reuse, life, int(checkpoints))
        reply = self._script("join", "consumer", who.name, who.word, *told)
        if reply[0] == b"SHUT":
            run = who.name.partition("/")[0]
            raise ShutOutError(
                f"a newer reader named {run!r} took this one's place in group {group!r} of {self.name!r}"
            )
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

    def room(
        self, who: Incarnation, cost_bytes: int, samples: int, *, free_bytes: int = 0, costs: Sequence[int] = ()
    ) -> Answer:
        """Ask for a lease on room: OK, FULL or TOOBIG.

        Args:
            who: The producer.
            cost_bytes: For so much server memory.
            samples: In so many samples.
            free_bytes: What must leave the ring first, because the server is out of memory.
            costs: What each of them takes, if room for the first of them alone would help: `granted` says for how many
                there is.
        """
        reply = self._producing("room", who, cost_bytes, samples, LEASE_S, free_bytes, *costs)
        if reply[0] == b"TOOBIG":
            return Answer("TOOBIG", capacity_bytes=int(reply[1]))
        return replies.full(reply, 1) if reply[0] == b"FULL" else Answer("OK", granted=int(reply[1]))

    def commit(
        self,
        who: Incarnation,
        samples: Sequence[tuple[int, Encoded | Shared]],
        ahead: tuple[int, int] = (0, 0),
        *,
        generation_s: float = 0.0,
    ) -> Answer:
        """Send samples and make a prefix of them visible.

        Args:
            who: The producer.
            samples: Sequence number and sample, rising by one. What was taken before is passed over, so that this may
                be repeated when the answer was lost.
            ahead: Bytes of server memory and samples to ask room for at the same time, as `room` does.
            generation_s: What it takes to make one of these samples; 0 where that is not known.

        Returns:
            OK, FULL, GAP or MISSING; `last` says how far it came, `granted` for how many more there is room.

        Raises:
            ServerFullError: The server has no memory for them; nothing of the first that did not fit is visible.
        """
        seqs = [seq for seq, _ in samples]
        placed = [one if isinstance(one, Shared) else alone([one])[0] for _, one in samples]
        uids = sharing.uids(placed)
        lease = f"{ahead[0]} {ahead[1]} {LEASE_S} {round(generation_s * 1e6)}"
        arguments = [self.epoch, who.name, who.word, lease, *sharing.commit_arguments(seqs, placed, uids)]
        parts = self._set_parts(placed, uids)
        taken = 0
        try:
            with self.connection.line() as line:
                window = line.send_windows(parts, cutting.LARGEST_PART_BYTES)
                reply, errors = line.script_after(window, "commit", self._key("meta"), *arguments)
                taken = int(reply[1]) if len(reply) > 1 else 0
                if errors:
                    raise errors[0]
        except ServerFullError:
            self._forget_parts(seqs, placed, uids, taken)
            raise
        self._checked_producing(reply, who)
        word = reply[0].decode()
        if word == "OOM":
            self._forget_parts(seqs, placed, uids, taken)
            raise ServerFullError(f"{self.connection.where} is out of memory")
        if word == "ERROR":
            raise ServerRefusedError(f"{self.connection.where} answers: {reply[3].decode()}")
        if word == "FULL":
            return replies.full(reply, 3)
        granted = int(reply[3]) if word == "OK" else 0
        return Answer(word, last=taken, newest=int(reply[2]), granted=granted)

    def wait_for_room(self, room_id: str) -> None:
        """Block until somebody makes room after `room_id`, at most a second."""
        self.connection.call("XREAD", "COUNT", 1, "BLOCK", LONGEST_BLOCK_MS, "STREAMS", self._key("room"), room_id)

    def quarantine(self, *, reason: str, producer: str, recipe: Mapping[str, Any], number: int | None = None) -> None:
        """Keep a note of a bad sample; of a ring that is gone, none is kept."""
        at = "" if number is None else number
        notes = (at, reason, producer, json.dumps(recipe), MOST_QUARANTINED)
        self.connection.script("quarantine", self._key("meta"), self.epoch, *notes)

    def _forget_parts(self, seqs: Sequence[int], placed: Sequence[Shared], uids: Sequence[str], last: int) -> None:
        """Remove the parts behind sequence number `last`: until they expire they would take the memory that lacks."""
        kept = {uid for seq, uid in zip(seqs, uids, strict=True) if seq <= last}
        for name, _ in sharing.strings(placed, uids):
            if name.partition(":")[0] not in kept:
                self.connection.call("UNLINK", self._key(f"part:{name}"))

    def _set_parts(self, placed: Sequence[Shared], uids: Sequence[str]) -> list[tuple[Any, ...]]:
        """Write the commands that send payloads, as far as they do not ride in the entries."""
        payload_bytes = sum([one.sample.payload_bytes for one in placed])
        expiry_s = _PART_EXPIRY_S + payload_bytes // _SLOWEST_LINK_BYTES_PER_S
        return [
            ("SET", self._key(f"part:{name}"), pieces, "EX", expiry_s) for name, pieces in sharing.strings(placed, uids)
        ]

    # -- consuming

    def held_by(self, who: Incarnation, group: str, most: int) -> list[tuple[int, int]]:
        """List what a consumer was given and has not acknowledged: number, and how often it was given to anybody."""
        pending = self.connection.call("XPENDING", self._key("samples"), group, "-", "+", most, who)
        return [(replies.number_of(entry), int(times)) for entry, _, _, times in pending]

    def acknowledge(self, group: str, numbers: Sequence[int], epoch: str = "", *, again: bool = False) -> None:
        """Say that a group is done with samples.

        Args:
            group: The group.
            numbers: The samples'.
            epoch: The one that they were given in, if it may be a former one by now.
            again: This was said before, and the answer was lost.
        """
        told = (epoch or self.epoch, group, int(again))
        self.checked(self.connection.script("ack", self._key("meta"), *told, *numbers))

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

    def inflow(self, between: Callable[[], None] = lambda: None, connections: int = 2) -> Inflow:
        """Receive parts."""
        return Inflow(self.connection, self._read_command, between, connections)

    def _read_command(self, one: Slice) -> tuple[Any, ...]:
        key = self._key(f"part:{one.name}")
        if one.start is None:
            return ("GET", key)
        return ("GETRANGE", key, one.start, one.start + one.size - 1)

    def checked(self, reply: Reply) -> Reply:
        """Give what a script answered, unless it says that there is no such ring.

        Raises:
            RingMissingError: It says so.
        """
        if reply[0] == b"NORING":
            once = ", or not the same one any more" if self.epoch else ""
            raise RingMissingError(f"there is no ring {self.name!r} on {self.connection.where}{once}")
        return reply

    # -- within

    def _key(self, name: str) -> str:
        return self.prefix + name

    def _script(self, name: str, *arguments: Any) -> Reply:
        return self.checked(self.connection.script(name, self._key("meta"), self.epoch, *arguments))

    def _producing(self, name: str, who: Incarnation, *arguments: Any) -> Reply:
        return self._checked_producing(self._script(name, who.name, who.word, *arguments), who)

    def _checked_producing(self, reply: Reply, who: Incarnation) -> Reply:
        self.checked(reply)
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
