"""The ring's scripts, where a server came back: epochs count on, members say what they know."""

import pytest

from rings import Rig


def test_the_epoch_counts_on_with_each_other_server_process(rig: Rig) -> None:
    first = rig.open().epoch
    assert rig.script("arrive", "", "run1", 0, "a1") == ["OK", first]
    assert rig.script("arrive", first, "run1", 0, "a2") == ["OK", first]
    rig.put(rig.producer(), 1, 2, 3)
    second, third = f"{first}.4-a3", f"{first}.4-a3.4-a5"
    assert rig.script("arrive", first, "run2", 0, "a3") == ["OK", second]
    assert rig.script("arrive", first, "run2", 1, "a4") == ["OK", second], "that is settled"
    assert rig.script("arrive", second, "", 1, "a5") == ["OK", third]
    found = rig.ring.read_meta()
    assert (found.bound(first), found.bound(second), found.bound("other")) == (4, 4, 0)
    assert rig.ring.epoch == third


def long(since: int) -> str:
    """Name an epoch whose oldest arrivals are forgotten."""
    return "ab" + "".join(f".{i + 3}-a{i:02}" for i in range(since, since + 20))


@pytest.mark.parametrize(
    ("current", "other", "bound"),
    [
        ("ab.3-a1", "ab", 3),
        ("ab.5-a1.3-a2", "ab", 3),
        ("ab.5-a1.7-a2", "ab", 5),
        ("ab.5-a1.7-a2", "ab.5-a1", 7),
        ("ab.4-a1", "ab.6-b1", 4),
        ("ab.6-a1", "ab.4-b1", 4),
        ("ab.7-a1.6-a2", "ab.7-a1.4-b2.5-b3", 4),
        ("ab", "ab.4-b1", 4),
        ("ab.5-a1", "ac", 0),
        ("ab.5-a1", "ac.5-a1", 0),
        (long(0), "ab", 0),
        (long(1), long(0), 23),
    ],
)
def test_numbers_mean_the_same_up_to_where_two_histories_part(rig: Rig, current: str, other: str, bound: int) -> None:
    rig.open()
    rig.put(rig.producer(), *range(1, 9))
    reader = rig.reader()
    rig.numbers(reader, 8)
    rig.keys.hset(rig.key("meta"), "epoch", current)
    assert rig.ring.read_meta().bound(other) == bound
    assert rig.script("settle", other, "train", "", 0, *range(1, 9)) == ["OK" if bound else "NORING"]
    acknowledged = min(bound - 1, 8) if bound else 0
    assert rig.balance().groups["train"]["acknowledged"] == acknowledged, "scripts and clients think alike"


def test_no_ring_has_no_epoch_to_count(rig: Rig) -> None:
    assert rig.script("arrive", "", "run1", 0, "a1") == ["NORING"]
    rig.open()


def test_a_group_is_given_back_what_its_members_know(rig: Rig) -> None:
    first = rig.open().epoch
    rig.script("arrive", "", "run1", 0, "a1")
    rig.put(rig.producer(), *range(1, 9))
    one, two = rig.reader(name="f/0"), rig.reader(name="f/1")
    assert rig.numbers(one, 2) == [1, 2]
    rig.script("arrive", "", "run2", 0, "a2")
    rig.ring.read_meta()
    assert rig.take(one).word == "UNSETTLED"
    assert rig.script("settle", first, "train", "", 0, 1, 3) == ["WAIT"]  # 3 was given, and trained on, unknown to it
    assert rig.script("settle", first, "train", str(one), 1, 2, 4, 99) == ["WAIT"]
    assert rig.script("settle", first, "train", str(two), 1, 6) == ["OK"]
    seen = rig.balance().groups["train"]
    assert seen.members == {str(one): 2, str(two): 1, "nobody": 1}
    assert (seen["acknowledged"], seen["delivered"], seen.last_delivered) == (2, 6, 6)
    assert sorted(rig.numbers(two, 9, claim_after_s=30)) == [5, 7, 8]


def test_what_was_evicted_while_members_were_asked_is_booked_once(rig: Rig) -> None:
    first = rig.open("drop-oldest", max_samples=4).epoch
    rig.script("arrive", "", "run1", 0, "a1")
    rig.put(who := rig.producer(), 1, 2, 3, 4)
    one, two = rig.reader(name="f/0"), rig.reader(name="f/1")
    rig.script("arrive", "", "run2", 0, "a2")
    rig.ring.read_meta()
    assert rig.script("settle", first, "train", str(one), 1, 1, 2) == ["WAIT"]
    rig.put(who, 5, 6, 7)
    assert rig.script("settle", first, "train", str(two), 1, 4) == ["OK"]
    assert rig.balance().groups["train"].members == {str(one): 0, str(two): 1}
    assert rig.script("arrive", "", "run3", 0, "a3")[0] == "OK"
    rig.ring.read_meta()
    assert rig.script("settle", rig.ring.epoch, "train", str(one), 1, 5) == ["WAIT"]
    rig.put(who, 8, 9, 10)
    assert rig.script("settle", rig.ring.epoch, "train", str(two), 1) == ["OK"]
    rig.balance()


@pytest.mark.parametrize("gone", ["left", "dead before"])
def test_who_is_gone_is_not_awaited(rig: Rig, gone: str) -> None:
    first = rig.open().epoch
    rig.script("arrive", "", "run1", 0, "a1")
    rig.put(rig.producer(), 1, 2)
    one, two = rig.reader(name="f/0"), rig.reader(name="f/1")
    assert rig.numbers(one, 1) == [1]
    if gone == "dead before":
        rig.keys.zadd(rig.key("consumers"), {f"train {two}": 1000})
    rig.script("arrive", "", "run2", 0, "a2")
    if gone == "left":
        rig.ring.read_meta()
        rig.ring.leave_group(two, "train")
    assert rig.script("settle", first, "train", str(one), 1, 1) == ["OK"]
    rig.ring.read_meta()
    assert rig.numbers(one) == [2]


def test_numbers_of_a_former_epoch_count_as_far_as_they_mean_the_same(rig: Rig) -> None:
    first = rig.open().epoch
    rig.script("arrive", "", "run1", 0, "a1")
    rig.put(who := rig.producer(), 1, 2)
    rig.script("arrive", "", "run2", 0, "a2")
    rig.ring.read_meta()
    rig.put(who, 3, 4)
    assert rig.numbers(rig.reader()) == [1, 2, 3, 4]
    assert rig.script("ack", first, "train", 0, 1, 2, 3, 4) == ["OK", 2, 0, 0]
    assert rig.balance().groups["train"].pending == 2
    assert rig.script("ack", "other", "train", 0, 3) == ["NORING"]
