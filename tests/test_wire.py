"""The format of a sample: golden bytes, round trips, cutting and scattering. What lies is in test_wire_hostile."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synthbroker import codec, cutting, schema, texts, wire
from synthbroker import head as heads
from synthbroker.codec import CODECS, RAW
from synthbroker.cutting import LARGEST_PART_BYTES
from synthbroker.errors import DamagedSampleError
from synthbroker.schema import DTYPES, Array
from synthbroker.texts import LARGEST_TEXT_BYTES
from synthbroker.wire import INLINE_BYTES
from wires import decode, encode, entry_of

calm = settings(deadline=None)
names = st.from_regex(r"[A-Za-z0-9_.\-/]{1,64}", fullmatch=True)
short_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def arrays(draw: st.DrawFn) -> Array:
    """Any dtype and shape; sometimes so large that the payload is cut, or is better packed."""
    dtype = schema.dtype_of(draw(st.sampled_from(sorted(DTYPES))))
    assert dtype is not None
    shape = tuple(draw(st.lists(st.integers(0, 6), max_size=4) | st.tuples(st.integers(0, 50_000))))
    largest = 1 if dtype == np.bool_ else 255
    pattern = np.array(draw(st.lists(st.integers(0, largest), min_size=1, max_size=40)), np.uint8)
    return np.resize(pattern, math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)


samples = st.dictionaries(names, st.tuples(arrays(), st.sampled_from(sorted(CODECS))), min_size=1, max_size=4)


@calm
@given(
    samples,
    st.dictionaries(short_texts, short_texts, max_size=3),
    st.dictionaries(st.text(max_size=5), json_values, max_size=3),
)
def test_a_sample_comes_back_exactly(
    fields: dict[str, tuple[Array, str]], metadata: dict[str, str], recipe: dict[str, Any]
) -> None:
    sample = {name: array for name, (array, _) in fields.items()}
    encoded = wire.encode(
        sample, {name: wanted for name, (_, wanted) in fields.items()}, texts.pack_texts(metadata, recipe)
    )
    entry = wire.read_entry(entry_of(encoded))
    wire.check_schema(entry.head, schema.infer(sample), 0)
    assert (entry.head.metadata, entry.head.recipe) == (metadata, recipe)
    assert (entry.producer, entry.seq, entry.made_s) == ("gen-3:ab12", 7, 1700000000.25)
    found = decode(encoded, entry)
    assert list(found) == list(sample)
    for name, array in sample.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()


@pytest.mark.parametrize(
    ("size", "parts", "riding"),
    [
        (0, 0, 0),
        (1, 0, 1),
        (INLINE_BYTES, 0, INLINE_BYTES),
        (INLINE_BYTES + 1, 1, 0),
        (LARGEST_PART_BYTES, 1, 0),
        (LARGEST_PART_BYTES + 1, 1, 1),
        (2 * LARGEST_PART_BYTES + INLINE_BYTES, 2, INLINE_BYTES),
        (2 * LARGEST_PART_BYTES + INLINE_BYTES + 1, 3, 0),
    ],
)
def test_a_last_part_rides_in_the_entry_up_to_a_limit(size: int, parts: int, riding: int) -> None:
    array = np.arange(size, dtype=np.uint64).astype(np.uint8)
    encoded = encode({"x": array})
    assert (len(encoded.parts), len(encoded.data), encoded.inline) == (parts, riding, parts == 0)
    assert encoded.payload_bytes == size
    entry = wire.read_entry(entry_of(encoded))
    assert (entry.parts, entry.data) == (parts, encoded.data)
    assert decode(encoded, entry)["x"].tobytes() == array.tobytes()


def test_raw_tensors_are_not_copied() -> None:
    array = np.zeros(100_000, np.float32)
    for part in encode({"x": array}).parts:
        for piece in part:
            assert np.shares_memory(np.frombuffer(piece, np.uint8), array)


def test_the_spec_is_for_people_and_stays_short() -> None:
    sample: dict[str, Array] = {"image": np.zeros((1, 4, 4), np.float32), "label": np.zeros((), np.uint8)}
    assert encode(sample).spec == b"image:f32[1,4,4] label:u8[]"
    many = encode({f"field-{i}": np.zeros(1) for i in range(50)}).spec.decode()
    assert len(many) == wire.SPEC_CHARACTERS
    assert many.endswith("…")


def test_the_bytes_of_format_version_1_are_these() -> None:
    """If this fails, ring and readers of different versions no longer understand each other.

    Undo the change; or, where the format must change, raise `heads.VERSION`, write the new format down in the docstring
    of `wire`, say so in the changelog, and only then put the new bytes here.
    """
    sample: dict[str, Array] = {"a": np.array([1.5, -2.0], np.float32), "b": np.array(7, np.uint8)}
    encoded = wire.encode(sample, {"a": "lz4", "b": "raw"}, texts.pack_texts({"site": "x"}, {"seed": 3}))
    assert heads.VERSION == 1
    assert encoded.spec == b"a:f32[2] b:u8[]"
    assert encoded.data == bytes.fromhex("0000c03f 000000c0 07")
    assert encoded.head == bytes.fromhex(GOLDEN_HEAD)
    assert (encoded.inline, encoded.parts, encoded.raw_bytes, encoded.payload_bytes) == (True, [], 9, 9)


GOLDEN_HEAD = """
86 a176 01
a166 c4 19  92 94 a161 a3663332 91 02 a3726177  94 a162 a27538 90 a3726177
a173 92 08 01
a170 91 92 ce00000009 cf03959af5432481d1
a16d 81 a473697465 a178
a172 aa 7b2273656564223a337d
"""


def test_the_golden_head_reads_as_what_it_was_made_of() -> None:
    head = heads.read_head(bytes.fromhex(GOLDEN_HEAD))
    assert head.tensors == (
        heads.Tensor("a", np.dtype(np.float32), (2,), RAW, 8),
        heads.Tensor("b", np.dtype(np.uint8), (), RAW, 1),
    )
    assert (head.metadata, head.recipe) == ({"site": "x"}, {"seed": 3})
    wire.check_part(0, head.parts[0], [memoryview(bytes.fromhex("0000c03f 000000c0 07"))])


@pytest.mark.parametrize(
    ("metadata", "recipe", "error"),
    [
        ({1: "x"}, {}, TypeError),
        ({"x": 1}, {}, TypeError),
        ({"x": b"y"}, {}, TypeError),
        ({}, {"f": float("nan")}, TypeError),
        ({}, {"f": np.zeros(2)}, TypeError),
        ({}, {"f": object()}, TypeError),
        ({}, {("a", "b"): 1}, TypeError),
        ({"x": "y" * LARGEST_TEXT_BYTES}, {}, ValueError),
        ({}, {"x": "y" * LARGEST_TEXT_BYTES}, ValueError),
    ],
)
def test_texts_that_cannot_travel_are_refused(metadata: Any, recipe: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"metadata|recipe"):
        texts.pack_texts(metadata, recipe)


def test_a_recipe_nested_too_deep_to_be_read_again_is_refused() -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(TypeError, match="recipe"):
        texts.pack_texts({}, {"deep": deep})


def test_too_many_fields_are_refused() -> None:
    one = np.zeros((), np.uint8)
    with pytest.raises(ValueError, match="too many fields"):
        encode({f"{i:064d}": one for i in range(20_000)})


# -- cutting


def class_of(size: int) -> int:
    """Say what jemalloc gives for `size` bytes, by a plain walk over its classes: four for each doubling."""
    base, classes = 128, list(range(16, 129, 16))
    while classes[-1] < size:
        classes = [base + base // 4 * k for k in (1, 2, 3, 4)]
        base *= 2
    return next(one for one in classes if one >= size)


@calm
@given(st.integers(1, 1 << 23))
def test_the_allocator_is_foreseen(size: int) -> None:
    assert cutting.allocated(size) == class_of(size + 64)


@calm
@given(st.integers(0, 1 << 36) | st.integers(0, 1 << 20))
def test_a_payload_is_cut_into_parts_that_waste_little(size: int) -> None:
    sizes = cutting.cut(size)
    assert sum(sizes) == size
    assert all(0 < part <= LARGEST_PART_BYTES for part in sizes)
    assert len(sizes) <= size // LARGEST_PART_BYTES + 8
    assert sum(map(cutting.allocated, sizes)) <= 1.04 * size + 8 * 1024


@calm
@given(samples)
def test_a_sample_costs_no_less_than_its_bytes(fields: dict[str, tuple[Array, str]]) -> None:
    sample, codecs = {n: a for n, (a, _) in fields.items()}, {n: c for n, (_, c) in fields.items()}
    encoded = wire.encode(sample, codecs, texts.pack_texts({}, {}))
    assert encoded.cost_bytes > encoded.payload_bytes + len(encoded.head) + len(encoded.spec)
    assert encoded.payload_bytes <= encoded.raw_bytes


# -- scattering


@calm
@given(st.lists(st.binary(max_size=20), max_size=6), st.lists(st.integers(1, 30), max_size=10))
def test_parts_cover_the_blocks_end_to_end_without_copying(blocks: list[bytes], cuts: list[int]) -> None:
    views = [memoryview(block) for block in blocks]
    whole = b"".join(blocks)
    sizes: list[int] = []
    for size in [*cuts, len(whole)]:
        sizes.append(min(size, len(whole) - sum(sizes)))
    parts = cutting.scatter([size for size in sizes if size], views)
    assert b"".join(piece for part in parts for piece in part) == whole
    assert [sum(piece.nbytes for piece in part) for part in parts] == [size for size in sizes if size]
    assert all(piece.nbytes and piece.obj in blocks for part in parts for piece in part)


@calm
@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=5))
def test_a_checksum_does_not_see_how_the_bytes_lie(data: bytes, cuts: list[int]) -> None:
    marks = [0, *sorted(min(c, len(data)) for c in cuts), len(data)]
    pieces = [memoryview(data)[a:b] for a, b in pairwise(marks)]
    assert cutting.checksum(pieces) == cutting.checksum([memoryview(data)])


@pytest.mark.parametrize("where", [0, 500, 999])
def test_one_changed_bit_is_noticed(where: int) -> None:
    array = np.random.default_rng(0).integers(0, 256, 1000, np.uint8)
    head = heads.read_head(encode({"x": array}).head)
    wire.check_part(0, head.parts[0], [codec.as_bytes(array)])
    array[where] ^= 1
    with pytest.raises(DamagedSampleError, match=r"part 0 \(1000 bytes\) is damaged"):
        wire.check_part(0, head.parts[0], [codec.as_bytes(array)])


def test_a_head_of_a_known_kind_says_what_a_new_one_says() -> None:
    """The beginning of a head is remembered; what is behind it is read each time."""
    for value in range(3):
        array = np.full(1000, value, np.uint8)
        along = texts.pack_texts({"site": str(value)} if value else None, {"seed": value})
        data = wire.encode({"x": array}, {"x": RAW}, along).head
        head = heads.read_head(data)
        assert head.parts == ((1000, cutting.checksum([codec.as_bytes(array)])),)
        assert (head.recipe, head.payload_bytes) == ({"seed": value}, 1000)
        assert head.metadata == ({"site": str(value)} if value else {})
        for cut in range(len(data)):
            with pytest.raises(DamagedSampleError):
                heads.read_head(data[:cut])
        with pytest.raises(DamagedSampleError):
            heads.read_head(data + b"\x00")
