"""`ack="checkpoint"`: states that cannot be resumed as they are, and what is said then."""

import pytest

import synthbroker as sb
from servers import eventually
from tools import SOON_S, check_ledger, counters, drain, fill, pending, take

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.usefixtures("no_process_is_left"),
]


def test_a_state_that_is_older_than_the_newest_checkpoint_names_what_is_gone(server, ring_name, trainer, caplog):
    fill(server, ring_name, range(30))
    first = trainer()
    batches = iter(first)
    take(batches, 2)
    state = first.state_dict()
    first.acknowledge()
    take(batches, 3)
    first.state_dict()
    first.acknowledge()
    second = trainer()
    with pytest.raises(sb.StateGoneError, match=r"acknowledged samples: 6 \(5-10\)"):
        second.load_state_dict(state)
    assert take(batches, 1) == [10, 11], "nothing was done, nobody is shut out"
    second.load_state_dict(state, on_gone="go-on")
    assert "6 (5-10), which will not come again; going on" in caplog.text
    assert drain(second) == list(range(10, 30))


def test_evicted_samples_are_named(server, ring_name, trainer, caplog):
    put = {"when_full": "drop-oldest", "max_samples": 20, "producers": 2, "groups": ("g",)}
    fill(server, ring_name, range(20), **put)
    first = trainer(prefetch=0)
    batches = iter(first)
    take(batches, 3)
    state = first.state_dict()
    take(batches, 1)
    eventually(lambda: pending(server, ring_name, "g")[:8] == list(range(1, 9)), "two more were given")
    held = pending(server, ring_name, "g")
    fill(server, ring_name, range(20, 40), **put)
    second = trainer(on_gone="go-on")
    second.load_state_dict(state)
    gone = f"{len(held) - 6} (7-{held[-1]})"
    assert f"samples were evicted before they were trained on: {gone}" in caplog.text
    seen = drain(second)
    found = counters(server, ring_name, "g")
    assert set(seen) == set(range(max(20, 40 - len(seen)), 40))
    assert 6 + (len(held) - 6) + len(seen) + found["lost"] == 40, "nothing is missing that is not named or counted"
    check_ledger(server, ring_name, "g")


def test_a_state_of_a_ring_that_was_made_anew_is_gone(own_server, ring_name):
    server = own_server()

    def make():
        return sb.RingDataset(server.url, ring=ring_name, group="g", ack="checkpoint", batch_size=2, wait_s=SOON_S)

    fill(server, ring_name, range(10))
    first = make()
    take(iter(first), 2)
    state = first.state_dict()
    first.close()
    server.restart()
    second = make()
    with pytest.raises(sb.StateGoneError, match=f"made after 4 samples.*there is no ring '{ring_name}'"):
        second.load_state_dict(state)
    fill(server, ring_name, range(10, 16))
    with pytest.raises(sb.StateGoneError, match="its epoch was"):
        second.load_state_dict(state)
    second.load_state_dict(state, on_gone="go-on")
    assert drain(second) == list(range(10, 16))
    third = second.state_dict()
    assert third["epoch"] != state["epoch"]
    assert third["samples"] == 10
    second.acknowledge()
    assert pending(server, ring_name, "g") == []
    second.close()


def test_what_was_trained_on_in_a_ring_that_was_lost_is_not_staged_in_the_new_one(own_server, ring_name):
    server = own_server()
    fill(server, ring_name, range(8), producers=0)
    data = sb.RingDataset(server.url, ring=ring_name, group="g", ack="checkpoint", batch_size=2, wait_s=SOON_S)
    batches = iter(data)
    take(batches, 4)
    server.restart()
    fill(server, ring_name, range(8, 14), producers=2)
    assert take(batches, 1) == [8, 9]
    assert data.state_dict()["samples"] == 2
    data.acknowledge()
    assert 1 not in pending(server, ring_name, "g")
    check_ledger(server, ring_name, "g")
    data.close()


WRONG_STATES = [
    ({}, "no state of a reader"),
    ("x", "no state of a reader"),
    ({"version": 2}, "reads 1"),
    ({"ring": "other"}, "of ring 'other'"),
    ({"group": "other"}, "of group 'other'"),
    ({"token": 7}, "no state of a reader"),
]


@pytest.mark.parametrize(("wrong", "why"), WRONG_STATES, ids=[why for _, why in WRONG_STATES])
def test_what_is_no_state_is_refused(trainer, ring_name, wrong, why):
    good = {"version": 1, "ring": ring_name, "group": "g", "run": "r", "epoch": "", "token": "", "samples": 0}
    state = good | wrong if wrong and isinstance(wrong, dict) else wrong
    with pytest.raises(ValueError, match=why):
        trainer().load_state_dict(state)
