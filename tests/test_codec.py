"""Codecs: the bytes of one tensor, packed and unpacked."""

import math
import tracemalloc
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synthbroker import codec, schema
from synthbroker.codec import CODECS, RAW, SMALLEST_PACKED_BYTES
from synthbroker.errors import DamagedSampleError
from synthbroker.schema import DTYPES, Array

calm = settings(deadline=None)
PACKERS = sorted(set(CODECS) - {RAW})


@st.composite
def arrays(draw: st.DrawFn) -> Array:
    """Any dtype, any bytes in it (every NaN there is), dull ones too; 0-d and empty shapes."""
    dtype = schema.dtype_of(draw(st.sampled_from(sorted(DTYPES))))
    assert dtype is not None
    shape = tuple(draw(st.lists(st.integers(0, 9), max_size=4)))
    nbytes = math.prod(shape) * dtype.itemsize
    seed = draw(st.binary(min_size=1, max_size=64))
    if dtype == np.bool_:
        seed = bytes(byte & 1 for byte in seed)
    return np.frombuffer((seed * (nbytes // len(seed) + 1))[:nbytes], dtype).reshape(shape)


def unpack(packed: memoryview, name: str, nbytes: int) -> bytes:
    if name == RAW:
        return packed.tobytes()
    out = bytearray(nbytes)
    codec.decode(packed, name, memoryview(out))
    return bytes(out)


@calm
@given(arrays(), st.sampled_from(sorted(CODECS)))
def test_a_tensor_comes_back_bit_for_bit(array: Array, wanted: str) -> None:
    used, packed = codec.encode(array, wanted)
    assert used in {wanted, RAW}
    assert packed.nbytes == array.nbytes if used == RAW else packed.nbytes < array.nbytes
    assert unpack(packed, used, array.nbytes) == array.tobytes()


@pytest.mark.parametrize("wanted", PACKERS)
@pytest.mark.parametrize("short", sorted(DTYPES))
def test_what_can_be_made_smaller_is(short: str, wanted: str) -> None:
    array = np.zeros((16, 64), schema.dtype_of(short))
    used, packed = codec.encode(array, wanted)
    assert used == wanted
    assert packed.nbytes < array.nbytes / 4
    assert unpack(packed, used, array.nbytes) == array.tobytes()


@pytest.mark.parametrize("wanted", sorted(CODECS))
def test_noise_and_very_small_tensors_go_raw(wanted: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, 5000, np.uint8)
    small = np.zeros(SMALLEST_PACKED_BYTES - 1, np.uint8)
    for array in (noise, small):
        used, packed = codec.encode(array, wanted)
        assert used == RAW
        assert packed.obj is not None
        assert np.shares_memory(np.frombuffer(packed, np.uint8), array), "raw bytes are not copied"


def test_the_bytes_of_an_array_that_may_not_be_written_are_seen_too() -> None:
    array = np.arange(5, dtype=np.int16)
    array.flags.writeable = False
    assert codec.as_bytes(array).tobytes() == array.tobytes()


@pytest.mark.parametrize(
    ("name", "packed"),
    [
        (
            "lz4",
            """02012102 00020000 00020000 41000000 14000000
            1a0000001f0001002c1f0101002c1f0201002c1f03010027500303030303 0b0000001f000100e7500000000000""",
        ),
        (
            "zstd",
            "02019102000200000002000036000000140000001e00000028b52ffd600001a50000300000010203000510007c4a281d2546494cc202",
        ),
        (
            "lz4-bitshuffle",
            """0201240200020000000200004f00000014000000280000001300010013ff0100030f0013000f0005
            10000402000418000402000418000f0200a05000000000000b0000001f000100e7500000000000""",
        ),
        (
            "zstd-bitshuffle",
            """02019402000200000002000038000000140000002000000028b52ffd
            600001b50000400000ff00ff00ff00071000bcaa74d759967c990d6d""",
        ),
    ],
)
def test_what_was_packed_once_can_be_unpacked_for_ever(name: str, packed: str) -> None:
    data = memoryview(bytes.fromhex(packed))
    assert unpack(data, name, 512) == (np.arange(256, dtype=np.int16) // 64).tobytes()


@pytest.mark.parametrize("name", ["", "gzip", None, 3, "LZ4"])
def test_an_unknown_codec_is_refused_with_the_known_ones(name: object) -> None:
    with pytest.raises(ValueError, match="raw, lz4, zstd"):
        codec.check(name)


def packed_zeros(name: str, nbytes: int) -> bytearray:
    used, packed = codec.encode(np.zeros(nbytes, np.uint8), name)
    assert used == name
    return bytearray(packed)


@pytest.mark.parametrize("name", PACKERS)
@pytest.mark.parametrize("wanted", [0, 1, 1023, 1025, 1 << 20])
def test_a_tensor_of_another_size_than_asked_for_is_refused(name: str, wanted: int) -> None:
    with pytest.raises(DamagedSampleError, match="1024, not"):
        codec.decode(memoryview(packed_zeros(name, 1024)), name, memoryview(bytearray(wanted)))


@pytest.mark.parametrize("name", PACKERS)
@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, -1])
def test_a_tensor_cut_short_is_refused(name: str, length: int) -> None:
    with pytest.raises(DamagedSampleError):
        codec.decode(memoryview(packed_zeros(name, 1024))[:length], name, memoryview(bytearray(1024)))


@pytest.mark.parametrize("name", PACKERS)
def test_a_bomb_takes_no_memory(name: str) -> None:
    bomb = memoryview(packed_zeros(name, 1 << 28))  # unpacks to 256 MiB
    tracemalloc.start()
    try:
        with pytest.raises(DamagedSampleError):
            codec.decode(bomb, name, memoryview(bytearray(1024)))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@settings(deadline=None, max_examples=400)
@given(st.sampled_from(PACKERS), st.lists(st.tuples(st.integers(0, 10**4), st.integers(0, 255)), max_size=8))
def test_mutated_bytes_unpack_within_their_memory_or_are_damaged(name: str, changes: list[tuple[int, int]]) -> None:
    array = np.arange(1000, dtype=np.int32) % 17
    packed = bytearray(codec.encode(array, name)[1])
    for where, value in changes:
        packed[where % len(packed)] = value
    fence = 64
    memory = bytearray(b"\xa5" * (array.nbytes + 2 * fence))
    with suppress(DamagedSampleError):
        codec.decode(memoryview(packed), name, memoryview(memory)[fence:-fence])
    assert memory[:fence] == memory[-fence:] == b"\xa5" * fence


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(PACKERS), st.binary(max_size=200), st.integers(0, 500))
def test_arbitrary_bytes_behind_an_honest_header_are_damaged(name: str, body: bytes, size: int) -> None:
    header = bytearray(packed_zeros(name, 1024)[:16])
    header[4:8] = size.to_bytes(4, "little")
    header[12:16] = (16 + len(body)).to_bytes(4, "little")
    memory = bytearray(size)
    with suppress(DamagedSampleError):
        codec.decode(memoryview(header + body), name, memoryview(memory))
    assert len(memory) == size
