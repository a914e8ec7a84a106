"""`ack="checkpoint"` in one process: what a state holds, what comes again, and what is said where it cannot."""

import io
import json
import time

import pytest
import torch
from torch.utils.data import DataLoader

import synthbroker as sb
from servers import eventually
from tools import (
    IN_PARTS,
    SOON_S,
    background,
    check_ledger,
    commit_raw,
    counters,
    drain,
    encoded,
    fill,
    key,
    members,
    number,
    pending,
    raw_ring,
    take,
    values,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.usefixtures("no_process_is_left"),
]


# -- what a state holds


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_the_loop_has_had_is_in_the_state_and_what_is_prefetched_is_not(server, ring_name, trainer, num_workers):
    fill(server, ring_name, range(60))
    loader = trainer(num_workers=num_workers)
    batches = iter(loader)
    seen = take(batches, 3)
    eventually(lambda: len(pending(server, ring_name, "g")) >= 10, "more is on its way")
    before = pending(server, ring_name, "g")
    state = loader.state_dict()
    assert set(before) <= set(pending(server, ring_name, "g")), "staged is not acknowledged"
    loader.acknowledge()
    assert counters(server, ring_name, "g")["acknowledged"] == 6 == state["samples"]
    assert {n + 1 for n in seen}.isdisjoint(pending(server, ring_name, "g"))
    assert sorted(seen + drain(batches)) == list(range(60))
    loader.acknowledge()
    assert counters(server, ring_name, "g")["acknowledged"] == 6, "nothing was staged since"
    loader.state_dict()
    loader.acknowledge()
    assert pending(server, ring_name, "g") == []
    check_ledger(server, ring_name, "g")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_that_is_made_anew_is_given_what_is_not_in_its_state(server, ring_name, trainer, num_workers):
    fill(server, ring_name, range(60))
    first = trainer(num_workers=num_workers)
    batches = iter(first)
    kept = take(batches, 4)
    state = first.state_dict()  # and it dies before it acknowledges
    take(batches, 3)
    first.state_dict()  # whose file was never written
    second = trainer(num_workers=2 - num_workers)
    began = time.monotonic()
    second.load_state_dict(state)
    rest = iter(second)
    again = take(rest, 1)
    assert time.monotonic() - began < SOON_S / 2, "nobody waits until the former one counts as dead"
    again += drain(rest)
    assert sorted(kept + again) == list(range(60))
    with pytest.raises(sb.ShutOutError):
        drain(batches)
    with pytest.raises(sb.ShutOutError, match="took this one's place"):
        first.state_dict()
    second.state_dict()
    second.acknowledge()
    assert pending(server, ring_name, "g") == []
    assert counters(server, ring_name, "g")["doubled"] == 0
    check_ledger(server, ring_name, "g")


def test_batches_that_were_fetched_ahead_can_be_left_out(server, ring_name, trainer):
    fill(server, ring_name, range(20))
    loader = trainer(ahead=1)
    batches = iter(loader)
    take(batches, 4)
    assert loader.state_dict()["samples"] == 6
    loader.acknowledge()
    assert pending(server, ring_name, "g")[0] == 7
    take(batches, 1)
    assert loader.state_dict()["samples"] == 8
    with pytest.raises(ValueError, match="ahead must be"):
        trainer(ahead=17).state_dict()


def test_the_numpy_reader_does_the_same(server, ring_name, reader):
    fill(server, ring_name, range(20))
    first = reader(ack="checkpoint", batch_size=3)
    batches = iter(first)
    kept = take(batches, 2)
    state = first.state_dict()
    take(batches, 2)
    second = reader(ack="checkpoint", batch_size=5)
    second.load_state_dict(state)
    assert sorted(kept + drain(second)) == list(range(20))
    second.state_dict()
    second.acknowledge()
    assert pending(server, ring_name, "g") == []
    with pytest.raises(sb.RingEndedError):
        drain(second)


def test_a_state_is_small_and_of_a_few_texts_and_numbers(server, ring_name, trainer):
    fill(server, ring_name, range(3000), producers=0)
    loader = trainer(batch_size=100)
    take(iter(loader), 30)
    state = loader.state_dict()
    assert json.loads(json.dumps(state)) == state
    assert len(json.dumps(state)) < 500
    file = io.BytesIO()
    torch.save({"data": state, "weights": torch.zeros(3)}, file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["data"] == state


def test_a_state_before_the_first_batch_and_one_without_news(server, ring_name, trainer):
    loader = trainer()
    nothing = loader.state_dict()  # the ring is not there yet
    fill(server, ring_name, range(10))
    assert (nothing["token"], nothing["samples"]) == ("", 0)
    batches = iter(loader)
    take(batches, 1)
    state = loader.state_dict()
    assert loader.state_dict() == state
    loader.acknowledge()
    assert loader.state_dict() == state
    again = trainer()
    again.load_state_dict(state)
    assert again.state_dict() == state
    assert drain(again) == list(range(2, 10))


def test_a_checkpoint_may_be_acknowledged_while_the_next_is_written(server, ring_name, trainer):
    fill(server, ring_name, range(20))
    loader = trainer()
    batches = iter(loader)
    states = []
    for _ in range(3):
        take(batches, 1)
        states.append(loader.state_dict())
    background(lambda: loader.acknowledge(states[1])).result(SOON_S)
    assert counters(server, ring_name, "g")["acknowledged"] == 4
    loader.acknowledge(states[0])
    assert counters(server, ring_name, "g")["acknowledged"] == 4
    loader.acknowledge()
    assert counters(server, ring_name, "g")["acknowledged"] == 6


# -- loops that end, are left, fail


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_was_trained_on_does_not_come_again_before_its_checkpoint(server, ring_name, trainer, num_workers):
    fill(server, ring_name, range(30), producers=0)
    loader = trainer(num_workers=num_workers, wait_s=1)
    seen = []
    with pytest.raises(sb.StarvedError):
        seen.extend(n for batch in loader for n in values(batch))
    assert sorted(seen) == list(range(30))
    with raw_ring(server, ring_name) as ring:
        commit_raw(ring, [encoded(30), encoded(31)])
        ring.end()
    assert sorted(drain(loader)) == [30, 31]
    assert len(pending(server, ring_name, "g")) == 32
    assert [member.split("/")[1].split(":")[0] for member in members(server, ring_name, "g")] == ["kept"]
    with pytest.raises(sb.RingEndedError):
        list(loader)
    loader.state_dict()
    loader.acknowledge()
    assert pending(server, ring_name, "g") == []
    assert members(server, ring_name, "g") == [], "nothing is kept any more"
    check_ledger(server, ring_name, "g")


@pytest.mark.parametrize("options", [{}, {"num_workers": 2}], ids=["here", "workers"])
def test_a_loop_that_was_left_keeps_what_it_trained_on(server, ring_name, trainer, options):
    fill(server, ring_name, range(60))
    loader = trainer(**options)
    seen = []
    for _ in range(3):
        for _, batch in zip(range(4), loader, strict=False):
            seen += values(batch)
    seen += drain(loader)
    loader.state_dict()
    loader.acknowledge()
    # zip takes a batch more than it gives; the loop has had that one.
    assert len(set(seen)) == len(seen)
    assert counters(server, ring_name, "g")["acknowledged"] == 60
    assert counters(server, ring_name, "g")["doubled"] == 0
    assert pending(server, ring_name, "g") == []


def test_virtual_epochs_are_checkpointed_one_by_one(server, ring_name, trainer):
    fill(server, ring_name, range(24))
    first = trainer(epoch_size=6)
    kept = drain(first) + drain(first)
    state = first.state_dict()
    first.acknowledge()
    drain(first)
    second = trainer(epoch_size=6)
    second.load_state_dict(state)
    assert sorted(kept + drain(second) + drain(second)) == list(range(24))


def test_closing_gives_everything_to_others(server, ring_name, dataset):
    fill(server, ring_name, range(10), producers=0)
    data = dataset(ack="checkpoint", batch_size=2)
    take(iter(data), 3)
    data.close()
    assert members(server, ring_name, "g") == []
    assert take(iter(dataset(batch_size=5)), 2) == list(range(10))


# -- a full ring


def test_a_full_ring_that_only_a_checkpoint_can_empty_is_told_soon(server, ring_name, trainer):
    out = sb.Producer(server.url, ring=ring_name, capacity="200kB", codec="raw")
    for i in range(40):
        out.put(number(i, IN_PARTS))
    loader = trainer(batch_size=1)
    began = time.monotonic()
    with pytest.raises(
        sb.UnacknowledgedError, match=r"its \d+ samples \(200 kB\).*make checkpoints more often.*before"
    ):
        drain(loader)
    assert time.monotonic() - began < SOON_S / 2
    loader.state_dict()
    loader.acknowledge()
    assert take(iter(loader), 2)
    out.leave(flush_s=0)


def test_a_full_ring_waits_for_a_checkpoint_that_is_being_written(server, ring_name, trainer):
    done = background(lambda: fill(server, ring_name, range(60), size=IN_PARTS, capacity="200kB", groups=("g",)))
    loader = trainer(batch_size=1)
    batches = iter(loader)
    seen = take(batches, 8)
    loader.state_dict()
    rest = background(lambda: take(batches, 8))
    eventually(lambda: rest.done() or members(server, ring_name, "g"), "it reads")
    loader.acknowledge()
    seen += rest.result(SOON_S)
    while len(seen) < 60:
        loader.state_dict()
        loader.acknowledge()
        seen += take(batches, min(4, 60 - len(seen)))
    assert sorted(seen) == list(range(60))
    assert done.result(SOON_S).samples == 60


def test_a_ring_that_workers_filled_is_told(server, ring_name, trainer):
    out = sb.Producer(server.url, ring=ring_name, capacity="200kB", codec="raw")
    for i in range(40):
        out.put(number(i, IN_PARTS))
    with pytest.raises(sb.UnacknowledgedError, match="make checkpoints more often"):
        drain(trainer(batch_size=1, num_workers=1, wait_s=1.5))
    out.leave(flush_s=0)


# -- elsewhere


def test_a_plain_loader_with_workers_says_what_to_use(server, ring_name, dataset, torch_is_brief):
    fill(server, ring_name, range(4))
    loader = DataLoader(dataset(ack="checkpoint"), batch_size=None, num_workers=1)
    with pytest.raises(RuntimeError, match=r"dataset\.loader\(num_workers=N\)"):
        list(loader)


@pytest.mark.parametrize("ack", ["next", "delivered"])
def test_without_checkpoints_a_state_names_the_run_only(server, ring_name, dataset, ack):
    fill(server, ring_name, range(10))
    first = dataset(ack=ack, batch_size=2, name="trainer")
    batches = iter(first)
    take(batches, 2)
    state = first.state_dict()
    assert (state["run"], state["token"], state["samples"]) == ("trainer", "", 0)
    with pytest.raises(ValueError, match="ack='checkpoint'"):
        first.acknowledge()
    first_again = 2 if ack == "next" else 4
    eventually(lambda: counters(server, ring_name, "g")["acknowledged"] == first_again, "what is done with is told")
    second = dataset(ack=ack, batch_size=2)
    second.load_state_dict(state)
    assert drain(second) == list(range(first_again, 10))


def test_without_a_group_there_is_nothing_to_stage(server, ring_name, dataset):
    fill(server, ring_name, range(4))
    data = dataset(None, ack="checkpoint")
    assert drain(data) == list(range(4))
    data.load_state_dict(data.state_dict())
    data.acknowledge()
    assert drain(data) == list(range(4))


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")
def test_torchdatas_loader_keeps_the_state(server, ring_name, dataset):
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    fill(server, ring_name, range(20))
    data = dataset(ack="checkpoint", batch_size=2)
    loader = stateful(data, batch_size=None)
    batches = iter(loader)
    kept = take(batches, 3)
    state = loader.state_dict()
    take(batches, 2)
    again = stateful(dataset(ack="checkpoint", batch_size=2), batch_size=None)
    again.load_state_dict(state)
    assert sorted(kept + drain(again)) == list(range(20))


# -- names


@pytest.mark.parametrize("ack", ["next", "checkpoint"])
def test_a_restarted_run_takes_the_samples_of_its_former_self_over_at_once(server, ring_name, reader, ack):
    fill(server, ring_name, range(20), producers=0)
    old = iter(reader(prefetch=0, name="trainer", ack=ack))
    assert take(old, 1) == [0]
    new = iter(reader(prefetch=0, name="trainer", ack=ack))
    assert take(new, 1) == [0]
    with pytest.raises(sb.ShutOutError, match="'trainer'"):
        take(old, 1)
    assert take(new, 1) == [1]


@pytest.mark.parametrize("acknowledged", [False, True])
def test_who_was_shut_out_is_given_no_state_also_where_nothing_was_trained_on_since(
    server, ring_name, trainer, acknowledged
):
    fill(server, ring_name, range(20), producers=0)
    old, new = trainer(), trainer()
    take(iter(old), 2)
    state = old.state_dict()
    if acknowledged:
        old.acknowledge()
    assert old.state_dict() == state, "it is the run, and there is nothing new"
    new.load_state_dict(state)
    with pytest.raises(sb.ShutOutError, match="took this one's place"):
        old.state_dict()


def test_two_datasets_without_names_share(server, ring_name, reader):
    fill(server, ring_name, range(20), producers=0)
    one, other = iter(reader(prefetch=0)), iter(reader(prefetch=0))
    assert [take(one, 1), take(other, 1), take(one, 1), take(other, 1)] == [[0], [1], [2], [3]]


def test_a_lost_answer_stages_and_finishes_once(own_server, ring_name):
    from lossy import lossy

    server = own_server()
    fill(server, ring_name, range(20))
    with lossy(server) as line:
        data = sb.Consumer(line.url, ring=ring_name, group="g", ack="checkpoint", batch_size=2, wait_s=SOON_S)
        batches = iter(data)
        take(batches, 3)
        line.lose_answer_to("stage", keep_bytes=0)
        state = data.state_dict()
        line.lose_answer_to("finish", keep_bytes=0)
        data.acknowledge()
        line.lose_answer_to("resume", keep_bytes=0)
        other = sb.Consumer(line.url, ring=ring_name, group="g", ack="checkpoint", batch_size=2, wait_s=SOON_S)
        other.load_state_dict(state)
        assert line.lost == 3
        assert drain(other) == list(range(6, 20))
        other.close()
    assert counters(server, ring_name, "g")["doubled"] == 0
    assert server.client().hlen(key(ring_name, "runs:g")) == 2
    check_ledger(server, ring_name, "g")
