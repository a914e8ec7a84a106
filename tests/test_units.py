"""Sizes and durations."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from synthbroker.units import format_duration, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (0, 0),
        (512, 512),
        (1.9, 1),
        (8e9, 8 * 10**9),
        ("0", 0),
        ("512", 512),
        ("512B", 512),
        ("1kB", 1000),
        ("1KB", 1000),
        ("1kb", 1000),
        ("500MB", 500 * 10**6),
        ("8GB", 8 * 10**9),
        (" 8 gb ", 8 * 10**9),
        ("2TB", 2 * 10**12),
        ("1KiB", 1024),
        ("1kib", 1024),
        ("3MIB", 3 * 2**20),
        ("1.5 GiB", 3 * 2**29),
        ("2TiB", 2**41),
        (".5kB", 500),
        ("0.1GB", 10**8),  # exactly, though 0.1 is no binary fraction
        ("1.0001B", 1),
    ],
)
def test_a_size_is_read(text, expected):
    assert parse_size(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *["", "GB", "8 G", "8Gb", "8Mib", "8 potatoes", "-1", "-5GB", "+5GB", "1e3", "1_000", "0x10", "1 2", "1,5GB"],
        *["nan", "inf", "٣GB", "8GB!", "9" * 21, "9999999TB", -1, -0.5, math.nan, math.inf, 2**63],
    ],
)
def test_what_is_no_size_is_refused_with_the_value_and_examples(text):
    with pytest.raises(ValueError, match=r"8GB") as caught:
        parse_size(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("value", [None, True, [], b"8GB", 8 + 0j])
def test_what_is_neither_number_nor_text_is_a_type_error(value):
    with pytest.raises(TypeError, match="size"):
        parse_size(value)


@given(st.text(max_size=30))
def test_any_text_is_a_size_or_a_value_error(text):
    try:
        size = parse_size(text)
    except ValueError:
        return
    assert 0 <= size < 2**63


@given(st.integers(0, 10**15))
def test_a_written_size_is_read_back_to_three_digits(size):
    assert parse_size(format_size(size)) == pytest.approx(size, rel=0.005)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1_500_000, "1.5 MB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),
        (123_456_789, "123 MB"),
        (8 * 10**9, "8 GB"),
        (2 * 10**15, "2000 TB"),
    ],
)
def test_a_size_is_written_with_three_digits(size, text):
    assert format_size(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"),
        (0.04, "40 ms"),
        (0.9999, "1 s"),
        (2.5, "2.5 s"),
        (45.2, "45 s"),
        (59.6, "1 min"),
        (200, "3 min 20 s"),
        (3599.6, "1 h"),
        (7500, "2 h 5 min"),
        (86399, "1 d"),
        (3.2 * 86400, "3 d 5 h"),
        (-2.5, "-2.5 s"),
        (math.inf, "inf s"),
    ],
)
def test_a_duration_is_written_in_the_units_that_matter(seconds, text):
    assert format_duration(seconds) == text


@given(st.floats(0, 1e9))
def test_no_duration_shows_a_full_smaller_unit(seconds):
    words = format_duration(seconds).split()
    limits = {"ms": 1000, "s": 60, "min": 60, "h": 24, "d": math.inf}
    for number, unit in zip(words[::2], words[1::2], strict=True):
        assert float(number) < limits[unit] or (unit, number) == ("ms", "1000")
