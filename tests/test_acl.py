"""Users with few rights: each does its work on every version of the server."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

import synthbroker as sb
from servers import eventually
from synthbroker import admin, monitor
from synthbroker.quarantine import quarantine
from tools import IN_PARTS, SOON_S, number, values
from users import balanced, consumer, make, read


@pytest.mark.parametrize("size", [4, IN_PARTS, 2_000_000])
def test_producers_wait_at_a_full_ring_and_a_trainer_makes_room(users, size):
    with ThreadPoolExecutor(3) as pool:
        made = [
            pool.submit(make, users, count=8, size=size, max_samples=4, producers=2, groups=("g",), name=f"p{i}")
            for i in range(2)
        ]
        eventually(lambda: ring_waits(users, "r"), "a producer waits")
        assert sorted(read(users)) == sorted([*range(8)] * 2)
        assert [one.result(SOON_S).samples for one in made] == [8, 8]
    status = monitor.status("r", url=users.viewer)
    assert (status.ended, status.groups["g"].acknowledged, status.ledger.balanced) == (True, 16, True)
    assert balanced(users) == (True, ())


def ring_waits(users, ring):
    return users.server.client().hget(f"sb:{{{ring}}}:meta", "waiting") not in (None, b"0")


def test_a_ring_that_drops_evicts_under_a_slow_group_that_keeps_checkpoints(users):
    make(users, count=6, max_samples=6, when_full="drop-oldest", size=IN_PARTS)
    with consumer(users, name="run", ack="checkpoint", reuse=2) as batches:
        taken = next(iter(batches))
        make(users, count=9, when_full="drop-oldest", size=IN_PARTS)
        assert len(values(taken)) == 2
    group = monitor.status("r", url=users.viewer).groups["g"]
    assert group.evicted_pending + group.lost > 0
    assert balanced(users) == (True, ())


@pytest.mark.parametrize("reuse", [3, "inf"])
def test_a_trainer_reuses(users, reuse):
    make(users, count=4)
    with consumer(users, reuse=reuse) as batches:
        turns = iter(batches)
        found = [n for _ in range(4) for n in values(next(turns))]
    assert sorted(found[:4]) == [0, 1, 2, 3]
    assert set(found[4:]) <= {0, 1, 2, 3}


def test_a_trainer_goes_on_from_a_checkpoint(users):
    make(users, count=8, producers=1)
    first = sb.RingDataset(users.trainer, ring="r", group="g", batch_size=2, ack="checkpoint", name="run")
    loader = first.loader()
    turns = iter(loader)
    trained = [values(next(turns)) for _ in range(2)]
    state = loader.state_dict()
    loader.acknowledge()
    values(next(turns))
    first.close()
    second = sb.RingDataset(users.trainer, ring="r", group="g", batch_size=2, ack="checkpoint", name="run")
    resumed = second.loader()
    resumed.load_state_dict(state)
    rest = [values(batch) for batch in resumed]
    resumed.state_dict()
    resumed.acknowledge()
    second.close()
    assert sorted(n for batch in trained + rest for n in batch) == [*range(8)]
    assert monitor.status("r", url=users.viewer).groups["g"].acknowledged == 8
    assert balanced(users) == (True, ())


def test_two_ranks_read_whole_rounds(users):
    make(users, count=7, producers=1)
    step = threading.Barrier(2)  # as DDP's: no rank is done before another has begun

    def rank(i):
        data = sb.RingDataset(users.trainer, ring="r", group="g", batch_size=2, rank=i, world_size=2, name="run")
        found = []
        for batch in data.loader():
            found.append(values(batch))
            step.wait(SOON_S)
        data.close()
        return found

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(rank, range(2))
    assert len(one) == len(other) == 2
    assert {n for batch in one + other for n in batch} == set(range(7))


def test_what_a_reader_leaves_is_taken_over_and_what_is_foreign_is_swept_out(users):
    make(users, count=4, producers=1)
    with consumer(users) as left:
        taken = values(next(iter(left)))
    users.server.client().xadd("sb:{r}:samples", {"by": "hand"}, id="999-0")
    assert sorted(read(users)) == [0, 1, 2, 3]
    assert len(taken) == 2
    assert ["foreign" in note.reason for note in quarantine("r", url=users.viewer)] == [True]


def test_a_generator_commits_behind_what_a_person_wrote_into_the_stream(users):
    make(users, count=2, groups=("g",))
    users.server.client().xadd("sb:{r}:samples", {"by": "hand"}, id="999-0")
    make(users, count=2, producers=0)
    assert monitor.status("r", url=users.viewer).live == 4


def test_a_generator_s_checks_and_twins_are_noted(users):
    with sb.Producer(users.generator, ring="r", capacity="50MB", checks="x:range(0,1)") as out:
        out.put(number(5))
        out.flush()
    assert [note.recipe for note in quarantine("r", url=users.viewer)]
    for name in ("p", "q"):
        make(users, ring="s", count=40, name=name)
    assert monitor.status("s", url=users.viewer).twins


def test_a_ring_is_ended_and_opened_again_by_a_generator(users):
    make(users)
    admin.end("r", url=users.generator)
    with pytest.raises(sb.RingEndedError):
        make(users)
    make(users, reopen=True)
    assert monitor.status("r", url=users.viewer).committed == 12


def test_generate_runs_as_a_generator(users, tmp_path):
    (tmp_path / "gen.py").write_text("def make(worker):\n    for i in range(4):\n        yield {'x': i}\n")
    command = [sys.executable, "-m", "synthbroker", "generate", "gen:make", "--ring", "r", "--url", users.generator]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.partition(" (")[0]) == (0, "4 samples in ring r"), done.stderr
    assert monitor.status("r", url=users.viewer).ended


def test_a_viewer_peeks_and_reads_the_live_ring(users):
    make(users, count=3, size=IN_PARTS)
    assert [int(sample["n"]) for sample in sb.peek("r", 2, url=users.viewer)] == [2, 1]
    with sb.Consumer(users.viewer, ring="r", group=None, batch_size=3, wait_s=SOON_S) as batches:
        assert values(next(iter(batches))) == [0, 1, 2]


def test_a_server_that_comes_back_as_another_process_is_noticed(users):
    make(users, groups=("g",))
    users.server.client().hset("sb:{r}:meta", "run_id", "another")
    assert len(read_some(users, 2)) == 2
    users.server.client().hset("sb:{r}:meta", "run_id", "another")
    make(users)
    assert users.server.client().hget("sb:{r}:meta", "epoch").count(b".") == 2, "twice it was another one"


def read_some(users, count):
    with consumer(users) as batches:
        turns = iter(batches)
        return [n for _ in range(count // 2) for n in values(next(turns))]
