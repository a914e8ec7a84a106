"""The server fails: everybody goes on by himself, nothing is lost that the server kept, nothing is doubled."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from faults.conftest import MakeScene
from faults.proxy import TO_CLIENT, TO_SERVER, Proxy
from faults.scene import GROUP, SOON_S, Scene
from servers import RealServer, eventually
from synthbroker import monitor
from synthbroker.bench.throttle import Valve
from tools import fill_up

OwnServer = Callable[..., RealServer]
Proxied = Callable[[RealServer], Proxy]
MB = 1_000_000


def hold(seconds: float) -> None:
    """Let a fault last: it has no end of its own that could be waited for."""
    threading.Event().wait(seconds)


def populate(it: Scene, generators: int = 2, trainers: int = 1, **options: Any) -> None:
    """Start generators and trainers, and wait until samples flow."""
    for _ in range(generators):
        it.generator(**options)
    for _ in range(trainers):
        it.trainer()
    it.trained()


# -- it keeps its data


def test_killed_and_restarted_with_aof(own_server: OwnServer, scene: MakeScene):
    server = own_server(appendonly="yes", appendfsync="always")
    it = scene("server killed, restarted with AOF (always)", server)
    populate(it)
    for _ in range(4):
        with it.fault():
            server.restart()
    it.finish()
    it.check_told(it.url, "does not answer")
    it.check_nothing_lost()


def test_loading(own_server: OwnServer, scene: MakeScene):
    server = own_server(
        appendonly="yes", appendfsync="always", key_load_delay=500, loading_process_events_interval_bytes=1024
    )
    it = scene("server restarted, LOADING for a while", server)
    populate(it, sizes="small")
    it.trained(500)
    for _ in range(2):
        with it.fault():
            server.restart()
            assert server.client().info("persistence")["loading"]
            eventually(lambda: not server.client().info("persistence")["loading"], "it has loaded")
    it.finish()
    it.check_told(it.url, "LOADING")
    it.check_nothing_lost()


@pytest.mark.parametrize(("seconds", "socket_s"), [(10.0, 15.0), (3.0, 1.0)], ids=["10 s", "beyond the timeout"])
def test_paused(own_server: OwnServer, scene: MakeScene, seconds: float, socket_s: float):
    server = own_server()
    it = scene(f"server stopped (SIGSTOP) {seconds:.0f} s, sockets wait {socket_s:.0f} s", server)
    patience = {"patience": {"socket_s": socket_s}}
    for _ in range(2):
        it.generator(**patience)
    it.trainer(**patience)
    it.trained()
    with it.fault():
        server.suspend()
        hold(seconds)
        server.resume()
    it.finish()
    it.check_nothing_lost()


def test_scripts_forgotten(own_server: OwnServer, scene: MakeScene):
    server = own_server()
    it = scene("SCRIPT FLUSH", server)
    populate(it)
    for _ in range(100):
        server.client().script_flush()
        it.row.injected += 1
        hold(0.02)
    it.recovers()
    it.finish()
    it.check_nothing_lost()


@pytest.mark.parametrize("sizes", ["tiny", "mixed"])
def test_read_only(own_server: OwnServer, scene: MakeScene, sizes: str):
    server = own_server()
    it = scene(f"READONLY (REPLICAOF, and back), {sizes} samples", server)
    populate(it, sizes=sizes)
    for _ in range(3):
        with it.fault():
            server.client().replicaof("127.0.0.1", 1)
            hold(1.0)
            server.client().replicaof("no", "one")
    it.finish()
    it.check_told(it.url, "READONLY")
    it.check_nothing_lost()


@pytest.mark.parametrize("sizes", ["tiny", "mixed"])
def test_disk_full(own_server: OwnServer, scene: MakeScene, sizes: str):
    server = own_server(save="3600 1", stop_writes_on_bgsave_error="yes")
    it = scene(f"disk full (MISCONF), {sizes} samples", server)
    populate(it, sizes=sizes)
    for _ in range(3):
        with it.fault():
            in_the_way = server.directory / "dump.rdb"
            in_the_way.unlink(missing_ok=True)
            in_the_way.mkdir()
            save(server, "err")
            hold(1.0)
            in_the_way.rmdir()
            save(server, "ok")
    it.finish()
    it.check_told(it.url, "MISCONF")
    it.check_nothing_lost()


def save(server: RealServer, result: str) -> None:
    def came_out() -> bool:
        found = server.client().info("persistence")
        return not found["rdb_bgsave_in_progress"] and found["rdb_last_bgsave_status"] == result

    server.client().bgsave()
    eventually(came_out, f"saving comes out {result}")


@pytest.mark.parametrize("when_full", ["block", "drop-oldest"])
def test_out_of_memory(own_server: OwnServer, scene: MakeScene, when_full: str):
    server = own_server(maxmemory="64mb")
    it = scene(f"OOM: other keys took the memory, {when_full}", server)
    populate(it, when_full=when_full, capacity="20MB")
    for _ in range(3):
        with it.fault():
            ballast = fill_up(server)
            hold(1.0)
            server.client().delete(*ballast)
    it.finish()
    if when_full == "drop-oldest":
        it.allowed |= it.account.made
        group = monitor.status(it.ring, url=server.url).groups[GROUP]
        assert len(it.account.lost) <= group.lost + group.evicted_pending, "the ring counted them"
    it.check_nothing_doubled()


# -- the network


@pytest.mark.parametrize("script", ["room", "commit", "take", "ack"])
def test_an_answer_lost(own_server: OwnServer, proxied: Proxied, scene: MakeScene, script: str):
    server = own_server()
    wire = proxied(server)
    it = scene(f"answer to `{script}` lost", server, wire.url)
    populate(it)
    for n in range(6):
        with it.fault():
            wire.lose_answer_to(script)
            eventually(lambda n=n: wire.lost > n, "it is lost")
    it.finish()
    it.check_nothing_lost()


@pytest.mark.parametrize("direction", [TO_SERVER, TO_CLIENT])
def test_cut_within_a_part(own_server: OwnServer, proxied: Proxied, scene: MakeScene, direction: str):
    server = own_server()
    wire = proxied(server)
    it = scene(f"connection cut within a part, on its way {direction}", server, wire.url)
    populate(it, sizes="big")
    for n in range(8):
        with it.fault():
            wire.cut_after(it.random.randrange(5_000_000), direction)
            eventually(lambda n=n: wire.cuts > n, "it is cut")
    it.finish()
    it.check_nothing_lost()


def test_all_connections_cut(own_server: OwnServer, proxied: Proxied, scene: MakeScene):
    server = own_server()
    wire = proxied(server)
    it = scene("all connections cut at once", server, wire.url)
    populate(it, trainers=2)
    for _ in range(20):
        with it.fault():
            hold(it.random.random() * 0.1)
            wire.cut()
    it.finish()
    it.check_nothing_lost()


def test_slow_and_cut(own_server: OwnServer, proxied: Proxied, scene: MakeScene):
    server = own_server()
    wire = proxied(server)
    wire.delay_s, wire.valve = 0.001, Valve(20 * MB)
    it = scene("link of 20 MB/s with 1 ms delay, cut within parts", server, wire.url)
    populate(it)
    for n in range(5):
        with it.fault():
            wire.cut_after(it.random.randrange(500_000), it.random.choice([TO_SERVER, TO_CLIENT]))
            eventually(lambda n=n: wire.cuts > n, "it is cut")
    it.finish()
    it.check_nothing_lost()


# -- it loses its data


@contextmanager
def losing(it: Scene, deadline_s: float = SOON_S) -> Iterator[None]:
    """Do what loses the server's data: nothing may be lost but what was made and not yet trained on."""
    yield
    it.may_be_lost()
    it.row.injected += 1
    it.recovers(deadline_s=deadline_s)


@pytest.mark.parametrize("how", ["server restarted empty", "FLUSHALL"])
def test_emptied(own_server: OwnServer, scene: MakeScene, how: str):
    server = own_server()
    it = scene(how, server)
    populate(it)
    for _ in range(4):
        with losing(it):
            server.client().flushall() if how == "FLUSHALL" else server.restart()
    it.finish()
    it.check_nothing_doubled()
    it.check_told(it.ring, "does not know the ring")


def test_failover(own_server: OwnServer, proxied: Proxied, scene: MakeScene):
    server = own_server(tcp=True)
    wire = proxied(server)
    it = scene("failover to a replica that lacks the last commits", server, wire.url)
    populate(it)
    for _ in range(3):
        host, port = "127.0.0.1", server.url.rpartition(":")[2].partition("/")[0]
        replica = own_server(tcp=True, replicaof=f"{host} {port}")
        eventually(lambda: replica.client().info("replication")["master_link_status"] == "up", "it is in sync")  # noqa: B023
        with losing(it, deadline_s=20.0):
            replica.client().replicaof("no", "one")
            it.trained(30)
            server.kill()
            wire.lead_to(replica)
        server = it.server = replica
    it.finish()
    it.check_nothing_doubled()
