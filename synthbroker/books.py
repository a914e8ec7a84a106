"""The Redis commands beside the way of a sample: looking a ring's books through, its bad samples, its twins."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from synthbroker import replies, twins
from synthbroker.connection import Connection
from synthbroker.errors import ServerRefusedError
from synthbroker.replies import Incarnation, Memory, Reply
from synthbroker.ring import Ring

_SAMPLES_AT_ONCE = 500
_KEYS_AT_ONCE = 1000


@dataclass(frozen=True)
class Books:
    """What `snapshot.lua` counts through.

    Attributes:
        index_bytes: What the index's lines add up to.
        unreadable_lines: Lines of the index that are none.
        foreign: Entries of the stream that are not ours.
        missing: How many samples between first and next are not in the stream; `missing_names` like ("7", "9-12").
        leased_bytes, leased_samples: What the leases add up to.
        expired_leases: Those past their end, which go when somebody next needs room.
        pending: For each group the entries of its pending list.
        pending_gone: For each group the ids in it that are not in the ring.
        uses_gone: For each group the uses that are kept of samples that are not in the ring.
    """

    index_bytes: int
    unreadable_lines: int
    foreign: int
    missing: int
    missing_names: tuple[str, ...]
    leased_bytes: int
    leased_samples: int
    expired_leases: int
    pending: dict[str, int]
    pending_gone: dict[str, tuple[str, ...]]
    uses_gone: dict[str, int]


@dataclass(frozen=True)
class Page:
    """Parts of some live samples at one instant.

    Attributes:
        then: The sample to go on with.
        next: The number that the next sample gets.
        owned: Names of the parts of these samples, "uid:i".
        missing: Number of a sample, and the part of it that is not there or is about to expire.
    """

    then: int
    next: int
    owned: frozenset[str]
    missing: tuple[tuple[int, str], ...]


def read_books(snapshot: Reply) -> Books:
    """Read what `Ring.snapshot(books=True)` answered."""
    leases = [text.split() for text in replies.pairs(snapshot[7]).values()]
    index_bytes, unreadable, foreign, names, missing, expired, groups = snapshot[8]
    return Books(
        index_bytes=int(index_bytes),
        unreadable_lines=unreadable,
        foreign=foreign,
        missing=int(missing),
        missing_names=tuple(name.decode() for name in names),
        leased_bytes=sum(int(size) for size, _, _ in leases),
        leased_samples=sum(int(count) for _, count, _ in leases),
        expired_leases=expired,
        pending={name.decode(): count for name, count, _, _ in groups},
        pending_gone={name.decode(): tuple(entry.decode() for entry in gone) for name, _, gone, _ in groups},
        uses_gone={name.decode(): uses for name, _, _, uses in groups},
    )


def pages(ring: Ring) -> Iterator[Page]:
    """Look for the parts of all samples that are live now, or will be left of them."""
    at, end = 0, 1
    while at < end:
        _, then, following, owners, missing = ring.script("parts", at, _SAMPLES_AT_ONCE)
        end = end if at else int(following)  # what comes meanwhile is for another time
        if int(then) <= at:
            return
        at = int(then)
        owned = frozenset(
            f"{uid.decode()}:{i}" for uid, n in zip(owners[::2], owners[1::2], strict=True) for i in range(int(n))
        )
        pairs = zip(missing[::2], missing[1::2], strict=True)
        yield Page(at, int(following), owned, tuple((int(number), part.decode()) for number, part in pairs))


def ring_names(connection: Connection) -> list[str]:
    """List the rings on a server, by name; looks at every key of it."""
    found, cursor = set[str](), b"0"
    while True:
        cursor, keys = connection.call("SCAN", cursor, "MATCH", "sb:{*}:meta", "COUNT", _KEYS_AT_ONCE)
        found |= {key.decode().removeprefix("sb:{").removesuffix("}:meta") for key in keys}
        if cursor == b"0":
            return sorted(found)


def lasting_parts(ring: Ring) -> set[str]:
    """List the parts that no expiry will remove, as "uid:i"; looks at every key of the server."""
    pattern, found, cursor = f"{ring.prefix}part:*", set[str](), b"0"
    while True:
        cursor, keys = ring.connection.call("SCAN", cursor, "MATCH", pattern, "COUNT", _KEYS_AT_ONCE)
        found |= lasting(ring, [key.decode().removeprefix(f"{ring.prefix}part:") for key in keys])
        if cursor == b"0":
            return found


def lasting(ring: Ring, parts: Iterable[str]) -> set[str]:
    """Say which of these parts are there without an expiry."""
    named = list(parts)
    if not named:
        return set()
    with ring.connection.line() as line:
        line.send(*(("PTTL", f"{ring.prefix}part:{part}") for part in named))
        return {part for part, left in zip(named, [line.reply() for _ in named], strict=True) if left == -1}


def tell_digests(ring: Ring, who: Incarnation, different: int, digests: Sequence[int]) -> list[tuple[str, str]]:
    """Tell digests of a producer's samples, of `different` so far; returns the pairs of twins that it is one of.

    Raises:
        RingMissingError: There is no such ring any more.
    """
    limits = (twins.MOST_DIGESTS, twins.MOST_PAIRS, twins.FEWEST_COMMON)
    _, *names = ring.script("twins", who.name, who.word, different, *limits, *[f"{one:x}" for one in digests])
    return [(first.decode(), second.decode()) for first, second in zip(names[::2], names[1::2], strict=True)]


def read_quarantine(ring: Ring) -> Reply:
    """Read the notes of bad samples, the oldest first: id, and names and values."""
    notes: Reply = ring.connection.call("XRANGE", f"{ring.prefix}quarantine", "-", "+")
    return notes


def clear_quarantine(ring: Ring, last: bytes) -> None:
    """Forget the notes up to this id."""
    milliseconds, _, behind = last.partition(b"-")
    ring.connection.call("XTRIM", f"{ring.prefix}quarantine", "MINID", b"%b-%d" % (milliseconds, int(behind) + 1))


def server_memory(connection: Connection) -> Memory | None:
    """Ask the server how much memory it has; None if it does not say."""
    try:
        text = connection.call("INFO", "memory").decode()
    except ServerRefusedError:
        return None
    found = dict(re.findall(r"^(maxmemory|total_system_memory|used_memory):(\d+)", text, re.MULTILINE))
    return Memory(*(int(found.get(name, 0)) for name in ("maxmemory", "total_system_memory", "used_memory")))
