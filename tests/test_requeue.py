"""A job that is put into the queue again, while its former self runs on on a node that was lost."""

import json

import pytest

import synthbroker as sb
from rings import Rig
from servers import RealServer, eventually
from synthbroker import monitor, options
from synthbroker.errors import ShutOutError
from tools import background, check_ledger, number, values


def life(monkeypatch: pytest.MonkeyPatch, restart: int, task: int | None = None) -> None:
    """Be a process of a SLURM job that was restarted so often."""
    monkeypatch.setenv("SLURM_JOB_ID", "4714")
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
    if task is not None:
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "4711")
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))


def test_a_producers_name_says_job_array_task_and_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert not options.producer_name(None).startswith("4714")
    for restart, task, start in (0, None, "4714r0-"), (2, None, "4714r2-"), (0, 3, "4711_3r0-"), (1, 3, "4711_3r1-"):
        life(monkeypatch, restart, task)
        assert options.producer_name(None).startswith(start)


def test_a_zombie_and_its_successor_are_two_producers_and_nothing_of_either_is_lost_or_doubled(
    server: RealServer, ring_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def producer() -> sb.Producer:
        return sb.Producer(server.url, ring=ring_name, groups=("train",), codec="raw")

    life(monkeypatch, 0)
    zombie = producer()
    zombie.put(number(0))
    assert zombie.flush()
    life(monkeypatch, 1)
    successor = producer()
    for n in range(1, 9):
        (zombie if n % 2 else successor).put(number(n))
    assert zombie.flush()
    assert successor.flush()
    assert zombie.leave() == 0
    successor.close()
    status = monitor.status(ring_name, url=server.url)
    assert {name.split("-")[0]: one.committed for name, one in status.producers.items()} == {"4714r0": 5, "4714r1": 4}
    assert status.duplicates == 0
    check_ledger(server, ring_name, "train")


def test_a_zombie_that_waits_in_a_full_ring_does_not_keep_its_successor_out(
    server: RealServer, ring_name: str, monkeypatch: pytest.MonkeyPatch, reader: type[sb.Consumer]
) -> None:
    life(monkeypatch, 0)
    zombie = sb.Producer(server.url, ring=ring_name, max_samples=2, groups=("g",), codec="raw")
    for n in range(3):
        zombie.put(number(n))
    eventually(lambda: zombie.pace.blocked_for_s > 0, "it waits for room")
    life(monkeypatch, 1)
    successor = sb.Producer(server.url, ring=ring_name, codec="raw")
    successor.put(number(3))
    found: list[int] = []
    for batch in reader("g", prefetch=0):
        found += values(batch)
        if len(found) == 4:
            break
    assert sorted(found) == [0, 1, 2, 3]
    successor.close()
    zombie.leave()


def test_a_restarted_producer_with_a_name_of_its_own_shuts_its_former_self_out(
    server: RealServer, ring_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    life(monkeypatch, 0)
    zombie = sb.Producer(server.url, ring=ring_name, name="gen-3")
    zombie.put(number(0))
    assert zombie.flush()
    life(monkeypatch, 1)
    with sb.Producer(server.url, ring=ring_name, name="gen-3") as successor:
        successor.put(number(1))
        assert successor.flush()
        zombie.put(number(2))
        with pytest.raises(ShutOutError, match="a newer producer named 'gen-3' took this one's place"):
            zombie.flush()
    with pytest.raises(ShutOutError):
        zombie.leave()
    assert monitor.status(ring_name, url=server.url).committed == 2


def test_a_zombie_does_not_take_its_name_back_after_the_server_was_restarted(
    own_server: type[RealServer], ring_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = own_server(appendonly="yes", appendfsync="always")
    life(monkeypatch, 0)
    zombie = sb.Producer(server.url, ring=ring_name, name="gen-3")
    zombie.put(number(0))
    assert zombie.flush()
    life(monkeypatch, 1)
    successor = sb.Producer(server.url, ring=ring_name, name="gen-3")
    successor.put(number(1))
    assert successor.flush()
    server.kill()
    server.restart()
    zombie.put(number(2))  # it is the first to come back
    with pytest.raises(ShutOutError, match="'gen-3'"):
        background(zombie.flush).result(30)
    successor.put(number(3))
    assert background(successor.flush).result(30)
    successor.close()
    with pytest.raises(ShutOutError):
        zombie.leave()


ABOUT = {"job_id": "4714", "restart": 1}


@pytest.mark.parametrize(
    ("theirs", "ours", "answer"),
    [
        (ABOUT, ABOUT | {"restart": 0}, "SHUT"),
        (ABOUT, ABOUT, "OK"),
        (ABOUT, ABOUT | {"restart": 2}, "OK"),
        (ABOUT, {"job_id": "4715", "restart": 0}, "OK"),  # another job: the newer one has the name
        (ABOUT, {"host": "node7"}, "OK"),
        ({"host": "node7"}, ABOUT | {"restart": 0}, "OK"),
        ("nonsense", ABOUT | {"restart": 0}, "OK"),
        ("[1]", ABOUT | {"restart": 0}, "OK"),
        ({"job_id": "4714", "restart": "x"}, ABOUT | {"restart": 0}, "OK"),
    ],
)
def test_only_a_later_life_of_the_same_job_keeps_its_name(rig: Rig, theirs: object, ours: object, answer: str) -> None:
    rig.open()
    told = [text if isinstance(text, str) else json.dumps(text) for text in (theirs, ours)]
    assert rig.script("join", rig.ring.epoch, "producer", "gen-3", "w1", told[0], 0) == ["OK"]
    assert rig.script("join", rig.ring.epoch, "producer", "gen-3", "w2", told[1], 0) == [answer]
    taken = rig.keys.hget(rig.key("seqs"), "gen-3")
    assert taken == (b"w1 0" if answer == "SHUT" else b"w2 0")
