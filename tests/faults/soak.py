"""All faults at random for as long as asked, with memory watched: `scripts/soak --minutes N`.

Every half minute a line, in the end a verdict: nothing lost but what an emptied server had, nothing doubled, nothing
corrupt, books that balance, memory that does not grow. Exits with 1 otherwise.
"""

import argparse
import contextlib
import secrets
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import psutil

from faults.proxy import TO_CLIENT, TO_SERVER, Proxy, proxy
from faults.scene import Scene
from servers import RealServer, any_binary
from synthbroker import monitor
from synthbroker.bench.throttle import Valve
from tools import fill_up

LINE_EVERY_S = 30.0
MB = 1_000_000
# By how much each may still grow after the warm-up, the first quarter. Pools hold twice what was lent at once: of four
# samples of 5 MB (a batch, what goes between two flushes) 40 MB, of which half are there after some hundred samples.
# The last 20,000 samples that a reader remembers take 4 MB, the allocator's gaps between varying sizes the rest. The
# server holds the ring, 24 MB, and parts of the killed for a minute.
MAY_GROW = {"server": 16 * MB, "generator": 30 * MB, "trainer": 30 * MB}
GOOD = "verdict: nothing is lost that the server kept, doubled or corrupt; the books balance; memory does not grow"


@dataclass
class Soak:
    """One server behind a proxy, a scene around it, and what was done to them.

    The first generator and the first trainer are left alive: their memory is watched.
    """

    server: RealServer
    wire: Proxy
    it: Scene
    done: Counter[str] = field(default_factory=Counter)
    memory: list[tuple[int, ...]] = field(default_factory=list)  # as in MAY_GROW
    committed: list[int] = field(default_factory=list)  # at the same time

    def restart_server(self) -> None:
        self.server.restart()

    def empty_server(self) -> None:
        self.server.client().flushall()
        self.it.may_be_lost()

    def forget_scripts(self) -> None:
        self.server.client().script_flush()

    def stop_server(self) -> None:
        self.server.suspend()
        self._last(3.0)
        self.server.resume()

    def make_read_only(self) -> None:
        self.server.client().replicaof("127.0.0.1", 1)
        self._last(2.0)
        self.server.client().replicaof("no", "one")

    def take_its_memory(self) -> None:
        ballast = fill_up(self.server)
        self._last(2.0)
        self.server.client().delete(*ballast)

    def cut_all(self) -> None:
        for _ in range(5):
            self.wire.cut()
            self._last(0.2)

    def cut_within(self) -> None:
        self.wire.cut_after(self.it.random.randrange(5 * MB), self.it.random.choice([TO_SERVER, TO_CLIENT]))
        self._last(1.0)

    def lose_answer(self) -> None:
        self.wire.lose_answer_to(self.it.random.choice(["room", "commit", "take", "ack", "beat"]))
        self._last(1.0)

    def lose_request(self) -> None:
        self.wire.lose_answer_to(self.it.random.choice(["room", "commit", "take", "ack"]), carried_out=False)
        self._last(1.0)

    def slow_link(self) -> None:
        self.wire.delay_s, self.wire.valve = 0.002, Valve(20 * MB)
        self._last(3.0)
        self.wire.delay_s, self.wire.valve = 0.0, None

    def kill_generator(self) -> None:
        self.it.random.choice(self.it.generators[1:]).restart()

    def kill_trainer(self) -> None:
        self.it.random.choice(self.it.trainers[1:]).restart()

    def stop_trainer(self) -> None:
        trainer = self.it.random.choice(self.it.trainers[1:])
        trainer.pause()
        self._last(4.0)
        trainer.resume()

    def _last(self, most_s: float) -> None:
        """Let a fault last; meanwhile a generator or trainer may die as well."""
        time.sleep(self.it.random.random() * most_s / 2)
        if self.it.random.random() < 0.3:
            self.it.random.choice([self.kill_generator, self.kill_trainer])()
            self.done["and one killed meanwhile"] += 1
        time.sleep(self.it.random.random() * most_s / 2)

    def faults(self) -> list[Callable[[], None]]:
        """List all that can be done."""
        return [
            self.restart_server, self.empty_server, self.forget_scripts, self.stop_server, self.make_read_only,
            self.take_its_memory, self.cut_all, self.cut_within, self.lose_answer, self.lose_request, self.slow_link,
            self.kill_generator, self.kill_trainer, self.stop_trainer,
        ]  # fmt: skip

    def run(self, seconds: float) -> None:
        """Do one after the other at random, and see each time that all goes on."""
        began = next_line = time.monotonic()
        while (now := time.monotonic()) < began + seconds:
            self.measure()
            if now >= next_line:
                next_line += LINE_EVERY_S
                print(self.line(now - began) + self.look(), flush=True)
            fault = self.it.random.choice(self.faults())
            self.done[fault.__name__.replace("_", " ")] += 1
            with self.it.fault():
                fault()
            time.sleep(self.it.random.random())

    def line(self, passed_s: float) -> str:
        """Tell how it goes."""
        self.it.fill_row()
        row = self.it.row
        return (
            f"{passed_s:5.0f} s  {row.injected:4d} faults, {row.committed:7d} committed, {row.delivered:7d} delivered, "
            f"{row.again} again, {row.doubled} doubled, {row.corrupt} corrupt, slowest to go on {row.recovered_s:.1f} s"
        )

    def look(self) -> str:
        """Check the books, and tell the memory of server, generator and trainer."""
        ledger = monitor.status(self.it.ring, url=self.server.url).ledger
        assert ledger.balanced, [one for one in ledger.equations if one.difference]
        return "; MB: server {:.0f}, generator {:.0f}, trainer {:.0f}".format(*(n / MB for n in self.memory[-1]))

    def measure(self) -> None:
        """Note what server, generator and trainer hold now."""
        watched = [psutil.Process(one.process.pid) for one in (self.it.generators[0], self.it.trainers[0])]
        used: int = self.server.client().info("memory")["used_memory"]
        self.memory.append((used, *(one.memory_info().rss for one in watched)))
        self.committed.append(len(self.it.account.committed))

    def growth(self) -> Iterator[tuple[str, float, float, int]]:
        """Compare the last quarter with the second one, means of both; gives name, before, after, most."""
        quarter = max(len(self.memory) // 4, 1)
        for name, values in zip(MAY_GROW, zip(*self.memory, strict=True), strict=True):
            yield name, fmean(values[quarter : 2 * quarter] or values), fmean(values[-quarter:]), max(values)

    def grown(self) -> list[str]:
        """Name what took so much more memory than after the warm-up that it seems to grow for ever."""
        return [
            f"{name} grew from {before / MB:.0f} to {after / MB:.0f} MB; it may by {MAY_GROW[name] / MB:.0f}"
            for name, before, after, _ in self.growth()
            if after - before > MAY_GROW[name]
        ]

    def tell_memory(self) -> Iterator[str]:
        """Tell what each kind of process held, and how small a leak would have been seen."""
        yield "memory, MB   after warm-up   at the end    most   may grow by"
        for name, before, after, most in self.growth():
            yield f"{name:<10}{before / MB:16.0f}{after / MB:13.0f}{most / MB:8.0f}{MAY_GROW[name] / MB:14.0f}"
        between = len(self.committed) * 5 // 8  # from the middle of the second quarter to that of the last one
        samples = (self.committed[-1] - self.committed[-1 - between]) / 3 if between else 0
        if samples:
            yield f"a leak of {MAY_GROW['generator'] / samples:.0f} bytes a sample would show"


@contextlib.contextmanager
def soaking(seed: str) -> Iterator[Soak]:
    """Start everything; end it in the end."""
    server = RealServer(any_binary(), appendonly="yes", appendfsync="always", maxmemory="128mb")  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory(prefix="soak-") as folder, proxy(server) as wire:
        it = Scene(server, wire.url, "soak", Path(folder), "soak", seed)
        try:
            for _ in range(3):
                it.generator(pause_s=0.005, flush_every=4)
            for _ in range(3):
                it.trainer()
            it.trained()
            yield Soak(server, wire, it)
        finally:
            it.close()
            server.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", default=secrets.token_hex(4))
    told = parser.parse_args()
    print(f"seed {told.seed}", flush=True)
    with soaking(told.seed) as soak:
        began = time.monotonic()
        try:
            soak.run(60 * told.minutes)
            soak.it.finish()
            soak.it.check_nothing_doubled()
            wrong = soak.grown()
        except (AssertionError, psutil.NoSuchProcess) as error:
            wrong = [soak.it.tell(), f"{error}" or "see above"]
        print(soak.line(time.monotonic() - began))
        for name, times in sorted(soak.done.items()):
            print(f"{times:14d}  {name}")
        print(*soak.tell_memory(), sep="\n")
        print(f"lost: {len(soak.it.account.lost)}; an emptied server may have lost {len(soak.it.allowed)}")
    print(*(wrong or [GOOD]), sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
