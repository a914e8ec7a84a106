"""The life of a producer: how it begins and ends, and what it agrees on with others."""

import json
import os
from types import SimpleNamespace

import pytest

import synthbroker as sb
from servers import eventually
from synthbroker import producer as producers
from synthbroker import settings
from tools import (
    IN_PARTS,
    SOON_S,
    check_ledger,
    drain,
    fill,
    key,
    meta,
    number,
    raw_ring,
)


def about(server, ring_name, name):
    return json.loads(server.client().hget(key(ring_name, "producers:about"), name))


# -- beginning and end


def test_nothing_is_opened_before_the_first_put(ring_name):
    out = sb.Producer("unix:///nowhere.sock", ring=ring_name)
    assert out.stats == sb.ProducerStats(0, 0, 0, 0.0, 0, 0)
    assert out.flush()
    out.close()


def test_a_producer_may_be_used_without_with(server, ring_name):
    out = sb.Producer(server.url, ring=ring_name, capacity="1MB", producers=1)
    out.put(number(0))
    out.close()
    assert meta(server, ring_name)["ended"] != "0"
    assert drain(sb.Consumer(server.url, ring=ring_name, group="g")) == [0]


def test_closing_twice_is_fine_and_counts_once(server, ring_name):
    with sb.Producer(server.url, ring=ring_name, capacity="1MB", producers=2) as out:
        out.put(number(0))
        out.close()
        out.close()
    assert meta(server, ring_name)["closed"] == "1"
    assert meta(server, ring_name)["ended"] == "0"
    with pytest.raises(ValueError, match="closed"):
        out.put(number(1))
    with pytest.raises(ValueError, match="closed"):
        out.put_batch([number(1)])
    assert out.flush()
    assert out.stats.samples == 1


def test_a_ring_ends_when_as_many_producers_have_closed_as_it_waits_for(server, ring_name):
    for i in range(3):
        assert i == 0 or meta(server, ring_name)["ended"] == "0"
        fill(server, ring_name, [i], producers=3)
    assert meta(server, ring_name)["ended"] != "0"
    assert sorted(drain(sb.Consumer(server.url, ring=ring_name, group="g"))) == [0, 1, 2]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_in_the_block_sends_what_was_put_but_is_no_end(server, ring_name, error):
    def generate():
        with sb.Producer(server.url, ring=ring_name, capacity="50MB", producers=1, name="p") as out:
            for i in range(20):
                out.put(number(i, IN_PARTS * 10))
            raise error("mine")

    with pytest.raises(error, match="mine"):
        generate()
    assert about(server, ring_name, "p")["state"] == "left"
    assert (meta(server, ring_name)["next"], meta(server, ring_name)["ended"]) == ("21", "0")
    fill(server, ring_name, [], name="p")
    assert about(server, ring_name, "p")["state"] == "closed"
    assert meta(server, ring_name)["ended"] != "0"


def test_leaving_sends_what_it_can_and_says_what_it_could_not(server, ring_name):
    out = sb.Producer(server.url, ring=ring_name, capacity="100kB", producers=1, codec="raw", name="p")
    for i in range(20):
        out.put(number(i, IN_PARTS))
    eventually(lambda: out.stats.blocked_s > 0, "the ring is full")
    assert 0 < out.stats.samples < 20
    assert out.leave(flush_s=0.1) == 20 - out.stats.samples
    assert about(server, ring_name, "p")["state"] == "left"
    assert meta(server, ring_name)["ended"] == "0"
    assert out.leave() == 0


def test_an_ended_ring_takes_no_more_unless_reopened(server, ring_name):
    fill(server, ring_name, range(3))
    with pytest.raises(sb.RingEndedError, match=ring_name):
        fill(server, ring_name, [3])
    with pytest.raises(sb.RingEndedError, match="reopen=True"):
        sb.Producer(server.url, ring=ring_name).put(number(3))
    fill(server, ring_name, [3, 4], reopen=True)
    consumer = sb.Consumer(server.url, ring=ring_name, group="g", batch_size=10)
    (batch,) = consumer
    assert batch["n"].tolist() == [0, 1, 2, 3, 4]
    assert batch.info.ids == (1, 2, 3, 4, 5)
    check_ledger(server, ring_name, "g")


# -- what goes wrong in the background


CALLS = {
    "put": lambda out: out.put(number(0, IN_PARTS)),
    "put_batch": lambda out: out.put_batch([number(0, IN_PARTS)]),
    "flush": lambda out: out.flush(),
    "close": lambda out: out.close(),
}


@pytest.mark.parametrize("call", CALLS)
def test_an_error_in_the_background_comes_with_the_next_call(server, ring_name, call):
    out = sb.Producer(server.url, ring=ring_name, capacity="40kB", wait_s=0.1, codec="raw", producers=1)
    for i in range(5):
        out.put(number(i, IN_PARTS))
    eventually(lambda: not out._sender.alive, "the sender has given up")
    with pytest.raises(sb.RingFullError, match="no group reads it yet") as caught:
        CALLS[call](out)
    assert ring_name in str(caught.value)
    assert isinstance(caught.value.__cause__, sb.RingFullError)
    if call != "close":
        with pytest.raises(sb.RingFullError):  # it does not go away by itself
            out.close()
    out.close()
    assert meta(server, ring_name)["ended"] == "0", "who could not send everything is not done"


def test_a_full_ring_names_the_group_that_holds_it_up(server, ring_name):
    with pytest.raises(sb.RingFullError, match=r"no room in ring .* for .* group 'slow' holds it up") as caught:
        fill(server, ring_name, range(9), size=IN_PARTS, capacity="50kB", groups=("slow",), wait_s=0.1)
    assert "50 kB" in str(caught.value)


def test_a_put_on_a_ring_that_was_ended_meanwhile_is_told(server, ring_name):
    out = sb.Producer(server.url, ring=ring_name, capacity="1MB")
    out.put(number(0))
    out.flush()
    with raw_ring(server, ring_name) as ring:
        ring.end()
    out.put(number(1))
    with pytest.raises(sb.RingEndedError, match=f"{ring_name}.*has ended"):
        out.flush()
    with pytest.raises(sb.RingEndedError):
        out.put(number(2))
    with pytest.raises(sb.RingEndedError):
        out.close()
    assert meta(server, ring_name)["next"] == "2"


def test_a_newer_producer_of_the_same_name_shuts_the_older_out(server, ring_name):
    old = sb.Producer(server.url, ring=ring_name, capacity="1MB", name="gen.7")
    old.put(number(0))
    old.flush()
    with sb.Producer(server.url, ring=ring_name, name="gen.7") as new:
        new.put(number(1))
        new.flush()
        old.put(number(2))
        with pytest.raises(sb.ShutOutError, match=r"gen\.7"):
            old.flush()
        with pytest.raises(sb.ShutOutError):
            old.close()
        new.put(number(3))
    assert about(server, ring_name, "gen.7")["state"] == "closed"
    (batch,) = sb.Consumer(server.url, ring=ring_name, group=None, batch_size=9)
    assert batch["n"].tolist() == [0, 1, 3]


def test_a_sample_too_big_for_the_ring_is_told_with_both_figures(server, ring_name):
    with pytest.raises(sb.RingFullError, match=r"40\d kB.*can never fit.*200 kB"):
        fill(server, ring_name, [0], size=100_000, capacity="200kB")


# -- what the producers of a ring agree on

DIFFERENT = [
    ("capacity", "50MB", "60MB", "50000000", "60000000"),
    ("when_full", "block", "drop-oldest", "block", "drop-oldest"),
    ("max_samples", 10, 20, "10", "20"),
    ("producers", 2, 3, "2", "3"),
    ("finite", True, False, "*:finite", "none"),
    ("checks", {"x": "range(0,2)"}, "x:varied", "x:range(0,2)", "x:varied"),
    ("info", {"classes": 4}, {"classes": 5}, '{"classes": 4}', '{"classes": 5}'),
    ("schema", "n:i64[] x:f32[4]", "n:i64[] x:f32[*]", "x:f32[4]", "x:f32[*]"),
]


@pytest.mark.parametrize(("setting", "theirs", "ours", "their_text", "our_text"), DIFFERENT)
def test_a_producer_that_differs_is_told_both_values(server, ring_name, setting, theirs, ours, their_text, our_text):
    fill(server, ring_name, [0], **{"producers": 2, setting: theirs})
    with pytest.raises(sb.RingMismatchError) as caught:
        sb.Producer(server.url, ring=ring_name, **{setting: ours}).put(number(1))
    assert setting in str(caught.value)
    assert their_text in str(caught.value)
    assert our_text in str(caught.value)
    with sb.Producer(server.url, ring=ring_name) as other:  # who says nothing takes what is there
        other.put(number(1))
    assert meta(server, ring_name)["next"] == "3"


def test_the_same_said_otherwise_is_the_same(server, ring_name):
    fill(server, ring_name, [0], producers=2, capacity="1MB", info={"a": 1, "b": [2]})
    fill(server, ring_name, [1], producers=2, capacity=1_000_000, info={"b": [2], "a": 1})
    assert meta(server, ring_name)["ended"] != "0"


def test_groups_may_be_declared_before_they_read(server, ring_name):
    fill(server, ring_name, range(2), groups=("train",), producers=0)
    fill(server, ring_name, range(2, 4), groups=("val", "train"), capacity=None, producers=None)
    with raw_ring(server, ring_name) as ring:
        ring.end()
    for group in "train", "val":
        assert drain(sb.Consumer(server.url, ring=ring_name, group=group)) == [0, 1, 2, 3]


def test_a_ring_larger_than_the_server_is_refused_with_both_figures(own_server, ring_name):
    server = own_server(maxmemory="50mb")
    with pytest.raises(sb.RingTooLargeError, match=r"asks for 1 GB, but .* has 52\.4 MB, .*--maxmemory"):
        sb.Producer(server.url, ring=ring_name, capacity="1GB").put(number(0))
    assert server.client().dbsize() == 0


def test_a_ring_gets_half_of_the_servers_memory_unless_it_asks(own_server, ring_name):
    server = own_server(maxmemory="64mb")
    fill(server, ring_name, [0], capacity=None)
    assert meta(server, ring_name)["capacity"] == str(32 * 2**20)


def test_a_ring_on_a_server_without_a_limit_gets_two_gigabytes(server, ring_name):
    fill(server, ring_name, [0], capacity=None)
    machine = server.client().info("memory")["total_system_memory"]
    assert meta(server, ring_name)["capacity"] == str(min(2 * 10**9, int(machine * 0.9)))


# -- records


def test_a_producer_tells_who_it_is_and_how_fast(server, ring_name, monkeypatch):
    monkeypatch.setattr("synthbroker.ring.BEAT_S", 0.05)
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    with sb.Producer(server.url, ring=ring_name, capacity="50MB", codec="raw") as out:
        assert out.name.startswith(f"4711r2-{settings.job().host}-{os.getpid()}-")
        out.put(number(0))
        eventually(lambda: about(server, ring_name, out.name)["samples"] == 1, "a heartbeat")
        record = about(server, ring_name, out.name)
        assert (record["host"], record["pid"], record["state"]) == (settings.job().host, os.getpid(), "alive")
        assert (record["job_id"], record["array_task_id"], record["restart"]) == ("4711", 3, 2)
        assert record["quarantined"] == 0

        def rate(name):
            out.put(number(0))
            return about(server, ring_name, out.name)[name]

        eventually(lambda: rate("samples_per_s") > 0 and rate("bytes_per_s") > 0, "rates")
        assert 0 <= rate("blocked_share") <= 1
    seen = server.client().zscore(key(ring_name, "producers"), out.name)
    assert abs(seen - server.client().time()[0]) < SOON_S


def test_two_producers_of_one_process_have_two_names(server, ring_name):
    with sb.Producer(server.url, ring=ring_name, capacity="1MB") as one, sb.Producer(server.url, ring=ring_name) as two:
        assert one.name != two.name
        one.put(number(0))
        two.put(number(1))
    (batch,) = sb.Consumer(server.url, ring=ring_name, group=None, batch_size=2)
    assert {producer.rpartition(":")[0] for producer in batch.info.producers} == {one.name, two.name}


def test_a_recipe_may_be_changed_after_put(server, ring_name):
    recipe = {"deep": {"seed": 1}}
    with sb.Producer(server.url, ring=ring_name, capacity="50MB", producers=1) as out:
        for seed in range(50):
            recipe["deep"]["seed"] = seed
            out.put(number(seed), recipe=recipe)
        recipe.clear()
    (batch,) = sb.Consumer(server.url, ring=ring_name, group="g", batch_size=50)
    assert [recipe["deep"]["seed"] for recipe in batch.info.recipes] == list(range(50))


def test_the_time_between_puts_is_told_as_generating_and_the_time_within_is_not(server, ring_name, monkeypatch):
    clock = [0.0]
    out = sb.Producer(server.url, ring=ring_name, capacity="1MB", producers=1)
    out.put(number(0))
    monkeypatch.setattr(producers, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    reserve = out._sender.reserve

    def slow(nbytes):
        clock[0] += 100.0
        reserve(nbytes)

    monkeypatch.setattr(out._sender, "reserve", slow)
    out._put_until = 0.0
    for i in range(1, 4):
        clock[0] += 1.5
        out.put(number(i))
    assert out._about()["generation_s"] == 1.5
    monkeypatch.undo()
    out.close()
    assert sb.status(ring_name, url=server.url).generation_s == 1.5
