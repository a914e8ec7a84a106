"""What is no sample, or not one of this ring, is refused by name; nothing of it is sent, and the ring goes on."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import synthbroker as sb
from tools import IN_PARTS, meta, number

GOOD = {"x": np.zeros(3, np.float32)}


class Thing:
    """An object that numpy would gladly wrap."""


def nested() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged)


# What is put as field x, which error that is, and a word of what it says.
NO_FIELD: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("objects", lambda: np.array([Thing()], object), TypeError, "object"),
    ("texts", lambda: np.array(["a", "b"]), TypeError, "<U1"),
    ("bytes", lambda: np.array([b"a"]), TypeError, "S1"),
    ("dates", lambda: np.array(["2020-01-01"], "datetime64[D]"), TypeError, "datetime64"),
    ("durations", lambda: np.array([1], "timedelta64[s]"), TypeError, "timedelta64"),
    ("records", lambda: np.zeros(2, [("a", "f4"), ("b", "i2")]), TypeError, "supported are"),
    ("long doubles", lambda: np.zeros(2, np.longdouble), TypeError, "supported are"),
    ("four bits", lambda: np.zeros(2, ml_dtypes.int4), TypeError, "int4"),
    ("a huge int", lambda: 2**70, TypeError, "object"),
    ("masked", lambda: np.ma.masked_array([1, 2], [True, False]), TypeError, "filled"),
    ("a text", lambda: "hello", TypeError, "str"),
    ("raw bytes", lambda: b"hello", TypeError, "bytes"),
    ("a list", lambda: [1.0, 2.0], TypeError, "list"),
    ("none", lambda: None, TypeError, "NoneType"),
    ("an object", Thing, TypeError, "Thing"),
    ("sparse", lambda: torch.eye(3).to_sparse(), TypeError, "dense"),
    ("jagged", nested, TypeError, "dense"),
    ("meta", lambda: torch.zeros(3, device="meta"), TypeError, "meta"),
    ("half complex", lambda: torch.zeros(3, dtype=torch.complex32), TypeError, "complex32"),
]

NO_SAMPLE: list[tuple[str, Any, type[Exception], str]] = [
    ("none", None, TypeError, "NoneType"),
    ("an array", np.zeros(3), TypeError, "must be a dict"),
    ("a tuple without names", (np.zeros(3),), TypeError, "fields="),
    ("a text", "hello", TypeError, "must be a dict"),
    ("nothing", {}, ValueError, "at least one field"),
    ("a number as name", {1: np.zeros(3)}, TypeError, "strings"),
    ("no name", {"": np.zeros(3)}, ValueError, "cannot name a field"),
    ("a space", {"a b": np.zeros(3)}, ValueError, "cannot name a field"),
    ("a colon", {"a:f32": np.zeros(3)}, ValueError, "cannot name a field"),
    ("an umlaut", {"größe": np.zeros(3)}, ValueError, "cannot name a field"),
    ("a line end", {"a\n": np.zeros(3)}, ValueError, "cannot name a field"),
    ("a long name", {"a" * 65: np.zeros(3)}, ValueError, "cannot name a field"),
]

NO_TEXTS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("a long recipe", {"recipe": {"text": "a" * 17_000}}, ValueError, "16384"),
    ("long metadata", {"metadata": {"text": "a" * 17_000}}, ValueError, "16384"),
    ("an array in a recipe", {"recipe": {"a": np.zeros(2)}}, TypeError, "plain JSON.*of type ndarray"),
    ("a nan in a recipe", {"recipe": {"a": math.nan}}, TypeError, "plain JSON"),
    ("a recipe that is a list", {"recipe": [1, 2]}, TypeError, "recipe"),
    ("a recipe that is a text", {"recipe": "seed=3"}, TypeError, "recipe"),
    ("a number in metadata", {"metadata": {"a": 1}}, TypeError, "text to text"),
    ("a number as key of metadata", {"metadata": {1: "a"}}, TypeError, "text to text"),
    ("metadata that are a text", {"metadata": "a"}, TypeError, "metadata"),
    ("metadata that are a list", {"metadata": ["a"]}, TypeError, "metadata"),
]


@pytest.fixture
def out(server, ring_name):
    with sb.Producer(server.url, ring=ring_name, capacity="10MB", producers=1) as out:
        yield out


def check_nothing_was_sent(server, ring_name, out):
    assert out.flush()
    assert meta(server, ring_name)["next"] == "1"
    out.put(GOOD)
    assert out.flush()
    assert meta(server, ring_name)["next"] == "2"
    assert meta(server, ring_name)["schema"] == "x:f32[3]"


@pytest.mark.parametrize(
    ("make", "error", "message"), [case[1:] for case in NO_FIELD], ids=[case[0] for case in NO_FIELD]
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
def test_what_cannot_be_a_field_is_refused(server, ring_name, out, make, error, message):
    with pytest.raises(error, match=message) as caught:
        out.put({"x": make(), "y": np.zeros(2)})
    assert "'x'" in str(caught.value)
    check_nothing_was_sent(server, ring_name, out)


@pytest.mark.parametrize(("sample", "error", "message"), [c[1:] for c in NO_SAMPLE], ids=[c[0] for c in NO_SAMPLE])
def test_what_is_no_sample_is_refused(server, ring_name, out, sample, error, message):
    with pytest.raises(error, match=message):
        out.put(sample)
    check_nothing_was_sent(server, ring_name, out)


@pytest.mark.parametrize(("texts", "error", "message"), [case[1:] for case in NO_TEXTS], ids=[c[0] for c in NO_TEXTS])
def test_texts_that_cannot_travel_are_refused(server, ring_name, out, texts, error, message):
    with pytest.raises(error, match=message):
        out.put(GOOD, **texts)
    check_nothing_was_sent(server, ring_name, out)


def test_numbers_as_numpy_draws_them_may_be_in_a_recipe(server, ring_name, out):
    out.put(GOOD, recipe={"seed": np.int64(2**40), "noise": np.float32(0.5), "flip": np.bool_(True)})
    assert out.flush()
    (batch,) = sb.peek(ring_name, 1, url=server.url)
    assert batch.info.recipes == ({"seed": 2**40, "noise": 0.5, "flip": True},)


def test_a_codec_for_a_field_that_is_not_there_is_refused(server, ring_name):
    for wanted, refused in ({"y": "zstd"}, True), ({"x": "zstd"}, False), ({"y": "zstd"}, True):  # also by a made ring
        told = pytest.raises(ValueError, match="codec names y, but the sample has only x")
        with told if refused else nullcontext():
            with sb.Producer(server.url, ring=ring_name, capacity="1MB", codec=wanted) as out:
                out.put(GOOD)


@pytest.mark.parametrize("capacity", [0, "0 GB", 0.5])
def test_a_ring_without_capacity_is_refused(server, ring_name, capacity):
    with pytest.raises(ValueError, match="capacity must be more than nothing"):
        sb.Producer(server.url, ring=ring_name, capacity=capacity)


def test_a_tuple_of_another_length_than_its_names_is_refused(server, ring_name):
    with sb.Producer(server.url, ring=ring_name, capacity="1MB", fields=("a", "b")) as out:
        with pytest.raises(ValueError, match="3 items"):
            out.put((1, 2, 3))
        with pytest.raises(TypeError, match="must be a dict"):
            out.put("ab")
        out.put((1, 2))


def test_a_sample_with_more_fields_than_fit_its_head_is_told_with_the_next_call(server, ring_name):
    with pytest.raises(ValueError, match="too many fields"):
        with sb.Producer(server.url, ring=ring_name, capacity="100MB", producers=1) as out:
            out.put({f"{i:060}": i for i in range(20_000)})
    assert meta(server, ring_name)["ended"] == "0", "a producer that lost a sample is not done"


def test_an_array_too_large_for_this_machine_does_not_stop_the_producer(server, ring_name):
    with sb.Producer(server.url, ring=ring_name, capacity="1MB", schema="x:f32[...]") as out:
        with pytest.raises(MemoryError):
            out.put({"x": np.broadcast_to(np.float32(1), (2**20, 2**26))})
        out.put(GOOD)
        assert out.flush(wait_s=20.0)


# -- the ring's schema

OTHERS: list[tuple[str, dict[str, Any], str]] = [
    ("dtype", {"n": np.int32(1), "x": np.zeros(4, np.float32)}, "n:i32[] x:f32[4]"),
    ("shape", {"n": 1, "x": np.zeros(5, np.float32)}, "n:i64[] x:f32[5]"),
    ("dimensions", {"n": 1, "x": np.zeros((1, 4), np.float32)}, "n:i64[] x:f32[1,4]"),
    ("a field less", {"n": 1}, "n:i64[]"),
    ("a field more", {"n": 1, "x": np.zeros(4, np.float32), "y": True}, "n:i64[] x:f32[4] y:bool[]"),
    ("another name", {"n": 1, "y": np.zeros(4, np.float32)}, "n:i64[] y:f32[4]"),
    ("bfloat16 for float16", {"n": 1, "x": torch.zeros(4, dtype=torch.bfloat16)}, "n:i64[] x:bf16[4]"),
]


@pytest.mark.parametrize(("sample", "ours"), [case[1:] for case in OTHERS], ids=[case[0] for case in OTHERS])
def test_a_sample_of_another_schema_is_refused_with_both(server, ring_name, out, sample, ours):
    out.put(number(0))
    with pytest.raises(sb.SchemaError) as caught:
        out.put(sample)
    assert "[n:i64[] x:f32[4]]" in str(caught.value)
    assert f"[{ours}]" in str(caught.value)
    with pytest.raises(sb.SchemaError):
        out.put_batch([sample])
    out.put(number(1))
    assert out.flush()
    assert meta(server, ring_name)["next"] == "3"


def test_a_second_producer_is_held_to_the_schema_of_the_first(server, ring_name, out):
    out.put(number(0))
    out.flush()
    with sb.Producer(server.url, ring=ring_name) as other:
        with pytest.raises(sb.SchemaError, match=r"n:i64\[\] x:f32\[4\]"):
            other.put(number(1, 5))
        other.put(dict(reversed(number(1).items())))  # the order of the fields does not matter
    assert meta(server, ring_name)["next"] == "3"


def test_of_two_that_begin_at_once_one_decides_the_schema(server, ring_name):
    with (
        sb.Producer(server.url, ring=ring_name, capacity="1MB") as one,
        sb.Producer(server.url, ring=ring_name) as other,
    ):
        one.put(number(0))
        with pytest.raises(sb.SchemaError):
            other.put(number(1, 5))
        other.put(number(1))


@pytest.mark.parametrize(
    ("schema", "fits", "does_not"),
    [
        ("x:f32[1,*]", [(1, 2), (1, 0), (1, 7)], [(2, 2), (1,), (1, 2, 3)]),
        ("x:f32[...]", [(), (3,), (2, 0, 4)], []),
        ("x:f32[*,*]", [(1, 2), (5, 1)], [(3,)]),
    ],
)
def test_shapes_that_are_declared_free_may_vary(server, ring_name, schema, fits, does_not):
    arrays = [np.full(shape, i, np.float32) for i, shape in enumerate(fits)]
    with sb.Producer(server.url, ring=ring_name, capacity="10MB", producers=1, schema=schema) as out:
        for array in arrays:
            out.put({"x": array})
        for shape in does_not:
            with pytest.raises(sb.SchemaError):
                out.put({"x": np.zeros(shape, np.float32)})
        with pytest.raises(sb.SchemaError):
            out.put({"x": arrays[0].astype(np.float64)})
    (batch,) = sb.Consumer(server.url, ring=ring_name, group="a", batch_size=10)
    assert [(a.shape, a.tolist()) for a in batch["x"]] == [(a.shape, a.tolist()) for a in arrays]
    (tensors,) = sb.RingDataset(server.url, ring=ring_name, group="t", batch_size=10).loader()
    assert [tuple(t.shape) for t in tensors["x"]] == fits
    assert isinstance(tensors["x"], list)


def test_free_shapes_stay_lists_behind_a_transform(server, ring_name):
    with sb.Producer(server.url, ring=ring_name, capacity="10MB", producers=1, schema="x:f32[*] n:i64[]") as out:
        for i in range(3):
            out.put({"x": np.zeros(i, np.float32), "n": i})
    options = {"ring": ring_name, "batch_size": 3, "transform": lambda sample: sample}
    for reader in sb.Consumer(server.url, group="a", **options), sb.RingDataset(server.url, group="t", **options):
        (batch,) = reader
        assert [len(x) for x in batch["x"]] == [0, 1, 2]
        assert list(batch["n"]) == [0, 1, 2]


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("", "at least one field"),
        ("x", "not a field"),
        ("x:q7[3]", "q7"),
        ("x:f32[-1]", "not a size"),
        ("x:f32[] x:f32[]", "twice"),
    ],
)
def test_what_is_no_schema_is_refused_before_anything_is_opened(ring_name, schema, message):
    with pytest.raises(ValueError, match=message):
        sb.Producer("unix:///nowhere", ring=ring_name, schema=schema)


# -- NaN where the ring forbids it

NOT_FINITE = {
    "float32": np.array([1, np.nan], np.float32),
    "float64": np.array([-np.inf, 0]),
    "float16": np.array([np.inf, 0], np.float16),
    "complex64": np.array([complex(0, np.nan), 0], np.complex64),
    "bfloat16": np.array([np.nan, 0], ml_dtypes.bfloat16),
    "float8_e5m2": np.array([np.inf, 0], ml_dtypes.float8_e5m2),
    "float8_e4m3fn": np.array([np.nan, 0], ml_dtypes.float8_e4m3fn),
    "large": np.where(np.arange(IN_PARTS * 10) == 39_999, np.nan, 0),
}


@pytest.mark.parametrize("dtype", NOT_FINITE)
def test_a_sample_that_is_not_finite_goes_to_quarantine_with_its_recipe(server, ring_name, dtype):
    bad = NOT_FINITE[dtype]
    good = np.ones_like(bad)
    options = {"ring": ring_name, "name": "maker", "capacity": "50MB", "producers": 1, "finite": True}
    with sb.Producer(server.url, **options) as out:
        for seed, array in enumerate([good, bad, good, bad, bad]):
            out.put({"x": array, "n": seed, "flag": True}, recipe={"seed": seed})
    assert (out.stats.samples, out.stats.quarantined) == (2, 3)
    assert meta(server, ring_name)["quarantined"] == "3"
    notes = [fields for _, fields in server.client().xrange(f"sb:{{{ring_name}}}:quarantine")]
    assert sorted(note[b"recipe"] for note in notes) == [b'{"seed": 1}', b'{"seed": 3}', b'{"seed": 4}']
    assert all(note[b"producer"] == b"maker" and note[b"reason"] == b"x has NaN or infinity" for note in notes)
    (batch,) = sb.Consumer(server.url, ring=ring_name, group="a", batch_size=5)
    assert batch["n"].tolist() == [0, 2]


def test_without_finite_a_nan_is_a_value(server, ring_name):
    with sb.Producer(server.url, ring=ring_name, capacity="1MB", producers=1) as out:
        out.put({"x": np.nan})
    (batch,) = sb.Consumer(server.url, ring=ring_name, group="a")
    assert np.isnan(batch["x"]).all()
