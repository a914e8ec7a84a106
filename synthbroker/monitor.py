"""What a ring holds, who is at it, and whether its ledger adds up: values for people and programs, read at one instant.

The ledger is the conservation law of a ring. Its left and right sides come from different places (counters that the
scripts keep, against lengths and pending lists that Redis keeps), so a difference is a sample that nobody counted.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from synthbroker import books, replies
from synthbroker.advice import advise, signs_of
from synthbroker.connection import Connection
from synthbroker.errors import RingMissingError
from synthbroker.ledger import Equation, Ledger, equation
from synthbroker.replies import Meta, Reply
from synthbroker.ring import Ring
from synthbroker.starving import SILENT_AFTER_S
from synthbroker.states import ConsumerStatus, GroupStatus, ProducerStatus, RingStatus, Twins


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


def rings(*, url: str | None = None) -> tuple[RingStatus, ...]:
    """Read the state of all rings of a server; looks at every key of it. Errors as for `status`."""
    found = []
    connection = Connection(url)
    try:
        for name in books.ring_names(connection):
            with suppress(RingMissingError):  # dropped meanwhile
                found.append(status_of(Ring(connection, name)))
    finally:
        connection.close()
    return tuple(found)


def status_of(ring: Ring) -> RingStatus:
    """Read the state of a ring over a connection that is there; errors as for `status`."""
    return read_status(ring, ring.snapshot())


def read_status(ring: Ring, snapshot: Reply) -> RingStatus:
    """Read the state of a ring from what `snapshot.lua` said."""
    _, now, flat, stream_length, index_length, group_replies, producer_replies, *_, twins, uses = snapshot
    meta, now_s = replies.read_meta(flat), float(now)
    producers = {reply[0].decode(): _read_producer(reply, now_s) for reply in producer_replies}
    used = {name.decode(): replies.pairs([b"%d" % n if isinstance(n, int) else n for n in flat]) for name, flat in uses}
    groups = {
        reply[0].decode(): _with_uses(_read_group(reply, meta, now_s), used[reply[0].decode()], meta)
        for reply in group_replies
    }
    equations = (
        *_ring_equations(meta, stream_length, index_length),
        *(one for name, group in groups.items() for one in group_equations(name, group, meta.next - 1, group.pending)),
    )
    status = RingStatus(
        ring=ring.name,
        where=ring.connection.where,
        now_s=now_s,
        **_of_meta(meta),
        samples_per_s=sum(producer.samples_per_s for producer in producers.values() if producer.heard),
        bytes_per_s=sum(producer.bytes_per_s for producer in producers.values() if producer.heard),
        oldest_age_s=_age(ring, meta.first, meta.next - 1, now_s),
        newest_age_s=_age(ring, meta.next - 1, meta.next - 1, now_s),
        groups=groups,
        producers=producers,
        ledger=Ledger(equations, all(one.difference == 0 for one in equations)),
        generation_s=_generation_s(producers.values()),
        wasted_s=int(meta.raw.get("wasted_us", 0)) / 1e6,
        twins=tuple(_read_twins(replies.pairs(twins))),
        **_blocked(producers.values()),
    )
    return replace(status, advice=advise(signs_of(status)))


def _blocked(producers: Iterable[ProducerStatus]) -> dict[str, Any]:
    """Say what share of their time all producers were blocked, and sending."""
    known = list(producers)
    heard = [one for one in known if one.heard]
    return {
        "blocked_share": _mean((one.blocked_share, 1.0) for one in heard),
        "blocked_ever_share": _mean((one.blocked_ever_share, one.age_s) for one in known),
        "sending_share": _mean((one.sending_share, 1.0) for one in heard),
    }


def _starved(members: Iterable[ConsumerStatus]) -> dict[str, Any]:
    """Say what share of the time the training loops of a group waited, and its readers for the ring."""
    readers = [(one, one.starved_share) for one in members if one.starved_share is not None]
    heard = [(one, share) for one, share in readers if one.heard]
    found = {"starved_ever_share": _mean((one.starved_ever_share, one.age_s) for one, _ in readers)}
    if heard:
        found["starved_share"] = _mean((share, 1.0) for _, share in heard)
        found["dry_share"] = _mean((one.dry_share, 1.0) for one, _ in heard)
    return found


def _mean(weighted: Iterable[tuple[float, float]]) -> float:
    pairs = list(weighted)
    if not any(weight for _, weight in pairs):  # all have just begun, and count alike
        pairs = [(value, 1.0) for value, _ in pairs]
    weight = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / weight if pairs else 0.0


def _generation_s(producers: Iterable[ProducerStatus]) -> float | None:
    said = [(one.generation_s, one.committed) for one in producers if one.generation_s is not None]
    samples = sum(count for _, count in said)
    return sum(mean_s * count for mean_s, count in said) / samples if samples else None


def _with_uses(group: GroupStatus, used: Mapping[str, str], meta: Meta) -> GroupStatus:
    """Add how often live samples were used: those whose uses are not kept (any more) have had all of them."""
    kept = {times: int(count) for times, count in used.items()}
    uses = {"0": group.unread} | kept
    most = "1" if group.reuse in (None, "inf") else str(group.reuse)
    uses[most] = uses.get(most, 0) + max(meta.live - sum(uses.values()), 0)
    return replace(group, uses={times: count for times, count in uses.items() if count})


def _read_twins(pairs: Mapping[str, str]) -> Iterator[Twins]:
    for pair, text in pairs.items():
        (first, second), (count, *noticed) = pair.split(" "), text.split(" ")
        if noticed:
            yield Twins(first, second, int(count), float(noticed[0]))


def _of_meta(meta: Meta) -> dict[str, Any]:
    copied = ("epoch", "when_full", "capacity_bytes", "max_samples", "schema", "info", "checks", "ended")
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
    names = (
        "since",
        "delivered",
        "acknowledged",
        "lost",
        "evicted_pending",
        "reused",
        "redelivered",
        "doubled",
        "skipped",
    )
    numbers: dict[str, Any] = {name: int(counters.get(name, 0)) for name in names}
    # What somebody else wrote into the stream may have been delivered, too, under numbers beyond ours.
    seen = max(int(last_given), meta.first - 1)
    consumers = {member[0].decode(): _read_consumer(member, now_s) for member in members}
    return GroupStatus(
        reuse=counters.get("reuse") or None,
        pending=int(pending),
        unread=max(meta.next - 1 - seen, 0),
        consumers=consumers,
        wasted_s=int(counters.get("wasted_us", 0)) / 1e6,
        **numbers,
        **_starved(consumers.values()),
    )


def _read_consumer(reply: Reply, now_s: float) -> ConsumerStatus:
    _, seen, pending, about_text = reply
    seen_s = max(now_s - float(seen), 0.0) if seen else None
    about = _read_about(about_text)
    return ConsumerStatus(
        state="left" if seen_s is None else _alive_or_silent(seen_s),
        seen_s=seen_s,
        pending=int(pending),
        starved_share=_share(about, "starved_share") if "starved_share" in about else None,
        starved_ever_share=_share(about, "starved_ever_share"),
        dry_share=_share(about, "dry_share"),
        age_s=_seconds(about, "age_s"),
        needs=int(max(_seconds(about, "needs"), 1)),
        **_identity(about),
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
        blocked_share=_share(about, "blocked_share") if living else 0.0,
        blocked_ever_share=_share(about, "blocked_ever_share"),
        sending_share=_share(about, "sending_share") if living else 0.0,
        age_s=_seconds(about, "age_s"),
        codec=_texts(about, "codec"),
        lost_by_server=int(_number(about, "lost_by_server")),
        generation_s=_number(about, "generation_s") if "generation_s" in about else None,
        quarantined=int(_number(about, "quarantined")),
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


def _share(about: Mapping[str, Any], name: str) -> float:
    value = _number(about, name)
    return value if 0 <= value <= 1 else 0.0


def _seconds(about: Mapping[str, Any], name: str) -> float:
    value = _number(about, name)
    return value if 0 <= value < math.inf else 0.0


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
    yield equation("committed = live + evicted", meta.next - 1, stream_length, meta.first - 1)
    yield equation("live = lines of the index", stream_length, index_length)


def group_equations(name: str, group: GroupStatus, committed: int, pending: int) -> Iterator[Equation]:
    """Say what must be true of a group, of which so many entries are known to be pending."""
    yield equation(
        f"{name}: committed since it began = delivered + unread + lost",
        committed - group.since,
        group.delivered,
        group.unread,
        group.lost,
    )
    yield equation(
        f"{name}: delivered = acknowledged + pending + evicted pending",
        group.delivered,
        group.acknowledged,
        pending,
        group.evicted_pending,
    )
    yield equation(
        f"{name}: pending = pending of its consumers",
        pending,
        sum(consumer.pending for consumer in group.consumers.values()),
    )
