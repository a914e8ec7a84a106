"""Schemas: one line of text that says what a ring's samples look like."""

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synthbroker import schema
from synthbroker.errors import SchemaError
from synthbroker.schema import DTYPES, LARGEST_SIZE, MOST_DIMENSIONS, Field, Schema, parse

calm = settings(deadline=None)
names = st.from_regex(r"[A-Za-z0-9_.\-/]{1,64}", fullmatch=True)
sizes = st.none() | st.integers(0, LARGEST_SIZE)
shapes = st.none() | st.lists(sizes, max_size=MOST_DIMENSIONS).map(tuple)
fields = st.builds(Field, names, st.sampled_from(sorted(DTYPES)).map(schema.dtype_of), shapes)
schemas = st.builds(Schema, st.lists(fields, min_size=1, max_size=8, unique_by=lambda field: field.name).map(tuple))


def array(short: str, *shape: int) -> schema.Array:
    dtype = schema.dtype_of(short)
    assert dtype is not None
    return np.zeros(shape, dtype)


@calm
@given(schemas)
def test_a_schema_survives_being_written_and_read(wanted: Schema) -> None:
    assert parse(str(wanted)) == wanted


@calm
@given(st.text(max_size=80) | st.text("ab:f32[],.*019- \n", max_size=80))
def test_any_text_is_a_schema_or_a_value_error(text: str) -> None:
    try:
        found = parse(text)
    except ValueError:
        return
    assert parse(str(found)) == found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x:f32[]", Field("x", np.dtype("float32"), ())),
        ("x:f32[0]", Field("x", np.dtype("float32"), (0,))),
        ("a/b-c.d_1:bf16[1,*,96]", Field("a/b-c.d_1", np.dtype(ml_dtypes.bfloat16), (1, None, 96))),
        ("x:bool[...]", Field("x", np.dtype(bool), None)),
    ],
)
def test_the_text_of_a_field_is_read(text: str, expected: Field) -> None:
    assert parse(text).fields == (expected,)
    assert str(expected) == text


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "at least one field"),
        ("x", "is not a field"),
        ("x:f32", "is not a field"),
        ("x:f32[1", "is not a field"),
        (":f32[1]", "is not a field"),
        ("x:f31[1]", "unknown dtype 'f31'"),
        ("ü:f32[1]", "cannot name a field"),
        ("x" * 65 + ":f32[1]", "cannot name a field"),
        ("x:f32[-1]", "'-1' is not a size"),
        ("x:f32[1,]", "'' is not a size"),
        ("x:f32[²]", "'²' is not a size"),
        ("x:f32[1.5]", "'1.5' is not a size"),
        (f"x:f32[{LARGEST_SIZE + 1}]", "is not a size"),
        (f"x:f32[{','.join('1' * (MOST_DIMENSIONS + 1))}]", f"at most {MOST_DIMENSIONS}"),
        ("x:f32[1] x:u8[1]", "named twice"),
    ],
)
def test_what_is_no_schema_is_refused_with_the_reason(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=r"size|field|dtype|dimensions|twice") as caught:
        parse(text)
    assert complaint in str(caught.value)


@pytest.mark.parametrize("name", [None, 3, b"x", ("x",)])
def test_a_name_that_is_no_text_is_a_type_error(name: object) -> None:
    with pytest.raises(TypeError, match="must be strings"):
        schema.check_name(name)


@pytest.mark.parametrize("name", ["", "a b", "a:b", "a[0]", "a\n", "x" * 65, "é"])
def test_a_name_that_would_break_the_line_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot name a field"):
        schema.check_name(name)


def test_every_dtype_has_one_name_of_its_own() -> None:
    assert len({schema.dtype_of(short) for short in DTYPES}) == len(DTYPES)
    for short in DTYPES:
        dtype = schema.dtype_of(short)
        assert dtype is not None
        assert schema.supports(dtype)
        assert schema.dtype_name(dtype) == short


def test_torch_calls_the_dtypes_by_the_same_names() -> None:
    import torch

    for name in DTYPES.values():
        assert isinstance(getattr(torch, name), torch.dtype)


@pytest.mark.parametrize("dtype", [np.longlong, np.intp, np.dtype("f4", metadata={"a": 1}), "<i8", bool, float])
def test_another_word_for_a_dtype_is_the_same_dtype(dtype: object) -> None:
    assert schema.supports(np.dtype(dtype))  # type: ignore[call-overload]


@pytest.mark.parametrize("dtype", [">f4", "O", "U3", "S3", "M8[s]", "V4", "i4,f4", np.longdouble])
def test_what_cannot_be_sent_as_it_lies_in_memory_is_not_supported(dtype: object) -> None:
    assert not schema.supports(np.dtype(dtype))  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("text", "nbytes", "fixed"),
    [
        ("x:f32[2,3]", 24, True),
        ("x:c128[]", 16, True),
        ("x:f64[0,7]", 0, True),
        ("x:f32[2,*]", None, False),
        ("x:f32[...]", None, False),
    ],
)
def test_the_size_of_a_field_is_known_where_its_shape_is(text: str, nbytes: int | None, fixed: bool) -> None:
    (field,) = parse(text).fields
    assert (field.nbytes(), field.fixed) == (nbytes, fixed)


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("image:f32[1,4] label:u8[4]", True),
        ("label:u8[4] image:f32[1,4]", True),  # the order does not matter
        ("image:f32[*,4] label:u8[*]", True),
        ("image:f32[...] label:u8[...]", True),
        ("image:f32[1,4]", False),
        ("image:f32[1,4] label:u8[4] more:u8[]", False),
        ("image:f64[1,4] label:u8[4]", False),
        ("image:f32[4] label:u8[4]", False),
        ("image:f32[1,5] label:u8[4]", False),
        ("image:f32[1,*,*] label:u8[4]", False),
        ("picture:f32[1,4] label:u8[4]", False),
    ],
)
def test_a_sample_is_checked_against_the_ring(text: str, fits: bool) -> None:
    sample = {"image": array("f32", 1, 4), "label": array("u8", 4)}
    if fits:
        parse(text).check(sample)
        return
    with pytest.raises(SchemaError) as caught:
        parse(text).check(sample)
    assert f"[{text}]" in str(caught.value)
    assert "[image:f32[1,4] label:u8[4]]" in str(caught.value)


@calm
@given(schemas, st.data())
def test_a_sample_made_for_a_schema_fits_it(wanted: Schema, data: st.DataObject) -> None:
    small = st.lists(st.integers(0, 2), max_size=4)
    for field in wanted.fields:
        shape = tuple(data.draw(small)) if field.shape is None else tuple(1 if n is None else n for n in field.shape)
        assert field.takes(field.dtype, shape)
        assert not field.fixed or field.nbytes() == math.prod(shape) * field.dtype.itemsize
