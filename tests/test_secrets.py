"""Passwords are seen by nobody, and without one nothing answers."""

import json
import logging
import os
import socket
import subprocess
import sys
import textwrap
from contextlib import contextmanager, suppress
from dataclasses import replace

import psutil
import pytest
import redis

import synthbroker as sb
from servers import any_binary, eventually
from synthbroker import acl, cli, endpoint, monitor, server
from synthbroker.acl import Grant
from synthbroker.connection import Connection
from synthbroker.errors import ServerRefusedError, SynthbrokerError
from synthbroker.server import ServerConfig

MARK = "mark3r-Pa55word"
GENERATED = """
import numpy as np
def slow(worker):
    for i in range(10**9):
        yield {"x": np.zeros(1000, np.float32)}
"""
TRAINER = """
import logging, sys
logging.basicConfig(level=logging.DEBUG)
import synthbroker as sb
if __name__ == "__main__":
    data = sb.RingDataset(ring="r", group="g", batch_size=1, wait_s=30)
    print(data, repr(data))
    for batch in data.loader(num_workers=1, multiprocessing_context="spawn"):
        print(batch.info, flush=True)
"""


@pytest.fixture(autouse=True)
def own_server_program(monkeypatch, tmp_path):
    monkeypatch.setenv("SYNTHBROKER_REDIS_SERVER", str(any_binary().path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@contextmanager
def running(folder, *words, log, **environment):
    """Run a program while the block lasts; what it says goes to a file."""
    with (folder / log).open("ab") as out:
        variables = {**os.environ, "TMPDIR": str(folder), **environment}
        process = subprocess.Popen([sys.executable, *words], cwd=folder, env=variables, stdout=out, stderr=out)
    try:
        yield process
    finally:
        family = tree(process.pid) if process.poll() is None else []
        process.terminate()
        try:
            process.wait(30)
        finally:
            for one in family:
                with suppress(psutil.NoSuchProcess, ProcessLookupError):
                    one.kill()


def family(*processes):
    return [one for process in processes for one in tree(process.pid)]


def tree(pid):
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def served(folder):
    path = folder / "broker.json"
    eventually(path.exists, "the endpoint file is there")
    return endpoint.read(path)


COMMAND = ("-m", "synthbroker")
GENERATE = (*COMMAND, "generate", "gen:slow", "--ring", "r", "--capacity", "1MB", "--when-full", "drop-oldest",
            "--workers", "2", "-vv")  # fmt: skip
SERVE = (*COMMAND, "serve", "--host", "0.0.0.0", "--endpoint", "broker.json", "-vv")
LOOKS = ("status r", "status r --json", "audit r", "peek r", "quarantine r", "acl viewer --ring r")


@pytest.fixture(scope="module")
def busy(tmp_path_factory):
    """Give a folder, an endpoint and processes: a server for all addresses, a generator and a trainer at work."""
    folder = tmp_path_factory.mktemp("busy")
    (folder / "gen.py").write_text(textwrap.dedent(GENERATED))
    (folder / "trainer.py").write_text(textwrap.dedent(TRAINER))
    url = (folder / "here.json").as_uri()
    own = {"SYNTHBROKER_REDIS_SERVER": str(any_binary().path)}
    with running(folder, *SERVE, "--grant", f"viewer:r={folder / 'v.json'}", log="serve", **own) as serving:
        there = served(folder)
        endpoint.write(folder / "here.json", replace(there, host="127.0.0.1"))
        with (
            running(folder, *GENERATE, "--url", url, log="generate") as generating,
            running(folder, "trainer.py", log="train", SYNTHBROKER_URL=url) as training,
        ):
            eventually(lambda: "BatchInfo" in (folder / "train").read_text(), "the trainer trains", deadline_s=60)
            yield folder, there, family(serving, generating, training)


def test_a_password_is_in_no_command_line_environment_log_or_output(busy, capfd):
    folder, there, processes = busy
    assert len(processes) >= 7  # with the server, two workers, a worker of the DataLoader
    seen = "".join(" ".join(one.cmdline()) + json.dumps(one.environ()) for one in processes)
    for words in LOOKS:
        cli.main([*words.split(), "--url", (folder / "here.json").as_uri()])
    (home,) = folder.glob("synthbroker-*")
    logs = (home / "redis.log", *(folder / log for log in ("serve", "generate", "train")))
    seen += "".join([*capfd.readouterr(), *(log.read_text() for log in logs)])
    assert all(word in seen for word in ("RingDataset", "serving on", "committed", "ACL SETUSER"))
    for secret in (there.password, endpoint.read(folder / "v.json").password):
        assert len(secret) >= 32
        assert secret not in seen


def act_as_all(url):
    """Do what fails, in every way; give all that is said of it, tracebacks and reprs included."""
    said = []
    for act in (
        lambda: monitor.status("r", url=url),
        lambda: sb.Producer(url, ring="r", reconnect_s=0.2).put({"x": 1}),
        lambda: next(iter(sb.Consumer(url, ring="r", group="g", batch_size=1, wait_s=0.2, reconnect_s=0.2))),
        lambda: sb.peek("r", url=url),
    ):
        with pytest.raises((SynthbrokerError, ValueError)) as caught:
            act()
        said.append(f"{caught.getrepr(style='long')} {caught.value!r}")
    return said


def url_of(running, *, password=MARK, port=None):
    return f"redis://:{password}@127.0.0.1:{port or running.endpoint.port}/0"


def test_a_password_is_in_no_error_and_no_log_record(tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    with server.start(ServerConfig(password=MARK)) as one, server.start(ServerConfig(password="another")) as other:
        said = act_as_all(url_of(other))
        said += act_as_all(url_of(one, port=1))
        said += act_as_all(f"http://:{MARK}@h")
        said += act_as_all(f"redis://:{MARK}@h:nonsense/")
        said += [repr(thing) for thing in (one, one.endpoint, ServerConfig(password=MARK), Connection(url_of(one)))]
        for words in (["status", "r", "-vv"], ["end", "r", "-vv"], ["drop", "r", "--yes", "-vv"]):
            for url in (url_of(one), url_of(other)):
                with pytest.MonkeyPatch.context() as patch:
                    patch.setenv("SYNTHBROKER_URL", url)
                    assert cli.main(words) == 1
    assert MARK not in "".join(said) + caplog.text + "".join(capfd.readouterr())
    assert "refuses: wrong or missing password" in "".join(said)


def test_a_password_on_the_command_line_is_refused_and_not_repeated(capfd):
    for url in (f"redis://:{MARK}@h:1", f"rediss://me:{MARK}@h/0", f"unix://:{MARK}@/s"):
        with pytest.raises(SystemExit):
            cli.main(["status", "r", "--url", url])
        said = "".join(capfd.readouterr())
        assert "SYNTHBROKER_URL" in said
        assert MARK not in said


def test_the_server_itself_does_not_write_passwords_down(tmp_path):
    with server.start(ServerConfig(password=MARK)) as running:
        endpoint.write(tmp_path / "b.json", running.endpoint)
        connection = Connection((tmp_path / "b.json").as_uri())
        acl.grant(connection, Grant("viewer", ("r",), tmp_path / "v.json"), running.endpoint)
        with pytest.raises(ServerRefusedError):
            monitor.status("r", url=url_of(running, password="wrong"))
        told = connection.call("ACL", "LIST"), connection.call("SLOWLOG", "GET"), connection.call("ACL", "LOG")
        (home,) = tmp_path.glob("synthbroker-*")
        told += ((home / "redis.log").read_text(), " ".join(psutil.Process(running.endpoint.pid).cmdline()))
        connection.close()
    for secret in (MARK, endpoint.read(tmp_path / "v.json").password):
        assert secret not in str(told)


# -- the scan


def listening(processes):
    """List the TCP ports that these processes listen on, and on which address."""
    found = [place for one in processes for place in one.net_connections("tcp")]
    return {(place.laddr.ip, place.laddr.port) for place in found if place.status == psutil.CONN_LISTEN}


def reply_to(port, *words):
    with socket.create_connection(("127.0.0.1", port), timeout=5) as bare:
        bare.sendall(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words))
        return bare.recv(1000)


def test_nothing_that_listens_answers_without_a_password(busy):
    folder, there, processes = busy
    assert listening(processes) == {("0.0.0.0", there.port)}
    client = redis.Redis.from_url(endpoint.resolve((folder / "here.json").as_uri()))
    names = [one.upper().encode() for one in client.command()] if client.ping() else []
    client.close()
    assert len(names) > 200
    answered = set()
    for name in names:
        for more in ((), (b"0",), (b"0", b"sb:{r}:meta")):
            if not reply_to(there.port, name, *more).startswith((b"-NOAUTH", b"-ERR", b"-EXECABORT")):
                answered.add(name)
    assert answered <= {b"QUIT", b"RESET", b"HELLO", b"AUTH"}
    assert reply_to(there.port, b"AUTH", b"").startswith(b"-WRONGPASS")
    assert reply_to(there.port, b"AUTH", b"viewer-r", b"").startswith(b"-WRONGPASS")
    assert reply_to(there.port, b"HELLO", b"3").startswith(b"-NOAUTH")
