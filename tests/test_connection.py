"""The way to the server: what goes wrong and what it is called, who tries again and for how long."""

import re
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import redis

from peers import Serve, answers, hangs_up, is_mute, peer, says
from servers import UNNAMED, RealServer, RunningServer
from synthbroker import connection, line
from synthbroker.connection import Connection, translate
from synthbroker.errors import (
    EndpointError,
    ServerError,
    ServerFullError,
    ServerGoneError,
    ServerRefusedError,
)

GONE, REFUSED, FULL = ServerGoneError, ServerRefusedError, ServerFullError
SOON_S = 10.0  # far above what it takes, far below what trying again would
OLD = "ERR Error running script (call to f_0a): @user_script:30: @user_script: 30: -"

# What a server says, which error that is, and a word of what we say about it.
TOLD: list[tuple[str, type[ServerError], str]] = [
    ("OOM command not allowed when used memory > 'maxmemory'.", FULL, "memory limit"),
    ("LOADING Redis is loading the dataset in memory", GONE, "cannot serve now"),
    ("MASTERDOWN Link with MASTER is down", GONE, "cannot serve now"),
    ("CLUSTERDOWN The cluster is down", GONE, "cannot serve now"),
    ("TRYAGAIN Multiple keys request during rehashing of slot", GONE, "cannot serve now"),
    ("READONLY You can't write against a read only replica.", GONE, "cannot serve now"),
    ("MISCONF Redis is configured to save RDB snapshots", GONE, "cannot serve now"),
    ("BUSY Redis is busy running a script.", GONE, "cannot serve now"),
    ("UNBLOCKED the stream key no longer exists", GONE, "cannot serve now"),
    ("ERR max number of clients reached", GONE, "max number of clients"),
    ("NOAUTH Authentication required.", REFUSED, "password"),
    ("WRONGPASS invalid username-password pair or user is disabled.", REFUSED, "password"),
    ("ERR invalid password", REFUSED, "password"),
    ("NOPERM this user has no permissions to run the 'eval' command", REFUSED, "may not do that"),
    ("MOVED 3999 127.0.0.1:6381", REFUSED, "one node of a cluster"),
    ("ASK 3999 127.0.0.1:6381", REFUSED, "one node of a cluster"),
    ("ERR unknown command 'EVALSHA'", REFUSED, "older than Redis 6.2"),
    ("WRONGTYPE Operation against a key holding the wrong kind of value", REFUSED, "something else uses"),
    ("ERR whatever this may be", REFUSED, "whatever this may be"),
    ("NONSENSE", REFUSED, "NONSENSE"),
    # Redis 6.2 wraps what a command said inside a script.
    (OLD + "OOM command not allowed when used memory > 'maxmemory'.", FULL, "memory limit"),
    (OLD + "READONLY You can't write against a read only replica.", GONE, "cannot serve now"),
    (OLD + "MISCONF Redis is configured to save RDB snapshots", GONE, "cannot serve now"),
    (OLD + "NOPERM this user has no permissions", REFUSED, "may not do that"),
    (OLD + "WRONGTYPE Operation against a key", REFUSED, "something else uses"),
    (OLD.partition(" @")[0] + " @user_script:9: WRONGTYPE Operation against a key", REFUSED, "something else uses"),
]


@pytest.mark.parametrize(("text", "kind", "meaning"), TOLD)
def test_what_a_server_says_becomes_one_of_our_errors(text: str, kind: type[ServerError], meaning: str) -> None:
    with peer(answers({b"GET": f"-{text}\r\n".encode()})) as url:
        with pytest.raises(ServerError) as caught:
            Connection(url).call("GET", "x")
    assert type(caught.value) is kind
    assert meaning in str(caught.value)
    assert str(caught.value).startswith(url)
    assert isinstance(caught.value.__cause__, redis.RedisError)


def test_no_row_of_the_table_is_untried() -> None:
    texts = [text.removeprefix("ERR ") for text, _, _ in TOLD] + ["Protocol error, got H as reply type byte"]
    for pattern, _, _ in connection._REPLIES:
        assert any(re.match(pattern, text, re.IGNORECASE) for text in texts), pattern


class Counted:
    """Something to try, and how often it was tried."""

    def __init__(self, act: Callable[[], object]) -> None:
        self._act = act
        self.times = 0

    def __call__(self) -> object:
        self.times += 1
        return self._act()


def all_redis_errors() -> list[type[redis.RedisError]]:
    found = [kind for kind in vars(redis.exceptions).values() if isinstance(kind, type)]
    return sorted({kind for kind in found if issubclass(kind, redis.RedisError)}, key=lambda kind: kind.__name__)


@pytest.mark.parametrize("kind", all_redis_errors())
def test_every_error_of_redis_py_is_translated(kind: type[redis.RedisError]) -> None:
    refused_of_gone = redis.AuthenticationError | redis.exceptions.AuthorizationError
    passing = redis.ConnectionError | redis.TimeoutError | redis.ReadOnlyError | redis.exceptions.TryAgainError
    wanted: type[ServerError] = FULL if kind is redis.OutOfMemoryError else REFUSED
    if issubclass(kind, passing | redis.exceptions.ClusterDownError) and not issubclass(kind, refused_of_gone):
        wanted = GONE
    assert type(translate(kind("3999 127.0.0.1:6381"), "the server")) is wanted


@pytest.mark.parametrize(
    "serve",
    [
        says(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n"),
        says(b"SSH-2.0-OpenSSH_9.2\r\n"),
        says(b"220 mail.example.org ESMTP\r\n"),
        says(b"\x15\x03\x01\x00\x02\x02\x0a"),
    ],
    ids=["http", "ssh", "smtp", "tls"],
)
def test_what_is_not_a_redis_is_refused_at_once(serve: Serve) -> None:
    with peer(serve) as url:
        began = time.monotonic()
        with pytest.raises(ServerRefusedError, match="not a Redis server"):
            Connection(url).keep_trying(lambda: Connection(url).call("PING"), 60, threading.Event())
        assert time.monotonic() - began < SOON_S


@pytest.mark.parametrize("serve", [is_mute, hangs_up], ids=["mute", "hangs up"])
def test_a_server_that_says_nothing_is_gone(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "SOCKET_TIMEOUT_S", 0.2)
    with peer(serve) as url:
        with pytest.raises(ServerGoneError, match="does not answer"):
            Connection(url).call("PING")


def test_a_server_that_stands_still_is_told_in_words(
    own_server: Callable[..., RealServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "SOCKET_TIMEOUT_S", 0.2)
    monkeypatch.setattr(line, "SOCKET_TIMEOUT_S", 0.2)
    server = own_server()
    way = Connection(server.url)
    assert way.call("PING") == b"PONG"
    server.suspend()
    with pytest.raises(ServerGoneError, match=r"does not answer: nothing for 0\.2 s"):
        way.call("PING")


@pytest.mark.parametrize("version", ["2.8.24", "5.0.14", "6.0.16"])
def test_too_old_a_server_is_refused_before_anything_is_sent(version: str) -> None:
    info = f"redis_version:{version}".encode()
    with peer(answers({b"INFO": b"$%d\r\n%b\r\n" % (len(info), info), b"SET": b"-ERR too late\r\n"})) as url:
        with pytest.raises(ServerRefusedError, match=rf"is Redis {version[:3]}: 6\.2 or newer is needed"):
            Connection(url).call("SET", "x", "y")


@pytest.mark.parametrize("reply", ["+redis_version:6.2.0", "+redis_version:10.0.1", "-ERR unknown", "-NOPERM no"])
def test_a_new_server_and_one_that_does_not_tell_are_taken(reply: str) -> None:
    with peer(answers({b"INFO": reply.encode() + b"\r\n"})) as url:
        assert Connection(url).call("SET", "x", "y") == b"OK"


@pytest.mark.parametrize("login", ["", ":wrong@", "nobody:wrong@"])
def test_a_wrong_password_is_one_error_at_once_that_shows_no_password(
    login: str, own_server: Callable[..., RealServer]
) -> None:
    server = own_server(requirepass="right", tcp=True)
    way = Connection(server.url.replace(":right@", login))
    attempt = Counted(lambda: way.call("PING"))
    began = time.monotonic()
    with pytest.raises(ServerRefusedError, match="wrong or missing password") as caught:
        way.keep_trying(attempt, 60, threading.Event())
    assert attempt.times == 1
    assert time.monotonic() - began < SOON_S
    assert ":wrong@" not in str(caught.value)
    assert Connection(server.url).call("PING") == b"PONG"


def test_a_user_who_may_not_write_is_told_so(own_server: Callable[..., RealServer]) -> None:
    server = own_server()
    server.client().acl_setuser("eve", enabled=True, passwords=["+pw"], categories=["+@read"], keys=["*"])
    with pytest.raises(ServerRefusedError, match="may not do that"):
        Connection(server.url.replace("unix://", "unix://eve:pw@")).call("SET", "x", "y")


def nowhere() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"redis://:secret@127.0.0.1:{probe.getsockname()[1]}/0"


# -- trying again


def test_trying_again_ends_at_its_deadline_and_names_the_server() -> None:
    way = Connection(nowhere())
    began = time.monotonic()
    with pytest.raises(ServerGoneError, match=r"127\.0\.0\.1:\d+/0 does not answer.*\(tried for") as caught:
        way.keep_trying(lambda: way.call("PING"), 0.3, threading.Event())
    assert 0.3 <= time.monotonic() - began < SOON_S
    assert "secret" not in str(caught.value)


def test_trying_for_no_time_is_trying_once() -> None:
    way = Connection(nowhere())
    attempt = Counted(lambda: way.call("PING"))
    with pytest.raises(ServerGoneError):
        way.keep_trying(attempt, 0, threading.Event())
    assert attempt.times == 1


def test_a_stop_ends_the_trying_at_once() -> None:
    way, stop = Connection(nowhere()), threading.Event()
    failed: list[Exception] = []
    tried = threading.Event()

    def attempt() -> None:
        tried.set()
        way.call("PING")

    def run() -> None:
        try:
            way.keep_trying(attempt, 600, stop)
        except ServerGoneError as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert tried.wait(SOON_S)
    stop.set()
    thread.join(SOON_S)
    assert failed


@pytest.mark.parametrize("error", [ServerRefusedError("x"), ServerFullError("x"), EndpointError("x"), ValueError("x")])
def test_what_is_not_a_matter_of_time_is_not_tried_again(error: Exception) -> None:
    def fail() -> None:
        raise error

    attempt = Counted(fail)
    with pytest.raises(type(error)):
        Connection("redis://127.0.0.1:1/0").keep_trying(attempt, 60, threading.Event())
    assert attempt.times == 1


def test_a_server_that_comes_back_is_found_again(own_server: Callable[..., RealServer]) -> None:
    server = own_server()
    way, failed = Connection(server.url), threading.Event()
    assert way.call("SET", "x", "y") == b"OK"
    server.kill()

    def attempt() -> object:
        try:
            return way.call("EXISTS", "x")
        except ServerGoneError:
            if not failed.is_set():
                server.restart()
            failed.set()
            raise

    assert way.keep_trying(attempt, 60, threading.Event()) == 0
    assert failed.is_set()


def endpoint_file(path: Path, server: RealServer) -> None:
    from synthbroker import endpoint

    socket_path = str(server.socket_path)
    endpoint.write(
        path,
        endpoint.Endpoint(None, None, socket_path, False, "default", "", UNNAMED, server.pid, "here", None, "now"),
    )


def test_an_endpoint_file_is_read_again_and_may_be_away_meanwhile(
    own_server: Callable[..., RealServer], tmp_path: Path
) -> None:
    path, one, two = tmp_path / "broker.json", own_server(), own_server()
    way = Connection(path.as_uri())
    endpoint_file(path, one)
    assert way.call("SET", "x", "one") == b"OK"
    assert two.client().set("x", "two")
    one.kill()

    def act() -> object:
        if attempt.times == 2:
            path.unlink()
        if attempt.times == 4:
            endpoint_file(path, two)
        return way.call("GET", "x")

    attempt = Counted(act)
    assert way.keep_trying(attempt, 60, threading.Event()) == b"two"
    assert way.where == f"unix://{two.socket_path}"


# -- calls


def test_threads_share_one_connection_object(server: RunningServer, ring_name: str) -> None:
    way = Connection(server.url)
    start = threading.Barrier(8)
    found: list[object] = []

    def run(number: int) -> None:
        start.wait()
        for _ in range(20):
            echo = way.call("ECHO", f"{ring_name}-{number}")
            found.append(echo == f"{ring_name}-{number}".encode())

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 160
    way.close()


def test_a_closed_connection_opens_again(server: RunningServer) -> None:
    way = Connection(server.url)
    for _ in range(3):
        assert way.call("PING") == b"PONG"
        way.close()
    way.close()


def test_making_a_connection_opens_nothing() -> None:
    assert Connection(nowhere()).where.endswith("/0")
    Connection("file:///does/not/exist.json").close()


def test_a_server_learns_a_script_that_it_does_not_know(any_server: RunningServer, ring_name: str) -> None:
    way = Connection(any_server.url)
    for _ in range(2):
        any_server.client().script_flush()
        for _ in range(2):
            assert way.script("end", f"sb:{{{ring_name}}}:meta", "no epoch") == [b"NORING"]
    way.close()
