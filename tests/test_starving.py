"""What a reader does when nobody makes samples any more."""

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator

import pytest

import synthbroker as sb
from rings import Rig, take
from servers import RunningServer, eventually
from synthbroker import starving
from synthbroker.replies import Incarnation
from tools import SOON_S, background, drain, fill, number, raw_ring, values, waits

Reader = Callable[..., sb.Consumer]
LONG_S = 5.0  # far longer than a beat is here


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("synthbroker.ring.BEAT_S", 0.05)
    monkeypatch.setattr("synthbroker.starving.SILENT_AFTER_S", 0.5)
    caplog.set_level(logging.WARNING, "synthbroker")


@pytest.fixture
def alive(server: RunningServer, ring_name: str) -> Iterator[sb.Producer]:
    """Give a producer that has put five samples and lives."""
    out = sb.Producer(server.url, ring=ring_name, name="p1", capacity="7MB", when_full="drop-oldest", codec="raw")
    for i in range(5):
        out.put(number(i))
    out.flush()
    yield out
    out.leave()


def read_for(stream: Iterator[object], seconds: float, least: int = 0) -> None:
    end, count = time.monotonic() + seconds, 0
    while time.monotonic() < end or count < least:
        next(stream)
        count += 1


# -- the words


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"on_starve": "reuse"}, "needs a reuse of more than 1"),
        ({"on_starve": "panic", "reuse": 2}, "on_starve must be one of .*'wait', 'raise', 'reuse'"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, object], says: str) -> None:
    for make in sb.Consumer, sb.RingDataset:
        with pytest.raises(ValueError, match=says):
            make(ring="r", group="g", **options)


# -- "raise"


@pytest.mark.parametrize("reuse", [1, 3, "inf"])
def test_producers_that_left_are_named_soon(alive: sb.Producer, reader: Reader, reuse: object) -> None:
    alive.leave()
    began = time.monotonic()
    with pytest.raises(sb.StarvedError, match=r"producer p1 on host \S+ \(pid \d+\) left, last seen .* ago") as caught:
        list(reader(on_starve="raise", reuse=reuse, prefetch=0))
    assert time.monotonic() - began < LONG_S
    assert "newest sample" in str(caught.value)
    reused = "each of the 5 in the ring" in str(caught.value)
    assert reused == (reuse == "inf") or reuse == 3, "it may be noticed before each was given three times"


def test_a_producer_that_fell_silent_is_named(server: RunningServer, ring_name: str, reader: Reader) -> None:
    fill(server, ring_name, range(2), producers=0)
    with raw_ring(server, ring_name) as ring:
        ring.join_producer(Incarnation("dumb", "w"), 0, {"host": "node7", "pid": 12})
    seen: list[int] = []
    began = time.monotonic()
    with pytest.raises(sb.StarvedError, match=r"producer dumb on host node7 \(pid 12\) last seen"):
        seen.extend(n for batch in reader(on_starve="raise", prefetch=0) for n in values(batch))
    assert seen == [0, 1]
    assert 0.4 < time.monotonic() - began < LONG_S


def test_a_ring_that_nobody_ended_though_all_have_closed_says_how_it_ends(alive: sb.Producer, reader: Reader) -> None:
    alive.close()
    with pytest.raises(sb.StarvedError, match=r"producer p1 .* closed, .*say so with `synthbroker end`"):
        list(reader(on_starve="raise", prefetch=0))


def test_a_slow_producer_is_no_reason_to_raise(alive: sb.Producer, reader: Reader) -> None:
    stream = iter(reader(on_starve="raise", prefetch=0))
    assert drain(itertools.islice(stream, 5)) == [0, 1, 2, 3, 4]
    began = time.monotonic()
    rest = background(lambda: next(stream))
    eventually(lambda: time.monotonic() - began > 1.5, "several looks have passed")
    alive.put(number(5))
    assert values(rest.result(SOON_S)) == [5]


def test_a_ring_whose_producers_have_yet_to_come_is_waited_for(
    server: RunningServer, ring_name: str, reader: Reader
) -> None:
    with sb.Producer(server.url, ring=ring_name, capacity="7MB", schema="n:i64[] x:f32[4]") as out:
        server.client().delete(f"sb:{{{ring_name}}}:producers")
        rest = background(lambda: next(iter(reader(on_starve="raise"))))
        waits(rest, lambda: server.client().exists(f"sb:{{{ring_name}}}:group:g"), "it has joined")
        began = time.monotonic()
        eventually(lambda: time.monotonic() - began > 1.5 or rest.done(), "several looks have passed")
        out.put(number(0))
        assert values(rest.result(SOON_S)) == [0]


# -- "wait"


def test_old_samples_are_not_given_again_while_nobody_makes_new_ones(
    server: RunningServer, ring_name: str, alive: sb.Producer, reader: Reader, caplog: pytest.LogCaptureFixture
) -> None:
    stream = iter(reader(reuse="inf", prefetch=0))
    read_for(stream, 0.3, least=10)
    assert caplog.text == "", "a producer lives"
    alive.leave()
    rest = background(lambda: [next(stream).info.uses[0] for _ in range(100_000)])
    eventually(lambda: "waiting for fresh ones" in caplog.text, "it stops")
    assert "producer p1" in caplog.text
    assert not rest.done()
    with sb.Producer(server.url, ring=ring_name, name="p2", codec="raw") as again:
        again.put(number(5))
        again.flush()
        few = iter(reader(reuse="inf", prefetch=0))
        read_for(few, 0.3, least=10)  # it is given again while a producer lives


def test_waiting_ends_with_who_was_seen_and_when(alive: sb.Producer, reader: Reader) -> None:
    alive.leave()
    with pytest.raises(sb.StarvedError, match=r"no sample for .*generators running\? producer p1 .*left, last seen"):
        list(reader(reuse=2, prefetch=0, wait_s=0.5))


def test_a_batch_that_was_begun_is_told_with_what_would_give_it_out(
    alive: sb.Producer, reader: Reader, ring_name: str
) -> None:
    alive.put(number(5))
    alive.leave()
    with pytest.raises(
        sb.StarvedError, match=rf"of the 1000 samples of a batch are here.*synthbroker end {ring_name}`"
    ):
        list(reader(batch_size=1000, wait_s=0.5))


def test_waiting_may_be_for_ever(alive: sb.Producer, reader: Reader) -> None:
    stream = iter(reader(wait_s=math.inf, prefetch=0))
    assert drain(itertools.islice(stream, 5)) == [0, 1, 2, 3, 4]
    rest = background(lambda: next(stream))
    alive.put(number(5))
    assert values(rest.result(SOON_S)) == [5]


# -- "reuse"


def test_going_on_is_told_at_growing_intervals(
    alive: sb.Producer, reader: Reader, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("synthbroker.starving.FIRST_AGAIN_S", 0.2)
    alive.leave()
    stream = iter(reader(reuse="inf", on_starve="reuse", prefetch=0))
    read_for(stream, 2.0)
    told = [record for record in caplog.records if "going on with old ones" in record.message]
    times = [record.created for record in told]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert len(told) >= 3
    assert all(later > 1.5 * sooner for sooner, later in itertools.pairwise(gaps)), gaps
    assert "newest sample" in told[-1].message
    assert "each of the 5 in the ring" in told[-1].message


def test_going_on_is_within_reuse(alive: sb.Producer, reader: Reader) -> None:
    alive.leave()
    seen: list[int] = []
    with pytest.raises(sb.StarvedError):
        seen.extend(values(batch)[0] for batch in reader(reuse=3, on_starve="reuse", prefetch=0, wait_s=0.5))
    assert sorted(seen) == sorted([0, 1, 2, 3, 4] * 3)


def test_a_generator_that_hangs_is_told_too(
    alive: sb.Producer, reader: Reader, caplog: pytest.LogCaptureFixture
) -> None:
    assert alive.stats.samples == 5
    stream = iter(reader(reuse="inf", prefetch=0, wait_s=0.3))
    read_for(stream, 1.0)
    assert 1 <= caplog.text.count("nothing fresh for") <= 2
    assert "producer p1" in caplog.text


def test_a_ring_that_has_ended_starves_nobody(
    server: RunningServer, ring_name: str, reader: Reader, caplog: pytest.LogCaptureFixture
) -> None:
    fill(server, ring_name, range(200))
    monkey = reader(reuse=20, prefetch=0, on_starve="raise")
    assert len(drain(monkey)) == 4000
    assert "nobody" not in caplog.text


# -- the scripts


def test_nothing_that_was_given_before_is_given_where_only_fresh_ones_are_wanted(rig: Rig) -> None:
    rig.open()
    rig.put(who := rig.producer(), 1, 2)
    reader = rig.reader(reuse="inf")
    assert rig.numbers(reader, 2) == [1, 2]
    rig.ring.acknowledge("train", [1, 2])
    taken = take(rig.ring, reader, "train", 2, fresh_only=True)
    assert taken is not None
    assert (taken.word, taken.samples) == ("EMPTY", ())
    rig.put(who, 3)
    taken = take(rig.ring, reader, "train", 2, fresh_only=True)
    assert taken is not None
    assert [one.number for one in taken.samples] == [3]
    assert len(rig.numbers(reader, 2)) == 2


def test_life_names_the_living_first_and_counts_the_rest(rig: Rig) -> None:
    rig.open()
    for i in range(12):
        rig.producer(f"p{i}")
        rig.keys.zadd(rig.key("producers"), {f"p{i}": 1000 + i})
    rig.producer("alive")
    reply = rig.script("life", rig.ring.epoch, 30, 8)
    assert reply[0] == "OK"
    assert reply[2:6] == ["0", "0", "", 13]
    assert reply[6::3] == ["alive", *(f"p{i}" for i in range(11, 3, -1))]


@pytest.mark.parametrize("about", ["", "[]", "{", '{"state": 7, "host": ["x"]}'])
def test_what_a_stranger_wrote_about_a_producer_stops_nobody(rig: Rig, about: str) -> None:
    rig.open()
    rig.producer("p")
    rig.keys.hset(rig.key("producers:about"), "p", about)
    life = starving.look(rig.ring)
    assert life.lives
    assert "producer p" in str(life)
