"""The scripts that deal whole rounds to several ranks: seats, shares, the end, and what a dead run leaves."""

import itertools
import re

import pytest

from rings import Rig, Table
from synthbroker import dealing
from synthbroker.dealing import Busy, Rules
from synthbroker.errors import ShutOutError


def padded(rig: Rig) -> int:
    return int(rig.keys.hget(rig.key("group:train"), "padded") or 0)


def test_a_round_is_a_batch_for_every_rank_and_is_given_again_when_asked_again(rig: Rig) -> None:
    rig.open()
    rig.put(rig.producer(), *range(1, 13))
    table = Table(rig, 2, 3)
    assert table.numbers(1, 0) == [4, 5, 6]
    assert [table.numbers(0, 0), table.numbers(0, 0), table.numbers(1, 0)] == [[1, 2, 3], [1, 2, 3], [4, 5, 6]]
    assert table.numbers(1, 1, received=0) == [10, 11, 12]
    seen = rig.balance().groups["train"]
    assert {name: held for name, held in seen.members.items() if held} == {
        "run.r0/0:w": 3,
        "run.r1/0:w": 6,
        f"run.deal/1:{table.generations[0]}": 3,
    }
    assert table.numbers(0, 1, received=0) == [7, 8, 9]
    assert not rig.keys.hexists(rig.key("rounds:train"), "deal:1:0"), "all had it"
    assert table.ask(0, 0)[0] == "LEFT"


def test_an_incomplete_round_waits_and_takes_what_comes(rig: Rig) -> None:
    rig.open()
    who, table = rig.producer(), Table(rig, 2, 2)
    rig.put(who, 1, 2, 3)
    assert [table.numbers(0, 0), table.numbers(1, 0)] == ["EMPTY", "EMPTY"]
    assert rig.balance().groups["train"].pending == 3
    rig.put(who, 4, 5)
    assert [table.numbers(1, 0), table.numbers(0, 0)] == [[3, 4], [1, 2]]
    assert table.numbers(0, 1, received=0) == "EMPTY"
    rig.ring.end()
    assert [table.share(rank, 1, received=0) for rank in (0, 1)] == [[(5, 1)], [(5, 2)]]
    assert [table.share(rank, 2, received=1) for rank in (0, 1)] == ["END", "END"]


def test_a_worker_that_is_ahead_has_the_rounds_before_its_own_dealt(rig: Rig) -> None:
    rig.open()
    rig.put(rig.producer(), *range(1, 8))
    rig.ring.end()
    table = Table(rig, 2, 2)
    other = table.join(0, 1)
    assert table.ask(0, 1, reader=other)[1].samples[0].number == 5  # type: ignore[union-attr]
    assert table.numbers(0, 0) == [1, 2]
    assert table.ask(0, 3, reader=other, received=1)[0] == "END"
    assert [table.share(1, i) for i in range(3)] == [[(3, 1), (4, 1)], [(7, 1), (5, 2)], "END"]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("count", [0, 1, 3, 4, 6, 12, 17, 25])
@pytest.mark.parametrize(("ranks", "share"), [(2, 3), (4, 1)])
def test_every_rank_gets_as_many_batches_of_the_same_size(
    rig: Rig, ranks: int, share: int, count: int, drop_last: bool
) -> None:
    rig.open()
    if count:
        rig.put(rig.producer(), *range(1, count + 1))
    rig.ring.end()
    table = Table(rig, ranks, share, drop_last=drop_last)
    found = table.read()
    sizes = [[len(batch) for batch in batches] for batches in found]
    assert sizes == sizes[:1] * ranks
    full, rest = divmod(count, ranks * share)
    assert sizes[0] == [share] * full + ([-(-rest // ranks)] if rest and not drop_last else [])
    samples = [one for batches in found for batch in batches for one in batch]
    own = sorted(number for number, uses in samples if uses == 1)
    assert own == list(range(1, (full * ranks * share if drop_last else count) + 1))
    assert padded(rig) == len(samples) - len(own) < ranks
    seen = rig.balance().groups["train"]
    assert (seen.pending, seen["acknowledged"], seen["doubled"]) == (0, count, 0)
    assert seen["reused"] == padded(rig)


def test_epochs_have_a_smaller_last_round(rig: Rig) -> None:
    rig.open()
    rig.put(rig.producer(), *range(1, 21))
    rig.ring.end()
    table = Table(rig, 2, 2, rounds=3, last_share=1)
    assert [[len(batch) for batch in batches] for batches in table.read()] == [[2, 2, 1, 2, 2, 1]] * 2


def test_reused_samples_fill_rounds(rig: Rig) -> None:
    rig.open()
    rig.put(rig.producer(), 1, 2, 3)
    rig.reader(reuse="2")
    rig.ring.end()
    rig.ring.leave_group(rig.reader(reuse="2"), "train")
    readers = [rig.reader(reuse="", name=f"run.r{rank}/0", word="w") for rank in range(2)]
    assert len(readers) == 2
    table = Table.__new__(Table)
    table.rig, table.ranks, table.run, table.word, table.readers = rig, 2, "run", "w", readers
    table.rules = Rules(2, 2, 0, 2, drop_last=False, epoch_size=None)
    table.generations = [table.sit(rank) for rank in range(2)]
    found = table.read()
    samples = [number for batches in found for batch in batches for number, _ in batch]
    assert sorted(samples)[:2] == [1, 1]
    assert len(samples) == 6, "each of three samples twice"
    assert padded(rig) == 0


def test_what_the_ring_loses_before_a_round_is_full_is_not_dealt(rig: Rig) -> None:
    rig.open("drop-oldest", max_samples=16)
    who, table = rig.producer(), Table(rig, 2, 2)
    rig.put(who, 1, 2)
    assert table.numbers(0, 0) == "EMPTY"
    rig.put(who, *range(3, 20))
    assert [table.numbers(0, 0), table.numbers(1, 0)] == [[8, 9], [10, 11]], "a quarter of the ring is stepped over"
    rig.balance()


def test_a_full_ring_of_less_than_a_round_is_dealt_short_when_asked_for(rig: Rig) -> None:
    rig.open(max_samples=3)
    who, table = rig.producer(), Table(rig, 2, 2)
    rig.put(who, 1, 2, 3)
    assert rig.put(who, 4).word == "FULL"
    assert table.ask(0, 0)[1].held  # type: ignore[union-attr]
    assert table.numbers(0, 0, short=1) == [1, 2]
    assert table.share(1, 0) == [(3, 1), (1, 2)]
    rig.ring.acknowledge("train", [1, 2, 3])
    assert rig.put(who, 4).word == "OK"


def test_the_next_sitting_has_what_the_former_one_did_not_fetch(rig: Rig) -> None:
    rig.open()
    rig.put(rig.producer(), *range(1, 9))
    rig.ring.end()
    table = Table(rig, 2, 2)
    assert table.numbers(0, 0) == [1, 2]
    assert table.numbers(0, 1, received=0) == [5, 6]
    rig.ring.leave_group(table.readers[0], "train")
    table.word = "v"
    table.readers[0] = table.join(0)
    got = [table.numbers(0, 0, sitting=2), table.numbers(0, 1, sitting=2, received=0)]
    assert got == [[1, 2], "EMPTY"], "rank 1 is in the former sitting still, and may leave something"
    assert table.numbers(1, 0) == [3, 4]
    rig.ring.acknowledge("train", [3, 4])
    assert sorted(table.numbers(1, 0, sitting=2)) == [5, 6]  # type: ignore[type-var]
    assert [table.numbers(rank, 1, sitting=2, received=0) for rank in (0, 1)] == [[7], [8]]
    assert [table.numbers(rank, 2, sitting=2, received=1) for rank in (0, 1)] == ["END", "END"]
    assert table.ask(1, 1)[0] == "LEFT"


def test_samples_of_readers_outside_the_run_are_awaited(rig: Rig) -> None:
    rig.open()
    rig.put(rig.producer(), 1, 2)
    stranger = rig.reader(name="x/0", word="x")
    assert rig.numbers(stranger, 1) == [1]
    rig.ring.end()
    table = Table(rig, 2, 1)
    assert table.numbers(0, 0) == "EMPTY"
    rig.ring.leave_group(stranger, "train")
    assert [sorted(table.share(rank, 0)) for rank in (0, 1)] == [[(2, 1)], [(1, 0)]]
    assert [table.numbers(rank, 1, received=0) for rank in (0, 1)] == ["END", "END"]


# -- seats


def test_ranks_that_differ_are_told_both_ways(rig: Rig) -> None:
    rig.open()
    Table(rig, 2, 3)
    other = Table.__new__(Table)
    other.rig, other.ranks, other.run, other.word = rig, 2, "run", "w"
    other.rules = Rules(2, 4, 0, 4, drop_last=False, epoch_size=None)
    answer = other.sit(1)
    assert isinstance(answer, Busy)
    error = dealing.taken(rig.ring, "train", answer, run="run", rank=1, rules=other.rules)
    assert re.search(r"others say world_size=2, batch_size=3.*rank 1 says .*batch_size=4", str(error))


def test_another_run_is_told_who_reads(rig: Rig) -> None:
    rig.open()
    Table(rig, 2, 3, run="one")
    other = Table.__new__(Table)
    other.rig, other.ranks, other.run, other.word = rig, 2, "two", "v"
    other.rules = Rules(2, 3, 0, 3, drop_last=False, epoch_size=None)
    answer = other.sit(0)
    assert isinstance(answer, Busy)
    assert answer.run == "one"
    rig.keys.delete(rig.key("consumers"))
    assert isinstance(other.sit(0), str), "the other run is dead"


def test_a_restarted_run_takes_over_at_once_and_shuts_the_former_one_out(rig: Rig) -> None:
    rig.open()
    rig.put(rig.producer(), *range(1, 13))
    old = Table(rig, 2, 3)
    assert [old.numbers(0, 0), old.numbers(1, 0), old.numbers(0, 1, received=0)] == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    new = Table(rig, 2, 3, word="w2")
    for reader in new.readers:
        rig.ring.join_group(reader, "train", "1", {})
    assert len(set(new.generations)) == 1
    assert old.ask(1, 1)[0] == "REJOIN"
    assert old.ask(1, 1, reader=old.join(1))[0] == "SHUT"
    with pytest.raises(ShutOutError, match="run 'run'"):
        old.sit(1, had=str(old.generations[1]))
    rig.ring.leave_group(old.readers[1], "train")
    shares = [new.numbers(rank, i, received=i - 1) for i in range(2) for rank in range(2)]
    assert sorted(itertools.chain(*shares)) == list(range(1, 13))
    rig.balance()


def test_an_earlier_attempt_does_not_come_back(rig: Rig) -> None:
    rig.open()
    table = Table(rig, 2, 3)
    rig.reader(name="run.r0/0", word="later")
    table.word = "later"
    assert table.sit(0, attempt="1") != table.generations[0]
    table.word = "earlier"
    with pytest.raises(ShutOutError):
        table.sit(1, attempt="0")


def test_a_rank_that_comes_when_the_others_have_left_gets_what_it_was_dealt(rig: Rig) -> None:
    rig.open()
    rig.put(rig.producer(), *range(1, 8))
    rig.ring.end()
    table = Table(rig, 2, 2, sat=1)
    for i, expected in enumerate([[1, 2], [5, 6]]):
        assert table.numbers(0, i, received=i - 1) == expected
        rig.ring.acknowledge("train", expected)
    assert table.numbers(0, 2, received=1) == "END"
    rig.ring.leave_group(table.readers[0], "train")
    dealing.rise(rig.ring, "train", table.readers[0], run="run", rank=0, had=str(table.generations[0]))
    table.readers.append(table.join(1))
    table.generations.append(table.sit(1))
    assert table.generations[0] == table.generations[1]
    assert [table.share(1, i, received=i - 1) for i in range(3)] == [[(3, 1), (4, 1)], [(7, 1), (5, 2)], "END"]
    rig.ring.acknowledge("train", [3, 4, 7])
    rig.ring.leave_group(table.readers[1], "train")
    dealing.rise(rig.ring, "train", table.readers[1], run="run", rank=1, had=str(table.generations[1]))
    assert not rig.keys.exists(rig.key("rounds:train"))
    assert padded(rig) == 1


def test_the_last_reader_that_leaves_clears_the_table(rig: Rig) -> None:
    rig.open()
    rig.put(rig.producer(), *range(1, 5))
    table = Table(rig, 2, 2)
    table.numbers(0, 0)
    for rank, reader in enumerate(table.readers):
        rig.ring.leave_group(reader, "train")
        dealing.rise(rig.ring, "train", reader, run="run", rank=rank, had=str(table.generations[rank]))
        assert rig.keys.exists(rig.key("rounds:train")) == (rank == 0)
    assert sorted(rig.numbers(rig.reader(name="x/0"), claim_after_s=1000)) == [1, 2, 3, 4]
