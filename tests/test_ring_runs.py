"""Runs in the scripts: checkpoints are staged and finished, a newer life shuts the older one out, losses are named."""

from typing import Any

import pytest

from rings import Rig, take
from synthbroker import ranges, runs
from synthbroker.errors import RingMissingError, ShutOutError, UnacknowledgedError
from synthbroker.replies import Incarnation
from synthbroker.runs import Resumed, Run

GROUP = "train"


def begin(rig: Rig, name: str = "f", life: str = "l1", word: str = "c1") -> tuple[Run, Incarnation]:
    """Register a reader of a run that keeps checkpoints."""
    run, who = Run(name, life, checkpoints=True), Incarnation(f"{name}/0", word)
    runs.shut_out(rig.ring, GROUP, run)
    rig.ring.join_group(who, GROUP, "1", {}, life=life, checkpoints=True)
    return run, who


def stage(rig: Rig, run: Run, serial: int, *numbers: int) -> str:
    token = f"{serial}.{run.life}"
    runs.stage(rig.ring, GROUP, run, token, ranges.of(numbers))
    return token


def resume(rig: Rig, name: str, life: str, token: str, *, go_on: bool = False) -> Resumed:
    found = runs.resume(rig.ring, GROUP, Run(name, life, checkpoints=True), token, go_on=go_on)
    assert found is not None
    return found


def filled(rig: Rig, count: int = 10, policy: str = "block", **more: Any) -> None:
    rig.open(policy, groups=(GROUP,), **more)
    rig.put(rig.producer(), *range(1, count + 1))


def held(rig: Rig) -> list[int]:
    found = rig.keys.xpending_range(rig.key("samples"), GROUP, "-", "+", 1000)
    return [int(one["message_id"].split(b"-")[0]) for one in found]


def test_what_is_staged_is_pending_until_it_is_finished(rig: Rig) -> None:
    filled(rig)
    run, who = begin(rig)
    assert rig.numbers(who, 6) == [1, 2, 3, 4, 5, 6]
    stage(rig, run, 1, 1, 2, 4)
    stage(rig, run, 2, 3, 5)
    assert held(rig) == [1, 2, 3, 4, 5, 6]
    runs.finish(rig.ring, GROUP, run, f"{1}.{run.life}")
    assert held(rig) == [3, 5, 6]
    rig.balance()
    for _ in range(2):
        runs.finish(rig.ring, GROUP, run, f"{2}.{run.life}")
        assert held(rig) == [6]
    assert rig.balance().groups[GROUP]["acknowledged"] == 5
    assert rig.snapshot().groups[GROUP]["doubled"] == 0


def test_staging_twice_is_staging_once(rig: Rig) -> None:
    filled(rig)
    run, who = begin(rig)
    rig.numbers(who, 4)
    stage(rig, run, 1, 1, 2)
    stage(rig, run, 1, 1, 2, 3)
    runs.finish(rig.ring, GROUP, run, f"{1}.{run.life}")
    assert held(rig) == [4]


def test_finishing_makes_room_and_tells_who_waits(rig: Rig) -> None:
    rig.open(groups=(GROUP,), capacity=rig.capacity_for(6, 8))
    producer = rig.producer()
    count = rig.fill(producer)
    run, who = begin(rig)
    rig.numbers(who, count)
    stage(rig, run, 1, *range(1, count + 1))
    assert rig.put(producer, count + 1).word == "FULL"
    runs.finish(rig.ring, GROUP, run, f"{1}.{run.life}")
    assert rig.keys.xlen(rig.key("room")) == 1
    assert rig.put(producer, count + 1).word == "OK"


def test_a_restarted_run_finishes_its_checkpoint_and_is_given_the_rest_again(rig: Rig) -> None:
    filled(rig)
    run, who = begin(rig)
    rig.numbers(who, 7)
    token = stage(rig, run, 1, 1, 2, 3)
    stage(rig, run, 2, 4, 5)  # whose checkpoint was never written
    assert resume(rig, "f", "l2", token) == Resumed(False, True, (), ())
    assert held(rig) == [4, 5, 6, 7]
    heir, reader = begin(rig, life="l2", word="c2")
    assert rig.numbers(reader, 20, claim_after_s=1000) == [4, 5, 6, 7, 8, 9, 10]
    stage(rig, heir, 3, 4)
    runs.finish(rig.ring, GROUP, heir, f"{3}.{heir.life}")
    assert held(rig) == [5, 6, 7, 8, 9, 10], "what was forgotten is not finished"


def test_a_run_that_begins_afresh_forgets_what_its_former_self_had_staged(rig: Rig) -> None:
    filled(rig, 4)
    run, who = begin(rig)
    rig.numbers(who)
    stage(rig, run, 1, 1, 2)
    heir, reader = begin(rig, life="l2", word="c2")
    assert rig.numbers(reader, 20, claim_after_s=1000) == [1, 2, 3, 4]
    assert heir.serial == 1
    stage(rig, heir, 2, 4)
    runs.finish(rig.ring, GROUP, heir, f"{2}.{heir.life}")
    assert held(rig) == [1, 2, 3]


@pytest.mark.parametrize("what", ["stage", "finish", "join"])
def test_a_former_self_is_shut_out(rig: Rig, what: str) -> None:
    filled(rig)
    run, who = begin(rig)
    rig.numbers(who, 3)
    stage(rig, run, 1, 1)
    begin(rig, life="l2", word="c2")
    before = rig.keys.hgetall(rig.key(f"runs:{GROUP}"))
    act = {
        "stage": lambda: stage(rig, run, 2, 2),
        "finish": lambda: runs.finish(rig.ring, GROUP, run, f"{1}.{run.life}"),
        "join": lambda: rig.ring.join_group(who, GROUP, "1", {}, life="l1", checkpoints=True),
    }[what]
    with pytest.raises(ShutOutError, match="'f'"):
        act()
    assert rig.keys.hgetall(rig.key(f"runs:{GROUP}")) == before
    assert take(rig.ring, who, GROUP, 1, claim_after_s=1000) is None


def test_only_readers_of_the_same_run_are_shut_out(rig: Rig) -> None:
    filled(rig)
    _, first = begin(rig, "f")
    _, other = begin(rig, "f2")
    rig.reader("val", name="f/0", word="v")
    begin(rig, "f", life="l2", word="c2")
    assert {member.split("/")[0] for member in rig.ring.members(GROUP)} == {"f", "f2"}
    assert str(first) not in rig.ring.members(GROUP)
    assert str(other) in rig.ring.members(GROUP)
    assert rig.ring.members("val") == ["f/0:v"]


def test_what_a_later_checkpoint_has_acknowledged_is_named(rig: Rig) -> None:
    filled(rig)
    run, who = begin(rig)
    rig.numbers(who, 8)
    token = stage(rig, run, 1, 1, 2)
    stage(rig, run, 2, 3, 4, 7)
    runs.finish(rig.ring, GROUP, run, f"{2}.{run.life}")
    before = {key: rig.keys.dump(key) for key in rig.all_keys()}
    gone = Resumed(True, True, ((3, 4), (7, 7)), ())
    assert resume(rig, "f", "l2", token) == gone
    assert resume(rig, "f", "l2", "") == Resumed(True, True, ((1, 2), (3, 4), (7, 7)), ())
    assert {key: rig.keys.dump(key) for key in rig.all_keys()} == before, "nothing was done"
    assert resume(rig, "f", "l2", token, go_on=True) == Resumed(False, True, ((3, 4), (7, 7)), ())
    assert held(rig) == [5, 6, 8]


@pytest.mark.parametrize("token", ["1.other", "5.l1"])
def test_a_checkpoint_that_nobody_knows_is_told(rig: Rig, token: str) -> None:
    filled(rig)
    run, who = begin(rig)
    rig.numbers(who, 3)
    stage(rig, run, 1, 1)
    assert resume(rig, "f", "l2", token) == Resumed(True, False, (), ())
    assert resume(rig, "f", "l2", token, go_on=True) == Resumed(False, False, (), ())
    assert held(rig) == [1, 2, 3]


def test_what_was_evicted_before_it_was_trained_on_is_named(rig: Rig) -> None:
    rig.open("drop-oldest", groups=(GROUP,), max_samples=10)
    producer = rig.producer()
    rig.put(producer, *range(1, 11))
    run, who = begin(rig)
    _, other = begin(rig, "g")
    assert rig.numbers(who, 4) == [1, 2, 3, 4]
    assert rig.numbers(other, 2) == [5, 6]
    token = stage(rig, run, 1, 1, 3)
    stage(rig, run, 2, 4)
    rig.put(producer, *range(11, 18))
    assert resume(rig, "f", "l2", token) == Resumed(True, True, (), ((2, 2), (4, 4)))
    assert resume(rig, "f", "l2", token, go_on=True).evicted == ((2, 2), (4, 4))
    assert resume(rig, "f", "l3", token) == Resumed(False, True, (), ()), "once told, it is not told again"
    assert rig.balance().groups[GROUP]["evicted_pending"] == 6


def test_what_was_staged_and_evicted_is_done_with(rig: Rig) -> None:
    rig.open("drop-oldest", groups=(GROUP,), max_samples=4)
    producer = rig.producer()
    rig.put(producer, *range(1, 5))
    run, who = begin(rig)
    rig.numbers(who, 4)
    token = stage(rig, run, 1, 1, 2)
    rig.put(producer, 5, 6, 7)
    runs.finish(rig.ring, GROUP, run, f"{1}.{run.life}")
    assert resume(rig, "f", "l2", token) == Resumed(True, True, (), ((3, 3),))
    seen = rig.balance().groups[GROUP]
    assert (seen["doubled"], seen["acknowledged"], seen["evicted_pending"]) == (0, 0, 3)


def test_what_somebody_else_has_trained_on_meanwhile_is_doubled(rig: Rig) -> None:
    rig.open(groups=(GROUP,), max_samples=4)
    producer = rig.producer()
    rig.put(producer, 1, 2, 3, 4)
    run, who = begin(rig)
    rig.numbers(who, 2)
    stage(rig, run, 1, 1, 2)
    rig.ring.leave_group(who, GROUP)
    _, other = begin(rig, "g")
    assert rig.numbers(other, 4, claim_after_s=1000) == [1, 2, 3, 4]
    rig.ring.acknowledge(GROUP, [1, 2])
    assert rig.put(producer, 5).word == "OK", "the first has left the ring"
    runs.finish(rig.ring, GROUP, run, f"{1}.{run.life}")
    assert rig.balance().groups[GROUP]["doubled"] == 2


def test_what_is_kept_is_not_given_again(rig: Rig) -> None:
    filled(rig, 6)
    _, who = begin(rig)
    rig.numbers(who, 6)
    runs.keep(rig.ring, GROUP, "f/kept:l1", {}, [(1, 2), (5, 5), (40, 50)])
    rig.ring.leave_group(who, GROUP)
    _, again = begin(rig, word="c2")
    assert rig.numbers(again, 20, claim_after_s=1000) == [3, 4, 6]
    assert rig.snapshot().groups[GROUP].members["f/kept:l1"] == 3
    rig.ring.leave_group("f/kept:l1", GROUP)
    assert rig.numbers(again, 20, claim_after_s=1000) == [1, 2, 5]


def test_checkpoints_that_are_never_acknowledged_are_bounded(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "MOST_STAGED", 3)
    filled(rig)
    run, who = begin(rig)
    rig.numbers(who, 6)
    for serial in (1, 2, 3, 3):
        stage(rig, run, serial, serial)
    with pytest.raises(UnacknowledgedError, match=r"3 checkpoints.*call acknowledge"):
        stage(rig, run, 4, 4)
    runs.finish(rig.ring, GROUP, run, f"{2}.{run.life}")
    stage(rig, run, 4, 4)


def test_runs_and_finished_checkpoints_are_forgotten_some_time(rig: Rig) -> None:
    filled(rig, 40)
    run, who = begin(rig)
    rig.numbers(who, 30)
    for serial in range(1, 30):
        stage(rig, run, serial, serial)
        runs.finish(rig.ring, GROUP, run, f"{serial}.{run.life}")
    assert rig.keys.hlen(rig.key(f"runs:{GROUP}")) == 1 + 16
    for i in range(70):
        begin(rig, f"r{i}")
    assert rig.keys.hlen(rig.key(f"runs:{GROUP}")) == 64


@pytest.mark.parametrize("gone", ["group", "ring"])
def test_with_its_group_a_run_is_forgotten(rig: Rig, gone: str) -> None:
    filled(rig)
    run, who = begin(rig)
    rig.numbers(who, 3)
    token = stage(rig, run, 1, 1)
    rig.ring.drop(GROUP if gone == "group" else "")
    assert not rig.keys.exists(rig.key(f"runs:{GROUP}"))
    if gone == "ring":
        rig.open()
    assert runs.resume(rig.ring, GROUP, Run("f", "l2"), token, go_on=False) is None
    for act in (lambda: stage(rig, run, 2, 2), lambda: runs.finish(rig.ring, GROUP, run, f"{1}.{run.life}")):
        with pytest.raises(RingMissingError, match="no group"):
            act()
    rig.reader(GROUP)
    assert not resume(rig, "f", "l2", token).known


def test_what_is_remembered_of_a_large_checkpoint_is_bounded_and_whole(rig: Rig) -> None:
    filled(rig, 1500)
    run, who = begin(rig)
    taken = rig.numbers(who, 1500)
    stage(rig, run, 1, *taken[::2])
    runs.finish(rig.ring, GROUP, run, f"{1}.{run.life}")
    assert rig.keys.hstrlen(rig.key(f"runs:{GROUP}"), f"f 1.{run.life}") <= 2002
    later = resume(rig, "f", "l2", "").later
    assert len(later) > 300
    assert all(first == last and first % 2 for first, last in later)


def test_many_numbers_are_finished_at_once(rig: Rig) -> None:
    filled(rig, 2500)
    run, who = begin(rig)
    taken = rig.numbers(who, 2500)
    stage(rig, run, 1, *taken[::2])
    runs.finish(rig.ring, GROUP, run, f"{1}.{run.life}")
    assert held(rig) == taken[1::2][:1000]
    assert rig.balance().groups[GROUP]["acknowledged"] == 1250
