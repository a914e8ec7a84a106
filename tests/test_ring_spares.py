"""The scripts that deal rounds and stage checkpoints: what a rank takes in place of a bad sample."""

import pytest

from rings import Rig, Table
from synthbroker import dealing, runs
from synthbroker.ranges import Range
from synthbroker.runs import Run


def rank_of(table: Table, rank: int, life: str = "l1") -> Run:
    """Say which run a rank of the table is, which keeps checkpoints."""
    return Run(f"run.r{rank}", life, checkpoints=True, rank=rank, ranks=table.ranks, whole="run")


def spare(table: Table, rank: int, i: int, sitting: int = 1) -> list[int]:
    """Take one more sample in a round."""
    order = f"SPARE {table.generations[rank]} {rank} {sitting} {i} 1"
    taken = dealing.deal(table.rig.ring, "train", table.readers[rank], order, count=1)[1]
    assert taken is not None
    return [one.number for one in taken.samples]


def dealt(rig: Rig) -> Table:
    """Deal two rounds to two ranks: samples 1 to 4 and 6 to 9, 5 and 10 in place of one of rank 1's in each."""
    rig.open()
    rig.put(rig.producer(), *range(1, 21))
    table = Table(rig, 2, 2)
    for i, number in (0, 5), (1, 10):
        for rank in 0, 1:
            table.numbers(rank, i, received=i - 1)
        assert spare(table, 1, i) == [number]
    return table


def staged(table: Table, serial: int, *numbers: Range, last: int, sitting: int = 1, rank: int = 0) -> list[Range]:
    run = rank_of(table, rank)
    return runs.stage(table.rig.ring, "train", run, f"{serial}.w{rank}", numbers, {sitting: last})


def test_a_checkpoint_has_what_other_ranks_took_in_the_rounds_up_to_it(rig: Rig) -> None:
    table = dealt(rig)
    assert staged(table, 1, (1, 4), last=0) == [(1, 5)]
    assert staged(table, 1, (1, 4), last=0) == [(1, 5)], "asking again gives the same"
    assert staged(table, 1, (1, 5), last=0, rank=1) == [(1, 5)], "it knows of its own"
    assert staged(table, 2, (6, 9), last=1) == [(6, 10)], "each is in one checkpoint"
    runs.finish(rig.ring, "train", rank_of(table, 0), "1.w0")
    assert rig.balance().groups["train"]["acknowledged"] == 5
    assert rig.keys.hget(rig.key("runs:train"), "run spares").decode().split(":")[-1] == "10"
    runs.finish(rig.ring, "train", rank_of(table, 0), "2.w0")
    assert rig.balance().groups["train"].pending == 0
    assert not rig.keys.hexists(rig.key("runs:train"), "run spares")


@pytest.mark.parametrize(("rank", "ranks", "left"), [(0, 2, [(6, 10)]), (1, 2, [(6, 9)]), (0, 1, [(6, 9)])])
def test_what_comes_again_is_in_no_later_checkpoint(rig: Rig, rank: int, ranks: int, left: list[Range]) -> None:
    """A new life of rank 1, or of a run that has no rank 1 any more, trains on it later."""
    table = dealt(rig)
    staged(table, 1, (1, 4), last=0)
    run = rank_of(table, rank, "l2")
    run.ranks = ranks
    assert runs.resume(rig.ring, "train", run, "1.w0", go_on=False) is not None
    run = rank_of(table, rank, "l2")
    assert runs.stage(rig.ring, "train", run, "2.w2", [(6, 9)], {1: 1}) == left


def test_what_was_taken_ahead_for_a_loop_that_was_left_is_in_no_checkpoint(rig: Rig) -> None:
    """It comes again in the next sitting."""
    table = dealt(rig)
    assert staged(table, 1, (1, 4), last=0) == [(1, 5)]
    assert staged(table, 2, (6, 9), last=3, sitting=2) == [(6, 9)]


def test_a_spare_that_a_server_lost_is_in_no_checkpoint(rig: Rig) -> None:
    """Its number may be another sample's by now."""
    table = dealt(rig)
    rig.keys.hset(rig.key("meta"), mapping={"epoch": f"{rig.ring.epoch}.8-a1"})
    rig.ring.read_meta()
    assert staged(table, 2, (1, 4), (6, 7), last=1) == [(1, 7)]
