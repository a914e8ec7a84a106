"""The torch side, one iteration after the other: epochs, loops that are left, reading on after the end."""

import itertools
import multiprocessing
import time

import pytest
from torch.utils.data import get_worker_info

import synthbroker as sb
import synthbroker.dataset as datasets
from servers import eventually
from tools import (
    LOADER_MARKS,
    SOON_S,
    background,
    check_ledger,
    commit_raw,
    counters,
    drain,
    encoded,
    fill,
    pending,
    raw_ring,
    values,
)

pytestmark = LOADER_MARKS


@pytest.mark.parametrize(
    "options",
    [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}],
    ids=["here", "workers", "persistent"],
)
def test_an_epoch_has_a_length_and_the_next_one_goes_on(server, ring_name, dataset, options):
    fill(server, ring_name, range(60))
    data = dataset(batch_size=4, epoch_size=10)
    loader = data.loader(**options)
    assert len(data) == len(loader) == 3
    epochs = [[values(batch) for batch in loader] for _ in range(3)]
    assert [sorted(map(len, epoch)) for epoch in epochs] == [[2, 4, 4]] * 3
    seen = [n for epoch in epochs for batch in epoch for n in batch]
    assert len(set(seen)) == 30

    def read_on():
        for _ in range(10):
            seen.extend(drain(loader))

    with pytest.raises(sb.RingEndedError):
        read_on()
    assert sorted(seen) == list(range(60))
    check_ledger(server, ring_name, "g")


def test_a_worker_without_a_batch_in_an_epoch_keeps_nothing_from_the_others(server, ring_name, dataset):
    fill(server, ring_name, range(10))
    loader = dataset(batch_size=2, epoch_size=2).loader(num_workers=2, persistent_workers=True)
    epochs = [drain(loader) for _ in range(5)]
    assert sorted(itertools.chain(*epochs)) == list(range(10))
    assert [len(epoch) for epoch in epochs] == [2] * 5


def test_a_worker_that_came_to_the_end_does_not_cost_what_another_one_still_has(
    server, ring_name, dataset, monkeypatch
):
    """Its looking once more whether all is read may come after the other one's last batch was acknowledged."""
    fill(server, ring_name, range(4))
    look = datasets.raise_if_drained

    def look_late(*which):
        if get_worker_info() is not None:
            eventually(lambda: pending(server, ring_name, "g") == [], "the other one's batch was acknowledged")
        look(*which)

    monkeypatch.setattr(datasets, "raise_if_drained", look_late)
    others_have_the_rest = multiprocessing.get_context("fork").Event()

    def hold_the_first_worker(sample):
        assert get_worker_info().id or others_have_the_rest.wait(SOON_S)
        return sample

    data = dataset(epoch_size=2, prefetch=4, transform=hold_the_first_worker)
    loader = data.loader(num_workers=2, persistent_workers=True, multiprocessing_context="fork")
    everything_is_taken = lambda: counters(server, ring_name, "g").get("delivered") == 4  # noqa: E731
    waiting = background(lambda: (eventually(everything_is_taken, "taken"), others_have_the_rest.set()))
    seen = []

    def read_on():
        for _ in range(10):
            seen.extend(drain(loader))

    with pytest.raises(sb.RingEndedError):
        read_on()
    waiting.result(SOON_S)
    assert sorted(seen) == list(range(4))


def test_without_an_epoch_there_is_no_length(dataset):
    with pytest.raises(TypeError, match="epoch_size=N"):
        len(dataset())
    with pytest.raises(TypeError, match="epoch_size=N"):
        len(dataset().loader())


@pytest.mark.parametrize(
    "options",
    [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}],
    ids=["here", "workers", "persistent"],
)
def test_a_loop_that_was_left_goes_on_without_losing_or_doubling(server, ring_name, dataset, options):
    fill(server, ring_name, range(60))
    loader = dataset(batch_size=2).loader(**options)
    seen = []
    for _ in range(3):
        for batch in itertools.islice(loader, 4):
            seen += values(batch)
    assert len(seen) == 24
    seen += drain(loader)
    assert sorted(seen) == list(range(60))
    assert pending(server, ring_name, "g") == []
    assert counters(server, ring_name, "g")["doubled"] == 0
    check_ledger(server, ring_name, "g")


@pytest.mark.parametrize("persistent", [False, True])
def test_a_loop_is_left_at_once_though_its_workers_wait_for_samples(server, ring_name, dataset, persistent):
    fill(server, ring_name, range(5), producers=0)
    loader = dataset().loader(num_workers=2, persistent_workers=persistent)
    assert sorted(drain(itertools.islice(loader, 5))) == list(range(5))
    began = time.monotonic()
    with raw_ring(server, ring_name) as ring:
        commit_raw(ring, [encoded(5)])
        ring.end()
    assert drain(loader) == [5]
    assert time.monotonic() - began < 4
    assert pending(server, ring_name, "g") == []
    check_ledger(server, ring_name, "g")


def test_a_new_loader_of_the_same_dataset_goes_on_too(server, ring_name, dataset):
    fill(server, ring_name, range(40))
    data = dataset(batch_size=2)
    seen = []
    for _ in range(3):
        for batch in itertools.islice(data.loader(num_workers=2), 3):
            seen += values(batch)
    seen += drain(data.loader(num_workers=2))
    assert sorted(seen) == list(range(40))
    check_ledger(server, ring_name, "g")
    with pytest.raises(sb.RingEndedError):
        list(data.loader(num_workers=1))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_reading_on_after_the_end_is_told(server, ring_name, dataset, num_workers):
    fill(server, ring_name, range(6))
    loader = dataset(batch_size=2).loader(num_workers=num_workers)
    assert sorted(drain(loader)) == list(range(6))
    with pytest.raises(sb.RingEndedError, match=ring_name):
        list(loader)
