"""Whether a ring's books balance, counted through rather than believed.

`status` compares the scripts' counters with the lengths that Redis keeps. An audit counts: entries of the pending lists
one by one, the index line by line, the parts of every live sample, and parts that belong to none. What the counters say
is taken at one instant of the server, by one script; parts are looked at behind it, some samples at a time, each time
by one script again, so that a ring in full use raises no false alarm.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from synthbroker import books, monitor
from synthbroker.books import Books
from synthbroker.connection import Connection
from synthbroker.ledger import Equation, equation
from synthbroker.ring import Ring
from synthbroker.states import GroupStatus, RingStatus

MOST_NAMED = 20


@dataclass(frozen=True)
class Audit:
    """What counting a ring through has shown.

    Attributes:
        ring, where, epoch: Which ring.
        now_s: The server's time of the counting, seconds since 1970.
        balanced: Whether every equation holds.
        equations: The laws, with both sides.
        details: What is known about the differences: numbers of samples, names of parts; the first of each kind.
        live, bytes: Samples in the ring, and the server memory booked for them.
        parts: Parts of live samples that were looked for.
        moved: Samples that came or left while parts were looked at; those that left were passed over.
        foreign: Entries in the stream that are not ours; they are counted and swept out by whoever meets them.
        leased_bytes, leased_samples: Room promised to samples under way.
        expired_leases: Leases past their end, which go when room is next asked for.
        apart: For each group what no equation holds: samples given again, and acknowledged again.
    """

    ring: str
    where: str
    epoch: str
    now_s: float
    balanced: bool
    equations: tuple[Equation, ...]
    details: tuple[str, ...]
    live: int
    bytes: int
    parts: int
    moved: int
    foreign: int
    leased_bytes: int
    leased_samples: int
    expired_leases: int
    apart: dict[str, dict[str, int]]


@dataclass(frozen=True)
class _Parts:
    """How many parts are owned, which of them are missing, which are nobody's; how many samples moved meanwhile."""

    owned: int
    missing: tuple[tuple[int, str], ...]
    orphaned: tuple[str, ...]
    moved: int


def audit(ring: str, *, url: str | None = None) -> Audit:
    """Count a ring through and compare; nothing is changed. `dataclasses.asdict` makes it fit for JSON.

    Takes the server about 0.4 ms for a thousand samples in one piece (Redis 7.0.15, two noisy cores), and one look
    at each of its keys in small steps.

    Args:
        ring: Its name.
        url: The server, None for what the environment says.

    Raises:
        RingMissingError: There is no such ring, or it was made anew meanwhile.
        ServerError: The server is gone or refuses.
    """
    connection = Connection(url)
    try:
        return audit_of(Ring(connection, ring))
    finally:
        connection.close()


def audit_of(ring: Ring) -> Audit:
    """Count a ring through over a connection that is there; errors as for `audit`."""
    snapshot = ring.snapshot(books=True)
    status, counted = monitor.read_status(ring, snapshot), books.read_books(snapshot)
    ring.epoch = status.epoch
    parts = _look_for_parts(ring, status)
    equations = (
        *_of_ring(status, counted, snapshot[3], snapshot[4]),
        *_of_parts(parts),
        *(one for name, group in status.groups.items() for one in _of_group(name, group, status, counted)),
    )
    return Audit(
        ring=ring.name,
        where=status.where,
        epoch=status.epoch,
        now_s=status.now_s,
        balanced=all(one.difference == 0 for one in equations),
        equations=equations,
        details=tuple(_details(ring, counted, parts)),
        live=status.live,
        bytes=status.bytes,
        parts=parts.owned,
        moved=parts.moved,
        foreign=counted.foreign,
        leased_bytes=status.leased_bytes,
        leased_samples=status.leased_samples,
        expired_leases=counted.expired_leases,
        apart={name: _apart(group) for name, group in status.groups.items()},
    )


def _look_for_parts(ring: Ring, status: RingStatus) -> _Parts:
    """Find parts that are missing, and those that nobody owns.

    What lasts was committed. So a part that is there before the index is read, and is in no line of it, belonged to a
    sample that has left since, and then it is gone now; or it belongs to nobody.
    """
    suspects, owned, following = books.lasting_parts(ring), 0, status.next
    missing: list[tuple[int, str]] = []
    for page in books.pages(ring):
        suspects -= page.owned
        owned += len(page.owned)
        missing += page.missing
        following = page.next
    orphaned = books.lasting(ring, suspects)
    moved = following - status.next + ring.read_meta().first - status.first
    return _Parts(owned, tuple(missing), tuple(sorted(orphaned)), moved)


def _of_ring(status: RingStatus, counted: Books, entries: int, lines: int) -> Iterator[Equation]:
    own = entries - counted.foreign
    yield equation("committed = live + evicted", status.committed, own, status.evicted)
    yield equation("live = lines of the index", own, lines - counted.unreadable_lines)
    yield equation("samples missing from the stream = none", counted.missing, 0)
    yield equation("bytes booked = costs in the index", status.bytes, counted.index_bytes)
    yield equation("bytes reserved = bytes of leases", status.leased_bytes, counted.leased_bytes)
    yield equation("samples reserved = samples of leases", status.leased_samples, counted.leased_samples)


def _of_parts(parts: _Parts) -> Iterator[Equation]:
    yield equation("parts of live samples = parts that are there", parts.owned, parts.owned - len(parts.missing))
    yield equation("lasting parts of no live sample = none", len(parts.orphaned), 0)


def _of_group(name: str, group: GroupStatus, status: RingStatus, counted: Books) -> Iterator[Equation]:
    yield from monitor.group_equations(name, group, status.committed, counted.pending[name])
    yield equation(f"{name}: pending and not in the ring = none", len(counted.pending_gone[name]), 0)
    yield equation(f"{name}: uses kept of samples not in the ring = none", counted.uses_gone[name], 0)
    if status.when_full == "block":
        yield equation(f"{name}: evicted unread or pending from a ring that blocks = none",
                       group.lost + group.evicted_pending, 0)  # fmt: skip


def _apart(group: GroupStatus) -> dict[str, int]:
    names = ("redelivered", "reused", "doubled", "skipped")
    return {name: getattr(group, name) for name in names}


def _details(ring: Ring, counted: Books, parts: _Parts) -> Iterator[str]:
    yield from _some([f"not in the stream: {name}" for name in counted.missing_names])
    yield from _some([f"sample {number}: part {ring.prefix}part:{part} is gone" for number, part in parts.missing])
    yield from _some([f"part {ring.prefix}part:{part} is nobody's and has no expiry" for part in parts.orphaned])
    for name, gone in counted.pending_gone.items():
        yield from _some([f"group {name} holds {entry}, which is not in the ring" for entry in gone])


def _some(lines: Sequence[str]) -> Iterator[str]:
    yield from lines[:MOST_NAMED]
    if len(lines) > MOST_NAMED:
        yield f"and {len(lines) - MOST_NAMED} more of that kind"
