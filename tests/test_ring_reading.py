"""The ring's scripts, on the side of the readers: take and acknowledge, groups, floors, the end."""

import contextlib

import pytest

from rings import TWO_PARTS, Rig, take
from synthbroker import cutting, wire
from synthbroker.errors import RingMismatchError
from synthbroker.replies import Incarnation
from synthbroker.wire import Slice


def room_lines(rig: Rig) -> int:
    return int(rig.keys.xlen(rig.key("room")))


# -- groups


def test_two_groups_get_everything_and_members_of_one_share(rig: Rig) -> None:
    rig.open()
    who = rig.producer()
    a, b, alone = rig.reader(name="a/0"), rig.reader(name="b/0"), rig.reader("val", name="c/0")
    rig.put(who, *range(1, 11))
    shares = [rig.numbers(a, 3), rig.numbers(b, 3), rig.numbers(a, 3), rig.numbers(b, 3)]
    assert shares == [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10]]
    assert rig.numbers(alone, group="val") == list(range(1, 11))


def test_what_is_given_says_what_it_is(rig: Rig) -> None:
    rig.open()
    rig.put(rig.producer("gen", "w7"), 1, nbytes=5)
    taken = rig.take(rig.reader())
    (given,) = taken.samples
    entry = wire.read_entry(given.fields)
    assert (taken.word, given.number, given.uses) == ("OK", 1, 1)
    assert (entry.producer, entry.seq, entry.data) == ("gen:w7", 1, b"\x01\0\0\0\0")
    assert 0 <= taken.now_s - entry.made_s < 60


@pytest.mark.parametrize("missing", [(), (0,), (1,), (0, 1)])
def test_parts_are_fetched_into_memory_and_missing_ones_are_told(rig: Rig, missing: tuple[int, ...]) -> None:
    rig.open()
    rig.put(rig.producer(), 1, nbytes=TWO_PARTS)
    entry = wire.read_entry(rig.take(rig.reader()).samples[0].fields)
    memory = bytearray(entry.head.payload_bytes)
    sizes = [size for size, _ in entry.head.parts]
    pieces = cutting.scatter(sizes, [memoryview(memory)])
    for i in missing:
        rig.keys.rename(rig.key(f"part:{entry.uid}:{i}"), f"elsewhere:{rig.ring.name}:{i}")
    slices = [Slice(f"{entry.uid}:{i}", None, size) for i, size in enumerate(sizes)]
    with rig.ring.inflow() as inflow:
        inflow.want(slices)
        there = inflow.receive(pieces)
    assert there == [i not in missing for i in range(2)]
    if not missing:
        assert memory == b"\x01" + bytes(TWO_PARTS - 1)
    for i in missing:
        rig.keys.rename(f"elsewhere:{rig.ring.name}:{i}", rig.key(f"part:{entry.uid}:{i}"))


@pytest.mark.parametrize("received", [0, 1, 5, 40])
def test_who_stops_receiving_parts_leaves_a_clean_line(rig: Rig, received: int) -> None:
    """Parts are asked for ahead: replies that nobody took must not answer what is asked next."""
    names = [f"stop:{i}" for i in range(40)]
    for i, name in enumerate(names):
        rig.keys.set(rig.key(f"part:{name}"), bytes([i]) * 200_000, ex=60)
    memory = bytearray(200_000)
    slices = [Slice(name, None, 200_000) for name in names]
    with contextlib.suppress(ValueError), rig.ring.inflow() as inflow:
        inflow.want(slices)
        for i in range(received):
            assert inflow.receive([[memoryview(memory)]]) == [True]
            assert memory == bytes([i]) * 200_000
        raise ValueError("the training loop has had enough")
    rig.open()
    rig.put(rig.producer(), 1)
    assert rig.numbers(rig.reader()) == [1]
    rig.keys.delete(*(rig.key(f"part:{name}") for name in names))


def test_a_late_group_begins_at_the_oldest_live_sample(rig: Rig) -> None:
    rig.open("drop-oldest", max_samples=3)
    rig.put(rig.producer(), *range(1, 8))
    assert rig.numbers(rig.reader("late"), group="late") == [5, 6, 7]
    group = rig.balance().groups["late"]
    assert (group["since"], group["lost"], group["delivered"]) == (4, 0, 3)


def test_a_declared_group_holds_the_ring_until_it_comes(rig: Rig) -> None:
    rig.open(max_samples=3, groups=("train", "val"))
    who, reader = rig.producer(), rig.reader()
    assert rig.fill(who) == 3
    rig.ring.acknowledge("train", rig.numbers(reader))
    assert rig.put(who, 4).holder == "val"
    late = rig.reader("val", "4")
    rig.ring.acknowledge("val", rig.numbers(late, 3, "val"))
    assert rig.put(who, 4).word == "OK"
    assert rig.balance().groups["val"].reuse == "4", "the first who comes says how often"


def test_a_group_that_differs_in_reuse_is_refused_with_both_values(rig: Rig) -> None:
    rig.open()
    rig.reader(reuse="4")
    with pytest.raises(RingMismatchError, match=r"group 'train' of ring .* reuse=4, asked for was inf"):
        rig.reader(reuse="inf", word="c2")
    rig.reader(reuse="", word="c3")
    assert rig.balance().groups["train"].reuse == "4"


def test_who_is_not_registered_must_join_first(rig: Rig) -> None:
    rig.open()
    stranger = Incarnation("x/0", "w")
    assert take(rig.ring, stranger, "none", 1) is None
    reader = rig.reader()
    assert take(rig.ring, stranger, "train", 1) is None
    rig.ring.leave_group(reader, "train")
    assert take(rig.ring, reader, "train", 1) is None
    rig.reader()
    assert rig.take(reader).word == "EMPTY"


# -- the floor of a ring that blocks


@pytest.mark.parametrize(
    ("train", "val", "room", "holder"),
    [
        ((0, ()), (0, ()), 0, "train"),
        ((6, (1, 2, 3, 4, 5, 6)), (0, ()), 0, "val"),
        ((6, (1, 2, 3, 4, 5, 6)), (6, (1, 2, 3, 4, 5, 6)), 6, ""),
        ((6, (1, 2, 3, 4, 5, 6)), (4, (1, 2)), 2, "val"),
        ((6, (2, 3, 4, 5, 6)), (6, (1, 2, 3, 4, 5, 6)), 0, "train"),
        ((3, (1, 2, 3)), (6, (1, 2, 4, 5, 6)), 2, "val"),
        ((3, (1, 2, 3)), (6, (1, 2, 3, 4, 5, 6)), 3, "train"),
    ],
)
def test_nothing_is_evicted_that_any_group_has_not_acknowledged(
    rig: Rig, train: tuple[int, tuple[int, ...]], val: tuple[int, tuple[int, ...]], room: int, holder: str
) -> None:
    rig.open(max_samples=6)
    who = rig.producer()
    rig.fill(who)
    for group, (count, acknowledged) in {"train": train, "val": val}.items():
        reader = rig.reader(group)
        if count:
            rig.numbers(reader, count, group)
        rig.ring.acknowledge(group, acknowledged)
    answer = rig.put(who, *range(7, 13))
    assert answer.last == 6 + room
    assert (answer.word, answer.holder) == ("FULL" if holder else "OK", holder)
    assert rig.balance().live == range(1 + room, 7 + room)


def test_without_a_group_nothing_is_evicted(rig: Rig) -> None:
    rig.open(max_samples=3)
    who = rig.producer()
    assert rig.fill(who) == 3
    reader = rig.reader()
    rig.ring.acknowledge("train", rig.numbers(reader))
    rig.ring.drop("train")
    answer = rig.put(who, 4)
    assert (answer.word, answer.holder) == ("FULL", "")
    assert rig.balance().live == range(1, 4)


def test_a_dropped_group_makes_room_and_wakes_who_waits(rig: Rig) -> None:
    rig.open(max_samples=3)
    who, reader, gone = rig.producer(), rig.reader(), rig.reader("gone", "5")
    rig.fill(who)
    rig.ring.acknowledge("train", rig.numbers(reader))
    rig.numbers(gone, 2, "gone")
    answer = rig.put(who, 4)
    assert (answer.word, answer.holder) == ("FULL", "gone")
    rig.ring.drop("gone")
    assert rig.keys.xread({rig.key("room"): answer.room_id}, count=1), "who waits is woken"
    assert rig.put(who, 4).word == "OK"
    assert list(rig.balance().groups) == ["train"]
    assert not {key for key in rig.all_keys() if b"gone" in key}
    assert rig.keys.zrange(rig.key("consumers"), 0, -1) == [b"train f/0:c1"]


# -- acknowledging


def test_acknowledging_wakes_producers_only_where_one_waits(rig: Rig) -> None:
    rig.open(max_samples=3)
    who, reader = rig.producer(), rig.reader()
    rig.put(who, 1, 2, 3)
    rig.ring.acknowledge("train", rig.numbers(reader, 1))
    assert room_lines(rig) == 0, "nobody waits"
    assert rig.put(who, 4, 5).word == "FULL"
    lines = room_lines(rig)
    assert rig.numbers(reader, 2) == [2, 3]
    rig.ring.acknowledge("train", [3])
    assert room_lines(rig) == lines, "2 is still held: no room was made"
    rig.ring.acknowledge("train", [2])
    assert room_lines(rig) == lines + 1
    assert rig.put(who, 5).word == "OK"


def test_the_stream_that_says_so_stays_short(rig: Rig) -> None:
    rig.open(max_samples=1)
    who, reader = rig.producer(), rig.reader()
    for seq in range(1, 200):
        assert rig.put(who, seq).word == "OK"
        assert rig.put(who, seq + 1).word == "FULL"
        rig.ring.acknowledge("train", rig.numbers(reader))
    assert room_lines(rig) <= 200


def test_an_acknowledgement_counts_once(rig: Rig) -> None:
    rig.open("drop-oldest", max_samples=5)
    who, reader = rig.producer(), rig.reader()
    rig.put(who, *range(1, 6))
    rig.numbers(reader)
    assert rig.script("ack", rig.ring.epoch, "train", 0, 3, 4) == ["OK", 2, 0, 0]
    assert rig.script("ack", rig.ring.epoch, "train", 0, 4, 5) == ["OK", 1, 1, 0]
    rig.put(who, 6, 7)
    assert rig.script("ack", rig.ring.epoch, "train", 0, 1, 2) == ["OK", 0, 0, 2]
    assert rig.script("ack", rig.ring.epoch, "none", 0, 1) == ["NOGROUP"]
    group = rig.balance().groups["train"]
    assert (group["acknowledged"], group["doubled"], group["evicted_pending"]) == (3, 1, 2)


def test_a_double_is_counted_also_when_its_sample_has_left_a_ring_that_blocks(rig: Rig) -> None:
    rig.open("block", max_samples=2)
    who, reader = rig.producer(), rig.reader()
    rig.put(who, 1, 2)
    rig.ring.acknowledge("train", rig.numbers(reader))
    rig.put(who, 3, 4)
    assert rig.snapshot().live[0] == 3
    assert rig.script("ack", rig.ring.epoch, "train", 0, 1, 2) == ["OK", 0, 2, 0]
    assert rig.balance().groups["train"]["doubled"] == 2


def test_an_acknowledgement_said_again_for_want_of_an_answer_doubles_nothing(rig: Rig) -> None:
    rig.open()
    rig.put(rig.producer(), 1, 2, 3)
    rig.ring.acknowledge("train", rig.numbers(rig.reader(), 2))
    assert rig.script("ack", rig.ring.epoch, "train", 1, 1, 2) == ["OK", 0, 0, 0]
    assert rig.balance().groups["train"]["doubled"] == 0


# -- choosing


def test_nothing_is_given_before_the_ring_is_filled(rig: Rig) -> None:
    rig.open()
    who, reader = rig.producer(), rig.reader()
    rig.put(who, 1, 2)
    assert rig.take(reader, min_fill=3).word == "EMPTY"
    rig.put(who, 3)
    assert rig.numbers(reader, min_fill=3) == [1, 2, 3]
    rig.ring.end()
    assert rig.take(rig.reader("late"), group="late", min_fill=9).word == "OK", "an ended ring fills no more"


def test_only_what_the_named_producers_made_is_given(rig: Rig) -> None:
    rig.open()
    a, b, c = (rig.producer(name) for name in ("a", "b", "a:b"))
    for seq in range(1, 4):
        for who in (a, b, c):
            rig.put(who, seq)
    reader = rig.reader(reuse="3")
    assert rig.numbers(reader, 4, producers=["a", "a:b"]) == [1, 3, 4, 6]
    assert set(rig.numbers(reader, 100, producers=["a", "a:b"])) <= {1, 3, 4, 6, 7, 9}
    group = rig.balance().groups["train"]
    assert (group["delivered"], group["skipped"], group["acknowledged"]) == (9, 3, 3)


def test_who_passes_samples_over_makes_room_and_says_so(rig: Rig) -> None:
    rig.open(max_samples=3)
    who, reader = rig.producer("other"), rig.reader()
    rig.fill(who)
    answer = rig.put(who, 4)
    assert rig.take(reader, producers=["wanted"]).word == "EMPTY"
    assert rig.keys.xread({rig.key("room"): answer.room_id}, count=1), "who waits is woken"
    assert rig.put(who, 4).word == "OK"
