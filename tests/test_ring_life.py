"""A ring's life: made, opened again, ended, dropped, lost; and who is seen around it."""

import json
from typing import Any

import pytest

from rings import Rig, check_books, take
from synthbroker import keys
from synthbroker import ring as rings_module
from synthbroker.connection import Connection
from synthbroker.errors import RingEndedError, RingMismatchError, RingMissingError
from synthbroker.replies import Incarnation, Settings
from synthbroker.ring import Ring

SCRIPTS: list[tuple[str, list[Any]]] = [
    ("parts", [0, 10]),
    ("twins", ["p", "w1", 1, 10, 10, 3, "ab"]),
    ("room", ["p", "w1", 100, 1, 60, 0]),
    ("commit", ["p", "w1", "0 0 0 0", 1, 100, 8, 8, "-", 0, "x:u8[8]", b"head", b"12345678"]),
    ("take", ["train", "f/0:c1", 1, 1, 30, 7]),
    ("ack", ["train", 0, 1]),
    ("join", ["producer", "p", "w1", "{}", 0]),
    ("join", ["consumer", "f/0", "c1", "{}", "train", "1"]),
    ("leave", ["producer", "p", "{}", "w1", 1]),
    ("leave", ["consumer", "train f/0:c1", "{}"]),
    ("beat", ["producer", "p", "{}", 60, 3600, 1000, ""]),
    ("beat", ["consumer", "train f/0:c1", "{}", 60, 3600, 1000, ""]),
    ("stage", ["train", "f", "l1", "1.t", "1-3", 1000]),
    ("finish", ["train", "f", "l1", 1]),
    ("resume", ["train", "f", "l1", 1, "-", 1]),
    ("keep", ["train", "f/kept:l1", "{}", "1-3"]),
    ("quarantine", ["", "reason", "p", "{}", 10]),
    ("end", []),
    ("drop", [""]),
    ("drop", ["train"]),
    ("settle", ["train", "f/0:c1", 1, 1]),
    ("floor", []),
    ("life", [30, 8]),
]


# -- there, or not


@pytest.mark.parametrize(("script", "arguments"), SCRIPTS)
def test_no_script_does_anything_to_a_ring_that_is_not_there(rig: Rig, script: str, arguments: list[Any]) -> None:
    assert rig.script(script, "e1", *arguments) == ["NORING"]
    assert rig.script(script, "", *arguments) == ["NORING"]
    assert rig.all_keys() == set()


@pytest.mark.parametrize(("script", "arguments"), SCRIPTS)
def test_no_script_touches_a_ring_of_another_epoch(rig: Rig, script: str, arguments: list[Any]) -> None:
    rig.open(groups=("train",))
    rig.producer()
    rig.reader()
    before = {key: rig.keys.dump(key) for key in rig.all_keys()}
    assert rig.script(script, "other", *arguments) == ["NORING"]
    assert {key: rig.keys.dump(key) for key in rig.all_keys()} == before


def test_every_script_is_tried_without_a_ring() -> None:
    from pathlib import Path

    files = {path.stem for path in (Path(rings_module.__file__).parent / "lua").glob("*.lua")}
    assert files - {name for name, _ in SCRIPTS} == {"lib", "runs", "open", "snapshot", "arrive", "deal", "seat"}


def test_a_ring_that_is_not_there_is_missing(rig: Rig) -> None:
    for ask in (rig.ring.read_meta, rig.ring.snapshot, rig.ring.end, rig.ring.drop):
        with pytest.raises(RingMissingError, match=f"there is no ring '{rig.ring.name}'"):
            ask()
    rig.ring.quarantine(reason="x", producer="p", recipe={})
    assert rig.all_keys() == set(), "a note about a ring that is gone must not bring a piece of it back"


@pytest.mark.parametrize("name", ["", "a b", "a" * 65, "ä", "a:b", "{a}", "a\n"])
def test_a_name_that_would_break_the_keys_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot name a ring"):
        Ring(Connection("redis://127.0.0.1:1/0"), name)


def test_a_name_is_text() -> None:
    with pytest.raises(TypeError, match="must be a string"):
        keys.check_name("group", 3)


# -- made and opened again


def test_a_new_ring_takes_what_is_asked_and_defaults_for_the_rest(rig: Rig) -> None:
    meta = rig.ring.open(Settings(), default_capacity_bytes=12345, reopen=False)
    assert (meta.when_full, meta.capacity_bytes, meta.max_samples) == ("block", 12345, 0)
    assert (meta.schema, meta.info, meta.checks, meta.ended) == ("", {}, "none", False)
    assert (meta.first, meta.next, meta.live, meta.bytes) == (1, 1, 0, 0)
    assert rig.ring.epoch == meta.epoch != ""
    again = Ring(rig.way, rig.ring.name)
    assert again.open(Settings(), default_capacity_bytes=999, reopen=False) == meta
    assert again.read_meta() == meta
    assert again.epoch == meta.epoch


@pytest.mark.parametrize(
    ("setting", "ours", "theirs", "shown"),
    [
        ("when_full", "block", "drop-oldest", "when_full=block, asked for was drop-oldest"),
        ("capacity_bytes", 1000, 2000, "capacity=1000, asked for was 2000"),
        ("max_samples", 5, 6, "max_samples=5, asked for was 6"),
        ("schema", "x:u8[8]", "x:u8[9]", r"schema=x:u8\[8\], asked for was x:u8\[9\]"),
        ("info", '{"classes":3}', '{"classes":4}', 'info={"classes":3}, asked for was {"classes":4}'),
        ("checks", "x:varied", "none", "checks=x:varied, asked for was none"),
        ("producers", 3, 4, "producers=3, asked for was 4"),
    ],
)
def test_who_asks_for_another_ring_than_there_is_is_told_both_values(
    rig: Rig, setting: str, ours: Any, theirs: Any, shown: str
) -> None:
    def ask(value: Any) -> Any:
        return rig.ring.open(Settings(**{setting: value}), default_capacity_bytes=1000, reopen=False)

    meta = ask(ours)
    assert ask(ours) == meta
    assert ask(None) == meta
    with pytest.raises(RingMismatchError, match=shown):
        ask(theirs)
    assert rig.ring.read_meta() == meta


def test_the_first_schema_given_is_pinned(rig: Rig) -> None:
    rig.open()
    assert rig.open(schema="x:u8[8]").schema == "x:u8[8]"
    assert rig.open().schema == "x:u8[8]"
    with pytest.raises(RingMismatchError, match="schema"):
        rig.open(schema="x:u8[9]")


def test_groups_are_declared_once_and_may_be_added(rig: Rig) -> None:
    rig.open(groups=("train", "val"))
    rig.put(rig.producer(), 1, 2)
    rig.open(groups=("val", "more"))
    groups = rig.balance().groups
    assert {name: group["since"] for name, group in groups.items()} == {"train": 0, "val": 0, "more": 0}


def test_an_ended_ring_opens_again_only_for_who_says_so(rig: Rig) -> None:
    rig.open()
    who = rig.producer()
    rig.put(who, 1)
    rig.ring.end()
    ended = rig.ring.read_meta()
    rig.ring.end()
    assert rig.ring.read_meta() == ended, "the first end counts"
    with pytest.raises(RingEndedError, match="reopen=True"):
        rig.open()
    assert not rig.open(reopen=True).ended
    assert rig.put(who, 2).last == 2


# -- dropped and lost


@pytest.mark.parametrize("when_full", ["block", "drop-oldest"])
def test_a_dropped_ring_leaves_no_key_behind(rig: Rig, when_full: str) -> None:
    rig.open(when_full, max_samples=300, groups=("val",), producers=3)
    who, reader, again = rig.producer(), rig.reader(), rig.reader("more", "3")
    rig.put(who, *range(1, 290))
    rig.put(who, 290, nbytes=50_000)
    rig.numbers(reader, 5)
    rig.numbers(again, 5, "more")
    rig.ring.room(rig.producer("q"), 100, 1)
    rig.ring.leave_producer(rig.producer("r"), {}, closed=True)
    rig.ring.quarantine(reason="bad", producer="p", recipe={})
    rig.put(who, *range(291, 500))
    rig.ring.drop()
    assert rig.all_keys() == set()


def test_a_ring_made_again_is_another_one(rig: Rig) -> None:
    rig.open()
    who, reader = rig.producer(), rig.reader()
    rig.put(who, 1, 2)
    old = Ring(rig.way, rig.ring.name)
    old.read_meta()
    rig.ring.drop()
    rig.open()
    assert rig.ring.epoch != old.epoch
    with pytest.raises(RingMissingError, match="not the same one any more"):
        old.room(who, 1, 1)
    assert take(rig.ring, reader, "train", 1) is None
    assert rig.put(rig.producer(), 1).last == 1


@pytest.mark.parametrize("lost", ["meta", "samples", "index", "group:train"])
def test_what_is_left_of_a_half_lost_ring_is_not_lent_to_a_new_one(rig: Rig, lost: str) -> None:
    rig.open("drop-oldest", max_samples=5, groups=("train",))
    who, reader = rig.producer(), rig.reader(reuse="3")
    rig.put(who, *range(1, 5))
    rig.numbers(reader, 4)
    rig.keys.delete(rig.key("meta"), rig.key(lost))
    rig.open("drop-oldest", max_samples=5, groups=("train",))
    reader = rig.reader(reuse="2")
    assert rig.take(reader).word == "EMPTY"
    assert rig.put(rig.producer("p", "w2"), *range(1, 8)).last == 7
    rig.numbers(reader, 20)
    assert rig.balance().live == range(3, 8)


# -- who is there


def test_a_snapshot_shows_everything_at_one_instant(rig: Rig) -> None:
    rig.open(max_samples=9, groups=("val",))
    about = {"host": "node7", "note": 'ü "quoted"'}
    rig.ring.join_producer(Incarnation("gen", "w1"), 0, about)
    rig.ring.join_group(Incarnation("f/0", "c1"), "train", "2", about)
    who, reader = Incarnation("gen", "w1"), Incarnation("f/0", "c1")
    rig.put(who, 1, 2, 3)
    rig.numbers(reader, 2)
    rig.ring.room(who, 500, 2)
    seen = rig.balance()
    check_books(seen)
    assert (seen.live, seen.producers, seen.leases) == (range(1, 4), {"gen": 3}, {"gen": (500, 2)})
    assert {name: (group.last_delivered, group.pending) for name, group in seen.groups.items()} == {
        "train": (2, 2),
        "val": (0, 0),
    }
    reply = rig.ring.snapshot()
    told = [json.loads(reply[6][0][3]), *(json.loads(member[3]) for group in reply[5] for member in group[4])]
    assert told == [about, about]
    assert abs(float(reply[1]) - rig.ring.now_s()) < 60


def test_a_heartbeat_tells_when_somebody_was_last_seen(rig: Rig) -> None:
    rig.open()
    reader = rig.reader()
    rig.producer()
    for role, member in ("producer", "p"), ("consumer", f"train {reader}"):
        key = rig.key(f"{role}s")
        rig.keys.zadd(key, {member: 5})
        assert rig.ring.beat(role, member, {"now": 1})
        assert abs(float(rig.keys.zscore(key, member) or 0) - rig.ring.now_s()) < 60
        assert json.loads(rig.keys.hget(f"{key}:about", member) or "") == {"now": 1}
        assert not rig.ring.beat(role, "stranger", {})


def beat(rig: Rig, name: str, *, fold_after_s: float = 3600, most: int = 1000) -> None:
    assert rig.script("beat", rig.ring.epoch, "producer", name, "{}", 60, fold_after_s, most, "") == ["OK"]


def test_producers_that_left_long_ago_are_folded_into_totals(rig: Rig) -> None:
    rig.open("drop-oldest", max_samples=5)
    for i in range(150):
        rig.put(rig.producer(f"old{i}"), 1, 2)
    alive = rig.producer("alive")
    rig.keys.zadd(rig.key("producers"), {f"old{i}": 5 for i in range(149)})
    for _ in range(4):
        beat(rig, "alive")
    seen = rig.balance()
    assert set(seen.producers) == {"old149", "alive"}
    assert (seen["folded_producers"], seen["folded_samples"]) == (149, 298)
    assert rig.keys.hlen(rig.key("seqs")) == rig.keys.hlen(rig.key("producers:about")) == 2
    with pytest.raises(RingMissingError, match="does not know producer 'old3'"):
        rig.put(Incarnation("old3", "w1"), 3)
    assert rig.put(rig.producer("old3", "w1", last=2), 3).last == 3, "it may join anew where it was"
    assert rig.put(alive, 1).word == "OK"


def test_at_most_so_many_producers_are_named(rig: Rig) -> None:
    rig.open("drop-oldest", max_samples=5)
    for i in range(100):
        rig.producer(f"p{i}")
    for _ in range(3):
        beat(rig, "p99", most=10)
    seen = rig.balance()
    assert len(seen.producers) == 10
    assert "p99" in seen.producers
    assert seen["folded_producers"] == 90


def test_bad_samples_are_noted_up_to_a_limit(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rings_module, "MOST_QUARANTINED", 5)
    rig.open()
    for number in range(1, 9):
        rig.ring.quarantine(reason="damaged", producer="p", recipe={"seed": number}, number=number)
    rig.ring.quarantine(reason="NaN", producer="p", recipe={"seed": 9})
    notes = [fields for _, fields in rig.keys.xrange(rig.key("quarantine"))]
    assert len(notes) == 5
    assert notes[0] == {b"id": b"5", b"reason": b"damaged", b"producer": b"p", b"recipe": b'{"seed": 5}'}
    assert notes[-1] == {b"reason": b"NaN", b"producer": b"p", b"recipe": b'{"seed": 9}'}
    assert rig.balance()["quarantined"] == 9
