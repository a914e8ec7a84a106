"""Processes fail at any instant: what was committed is trained on, whole; what comes again is counted."""

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from faults.conftest import MakeScene
from faults.marks import Trained
from faults.proxy import TO_SERVER, Proxy
from faults.scene import GROUP, SOON_S, Scene
from faults.test_server import OwnServer, Proxied, hold, populate
from servers import eventually
from synthbroker import monitor

BATCH = 4
ALIVE_S = 20.0  # for what happens at once
TOLD_S = 0.1  # a loop whose steps take no time tells of what it is done with every 5 ms; the rest is for busy machines


def check_prefixes(it: Scene) -> None:
    """Check that of each life of a generator all up to some sample came."""
    came: dict[tuple[int, int], set[int]] = {}
    for producer, life, seq in it.account.delivered:
        came.setdefault((producer, life), set()).add(seq)
    for who, seqs in came.items():
        assert seqs == set(range(len(seqs))), f"{who} has holes"


def check_only_in_hand(it: Scene) -> None:
    """Check that nothing that was made is missing but, for each kill, the sample in hand."""
    in_hand = Counter(one[:2] for one in it.account.made - it.account.delivered.keys())
    assert all(count == 1 for count in in_hand.values()), in_hand
    assert len(in_hand) <= it.row.injected


# -- generators


def test_generators_killed_at_random(own_server: OwnServer, scene: MakeScene):
    server = own_server()
    it = scene("generator killed (kill -9), restarted", server)
    populate(it, generators=3, flush_every=1)
    it.trainer()
    for _ in range(12):
        with it.fault():
            hold(it.random.random() * 0.3)
            it.random.choice(it.generators).restart()
    it.finish()
    it.check_nothing_lost()
    check_prefixes(it)
    check_only_in_hand(it)


@pytest.mark.parametrize("instant", ["between parts", "before the commit", "after the commit"])
def test_a_generator_killed_at(own_server: OwnServer, proxied: Proxied, scene: MakeScene, instant: str):
    server = own_server()
    wire = proxied(server)
    it = scene(f"generator killed {instant}", server)
    victim = it.generator(url=wire.url, sizes="big", flush_every=1)
    it.trainer()
    it.trained()
    wire.on_loss = lambda: victim.signal(signal.SIGKILL)
    for n in range(4):
        with it.fault():
            strike(wire, it, instant)
            eventually(lambda n=n: wire.lost + wire.cuts > n, "it is struck")
            victim.kill()
            victim.start()
    it.finish()
    it.check_nothing_lost()
    check_prefixes(it)


def strike(wire: Proxy, it: Scene, instant: str) -> None:
    if instant == "between parts":
        wire.cut_after(it.random.randrange(4_000_000), TO_SERVER)
    else:
        wire.lose_answer_to("commit", carried_out=instant == "after the commit")


def test_what_a_dead_generator_leaves_goes_by_itself(own_server: OwnServer, proxied: Proxied, scene: MakeScene):
    server = own_server()
    wire = proxied(server)
    it = scene("generator killed between parts, and not restarted", server)
    victim = it.generator(url=wire.url, sizes="big", flush_every=1)
    it.trainer()
    it.trained()
    wire.on_loss = lambda: victim.signal(signal.SIGKILL)
    wire.lose_answer_to("commit", carried_out=False)
    eventually(lambda: wire.lost, "it is struck")
    victim.kill()
    status = monitor.status(it.ring, url=server.url)
    assert status.leased_bytes > 0, "it had reserved room"
    keys = f"sb:{{{it.ring}}}:"
    (lease,) = server.client().hgetall(f"{keys}leases").values()
    assert float(lease.split()[2]) <= status.now_s + 60, "the lease ends"
    assert any(server.client().pttl(part) > 0 for part in server.client().scan_iter(f"{keys}part:*")), "parts expire"
    with it.fault():
        it.generator()
    # Time passes for the lease as it does for nobody else: the next who needs room counts it out.
    server.client().hset(f"{keys}leases", "g0", " ".join([*lease.decode().split()[:2], f"{status.now_s - 1:.3f}"]))
    it.generator(sizes="big")
    eventually(lambda: not server.client().hexists(f"{keys}leases", "g0"), "the lease is given back")
    it.finish()  # which checks that all that lasts belongs to a live sample
    it.check_nothing_lost()


# -- readers


def test_trainers_killed_at_random(own_server: OwnServer, scene: MakeScene):
    server = own_server()
    it = scene("trainer killed, restarted", server)
    populate(it, trainers=2)
    for _ in range(8):
        with it.fault():
            hold(it.random.random() * 0.3)
            it.random.choice(it.trainers).restart()
    it.finish()
    check_again(it)


def check_again(it: Scene) -> None:
    """Check that what came again is what dead readers had in hand, and not acknowledged: told within `TOLD_S`."""
    account = it.account
    assert not account.lost, sorted(account.lost)[:5]
    it.check_nothing_doubled()
    last: dict[str, list[Trained]] = {}
    seen: dict[tuple[int, int, int], Trained] = {}
    for item in sorted(account.trained, key=lambda item: item.at_ns):
        last.setdefault(item.reader, []).append(item)
        if item.uses >= 2:  # it pads the last round of several ranks
            continue
        if item.one in seen:
            former = seen[item.one]
            after = [one for one in last[former.reader] if one.at_ns > former.at_ns]
            in_time = not after or after[-1].at_ns - former.at_ns < TOLD_S * 1e9
            assert len(after) < 4 * BATCH or in_time, "only the last batches of a dead reader come again"
        seen[item.one] = item


@pytest.mark.parametrize("whom", ["workers", "trainers"])
def test_trainers_with_workers_killed(own_server: OwnServer, scene: MakeScene, whom: str):
    server = own_server()
    it = scene(
        f"{whom[:-1]} killed (DataLoader, 2 workers)".replace("worker killed", "DataLoader worker killed"), server
    )
    for _ in range(2):
        it.generator(sizes="small", pause_s=0.002)
    trainer = it.trainer(workers=2, persist=whom == "workers")
    it.trained()
    pids: set[int] = set()
    for n in range(3):
        with it.fault():
            hold(it.random.random() * 0.5)
            children = psutil.Process(trainer.process.pid).children()
            pids |= {child.pid for child in children}
            if whom == "workers":
                it.random.choice(children).kill()
                it.awaits(lambda n=n: len(it.look().survived) > n, "the training loop is told", ALIVE_S)
            else:
                trainer.restart()
    it.finish()
    torchs_words = (
        "DataLoader worker .* (killed|exited)|Errno|^$"  # or the connection was cut through which it shared memory
    )
    assert all(re.search(torchs_words, text) for text in it.account.survived)
    check_again(it)
    eventually(lambda: not any(map(psutil.pid_exists, pids)), "no worker outlives its trainer")


def test_workers_that_their_trainer_does_not_outlive_go(own_server: OwnServer, scene: MakeScene):
    server = own_server()
    it = scene("trainer killed, workers of a forkserver", server)
    it.generator(sizes="small", pause_s=0.002)
    trainer = it.trainer(workers=2, context="forkserver")  # whose server is not killed with the trainer
    it.trained()
    group = monitor.status(it.ring, url=server.url).groups[GROUP]
    with it.fault():
        trainer.kill()
        pids = [consumer.pid for consumer in group.consumers.values() if consumer.pid]
        eventually(lambda: not any(map(psutil.pid_exists, pids)), "no worker outlives its trainer")
        trainer.start()
    it.finish()
    check_again(it)


def test_a_reader_stopped_past_its_claim_time(own_server: OwnServer, scene: MakeScene):
    server = own_server()
    it = scene("reader stopped (SIGSTOP) past claim_after_s, and back", server)
    populate(it, trainers=2)
    for _ in range(2):
        with it.fault():
            it.trainers[0].pause()
            before = monitor.status(it.ring, url=server.url).groups[GROUP].redelivered
            eventually(
                lambda b=before: monitor.status(it.ring, url=server.url).groups[GROUP].redelivered > b,
                "what it held is claimed",
            )
            it.trained()
            it.trainers[0].resume()
    it.finish()
    account = it.account
    assert not account.lost
    assert not account.damaged
    group = monitor.status(it.ring, url=server.url).groups[GROUP]
    assert account.delivered.total() - len(account.delivered) == group.doubled > 0, "each double is counted"


def test_one_rank_of_two_killed(own_server: OwnServer, scene: MakeScene):
    """The other one is begun again, too, as torchrun does it; if it lives on, it is shut out, and told so."""
    server = own_server()
    it = scene("one rank of two killed, both restarted", server)
    for _ in range(2):
        it.generator()
    ranks = [it.trainer(torch=True, rank=rank, world_size=2) for rank in (0, 1)]

    def both_train() -> bool:
        return {f"t{i}-{one.life}" for i, one in enumerate(ranks)} <= {item.reader for item in it.look().trained}

    for times in range(1, 5):
        eventually(both_train, "both train", deadline_s=SOON_S)
        with it.fault():
            hold(it.random.random() * 0.5)
            killed, other = it.random.sample(ranks, 2)
            killed.restart()
            eventually(lambda n=times: len(it.look().errors) == n, "the other one is told", deadline_s=SOON_S)
            assert "ShutOutError: a newer life of run 'ranks'" in it.account.errors[-1]
            other.restart()
    it.account.errors.clear()
    it.finish()
    check_again(it)


# -- the whole storm


def test_eighty_generators_come_and_go(own_server: OwnServer, scene: MakeScene, storm_s: float):
    server = own_server()
    it = scene(f"80 generators around a ring of 100, killed and restarted for {storm_s:.0f} s", server)
    for _ in range(80):
        it.generator(sizes="mixed", max_samples=100, capacity="200MB", flush_every=1, pause_s=0.05)
    it.trainer(batch_size=8)
    it.trained()
    end = time.monotonic() + storm_s
    while time.monotonic() < end:
        it.random.choice(it.generators).restart()
        it.row.injected += 1
        hold(it.random.random() * 0.1)
    it.recovers()
    it.finish()
    it.check_nothing_lost()
    check_prefixes(it)
    check_only_in_hand(it)


# -- whole programs

GENERATOR = """
import numpy as np

def endless(worker):
    while True:
        yield {"x": np.zeros(1000)}

def fails(worker):
    yield {"x": np.zeros(1000)}
    raise LookupError("no more brains")
"""
TRAINER = """
import sys
import synthbroker as sb

def fails(sample):
    raise LookupError("no such brain")

transform = fails if sys.argv[4] == "fails" else None
dataset = sb.RingDataset(sys.argv[1], ring=sys.argv[2], group="train", batch_size=4, transform=transform)
for n, batch in enumerate(dataset.loader(num_workers=int(sys.argv[3]))):
    if n == 5:
        print("trains", flush=True)
"""


def program(folder: Path, *command: str) -> "subprocess.Popen[str]":
    (folder / "my_generator.py").write_text(GENERATOR)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background, and inherited
    return subprocess.Popen(
        [sys.executable, *command], cwd=folder, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def session_of(process: "subprocess.Popen[str]") -> set[int]:
    """List all processes of a session that are not dead."""
    found = set()
    for one in psutil.process_iter(["pid", "status"]):
        try:
            if os.getsid(one.pid) == process.pid and one.info["status"] != psutil.STATUS_ZOMBIE:
                found.add(one.pid)
        except OSError:
            continue
    return found


@pytest.mark.parametrize("what", ["generate", "trainer"])
def test_no_process_is_left_by_ctrl_c(own_server: OwnServer, ring_name: str, tmp_path: Path, what: str):
    server = own_server()
    command = ["-m", "synthbroker", "generate", "my_generator:endless", "--ring", ring_name, "--workers", "3"]
    with program(tmp_path, *command, "--url", server.url, "--capacity", "10MB") as generator:
        both = [generator]
        try:
            if what == "trainer":
                both.append(program(tmp_path, "-c", TRAINER, server.url, ring_name, "2", ""))
                assert both[1].stdout.readline() == "trains\n", both[1].stderr.read()
            eventually(lambda: len(session_of(generator)) >= 4, "all workers are there")
            victim = both[-1]
            os.killpg(victim.pid, signal.SIGINT)
            _, errors = victim.communicate(timeout=ALIVE_S)
            eventually(lambda: not session_of(victim), "nobody is left")
            assert victim.returncode != 0
            assert what == "generate" or "KeyboardInterrupt" in errors
        finally:
            for one in both:
                if session_of(one):
                    os.killpg(one.pid, signal.SIGKILL)
                one.communicate()


@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_exception_in_a_transform_is_the_users_own(
    own_server: OwnServer, ring_name: str, tmp_path: Path, workers: str
):
    server = own_server()
    command = ["-m", "synthbroker", "generate", "my_generator:endless", "--ring", ring_name, "--grace-s", "1"]
    with program(tmp_path, *command, "--url", server.url) as generator:
        with program(tmp_path, "-c", TRAINER, server.url, ring_name, workers, "fails") as trainer:
            _, errors = trainer.communicate(timeout=2 * ALIVE_S)
        os.killpg(generator.pid, signal.SIGINT)
        generator.communicate(timeout=ALIVE_S)
    assert trainer.returncode == 1
    assert "in fails" in errors
    assert "LookupError: no such brain" in errors


def test_a_generator_that_raises_is_shown(own_server: OwnServer, ring_name: str, tmp_path: Path):
    server = own_server()
    command = ["-m", "synthbroker", "generate", "my_generator:fails", "--ring", ring_name, "--workers", "2"]
    with program(tmp_path, *command, "--url", server.url) as generator:
        _, errors = generator.communicate(timeout=ALIVE_S)
        eventually(lambda: not session_of(generator), "nobody is left")
    assert generator.returncode == 1
    assert 'my_generator.py", line 10, in fails' in errors
    assert "LookupError: no more brains" in errors
