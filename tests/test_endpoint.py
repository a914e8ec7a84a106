"""The endpoint file and the URLs."""

import dataclasses
import json
import os
import stat
import threading

import pytest
import redis
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from synthbroker import endpoint
from synthbroker.endpoint import Endpoint
from synthbroker.errors import EndpointError

SOME = Endpoint(
    host="node7",
    port=6380,
    unix_socket=None,
    tls=False,
    user="default",
    password="p/w@:#% é",
    identity="cafe",
    pid=4711,
    host_name="node7",
    job_id="99",
    started="2025-01-31T12:00:00+00:00",
)
TEXT = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=20)
ENDPOINTS = st.builds(
    dataclasses.replace,
    st.just(SOME),
    host=st.sampled_from(["127.0.0.1", "node-7.cluster_2", "::1", "fe80::1:2"]),
    port=st.integers(1, 65535),
    tls=st.booleans(),
    user=TEXT,
    password=st.one_of(st.just(""), TEXT),
    identity=TEXT,
    pid=st.integers(1, 2**22),
    job_id=st.one_of(st.none(), TEXT),
    ca=st.one_of(st.none(), TEXT.map(lambda name: f"/{name}")),
)
one_folder = hypothesis_settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def content(**changes):
    return {"format": endpoint.FORMAT, "version": endpoint.VERSION, **dataclasses.asdict(SOME), **changes}


@one_folder
@given(written=ENDPOINTS)
def test_what_was_written_is_read(tmp_path, written):
    endpoint.write(tmp_path / "broker.json", written)
    assert endpoint.read(tmp_path / "broker.json") == written


@one_folder
@given(written=ENDPOINTS)
def test_the_url_of_any_endpoint_leads_a_redis_client_there(tmp_path, written):
    path = tmp_path / "broker.json"
    endpoint.write(path, written)
    url = endpoint.resolve(path.as_uri())
    client = redis.Redis.from_url(url)
    arguments = client.connection_pool.connection_kwargs
    client.close()
    assert (arguments["host"], arguments["port"]) == (written.host, written.port)
    assert arguments.get("password", "") == written.password
    if written.password:
        assert arguments["username"] == written.user
    assert arguments.get("ssl_ca_certs") == (written.ca if written.tls else None)
    assert endpoint.resolve(url) == url


def test_an_endpoint_may_be_a_unix_socket(tmp_path):
    there = dataclasses.replace(SOME, host=None, port=None, unix_socket="/run/a b/redis@1.sock")
    endpoint.write(tmp_path / "broker.json", there)
    read = endpoint.read(tmp_path / "broker.json")
    client = redis.Redis.from_url(read.url())
    arguments = client.connection_pool.connection_kwargs
    client.close()
    assert (arguments["path"], arguments["password"]) == (there.unix_socket, there.password)


def test_the_bytes_of_the_file_are_pinned(tmp_path):
    path = tmp_path / "broker.json"
    endpoint.write(path, SOME)
    assert path.read_text() == (
        '{\n "format": "synthbroker-endpoint",\n "version": 1,\n "host": "node7",\n "port": 6380,\n'
        ' "unix_socket": null,\n "tls": false,\n "user": "default",\n "password": "p/w@:#% \\u00e9",\n'
        ' "identity": "cafe",\n "pid": 4711,\n "host_name": "node7",\n "job_id": "99",\n'
        ' "started": "2025-01-31T12:00:00+00:00",\n "ca": null\n}\n'
    )


def test_only_the_owner_may_read_the_file_and_no_other_file_is_left(tmp_path):
    path = tmp_path / "run" / "broker.json"
    endpoint.write(path, SOME)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["broker.json"]


def test_a_reader_sees_the_old_file_or_the_new_one_whole(tmp_path):
    path = tmp_path / "broker.json"
    short = dataclasses.replace(SOME, identity="s")
    long = dataclasses.replace(SOME, identity="l" * 20_000)
    endpoint.write(path, short)
    done = threading.Event()

    def rewrite():
        for _ in range(50):
            endpoint.write(path, long)
            endpoint.write(path, short)
        done.set()

    writer = threading.Thread(target=rewrite)
    writer.start()
    while not done.is_set():
        assert endpoint.read(path) in (short, long)
    writer.join()


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    (tmp_path / "broker.json").mkdir()
    (tmp_path / "broker.json" / "in the way").touch()
    with pytest.raises(EndpointError, match="cannot write"):
        endpoint.write(tmp_path / "broker.json", SOME)
    assert [file.name for file in tmp_path.iterdir()] == ["broker.json"]


def test_a_missing_file_asks_for_the_server(tmp_path):
    with pytest.raises(EndpointError, match="synthbroker serve"):
        endpoint.read(tmp_path / "broker.json")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[" * 60_000, "not JSON"),
        (b'{"format": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"[]", "not an endpoint file"),
        (b"{}", "not an endpoint file"),
        (b" " * (endpoint.LARGEST_FILE_BYTES + 1), "longer than"),
    ],
)
def test_a_file_that_is_none_of_ours_says_what_is_wrong(tmp_path, text, complaint):
    path = tmp_path / "broker.json"
    path.write_bytes(text)
    with pytest.raises(EndpointError, match=complaint):
        endpoint.read(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2},
        {"version": True},
        {"version": None},
        {"host": None},
        {"host": ""},
        {"host": "a b"},
        {"host": "x/y@z"},
        {"host": "1:2"},
        {"port": 0},
        {"port": 65536},
        {"port": "6379"},
        {"port": True},
        {"port": None},
        {"unix_socket": "/both/ways"},
        {"unix_socket": "relative", "host": None, "port": None},
        {"tls": 1},
        {"user": ""},
        {"password": None},
        {"password": "line\nbreak"},
        {"identity": "\ud800"},
        {"identity": ""},
        {"pid": 0},
        {"pid": 1.5},
        {"host_name": None},
        {"job_id": 99},
        {"started": 1.5},
    ],
)
def test_a_field_that_cannot_be_is_refused_by_name(tmp_path, changes):
    path = tmp_path / "broker.json"
    path.write_text(json.dumps(content(**changes)))
    with pytest.raises(EndpointError, match=next(iter(changes))):
        endpoint.read(path)


def test_a_missing_field_is_named_and_an_unknown_one_passed_over(tmp_path):
    path = tmp_path / "broker.json"
    path.write_text(json.dumps(content(colour="green")))
    assert endpoint.read(path) == SOME
    path.write_text(json.dumps({key: value for key, value in content().items() if key != "identity"}))
    with pytest.raises(EndpointError, match="lacks 'identity'"):
        endpoint.read(path)


@one_folder
@given(data=st.binary(max_size=300))
def test_no_bytes_let_another_error_escape(tmp_path, data):
    path = tmp_path / "broker.json"
    path.write_bytes(data)
    with pytest.raises(EndpointError):
        endpoint.read(path)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)


@one_folder
@given(name=st.sampled_from(sorted(content())), value=JSON)
def test_no_value_of_a_field_lets_another_error_escape(tmp_path, name, value):
    path = tmp_path / "broker.json"
    path.write_text(json.dumps(content(**{name: value})))
    try:
        found = endpoint.read(path)
    except EndpointError:
        return
    assert endpoint.resolve(found.url()) == found.url()


def test_what_is_no_regular_file_is_refused_and_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "broker.json")
    with pytest.raises(EndpointError, match="not a file"):
        endpoint.read(tmp_path / "broker.json")


def test_nothing_given_asks_the_environment(monkeypatch, tmp_path):
    endpoint.write(tmp_path / "broker.json", SOME)
    monkeypatch.setenv("SYNTHBROKER_URL", (tmp_path / "broker.json").as_uri())
    assert endpoint.resolve(None) == SOME.url()
    monkeypatch.setenv("SYNTHBROKER_URL", "unix:///run/redis.sock")
    assert endpoint.resolve(None) == "unix:///run/redis.sock"


def test_an_endpoint_file_is_read_anew_each_time(tmp_path):
    url = (tmp_path / "broker.json").as_uri()
    endpoint.write(tmp_path / "broker.json", SOME)
    endpoint.resolve(url)
    moved = dataclasses.replace(SOME, host="node8")
    endpoint.write(tmp_path / "broker.json", moved)
    assert endpoint.resolve(url) == moved.url()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "node7",
        "/run/broker.json",
        "node7:6379",
        "http://user:secret@node7",
        "redis://",
        "redis://:secret@",
        "redis://:se/cret@node7:6379",
        "redis://:secret@node7:port",
        "redis://:secret@node7:99999",
        "redis://:secret@[node7",
        "rediss://",
        "unix://",
        "unix://run.sock",
        "file://node7/broker.json",
        "file://broker.json",
        "file:///a%00b",
        "file://",
    ],
)
def test_a_url_that_names_no_server_is_refused_without_showing_its_password(url):
    with pytest.raises(ValueError, match=r"file:///path/broker.json|names no server") as caught:
        endpoint.resolve(url)
    assert "secret" not in str(caught.value)
    assert "cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://node7:6379/0", "redis://node7:6379/0"),
        ("redis://user@node7", "redis://user@node7"),
        ("redis://:secret@node7", "redis://:***@node7"),
        ("rediss://me:secret@node7:1/0", "rediss://me:***@node7:1/0"),
        ("redis://me:se@cr:et/@node7", "redis://me:***@node7"),
        ("unix://:secret@/run/redis.sock", "unix://:***@/run/redis.sock"),
        ("unix:///run/x?db=1&password=se@cret&a=b", "unix:///run/x?db=1&password=***&a=b"),
        ("rediss://h?ssl_password=secret", "rediss://h?ssl_password=***"),
        ("me:secret@node7", "me:***@node7"),
        ("file:///run/broker.json", "file:///run/broker.json"),
    ],
)
def test_a_redacted_url_shows_all_but_the_password(url, shown):
    assert endpoint.redact(url) == shown


@given(written=ENDPOINTS, before=st.text(max_size=5), after=st.text(max_size=5))
def test_no_password_survives_redaction_encoded_or_not(written, before, after):
    secret = dataclasses.replace(written, password=f"{before}s3cr3t{after}")
    for url in (secret.url(), f"redis://{secret.user.replace('@', '')}:{secret.password}@node7"):
        assert "s3cr3t" not in endpoint.redact(url)


def test_no_text_made_of_an_endpoint_shows_the_password():
    assert "p/w" not in repr(SOME)
    assert "p/w" not in f"{SOME}"
    assert "p%2Fw" not in repr(SOME)
