"""Casts: floats that travel with fewer bits, where a user asks for it, and never silently wrong."""

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

import synthbroker as sb
from synthbroker import cast, monitor, schema
from synthbroker.errors import SchemaError
from tools import meta, reasons

calm = settings(deadline=None)
BF16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = [np.float16, np.float32, np.float64]


def floats(dtype, **options):
    width = np.dtype(dtype).itemsize * 8
    shapes = npst.array_shapes(min_dims=0, max_side=5)
    return npst.arrays(dtype, shapes, elements=st.floats(width=width, **options))


def one_way(array, text):
    (done, reason) = cast.apply({"x": array}, cast.parse({"x": text}))
    return done["x"], reason


# -- the values


@calm
@given(floats(np.float32) | floats(np.float64), st.sampled_from(["float16", "bfloat16"]))
def test_a_cast_is_the_nearest_value_or_told(array, text):
    before = array.tobytes()
    found, reason = one_way(array, text)
    with np.errstate(all="ignore"):
        expected = array.astype(np.float16 if text == "float16" else BF16)
    assert (found.dtype, found.shape) == (expected.dtype, array.shape)
    assert np.array_equal(found.astype(np.float64), expected.astype(np.float64), equal_nan=True)
    assert (reason is not None) == bool((np.isinf(found) & np.isfinite(array)).any())
    assert array.tobytes() == before


@calm
@given(st.sampled_from(FLOATS).flatmap(floats), st.data())
def test_bitround_keeps_so_many_bits_and_everything_that_is_no_number(array, data):
    most = schema.mantissa_bits(array.dtype)
    kept = data.draw(st.integers(0, most))
    before = array.tobytes()
    found, reason = one_way(array, f"bitround:{kept}")
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    integers = found.view(f"u{array.dtype.itemsize}")
    finite = np.isfinite(found)
    assert not (integers[finite] & ((1 << (most - kept)) - 1)).any()
    assert (np.isnan(found) == np.isnan(array)).all()
    assert (found[np.isinf(array)] == array[np.isinf(array)]).all()
    assert (reason is not None) == bool((np.isinf(found) & np.isfinite(array)).any())
    assert array.tobytes() == before
    again, _ = one_way(found, f"bitround:{kept}")
    assert again.tobytes() == found.tobytes()


@calm
@given(
    floats(np.float32, allow_nan=False, allow_infinity=False, min_value=-(2.0**100), max_value=2.0**100),
    st.integers(0, 23),
)
def test_bitround_is_off_by_half_a_step_at_most(array, kept):
    found, reason = one_way(array, f"bitround:{kept}")
    assert reason is None
    normal = np.abs(array) >= np.finfo(np.float32).tiny
    error = np.abs(found.astype(np.float64) - array)[normal]
    assert (error <= np.abs(array[normal]).astype(np.float64) * 2.0 ** -(kept + 1)).all()


@pytest.mark.parametrize(
    ("text", "dtype", "values", "count"),
    [
        ("float16", np.float32, [65519, -65519, np.inf, np.nan, 1e-30], 0),
        ("float16", np.float32, [65520, 1, -7e4], 2),
        ("float16", np.float64, [1e300, np.inf], 1),
        ("bfloat16", np.float32, [3.38e38, -np.inf], 0),
        ("bfloat16", np.float32, [3.4e38, 1], 1),
        ("bfloat16", np.float64, [3.5e38, np.nan], 1),
        ("bitround:3", np.float32, [3.4e38, np.inf], 1),
        ("bitround:3", np.float16, [65504, 1], 1),
        ("bitround:23", np.float32, [3.4e38, np.inf], 0),
    ],
)
def test_what_would_become_infinite_is_counted(text, dtype, values, count):
    _, reason = one_way(np.array(values, dtype), text)
    assert reason == (f"x has {count} finite values that {text} makes infinite" if count else None)


def test_every_nan_stays_one():
    every = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7FC00000], np.uint32).view(np.float32)
    every.flags.writeable = False
    for text in "bitround:0", "bitround:5", "bitround:22", "bitround:23", "float16", "bfloat16":
        assert np.isnan(one_way(every, text)[0]).all()


# -- what cannot be asked for


@pytest.mark.parametrize(
    ("wanted", "error", "complaint"),
    [
        ("float16", TypeError, "must be a dict"),
        ({"x": 16}, TypeError, "must be a text"),
        ({3: "float16"}, TypeError, "must be strings"),
        ({"a b": "float16"}, ValueError, "cannot name a field"),
        ({"x": "float8"}, ValueError, "float16, bfloat16, or bitround:N"),
        ({"x": "int8"}, ValueError, "unknown cast"),
        ({"x": "bitround"}, ValueError, "unknown cast"),
        ({"x": "bitround:"}, ValueError, "unknown cast"),
        ({"x": "bitround:-1"}, ValueError, "unknown cast"),
        ({"x": "bitround:53"}, ValueError, "from 0 to 52"),
    ],
)
def test_an_unknown_cast_is_refused_where_it_is_said(wanted, error, complaint):
    with pytest.raises(error, match=complaint):
        sb.Producer(ring="r", cast=wanted)


@pytest.mark.parametrize(
    ("wanted", "value", "error", "complaint"),
    [
        ("float16", np.uint8(1), TypeError, "'x' is uint8: only float32 and float64"),
        ("bfloat16", np.complex64(1), TypeError, "is complex64"),
        ("bfloat16", np.float16(1), TypeError, "is float16"),
        ("bitround:3", np.int64(1), TypeError, "only float16, float32 and float64 can be bitrounded"),
        ("bitround:3", np.ones(2, BF16), TypeError, "is bfloat16"),
        ("bitround:11", np.float16(1), ValueError, "float16 has 10 bits"),
        ("bitround:24", np.float32(1), ValueError, "float32 has 23 bits"),
    ],
)
def test_a_field_that_cannot_be_cast_so_is_refused_by_put(server, ring_name, wanted, value, error, complaint):
    with sb.Producer(server.url, ring=ring_name, capacity="1MB", cast={"x": wanted}) as out:
        with pytest.raises(error, match=complaint):
            out.put({"x": value})
        with pytest.raises(ValueError, match="cast names x, but the sample has only y"):
            out.put({"y": np.ones(3)})
    assert (out.stats.samples, meta(server, ring_name)["schema"]) == (0, "")


# -- through a ring


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("codec", ["raw", "zstd"])
@pytest.mark.parametrize("size", [3, 40_000])
def test_what_is_cast_arrives_so_and_the_ring_says_how(server, ring_name, copy, codec, size):
    x = np.linspace(-3, 3.3, size, dtype=np.float32) + np.float32(0.01)
    sample = {"a": x, "b": x.astype(np.float64), "c": x, "n": np.arange(size)}
    wanted = {"a": "float16", "b": "bfloat16", "c": "bitround:5"}
    with sb.Producer(server.url, ring=ring_name, capacity="50MB", producers=1, cast=wanted, codec=codec) as out:
        out.put(sample, copy=copy)
        out.flush()
    text = f"a:f16[{size}] b:bf16[{size}] c:f32~5[{size}] n:i64[{size}]"
    assert meta(server, ring_name)["schema"] == text
    assert monitor.status(ring_name, url=server.url).schema == text
    (batch,) = sb.Consumer(server.url, ring=ring_name, group="g")
    assert (batch["a"][0] == x.astype(np.float16)).all()
    assert batch["b"].dtype == BF16
    assert (batch["b"][0] == x.astype(BF16)).all()
    assert batch["c"][0].tobytes() == one_way(x, "bitround:5")[0].tobytes() != x.tobytes()
    assert (batch["n"][0] == sample["n"]).all()
    (peeked,) = sb.peek(ring_name, url=server.url)
    assert peeked["b"].dtype == BF16


def test_torch_reads_what_was_cast(server, ring_name):
    torch = pytest.importorskip("torch")
    with sb.Producer(server.url, ring=ring_name, capacity="50MB", producers=1, cast={"x": "bfloat16"}) as out:
        out.put({"x": torch.linspace(0, 1, 5)})
    (batch,) = sb.RingDataset(server.url, ring=ring_name, group="g")
    assert batch["x"].dtype == torch.bfloat16
    assert torch.equal(batch["x"][0], torch.linspace(0, 1, 5).to(torch.bfloat16))


@pytest.mark.parametrize("size", [3, 40_000])
def test_a_sample_that_overflows_goes_to_quarantine_with_its_recipe(server, ring_name, size):
    options = {"ring": ring_name, "capacity": "50MB", "producers": 1, "cast": {"x": "float16"}, "name": "p"}
    with sb.Producer(server.url, **options) as out:
        for seed, value in enumerate([1.0, 1e5, np.inf, 2.0]):
            out.put({"x": np.full(size, value, np.float32)}, recipe={"seed": seed})
    assert (out.stats.samples, out.stats.quarantined) == (3, 1)
    assert reasons(server, ring_name) == [f"x has {size} finite values that float16 makes infinite"]
    ((_, note),) = server.client().xrange(f"sb:{{{ring_name}}}:quarantine")
    assert json.loads(note[b"recipe"]) == {"seed": 1}
    (batch,) = sb.Consumer(server.url, ring=ring_name, group="g", batch_size=4)
    assert batch["x"][:, 0].tolist() == [1.0, np.inf, 2.0]


def test_a_ring_keeps_nan_out_after_a_cast_too(server, ring_name):
    options = {"ring": ring_name, "capacity": "50MB", "producers": 1, "finite": True, "cast": {"x": "bfloat16"}}
    with sb.Producer(server.url, **options) as out:
        out.put({"x": np.array([np.nan, 1])})
    assert reasons(server, ring_name) == ["x has NaN or infinity"]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("bitround:5", None), (None, "bitround:5"), ("bitround:5", "bitround:6"), ("float16", None)],
)
def test_producers_of_one_ring_cast_alike(server, ring_name, ours, theirs):
    def options(text):
        return {"ring": ring_name, "capacity": "1MB", "cast": {"x": text} if text else None}

    sample = {"x": np.ones(3, np.float32)}
    with sb.Producer(server.url, **options(ours)) as out:
        out.put(sample)
    other = sb.Producer(server.url, **options(theirs))
    with pytest.raises(SchemaError, match=r"x:f(32~5|32|16)\[3\]"):
        other.put(sample)
    other.close()
    with sb.Producer(server.url, **options(ours)) as out:
        out.put(sample)


def test_a_declared_schema_is_noted_and_may_say_the_note_itself(server, ring_name):
    options = {"ring": ring_name, "capacity": "1MB", "cast": {"x": "bitround:5"}}
    for declared in "x:f32[*]", "x:f32~5[*]":
        with sb.Producer(server.url, schema=declared, **options) as out:
            out.put({"x": np.ones(4, np.float32)})
    assert meta(server, ring_name)["schema"] == "x:f32~5[*]"
    with pytest.raises(ValueError, match=r"the schema has x:f32~6\[\*\], but cast says bitround:5"):
        sb.Producer(server.url, schema="x:f32~6[*]", **options)


def test_a_declared_schema_of_another_dtype_is_told_at_put(server, ring_name):
    with sb.Producer(server.url, ring=ring_name, schema="x:f32[4]", cast={"x": "float16"}, capacity="1MB") as out:
        with pytest.raises(SchemaError, match=r"takes \[x:f32\[4\]\], the sample is \[x:f16\[4\]\]"):
            out.put({"x": np.ones(4, np.float32)})


# -- the schema's text


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("x:u8~3[1]", "u8 cannot be rounded"),
        ("x:bf16~3[1]", "bf16 cannot be rounded"),
        ("x:f32~24[1]", "f32 has 23 bits"),
        ("x:f32~[1]", "is not a field"),
        ("x:f32~-1[1]", "is not a field"),
        ("x:f32~100[1]", "is not a field"),
    ],
)
def test_a_note_that_cannot_be_is_refused(text, complaint):
    with pytest.raises(ValueError, match=complaint):
        schema.parse(text)


@calm
@given(st.sampled_from(["f16", "f32", "f64"]), st.integers(0, 52))
def test_a_note_survives_being_written_and_read(short, kept):
    dtype = schema.dtype_of(short)
    if kept <= schema.mantissa_bits(dtype):
        field = schema.Field("x", dtype, (1, None), kept)
        assert str(field) == f"x:{short}~{kept}[1,*]"
        assert schema.parse(str(field)).fields == (field,)


# -- encoding is begun only so far ahead


def test_what_was_not_yet_encoded_when_a_program_ends_is_sent_all_the_same(server, ring_name):
    code = f"""
import numpy as np, synthbroker as sb
out = sb.Producer({server.url!r}, ring={ring_name!r}, capacity="500MB", codec="zstd")
for i in range(25):
    out.put({{"n": i, "x": np.random.default_rng(i).integers(0, 4, 2**22, np.uint8)}})
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert meta(server, ring_name)["next"] == "26"
