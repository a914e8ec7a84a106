"""What a ring holds, who is at it, and whether its ledger adds up: values for people and programs, read at one instant.

The ledger is the conservation law of a ring. Its left and right sides come from different places (counters that the
scripts keep, against lengths and pending lists that Redis keeps), so a difference is a sample that nobody counted.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from synthbroker import replies
from synthbroker.connection import Connection
from synthbroker.replies import Meta, Reply
from synthbroker.ring import Ring
from synthbroker.starving import SILENT_AFTER_S


@dataclass(frozen=True)
class ProducerStatus:
    """One producer, as its last heartbeat described it.

    Attributes:
        state: "alive", "silent" (no heartbeat for `SILENT_AFTER_S`), "left" (stopped) or "closed" (done).
        seen_s: Seconds since its last heartbeat.
        committed: Samples taken from its latest incarnation.
        host, pid, job_id: Where it runs; None where it did not say.
        samples_per_s, bytes_per_s: Its latest rates; 0 unless alive.
        blocked_share: Share of its time that it lately spent waiting for room.
        codec: What codec="auto" chose for each field, with packed ÷ unpacked: {"image": "zstd 0.74"}.
        lost_by_server: Committed samples that a server lost, as `ProducerStats` counts them.
    """

    state: str
    seen_s: float
    committed: int
    host: str | None
    pid: int | None
    job_id: str | None
    samples_per_s: float
    bytes_per_s: float
    blocked_share: float
    codec: dict[str, str] = field(default_factory=dict)
    lost_by_server: int = 0


@dataclass(frozen=True)
class ConsumerStatus:
    """One member of a group.

    Attributes:
        state: "alive", "silent", or "left": said goodbye or was taken over, and its pending samples wait for others.
        seen_s: Seconds since its last heartbeat, None where it left.
        pending: Samples that it was given and has not acknowledged.
        host, pid, job_id: Where it runs; None where it did not say.
    """

    state: str
    seen_s: float | None
    pending: int
    host: str | None
    pid: int | None
    job_id: str | None


@dataclass(frozen=True)
class GroupStatus:
    """One group; counters since it was made.

    Attributes:
        since: Samples up to this number were gone before the group began.
        reuse: "1", a number, "inf"; None: declared, nobody has joined yet.
        delivered: Samples given for the first time.
        acknowledged: Samples that it is done with.
        pending: Given, not acknowledged, still in the ring.
        unread: In the ring, not given yet.
        lost: Evicted or stepped over unseen.
        evicted_pending: Evicted while given and not acknowledged.
        reused: Given again, as `reuse` allows.
        redelivered: Given again because a member died.
        doubled: Acknowledged twice.
        skipped: Passed over, because the reader wants other producers' samples.
        consumers: Its members by name.
    """

    since: int
    reuse: str | None
    delivered: int
    acknowledged: int
    pending: int
    unread: int
    lost: int
    evicted_pending: int
    reused: int
    redelivered: int
    doubled: int
    skipped: int
    consumers: dict[str, ConsumerStatus]


@dataclass(frozen=True)
class Equation:
    """One line of the ledger.

    Attributes:
        law: What must be equal.
        left, right: What the two sides are.
        difference: left - right; 0, or nobody knows where so many samples are.
    """

    law: str
    left: int
    right: int
    difference: int


@dataclass(frozen=True)
class Ledger:
    """All equations of a ring; `balanced` where every one holds."""

    equations: tuple[Equation, ...]
    balanced: bool


@dataclass(frozen=True)
class RingStatus:
    """A ring at one instant of the server's clock.

    Attributes:
        ring, where: Its name, and its server without the password.
        now_s: The server's time, seconds since 1970.
        epoch, when_full, capacity_bytes, schema, info: As its first producer set them.
        max_samples: Cap in samples, 0 for none.
        finite: Whether NaN and infinity are kept out.
        ended: Whether nothing more comes.
        first, next: Number of the oldest live sample, and of the one that comes next.
        live, bytes: Samples in the ring and the server memory that they take.
        fill: Share of its capacity that is taken: in bytes or in samples, whichever is more.
        committed, evicted: Samples that ever came in, and that left again.
        duplicates, foreign, quarantined: Samples sent again and refused, entries that are none of ours, bad samples.
        waiting: Whether producers wait for room.
        leased_bytes, leased_samples: Room promised to samples under way.
        expected_producers, closed_producers: The ring ends when so many have closed (0: it does not), and so many have.
        folded_producers, folded_samples: Producers that are no longer named, and what they committed.
        samples_per_s, bytes_per_s: Rates of all producers that are alive.
        oldest_age_s, newest_age_s: Ages of the oldest and newest live sample; None in an empty ring.
        groups, producers: By name.
        ledger: Whether everything adds up.
    """

    ring: str
    where: str
    now_s: float
    epoch: str
    when_full: str
    capacity_bytes: int
    max_samples: int
    schema: str
    info: dict[str, Any]
    finite: bool
    ended: bool
    first: int
    next: int
    live: int
    bytes: int
    fill: float
    committed: int
    evicted: int
    duplicates: int
    foreign: int
    quarantined: int
    waiting: bool
    leased_bytes: int
    leased_samples: int
    expected_producers: int
    closed_producers: int
    folded_producers: int
    folded_samples: int
    samples_per_s: float
    bytes_per_s: float
    oldest_age_s: float | None
    newest_age_s: float | None
    groups: dict[str, GroupStatus]
    producers: dict[str, ProducerStatus]
    ledger: Ledger


def status(ring: str, *, url: str | None = None) -> RingStatus:
    """Read the state of a ring; `dataclasses.asdict` makes it fit for JSON.

    Args:
        ring: Its name.
        url: The server, None for what the environment says.

    Raises:
        RingMissingError: There is no such ring.
        ServerError: The server is gone or refuses.
    """
    connection = Connection(url)
    try:
        return status_of(Ring(connection, ring))
    finally:
        connection.close()


def status_of(ring: Ring) -> RingStatus:
    """Read the state of a ring over a connection that is there; errors as for `status`."""
    _, now, flat, stream_length, index_length, group_replies, producer_replies, _ = ring.snapshot()
    meta, now_s = replies.read_meta(flat), float(now)
    groups = {reply[0].decode(): _read_group(reply, meta, now_s) for reply in group_replies}
    producers = {reply[0].decode(): _read_producer(reply, now_s) for reply in producer_replies}
    equations = (
        *_ring_equations(meta, stream_length, index_length),
        *(equation for name, group in groups.items() for equation in _group_equations(name, group, meta)),
    )
    return RingStatus(
        ring=ring.name,
        where=ring.connection.where,
        now_s=now_s,
        **_of_meta(meta),
        samples_per_s=sum(producer.samples_per_s for producer in producers.values()),
        bytes_per_s=sum(producer.bytes_per_s for producer in producers.values()),
        oldest_age_s=_age(ring, meta.first, meta.next - 1, now_s),
        newest_age_s=_age(ring, meta.next - 1, meta.next - 1, now_s),
        groups=groups,
        producers=producers,
        ledger=Ledger(equations, all(equation.difference == 0 for equation in equations)),
    )


def _of_meta(meta: Meta) -> dict[str, Any]:
    copied = ("epoch", "when_full", "capacity_bytes", "max_samples", "schema", "info", "finite", "ended")
    counters = ("duplicates", "foreign", "quarantined", "leased_bytes", "leased_samples")
    folded = ("folded_producers", "folded_samples")
    by_samples = meta.live / meta.max_samples if meta.max_samples else 0.0
    return {
        **{name: getattr(meta, name) for name in (*copied, "first", "next", "live", "bytes")},
        **{name: int(meta.raw.get(name, 0)) for name in (*counters, *folded)},
        "fill": max(meta.bytes / max(meta.capacity_bytes, 1), by_samples),
        "committed": meta.next - 1,
        "evicted": meta.first - 1,
        "waiting": meta.raw.get("waiting", "0") != "0",
        "expected_producers": int(meta.raw.get("producers", 0)),
        "closed_producers": int(meta.raw.get("closed", 0)),
    }


def _read_group(reply: Reply, meta: Meta, now_s: float) -> GroupStatus:
    _, last_given, pending, flat, members = reply
    counters = replies.pairs(flat)
    names = ("since", "delivered", "acknowledged", "lost", "evicted_pending", "reused", "redelivered", "doubled")
    # What somebody else wrote into the stream may have been delivered, too, under numbers beyond ours.
    seen = max(int(last_given), meta.first - 1)
    return GroupStatus(
        reuse=counters.get("reuse") or None,
        pending=int(pending),
        unread=max(meta.next - 1 - seen, 0),
        skipped=int(counters.get("skipped", 0)),
        consumers={member[0].decode(): _read_consumer(member, now_s) for member in members},
        **{name: int(counters.get(name, 0)) for name in names},
    )


def _read_consumer(reply: Reply, now_s: float) -> ConsumerStatus:
    _, seen, pending, about_text = reply
    seen_s = max(now_s - float(seen), 0.0) if seen else None
    return ConsumerStatus(
        state="left" if seen_s is None else _alive_or_silent(seen_s),
        seen_s=seen_s,
        pending=int(pending),
        **_identity(_read_about(about_text)),
    )


def _read_producer(reply: Reply, now_s: float) -> ProducerStatus:
    _, seen, committed, about_text = reply
    about = _read_about(about_text)
    seen_s = max(now_s - float(seen), 0.0)
    goodbye = about.get("state")
    state = goodbye if goodbye in ("left", "closed") else _alive_or_silent(seen_s)
    living = state == "alive"
    return ProducerStatus(
        state=state,
        seen_s=seen_s,
        committed=int(committed),
        samples_per_s=_number(about, "samples_per_s") if living else 0.0,
        bytes_per_s=_number(about, "bytes_per_s") if living else 0.0,
        blocked_share=_number(about, "blocked_share") if living else 0.0,
        codec=_texts(about, "codec"),
        lost_by_server=int(_number(about, "lost_by_server")),
        **_identity(about),
    )


def _alive_or_silent(seen_s: float) -> str:
    return "alive" if seen_s <= SILENT_AFTER_S else "silent"


def _read_about(text: bytes) -> dict[str, Any]:
    """Read what a process says of itself; anything but an object says nothing."""
    try:
        about = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return about if isinstance(about, dict) else {}


def _identity(about: Mapping[str, Any]) -> dict[str, Any]:
    host, pid, job_id = about.get("host"), about.get("pid"), about.get("job_id")
    return {
        "host": host if isinstance(host, str) else None,
        "pid": pid if isinstance(pid, int) else None,
        "job_id": None if job_id is None else str(job_id),
    }


def _number(about: Mapping[str, Any], name: str) -> float:
    value = about.get(name, 0)
    return float(value) if isinstance(value, int | float) else 0.0


def _texts(about: Mapping[str, Any], name: str) -> dict[str, str]:
    value = about.get(name)
    return {key: str(text) for key, text in value.items()} if isinstance(value, dict) else {}


def _age(ring: Ring, first: int, last: int, now_s: float) -> float | None:
    """Age of the oldest sample from `first` to `last`; None where all are gone by now."""
    entries = ring.read(first, last, 1) if first <= last else []
    try:
        return max(now_s - float(entries[0].fields[b"t"]), 0.0) if entries else None
    except (KeyError, ValueError):
        return None  # not an entry of ours: readers quarantine it


def _ring_equations(meta: Meta, stream_length: int, index_length: int) -> Iterator[Equation]:
    # `live` is what Redis counts in the stream; committed and evicted are the scripts' own numbers.
    yield _equation("committed = live + evicted", meta.next - 1, stream_length + meta.first - 1)
    yield _equation("live = lines of the index", stream_length, index_length)


def _group_equations(name: str, group: GroupStatus, meta: Meta) -> Iterator[Equation]:
    yield _equation(
        f"{name}: committed since it began = delivered + unread + lost",
        meta.next - 1 - group.since,
        group.delivered + group.unread + group.lost,
    )
    yield _equation(
        f"{name}: delivered = acknowledged + pending + evicted pending",
        group.delivered,
        group.acknowledged + group.pending + group.evicted_pending,
    )
    yield _equation(
        f"{name}: pending = pending of its consumers",
        group.pending,
        sum(consumer.pending for consumer in group.consumers.values()),
    )


def _equation(law: str, left: int, right: int) -> Equation:
    return Equation(law, left, right, left - right)
