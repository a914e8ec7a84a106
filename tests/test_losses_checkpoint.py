"""Checkpoints of runs whose server comes back: with all it had, or with less."""

from collections.abc import Callable

import pytest

import synthbroker as sb
from logs import KEEPS_ALL, come_back_as_of, mark
from servers import RealServer, eventually
from synthbroker.replies import Incarnation
from tools import SOON_S, check_ledger, counters, drain, number, pending, raw_ring, values

OwnServer = Callable[..., RealServer]


def consumer(server: RealServer, ring: str, **options: object) -> sb.Consumer:
    asked = {"group": "g", "batch_size": 2, "prefetch": 0, "wait_s": SOON_S, "ack": "checkpoint", "name": "run"}
    return sb.Consumer(server.url, ring=ring, **asked | options)  # type: ignore[arg-type]


def filled(server: RealServer, ring: str) -> sb.Producer:
    out = sb.Producer(server.url, ring=ring, capacity="7MB", codec="raw", producers=1)
    for i in range(8):
        out.put(number(i))
    out.flush()
    return out


@pytest.mark.parametrize("forgets", [False, True], ids=["kept all", "forgot the checkpoint"])
def test_a_checkpoint_goes_on_over_a_server_that_comes_back(
    own_server: OwnServer, ring_name: str, forgets: bool
) -> None:
    server = own_server(**KEEPS_ALL)
    out = filled(server, ring_name)
    reader = consumer(server, ring_name)
    stream = iter(reader)
    seen = values(next(stream))
    then = mark(server)
    seen += values(next(stream))
    state = reader.state_dict()
    come_back_as_of(server, then if forgets else mark(server))
    seen += values(next(stream))  # so that the server knows again what was given
    reader.acknowledge(state)
    assert pending(server, ring_name, "g") == [5, 6], "what the checkpoint holds is acknowledged"
    reader.acknowledge(reader.state_dict())
    out.close()
    assert seen + drain(stream) == list(range(8))
    reader.acknowledge(reader.state_dict())
    found = counters(server, ring_name, "g")
    assert (found["acknowledged"], found["doubled"], found["redelivered"]) == (8, 0, 0)
    check_ledger(server, ring_name, "g")


def test_a_checkpoint_that_is_acknowledged_before_the_server_knows_again_what_it_gave_counts(
    own_server: OwnServer, ring_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("synthbroker.ring.BEAT_S", 0.05)
    server = own_server(**KEEPS_ALL)
    out = filled(server, ring_name)
    reader = consumer(server, ring_name)
    stream = iter(reader)
    with raw_ring(server, ring_name) as ring:
        seen = values(next(stream))
        ring.join_group(Incarnation("late/0", "w"), "g", "1", {})  # has yet to say what it holds
        then = mark(server)
        seen += values(next(stream))
        come_back_as_of(server, then)
        unsettled = f"sb:{{{ring_name}}}:unsettled:g"
        eventually(lambda: server.client().hget(unsettled, "4"), "the reader has said what it holds")
        reader.acknowledge(reader.state_dict())
        server.client().hdel(unsettled, "@late/0:w")
        out.close()
        assert seen + drain(stream) == list(range(8))
        reader.acknowledge(reader.state_dict())
    assert pending(server, ring_name, "g") == []
    found = counters(server, ring_name, "g")
    assert (found["acknowledged"], found["doubled"], found["redelivered"]) == (8, 0, 0)
    check_ledger(server, ring_name, "g")


def test_what_was_acknowledged_in_a_ring_that_is_lost_counts_for_nothing_in_the_one_made_anew(
    own_server: OwnServer, ring_name: str
) -> None:
    server = own_server(**KEEPS_ALL)
    out = filled(server, ring_name)
    reader = consumer(server, ring_name)
    stream = iter(reader)
    assert [*values(next(stream)), *values(next(stream)), *values(next(stream))] == [0, 1, 2, 3, 4, 5]
    reader.acknowledge(reader.state_dict())
    server.client().flushall()
    for i in range(10, 18):
        out.put(number(i))
    out.flush()
    seen = values(next(stream))
    reader.acknowledge(reader.state_dict())
    come_back_as_of(server, mark(server))
    reader.acknowledge(reader.state_dict())  # tells the server what it may have forgotten
    out.close()
    assert seen + drain(stream) == list(range(10, 18))
    reader.acknowledge(reader.state_dict())
    assert pending(server, ring_name, "g") == []
    check_ledger(server, ring_name, "g")


def test_an_acknowledged_checkpoint_that_the_server_forgot_is_acknowledged_again(
    own_server: OwnServer, ring_name: str
) -> None:
    server = own_server(**KEEPS_ALL)
    out = filled(server, ring_name)
    reader = consumer(server, ring_name)
    stream = iter(reader)
    seen = [*values(next(stream)), *values(next(stream))]
    then = mark(server)
    reader.acknowledge(reader.state_dict())
    come_back_as_of(server, then)
    seen += values(next(stream))
    reader.acknowledge(reader.state_dict())
    assert pending(server, ring_name, "g") == []
    out.close()
    assert seen + drain(stream) == list(range(8))
    assert counters(server, ring_name, "g")["doubled"] == 0


def test_a_state_from_before_the_restart_of_the_server_is_resumed(own_server: OwnServer, ring_name: str) -> None:
    server = own_server(**KEEPS_ALL)
    out = filled(server, ring_name)
    reader = consumer(server, ring_name)
    stream = iter(reader)
    seen = values(next(stream))
    state = reader.state_dict()
    assert values(next(stream)) == [2, 3]  # after the checkpoint: comes again
    server.restart()
    again = consumer(server, ring_name)
    again.load_state_dict(state)
    out.close()
    assert seen + sorted(drain(again)) == list(range(8))
    again.acknowledge(again.state_dict())
    assert pending(server, ring_name, "g") == []
