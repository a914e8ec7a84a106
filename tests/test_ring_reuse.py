"""What a group may be given again, what it inherits from the dead, and how it stays off the tail."""

from collections import Counter

import pytest

from rings import Rig
from synthbroker.replies import Incarnation

LONG_AGO_S = 1000.0


def uses(rig: Rig, who: Incarnation, count: int, group: str = "train") -> dict[int, int]:
    return {sample.number: sample.uses for sample in rig.take(who, count, group).samples}


# -- reuse


def test_fresh_samples_come_first_and_fill_up_with_used_ones(rig: Rig) -> None:
    rig.open()
    who, reader = rig.producer(), rig.reader(reuse="3")
    rig.put(who, 1, 2, 3)
    assert uses(rig, reader, 2) == {1: 1, 2: 1}
    mixed = rig.take(reader, 2).samples
    assert (mixed[0].number, mixed[0].uses) == (3, 1)
    assert mixed[1].uses == 2
    rig.put(who, 4)
    assert rig.take(reader, 1).samples[0].number == 4


def test_with_reuse_1_nothing_is_given_again(rig: Rig) -> None:
    rig.open()
    reader = rig.reader()
    rig.put(rig.producer(), 1, 2)
    assert rig.numbers(reader, 5) == [1, 2]
    rig.ring.acknowledge("train", [1])
    assert rig.take(reader).word == "EMPTY"


@pytest.mark.parametrize("k", [2, 5])
@pytest.mark.parametrize("ended", [False, True])
def test_every_sample_is_used_exactly_k_times_and_never_more(rig: Rig, k: int, ended: bool) -> None:
    rig.open()
    reader = rig.reader(reuse=str(k))
    rig.put(rig.producer(), *range(1, 11))
    if ended:
        rig.ring.end()
    given: list[tuple[int, int]] = []
    while samples := rig.take(reader, 3).samples:
        given += [(sample.number, sample.uses) for sample in samples]
    assert Counter(number for number, _ in given) == dict.fromkeys(range(1, 11), k)
    for number in range(1, 11):
        assert [times for other, times in given if other == number] == list(range(1, k + 1))
    assert rig.balance().groups["train"]["reused"] == 10 * (k - 1)
    assert rig.take(reader).word == ("END" if ended else "EMPTY")


def test_the_least_used_come_before_all_others_in_random_order(rig: Rig) -> None:
    rig.open()
    readers = [rig.reader("a", "4"), rig.reader("b", "4")]
    rig.put(rig.producer(), *range(1, 21))
    orders = []
    for reader, group in zip(readers, "ab", strict=True):
        rounds = [rig.numbers(reader, 20, group) for _ in range(4)]
        assert all(sorted(one) == list(range(1, 21)) for one in rounds)
        orders += rounds[1:]
    assert len({tuple(order) for order in orders}) == 6, "drawn, not in turn"


def test_without_a_limit_samples_are_drawn_uniformly_among_those_given(rig: Rig) -> None:
    rig.open()
    reader = rig.reader(reuse="inf")
    rig.put(rig.producer(), *range(1, 12))
    assert rig.numbers(reader, 10) == list(range(1, 11))
    rig.numbers(reader, 1)
    given: Counter[int] = Counter()
    for _ in range(400):
        samples = rig.take(reader, 5).samples
        assert len({sample.number for sample in samples}) == len(samples) == 5, "no sample twice in one answer"
        assert {sample.uses for sample in samples} == {2}
        given.update(sample.number for sample in samples)
    assert set(given) == set(range(1, 12))
    assert all(110 < count < 260 for count in given.values()), f"expected about 182 of each: {given}"


def test_what_is_still_fresh_is_not_drawn(rig: Rig) -> None:
    rig.open()
    who = rig.producer()
    rig.put(who, *range(1, 9))
    for limit in ("inf", "9"):
        reader = rig.reader(f"g{limit}", limit)
        assert rig.numbers(reader, 4, f"g{limit}") == [1, 2, 3, 4]
    rig.put(who, 9)
    assert rig.balance().groups["ginf"].last_delivered == 4


def test_reuse_without_limit_ends_with_the_ring_and_with_one_goes_on_to_its_limit(rig: Rig) -> None:
    rig.open()
    endless, twice = rig.reader("inf", "inf"), rig.reader("two", "2")
    rig.put(rig.producer(), 1, 2)
    rig.ring.end()
    assert rig.numbers(endless, 2, "inf") == rig.numbers(twice, 2, "two") == [1, 2]
    assert rig.take(endless, group="inf").word == "END"
    assert sorted(rig.numbers(twice, 2, "two")) == [1, 2]
    assert rig.take(twice, group="two").word == "END"


@pytest.mark.parametrize("reuse", ["3", "inf"])
def test_what_left_the_ring_is_not_given_again_and_its_uses_are_forgotten(rig: Rig, reuse: str) -> None:
    rig.open("drop-oldest", max_samples=5)
    who, reader = rig.producer(), rig.reader(reuse=reuse)
    for seq in range(1, 40):
        rig.put(who, seq)
        live = rig.snapshot().live
        assert set(rig.numbers(reader, 3)) <= set(live)
        rig.balance()
    assert rig.keys.zcard(rig.key("uses:train")) <= 5


def test_in_a_ring_that_blocks_used_samples_stay_until_they_are_evicted(rig: Rig) -> None:
    rig.open(max_samples=4)
    who, reader = rig.producer(), rig.reader(reuse="3")
    rig.fill(who)
    rig.ring.acknowledge("train", rig.numbers(reader, 4))
    assert set(uses(rig, reader, 4).values()) == {2}
    assert rig.put(who, 5, 6).word == "OK"
    assert set(rig.numbers(reader, 2)) == {5, 6}
    assert set(rig.numbers(reader, 50)) == {3, 4, 5, 6}


# -- the dead and the living


def silence(rig: Rig, who: Incarnation, group: str = "train") -> None:
    """Let a reader's last heartbeat have been long ago."""
    member = f"{group} {who}"
    assert rig.keys.zadd(rig.key("consumers"), {member: rig.ring.now_s() - LONG_AGO_S}, xx=True, ch=True) == 1


def test_what_a_silent_reader_holds_is_given_to_others_first_of_all(rig: Rig) -> None:
    rig.open()
    dead, heir = rig.reader(name="dead/0"), rig.reader(name="heir/0")
    rig.put(rig.producer(), 1, 2, 3, 4, 5)
    assert rig.numbers(dead, 3) == [1, 2, 3]
    assert rig.numbers(heir, 1, claim_after_s=30) == [4], "it lives"
    silence(rig, dead)
    assert rig.numbers(heir, 1) == [5], "nobody looked for the dead"
    assert rig.take(heir, 2, claim_after_s=30).samples[0].uses == 0
    assert rig.numbers(heir, 2, claim_after_s=30) == [3]
    group = rig.balance().groups["train"]
    assert (group["redelivered"], group["delivered"]) == (3, 5)
    assert group.members == {"heir/0:c1": 5}
    assert rig.ring.held_by(heir, "train", 9) == [(1, 2), (2, 2), (3, 2), (4, 1), (5, 1)]


def test_who_holds_samples_for_long_but_beats_is_not_dead(rig: Rig) -> None:
    """A long validation is not a death: only the heartbeat counts, never how long a sample has been held."""
    rig.open()
    slow, other = rig.reader(name="slow/0"), rig.reader(name="other/0")
    rig.put(rig.producer(), 1, 2)
    rig.numbers(slow)
    silence(rig, slow)
    assert rig.ring.beat("consumer", f"train {slow}", {})
    rig.keys.xclaim(rig.key("samples"), "train", str(slow), 0, ["1-0", "2-0"], idle=10**7)
    assert rig.take(other, claim_after_s=30).word == "EMPTY"
    assert rig.balance().groups["train"].members[str(slow)] == 2


def test_who_said_goodbye_leaves_its_samples_at_once(rig: Rig) -> None:
    rig.open()
    first, second = rig.reader(name="a/0"), rig.reader(name="b/0")
    rig.put(rig.producer(), 1, 2)
    rig.numbers(first)
    rig.ring.leave_group(first, "train")
    assert rig.numbers(second, claim_after_s=1000) == [1, 2]
    assert not rig.ring.beat("consumer", f"train {first}", {}), "it must join again"


def test_a_restarted_reader_takes_over_from_its_former_self_by_its_silence(rig: Rig) -> None:
    rig.open()
    rig.put(rig.producer(), 1, 2)
    before = rig.reader(word="c1")
    rig.numbers(before)
    after = rig.reader(word="c2")
    silence(rig, before)
    assert rig.numbers(after, claim_after_s=30) == [1, 2]
    assert rig.balance().groups["train"].members == {str(after): 2}


def test_the_dead_are_forgotten_only_when_nothing_of_theirs_is_left(rig: Rig) -> None:
    rig.open()
    dead, heir = rig.reader(name="dead/0"), rig.reader(name="heir/0")
    rig.put(rig.producer(), *range(1, 101))
    rig.numbers(dead, 100)
    rig.ring.leave_group(dead, "train")
    for start in range(1, 101, 40):
        assert rig.numbers(heir, 40, claim_after_s=30) == list(range(start, min(start + 40, 101)))
        assert str(dead) in rig.snapshot().groups["train"].members or start > 80
    assert list(rig.balance().groups["train"].members) == [str(heir)]


def test_a_late_acknowledgement_by_the_dead_counts_and_the_heirs_is_a_double(rig: Rig) -> None:
    rig.open()
    dead, heir = rig.reader(name="dead/0"), rig.reader(name="heir/0")
    rig.put(rig.producer(), 1, 2)
    rig.numbers(dead)
    silence(rig, dead)
    assert rig.numbers(heir, claim_after_s=30) == [1, 2]
    rig.ring.acknowledge("train", [1])
    rig.ring.acknowledge("train", [1, 2])
    group = rig.balance().groups["train"]
    assert (group["acknowledged"], group["doubled"]) == (2, 1)


def test_what_the_dead_held_and_the_ring_evicted_is_not_given(rig: Rig) -> None:
    rig.open("drop-oldest", max_samples=4)
    who, dead, heir = rig.producer(), rig.reader(name="dead/0"), rig.reader(name="heir/0")
    rig.put(who, 1, 2, 3, 4)
    rig.numbers(dead)
    rig.put(who, 5, 6)
    silence(rig, dead)
    assert rig.numbers(heir, claim_after_s=30) == [3, 4, 5, 6]
    assert rig.balance().groups["train"]["evicted_pending"] == 2


# -- the tail


def test_a_slow_reader_is_kept_off_the_tail(rig: Rig) -> None:
    """Were it given the oldest, half of what it is given would be gone before it is read."""
    rig.open("drop-oldest", max_samples=80)
    who, reader = rig.producer(), rig.reader()
    seq, taken = 0, 0
    for _ in range(60):
        rig.put(who, *range(seq + 1, seq + 11))
        seq += 10
        given = rig.numbers(reader, 4)
        taken += len(given)
        first = rig.snapshot()["first"]
        assert not given or first == 1 or min(given) >= first + 10, "it lives through the next burst"
        rig.ring.acknowledge("train", given)
    group = rig.balance().groups["train"]
    assert taken == group["delivered"] == 240
    assert group["lost"] > 200
    assert group["evicted_pending"] == 0


def test_a_reader_that_keeps_up_loses_nothing(rig: Rig) -> None:
    rig.open("drop-oldest", max_samples=40)
    who, reader = rig.producer(), rig.reader()
    for start in range(1, 400, 10):
        rig.put(who, *range(start, start + 10))
        assert rig.numbers(reader, 100) == list(range(start, start + 10))
        rig.ring.acknowledge("train", range(start, start + 10))
    assert rig.balance().groups["train"]["lost"] == 0


@pytest.mark.parametrize("ended", [False, True])
def test_a_ring_at_rest_is_read_from_its_front(rig: Rig, ended: bool) -> None:
    rig.open("drop-oldest", max_samples=40)
    rig.put(rig.producer(), *range(1, 101))
    if ended:
        rig.ring.end()
    reader = rig.reader()
    found: list[int] = []
    while given := rig.numbers(reader, 7):
        found += given
    assert found == list(range(61, 101))


def test_after_a_step_forward_the_rest_is_read_whole(rig: Rig) -> None:
    rig.open("drop-oldest", max_samples=40)
    who, reader = rig.producer(), rig.reader()
    rig.put(who, *range(1, 41))
    assert rig.numbers(reader, 1) == [1]
    rig.put(who, *range(41, 101))
    found = rig.numbers(reader, 3)
    assert found[0] == 71, "a quarter of the ring beyond its front"
    while given := rig.numbers(reader, 3):
        found += given
    assert found == list(range(71, 101))
    group = rig.balance().groups["train"]
    assert (group["lost"], group["evicted_pending"]) == (69, 1)


def test_a_ring_that_blocks_never_steps_forward(rig: Rig) -> None:
    rig.open(max_samples=8)
    who, reader = rig.producer(), rig.reader()
    found: list[int] = []
    for seq in range(1, 200):
        while rig.put(who, seq).word == "FULL":
            given = rig.numbers(reader, 1)
            rig.ring.acknowledge("train", given)
            found += given
    assert found == list(range(1, len(found) + 1))
    assert rig.balance().groups["train"]["lost"] == 0
