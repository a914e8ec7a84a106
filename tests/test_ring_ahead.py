"""What a consumer is given ahead of need, what stands between the samples, and what leaves before it is read."""

from typing import Any

import pytest

from rings import Rig
from synthbroker import taking
from synthbroker.replies import Taken
from synthbroker.ring import Ring

MOST = 64


def write(rig: Rig, *entry_ids: str) -> None:
    for entry_id in entry_ids:
        rig.keys.execute_command("XADD", rig.key("samples"), entry_id, "hello", "world")


# -- more than wanted


@pytest.mark.parametrize(
    ("waiting", "others", "given"),
    [
        (3, 0, 3),
        (10, 0, 4),  # a share of less than what is wanted
        (64, 0, 4),
        (160, 0, 10),
        (1200, 0, MOST),
        (1200, 1, 37),
        (1200, 2, 25),
        (400, 5, 4),
        (400, 4, 5),
    ],
)
def test_where_many_are_waiting_a_share_of_them_is_given_ahead(rig: Rig, waiting: int, others: int, given: int) -> None:
    rig.open()
    rig.put(rig.producer(), *range(1, waiting + 1))
    reader = rig.reader()
    for i in range(others):
        rig.reader(name=f"other-{i}/0")
    assert rig.numbers(reader, 4, most=MOST) == list(range(1, given + 1))
    group = rig.balance().groups["train"]
    assert (group["delivered"], group.pending, group.members["f/0:c1"]) == (given, given, given)


def test_no_more_than_wanted_is_given_where_nobody_asks_for_more(rig: Rig) -> None:
    rig.open()
    rig.put(rig.producer(), *range(1, 201))
    reader = rig.reader()
    assert len(rig.numbers(reader, 4)) == 4
    assert len(rig.numbers(reader, 4, most=4)) == 4
    assert len(rig.numbers(reader, 4, most=5)) == 5
    assert len(rig.numbers(reader, 4, most=1)) == 4, "what is wanted is given all the same"


def test_members_of_other_groups_share_nothing(rig: Rig) -> None:
    rig.open()
    rig.put(rig.producer(), *range(1, 401))
    reader = rig.reader()
    for i in range(9):
        rig.reader("val", name=f"v/{i}")
    assert len(rig.numbers(reader, 4, most=MOST)) == 25


def test_shares_get_smaller_and_everything_is_given_once(rig: Rig) -> None:
    rig.open()
    rig.put(rig.producer(), *range(1, 1201))
    readers = [rig.reader(name=f"f/{i}") for i in range(3)]
    seen: list[int] = []
    sizes: list[int] = []
    while len(seen) < 1200:
        numbers = rig.numbers(readers[len(sizes) % 3], 2, most=MOST)
        assert numbers
        seen += numbers
        sizes.append(len(numbers))
    assert seen == list(range(1, 1201))
    assert sizes == sorted(sizes, reverse=True)
    assert (sizes[0], sizes[-2]) == (25, 2)


def test_what_is_given_again_is_no_more_than_wanted(rig: Rig) -> None:
    rig.open()
    rig.put(rig.producer(), *range(1, 201))
    reader = rig.reader(reuse="inf")
    while len(rig.numbers(reader, 4, most=MOST)) > 4:
        pass
    while rig.take(reader, 4, most=MOST).samples[0].uses == 1:
        pass
    taken = rig.take(reader, 4, most=MOST)
    assert 0 < len(taken.samples) <= 4
    assert {sample.uses for sample in taken.samples} == {2}


def test_ahead_of_need_only_what_named_producers_made_is_given(rig: Rig) -> None:
    rig.open()
    a, b = rig.producer("a"), rig.producer("b")
    for start in range(1, 401, 10):
        rig.put(a, *range(start, start + 10))
        rig.put(b, *range(start, start + 10))
    reader = rig.reader()
    taken = rig.take(reader, 4, most=MOST, producers=["b"])
    assert [sample.number for sample in taken.samples] == [*range(11, 21), *range(31, 41)]
    group = rig.balance().groups["train"]
    assert group["delivered"] == 50
    assert (group["skipped"], group.pending) == (30, 20)


@pytest.mark.parametrize("wanted", [1, 4])
def test_before_all_that_the_dead_left_is_given_nothing_is_given_ahead(rig: Rig, wanted: int) -> None:
    rig.open()
    rig.put(rig.producer(), *range(1, 601))
    dead, reader = rig.reader(name="dead/0"), rig.reader()
    assert rig.numbers(dead, 6) == [1, 2, 3, 4, 5, 6]
    rig.ring.leave_group(dead, "train")
    seen: list[tuple[int, int]] = []
    while len(seen) < 6:
        taken = rig.take(reader, wanted, most=10, claim_after_s=60)
        assert len(taken.samples) == wanted
        seen += [(one.number, one.uses) for one in taken.samples]
    assert seen[:6] == [(number, 0) for number in range(1, 7)]
    assert len(rig.numbers(reader, wanted, most=10, claim_after_s=60)) == 10
    rig.balance()


# -- what stands between


def test_foreign_entries_in_front_of_and_between_samples_are_stepped_over(rig: Rig) -> None:
    rig.open(groups=("train",))
    write(rig, "0-1", "0-2")
    who = rig.producer()
    for seq in range(1, 6):
        assert rig.put(who, seq).word == "OK"
        write(rig, f"{seq}-1", f"{seq}-7")
    reader = rig.reader()
    assert rig.numbers(reader, 2) == [1, 2]
    seen = rig.balance()
    assert seen["foreign"] == 12, "all of them go at once, also those that nobody has come to"
    taken = rig.take(reader, 100)
    assert [sample.number for sample in taken.samples] == [3, 4, 5]
    assert taken.gone == 0
    notes = [note[b"id"] for _, note in rig.keys.xrange(rig.key("quarantine"))]
    assert notes == [b"0-1", b"0-2", *[f"{seq}-{i}".encode() for seq in range(1, 6) for i in (1, 7)]]


@pytest.mark.parametrize("count", [63, 64, 65, 200])
def test_many_foreign_entries_between_two_samples_are_removed(rig: Rig, count: int) -> None:
    rig.open()
    who, reader = rig.producer(), rig.reader()
    rig.put(who, 1)
    write(rig, *[f"1-{i}" for i in range(1, count + 1)])
    rig.put(who, 2)
    assert rig.numbers(reader) == [1, 2]
    assert rig.balance()["foreign"] == count


def test_a_foreign_entry_that_comes_between_take_and_reading_is_not_given(rig: Rig, monkeypatch: Any) -> None:
    rig.open()
    who, reader = rig.producer(), rig.reader()
    rig.put(who, 1, 2, 3)
    before_reading(monkeypatch, lambda: write(rig, "3-5"))
    assert rig.numbers(reader) == [1, 2, 3]
    monkeypatch.undo()
    assert rig.take(reader).word == "EMPTY"
    assert rig.balance()["foreign"] == 1


def test_foreign_entries_are_no_part_of_what_is_waiting(rig: Rig) -> None:
    rig.open()
    rig.put(rig.producer(), *range(1, 33))
    write(rig, *[f"32-{i}" for i in range(1, 101)])
    assert rig.numbers(rig.reader(), 1, most=MOST) == [1, 2]


# -- what leaves before it is read


def before_reading(monkeypatch: Any, happens: Any) -> None:
    """Let something happen between the script of `take` and the reading of its entries."""
    ask = taking._ask_for_entries

    def late(ring: Ring, *arguments: Any) -> Any:
        happens()
        return ask(ring, *arguments)

    monkeypatch.setattr(taking, "_ask_for_entries", late)


def test_what_is_evicted_before_it_is_read_is_told(rig: Rig, monkeypatch: Any) -> None:
    rig.open("drop-oldest", max_samples=6)
    who, reader = rig.producer(), rig.reader()
    rig.put(who, *range(1, 7))
    before_reading(monkeypatch, lambda: rig.put(who, 7, 8))
    taken: Taken = rig.take(reader, 4)
    assert (taken.word, taken.gone) == ("OK", 2)
    assert [sample.number for sample in taken.samples] == [3, 4]
    group = rig.balance().groups["train"]
    assert (group["delivered"], group["evicted_pending"], group["lost"], group.pending) == (4, 2, 0, 2)


def test_all_that_was_given_may_be_gone(rig: Rig, monkeypatch: Any) -> None:
    rig.open("drop-oldest", max_samples=3)
    who, reader = rig.producer(), rig.reader()
    rig.put(who, 1, 2, 3)
    before_reading(monkeypatch, lambda: rig.put(who, 4, 5, 6))
    taken = rig.take(reader, 3)
    assert (taken.word, taken.samples, taken.gone) == ("OK", (), 3)
    rig.balance()


def test_what_is_given_again_may_be_gone_too(rig: Rig, monkeypatch: Any) -> None:
    rig.open("drop-oldest", max_samples=6)
    who, reader = rig.producer(), rig.reader(reuse="3")
    rig.put(who, *range(1, 7))
    assert len(rig.numbers(reader, 6)) == 6
    before_reading(monkeypatch, lambda: rig.put(who, 7, 8, 9))
    taken = rig.take(reader, 6)
    assert sorted(sample.number for sample in taken.samples) == [4, 5, 6]
    assert taken.gone == 3
    rig.balance()


def test_nothing_is_gone_where_nothing_left(rig: Rig) -> None:
    rig.open()
    reader = rig.reader()
    assert rig.take(reader).gone == 0
    rig.put(rig.producer(), 1, 2)
    assert rig.take(reader).gone == 0


def test_a_sample_that_somebody_removed_hides_no_foreign_entry(rig: Rig) -> None:
    """One less and one more: the stream is as long as the ring has samples, and who waits must not spin."""
    rig.open()
    rig.put(rig.producer(), 1, 2, 3)
    rig.keys.xdel(rig.key("samples"), "2-0")
    write(rig, "9-0")
    reader = rig.reader()
    assert rig.numbers(reader) == [1, 3]
    taken = rig.take(reader)
    waited = rig.keys.xread({rig.key("samples"): taken.wait_id}, count=1, block=1)
    rig.ring.drop()  # its books are not what the test is about
    assert (taken.word, waited) == ("EMPTY", [])
