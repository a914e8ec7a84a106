"""One sentence about a ring: from a table, and from real producers and readers that wait for each other."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest

import synthbroker as sb
from faults.proxy import proxy
from servers import RealServer, eventually
from synthbroker import admin, cli, monitor, shares, states
from synthbroker import ring as rings
from synthbroker.advice import Signs, Unheard, advise
from synthbroker.bench.throttle import Valve
from synthbroker.errors import SynthbrokerError
from synthbroker.states import RingStatus
from tools import number

CALM = Signs("brains", False, 42, 4, 0.0, 0.0, "train", 0.0, 0.0, 0.0, None)

ONE = Unheard("generator", "", 1, 1, 12.0)
READERS = Unheard("reader", " of group val", 2, 2, 12.0)

TABLE: list[tuple[dict[str, Any], str]] = [
    ({}, "nothing to do: neither side waits for the other"),
    ({"blocked": 0.09, "starved": 0.09, "dry": 0.9, "sending": 0.9}, "nothing to do: neither"),
    ({"ended": True, "generators": 0, "starved": 0.9}, "nothing to do: the ring has ended"),
    ({"ended": True, "deserted": "val", "deserted_left": 1}, "the ring has ended, but group val has 1 sample left"),
    (
        {"generators": 0, "group": None, "deserted": "val", "deserted_left": 7},
        "no generator is alive, and group val has 7 samples left to read and no reader: start some",
    ),
    ({"generators": 0, "group": None}, "no generator is alive: start some with `synthbroker generate … --ring brains`"),
    ({"generators": 0, "waits": "val"}, "no generator is alive, and group val waits for it: start"),
    ({"generators": 0}, "no generator is alive: start some"),
    ({"generators": 0, "left": 20}, "no generator is alive; group train has 20 samples left to read: start some"),
    ({"generators": 0, "generators_unheard": ONE, "starved": 0.9}, "no advice on rates: the generator has not been"),
    ({"generators": 0, "generators_unheard": ONE, "waits": "train"}, "group train waits for a generator that has not"),
    ({"generators": 3, "generators_unheard": ONE, "starved": 0.5, "dry": 0.5}, "more generators: about 6 instead of 3"),
    ({"group": None, "readers_unheard": (READERS,)}, "no advice on rates: 2 of 2 readers of group val have not been"),
    ({"begun": False, "blocked": 0.5}, "nothing yet: group train has just begun to read"),
    ({"group": None, "blocked": 1.0}, "nobody reads ring brains: start the training"),
    ({"blocked": 0.1}, "generators are faster than the training, and slower ones would do; or use more"),
    ({"blocked": 0.5}, "fewer generators would do: about 2 instead of 4; or use more of what they make"),
    ({"blocked": 1.0}, "fewer generators would do: about 1 instead of 4"),
    ({"blocked": 1.0, "generators": 1}, "generators are faster than the training"),
    ({"starved": 0.5, "dry": 0.5}, "more generators: about 8 instead of 4, because group train finds the ring empty"),
    ({"starved": 0.9, "dry": 0.9}, "more generators: about 40 instead of 4"),
    ({"starved": 0.99, "dry": 0.9}, "more generators: more than 40 instead of 4"),
    ({"starved": 0.5, "dry": 0.5, "sending": 0.5}, "broker- or network-bound: generators spend 50% of their time"),
    ({"starved": 0.5, "dry": 0.0}, "broker- or network-bound, or busy unpacking: samples are there, and group train"),
    ({"starved": 0.5, "blocked": 0.5}, "broker- or network-bound, or busy unpacking"),
    (
        {"starved": 0.5, "blocked": 0.5, "dry": 0.5},
        "a bigger ring: both sides wait in turn, because it holds too few samples (now 42)",
    ),
    ({"starved": 0.5, "blocked": 0.5, "dry": 0.5, "behind": "val"}, "group val holds the ring up, and group train"),
    ({"starved": 0.5, "dry": 0.5, "behind": "val"}, "more generators"),
    ({"lost": 0.3}, "group train never saw 30% of what was made: fewer generators would do"),
    ({"lost": 0.3, "starved": 0.5, "dry": 0.5}, "more generators"),
]


@pytest.mark.parametrize(("signs", "words"), TABLE)
def test_who_waits_says_what_is_short(signs: dict[str, Any], words: str) -> None:
    assert advise(replace(CALM, **signs)).startswith(words)


# -- with real ones

GENERATOR = """
import sys, time
import numpy as np
import synthbroker as sb
from synthbroker import ring
ring.BEAT_S = 0.1
with sb.Producer(sys.argv[1], ring=sys.argv[2], codec="raw") as out:
    while True:
        time.sleep(0.05)
        out.put({"x": np.zeros(4, np.float32)})
"""


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let heartbeats come often, and the past be forgotten soon."""
    monkeypatch.setattr(rings, "BEAT_S", 0.1)
    monkeypatch.setattr(shares, "WINDOW_S", 1.0)


class Scene:
    """Producers and readers of a ring, each in a thread, that pause between samples and between batches."""

    def __init__(self, url: str, ring: str) -> None:
        self.url, self.ring = url, ring
        self.over = threading.Event()
        self.threads: list[threading.Thread] = []
        self.producers: list[sb.Producer] = []

    def _begin(self, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
            except (SynthbrokerError, ValueError):  # stopped while it waited for the other side
                assert self.over.is_set()

        self.threads.append(threading.Thread(target=run, daemon=True))
        self.threads[-1].start()

    def generate(self, pause_s: float, *, url: str = "", size: int = 4, **options: Any) -> None:
        out = sb.Producer(url or self.url, ring=self.ring, codec="raw", in_flight="1MB", **options)
        self.producers.append(out)

        def work() -> None:
            while not self.over.wait(pause_s):
                out.put(number(0, size))

        self._begin(work)

    def train(self, pause_s: float, group: str = "train", *, url: str = "", **options: Any) -> None:
        def work() -> None:
            reader = sb.Consumer(url or self.url, ring=self.ring, group=group, **options)
            for _ in reader:
                if self.over.wait(pause_s):
                    break
            reader.close()

        self._begin(work)

    def status(self) -> RingStatus:
        return monitor.status(self.ring, url=self.url)

    def advises(self, words: str, holds_too: Callable[[RingStatus], bool] = lambda _: True) -> RingStatus:
        """Wait until the status says so, whatever it said when all began; gives it."""
        found: list[RingStatus] = []

        def holds() -> bool:
            try:
                found.append(self.status())
            except SynthbrokerError:
                return False
            return found[-1].advice.startswith(words) and holds_too(found[-1])

        try:
            eventually(holds, words)
        except AssertionError as error:
            raise AssertionError(f"{error}; it said {found[-1]}") from error
        return found[-1]

    def stop_generators(self) -> None:
        """Have all of them leave, wherever they are."""
        self.over.set()
        for producer in self.producers:
            with suppress(SynthbrokerError):
                producer.leave(flush_s=0.0)

    def end(self) -> None:
        """Stop all; readers are woken by the end of the ring."""
        self.stop_generators()
        admin.end(self.ring, url=self.url)
        for thread in self.threads:
            thread.join(20)
            assert not thread.is_alive()


@pytest.fixture
def scene(server: RealServer, ring_name: str) -> Iterator[Scene]:
    one = Scene(server.url, ring_name)
    yield one
    one.end()


def test_a_slow_training_needs_fewer_generators(scene: Scene) -> None:
    for _ in range(2):
        scene.generate(0.0, max_samples=20)
    scene.train(0.05)
    status = scene.advises("fewer generators would do: about 1 instead of 2")
    assert status.blocked_share > 0.5
    assert status.groups["train"].starved_share is not None
    assert status.groups["train"].starved_share < 0.1
    assert all(one.blocked_ever_share > 0 for one in status.producers.values())


def test_slow_generators_need_more_of_them(scene: Scene) -> None:
    scene.generate(0.1, max_samples=20)
    scene.train(0.0)
    status = scene.advises("more generators: ", lambda status: (status.groups["train"].dry_share or 0) > 0.8)
    assert status.blocked_share < 0.1
    (reader,) = status.groups["train"].consumers.values()
    assert reader.starved_share is not None
    assert reader.starved_share > 0.8


def test_who_is_as_fast_as_the_other_waits_for_nobody(scene: Scene) -> None:
    scene.generate(0.02, capacity="50MB")
    scene.train(0.02, prefetch=8, min_fill=20)
    scene.advises("nothing to do: neither side waits")


def test_a_ring_that_is_all_in_the_readers_hands_should_be_bigger(scene: Scene) -> None:
    scene.generate(0.0, max_samples=4)
    scene.train(0.0, batch_size=4)
    status = scene.advises("a bigger ring: both sides wait in turn, because it holds too few samples (now ")
    assert "acknowledge more often" in status.advice


@pytest.fixture
def distant(own_server: type[RealServer], ring_name: str) -> Iterator[tuple[Scene, str]]:
    """Give a scene, and the URL by which its server is reached through a slow network."""
    server = own_server()
    with proxy(server) as slow:
        slow.valve = Valve(4e6)
        one = Scene(server.url, ring_name)
        yield one, slow.url
        one.end()


def test_a_full_ring_behind_a_slow_network_is_network_bound(distant: tuple[Scene, str]) -> None:
    scene, url = distant
    scene.generate(0.0, size=100_000, capacity="8MB")
    scene.train(0.0, url=url)
    words = "broker- or network-bound, or busy unpacking: samples are there, and group train"
    status = scene.advises(words, lambda status: status.blocked_share > 0.1)
    assert status.fill > 0.5


def test_generators_behind_a_slow_network_are_network_bound(distant: tuple[Scene, str]) -> None:
    scene, url = distant
    scene.generate(0.0, url=url, size=100_000, capacity="8MB")
    scene.train(0.0)
    status = scene.advises("broker- or network-bound: generators spend ")
    assert status.sending_share > 0.5


def test_a_group_that_nobody_reads_is_named(scene: Scene) -> None:
    scene.generate(0.0, max_samples=20, groups=("val",))
    scene.train(0.0)
    scene.advises("group val holds the ring up, and group train waits for it")


def test_a_ring_that_nobody_reads_and_one_that_nobody_fills_say_so(scene: Scene) -> None:
    scene.generate(0.0, max_samples=20)
    scene.advises("nobody reads ring ")
    scene.stop_generators()
    scene.advises("no generator is alive: start some")


def test_a_generator_that_was_killed_is_soon_no_ground_for_advice_on_rates(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states, "HEARD_WITHIN_S", 0.5)
    with subprocess.Popen([sys.executable, "-c", GENERATOR, scene.url, scene.ring]) as generator:
        scene.train(0.0)
        scene.advises("more generators: ")
        generator.kill()
    status = scene.advises("group train waits for a generator that has not been heard of for ")
    assert [one.state for one in status.producers.values()] == ["alive"]
    assert status.samples_per_s == 0


def test_the_advice_is_told_to_people_and_to_programs(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    scene.generate(0.0, max_samples=20)
    scene.train(0.05)
    status = scene.advises("generators are faster than the training")
    assert cli.main(["status", scene.ring, "--url", scene.url]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "idle generators blocked " in said
    assert "; training of group train starved " in said
    assert f"advice {status.advice[:30]}" in said
    assert cli.main(["status", scene.ring, "--url", scene.url, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["advice"] == status.advice
    assert told["blocked_share"] > 0.1
    assert told["groups"]["train"]["starved_share"] < 0.1


@pytest.mark.parametrize("num_workers", [0, 2])
def test_how_long_the_training_loop_waits_is_told_whoever_reads_for_it(scene: Scene, num_workers: int) -> None:
    scene.generate(0.02, max_samples=20)
    dataset = sb.RingDataset(scene.url, ring=scene.ring, group="train")
    busy = threading.Event()

    def starved() -> list[float]:
        consumers = scene.status().groups["train"].consumers.values()
        return [one.starved_ever_share for one in consumers if one.starved_share is not None]

    def shares_after(batches: Any, pause_s: float, count: int) -> list[float]:
        for _, _ in zip(range(count), batches, strict=False):
            busy.wait(pause_s)
        return starved()

    loop = iter(dataset.loader(num_workers=num_workers))
    next(loop)
    hungry = shares_after(loop, 0.0, 120)
    assert len(hungry) == max(num_workers, 1)
    assert min(hungry) > 0.6, "as fast as it can, it waits for the generator"
    calm = shares_after(loop, 0.2, 30)
    assert max(calm) < 0.7 * min(hungry), "and slower than that it does not, though its workers wait ahead of it"
    loop.close()
