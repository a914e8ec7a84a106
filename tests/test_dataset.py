"""The torch side: every way to run a DataLoader gives every sample once, and only the training process acknowledges."""

import copy
import itertools
import multiprocessing
import pickle
import re
import time

import pytest
import torch
from torch.utils.data import DataLoader

import synthbroker as sb
from servers import eventually
from tools import (
    IN_PARTS,
    LOADER_MARKS,
    SOON_S,
    background,
    check_ledger,
    counters,
    drain,
    fill,
    members,
    number,
    pending,
    processes,
    raw_ring,
    read_with_workers,
    reasons,
    values,
)

pytestmark = LOADER_MARKS


def loader_of(kind, dataset, **options):
    return dataset.loader(**options) if kind == "loader" else DataLoader(dataset, batch_size=None, **options)


# -- every way to run it

WAYS = [
    ("loader", {}),
    ("loader", {"pin_memory": True}),
    ("loader", {"num_workers": 1, "multiprocessing_context": "fork"}),
    ("loader", {"num_workers": 1, "multiprocessing_context": "spawn", "persistent_workers": True}),
    ("loader", {"num_workers": 2, "multiprocessing_context": "fork", "persistent_workers": True, "pin_memory": True}),
    ("loader", {"num_workers": 2, "multiprocessing_context": "forkserver", "pin_memory": True}),
    ("loader", {"num_workers": 4, "multiprocessing_context": "fork", "prefetch_factor": 1}),
    ("plain", {}),
    ("plain", {"num_workers": 1, "multiprocessing_context": "forkserver"}),
    ("plain", {"num_workers": 2, "multiprocessing_context": "fork", "pin_memory": True}),
    ("plain", {"num_workers": 2, "multiprocessing_context": "spawn", "persistent_workers": True}),
    ("plain", {"num_workers": 4, "multiprocessing_context": "fork"}),
]


@pytest.mark.parametrize(
    ("kind", "options"), WAYS, ids=[f"{kind}-{'-'.join(map(str, o.values()))}" for kind, o in WAYS]
)
def test_every_way_gives_every_sample_once(server, ring_name, dataset, kind, options):
    fill(server, ring_name, range(50), size=IN_PARTS)
    batches = list(loader_of(kind, dataset(batch_size=4), **options))
    assert sorted(drain(batches)) == list(range(50))
    for batch in batches:
        assert type(batch) is sb.Batch
        assert isinstance(batch["x"], torch.Tensor)
        assert [recipe["n"] for recipe in batch.info.recipes] == values(batch)
        assert batch.info.uses == (1,) * len(batch["n"])
    assert pending(server, ring_name, "g") == []
    if not options.get("persistent_workers"):
        eventually(lambda: members(server, ring_name, "g") == [], "all have left")
    check_ledger(server, ring_name, "g")


@pytest.mark.parametrize("kind", ["loader", "plain"])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_fewer_samples_than_workers_end_cleanly(server, ring_name, dataset, kind, count):
    fill(server, ring_name, range(count), schema="n:i64[] x:f32[4]")
    batches = loader_of(kind, dataset(), num_workers=4, multiprocessing_context="fork")
    assert sorted(drain(batches)) == list(range(count))
    assert count == 0 or pending(server, ring_name, "g") == []


@pytest.mark.parametrize("capacity", ["500kB", "100kB"])
def test_workers_read_a_full_ring_to_its_end(server, ring_name, dataset, capacity):
    done = background(lambda: fill(server, ring_name, range(60), size=IN_PARTS, capacity=capacity, groups=("g",)))
    batches = dataset(batch_size=2).loader(num_workers=2, multiprocessing_context="fork")
    assert sorted(drain(batches)) == list(range(60))
    assert done.result(SOON_S).samples == 60
    check_ledger(server, ring_name, "g")


@pytest.mark.parametrize("kind", ["loader", "plain"])
def test_training_processes_with_workers_share_the_samples(server, ring_name, kind):
    options = {"group": "g", "batch_size": 3, "wait_s": SOON_S, "num_workers": 2, "plain": kind == "plain"}
    with processes(read_with_workers, *[(server.url, ring_name)] * 2, **options) as (_, told):
        fill(server, ring_name, range(200), size=IN_PARTS)
        shares = [told.get(timeout=SOON_S) for _ in range(2)]
    assert sorted(itertools.chain(*shares)) == list(range(200))
    assert counters(server, ring_name, "g")["doubled"] == 0
    check_ledger(server, ring_name, "g")


def test_workers_share_the_live_ring_without_a_group(server, ring_name, dataset):
    fill(server, ring_name, range(30))
    loader = dataset(None, batch_size=4).loader(num_workers=2, multiprocessing_context="fork")
    for _ in range(2):
        assert sorted(drain(loader)) == list(range(30))


# -- what comes through


def test_a_users_exception_in_a_worker_comes_with_its_own_traceback(server, ring_name, dataset):
    fill(server, ring_name, range(8))

    def trip_over_five(sample):
        if sample["n"] == 5:
            raise ZeroDivisionError("five")
        return sample

    loader = dataset(batch_size=2, transform=trip_over_five).loader(num_workers=1, multiprocessing_context="fork")
    with pytest.raises(ZeroDivisionError, match="in trip_over_five") as caught:
        list(loader)
    assert "five" in str(caught.value)
    assert re.search(r"\nin transform, of sample 6 of \S+, {'n': 5}", str(caught.value)), "it can be made again"


def test_a_users_exception_says_nothing_of_a_recipe_that_there_is_not(server, ring_name, dataset):
    with sb.Producer(server.url, ring=ring_name, name="maker") as out:
        out.put(number(0))
    with pytest.raises(ZeroDivisionError) as caught:
        next(iter(dataset(transform=lambda _: 1 // 0)))
    (note,) = caught.value.__notes__
    assert re.fullmatch(r"in transform, of sample 1 of maker:\w+", note)


def test_workers_end_at_once_where_one_of_them_failed(server, ring_name, dataset):
    fill(server, ring_name, range(8), producers=0)

    def fail_in(worker_id):
        if worker_id == 0:
            raise ZeroDivisionError

    loader = dataset().loader(num_workers=2, multiprocessing_context="fork", worker_init_fn=fail_in)
    began = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        list(loader)
    assert multiprocessing.active_children() == []
    assert time.monotonic() - began < 4, "torch waits five seconds for one that it cannot tell"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_our_own_errors_come_out_of_workers_as_what_they_are(server, ring_name, dataset, num_workers):
    fill(server, ring_name, range(3), producers=0)
    loader = dataset(wait_s=0.1).loader(num_workers=num_workers)
    seen = []
    with pytest.raises(sb.StarvedError, match=ring_name):
        seen.extend(values(batch) for batch in loader)
    assert seen == [[0], [1], [2]]


def test_tuples_come_through_workers(server, ring_name, dataset):
    fill(server, ring_name, range(8))
    for batch in dataset(batch_size=4, fields=("x", "n")).loader(num_workers=1, pin_memory=True):
        assert type(batch) is sb.TupleBatch
        x, n = batch
        assert (x == n[:, None]).all()
        assert batch["n"] is n
        assert len(batch.info.ids) == 4


def test_what_collate_makes_comes_through_workers_and_is_acknowledged(server, ring_name, dataset):
    fill(server, ring_name, range(8))
    loader = dataset(batch_size=4, collate=len).loader(num_workers=1, multiprocessing_context="fork")
    assert list(loader) == [4, 4]
    assert pending(server, ring_name, "g") == []


@pytest.mark.parametrize("fields", [None, ("x", "n")])
def test_a_batch_goes_to_a_device_with_its_info(server, ring_name, dataset, fields):
    fill(server, ring_name, range(3), schema="n:i64[] x:f32[*]")
    (batch,) = dataset(batch_size=3, fields=fields)
    moved = batch.to("meta", non_blocking=True)
    assert type(moved) is type(batch)
    assert moved.info is batch.info
    assert moved["n"].device.type == "meta"
    assert [x.device.type for x in moved["x"]] == ["meta"] * 3
    assert batch["n"].device.type == "cpu"


@pytest.mark.parametrize("fields", [None, ("x", "n")])
@pytest.mark.parametrize(
    "same", [copy.copy, copy.deepcopy, lambda batch: pickle.loads(pickle.dumps(batch))], ids=["copy", "deep", "pickle"]
)
def test_a_batch_may_be_copied_and_pickled(server, ring_name, dataset, fields, same):
    fill(server, ring_name, range(3))
    (batch,) = dataset(batch_size=3, fields=fields)
    other = same(batch)
    assert type(other) is type(batch)
    assert other.info == batch.info
    assert torch.equal(other["x"], batch["x"])
    assert values(other) == [0, 1, 2] if fields is None else other.names == ("x", "n")


def test_a_dataset_may_be_pickled_and_copied_while_it_reads(server, ring_name, dataset):
    fill(server, ring_name, range(40))
    first = dataset(batch_size=2, prefetch=1)
    stream = iter(first)
    seen = values(next(stream))
    for other in pickle.loads(pickle.dumps(first)), copy.copy(first), copy.deepcopy(first):
        assert other._session is None
        stream_of_other = iter(other)
        seen += values(next(stream_of_other))
        seen += values(next(stream_of_other))
        other.close()  # its last batch was not acknowledged, and comes again
    seen += drain(stream)
    assert set(seen) == set(range(40))
    assert len(seen) == 40 + 3 * 2
    check_ledger(server, ring_name, "g")


def test_a_process_that_reads_may_fork_workers(server, ring_name, dataset):
    fill(server, ring_name, range(40))
    here = dataset(batch_size=2, prefetch=1)
    stream = iter(here)
    seen = values(next(stream))
    seen += drain(here.loader(num_workers=1, multiprocessing_context="fork"))
    seen += drain(stream)
    assert sorted(seen) == list(range(40))
    check_ledger(server, ring_name, "g")


# -- acknowledging


@pytest.mark.parametrize(("ack", "done"), [("next", 4), ("delivered", 6)])
def test_only_the_training_process_acknowledges(server, ring_name, dataset, ack, done):
    fill(server, ring_name, range(60))
    loader = dataset(batch_size=2, ack=ack).loader(num_workers=2, multiprocessing_context="fork")
    stream = iter(loader)
    seen = [next(stream) for _ in range(3)]
    # Each worker has put prefetch_factor batches into its queue and made two more, and one is at work on a third.
    eventually(lambda: counters(server, ring_name, "g")["delivered"] >= 18, "queues are full")
    assert counters(server, ring_name, "g")["acknowledged"] == done
    acknowledged = {number for batch in seen[: done // 2] for number in batch.info.ids}
    assert acknowledged.isdisjoint(pending(server, ring_name, "g"))
    assert sorted(drain(seen) + drain(stream)) == list(range(60))
    assert pending(server, ring_name, "g") == []
    check_ledger(server, ring_name, "g")


def test_workers_of_a_plain_loader_acknowledge_as_late_as_they_can(server, ring_name, dataset):
    fill(server, ring_name, range(60), producers=0)
    stream = iter(DataLoader(dataset(batch_size=2, prefetch=1), batch_size=None, num_workers=1))
    in_hand = next(stream)
    eventually(lambda: counters(server, ring_name, "g")["delivered"] >= 8, "the queue is full")
    assert set(in_hand.info.ids) <= set(pending(server, ring_name, "g"))
    for _ in range(6):
        in_hand = next(stream)
        assert set(in_hand.info.ids) <= set(pending(server, ring_name, "g"))
    eventually(lambda: counters(server, ring_name, "g")["acknowledged"] > 0, "some were acknowledged")
    with raw_ring(server, ring_name) as ring:
        ring.end()
    drain(stream)
    assert pending(server, ring_name, "g") == []


@pytest.mark.parametrize("fields", [None, ("n",)])
@pytest.mark.parametrize("batch_size", [None, 1, 4])
def test_a_plain_loader_that_would_make_batches_of_batches_is_told(server, ring_name, dataset, fields, batch_size):
    fill(server, ring_name, range(8))
    asked = {} if batch_size is None else {"batch_size": batch_size}
    with pytest.raises(TypeError, match="batch_size=None"):
        next(iter(DataLoader(dataset(batch_size=2, fields=fields), **asked)))


def test_a_loop_is_left_at_once_while_its_worker_waits_for_samples(server, ring_name, dataset):
    fill(server, ring_name, range(1), producers=0)
    for _ in dataset(batch_size=1).loader(num_workers=1, multiprocessing_context="fork"):
        began = time.monotonic()
        break
    assert time.monotonic() - began < 4, "torch waits five seconds for a worker that does not answer"


def test_a_damaged_sample_met_by_a_worker_is_quarantined(server, ring_name, dataset):
    fill(server, ring_name, range(10), size=30_000)  # too large to share a part
    entry = server.client().xrange(f"sb:{{{ring_name}}}:samples", "4-0", count=1)[0][1]
    server.client().delete(f"sb:{{{ring_name}}}:part:{entry[b'parts'].decode()[:-2]}:0")
    loader = dataset(batch_size=2).loader(num_workers=1, multiprocessing_context="fork")
    assert sorted(drain(loader)) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert len(reasons(server, ring_name)) == 1
    assert pending(server, ring_name, "g") == []


@pytest.mark.parametrize("option", ["batch_size", "shuffle", "sampler", "batch_sampler", "collate_fn", "drop_last"])
def test_what_the_dataset_does_the_loader_does_not_take(dataset, option):
    with pytest.raises(TypeError, match=f"takes no {option}"):
        dataset().loader(**{option: 1})
