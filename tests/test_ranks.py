"""Several ranks of one training, in processes of their own: every rank gets as many batches, whatever the stream."""

import itertools
import logging
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from torch.utils.data import DataLoader

import synthbroker as sb
from ddp import train
from servers import RealServer, eventually
from synthbroker import admin, losses, ranks
from tools import (
    IN_PARTS,
    SOON_S,
    background,
    check_ledger,
    counters,
    fill,
    lose_a_part,
    members,
    number,
    pending,
    processes,
    reasons,
)

Steps = list[list[tuple[list[int], list[int]]]]


def run(server: RealServer, ring: str, folder: Path, world_size: int, **how: Any) -> Steps:
    """Train with so many ranks; gives numbers and uses of each step of each rank."""
    how = {"loader": {}, "wait_s": SOON_S, "batch_size": 3} | how
    told = how | {"world_size": world_size, "folder": str(folder), "url": server.url, "ring": ring}
    with processes(train, *[(rank,) for rank in range(world_size)], **told) as (_, queue):
        found = dict(queue.get(timeout=60) for _ in range(world_size))
    return [found[rank] for rank in range(world_size)]


def check_aligned(steps: Steps) -> list[int]:
    """Check that all ranks had as many steps, each of one round; gives the numbers that are no repeats."""
    assert all(isinstance(one, list) for one in steps), steps
    assert len({len(one) for one in steps}) == 1, [len(one) for one in steps]
    seen: list[int] = []
    for shares in zip(*steps, strict=True):
        assert len({len(numbers) for numbers, _ in shares}) == 1, "batches of one step have one size"
        seen += [n for numbers, uses in shares for n, used in zip(numbers, uses, strict=True) if used < 2]
    return seen


def padded(steps: Steps) -> int:
    return sum(used > 1 for one in steps for _, uses in one for used in uses)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("world_size", "count", "drop_last"),
    [(2, 0, False), (2, 1, True), (2, 16, True), (2, 43, False), (4, 2, False), (4, 29, False)],
)
def test_a_stream_of_any_length_gives_every_rank_as_many_batches(
    server: RealServer, ring_name: str, tmp_path: Path, world_size: int, count: int, drop_last: bool, num_workers: int
) -> None:
    fill(server, ring_name, range(count), schema="n:i64[] x:f32[4]")
    steps = run(server, ring_name, tmp_path, world_size, drop_last=drop_last, loader={"num_workers": num_workers})
    seen = check_aligned(steps)
    rounds, rest = divmod(count, 3 * world_size)
    assert len(steps[0]) == rounds + bool(rest and not drop_last)
    assert seen == list(range(rounds * 3 * world_size if drop_last else count)), "in order, each once"
    known = counters(server, ring_name, "g")
    assert known.get("padded", 0) == padded(steps) == (0 if drop_last else -rest % world_size)
    assert pending(server, ring_name, "g") == []
    assert (known["acknowledged"], known["doubled"]) == (count, 0)
    check_ledger(server, ring_name, "g")


@pytest.mark.parametrize("options", [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}], ids=str)
def test_an_epoch_is_as_long_for_all_ranks(
    server: RealServer, ring_name: str, tmp_path: Path, options: dict[str, Any]
) -> None:
    fill(server, ring_name, range(50))
    steps = run(server, ring_name, tmp_path, 2, epoch_size=17, epochs=3, loader=options)
    check_aligned(steps)
    sizes = [len(numbers) for numbers, _ in steps[0]]
    assert sizes[:6] == [3, 3, 3, 3, 3, 3], "17 samples are two rounds of six, and one of five, padded to six"
    seen = [n for one in steps for numbers, _ in one for n in numbers]
    assert len(sizes) <= 9
    if options.get("persistent_workers") or not options:
        assert set(seen) == set(range(50))
    check_ledger(server, ring_name, "g")


@pytest.mark.parametrize("options", [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}], ids=str)
def test_a_loop_that_was_left_by_all_ranks_goes_on_for_all(
    server: RealServer, ring_name: str, tmp_path: Path, options: dict[str, Any]
) -> None:
    fill(server, ring_name, range(60))
    steps = run(server, ring_name, tmp_path, 2, epochs=4, leave_after=3, loader=options)
    seen = check_aligned(steps)
    assert sorted(seen) == list(range(60))
    assert counters(server, ring_name, "g")["doubled"] == 0
    check_ledger(server, ring_name, "g")


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("bad", [4, 18, (18, 19)])
def test_a_damaged_sample_is_replaced(
    server: RealServer, ring_name: str, tmp_path: Path, num_workers: int, bad: int | tuple[int, ...]
) -> None:
    bad = (bad,) if isinstance(bad, int) else bad
    fill(server, ring_name, range(20), size=30_000)  # too large to share a part
    for i in bad:
        lose_a_part(server, ring_name, i)
    steps = run(server, ring_name, tmp_path, 2, batch_size=2, loader={"num_workers": num_workers})
    seen = check_aligned(steps)
    assert [len(numbers) for numbers, _ in steps[0]] == [2] * 5
    assert sorted(seen) == sorted(set(range(20)) - set(bad))
    assert len(reasons(server, ring_name)) == len(bad)
    assert counters(server, ring_name, "g")["padded"] == padded(steps) == len(bad)
    assert pending(server, ring_name, "g") == []
    check_ledger(server, ring_name, "g")


def test_ranks_that_read_differently_are_told(server: RealServer, ring_name: str, tmp_path: Path) -> None:
    fill(server, ring_name, range(20))
    told = run(server, ring_name, tmp_path, 2, per_rank={"batch_size": [2, 3]})
    assert any("batch_size=2" in text and "batch_size=3" in text for text in told if isinstance(text, str)), told


# -- servers that fail under them


@contextmanager
def flowing(server: RealServer, ring: str) -> Iterator[Callable[[], int]]:
    """Give what ends a stream that goes on until then, and says how long it was."""
    over = threading.Event()

    def put() -> int:
        with sb.Producer(server.url, ring=ring, capacity="1MB", max_samples=60, producers=1, groups=("g",)) as out:
            for i in itertools.count():
                ends = over.wait(0.002)
                out.put(number(i))
                if ends:
                    return i + 1
        raise AssertionError

    made = background(put)
    try:
        yield lambda: (over.set(), made.result(SOON_S))[1]
    finally:
        over.set()


def taught(server: RealServer, ring: str, more: int) -> None:
    def done() -> int:
        try:
            return counters(server, ring, "g").get("acknowledged", 0)
        except redis.exceptions.BusyLoadingError:
            return 0

    eventually(done, "some is trained on", deadline_s=60)
    goal = done() + more
    eventually(lambda: done() >= goal, "they train", deadline_s=60)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_stay_in_step_over_a_server_that_comes_back(
    own_server: Callable[..., RealServer], ring_name: str, tmp_path: Path, num_workers: int
) -> None:
    server = own_server(appendonly="yes", appendfsync="always")
    with flowing(server, ring_name) as end:

        def restart() -> int:
            for _ in range(3):
                taught(server, ring_name, 30)
                server.restart()
            taught(server, ring_name, 30)
            return end()

        made = background(restart)
        steps = run(server, ring_name, tmp_path, 2, loader={"num_workers": num_workers})
        assert sorted(check_aligned(steps)) == list(range(made.result(SOON_S)))
    assert counters(server, ring_name, "g")["doubled"] == 0
    check_ledger(server, ring_name, "g")


def test_a_server_that_goes_again_while_ranks_settle_with_it_is_waited_for(
    own_server: Callable[..., RealServer], ring_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = own_server(appendonly="yes", appendfsync="always")
    fill(server, ring_name, range(40))
    datasets = ranks_here(server, ring_name, prefetch=1)
    streams = [iter(dataset) for dataset in datasets]
    seen = [int(n) for stream in streams for n in next(stream)["n"]]
    say, went = losses.say, []

    def say_when_it_is_back(*what: Any) -> None:
        if ".deal/" in what[3] and not went:
            went.append(what)
            raise sb.ServerGoneError("it went again")
        say(*what)

    monkeypatch.setattr(losses, "say", say_when_it_is_back)
    server.restart()
    for _ in range(9):
        seen += [int(n) for stream in streams for n in next(stream)["n"]]
    assert sorted(seen) == list(range(40))
    assert went


@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_whose_ring_is_lost_are_told(
    own_server: Callable[..., RealServer], ring_name: str, tmp_path: Path, num_workers: int
) -> None:
    """One may have had a round that the other one will never get; it fails in torch, and its log says why."""
    server = own_server()
    told = {"loader": {"num_workers": num_workers}, "wait_s": SOON_S, "batch_size": 3, "world_size": 2}
    told |= {"folder": str(tmp_path), "url": server.url, "ring": ring_name}
    with flowing(server, ring_name) as end:
        with processes(train, (0,), (1,), **told) as (started, queue):
            taught(server, ring_name, 30)
            server.client().flushall()
            errors = [queue.get(timeout=60)[1] for _ in started]
            for rank in 0, 1:
                log = tmp_path / f"log-{rank}"
                eventually(lambda log=log: f"lost ring '{ring_name}'" in log.read_text(), "its log says so")
        eventually(lambda: server.client().exists(f"sb:{{{ring_name}}}:meta"), "the producer has made it anew")
        admin.end(ring_name, url=server.url)  # nobody reads it any more
        with pytest.raises(sb.RingEndedError):
            end()
    assert all(isinstance(one, str) for one in errors), "one that waits for the other has torch's error"
    assert any("lost ring" in one and "start all of them again" in one for one in errors), errors


# -- in one process, which says of itself which rank it is


def test_who_is_alone_is_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "RANK", "WORLD_SIZE":
        monkeypatch.delenv(name, raising=False)
    assert ranks.find(None, None, None) is None
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a b/c")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "3")
    place = ranks.find(None, None, None)
    assert place is not None
    assert (place.rank, place.ranks, place.run, place.attempt) == (1, 2, "torchrun-a_b_c", "3")
    assert ranks.find(0, 1, None) is None, "what is said counts"
    named = ranks.find(0, 4, "mine")
    assert named is not None
    assert (named.rank, named.ranks, named.run, named.attempt) == (0, 4, "mine", "torchrun-a b/c.3")


@pytest.mark.parametrize(
    ("asked", "error"),
    [((0, None), "go together"), ((None, 2), "go together"), ((2, 2), "below world_size"), ((-1, 2), "from 0")],
)
def test_a_rank_that_cannot_be_is_refused(asked: tuple[Any, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        sb.RingDataset("redis://none", ring="r", group="g", rank=asked[0], world_size=asked[1])
    with pytest.raises(TypeError, match="whole number"):
        sb.RingDataset("redis://none", ring="r", group="g", rank=0, world_size="2")  # type: ignore[arg-type]


def test_workers_of_a_plain_loader_cannot_be_ranks(server: RealServer, ring_name: str) -> None:
    fill(server, ring_name, range(4))
    data = sb.RingDataset(server.url, ring=ring_name, group="g", rank=0, world_size=2)
    with pytest.raises(ValueError, match=r"dataset.loader\(num_workers=N\)"):
        list(DataLoader(pickle.loads(pickle.dumps(data)), batch_size=None, num_workers=1))


def ranks_here(server: RealServer, ring: str, **options: Any) -> list[sb.RingDataset]:
    options = {"batch_size": 2, "wait_s": SOON_S} | options
    return [sb.RingDataset(server.url, ring=ring, group="g", rank=rank, world_size=2, **options) for rank in (0, 1)]


def test_a_batch_of_damaged_samples_alone_repeats_another_one(server: RealServer, ring_name: str) -> None:
    fill(server, ring_name, range(8), size=30_000)
    for i in 6, 7:  # rank 1's last batch
        lose_a_part(server, ring_name, i)
    first, second = ([list(batch["n"]) for batch in each] for each in alternately(ranks_here(server, ring_name)))
    assert [len(batch) for batch in first] == [len(batch) for batch in second] == [2, 2]
    assert {int(n) for n in second[-1]} <= set(range(6))
    assert pending(server, ring_name, "g") == []
    check_ledger(server, ring_name, "g")


def test_where_nothing_can_be_used_an_error_says_so(server: RealServer, ring_name: str) -> None:
    fill(server, ring_name, range(2), size=30_000)
    for i in 0, 1:
        lose_a_part(server, ring_name, i)
    one, _ = ranks_here(server, ring_name, batch_size=1)
    with pytest.raises(sb.DamagedSampleError, match="round 0 for rank 0"):
        list(one)


def alternately(datasets: list[sb.RingDataset]) -> list[list[Any]]:
    """Read step by step, as ranks do that wait for one another."""
    streams = [iter(dataset) for dataset in datasets]
    found: list[list[Any]] = [[] for _ in datasets]
    while True:
        step = [next(stream, None) for stream in streams]
        if step[0] is None:
            assert step == [None] * len(step)
            return found
        for batches, batch in zip(found, step, strict=True):
            batches.append(batch)


def test_a_run_that_ended_leaves_its_table_to_the_next(server: RealServer, ring_name: str) -> None:
    fill(server, ring_name, range(10))
    datasets = ranks_here(server, ring_name)
    assert len(alternately(datasets)[0]) == 3
    for dataset in datasets:
        with pytest.raises(sb.RingEndedError):
            list(dataset)
    assert not server.client().exists(f"sb:{{{ring_name}}}:rounds:g")
    assert members(server, ring_name, "g") == []


def test_what_a_closed_run_did_not_train_on_comes_to_others(server: RealServer, ring_name: str) -> None:
    fill(server, ring_name, range(20), size=IN_PARTS)
    datasets = ranks_here(server, ring_name)
    streams = [iter(dataset) for dataset in datasets]
    seen = [int(n) for _ in range(2) for stream in streams for n in next(stream)["n"]]
    for dataset in datasets:
        dataset.close()
    rest = sb.Consumer(server.url, ring=ring_name, group="g", wait_s=SOON_S)
    others = [int(n) for batch in rest for n in batch["n"]]
    assert set(seen) | set(others) == set(range(20))
    assert len(seen) + len(others) == 20 + 4, "the batch in hand of each rank comes again"


def test_a_killed_run_is_taken_over_at_once(server: RealServer, ring_name: str, tmp_path: Path) -> None:
    fill(server, ring_name, range(40))
    with processes(hold, (0,), (1,), url=server.url, ring=ring_name, batch_size=2) as (_, queue):
        held = [queue.get(timeout=SOON_S) for _ in range(2)]
    (tmp_path / "again").mkdir()
    steps = run(server, ring_name, tmp_path / "again", 2, batch_size=2)
    assert sorted(check_aligned(steps)) == list(range(40)), held
    check_ledger(server, ring_name, "g")


def test_all_that_a_former_life_of_the_run_held_comes_before_anything_fresh(server: RealServer, ring_name: str) -> None:
    """It is the oldest of the ring, which can make no room before it is acknowledged."""
    fill(server, ring_name, range(400))
    how = {"name": "run", "ack": "checkpoint", "batch_size": 2}
    with processes(hold, (0,), (1,), url=server.url, ring=ring_name, steps=20, **how) as (_, queue):
        for _ in range(2):
            queue.get(timeout=SOON_S)
    held = len(pending(server, ring_name, "g"))
    assert held >= 80
    streams = [iter(dataset) for dataset in ranks_here(server, ring_name, **how)]
    seen = [int(n) for _ in range(held // 4) for stream in streams for n in next(stream)["n"]]
    assert sorted(seen) == list(range(held // 4 * 4))


def hold(rank: int, told: Any, *, url: str, ring: str, steps: int = 1, **options: Any) -> None:
    """Read some batches as a rank, and keep them until killed."""
    dataset = sb.RingDataset(url, ring=ring, group="g", rank=rank, world_size=2, **options)
    stream = iter(dataset)
    told.put([int(n) for _ in range(steps) for n in next(stream)["n"]])
    threading.Event().wait()


def test_two_runs_at_once_are_told_of_each_other(
    server: RealServer, ring_name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fill(server, ring_name, range(40))
    monkeypatch.setattr("synthbroker.ring.BEAT_S", 0.2)
    one, _ = ranks_here(server, ring_name, name="one")
    other, _ = ranks_here(server, ring_name, name="two")
    next(iter(one))
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(sb.RingMismatchError, match=r"run 'one'.*run 'two' \(rank 0\)"),
    ):
        next(iter(other))
    for dataset in one, other:
        dataset.close()
