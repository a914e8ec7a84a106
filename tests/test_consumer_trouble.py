"""What a reader does about dead readers, lost samples, lost answers, and a server that goes or comes back empty."""

import itertools
import threading
import time
from collections.abc import Callable

import pytest

import synthbroker as sb
from lossy import lossy
from servers import RealServer, eventually
from synthbroker.inflow import Inflow
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
    number,
    pending,
    processes,
    raw_ring,
    read_all,
    read_and_hold,
    reasons,
    values,
    waits,
)

OwnServer = Callable[..., RealServer]
ITS_OWN = 30_000  # numbers in a sample that shares no part with others


# -- readers in several processes


def test_processes_of_one_group_share_the_samples(server, ring_name):
    options = {"group": "g", "batch_size": 7, "wait_s": SOON_S}
    with processes(read_all, *[(server.url, ring_name)] * 2, **options) as (_, told):
        fill(server, ring_name, range(500), size=1000)
        shares = [told.get(timeout=SOON_S) for _ in range(2)]
    assert sorted(itertools.chain(*shares)) == list(range(500))
    assert counters(server, ring_name, "g")["doubled"] == 0
    check_ledger(server, ring_name, "g")


def test_the_samples_of_a_killed_reader_are_given_to_another(server, ring_name, monkeypatch):
    monkeypatch.setattr("synthbroker.ring.BEAT_S", 0.05)
    fill(server, ring_name, range(20))
    with processes(read_and_hold, (server.url, ring_name), group="g", batch_size=3, prefetch=1) as ((victim,), told):
        assert told.get(timeout=SOON_S) == [0, 1, 2]
        eventually(lambda: len(pending(server, ring_name, "g")) >= 6, "it holds a batch and has another ready")
        victim.kill()
        victim.join()
    held = pending(server, ring_name, "g")
    assert held == list(range(1, len(held) + 1))
    batches = list(sb.Consumer(server.url, ring=ring_name, group="g", batch_size=4, claim_after_s=0.3, wait_s=SOON_S))
    assert sorted(drain(batches)) == list(range(20))
    uses = {n: use for batch in batches for n, use in zip(values(batch), batch.info.uses, strict=True)}
    assert [n for n, use in sorted(uses.items()) if use == 0] == list(range(len(held)))
    assert counters(server, ring_name, "g")["redelivered"] == len(held)
    assert members(server, ring_name, "g") == []
    check_ledger(server, ring_name, "g")


def test_a_reader_that_lives_keeps_its_samples_however_long_it_takes(server, ring_name, monkeypatch):
    monkeypatch.setattr("synthbroker.ring.BEAT_S", 0.05)
    fill(server, ring_name, range(6), producers=0)
    slow = sb.Consumer(server.url, ring=ring_name, group="g", batch_size=2, prefetch=1, name="slow")
    stream = iter(slow)
    assert values(next(stream)) == [0, 1]
    eventually(lambda: pending(server, ring_name, "g") == [1, 2, 3, 4], "a batch in hand, another ready")
    quick = sb.Consumer(server.url, ring=ring_name, group="g", wait_s=1.5, claim_after_s=0.1, name="quick")
    seen = []
    with pytest.raises(sb.StarvedError):
        seen.extend(values(batch)[0] for batch in quick)
    assert seen == [4, 5]
    assert pending(server, ring_name, "g") == [1, 2, 3, 4]
    assert values(next(stream)) == [2, 3]
    slow.close()


# -- a reader that is slower than the ring


def test_a_slow_reader_is_given_whole_samples_and_its_losses_are_counted(server, ring_name):
    options = {"capacity": "2MB", "when_full": "drop-oldest", "producers": 1, "codec": "raw", "groups": ("g",)}
    stop = threading.Event()

    def generate():
        with sb.Producer(server.url, ring=ring_name, in_flight="1MB", **options) as out:
            for i in itertools.takewhile(lambda _: not stop.is_set(), itertools.count()):
                out.put(number(i, 20_000))
        return out.stats.samples

    done = background(generate)
    seen = []
    stream = iter(sb.Consumer(server.url, ring=ring_name, group="g", batch_size=3, prefetch=2, wait_s=SOON_S))
    for _ in range(40):
        seen += values(next(stream))
        then = int(meta(server, ring_name)["next"])
        eventually(lambda then=then: int(meta(server, ring_name)["next"]) > then + 30, "the ring has turned round")
    stop.set()
    made = done.result(SOON_S)
    seen += drain(stream)
    assert seen == sorted(set(seen)), "nothing twice, and in order"
    found = counters(server, ring_name, "g")
    assert found["lost"] > 500
    assert reasons(server, ring_name) == []
    assert made == int(meta(server, ring_name)["next"]) - 1 == found["delivered"] + found["lost"]
    assert len(seen) <= found["delivered"]
    check_ledger(server, ring_name, "g")


def test_a_sample_evicted_while_it_is_read_is_overrun_not_damaged(server, ring_name, monkeypatch):
    fill(server, ring_name, range(5), size=ITS_OWN, when_full="drop-oldest", max_samples=5, producers=2)
    want, times = Inflow.want, itertools.count()

    def late(inflow, slices):
        slices = list(slices)
        if slices and next(times) == 1:
            fill(server, ring_name, range(5, 10), size=ITS_OWN, producers=2)
        want(inflow, slices)

    monkeypatch.setattr(Inflow, "want", late)
    consumer = sb.Consumer(server.url, ring=ring_name, group="g", batch_size=2)
    assert drain(consumer) == [0, 5, 6, 7, 8, 9]
    assert reasons(server, ring_name) == []
    assert consumer._session.reader.counts.overrun >= 1
    check_ledger(server, ring_name, "g")


# -- the server goes, or an answer is lost


@pytest.mark.parametrize("size", [4, IN_PARTS])
@pytest.mark.parametrize("request_", ["take", "ack", "join", "XREAD", "GET"])
def test_an_answer_that_is_lost_loses_and_doubles_nothing(own_server: OwnServer, ring_name, size, request_):
    server = own_server()
    fill(server, ring_name, range(60), size=size, producers=2)
    with lossy(server) as line:
        consumer = sb.Consumer(line.url, ring=ring_name, group="g", batch_size=4, prefetch=1, wait_s=SOON_S)
        line.lose_answer_to(request_ if request_ == "join" else "take", keep_bytes=0)
        seen = []
        for round_, batch in enumerate(consumer):
            seen += values(batch)
            if round_ in (3, 6, 9):
                line.lose_answer_to(request_, keep_bytes=1000 if request_ == "GET" else 0)
            if request_ == "ack" and round_ in (4, 7, 10):  # they are told beside the loop, of many batches at once
                eventually(lambda lost=1 + round_ // 3: line.lost >= lost, "it was told of the batch before")
            if round_ == 12:
                fill(server, ring_name, range(60, 64), size=size, producers=2)
        assert line.lost >= (1 if request_ in ("join", "XREAD", "GET") else 3)
    assert sorted(seen) == list(range(64))
    assert pending(server, ring_name, "g") == []
    check_ledger(server, ring_name, "g")


def test_an_answer_that_is_lost_after_the_server_was_emptied_loses_nothing(own_server: OwnServer, ring_name):
    server = own_server()
    fill(server, ring_name, range(60), producers=2)
    with lossy(server) as line:
        stream = iter(sb.Consumer(line.url, ring=ring_name, group="g", batch_size=4, prefetch=1, wait_s=SOON_S))
        assert drain(itertools.islice(stream, 15)) == list(range(60))
        server.client().flushall()
        fill(server, ring_name, range(100, 140))
        seen = []
        for round_, batch in enumerate(stream):
            seen += values(batch)
            if round_ in (0, 2, 4):
                line.lose_answer_to("take")
        assert line.lost
    assert sorted(seen) == list(range(100, 140))
    assert pending(server, ring_name, "g") == []
    check_ledger(server, ring_name, "g")


def test_a_server_that_comes_back_empty_is_read_on(own_server: OwnServer, ring_name, caplog):
    server = own_server()
    out = sb.Producer(server.url, ring=ring_name, capacity="50MB", codec="raw", producers=1)
    for i in range(4):
        out.put(number(i, IN_PARTS))
    out.flush()
    stream = iter(sb.Consumer(server.url, ring=ring_name, group="g", batch_size=2, wait_s=SOON_S))
    first = [next(stream), next(stream)]
    assert drain(first) == [0, 1, 2, 3]
    rest = background(lambda: list(stream))
    server.restart()
    for i in range(4, 9):
        out.put(number(i, IN_PARTS))
    out.close()
    batches = rest.result(SOON_S)
    assert drain(batches) == [4, 5, 6, 7, 8]
    assert {batch.info.epoch for batch in batches} == {meta(server, ring_name)["epoch"]}
    assert first[0].info.epoch != batches[0].info.epoch
    assert "waiting for it to be made anew" in caplog.text
    assert pending(server, ring_name, "g") == []
    check_ledger(server, ring_name, "g")


def test_a_server_that_comes_back_empty_while_a_sample_is_received_is_read_on(
    own_server: OwnServer, ring_name, monkeypatch
):
    server = own_server()
    out = sb.Producer(server.url, ring=ring_name, capacity="50MB", codec="raw", producers=1)
    for i in range(5):
        out.put(number(i, ITS_OWN))
    out.flush()
    receive, asked, restarted = Inflow.receive, [], threading.Event()

    def late(inflow, parts, came):
        asked.append(parts)
        if len(asked) == 1:
            assert restarted.wait(SOON_S)
        return receive(inflow, parts, came)

    monkeypatch.setattr(Inflow, "receive", late)
    stream = iter(sb.Consumer(server.url, ring=ring_name, group="g", batch_size=4, wait_s=SOON_S))
    rest = background(lambda: drain(stream))
    waits(rest, lambda: asked, "it is receiving")
    server.restart()
    restarted.set()
    for i in range(5, 10):
        out.put(number(i, ITS_OWN))
    out.close()
    assert rest.result(SOON_S) == [5, 6, 7, 8, 9]
    assert reasons(server, ring_name) == [], "what the server lost is not damaged"
    check_ledger(server, ring_name, "g")


@pytest.mark.parametrize("group", ["g", None])
def test_a_server_that_stays_away_is_named(own_server: OwnServer, ring_name, group):
    server = own_server()
    fill(server, ring_name, range(6), producers=0)
    stream = iter(sb.Consumer(server.url, ring=ring_name, group=group, prefetch=0, reconnect_s=0.3))
    assert values(next(stream)) == [0]
    server.kill()
    with pytest.raises(sb.ServerGoneError, match=r"redis\.sock"):
        list(stream)


def test_a_wrong_password_is_told_at_once(own_server: OwnServer, ring_name):
    server = own_server(requirepass="right")
    with pytest.raises(sb.ServerRefusedError, match="password"):
        list(sb.Consumer(f"unix://:wrong@{server.socket_path}", ring=ring_name, group="g"))


def test_a_server_that_forgets_the_scripts_is_told_them_again(server, ring_name):
    fill(server, ring_name, range(20))
    seen = []
    for batch in sb.Consumer(server.url, ring=ring_name, group="g", batch_size=2, prefetch=0):
        server.client().script_flush()
        seen += values(batch)
    assert seen == list(range(20))


def test_a_group_that_is_dropped_under_its_reader_begins_anew(server, ring_name):
    fill(server, ring_name, range(6), producers=0)
    stream = iter(sb.Consumer(server.url, ring=ring_name, group="g", batch_size=2, prefetch=0, wait_s=SOON_S))
    assert values(next(stream)) == [0, 1]
    with raw_ring(server, ring_name) as ring:
        ring.drop("g")
        ring.end()
    assert drain(stream) == list(range(6))


def test_a_reader_that_is_closed_while_it_waits_goes_quietly_and_at_once(server, ring_name, caplog, monkeypatch):
    monkeypatch.setattr("synthbroker.ring.LONGEST_BLOCK_MS", int(1000 * SOON_S))
    monkeypatch.setattr("synthbroker.reader._LAST_WORD_S", SOON_S)
    fill(server, ring_name, range(2), producers=0)
    consumer = sb.Consumer(server.url, ring=ring_name, group="g", wait_s=SOON_S)
    stream = iter(consumer)
    assert drain([next(stream), next(stream)]) == [0, 1]
    waiting = background(lambda: list(stream))
    eventually(lambda: pending(server, ring_name, "g") == [], "it waits")
    began = time.monotonic()
    consumer.close()
    assert waiting.result(SOON_S) == []
    assert time.monotonic() - began < SOON_S / 2, "it did not wait for the server"
    assert members(server, ring_name, "g") == []
    assert caplog.text == ""
