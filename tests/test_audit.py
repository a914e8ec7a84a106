"""What `audit` counts through: nothing in a ring in full use, each figure that somebody falsified."""

import contextlib
import json
import subprocess
import sys
import threading

import pytest

import synthbroker as sb
from servers import eventually
from synthbroker import admin
from synthbroker.audit import audit_of
from tools import IN_PARTS, SOON_S, background, drain, fill, key, number

BIG = 100_000  # numbers in a sample of several parts


@pytest.fixture
def used_rig(rig):
    """Give a ring that has evicted, holds small and large samples, and has a group with pending ones."""
    rig.open("drop-oldest", max_samples=8)
    reader = rig.reader(reuse="3")
    producer = rig.producer()
    rig.put(producer, *range(1, 4), nbytes=72_000)
    rig.ring.acknowledge("train", rig.numbers(reader, 2))
    rig.put(producer, *range(4, 11))
    rig.put(producer, *range(11, 13), nbytes=72_000)
    rig.numbers(reader, 4)
    return rig


def differences(found):
    return {one.law: one.difference for one in found.equations if one.difference}


def test_a_ring_that_was_used_in_every_way_balances(used_rig):
    found = audit_of(used_rig.ring)
    assert found.balanced, found
    assert (found.live, found.parts, found.moved, found.foreign) == (8, 4, 0, 0)
    assert found.details == ()
    assert [one.law for one in found.equations if one.law.startswith("train: delivered")]


COMMITTED = "committed = live + evicted"
INDEX = "live = lines of the index"
MISSING = "samples missing from the stream = none"
BYTES = "bytes booked = costs in the index"
LASTING = "lasting parts of no live sample = none"
PARTS = "parts of live samples = parts that are there"
BEGAN = "train: committed since it began = delivered + unread + lost"
DELIVERED = "train: delivered = acknowledged + pending + evicted pending"
MEMBERS = "train: pending = pending of its consumers"


def count(field, by, of="meta"):
    """Change a counter."""
    return lambda rig: rig.keys.hincrby(rig.key(of), field, by)


def acknowledge_one(rig):
    (held,) = rig.keys.xpending_range(rig.key("samples"), "train", "-", "+", 1)
    rig.keys.xack(rig.key("samples"), "train", held["message_id"])


def remove_a_part(rig):
    rig.keys.unlink(min(rig.part_keys()))


def let_a_part_expire(rig):
    rig.keys.expire(min(rig.part_keys()), 1000)


def put_another_in_its_place(rig):
    rig.keys.xadd(rig.key("samples"), {"hello": "world"})
    rig.keys.xdel(rig.key("samples"), "12-0")


# What is done by hand, and which laws then differ by how much; None: by more than can be said here.
FALSIFIED = {
    "a sample too many committed": (count("next", 1), {COMMITTED: 1, MISSING: 1}),
    "a sample too many evicted": (count("first", 1), {COMMITTED: -1}),
    "an entry deleted": (
        lambda rig: rig.keys.xdel(rig.key("samples"), "12-0"), {COMMITTED: 1, INDEX: -1, MISSING: 1}),
    "an entry deleted, and one of somebody else added": (
        put_another_in_its_place, {COMMITTED: 1, INDEX: -1, MISSING: 1}),
    "bytes booked too many": (count("bytes", 17), {BYTES: 17}),
    "bytes reserved for nobody": (count("leased_bytes", 5), {"bytes reserved = bytes of leases": 5}),
    "a sample reserved for nobody": (count("leased_samples", 1), {"samples reserved = samples of leases": 1}),
    "acknowledged by hand": (acknowledge_one, {DELIVERED: 1}),
    "given and not counted": (count("delivered", -1, "group:train"), {BEGAN: 1, DELIVERED: -1}),
    "a loss that was none": (count("lost", 3, "group:train"), {BEGAN: -3}),
    "a group set back": (lambda rig: rig.keys.xgroup_setid(rig.key("samples"), "train", "7-0"), {BEGAN: None}),
    "a use of what is gone": (
        lambda rig: rig.keys.zadd(rig.key("uses:train"), {"1": 1}),
        {"train: uses kept of samples not in the ring = none": 1}),
    "a line of the index removed": (lambda rig: rig.keys.rpop(rig.key("index")), {INDEX: 1, BYTES: None, LASTING: 2}),
    "a line of the index that is none": (lambda rig: rig.keys.rpush(rig.key("index"), "hello"), {}),
    "a part removed": (remove_a_part, {PARTS: 1}),
    "a part that will expire": (let_a_part_expire, {PARTS: 1}),
    "a part of nobody": (lambda rig: rig.keys.set(rig.key("part:00aa:0"), b"x"), {LASTING: 1}),
    "a part of nobody under expiry": (lambda rig: rig.keys.set(rig.key("part:00aa:0"), b"x", ex=1000), {}),
    "an entry of somebody else": (lambda rig: rig.keys.xadd(rig.key("samples"), {"hello": "world"}), {}),
}  # fmt: skip


@pytest.mark.parametrize("what", FALSIFIED)
def test_what_somebody_falsified_is_named(used_rig, what):
    falsify, expected = FALSIFIED[what]
    falsify(used_rig)
    found = audit_of(used_rig.ring)
    off = differences(found)
    used_rig.keys.delete(*used_rig.all_keys())  # its books are spoilt
    assert set(off) == set(expected)
    assert found.balanced == (not expected)
    assert {law: off[law] for law, by in expected.items() if by is not None} == {
        law: by for law, by in expected.items() if by is not None
    }


@pytest.mark.parametrize("when_full", ["block", "drop-oldest"])
@pytest.mark.parametrize("size", [4, IN_PARTS, 300_000])  # in the entry, in shared parts, in parts of its own
def test_a_ring_in_full_use_raises_no_false_alarm(server, ring_name, when_full, size):
    options = {"ring": ring_name, "group": "g", "batch_size": 4, "wait_s": SOON_S}
    made = sb.Producer(
        server.url, ring=ring_name, capacity="6MB", max_samples=300, when_full=when_full, groups=("g", "other")
    )
    stop, seen = threading.Event(), []

    def produce():
        with made as out:
            n = 0
            while not stop.is_set():
                out.put(number(n, size))
                n += 1

    def read(group):
        with contextlib.suppress(sb.RingMissingError):
            seen.append(drain(sb.Consumer(server.url, **options | {"group": group, "reuse": 2})))

    made.__enter__()
    work = [background(produce), background(lambda: read("g")), background(lambda: read("other"))]
    moved = 0
    for _ in range(40):
        found = sb.audit(ring_name, url=server.url)
        assert found.balanced, (differences(found), found.details)
        moved += found.moved
    eventually(lambda: sb.status(ring_name, url=server.url).evicted, "the ring has turned over")
    assert sb.audit(ring_name, url=server.url).balanced
    stop.set()
    work[0].result(SOON_S)
    admin.end(ring_name, url=server.url)
    for one in work[1:]:
        one.result(SOON_S)
    found = sb.audit(ring_name, url=server.url)
    assert found.balanced
    assert moved, "samples came and went while parts were looked at"
    assert len(seen) == 2


def test_a_lease_that_nobody_renews_is_told_apart(rig):
    rig.open()
    rig.ring.room(rig.producer(), 1000, 2)
    client, leases = rig.keys, rig.key("leases")
    assert [audit_of(rig.ring).leased_samples, audit_of(rig.ring).expired_leases] == [2, 0]
    client.hset(leases, "p", "1000 2 1.000")
    found = audit_of(rig.ring)
    assert found.balanced
    assert (found.leased_bytes, found.leased_samples, found.expired_leases) == (1000, 2, 1)


def run(server, *words):
    command = [sys.executable, "-m", "synthbroker", *words, "--url", server.url]
    return subprocess.run(command, capture_output=True, text=True, timeout=SOON_S, check=False)


def test_the_command_exits_with_0_where_all_adds_up_and_else_with_1_and_the_difference(server, ring_name):
    fill(server, ring_name, range(12), groups=("g",))
    done = run(server, "audit", ring_name)
    assert (done.returncode, done.stderr) == (0, "")
    assert "committed = live + evicted" in done.stdout
    assert "12 = 12 + 0" in done.stdout
    assert "balanced: all 14 laws hold" in done.stdout
    server.client().xdel(key(ring_name, "samples"), "5-0", "6-0", "9-0")
    done = run(server, "audit", ring_name)
    assert done.returncode == 1
    assert "committed = live + evicted: off by +3" in done.stdout
    assert "not in the stream: 5-6" in done.stdout
    done = run(server, "audit", ring_name, "--json")
    assert done.returncode == 1
    content = json.loads(done.stdout)
    assert (content["balanced"], content["live"], content["details"][1]) == (False, 12, "not in the stream: 9")


def test_a_ring_that_is_not_there_is_named(server, ring_name):
    with pytest.raises(sb.RingMissingError, match=ring_name):
        sb.audit(ring_name, url=server.url)
    done = run(server, "audit", ring_name)
    assert done.returncode == 1
    assert "there is no ring" in done.stderr
