"""Reading a ring: what a batch is made of, how often a sample comes, when it is acknowledged, and how it ends."""

import itertools
import math
import random
import traceback
from functools import partial

import numpy as np
import pytest

import synthbroker as sb
from servers import eventually
from synthbroker import reader as readers
from synthbroker.pool import Pool
from tools import (
    IN_PARTS,
    SOON_S,
    background,
    check_ledger,
    counters,
    drain,
    fill,
    members,
    meta,
    pending,
    raw_ring,
    values,
    waits,
)

# -- batches


def test_the_users_own_random_numbers_are_left_alone(server, ring_name, reader):
    before = random.getstate(), np.random.get_state()[1].tolist()
    fill(server, ring_name, range(10))
    assert sorted(drain(reader(batch_size=2, reuse=2))) == sorted([*range(10), *range(10)])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


@pytest.mark.parametrize(
    ("batch_size", "drop_last", "sizes"),
    [
        (1, False, [1] * 10),
        (4, False, [4, 4, 2]),
        (4, True, [4, 4]),
        (10, False, [10]),
        (11, False, [10]),
        (11, True, []),
    ],
)
@pytest.mark.parametrize("size", [4, IN_PARTS])
def test_batches_are_full_but_for_the_last(server, ring_name, reader, batch_size, drop_last, sizes, size):
    fill(server, ring_name, range(10), size=size)
    batches = list(reader(batch_size=batch_size, drop_last=drop_last))
    assert [len(batch["n"]) for batch in batches] == [len(batch.info.ids) for batch in batches] == sizes
    assert drain(batches) == list(range(sum(sizes)))
    assert pending(server, ring_name, "g") == []
    assert counters(server, ring_name, "g")["acknowledged"] == 10
    check_ledger(server, ring_name, "g")


def test_a_batch_knows_where_its_samples_come_from(server, ring_name, reader):
    fill(server, ring_name, range(3), name="maker")
    (batch,) = reader(batch_size=3)
    info = batch.info
    assert (info.ring, info.group, info.epoch) == (ring_name, "g", meta(server, ring_name)["epoch"])
    assert (info.ids, info.seqs, info.uses) == ((1, 2, 3), (1, 2, 3), (1, 1, 1))
    assert {producer.rpartition(":")[0] for producer in info.producers} == {"maker"}
    assert info.recipes == ({"n": 0}, {"n": 1}, {"n": 2})


def test_fields_are_taken_as_tuples_in_their_order(server, ring_name, reader):
    fill(server, ring_name, range(3), size=IN_PARTS)
    (batch,) = reader(batch_size=3, fields=("x",))
    assert isinstance(batch, sb.TupleBatch)
    assert len(batch) == 1
    assert batch["x"].shape == (3, IN_PARTS)
    assert batch.info.ids == (1, 2, 3)
    (batch,) = reader("other", batch_size=3, fields=["x", "n"])
    x, n = batch
    assert (x[:, -1] == n).all()


def test_a_field_that_is_not_there_is_named(server, ring_name, reader):
    fill(server, ring_name, range(3))
    with pytest.raises(ValueError, match=r"\['y'\] are not in ring.*n:i64"):
        list(reader(fields=("x", "y")))


def test_one_may_read_only_some_producers(server, ring_name, reader):
    for i, name in enumerate(["a", "b", "c", "d"]):
        fill(server, ring_name, range(10 * i, 10 * i + 5), name=name, producers=4)
    assert drain(reader(producers=("b", "d"), batch_size=3)) == [*range(10, 15), *range(30, 35)]
    assert counters(server, ring_name, "g")["skipped"] == 10
    assert pending(server, ring_name, "g") == []
    check_ledger(server, ring_name, "g")
    assert drain(reader(None, producers=("a", "c"), batch_size=3)) == [*range(5), *range(20, 25)]


def test_reading_begins_when_enough_is_there(own_server, ring_name):
    server = own_server()
    fill(server, ring_name, range(4), producers=0)
    consumer = sb.Consumer(server.url, ring=ring_name, group="g", batch_size=2, min_fill=5, prefetch=0)
    first = background(lambda: values(next(iter(consumer))))
    waits(first, lambda: server.client().info("clients")["blocked_clients"] == 1, "the reader waits")
    assert counters(server, ring_name, "g")["delivered"] == 0
    fill(server, ring_name, [4], producers=None)
    assert first.result(SOON_S) == [0, 1]
    consumer.close()


def test_an_ended_ring_need_not_be_filled(server, ring_name, reader):
    fill(server, ring_name, range(2))
    assert drain(reader(min_fill=5)) == [0, 1]
    assert drain(reader(None, min_fill=5)) == [0, 1]


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [4, 4, 2]), (True, [4, 4])])
def test_an_epoch_has_as_many_samples_as_asked(server, ring_name, reader, drop_last, sizes):
    fill(server, ring_name, range(25), producers=0)
    consumer = reader(batch_size=4, epoch_size=10, drop_last=drop_last)
    epochs = [[values(batch) for batch in consumer] for _ in range(2)]
    assert [[len(batch) for batch in epoch] for epoch in epochs] == [sizes, sizes]
    assert [n for epoch in epochs for batch in epoch for n in batch] == list(range(2 * sum(sizes)))


# -- transform and collate


def test_a_transform_sees_each_sample(server, ring_name, reader):
    fill(server, ring_name, range(4))
    seen = []

    def double(sample):
        seen.append(int(sample["n"]))
        return {"n": sample["n"], "double": sample["x"] * 2}

    (batch,) = reader(batch_size=4, transform=double)
    assert seen == [0, 1, 2, 3]
    assert isinstance(batch, sb.Batch)
    assert batch["double"].tolist() == [[2 * i] * 4 for i in range(4)]
    assert batch.info.ids == (1, 2, 3, 4)


def test_a_transform_of_tuples_gives_tuples(server, ring_name, reader):
    fill(server, ring_name, range(4))
    (batch,) = reader(batch_size=4, fields=("x", "n"), transform=lambda sample: (sample[0] + 1, sample[1]))
    assert isinstance(batch, sb.TupleBatch)
    assert batch["x"].tolist() == [[i + 1] * 4 for i in range(4)]


@pytest.mark.parametrize(
    "made", [tuple, list, lambda samples: {"all": len(samples)}, len], ids=["tuple", "list", "dict", "int"]
)
def test_collate_makes_whatever_it_likes(server, ring_name, reader, made):
    fill(server, ring_name, range(3))
    (batch,) = reader(batch_size=3, collate=made)
    assert len(batch) == 3 if made in (tuple, list) else batch in (3, {"all": 3})
    assert pending(server, ring_name, "g") == []


@pytest.mark.parametrize("where", ["transform", "collate"])
def test_a_users_exception_comes_with_its_own_traceback(server, ring_name, reader, where):
    fill(server, ring_name, range(8))

    def trip_over_five(value):
        numbers = [int(sample["n"]) for sample in (value if where == "collate" else [value])]
        if 5 in numbers:
            raise ZeroDivisionError("five")
        return value

    consumer = reader(batch_size=2, **{where: trip_over_five})
    seen = []
    with pytest.raises(ZeroDivisionError, match="five") as caught:
        seen.extend(
            int(s["n"]) if where == "collate" else int(s)
            for b in consumer
            for s in (b if where == "collate" else b["n"])
        )
    assert seen == [0, 1, 2, 3], "what was ready before comes first"
    assert "trip_over_five" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    consumer.close()
    assert sorted(drain(reader(batch_size=2))) == [4, 5, 6, 7], "what it could not be used for is for others"


# -- how often


def test_a_sample_comes_as_often_as_the_group_may_use_it(server, ring_name, reader):
    fill(server, ring_name, range(10))
    batches = list(reader(batch_size=4, reuse=3))
    seen = drain(batches)
    assert sorted(seen) == sorted(list(range(10)) * 3)
    assert seen[:10] == list(range(10)), "fresh ones come first"
    uses = {}
    for batch in batches:
        for n, use in zip(values(batch), batch.info.uses, strict=True):
            uses.setdefault(n, []).append(use)
    assert all(found == [1, 2, 3] for found in uses.values())
    assert pending(server, ring_name, "g") == []
    check_ledger(server, ring_name, "g")


def test_without_end_a_sample_comes_again_while_nothing_is_fresh(server, ring_name, reader):
    fill(server, ring_name, range(3), producers=0)
    stream = iter(reader(batch_size=2, reuse=math.inf, prefetch=0))
    seen = [next(stream) for _ in range(30)]
    assert drain(seen[:1]) == [0, 1]
    assert set(drain(seen)) == {0, 1, 2}
    assert set(seen[-1].info.uses) == {2}
    fill(server, ring_name, [3], producers=None)
    batch = next(stream)
    assert values(batch)[0] == 3
    assert batch.info.uses == (1, 2), "fresh and used ones stand in one batch"
    with raw_ring(server, ring_name) as ring:
        ring.end()
    assert drain(stream) == []


def test_reuse_belongs_to_the_group(server, ring_name, reader):
    fill(server, ring_name, range(3))
    assert len(drain(reader(reuse=2))) == 6
    for other in 1, 3, "inf":
        with pytest.raises(sb.RingMismatchError, match=rf"group 'g'.*reuse=2, asked for was {other}"):
            list(reader(reuse=other))
    assert len(drain(reader("other", reuse=3))) == 9


# -- acknowledging


def test_a_batch_is_acknowledged_when_the_next_is_asked_for(server, ring_name, reader):
    fill(server, ring_name, range(6))
    stream = iter(reader(batch_size=2, prefetch=0))
    for expected in [1, 2], [3, 4], [5, 6]:
        assert list(next(stream).info.ids) == expected
        eventually(lambda: pending(server, ring_name, "g") == expected, f"only {expected} are not acknowledged")  # noqa: B023
    assert list(stream) == []
    assert pending(server, ring_name, "g") == []


def test_what_is_prefetched_is_not_acknowledged(server, ring_name, reader):
    fill(server, ring_name, range(10))
    stream = iter(reader(batch_size=2, prefetch=2))
    next(stream)
    eventually(lambda: pending(server, ring_name, "g") == [1, 2, 3, 4, 5, 6], "two batches are ready")
    next(stream)
    eventually(lambda: pending(server, ring_name, "g") == [3, 4, 5, 6, 7, 8], "one done, one more ready")


def test_the_memory_that_batches_can_need_at_most_is_there_from_the_first_on(server, ring_name, reader, monkeypatch):
    made = []
    monkeypatch.setattr(readers, "Pool", lambda keep: Pool(keep, lambda n: made.append(n) or np.empty(n, np.uint8)))
    fill(server, ring_name, range(12), size=100_000)

    def blocks():
        return sum(nbytes >= 800_000 for nbytes in made)

    stream = iter(reader(batch_size=2, prefetch=1))
    held = [next(stream)]
    eventually(lambda: blocks() == 3, "one batch in the loop's hands, one that it lets go of, one ready")
    held.append(next(stream))
    held.append(next(stream))
    assert blocks() == 3
    assert [values(batch) for batch in held] == [[0, 1], [2, 3], [4, 5]]


def test_a_batch_may_be_acknowledged_as_soon_as_it_is_given(server, ring_name, reader):
    fill(server, ring_name, range(4))
    stream = iter(reader(batch_size=2, prefetch=0, ack="delivered"))
    for _ in range(2):
        next(stream)
        assert pending(server, ring_name, "g") == []


def test_a_loop_that_was_left_goes_on_without_losing_or_doubling(server, ring_name, reader):
    fill(server, ring_name, range(20))
    consumer = reader(batch_size=2)
    seen = []
    for rounds in 1, 3, 2:
        for batch in itertools.islice(consumer, rounds):
            seen += values(batch)
    assert drain(itertools.chain(consumer)) == list(range(12, 20))
    assert seen == list(range(12))
    assert counters(server, ring_name, "g")["doubled"] == 0
    check_ledger(server, ring_name, "g")


def test_what_a_closed_reader_had_is_for_others_at_once(server, ring_name, reader):
    fill(server, ring_name, range(20))
    with reader(batch_size=2, prefetch=3) as consumer:
        stream = iter(consumer)
        assert [values(next(stream)) for _ in range(3)] == [[0, 1], [2, 3], [4, 5]]
    assert members(server, ring_name, "g") == []
    batches = list(reader(batch_size=4))  # claim_after_s is 30, and nobody waits for that
    assert sorted(drain(batches)) == list(range(4, 20))
    again = {n for batch in batches for n, use in zip(values(batch), batch.info.uses, strict=True) if use == 0}
    assert {4, 5} <= again <= set(range(4, 12))
    assert counters(server, ring_name, "g")["redelivered"] == len(again)
    check_ledger(server, ring_name, "g")


def test_closing_twice_or_unopened_is_fine(server, ring_name, reader):
    reader().close()
    fill(server, ring_name, range(3))
    consumer = reader()
    next(iter(consumer))
    consumer.close()
    consumer.close()
    assert len(drain(consumer)) == 3, "iterating again joins anew"


# -- who gets what


def test_two_groups_get_everything(server, ring_name, reader):
    fill(server, ring_name, range(30))
    streams = [iter(reader(group, batch_size=3)) for group in ("one", "two")]
    pairs = list(zip(*streams, strict=True))
    assert [drain(batches) for batches in zip(*pairs, strict=True)] == [list(range(30))] * 2
    check_ledger(server, ring_name, "one", "two")


def test_readers_of_one_group_share_the_samples(server, ring_name, reader):
    fill(server, ring_name, range(200))
    readers = [reader(batch_size=3, name=f"r{i}") for i in range(3)]
    shares = [future.result(SOON_S) for future in [background(partial(drain, one)) for one in readers]]
    assert sorted(itertools.chain(*shares)) == list(range(200))
    check_ledger(server, ring_name, "g")


def test_without_a_group_the_live_ring_is_read_anew_and_nothing_taken(server, ring_name, reader):
    fill(server, ring_name, range(10), producers=0, max_samples=8, when_full="drop-oldest")
    consumer = reader(None, batch_size=3)
    for _ in range(2):
        assert drain(consumer) == list(range(2, 10))
        assert values(next(iter(consumer))) == [2, 3, 4]
    fill(server, ring_name, [10], producers=None)
    batches = list(consumer)
    assert drain(batches) == list(range(3, 11))
    assert batches[0].info.group is None
    assert server.client().xinfo_groups(f"sb:{{{ring_name}}}:samples") == []
    with raw_ring(server, ring_name) as ring:
        ring.end()
    assert len(drain(consumer)) == len(drain(consumer)) == 8


def test_a_batch_of_numbers_is_an_array(server, ring_name, reader):
    fill(server, ring_name, range(2))
    (batch,) = reader(batch_size=2)
    assert batch["n"].dtype == np.int64
    assert batch["n"].shape == (2,)
