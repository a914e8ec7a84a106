"""What is no sample, or not a whole one, is quarantined, counted and skipped: never a wrong tensor."""

import msgpack
import numpy as np
import pytest

import synthbroker as sb
from servers import eventually
from synthbroker import admin
from tools import (
    IN_PARTS,
    SOON_S,
    background,
    check_ledger,
    commit_raw,
    drain,
    encoded,
    fill,
    key,
    meta,
    number,
    pending,
    raw_ring,
    reasons,
    values,
)


def parts(server, ring_name, entry):
    """List the keys of a sample's parts."""
    uid, _, count = server.client().xrange(key(ring_name, "samples"), f"{entry}-0")[0][1][b"parts"].partition(b":")
    return [key(ring_name, f"part:{uid.decode()}:{i}") for i in range(int(count))]


def flip(client, part):
    middle = client.strlen(part) // 2
    (byte,) = client.getrange(part, middle, middle)
    client.setrange(part, middle, bytes([byte ^ 1]))


SABOTAGE = {
    "a damaged part": (flip, "checksum"),
    "a truncated part": (lambda client, part: client.set(part, client.get(part)[:-1]), "gone"),
    "a longer part": (lambda client, part: client.append(part, b"x"), "gone"),
    "an empty part": (lambda client, part: client.set(part, b""), "gone"),
    "a missing part": (lambda client, part: client.delete(part), "gone"),
    "a list instead of a part": (lambda client, part: (client.delete(part), client.rpush(part, b"x")), "gone"),
}


@pytest.mark.parametrize("codec", ["raw", "lz4"])
@pytest.mark.parametrize("what", SABOTAGE)
def test_a_damaged_payload_is_quarantined_and_the_rest_arrives(server, ring_name, what, codec):
    sabotage, reason = SABOTAGE[what]
    size = 2_000_000  # two parts and more
    with sb.Producer(server.url, ring=ring_name, capacity="100MB", producers=1, codec=codec) as out:
        for i in range(5):
            sample = number(i, size)
            sample["x"][::2] += np.random.default_rng(i).random(size // 2, np.float32)
            out.put(sample)
    sabotage(server.client(), parts(server, ring_name, 3)[-1])
    batches = list(sb.Consumer(server.url, ring=ring_name, group="g", batch_size=2))
    assert [n for batch in batches for n in batch["n"].tolist()] == [0, 1, 3, 4]
    for batch in batches:
        assert (batch["x"][:, 1::2] == batch["n"][:, None]).all()
    (note,) = reasons(server, ring_name)
    assert reason in note
    assert meta(server, ring_name)["quarantined"] == "1"
    assert pending(server, ring_name, "g") == []
    check_ledger(server, ring_name, "g")


def head_of(sample, **changes):
    return msgpack.packb(msgpack.unpackb(sample.head) | changes)


def resized(sample, *fields):
    """Describe the fields of a sample otherwise: each as name, dtype, sizes, codec and packed bytes."""
    described = msgpack.packb([field[:4] for field in fields])
    return sample._replace(begin=head_of(sample, f=described, s=[field[4] for field in fields]), ends=b"")


MIXED_SIZE = 261_500  # numbers in a sample whose last part rides in the entry
SMALL, LARGE = encoded(2), encoded(2, IN_PARTS)
MIXED = encoded(2, MIXED_SIZE)
HOSTILE = {
    "a head that is none": SMALL._replace(begin=b"\xc1\xc1", ends=b""),
    "an empty head": SMALL._replace(begin=b"", ends=b""),
    "a head of the future": SMALL._replace(begin=head_of(SMALL, v=2), ends=b""),
    "a head without parts": SMALL._replace(begin=head_of(SMALL, p=[]), ends=b""),
    "another dtype": resized(SMALL, ["n", "i64", [], "raw", 8], ["x", "i32", [4], "raw", 16]),
    "another shape": resized(SMALL, ["n", "i64", [], "raw", 8], ["x", "f32", [2, 2], "raw", 16]),
    "a field less": resized(SMALL, ["n", "i64", [3], "raw", 24]),
    "another name": resized(SMALL, ["n", "i64", [], "raw", 8], ["y", "f32", [4], "raw", 16]),
    "a name twice": resized(SMALL, ["n", "i64", [], "raw", 8], ["n", "f32", [4], "raw", 16]),
    "a tensor of petabytes": resized(SMALL, ["n", "i64", [], "raw", 8], ["x", "f32", [2**48], "lz4", 16]),
    "bytes that do not unpack": resized(SMALL, ["n", "i64", [], "raw", 8], ["x", "f32", [8], "lz4", 16]),
    "sizes that do not add up": resized(SMALL, ["n", "i64", [], "raw", 8], ["x", "f32", [4], "raw", 20]),
    "fields that are no bytes": SMALL._replace(begin=head_of(SMALL, f=[["n", "i64", [], "raw"]]), ends=b""),
    "a size less than fields": SMALL._replace(begin=head_of(SMALL, s=[24]), ends=b""),
    "other data than checksummed": SMALL._replace(data=b"y" * 24),
    "less data than stated": SMALL._replace(data=b"y" * 23),
    "no data": SMALL._replace(data=b""),
    "a part where all rides in the entry": SMALL._replace(parts=[[memoryview(b"y" * 24)]]),
    "other parts than checksummed": LARGE._replace(parts=[[memoryview(b"y" * LARGE.payload_bytes)]]),
    "data where all parts are beside": LARGE._replace(data=b"y"),
    "fewer parts than stated": LARGE._replace(parts=[], data=b"y"),
    "another last part than checksummed": MIXED._replace(data=b"y" * len(MIXED.data)),
    "a last part that is longer": MIXED._replace(data=MIXED.data + b"y"),
    "no last part": MIXED._replace(data=b""),
}


@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.parametrize("group", ["g", None])
def test_a_hostile_sample_is_quarantined_and_the_rest_arrives(server, ring_name, what, group):
    size = {SMALL.payload_bytes: 4, LARGE.payload_bytes: IN_PARTS}.get(HOSTILE[what].payload_bytes, MIXED_SIZE)
    fill(server, ring_name, range(2), size=size, producers=2)
    with raw_ring(server, ring_name) as ring:
        commit_raw(ring, [HOSTILE[what]])
    fill(server, ring_name, range(3, 5), size=size, producers=2)
    assert drain(sb.Consumer(server.url, ring=ring_name, group=group, batch_size=2)) == [0, 1, 3, 4]
    assert len(reasons(server, ring_name)) == 1
    assert meta(server, ring_name)["quarantined"] == "1"
    if group:
        assert pending(server, ring_name, "g") == []
        check_ledger(server, ring_name, "g")


@pytest.mark.parametrize(
    "changed",
    [
        {"begin": b"y" * 10, "ends": b"y" * 1_999_990},
        {"begin": b"y" * 2_000_000, "ends": b""},
        {"data": b"y" * 2_000_000},
    ],
)
def test_an_entry_that_would_take_more_memory_than_any_sample_does_is_refused(server, ring_name, changed):
    fill(server, ring_name, range(2), producers=0, capacity="500MB")
    with raw_ring(server, ring_name) as ring:
        with pytest.raises(sb.ServerRefusedError, match=r"an entry of .*2000000"):
            commit_raw(ring, [SMALL._replace(**changed)])
    admin.end(ring_name, url=server.url)
    assert drain(sb.Consumer(server.url, ring=ring_name, group="g")) == [0, 1]


def copy_of_the_first(client, stream):
    ((_, fields),) = client.xrange(stream, count=1)
    return fields


FOREIGN = {
    "an entry by hand": lambda client, stream: client.xadd(stream, {"hello": "world"}),
    "an entry with the next number": lambda client, stream: client.xadd(stream, {"hello": "world"}, id="4-0"),
    "an entry between two numbers": lambda client, stream: client.xadd(stream, {"hello": "world"}, id="3-5"),
    "a copy of a sample": lambda client, stream: client.xadd(stream, copy_of_the_first(client, stream)),
}


@pytest.mark.parametrize("what", FOREIGN)
@pytest.mark.parametrize("read_before", [True, False])
def test_a_foreign_entry_is_stepped_over_and_counted(server, ring_name, what, read_before):
    fill(server, ring_name, range(3), producers=2)
    FOREIGN[what](server.client(), key(ring_name, "samples"))
    consumer = sb.Consumer(server.url, ring=ring_name, group="g", prefetch=0, wait_s=SOON_S)
    stream = iter(consumer)
    seen = drain(next(stream) for _ in range(3))
    if read_before:
        rest = background(lambda: drain(stream))
        eventually(lambda: meta(server, ring_name)["foreign"] != "0", "it has met the entry")
    fill(server, ring_name, range(3, 6), producers=2)
    seen += rest.result(SOON_S) if read_before else drain(stream)
    assert seen == list(range(6))
    assert int(meta(server, ring_name)["foreign"]) >= 1
    assert pending(server, ring_name, "g") == []
    check_ledger(server, ring_name, "g")
    assert drain(sb.Consumer(server.url, ring=ring_name, group="late")) == list(range(6))


def test_a_bad_sample_in_a_full_ring_makes_room_again(server, ring_name):
    fill(server, ring_name, [0], size=IN_PARTS, producers=2, max_samples=3, groups=("g",))
    with raw_ring(server, ring_name) as ring:
        commit_raw(ring, [HOSTILE["other parts than checksummed"]])
    done = background(lambda: fill(server, ring_name, range(2, 12), size=IN_PARTS, producers=None, capacity=None))
    seen = []
    for batch in sb.Consumer(server.url, ring=ring_name, group="g", epoch_size=11, wait_s=SOON_S):
        seen += values(batch)
    assert seen == [0, *range(2, 12)]
    done.result(SOON_S)
