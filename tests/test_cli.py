"""The command line, in this process and as a program of its own."""

import contextlib
import json
import logging
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from servers import any_binary, eventually
from synthbroker import cli, monitor, shell
from synthbroker.producer import Producer

GENERATOR = """
import numpy as np
def brains(worker):
    for i in range(4):
        yield {"image": np.full((1, 8, 8, 8), i, np.float32), "label": np.ones((8, 8, 8), np.uint8)}
def bad(worker):
    yield from brains(worker)
    raise RuntimeError("no more brains")
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Work in a folder of the test's own, with nothing of the user's environment; keep log levels as they are."""
    for name in list(os.environ):
        if name.startswith(("SYNTHBROKER_", "SLURM_", "REDISCLI_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SYNTHBROKER_REDIS_SERVER", str(any_binary().path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gen.py").write_text(GENERATOR)
    level = logging.getLogger("synthbroker").level
    yield tmp_path
    logging.getLogger("synthbroker").setLevel(level)


@pytest.fixture
def filled(server, ring_name, monkeypatch):
    """Make a ring with three samples and a group that was given one of them; point the environment at its server."""
    monkeypatch.setenv("SYNTHBROKER_URL", server.url)
    with Producer(server.url, ring=ring_name, name="maker", producers=5, groups=("train",), info={"classes": 4}) as out:
        for i in range(3):
            out.put({"x": np.full((4, 4), i, np.float32)}, recipe={"seed": i}, metadata={"site": "A"})
    return ring_name


def main(*words):
    return cli.main([str(word) for word in words])


def program(*words):
    return [sys.executable, "-m", "synthbroker", *map(str, words)]


def run(*words, **options):
    return subprocess.run(program(*words), capture_output=True, text=True, timeout=60, check=False, **options)


# -- all of it, as a user would


def test_a_session_from_serve_to_drop(tmp_path):
    serving = subprocess.Popen(program("serve", "--maxmemory", "100MB"), stdout=subprocess.PIPE, text=True)
    try:
        lines = [serving.stdout.readline() for _ in range(4)]
        endpoint = tmp_path / ".synthbroker" / "broker.json"
        assert "at most 100 MB of memory" in lines[0]
        assert f"  export SYNTHBROKER_URL={endpoint.as_uri()}\n" in lines
        assert json.loads(endpoint.read_text())["password"] not in "".join(lines)

        made = run("generate", "gen:brains", "--ring", "brains", "--workers", "2", "--keep-open")
        assert (made.returncode, made.stdout.partition(" (")[0]) == (0, "8 samples in ring brains"), made.stderr
        if shell.find_client() is not None:
            code = 'eval "$("$@" env)"; redis-cli PING; redis-cli XLEN "sb:{brains}:samples"'
            asked = subprocess.run(["bash", "-c", code, "-", *program()], capture_output=True, text=True, check=True)
            assert (asked.stdout, asked.stderr) == ("PONG\n8\n", "")
        status = json.loads(run("status", "brains", "--json").stdout)
        assert (status["live"], status["ended"], status["ledger"]["balanced"]) == (8, False, True)
        looked = run("peek", "brains", "--png", "look.png")
        assert looked.returncode == 0, looked.stderr
        assert (tmp_path / "look.png").read_bytes().startswith(b"\x89PNG")
        assert run("end", "brains").returncode == 0
        assert "ended" in run("status", "brains").stdout
        assert run("drop", "brains", "--yes").returncode == 0
        assert run("status", "brains").returncode == 1
    finally:
        serving.send_signal(signal.SIGINT)
        stdout, _ = serving.communicate(timeout=20)
    assert (serving.returncode, stdout.splitlines()[-1]) == (0, "stopped")
    assert not endpoint.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_serve_ends_cleanly_by_signals_and_may_listen_on_a_socket(tmp_path, number):
    socket, endpoint = tmp_path / "redis.sock", tmp_path / "a b" / "broker.json"
    words = ("serve", "--unix-socket", socket, "--url", endpoint.as_uri(), "--maxmemory", "50MB")
    serving = subprocess.Popen(program(*words), stdout=subprocess.PIPE, text=True)
    try:
        assert serving.stdout.readline().startswith(f"serving on {socket} ")
        assert json.loads(endpoint.read_text())["port"] is None
        assert run("status", "none", "--url", endpoint.as_uri()).stderr.startswith(
            "synthbroker: error: there is no ring"
        )
    finally:
        serving.send_signal(number)
        serving.communicate(timeout=20)
    assert serving.returncode == 0
    assert not endpoint.exists()
    assert not socket.exists()


def test_a_generator_that_raises_ends_with_its_own_traceback_and_one_line(server, ring_name):
    made = run("generate", "gen:bad", "--ring", ring_name, "--url", server.url)
    assert (made.returncode, made.stdout) == (1, "")
    assert 'raise RuntimeError("no more brains")' in made.stderr
    assert "synthbroker/" not in made.stderr
    assert made.stderr.splitlines()[-1].startswith("synthbroker: error: worker 0 of gen:bad failed: RuntimeError")


# -- what a user gets wrong


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["status", "nosuch"], "there is no ring 'nosuch'"),
        (["peek", "nosuch"], "there is no ring 'nosuch'"),
        (["end", "nosuch"], "there is no ring 'nosuch'"),
        (["drop", "nosuch", "--yes"], "there is no ring 'nosuch'"),
        (["drop", "nosuch"], "--yes"),
        (["drop", "RING", "--group", "val"], "no group 'val': its groups are train"),
        (["status", "r", "--watch"], "there is no ring"),
        (["status", "RING", "--watch"], "--watch needs a terminal"),
        (["status", "--watch"], "--watch needs a ring's name"),
        (["status", "r", "--url", "http://node7"], "not a server's URL"),
        (["status", "r", "--url", "file:///no/broker.json"], "no endpoint file"),
        (["status", "r", "--url", "unix:///no/redis.sock"], "does not answer"),
        (["peek", "RING", "--png", "/no/such/folder/look.png"], "No such file or directory"),
        (["peek", "RING", "--png", "look.potato"], "potato"),
        (["serve", "--url", "redis://node7"], "--endpoint"),
        (["serve", "--host", "no such host"], "cannot listen"),
        (["serve", "--maxmemory", "900TB"], "maxmemory"),
        (["serve", "--maxmemory", "10kB"], "between 4 MB and"),
        (["generate", "gen", "--ring", "r"], "module:function"),
        (["generate", "gen:brains", "--ring", "r", "--name", "a b"], "cannot name a producer"),
        (["generate", "gen:brains", "--ring", "r", "--codec", "zip"], "zip"),
        (["generate", "gen:brains", "--ring", "RING", "--capacity", "7MB"], "capacity"),
        (["generate", "no_such:brains", "--ring", "RING"], "no module 'no_such'"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_exit_code_one(filled, capfd, monkeypatch, words, message):
    with Path(os.devnull).open() as nobody:
        monkeypatch.setattr(sys, "stdin", nobody)
        assert main(*[filled if word == "RING" else word for word in words]) == 1
    stdout, stderr = capfd.readouterr()
    (line,) = [line for line in stderr.splitlines() if line.startswith("synthbroker: ")]
    assert line.startswith("synthbroker: error: ")
    assert message in line
    assert "Traceback" not in stderr
    assert stdout == ""


def test_status_without_a_name_lists_the_rings(filled, server, capsys):
    Producer(server.url, ring=f"{filled}-2", producers=1, capacity="1MB").__enter__().close()
    assert main("status") == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"ring {filled}: 3 samples, 0.0% full, " in "\n".join(lines)
    assert f"ring {filled}-2: 0 samples, 0.0% full, ended" in lines
    assert main("status", "--json") == 0
    assert {filled, f"{filled}-2"} <= {ring["ring"] for ring in json.loads(capsys.readouterr().out)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "COMMAND"),
        (["bake"], "invalid choice: 'bake'"),
        (["peek"], "ring"),
        (["serve", "--memory", "3GB"], "--memory 3GB (is --maxmemory meant?)"),
        (["peek", "r", "--n", "3"], "synthbroker peek: error: unrecognized arguments: --n 3 (is -n meant?)"),
        (["status", "r", "--potato"], "--potato"),
        (["status", "a b"], "cannot name a ring"),
        (["status", "r", "--json", "--watch"], "not allowed with"),
        (["status", "r", "--every-s", "-1"], "seconds from 0"),
        (["status", "r", "--every-s", "nan"], "seconds from 0"),
        (["peek", "r", "-n", "0"], "a whole number from 1, got '0'"),
        (["drop", "r", "--group", "*"], "cannot name a group"),
        (["serve", "--port", "70000"], "a whole number from 0 to 65535"),
        (["serve", "--maxmemory", "8 potatoes"], "500MB"),
        (["generate", "gen:brains"], "--ring"),
        (["generate", "gen:brains", "--ring", "r", "--workers", "two"], "a whole number from 1, got 'two'"),
        (["generate", "gen:brains", "--ring", "r", "--when-full", "explode"], "drop-oldest"),
        (["generate", "gen:brains", "--ring", "r", "--info", "[1]"], "JSON object"),
        (["generate", "gen:brains", "--ring", "r", "--info", "{"], "must be a JSON object"),
        (["generate", "gen:brains", "--ring", "r", "--schema", "x:f31[2]"], "unknown dtype 'f31'"),
        (["generate", "gen:brains", "--ring", "r", "--fields", "a b"], "cannot name a field"),
        (["generate", "gen:brains", "--ring", "r", "--cast", "x:float17"], "unknown cast 'float17'"),
        (["generate", "gen:brains", "--ring", "r", "--cast", "x:float16 x:bfloat16"], "name each field once"),
        (["generate", "gen:brains", "--ri", "r"], "--ring"),
    ],
)
def test_wrong_usage_names_the_cure_and_ends_with_two(capsys, words, message):
    with pytest.raises(SystemExit) as caught:
        main(*words)
    assert caught.value.code == 2
    stderr = capsys.readouterr().err
    assert message in stderr.splitlines()[-1]


def test_without_any_server_the_line_says_how_to_start_one():
    ran = run("status", "brains")
    assert ran.returncode == 1
    assert "synthbroker serve" in ran.stderr
    assert ran.stderr.count("\n") == 1


def test_verbose_shows_where_an_error_came_from(server):
    ran = run("status", "nosuch", "--url", server.url, "-v")
    assert "Traceback" in ran.stderr
    assert ran.stderr.splitlines()[-1].startswith("synthbroker: error: there is no ring")


# -- help


@pytest.mark.parametrize("command", ["serve", "generate", "status", "peek", "end", "drop", "env"])
def test_every_command_has_help_with_examples_and_takes_a_url(capsys, command):
    with pytest.raises(SystemExit) as caught:
        main(command, "--help")
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert "examples:" in text
    assert "--url" in text
    assert f"synthbroker {command}" in text


def test_the_first_help_tells_how_to_start_and_the_version_is_known(capsys):
    for words in (["--help"], ["--version"]):
        with pytest.raises(SystemExit) as caught:
            main(*words)
        assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "synthbroker serve" in text
    assert "synthbroker 0." in text


# -- status, peek, end, drop, env


def test_status_without_a_terminal_is_plain_text(filled, capsys):
    assert main("status", filled) == 0
    text = capsys.readouterr().out
    assert f"ring {filled}" in text
    assert "3 samples" in text
    assert "ledger: balanced" in text
    assert "\x1b" not in text
    assert main("audit", filled) == 0
    assert [line for line in (text + capsys.readouterr().out).splitlines() if line.endswith(" ")] == []


def test_status_as_json_is_all_there_is(filled, server, capsys):
    assert main("status", filled, "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert (content["ring"], content["live"], content["info"]) == (filled, 3, {"classes": 4})
    assert content["producers"]["maker"]["state"] == "closed"
    assert content["groups"]["train"]["unread"] == 3


@pytest.mark.parametrize("form", ["", "--json"])
def test_a_reader_of_the_output_may_go_away(filled, form):
    line = f"{sys.executable} -m synthbroker status {filled} {form} | true; echo ${{PIPESTATUS[0]}}"
    ran = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stderr == ""
    assert ran.stdout.strip() in ("0", "1", "141")  # 0: we were first, 1: rich noticed it


def test_peek_shows_the_newest_first_and_takes_nothing(filled, server, capsys):
    assert main("peek", filled, "-n", 2) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines if not line.startswith(" ")] == ["3", "2"]
    assert "  x:f32[4,4]  min 2, max 2, mean 2" in lines
    assert '  recipe {"seed": 2}' in lines
    assert '  metadata {"site": "A"}' in lines
    assert monitor.status(filled, url=server.url).groups["train"].unread == 3


def test_peek_into_an_empty_ring_says_so(server, ring_name, capsys):
    with Producer(server.url, ring=ring_name):
        pass
    assert main("peek", ring_name, "--url", server.url) == 0
    assert "holds no samples" in capsys.readouterr().out


def test_end_and_drop_say_what_they_did(filled, server, capsys):
    assert main("end", filled) == 0
    assert monitor.status(filled, url=server.url).ended
    assert main("drop", filled, "--group", "train") == 0
    assert monitor.status(filled, url=server.url).groups == {}
    assert main("drop", filled, "--yes") == 0
    assert server.client().keys(f"sb:{{{filled}}}*") == []
    stdout, stderr = capsys.readouterr()
    assert "alive" not in stderr
    assert stdout.splitlines() == [
        f"ring {filled} has ended",
        f"dropped group train of ring {filled}",
        f"dropped ring {filled}",
    ]


def test_a_ring_that_is_dropped_under_a_producer_comes_again_and_that_is_said(server, ring_name, capsys):
    with Producer(server.url, ring=ring_name, capacity="1MB") as out:
        out.put({"x": 1})
        out.flush()
        assert main("drop", ring_name, "--yes", "--url", server.url) == 0
        assert "will make it anew: 1" in capsys.readouterr().err
        out.put({"x": 2})
        out.flush()
    assert monitor.status(ring_name, url=server.url).live == 1


@pytest.mark.parametrize(("answer", "code", "left"), [(b"\n", 1, 3), (b"n\n", 1, 3), (b"y\n", 0, None)])
def test_dropping_a_ring_asks_at_a_terminal(filled, server, answer, code, left):
    with Terminal(program("drop", filled)) as terminal:
        terminal.expect(b"with 3 samples")
        terminal.type(answer)
        assert terminal.finish() == code
    keys = server.client().keys(f"sb:{{{filled}}}meta")
    assert keys == [] or left is not None
    if left is not None:
        assert monitor.status(filled, url=server.url).live == left


def test_watching_shows_what_changes_until_ctrl_c(filled, server):
    with Terminal(program("status", filled, "--watch", "--every-s", "0.1")) as terminal:
        terminal.expect(b"open")
        terminal.expect(b"3 samples")
        with Producer(server.url, ring=filled) as out:
            out.put({"x": np.zeros((4, 4), np.float32)})
        terminal.expect(b"4 samples")
        terminal.type(b"\x03")
        assert terminal.finish() == 0


def test_env_prints_shell_code_and_nothing_else(server, capsys):
    assert main("env", "--url", server.url) == 0
    assert capsys.readouterr().out.startswith(f"export SYNTHBROKER_URL={server.url}\nunset REDISCLI_AUTH\n")


class Terminal:
    """A program at a terminal of its own."""

    def __init__(self, command):
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            env=os.environ | {"TERM": "xterm", "COLUMNS": "200", "LINES": "60"},
        )  # fmt: skip
        os.close(theirs)
        self._seen = b""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        os.close(self._ours)

    def expect(self, text):
        """Read until the text is there; what came before it is gone then."""

        def there():
            self._seen += os.read(self._ours, 65536)
            return text in self._seen

        eventually(there, text.decode())
        self._seen = self._seen.partition(text)[2]

    def finish(self):
        """Read on until the program has ended: it may have more to say than a terminal holds."""
        with contextlib.suppress(OSError):  # how Linux says that nobody has this terminal open any more
            while os.read(self._ours, 65536):
                pass
        return self.process.wait(30)

    def type(self, keys):
        if keys == b"\x03":  # the session has no controlling terminal: the signal is sent by hand
            self.process.send_signal(signal.SIGINT)
        else:
            os.write(self._ours, keys)
