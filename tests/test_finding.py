"""Finding a server by its endpoint file: before it is there, when it is another one, and whose file it is."""

import dataclasses
import logging
import os
import signal
import socket
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

import synthbroker as sb
from servers import eventually
from synthbroker import claim, endpoint, machine, server
from synthbroker.connection import Connection
from synthbroker.errors import EndpointError, ServerGoneError, ServerRefusedError, ServerStartError
from synthbroker.server import ServerConfig
from tools import SOON_S, background, drain, number


@contextmanager
def serving(path, config=None):
    """Run `serve` until the block ends; gives its endpoint."""
    stop, up = threading.Event(), threading.Event()
    found = []

    def announce(where):
        found.append(where)
        up.set()

    thread = threading.Thread(target=lambda: server.serve(config or ServerConfig(), path, stop=stop, announce=announce))
    thread.start()
    assert up.wait(SOON_S)
    try:
        yield found[0]
    finally:
        stop.set()
        thread.join(SOON_S)
    assert not thread.is_alive()


def ask(url):
    way = Connection(url)
    try:
        return way.keep_trying(lambda: way.call("PING"), 20, threading.Event())
    finally:
        way.close()


def test_both_sides_wait_for_a_server_that_has_not_started(tmp_path, ring_name, caplog):
    path = tmp_path / "broker.json"
    url = path.as_uri()
    caplog.set_level(logging.WARNING)

    def generate():
        with sb.Producer(url, ring=ring_name, capacity="10MB", producers=1) as out:
            for i in range(5):
                out.put(number(i))

    made = background(generate)
    read = background(lambda: drain(sb.Consumer(url, ring=ring_name, group="g", wait_s=SOON_S)))
    eventually(lambda: caplog.text.count("there is no endpoint file") >= 2, "both say that they wait")
    with serving(path):
        made.result(SOON_S)
        assert sorted(read.result(SOON_S)) == list(range(5))


def test_a_server_that_never_comes_is_told_after_reconnect_s(tmp_path, ring_name):
    url = (tmp_path / "broker.json").as_uri()
    with pytest.raises(ServerGoneError, match=r"no endpoint file .*broker.json.*tried for"):
        sb.Producer(url, ring=ring_name, reconnect_s=0.3).__enter__()


def test_an_endpoint_file_that_is_none_is_told_at_once(tmp_path, ring_name):
    path = tmp_path / "broker.json"
    path.write_text("{}")
    with pytest.raises(EndpointError, match="not an endpoint file"):
        sb.Producer(path.as_uri(), ring=ring_name).__enter__()


@pytest.mark.parametrize("password", ["", "secret"])
def test_another_server_on_the_port_is_passed_over_until_the_file_is_replaced(tmp_path, own_server, password, caplog):
    """A server without a password, or with another one, took the port of a broker that has ended."""
    path = tmp_path / "broker.json"
    stranger = own_server(tcp=True, **({"requirepass": password} if password else {}))
    with serving(path) as there:
        url = path.as_uri()
    stale = dataclasses.replace(there, port=stranger._port)
    endpoint.write(path, stale)
    with pytest.raises(ServerGoneError, match="not the server that the endpoint file names"):
        Connection(url).call("PING")
    asking = threading.Thread(target=ask, args=(url,))
    asking.start()
    eventually(lambda: "trying again" in caplog.text, "it tries again")
    path.unlink()
    with serving(path):
        asking.join(SOON_S)
        assert not asking.is_alive()
        assert "is back" in caplog.text


def test_a_server_that_takes_any_password_is_known_by_its_identity(tmp_path, own_server):
    path = tmp_path / "broker.json"
    stranger = own_server(tcp=True)
    with serving(path, ServerConfig(password="")) as there:
        assert Connection(path.as_uri()).call("PING") == b"PONG"
    endpoint.write(path, dataclasses.replace(there, port=stranger._port))
    with pytest.raises(ServerGoneError, match="that one has ended"):
        Connection(path.as_uri()).call("PING")


def test_a_user_who_may_not_ask_for_the_identity_is_let_in_by_the_password(tmp_path):
    path = tmp_path / "broker.json"
    with serving(path) as there:
        admin = Connection(path.as_uri())
        admin.call("ACL", "SETUSER", "eve", "on", ">pw", "allkeys", "+ping", "+info")
        endpoint.write(path, dataclasses.replace(there, user="eve", password="pw"))
        assert Connection(path.as_uri()).call("PING") == b"PONG"
        with pytest.raises(ServerRefusedError, match="may not do that"):
            Connection(path.as_uri()).call("KEYS", "*")


def test_a_wrong_password_in_a_url_is_still_told_at_once(tmp_path):
    with serving(tmp_path / "broker.json") as there, pytest.raises(ServerRefusedError, match="password"):
        ask(dataclasses.replace(there, password="wrong").url())


# -- whose file it is


def test_the_requeued_job_takes_the_file_over_and_its_former_life_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(server, "LOOK_EVERY_S", 0.1)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    path = tmp_path / "broker.json"
    up = threading.Event()
    zombie = background(lambda: server.serve(ServerConfig(), path, stop=threading.Event(), announce=lambda _: up.set()))
    assert up.wait(SOON_S)
    with pytest.raises(ServerStartError, match="belongs to a server that is running"):
        claim.refuse_to_replace(path)  # a second one in the same life of the job
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with serving(path) as successor:
        with pytest.raises(EndpointError, match=f"names another server by now, process {successor.pid}"):
            zombie.result(SOON_S)
        assert endpoint.read(path) == successor


def test_another_job_leaves_the_file_of_a_server_that_answers_alone(tmp_path, monkeypatch):
    path = tmp_path / "broker.json"
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with serving(path):
        monkeypatch.setenv("SLURM_JOB_ID", "78")
        with pytest.raises(ServerStartError, match="belongs to a server that is running"):
            claim.refuse_to_replace(path)


# -- what the job and the node give


def test_an_interface_is_named_and_its_address_is_published(tmp_path):
    assert machine.interface_address("lo") == "127.0.0.1"
    with pytest.raises(ServerStartError, match=r"no network interface 'ib77'.* only .*lo"):
        machine.interface_address("ib77")


def test_an_interface_of_another_kind_has_its_ipv6_address_or_none(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_ipv4_address", lambda name: None)
    if socket.has_ipv6 and "lo" in Path("/proc/net/if_inet6").read_text():
        assert machine.interface_address("lo") == "::1"
    monkeypatch.setattr(machine, "_ipv6_address", lambda name: None)
    with pytest.raises(ServerStartError, match="has no address"):
        machine.interface_address("lo")


@pytest.mark.parametrize(
    ("variables", "limit_bytes"),
    [
        ({"SLURM_MEM_PER_NODE": "100"}, 100 * 2**20),
        ({"SLURM_MEM_PER_CPU": "50", "SLURM_CPUS_ON_NODE": "3"}, 150 * 2**20),
        ({"SLURM_MEM_PER_NODE": "0"}, None),
        ({"SLURM_MEM_PER_CPU": "50"}, None),
        ({}, None),
    ],
)
def test_a_server_stays_within_the_memory_of_its_job(variables, limit_bytes, monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    nowhere = tmp_path / "nowhere"
    whole = machine.memory_limit_bytes(nowhere, nowhere)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert machine.memory_limit_bytes(nowhere, nowhere) == (limit_bytes or whole)


def test_a_server_that_was_told_to_end_just_before_us_has_not_failed(tmp_path):
    stop, path = threading.Event(), tmp_path / "broker.json"

    def end(there):
        os.kill(there.pid, signal.SIGTERM)
        threading.Timer(0.5, stop.set).start()

    server.serve(ServerConfig(), path, stop=stop, announce=end)
    assert not path.exists()
