"""How far ahead of its ring a producer may run, and what it holds meanwhile."""

import threading

import pytest

import synthbroker as sb
from tools import (
    IN_PARTS,
    SOON_S,
    background,
    check_ledger,
    drain,
    fill,
    key,
    meta,
    number,
    waits,
)


def test_put_waits_while_too_much_is_in_flight(server, ring_name):
    out = sb.Producer(
        server.url, ring=ring_name, capacity="1MB", in_flight="1MB", codec="raw", groups=("g",), producers=1
    )
    put = []

    def put_all():
        for i in range(30):
            out.put(number(i, 50_000))
            put.append(i)
        out.close()

    done = background(put_all)
    waits(done, lambda: out.stats.samples == 4 and len(put) == 8, "four in the ring, four in flight")
    with sb.Consumer(server.url, ring=ring_name, group="g") as consumer:
        assert drain(consumer) == list(range(30))
    done.result(SOON_S)


def test_what_was_sent_holds_no_memory_when_put_may_go_on(server, ring_name, monkeypatch):
    out = sb.Producer(server.url, ring=ring_name, codec="raw", producers=1)
    out.put(number(0, 100_000))
    out.flush()
    sender, sizes = out._sender, out._packer._pool._sizes
    handed_over, seen = threading.Event(), []
    commit, notify = sender.ring.commit, sender._changed.notify_all
    monkeypatch.setattr(sender.ring, "commit", lambda *a, **k: handed_over.wait(SOON_S) and commit(*a, **k))
    monkeypatch.setattr(sender._changed, "notify_all", lambda: (seen.append(list(sizes.values())), notify()))
    for i in range(1, 4):
        out.put(number(i, 100_000))
    handed_over.set()
    out.flush()
    assert seen
    assert seen[-1] == []
    out.close()


def test_one_sample_may_be_larger_than_what_may_be_in_flight(server, ring_name):
    fill(server, ring_name, range(3), size=100_000, in_flight="100kB")
    assert drain(sb.Consumer(server.url, ring=ring_name, group="g")) == [0, 1, 2]


def test_tiny_samples_are_bounded_too_and_a_put_that_waits_ends_with_its_producer(server, ring_name):
    out = sb.Producer(server.url, ring=ring_name, capacity="10kB", in_flight="100kB")
    put = []
    done = background(lambda: [(out.put({"x": True}), put.append(i)) for i in range(10_000)])
    waits(done, lambda: out.stats.blocked_s > 0, "the ring is full")
    assert len(put) < 1000
    out.leave(flush_s=0)
    with pytest.raises(ValueError, match="closed meanwhile"):
        done.result(SOON_S)


def test_flush_says_whether_it_was_done_in_time(server, ring_name):
    out = sb.Producer(server.url, ring=ring_name, capacity="40kB", codec="raw")
    for i in range(5):
        out.put(number(i, IN_PARTS))
    assert out.flush(wait_s=0.05) is False
    assert sorted(drain(sb.Consumer(server.url, ring=ring_name, group="g", epoch_size=5))) == list(range(5))
    assert out.flush(wait_s=SOON_S) is True
    out.close()


def test_drop_oldest_never_waits(server, ring_name):
    options = {"size": IN_PARTS * 5, "when_full": "drop-oldest", "capacity": "1MB", "groups": ("slow",)}
    stats = fill(server, ring_name, range(300), **options)
    assert (stats.samples, stats.blocked_s) == (300, 0)
    assert stats.raw_bytes == 300 * (8 + 4 * IN_PARTS * 5)
    info = meta(server, ring_name)
    assert 0 < int(info["bytes"]) <= 1_000_000
    live = int(info["next"]) - int(info["first"])
    parts = list(server.client().scan_iter(match=key(ring_name, "part:*"), count=1000))
    assert 0 < live < 15
    assert len(parts) >= live
    assert all(server.client().ttl(part) == -1 for part in parts)
    check_ledger(server, ring_name, "slow")
    assert drain(sb.Consumer(server.url, ring=ring_name, group="slow")) == list(range(300 - live, 300))
    check_ledger(server, ring_name, "slow")


def test_a_ring_capped_in_samples_keeps_so_many(server, ring_name):
    fill(server, ring_name, range(50), when_full="drop-oldest", max_samples=7)
    assert drain(sb.Consumer(server.url, ring=ring_name, group=None)) == list(range(43, 50))
