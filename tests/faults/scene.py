"""A server, generators and trainers around one ring, faults in between, and a verdict at the end."""

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults import programs
from faults.marks import Account, Id
from servers import RunningServer, eventually
from synthbroker import admin, monitor
from synthbroker.errors import SynthbrokerError
from tools import check_ledger, lasting_parts, owned_parts

RECONNECT_S = 60.0  # what all processes here are told
SOON_S = 40.0  # by then whatever goes on by itself has gone on, on a machine that is busy with other things
GROUP = "train"

_processes: Any = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["pytest", "synthbroker.producer", "synthbroker.consumer"])


@dataclass
class Row:
    """One line of the table.

    Attributes:
        fault: What was done to whom.
        injected: How often.
        committed, delivered: Samples that a flush said were in the ring, and different samples that were trained on.
        again: Those that came again because a reader died, or seemed to; it had not acknowledged them.
        doubled: Those that came again for no such reason.
        lost: Committed, and never trained on.
        corrupt: Not what was put: damaged, torn, or under another's mark.
        recovered_s: From the end of the fault until a sample was trained on that was made after it; the slowest.
    """

    fault: str
    injected: int = 0
    committed: int = 0
    delivered: int = 0
    again: int = 0
    doubled: int = 0
    lost: int = 0
    corrupt: int = 0
    recovered_s: float = 0.0


class Actor:
    """A process of the scene, which may be killed, stopped for a while, and started again."""

    def __init__(self, target: Callable[..., None], key: str, told: dict[str, Any]) -> None:
        self._target, self._key, self._told = target, key, told
        self.life = -1
        self.killed = False
        self.process: Any = None
        self.start()

    def start(self) -> None:
        """Begin the next life."""
        self.life += 1
        self.killed = False
        self.process = _processes.Process(target=self._target, kwargs=self._told | {"life": self.life})
        self.process.start()

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def pause(self) -> None:
        """Let it hang."""
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it as the OOM killer would, at once."""
        self.process.kill()
        self.process.join()
        self.killed = True

    def restart(self) -> None:
        """Kill it and start it again."""
        self.kill()
        self.start()

    def stop(self) -> None:
        """Ask it to end in order."""
        if self.process.is_alive():
            self.process.terminate()

    def join(self) -> int | None:
        """Wait for its end; gives the exit code, 0 where it was killed or stopped on purpose, None where it goes on."""
        self.process.join(SOON_S)
        code: int | None = self.process.exitcode
        expected = self.killed or code == -signal.SIGTERM  # told to stop before it could hear that
        return 0 if expected else code


class Scene:
    """One ring and everybody around it.

    Args:
        server: What the ledger is read from in the end.
        url: How everybody reaches it.
        ring: The ring's name.
        folder: Where diaries and logs are written.
        fault: What the table calls it.
        seed: All random choices come from this.
    """

    def __init__(self, server: RunningServer, url: str, ring: str, folder: Path, fault: str, seed: object) -> None:
        self.server, self.url, self.ring, self.folder = server, url, ring, folder
        self.row = Row(fault)
        self.random = random.Random(f"{seed} {fault}")
        self.account = Account()
        self.allowed: set[Id] = set()  # what the server may have lost
        self.generators: list[Actor] = []
        self.trainers: list[Actor] = []

    def generator(self, **options: Any) -> Actor:
        """Start a generator; what is not said is usual."""
        usual = {"capacity": "24MB", "groups": (GROUP,), "codec": "raw", "reconnect_s": RECONNECT_S}
        who = {"number": len(self.generators), "seed": self.random.getrandbits(32)}
        return self._start(self.generators, programs.generate, "number", usual | who | options)

    def trainer(self, **options: Any) -> Actor:
        """Start a trainer; what is not said is usual."""
        usual = {"group": GROUP, "batch_size": 4, "reconnect_s": RECONNECT_S, "claim_after_s": 1.0, "wait_s": SOON_S}
        who = {"name": f"t{len(self.trainers)}"}
        return self._start(self.trainers, programs.train, "name", usual | who | options)

    def _start(self, actors: list[Actor], target: Callable[..., None], key: str, options: dict[str, Any]) -> Actor:
        where = {"url": self.url, "ring_name": self.ring, "folder": str(self.folder)}
        actors.append(Actor(target, key, where | options))
        return actors[-1]

    def look(self) -> Account:
        """Read what has been written down until now."""
        self.account.read_on(self.folder)
        return self.account

    def trained(self, more: int = 20, deadline_s: float = SOON_S) -> None:
        """Wait until so many samples more have been trained on."""
        goal = len(self.look().trained) + more
        self.awaits(lambda: len(self.look().trained) >= goal, f"{more} samples more are trained on", deadline_s)

    def recovers(self, since_ns: int | None = None, deadline_s: float = SOON_S) -> float:
        """Wait until a sample is trained on that was made after the fault; gives the seconds, for the table too."""
        over_ns = since_ns or time.time_ns()
        found: list[int] = []

        def is_back() -> bool:
            found[:] = [item.at_ns for item in self.look().trained[-2000:] if item.made_ns > over_ns]
            return bool(found)

        self.awaits(is_back, "it goes on", deadline_s)
        took_s = (min(found) - over_ns) / 1e9
        self.row.recovered_s = max(self.row.recovered_s, took_s)
        return took_s

    def awaits(self, holds: Callable[[], bool], what: str, deadline_s: float) -> None:
        """Wait for something; where it does not come, tell how things stand."""
        try:
            eventually(holds, what, deadline_s=deadline_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.tell()}") from None

    def may_be_lost(self) -> None:
        """Say that the server has lost its data just now: samples that nobody was given yet may be gone."""
        account = self.look()
        self.allowed |= account.made - account.delivered.keys()

    @contextmanager
    def fault(self) -> Iterator[None]:
        """Count one fault, which lasts as long as the block, and wait until all goes on."""
        yield
        self.row.injected += 1
        self.recovers()

    def finish(self, *, end: bool = True) -> Account:
        """Let the generators stop and the trainers read to the end; fills the row, checks ledger and parts."""
        for generator in self.generators:
            generator.stop()
        codes = {f"generator {i}": one.join() for i, one in enumerate(self.generators)}
        if end:
            admin.end(self.ring, url=self.server.url)
        codes |= {f"trainer {i}": one.join() for i, one in enumerate(self.trainers)}
        account = self.look()
        assert not any(codes.values()), f"{codes}; {self.tell()}"
        assert None not in codes.values(), f"these go on: {codes}; {self.tell()}"
        assert not account.errors, self.tell()
        self.check_books()
        return account

    def fill_row(self) -> None:
        """Count what came of it all."""
        account, row = self.look(), self.row
        row.committed, row.delivered = len(account.committed), len(account.delivered)
        row.doubled, row.lost, row.corrupt = account.doubled.total(), len(account.lost), len(account.damaged)
        row.again = len(account.trained) - row.delivered - row.doubled

    def check_books(self) -> None:
        """Check that the ring's ledger balances, and that what lasts on the server belongs to a live sample."""
        status = monitor.status(self.ring, url=self.server.url)
        assert status.ledger.balanced, [one for one in status.ledger.equations if one.difference]
        check_ledger(self.server, self.ring, *status.groups)
        assert lasting_parts(self.server, self.ring) == owned_parts(self.server, self.ring)
        # A life that was told to stop before it began takes no lease over from the one that was killed before it.
        leases = {name.decode() for name in self.server.client().hkeys(f"sb:{{{self.ring}}}:leases")}
        assert leases <= {f"g{i}" for i, one in enumerate(self.generators) if one.life > 0}, "others gave theirs back"

    def check_nothing_lost(self) -> None:
        """Check what must hold where the server kept its data and nobody was killed."""
        account = self.account
        self.check_nothing_doubled()
        assert not account.lost, sorted(account.lost)[:5]
        group = monitor.status(self.ring, url=self.server.url).groups[GROUP]
        assert group.doubled == self.row.again, "the ring counts double deliveries, and nothing else"

    def check_told(self, who: str, cause: str) -> None:
        """Check that a line of some log names the server, or the ring, and the cause."""
        text = "".join(path.read_text(errors="replace") for path in self.folder.glob("*.log"))
        assert any(who in line and cause in line for line in text.splitlines()), text

    def check_nothing_doubled(self) -> None:
        """Check what must always hold."""
        account = self.account
        assert not account.damaged, account.damaged[:5]
        assert not account.doubled, account.doubled
        assert account.lost <= self.allowed, sorted(account.lost - self.allowed)[:5]
        assert account.delivered.keys() <= account.made, "nothing came that nobody made"

    def tell(self) -> str:
        """Tell where things stand, for a test that fails."""
        account = self.look()
        logs = {path.stem: path.read_text(errors="replace")[-1500:] for path in sorted(self.folder.glob("*.log"))}
        try:
            status: object = monitor.status(self.ring, url=self.server.url)
        except SynthbrokerError as error:
            status = error
        return (
            f"{status}\nmade {len(account.made)}, committed {len(account.committed)}, trained {len(account.trained)}, "
            f"errors {account.errors}\n" + "\n".join(f"-- {who}\n{text}" for who, text in logs.items())
        )

    def close(self) -> None:
        """End all processes."""
        for actor in (*self.generators, *self.trainers):
            if actor.process.is_alive():
                actor.signal(signal.SIGCONT)
                actor.kill()
        self.fill_row()
