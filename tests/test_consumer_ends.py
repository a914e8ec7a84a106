"""Before the first sample and after the last one; rings that are too small; arguments that cannot be."""

import itertools
import math

import pytest

import synthbroker as sb
from rings import take
from servers import eventually
from synthbroker import ring as rings
from synthbroker.replies import Incarnation
from tools import (
    IN_PARTS,
    SOON_S,
    background,
    check_ledger,
    drain,
    fill,
    holders,
    members,
    meta,
    number,
    pending,
    raw_ring,
    values,
    waits,
)

# -- before the beginning and after the end


def test_a_reader_may_be_there_before_any_producer(server, ring_name, reader):
    found = background(lambda: drain(reader(batch_size=2)))
    live = background(lambda: drain(reader(None, min_fill=5)))
    with sb.Producer(server.url, ring=ring_name, capacity="1MB", producers=1) as out:
        out.flush()  # a ring without a sample has no schema yet
        waits(found, lambda: meta(server, ring_name)["schema"] == "", "the ring is empty")
        for i in range(5):
            out.put(number(i))
    assert found.result(SOON_S) == [0, 1, 2, 3, 4]
    assert live.result(SOON_S) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("group", ["g", None])
def test_a_ring_that_never_comes_starves_its_reader(server, ring_name, reader, group):
    with pytest.raises(sb.StarvedError, match=f"no ring '{ring_name}'"):
        list(reader(group, wait_s=0.1))


@pytest.mark.parametrize("group", ["g", None])
def test_a_ring_without_samples_starves_its_reader(server, ring_name, reader, group):
    with sb.Producer(server.url, ring=ring_name, capacity="1MB"), pytest.raises(sb.StarvedError, match="no producer"):
        list(reader(group, wait_s=0.1))


def test_a_reader_that_starved_may_go_on(server, ring_name, reader):
    fill(server, ring_name, range(3), producers=0)
    consumer = reader(wait_s=0.1, batch_size=2)
    seen = []
    with pytest.raises(sb.StarvedError, match=rf"{ring_name}.*group 'g'.*no sample for"):
        seen.extend(values(batch) for batch in consumer)
    assert seen == [[0, 1]]
    fill(server, ring_name, [3], producers=None)
    with raw_ring(server, ring_name) as ring:
        ring.end()
    assert sorted(drain(consumer)) == [2, 3]
    check_ledger(server, ring_name, "g")


def test_an_empty_ring_that_has_ended_has_nothing(server, ring_name, reader):
    fill(server, ring_name, [])
    assert list(reader()) == []
    assert list(reader(None)) == []


def test_reading_on_after_the_end_is_told(server, ring_name, reader):
    fill(server, ring_name, range(3))
    consumer = reader()
    assert drain(consumer) == [0, 1, 2]
    for _ in range(2):
        with pytest.raises(sb.RingEndedError, match=f"{ring_name}.*reopen=True"):
            next(iter(consumer))
    fill(server, ring_name, range(3, 5), reopen=True)
    assert drain(consumer) == [3, 4]
    with pytest.raises(sb.RingEndedError):
        list(consumer)


def test_a_reopened_ring_is_read_on(server, ring_name, reader):
    fill(server, ring_name, range(3))
    consumer = reader()
    assert drain(consumer) == [0, 1, 2]
    with sb.Producer(server.url, ring=ring_name, reopen=True) as out:
        out.put(number(3))
        out.flush()
        stream = iter(consumer)
        assert values(next(stream)) == [3]
        out.close()
    assert drain(stream) == []


def test_a_batch_larger_than_the_ring_is_told(server, ring_name, reader):
    out = sb.Producer(server.url, ring=ring_name, capacity="100kB", codec="raw")
    for i in range(20):
        out.put(number(i, IN_PARTS))
    with pytest.raises(sb.UnacknowledgedError, match=r"100 kB.*batch of 10 needs more.*smaller batches"):
        list(reader(batch_size=10))
    out.leave(flush_s=0)


def test_a_full_ring_and_a_reader_that_acknowledges_come_to_an_end(server, ring_name, reader):
    done = background(lambda: fill(server, ring_name, range(40), size=IN_PARTS, capacity="100kB", groups=("g",)))
    assert drain(reader(batch_size=3, prefetch=4)) == list(range(40))
    assert done.result(SOON_S).samples == 40
    check_ledger(server, ring_name, "g")


@pytest.mark.parametrize("drop_last", [False, True])
def test_trainings_that_share_a_group_do_not_wait_for_each_others_incomplete_batches(
    server, ring_name, reader, drop_last
):
    """Each waits for what the other one holds, and may leave when it dies; neither batch will ever be whole."""
    with sb.Producer(server.url, ring=ring_name, capacity="1MB", producers=1, groups=("g",)) as out:
        out.put(number(0))
        readers = [reader(batch_size=1000, drop_last=drop_last, wait_s=SOON_S, name=name) for name in ("one", "other")]
        seen = [background(lambda one=one: drain(one)) for one in readers]
        eventually(lambda: len(members(server, ring_name, "g")) == 2, "both wait", deadline_s=SOON_S)
        for i in itertools.count(1):
            out.put(number(i))
            eventually(lambda i=i: len(pending(server, ring_name, "g")) == i + 1, "it is taken", deadline_s=SOON_S)
            if len(set(holders(server, ring_name, "g"))) == 2:
                break
    shares = [one.result(SOON_S / 2) for one in seen]
    assert sorted(itertools.chain(*shares)) == ([] if drop_last else list(range(i + 1)))
    assert pending(server, ring_name, "g") == []
    check_ledger(server, ring_name, "g")


def test_trainings_with_checkpoints_do_not_wait_for_each_others_last_one(server, ring_name, reader):
    """Each makes its last checkpoint after its loop, which ends when nobody holds what may come again."""
    fill(server, ring_name, range(40))
    both = [reader(ack="checkpoint", batch_size=4, wait_s=SOON_S, name=name) for name in ("one", "other")]
    streams = [iter(one) for one in both]
    seen = [values(next(stream)) for stream in streams]
    rest = [background(lambda stream=stream: drain(stream)) for stream in streams]
    seen += [one.result(SOON_S / 2) for one in rest]
    assert sorted(itertools.chain(*seen)) == list(range(40))
    assert len(pending(server, ring_name, "g")) == 40
    for one in both:
        one.state_dict()
        one.acknowledge()
    assert pending(server, ring_name, "g") == []
    check_ledger(server, ring_name, "g")


def test_a_full_ring_goes_on_though_a_producer_died_with_a_lease(server, ring_name, reader, monkeypatch):
    """The oldest sample is in an incomplete batch, and what the dead one has room for never comes."""
    monkeypatch.setattr(rings, "BEAT_S", 0.5)
    fill(server, ring_name, range(5), size=IN_PARTS, capacity="100kB", groups=("g",), producers=None)
    with raw_ring(server, ring_name) as ring:
        gone, other, dead, waiting = (Incarnation(name, "00") for name in ("gone/0", "other/0", "dead", "waiting"))
        for who, many in (gone, 1), (other, 4):
            ring.join_group(who, "g", "1", {})
            assert len(take(ring, who, "g", many).samples) == many
        ring.leave_group(gone, "g")
        for who, word in (dead, "OK"), (waiting, "FULL"):
            ring.join_producer(who, 0, {})
            assert ring.room(who, 15_000, 1).word == word
        assert values(next(iter(reader(batch_size=4)))) == [0]


# -- arguments that cannot be

WRONG = [
    ({"ring": "a b"}, ValueError, "cannot name a ring"),
    ({"ring": 3}, TypeError, "name of a ring"),
    ({"group": "a/b"}, ValueError, "cannot name a group"),
    ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
    ({"batch_size": 2.0}, TypeError, "batch_size must be a whole number"),
    ({"batch_size": True}, TypeError, "batch_size must be a whole number"),
    ({"prefetch": -1}, ValueError, "prefetch must be at least 0"),
    ({"min_fill": 0}, ValueError, "min_fill must be at least 1"),
    ({"epoch_size": 0}, ValueError, "epoch_size must be at least 1"),
    ({"reuse": 0}, ValueError, "reuse must be"),
    ({"reuse": 1.5}, ValueError, "reuse must be"),
    ({"reuse": True}, ValueError, "reuse must be"),
    ({"reuse": "often"}, ValueError, "reuse must be"),
    ({"ack": "never"}, ValueError, "ack must be one of"),
    ({"wait_s": -1}, ValueError, "wait_s must not be negative"),
    ({"wait_s": math.nan}, ValueError, "wait_s must"),
    ({"reconnect_s": "5"}, TypeError, "reconnect_s must be a number of seconds"),
    ({"fields": "image"}, TypeError, "fields must be a sequence of names"),
    ({"fields": ()}, TypeError, "fields must be a sequence of names"),
    ({"fields": ("a", "a")}, ValueError, "twice"),
    ({"fields": ("a b",)}, ValueError, "cannot name a field"),
    ({"producers": "gen"}, TypeError, "producers must be a sequence of names"),
    ({"name": "a/b"}, ValueError, "cannot name a reader"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG, ids=[str(case[0]) for case in WRONG])
@pytest.mark.parametrize("kind", ["Consumer", "RingDataset"])
def test_arguments_that_cannot_be_are_refused_before_anything_is_opened(kind, arguments, error, message):
    with pytest.raises(error, match=message):
        getattr(sb, kind)("unix:///nowhere", **{"ring": "r", "group": "g"} | arguments)


@pytest.mark.parametrize("ack", ["next", "checkpoint"])
@pytest.mark.parametrize("kind", [sb.Consumer, sb.RingDataset])
def test_a_reader_that_nobody_holds_any_more_leaves_its_group(server, ring_name, reader, kind, ack):
    fill(server, ring_name, range(8))
    forgotten = kind(server.url, ring=ring_name, group="g", ack=ack, batch_size=2)
    assert values(next(iter(forgotten))) == [0, 1]
    if ack == "checkpoint":
        forgotten.state_dict()
    assert members(server, ring_name, "g") != []
    del forgotten
    eventually(lambda: members(server, ring_name, "g") == [], "it has left")
    assert drain(reader(batch_size=2, ack="next", wait_s=SOON_S)) == list(range(8)), "nobody keeps what it held"
