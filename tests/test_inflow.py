"""Large samples on their way to a reader: over two connections, and asked for before they are wanted."""

import itertools
import threading
from typing import Any

import pytest

import synthbroker as sb
from lossy import lossy
from rings import Rig
from servers import eventually
from synthbroker import taking
from synthbroker.errors import RingMissingError
from synthbroker.wire import Slice
from tools import SOON_S, check_ledger, counters, drain, fill, number, pending, reasons

MIB = 2**20
LARGE = 1_100_000  # numbers: a sample of five parts
OPTIONS = {"capacity": "300MB", "size": LARGE}


def store(rig: Rig, sizes: list[int]) -> list[Slice]:
    """Have parts that are told apart by what they are full of."""
    for i, size in enumerate(sizes):
        rig.keys.set(rig.key(f"part:large:{i}"), bytes([i + 1]) * size, ex=60)
    return [Slice(f"large:{i}", None, size) for i, size in enumerate(sizes)]


def memory_for(sizes: list[int]) -> list[list[memoryview]]:
    return [[memoryview(bytearray(size))] for size in sizes]


@pytest.mark.parametrize(("size", "lines"), [(2_000, 1), (700_000, 2)], ids=["small", "large"])
def test_every_other_part_of_a_large_sample_comes_over_a_second_connection(rig: Rig, size: int, lines: int) -> None:
    sizes = [size + i for i in range(7)]
    slices, parts, threads = store(rig, sizes), memory_for(sizes), [""] * 7
    with rig.ring.inflow() as inflow:
        inflow.want(slices)

        def came(place: int) -> None:
            assert parts[place][0][-1] == place + 1, "it is whole when it is told of"
            threads[place] = threading.current_thread().name

        assert inflow.receive(parts, came) == [True] * 7
    assert [part[0] == bytes([i + 1]) * sizes[i] for i, part in enumerate(parts)] == [True] * 7
    assert len(set(threads)) == lines
    assert threads == [threads[i % 2] for i in range(7)]


@pytest.mark.parametrize("missing", [(0,), (1,), (0, 1, 2, 3), (3,)])
def test_parts_of_a_large_sample_that_are_not_there_are_told(rig: Rig, missing: tuple[int, ...]) -> None:
    sizes = [MIB] * 4
    slices = store(rig, sizes)
    for i in missing:
        rig.keys.delete(rig.key(f"part:large:{i}"))
    seen: list[int] = []
    with rig.ring.inflow() as inflow:
        inflow.want(slices)
        assert inflow.receive(memory_for(sizes), seen.append) == [i not in missing for i in range(4)]
        inflow.want(slices[:1])
        assert inflow.receive(memory_for(sizes[:1])) == [0 not in missing], "the lines are in order"
    assert sorted(seen) == [i for i in range(4) if i not in missing]


@pytest.mark.parametrize("where", ["between", "first", "second"])
def test_who_fails_in_the_middle_has_its_memory_to_itself_afterwards(rig: Rig, where: str) -> None:
    sizes = [MIB] * 6
    slices, parts = store(rig, sizes), memory_for(sizes)
    turns = itertools.count()

    def between() -> None:
        if where == "between" and next(turns) == 1:
            raise ValueError("enough")

    def came(place: int) -> None:
        if place == {"first": 2, "second": 3}.get(where):
            raise ValueError("enough")

    with rig.ring.inflow(between) as inflow:
        inflow.want(slices)
        with pytest.raises(ValueError, match="enough"):
            inflow.receive(parts, came)
        for part in parts:
            part[0][:] = bytes(MIB)
        inflow.want(slices)
        again = memory_for(sizes)
        assert inflow.receive(again) == [True] * 6
        assert [part[0][0] for part in again] == [1, 2, 3, 4, 5, 6]
    assert not any(any(part[0]) for part in parts), "written after it was given up"


@pytest.mark.parametrize("keep_bytes", [0, 500_000])
@pytest.mark.parametrize("needle", [":0\r\n", ":1\r\n", ":2\r\n"], ids=["first", "second", "third"])
def test_a_connection_that_breaks_while_a_large_sample_comes_loses_nothing(
    own_server: Any, ring_name: str, needle: str, keep_bytes: int
) -> None:
    server = own_server()
    fill(server, ring_name, range(12), **OPTIONS)
    with lossy(server) as line:
        consumer = sb.Consumer(line.url, ring=ring_name, group="g", batch_size=2, wait_s=SOON_S)
        batches, seen = iter(consumer), []
        for round_ in range(6):
            if round_ in (1, 3):
                line.lose_answer_to(needle, keep_bytes=keep_bytes)
            seen += drain([next(batches)])
        assert drain(batches) == []
        assert line.lost >= 1
    assert seen == list(range(12))
    assert reasons(server, ring_name) == []
    check_ledger(server, ring_name, "g")


def test_a_reader_that_is_closed_while_large_samples_come_leaves_them_to_others(server: Any, ring_name: str) -> None:
    fill(server, ring_name, range(8), **OPTIONS)
    before = set(threading.enumerate())
    consumer = sb.Consumer(server.url, ring=ring_name, group="g", batch_size=2, prefetch=1)
    assert drain([next(iter(consumer))]) == [0, 1]
    assert "synthbroker-flow" in [thread.name for thread in set(threading.enumerate()) - before]
    consumer.close()
    eventually(lambda: set(threading.enumerate()) <= before, "its threads are gone", deadline_s=SOON_S)
    assert drain(sb.Consumer(server.url, ring=ring_name, group="g", batch_size=2)) == list(range(8))
    check_ledger(server, ring_name, "g")


# -- ahead


def test_what_was_asked_for_comes_while_nobody_waits_for_it(rig: Rig) -> None:
    rig.open()
    rig.put(rig.producer(), 1, 2, 3)
    asked = ask(rig, rig.reader(), 2)
    eventually(asked.is_here, "entries have come", deadline_s=SOON_S)
    assert asked.in_order is not None
    assert [sample.number for sample in asked.in_order.samples] == [1, 2]
    assert asked.answer() == ("OK", asked.in_order)


def test_what_is_in_the_way_of_samples_is_told_when_they_are_waited_for(rig: Rig) -> None:
    rig.open()
    reader = rig.reader()
    asked = ask(rig, reader, 2)
    eventually(asked.is_here, "there is nothing", deadline_s=SOON_S)
    assert asked.in_order is None
    assert asked.answer()[0] == "EMPTY"
    rig.keys.delete(rig.key("meta"))
    asked = ask(rig, reader, 2)
    eventually(asked.is_here, "there is no ring", deadline_s=SOON_S)
    assert asked.in_order is None
    with pytest.raises(RingMissingError):
        asked.answer()


def ask(rig: Rig, who: Any, count: int) -> taking.Asked:
    return taking.ask(rig.ring, who, "train", count, min_fill=1, claim_after_s=-1, producers=())


@pytest.mark.parametrize("prefetch", [0, 1, 2])
def test_no_more_is_taken_ahead_than_is_made_ready(server: Any, ring_name: str, reader: Any, prefetch: int) -> None:
    fill(server, ring_name, range(30), **OPTIONS)
    batches = iter(reader(batch_size=2, prefetch=prefetch))
    for round_ in range(4):
        assert drain([next(batches)]) == [2 * round_, 2 * round_ + 1]
        at_rest = list(range(2 * round_ + 1, 2 * (round_ + 1 + prefetch) + 1))
        eventually(lambda: pending(server, ring_name, "g") == at_rest, f"it has {at_rest}", deadline_s=SOON_S)  # noqa: B023
    assert counters(server, ring_name, "g")["delivered"] == at_rest[-1]


def test_small_samples_behind_large_ones_are_not_lost_where_the_server_goes_while_they_are_looked_for(
    own_server: Any, ring_name: str
) -> None:
    server = own_server()
    with sb.Producer(
        server.url, ring=ring_name, capacity="300MB", producers=1, codec="raw", schema="n:i64[] x:f32[*]"
    ) as out:
        for i in range(12):
            out.put(number(i, 400_000 if i < 4 else 5_000))
    with lossy(server) as line:
        consumer = sb.Consumer(line.url, ring=ring_name, group="g", batch_size=4, prefetch=3, wait_s=SOON_S)
        line.lose_answer_to("GETRANGE", keep_bytes=1_000)
        assert drain(consumer) == list(range(12))
        assert line.lost == 1
    assert pending(server, ring_name, "g") == []
    check_ledger(server, ring_name, "g")


def test_a_reader_whose_transform_outlasts_its_end_ends_as_well(server: Any, ring_name: str, dataset: Any) -> None:
    fill(server, ring_name, range(8), **OPTIONS)
    begun, goes_on, before = threading.Event(), threading.Event(), set(threading.enumerate())

    def slow(sample: Any) -> Any:
        if int(sample["n"]) == 3:
            begun.set()
            assert goes_on.wait(SOON_S)
        return sample

    data = dataset(batch_size=1, prefetch=4, transform=slow)
    next(iter(data))
    assert begun.wait(SOON_S)
    data.close()
    goes_on.set()
    eventually(lambda: set(threading.enumerate()) <= before, "its threads are gone", deadline_s=SOON_S)


def test_looking_at_large_samples_takes_few_connections(server: Any, ring_name: str) -> None:
    fill(server, ring_name, range(8), **OPTIONS)

    def made() -> int:
        return int(server.client().info("stats")["total_connections_received"])

    before = made()
    assert len(sb.peek(ring_name, 8, url=server.url)) == 8
    assert made() - before <= 5
