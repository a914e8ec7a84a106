"""What somebody else wrote into a ring's stream is counted and stepped over; it stops nobody and nothing is lost."""

import pytest

from rings import Rig

HIGHER = ["3-5", "4-0", "9-0", "1700000000000-0", "18446744073709551615-0", "18446744073709551615-18446744073709551615"]


def write(rig: Rig, entry_id: str) -> None:
    rig.keys.execute_command("XADD", rig.key("samples"), entry_id, "hello", "world")


@pytest.mark.parametrize("entry_id", HIGHER)
def test_a_producer_goes_on_behind_a_foreign_entry(rig: Rig, entry_id: str) -> None:
    rig.open(groups=("val",))
    who, reader = rig.producer(), rig.reader()
    rig.put(who, 1, 2, 3)
    rig.ring.acknowledge("train", rig.numbers(reader, 1))
    assert rig.numbers(reader, 1) == [2]
    write(rig, entry_id)
    assert rig.put(who, 4, 5).last == 5
    assert rig.balance(foreign=int(entry_id == "3-5")).groups["train"].members == {"f/0:c1": 1}
    assert rig.numbers(reader) == [3, 4, 5]
    assert rig.balance()["foreign"] == 1
    assert rig.numbers(rig.reader("val"), group="val") == [1, 2, 3, 4, 5]
    rig.ring.acknowledge("train", [2, 3, 4, 5])


@pytest.mark.parametrize("entry_id", HIGHER)
def test_a_reader_steps_over_a_foreign_entry_and_does_not_spin_on_it(rig: Rig, entry_id: str) -> None:
    rig.open()
    who, reader = rig.producer(), rig.reader()
    rig.put(who, 1, 2, 3)
    write(rig, entry_id)
    assert rig.numbers(reader) == [1, 2, 3]
    seen = rig.balance()
    assert (seen["foreign"], seen.groups["train"]["delivered"]) == (1, 3)
    taken = rig.take(reader)
    assert taken.word == "EMPTY"
    assert rig.keys.xread({rig.key("samples"): taken.wait_id}, count=1, block=1) == [], "waiting would not wait"
    assert rig.put(who, 4).word == "OK"
    assert rig.keys.xread({rig.key("samples"): taken.wait_id}, count=1, block=1), "what comes now wakes"
    assert rig.numbers(reader) == [4]


def test_a_foreign_entry_before_the_first_sample_is_stepped_over(rig: Rig) -> None:
    for entry_id in ("0-1", "1-0", "77-0"):
        rig.open(groups=("train",), reopen=True)
        write(rig, entry_id)
    who = rig.producer()
    assert rig.put(who, 1, 2).last == 2
    assert rig.numbers(rig.reader()) == [1, 2]
    assert rig.balance()["foreign"] == 3


def test_who_waits_for_the_first_sample_does_not_spin_on_a_foreign_entry(rig: Rig) -> None:
    rig.open()
    reader = rig.reader()
    write(rig, "77-0")
    taken = rig.take(reader)
    assert taken.word == "EMPTY"
    assert rig.keys.xread({rig.key("samples"): taken.wait_id}, count=1, block=1) == []
    rig.put(rig.producer(), 1)
    assert rig.numbers(reader) == [1]


def test_foreign_entries_that_nobody_reads_leave_with_the_samples_around_them(rig: Rig) -> None:
    rig.open("drop-oldest", max_samples=3)
    who = rig.producer()
    for seq in range(1, 10):
        rig.put(who, seq)
        write(rig, f"{seq}-7")
    rig.foreign = 3
    assert rig.balance(foreign=3)["foreign"] == 6


def test_many_foreign_entries_at_once_are_removed(rig: Rig) -> None:
    rig.open()
    who, readers = rig.producer(), [rig.reader(), rig.reader("val")]
    rig.put(who, *range(1, 201))
    held = rig.numbers(readers[0], 150)
    for i in range(200):
        write(rig, f"{1000 + i}-0")
    assert rig.put(who, 201).word == "OK"
    seen = rig.balance()
    assert seen["foreign"] == 200
    assert seen.groups["train"].pending == 150
    rig.ring.acknowledge("train", held)
    assert rig.numbers(readers[0]) == list(range(151, 202))
    assert rig.numbers(readers[1], 300, "val") == list(range(1, 202))


def test_what_dead_readers_hold_is_still_claimed_after_healing(rig: Rig) -> None:
    rig.open()
    who, dead = rig.producer(), rig.reader(name="dead/0")
    rig.put(who, 1, 2, 3)
    assert rig.numbers(dead) == [1, 2, 3]
    rig.keys.xclaim(rig.key("samples"), "train", str(dead), 0, ["2-0"])  # given twice already
    before = rig.keys.xpending_range(rig.key("samples"), "train", "-", "+", 10)
    write(rig, "*")
    rig.put(who, 4)
    after = rig.keys.xpending_range(rig.key("samples"), "train", "-", "+", 10)
    for field in ("message_id", "consumer", "times_delivered"):
        assert [one[field] for one in after] == [one[field] for one in before]
    rig.ring.leave_group(dead, "train")
    assert rig.numbers(rig.reader(name="heir/0"), claim_after_s=30) == [1, 2, 3, 4]


def test_a_ring_that_is_full_in_a_blocking_way_heals_too(rig: Rig) -> None:
    rig.open(max_samples=2)
    who, reader = rig.producer(), rig.reader()
    rig.put(who, 1, 2)
    write(rig, "*")
    assert rig.put(who, 3).word == "FULL"
    rig.ring.acknowledge("train", rig.numbers(reader))
    assert rig.put(who, 3, 4).last == 4
    assert rig.numbers(reader) == [3, 4]
    rig.balance()


def test_a_foreign_entry_is_noted_with_its_id(rig: Rig) -> None:
    rig.open()
    rig.put(rig.producer(), 1)
    write(rig, "5-5")
    rig.numbers(rig.reader())
    ((_, note),) = rig.keys.xrange(rig.key("quarantine"))
    assert note == {b"id": b"5-5", b"reason": b"foreign entry"}
