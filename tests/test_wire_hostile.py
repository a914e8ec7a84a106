"""Bytes that lie: whatever they say, only DamagedSampleError comes out, and no memory goes in."""

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from synthbroker import head as heads
from synthbroker import schema, wire
from synthbroker.cutting import LARGEST_PART_BYTES
from synthbroker.errors import DamagedSampleError
from synthbroker.head import LARGEST_HEAD_BYTES
from synthbroker.schema import DTYPES, LARGEST_SIZE, MOST_DIMENSIONS
from wires import encode, entry_of

often = settings(deadline=None, max_examples=300)
WANTED = schema.parse("image:f32[2,*] label:u8[...]")
SAMPLE: dict[str, schema.Array] = {"image": np.zeros((2, 900), np.float32), "label": np.ones(3, np.uint8)}
ENCODED = encode(SAMPLE, "lz4")
CONTENT: dict[str, Any] = msgpack.unpackb(ENCODED.head)
FIELDS: list[Any] = msgpack.unpackb(CONTENT["f"])

packables = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.sampled_from(["v", "f", "s", "p", "m", "r", "raw", "lz4", "f32", "u8", "image", "label", "{}"])
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=5)),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)


def read_all(fields: dict[bytes, bytes]) -> None:
    """Do what a reader does with an entry before it takes memory."""
    entry = wire.read_entry(fields)
    wire.check_schema(entry.head, WANTED, 10**6)


@contextmanager
def taking_no_memory(largest_bytes: int = 4 << 20) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < largest_bytes
    finally:
        tracemalloc.stop()


def head(**changes: Any) -> bytes:
    packed: bytes = msgpack.packb(CONTENT | changes)
    return packed


def one_field(described: object, size: object = 4) -> dict[str, Any]:
    """Say what a head says of one tensor: the field as it may be described, and its packed bytes."""
    return {"f": msgpack.packb([described]), "s": [size], "p": [[4, 0]]}


def one_tensor(sizes: list[Any], name: str = "raw", packed_bytes: Any = None, short: str = "f32") -> dict[str, Any]:
    size = packed_bytes if packed_bytes is not None else 4 * int(np.prod(sizes, dtype=object))
    parts = [[min(LARGEST_PART_BYTES, size - at), 0] for at in range(0, min(size, 2**30), LARGEST_PART_BYTES)]
    return one_field(["x", short, sizes, name], size) | {"p": parts}


@often
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_no_head(data: bytes) -> None:
    with pytest.raises(DamagedSampleError):
        heads.read_head(data)


@often
@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=6), st.integers(0, 400))
def test_mutated_heads_are_read_or_damaged(changes: list[tuple[int, int]], length: int) -> None:
    data = bytearray(ENCODED.head)
    for where, value in changes:
        data[where % len(data)] = value
    for one in (data, data[:length]):
        with suppress(DamagedSampleError):
            read_all(entry_of(ENCODED, head=bytes(one)))


@often
@given(packables)
@example({"v": 1})
@example([1])
@example({"v": 1, "f": 1, "s": [], "p": [], "m": {}, "r": "{}"})
@example({"v": 1, "f": b"\x90", "s": [], "p": [], "m": {}, "r": "{}"})
def test_arbitrary_structures_are_no_sample(content: object) -> None:
    with pytest.raises(DamagedSampleError):
        read_all(entry_of(ENCODED, head=msgpack.packb(content)))


@often
@given(st.data())
def test_heads_with_one_thing_replaced_are_read_or_damaged(data: st.DataObject) -> None:
    content: Any = msgpack.unpackb(ENCODED.head)
    content["f"] = msgpack.unpackb(content["f"])
    place: Any = content
    key = data.draw(st.sampled_from(sorted(content)))
    while isinstance(place[key], list) and place[key] and data.draw(st.booleans()):
        place, key = place[key], data.draw(st.integers(0, len(place[key]) - 1))
    place[key] = data.draw(packables)
    if isinstance(content["f"], list) or data.draw(st.booleans()):
        content["f"] = msgpack.packb(content["f"])
    with suppress(DamagedSampleError):
        read_all(entry_of(ENCODED, head=msgpack.packb(content)))


@often
@given(st.dictionaries(st.sampled_from(sorted(entry_of(ENCODED))), st.binary(max_size=30) | st.none(), min_size=1))
def test_entries_with_other_fields_are_read_or_damaged(changes: dict[bytes, bytes | None]) -> None:
    fields = entry_of(ENCODED)
    for key, value in changes.items():
        fields.pop(key)
        if value is not None:
            fields[key] = value
    with suppress(DamagedSampleError):
        read_all(fields)


@often
@given(st.dictionaries(st.binary(max_size=5), st.binary(max_size=20), max_size=5))
def test_a_foreign_entry_is_no_sample(fields: dict[bytes, bytes]) -> None:
    with pytest.raises(DamagedSampleError, match="not a sample"):
        read_all(fields)


@pytest.mark.parametrize(
    "changes",
    [
        {"v": 2},
        {"v": True, "f": None},
        {"f": msgpack.packb(FIELDS[:1]), "s": CONTENT["s"][:1]},  # sums that no longer add up
        {"p": CONTENT["p"] * 2},
        {"p": [[0, 0], *CONTENT["p"]]},
        {"p": [[LARGEST_PART_BYTES + 1, 0]]},
        {"p": [[-1, 0]]},
        {"p": [[True, 0]]},
        {"p": [[1.0, 0]]},
        {"p": [[1, "x"]]},
        {"p": [[1]]},
        {"m": {"a": 1}},
        {"m": []},
        {"m": {b"\xff": "x"}},
        {"r": "[]"},
        {"r": "not JSON"},
        {"r": "[" * 100_000},
        {"r": {}},
        {"r": "9" * 10_000},
        one_tensor([3], packed_bytes=11),
        one_tensor([3], short="f33"),
        one_tensor([3], name="gzip"),
        one_tensor([3], name="lz4"),  # a packed tensor that is not smaller
        one_tensor([-1], packed_bytes=4),
        one_tensor([True]),
        one_tensor([1.0], packed_bytes=4),
        one_tensor([2**63], name="lz4", packed_bytes=4),
        one_tensor([LARGEST_SIZE + 1], name="lz4", packed_bytes=4),
        one_tensor([1] * (MOST_DIMENSIONS + 1), packed_bytes=4),
        one_tensor([2**40, 2**40], packed_bytes=4),
        one_field(["a b", "f32", [1], "raw"]),
        one_field([["x"], "f32", [1], "raw"]),
        one_field(["x", ["f32"], [1], "raw"]),
        one_field(["x", "f32", [1], ["raw"]]),
        one_field(["x", "f32", "1", "raw"]),
        one_field(["x", "f32", [1]]),
        one_field(["x", "f32", [1], "raw", 4]),
        one_field("xyza"),
        {"f": msgpack.packb({"x": 1}), "s": [4], "p": [[4, 0]]},
        # what describes the fields is no bytes, or not of a list
        {"f": FIELDS},
        {"f": CONTENT["f"].decode("latin-1")},
        {"f": 7},
        {"f": b""},
        {"f": b"\xc0"},
        {"f": b"\x07"},
        {"f": b"\xc1"},
        {"f": b"\xdd\xff\xff\xff\xff"},
        {"f": b"\x91" * 100_000},
        {"f": CONTENT["f"] + b"\x00"},
        {"f": CONTENT["f"][:-1]},
        {"f": msgpack.packb("xy")},
        # packed sizes: another number of them than fields, or of another type
        {"s": CONTENT["s"][:1]},
        {"s": [sum(CONTENT["s"])]},
        {"s": [*CONTENT["s"], 0]},
        {"s": []},
        {"s": None},
        {"s": 7},
        {"s": "ab"},
        {"s": {"a": 1, "b": 2}},
        {"s": [[8], [8]]},
        {"s": [{}, {}]},
        {"s": [str(size) for size in CONTENT["s"]]},
        {"s": [sum(CONTENT["s"]), None]},
        {"s": [sum(CONTENT["s"]) + 1, -1]},
        one_field(["never-seen", "f32", [1], "raw"], 4.0),
        one_field(["never-seen", "u8", [1], "raw"], True) | {"p": [[1, 0]]},
        one_field(["x", "f32", [1], "raw"], "4"),
    ],
)
def test_a_head_that_lies_is_damaged(changes: dict[str, Any]) -> None:
    with taking_no_memory(), pytest.raises(DamagedSampleError):
        heads.read_head(head(**changes))


@pytest.mark.parametrize("missing", ["v", "f", "s", "p", "m", "r"])
def test_a_head_that_lacks_a_key_is_damaged(missing: str) -> None:
    content = {key: value for key, value in CONTENT.items() if key != missing}
    with pytest.raises(DamagedSampleError):
        heads.read_head(msgpack.packb(content))


@pytest.mark.parametrize(
    "data",
    [
        b"\xdd\xff\xff\xff\xff",  # an array of 2^32 - 1 items
        b"\xdf\xff\xff\xff\xff",  # a map
        b"\xdb\xff\xff\xff\xff",  # a text
        b"\xc6\xff\xff\xff\xff",  # bytes
        b"\xc9\xff\xff\xff\xff\x01",  # an extension
        b"\x91" * 100_000,  # nested for ever
        b"\x81\xa1a" * 100_000,
        b"\xc7\x00\x01",  # an empty extension
        b"\xd7\xff" + b"\x00" * 8,  # a timestamp
        ENCODED.head + b"\x00",  # something behind the head
        b"\x85" + ENCODED.head[1:],
        b"\x87" + ENCODED.head[1:],
        bytes(LARGEST_HEAD_BYTES + 1),
    ],
)
def test_a_head_that_promises_the_moon_takes_no_memory(data: bytes) -> None:
    with taking_no_memory(), pytest.raises(DamagedSampleError):
        heads.read_head(data)


def test_heads_that_were_read_take_no_memory_for_long() -> None:
    """What is remembered of heads is bounded in bytes, not only in number: each of these is different, and valid."""
    with taking_no_memory():
        for i in range(60):
            described = msgpack.packb([[f"{i}-{k}", "u8", [0], "raw"] for k in range(1000)])
            heads.read_head(head(f=described, s=[0] * 1000, p=[]))


@pytest.mark.parametrize("sizes", [[2, 2**40], [2, 250_001]])
def test_a_free_size_is_held_to_the_limit_before_memory_is_taken(sizes: list[int]) -> None:
    tensors = msgpack.packb([["image", "f32", sizes, "lz4"], ["label", "u8", [3], "raw"]])
    data = entry_of(ENCODED, head=head(f=tensors, s=[100, 3], p=[[103, 0]]), parts=b"0a1b:1", data=None)
    with taking_no_memory(), pytest.raises(DamagedSampleError, match="would take"):
        read_all(data)


@pytest.mark.parametrize(
    "sample",
    [
        {"image": SAMPLE["image"]},
        {**SAMPLE, "more": SAMPLE["label"]},
        {"image": SAMPLE["image"], "mask": SAMPLE["label"]},
        {"image": SAMPLE["image"].astype(np.float64), "label": SAMPLE["label"]},
        {"image": SAMPLE["image"].reshape(1, 2, 900), "label": SAMPLE["label"]},
        {"image": SAMPLE["image"].reshape(3, 600), "label": SAMPLE["label"]},
    ],
)
def test_a_sample_that_does_not_fit_the_ring_is_damaged(sample: dict[str, schema.Array]) -> None:
    with pytest.raises(DamagedSampleError, match="image:f32"):
        read_all(entry_of(encode(sample)))


def test_a_field_given_twice_is_damaged() -> None:
    tensors = msgpack.packb([["label", "u8", [3], "raw"]] * 2)
    with pytest.raises(DamagedSampleError, match="2 fields"):
        wire.check_schema(heads.read_head(head(f=tensors, s=[3, 3], p=[[6, 0]])), WANTED, 10**6)


NOTHING: dict[str, schema.Array] = {"image": np.zeros((2, 0), np.float32), "label": np.zeros(0, np.uint8)}
TWO_BESIDE = encode({"image": np.zeros((2, 9000), np.float32), "label": SAMPLE["label"]})
ONE_RIDES = encode({"image": np.zeros((2, 112_500), np.float32), "label": np.ones(148_000, np.uint8)})
ALL_RIDES = encode({"image": np.zeros((2, 9), np.float32), "label": SAMPLE["label"]})


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"parts": b"0a1b:1"}, "1 parts and 0 bytes in the entry, where the head says"),
        ({"parts": b"0a1b:-1"}, "-1 parts"),
        ({"parts": b"0a1b:x"}, "not a sample"),
        ({"parts": b"0a1b"}, "not a sample"),
        ({"parts": b"\xff:1"}, "not a sample"),
        ({"parts": b"-:0"}, "0 parts and 0 bytes in the entry, where"),
        ({"parts": b"-:0", "data": b"abc"}, "0 parts and 3 bytes in the entry, where"),
        ({"data": b"abc"}, "2 parts and 3 bytes in the entry, where"),  # all parts are beside
        ({"parts": b"0a1b:9", "data": b"abc"}, "9 parts and 3 bytes in the entry, where"),
        ({"seq": b"x"}, "not a sample"),
        ({"t": b""}, "not a sample"),
        ({"from_": b"\xff"}, "not a sample"),
        ({"head": None}, "head is missing"),
        ({"parts": None}, "parts is missing"),
    ],
)
def test_an_entry_that_contradicts_its_head_is_damaged(changes: dict[str, Any], complaint: str) -> None:
    read_all(entry_of(TWO_BESIDE))
    with pytest.raises(DamagedSampleError, match=complaint):
        read_all(entry_of(TWO_BESIDE, **changes))


@pytest.mark.parametrize("sample", [ONE_RIDES, ALL_RIDES])
@pytest.mark.parametrize("what", ["longer", "shorter", "none", "empty", "a part more", "a part less", "all beside"])
def test_what_rides_in_the_entry_is_as_long_as_the_head_says(sample: wire.Encoded, what: str) -> None:
    parts = len(sample.parts)
    changes: dict[str, bytes | None] = {
        "longer": {"data": sample.data + b"x"},
        "shorter": {"data": sample.data[:-1]},
        "none": {"data": None},
        "empty": {"data": b""},
        "a part more": {"parts": f"0a1b:{parts + 1}".encode()},
        "a part less": {"parts": f"0a1b:{parts - 1}".encode()} if parts else {"parts": b"0a1b:1"},
        "all beside": {"parts": f"0a1b:{parts + 2}".encode()},
    }[what]
    assert sample.data
    read_all(entry_of(sample))
    with pytest.raises(DamagedSampleError, match="bytes in the entry, where the head says"):
        read_all(entry_of(sample, **changes))


@pytest.mark.parametrize("sample", [TWO_BESIDE, ONE_RIDES, ALL_RIDES, encode(NOTHING)])
def test_an_entry_with_more_parts_than_its_head_is_damaged(sample: wire.Encoded) -> None:
    stated = len(heads.read_head(sample.head).parts)
    read_all(entry_of(sample))
    for parts in (stated + 1, stated + 9, 2**40):
        with pytest.raises(DamagedSampleError, match="bytes in the entry, where the head says"):
            read_all(entry_of(sample, parts=b"0a1b:%d" % parts, data=None))


@pytest.mark.parametrize("sample", [ONE_RIDES, ALL_RIDES])
def test_an_entry_with_fewer_parts_than_none_is_damaged(sample: wire.Encoded) -> None:
    """As Python counts, the part before the end is number -1: it must not be taken for the one that rides."""
    with pytest.raises(DamagedSampleError, match="-1 parts"):
        read_all(entry_of(sample, parts=b"0a1b:-1"))


def test_an_empty_payload_with_fewer_parts_than_none_is_damaged() -> None:
    with pytest.raises(DamagedSampleError, match="-1 parts"):
        read_all(entry_of(encode(NOTHING), parts=b"0a1b:-1", data=b"x"))


@pytest.mark.parametrize("as_another_type", [float, bool, bytes])
def test_sizes_of_another_type_are_damaged_also_where_such_fields_were_read_before(as_another_type: Any) -> None:
    """In Python 1, 1.0 and True are the same key."""
    honest: dict[str, Any] = {**one_field(["seen", "u8", [1], "raw"], 1), "p": [[1, 0]]}
    heads.read_head(head(**honest))
    sizes = b"\x01" if as_another_type is bytes else [as_another_type(1)]
    with pytest.raises(DamagedSampleError):
        heads.read_head(head(**honest | {"s": sizes}))


def test_data_of_an_empty_payload_is_damaged() -> None:
    empty = encode(NOTHING)
    assert (empty.parts, empty.data) == ([], b"")
    read_all(entry_of(empty))
    with pytest.raises(DamagedSampleError, match="0 parts and 1 bytes in the entry"):
        read_all(entry_of(empty, data=b"x"))


@pytest.mark.parametrize("short", sorted(DTYPES))
def test_an_honest_head_of_every_dtype_is_read(short: str) -> None:
    array = np.zeros((3, 0, 2), schema.dtype_of(short))
    assert heads.read_head(encode({"x": array}).head).tensors[0].dtype == array.dtype
