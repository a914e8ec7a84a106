"""Payloads past redis-py's parser: sent from memory that is there, read into memory that is there."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from typing import Any

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from peers import answers, peer
from servers import RunningServer
from synthbroker.connection import Connection
from synthbroker.errors import ServerGoneError, ServerRefusedError
from synthbroker.line import Line

calm = settings(deadline=None)
sizes = st.integers(0, 300) | st.sampled_from([16_383, 16_384, 16_385, 70_000])
Lines = Callable[[], AbstractContextManager[Line]]


@pytest.fixture(scope="module")
def line(server: RunningServer) -> Iterator[Lines]:
    way = Connection(server.url)
    yield way.line
    way.close()


class Drip:
    """A connection whose bytes come in the portions that are asked for, no more at a time, and then it is closed."""

    def __init__(self, data: bytes, portions: list[int]) -> None:
        self._data, self._portions = data, portions or [1]
        self._turn = 0
        self._sock = self

    def recv_into(self, into: memoryview) -> int:
        portion = self._data[: min(self._portions[self._turn % len(self._portions)], into.nbytes)]
        self._turn += 1
        into[: len(portion)] = portion
        self._data = self._data[len(portion) :]
        return len(portion)

    def read_response(self, *, disable_decoding: bool) -> Any:
        raise AssertionError("the parser must not be asked while payloads are under way")


def cut(memory: bytearray, marks: list[int]) -> list[memoryview]:
    """Cut memory into pieces, some of them empty."""
    ends = [0, *sorted(min(mark, len(memory)) for mark in marks), len(memory)]
    return [memoryview(memory)[a:b] for a, b in pairwise(ends)]


def bulk(data: bytes | None) -> bytes:
    return b"$-1\r\n" if data is None else b"$%d\r\n%b\r\n" % (len(data), data)


@contextmanager
def refused(match: str) -> Iterator[None]:
    """Expect what `Line` raises without the seam around it."""
    with pytest.raises(redis.RedisError, match=match):
        yield


payloads = st.none() | st.binary(max_size=200)


@calm
@given(
    st.lists(st.tuples(payloads, st.integers(-3, 3), st.lists(st.integers(0, 200), max_size=4)), max_size=6),
    st.lists(st.integers(1, 80), max_size=6),
)
def test_payloads_arrive_however_the_bytes_come(
    replies: list[tuple[bytes | None, int, list[int]]], portions: list[int]
) -> None:
    line = Line(Drip(b"".join(bulk(data) for data, _, _ in replies), portions), "here")
    for data, too_many, marks in replies:
        memory = bytearray(max(0, len(data or b"") + too_many))
        fits = line.receive(cut(memory, marks))
        assert fits == (data is not None and len(data) == len(memory))
        assert not fits or bytes(memory) == data


@calm
@given(st.lists(st.tuples(sizes, st.lists(sizes, max_size=3)), min_size=1, max_size=4))
def test_payloads_go_to_a_server_in_pieces_and_come_back(line: Lines, values: list[tuple[int, list[int]]]) -> None:
    data = [bytearray((i * 31 + j) % 251 for j in range(size)) for i, (size, _) in enumerate(values)]
    back = [bytearray(len(one)) for one in data]
    with line() as way:
        way.send(*(("SET", f"line:{i}", cut(one, values[i][1]), "EX", 60) for i, one in enumerate(data)))
        way.replies(len(data))
        way.send(*(("GET", f"line:{i}") for i in range(len(data))))
        for one, (_, marks) in zip(back, values, strict=True):
            assert way.receive(cut(one, marks))
        way.send(("PING",))
        assert way.reply() == b"PONG"
    assert back == data


def test_a_missing_key_and_a_wrong_length_leave_the_line_in_step(line: Lines) -> None:
    with line() as way:
        way.send(("SET", "line:a", b"x" * 3_000_000), ("SET", "line:b", b"right"), ("DEL", "line:none"))
        way.replies(3)
        way.send(*(("GET", key) for key in ("line:a", "line:none", "line:a", "line:b")))
        memory = bytearray(5)
        assert [way.receive([memoryview(memory)]) for _ in range(4)] == [False, False, False, True]
        assert memory == b"right"


def test_an_empty_payload_is_a_payload(line: Lines) -> None:
    with line() as way:
        way.send(("SET", "line:empty", []), ("SET", "line:hollow", [memoryview(b"")]))
        way.replies(2)
        way.send(("GET", "line:empty"), ("GET", "line:hollow"))
        assert way.receive([])
        assert way.receive([memoryview(bytearray())])


def test_memory_that_is_there_is_written_and_none_beside_it(line: Lines) -> None:
    memory = bytearray(b"-" * 12)
    with line() as way:
        way.send(("SET", "line:fence", b"12345678"))
        way.replies(1)
        way.send(("GET", "line:fence"))
        assert way.receive([memoryview(memory)[2:6], memoryview(memory)[6:10]])
    assert memory == b"--12345678--"


def test_arguments_may_be_text_numbers_and_bytes(line: Lines) -> None:
    with line() as way:
        for argument in ("ü", 7, -1, b"\r\n", bytearray(b"abc"), memoryview(b"abc")):
            way.send(("ECHO", argument))
            assert way.reply() == (str(argument).encode() if isinstance(argument, str | int) else bytes(argument))


def test_what_is_no_string_is_not_the_payload_that_was_asked_for(line: Lines) -> None:
    memory = bytearray(1)
    with line() as way:
        way.send(("DEL", "line:list"), ("RPUSH", "line:list", "x"), ("SET", "line:text", "y"))
        way.replies(3)
        way.send(("GET", "line:list"), ("GET", "line:text"))
        assert not way.receive([memoryview(memory)])
        assert way.receive([memoryview(memory)])
    assert memory == b"y"


def test_an_error_in_place_of_a_payload_closes_the_line_and_the_next_one_is_clean(line: Lines) -> None:
    def read_it() -> None:
        with line() as way:
            way.send(("GET", "line:a", "line:b"), ("ECHO", "stale"))
            way.receive([memoryview(bytearray(1))])

    with pytest.raises(ServerRefusedError, match="wrong number of arguments"):
        read_it()
    with line() as way:
        way.send(("ECHO", "fresh"))
        assert way.reply() == b"fresh"


def test_replies_that_nobody_read_do_not_reach_the_next_borrower(line: Lines) -> None:
    def read_one_of_two() -> None:
        with line() as way:
            way.send(("ECHO", "one"), ("ECHO", "two"))
            assert way.reply() == b"one"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        read_one_of_two()
    with line() as way:
        way.send(("ECHO", "three"))
        assert way.reply() == b"three"


def test_of_several_errors_the_first_is_raised_after_all_replies_are_read(line: Lines) -> None:
    with line() as way:
        way.send(("DEL", "line:x"), ("RPUSH", "line:x", "1"), ("INCR", "line:x"), ("NONSENSE",), ("ECHO", "after"))
        with refused("WRONGTYPE"):
            way.replies(4)
        assert way.reply() == b"after"


@pytest.mark.parametrize("header", [b":5", b"*1", b"$x", b"$", b"", b"HTTP/1.1 200", b"$1_0", b"$-2", b"$" + b"9" * 19])
def test_what_is_no_string_reply_is_a_protocol_error(header: bytes) -> None:
    with refused("Protocol Error"):
        Line(Drip(header + b"\r\n" + b"x" * 100, [7]), "here").receive([memoryview(bytearray(1))])


def test_a_line_without_an_end_is_given_up() -> None:
    with refused("without an end"):
        Line(Drip(b"$" + b"1" * 10**6, [1000]), "here").receive([memoryview(bytearray(1))])


@pytest.mark.parametrize("data", [b"", b"$", b"$5\r\n", b"$5\r\nab", b"$5\r\nabcde", b"$9\r\nabc"])
def test_a_connection_that_breaks_off_is_an_error(data: bytes) -> None:
    with pytest.raises(ConnectionError):
        Line(Drip(data, [3]), "here").receive([memoryview(bytearray(5))])


def test_more_than_was_asked_for_is_an_error() -> None:
    line = Line(Drip(bulk(b"abc") + b"+OK\r\n", [100]), "here")
    assert line.receive([memoryview(bytearray(3))])
    with pytest.raises(ServerGoneError, match="more than was asked for"):
        line.reply()


def test_a_server_that_breaks_off_in_a_payload_is_gone() -> None:
    def read_it(url: str) -> None:
        with Connection(url).line() as way:
            way.send(("GET", "x"))
            way._connection._sock.settimeout(0.2)
            way.receive([memoryview(bytearray(9))])

    with peer(answers({b"GET": b"$9\r\nabc"})) as url:
        with pytest.raises(ServerGoneError, match="does not answer"):
            read_it(url)
