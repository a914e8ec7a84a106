"""Sizes and durations, as people write and read them."""

import math
import re
from fractions import Fraction

_DECIMAL = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BINARY = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_FACTORS = _DECIMAL | _BINARY
_CANONICAL = {"kB", "KiB", "MiB", "GiB", "TiB"}
_SIZE = re.compile(r"([0-9]{1,20}(?:\.[0-9]{0,20})?|\.[0-9]{1,20})\s*([A-Za-z]*)", re.ASCII)
_LARGEST = 2**63 - 1
_EXAMPLES = "write a number of bytes, or '500MB', '8GB', '1.5 GiB'"


def parse_size(value: int | float | str) -> int:
    """Turn a size into bytes.

    Args:
        value: A number of bytes, or a number with a unit: B, kB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB
            (powers of 1024). All upper or all lower case is understood too; `Gb` is not, it may mean bits.

    Returns:
        Whole bytes, rounded down.

    Raises:
        ValueError: Not a size, negative, or beyond 2**63 - 1.
        TypeError: Neither a number nor a string.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError(f"a size must be a number or a string, got {value!r}: {_EXAMPLES}")
    size = _parse_text(value) if isinstance(value, str) else _floor(value)
    if not 0 <= size <= _LARGEST:
        raise ValueError(f"a size must lie in 0 … 2**63 - 1 bytes, got {value!r}: {_EXAMPLES}")
    return size


def format_size(size: int) -> str:
    """Write bytes with three digits and a unit that `parse_size` reads: 1500000 is `1.5 MB`."""
    for unit, factor in _DECIMAL.items():
        # 999.5 and more would be rounded to four digits: the next unit says it better.
        if size < 999.5 * factor or unit == "TB":
            break
    unit = "kB" if unit == "KB" else unit
    scaled = size / factor
    return f"{scaled:.0f} {unit}" if scaled >= 100 or factor == 1 else f"{scaled:.3g} {unit}"


def format_duration(seconds: float) -> str:
    """Write a duration in the one or two units that matter: `40 ms`, `2.5 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`."""
    if seconds < 0:
        return "-" + format_duration(-seconds)
    if not math.isfinite(seconds):
        return f"{seconds} s"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.5:
        return f"{seconds:.2g} s"
    return _format_long(round(seconds))


def plural(noun: str, count: int) -> str:
    """Write a noun as so many of it are called: `sample` of 1, `samples` of any other number."""
    return noun if count == 1 else f"{noun}s"


def _format_long(seconds: int) -> str:
    if seconds < 3600:
        return _format_pair(*divmod(seconds, 60), "min", "s")
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return _format_pair(*divmod(minutes, 60), "h", "min")
    return _format_pair(*divmod(round(seconds / 3600), 24), "d", "h")


def _format_pair(large: int, small: int, large_unit: str, small_unit: str) -> str:
    return f"{large} {large_unit} {small} {small_unit}" if small else f"{large} {large_unit}"


def _floor(value: int | float) -> int:
    try:
        return math.floor(value)
    except (OverflowError, ValueError):
        raise ValueError(f"a size must be finite, got {value!r}: {_EXAMPLES}") from None


def _parse_text(text: str) -> int:
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"not a size: {text!r}; {_EXAMPLES}")
    number, unit = match.groups()
    if unit not in _CANONICAL and unit not in (unit.upper(), unit.lower()):
        raise ValueError(f"unit {unit!r} of {text!r} may mean bits; {_EXAMPLES}")
    factor = _FACTORS.get(unit.upper() or "B")
    if factor is None:
        raise ValueError(f"unknown unit {unit!r} in {text!r}; {_EXAMPLES}")
    return math.floor(Fraction(number) * factor)
