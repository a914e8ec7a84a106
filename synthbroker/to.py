"""From the words of the command line to values; what cannot be is told with its reason."""

import argparse
import json
import re
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from synthbroker import acl, cast, keys, units
from synthbroker import checks as values
from synthbroker import schema as schemas
from synthbroker.bench import measures as bench

T = TypeVar("T")


def checked(check: Callable[[str], T]) -> Callable[[str], T]:
    """Let argparse show the reason why a value cannot be, not only that it cannot."""

    @wraps(check)
    def convert(text: str) -> T:
        try:
            return check(text)
        except (TypeError, ValueError) as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return convert


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """Take whole numbers within limits."""

    def check(text: str) -> int:
        limits = f"a whole number from {least}" + (f" to {most}" if most is not None else "")
        if not text.isascii() or not text.isdigit() or int(text) < least or (most is not None and int(text) > most):
            raise ValueError(f"must be {limits}, got {text!r}")
        return int(text)

    return checked(check)


@checked
def seconds(text: str) -> float:
    """Take a number of seconds."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        raise ValueError(f"must be a number of seconds from 0, got {text!r}")
    return seconds


@checked
def ring_name(text: str) -> str:
    """Take a ring's name."""
    return keys.check_name("ring", text)


@checked
def group_name(text: str) -> str:
    """Take a group's name."""
    return keys.check_name("group", text)


@checked
def json_object(text: str) -> dict[str, Any]:
    """Take a JSON object."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"must be a JSON object, for example '{{\"classes\": 4}}', got {text!r}: {error}") from error
    if not isinstance(value, dict):
        raise TypeError(f"must be a JSON object, for example '{{\"classes\": 4}}', got {text!r}")
    return value


@checked
def schema(text: str) -> str:
    """Take a schema."""
    return str(schemas.parse(text))


@checked
def checks(text: str) -> str:
    """Take checks, field by field."""
    return values.text_of(values.parse(text))


@checked
def casts(text: str) -> dict[str, str]:
    """Take casts, field by field."""
    words = text.split()
    wanted = dict(word.partition(":")[::2] for word in words)
    if len(wanted) < len(words):
        raise ValueError(f"must name each field once, got {text!r}")
    cast.parse(wanted)
    return wanted


@checked
def names(text: str) -> tuple[str, ...]:
    """Take names of fields."""
    return tuple(schemas.check_name(name) for name in text.split(","))


@checked
def measures(text: str) -> tuple[int, ...]:
    """Take numbers of measures of the bench."""
    numbers = tuple(int(word) if word.isascii() and word.isdigit() else 0 for word in text.split(","))
    if not set(numbers) <= set(bench.NUMBERS):
        raise ValueError(f"must be numbers from 1 to {bench.NUMBERS[-1]} with commas, like 1,4,11, got {text!r}")
    return numbers


@checked
def grant(text: str) -> acl.Grant:
    """Take ROLE:RING=FILE."""
    who, separator, path = text.partition("=")
    role, colon, rings = who.partition(":")
    if not separator or not colon or not path:
        raise ValueError(f"must read ROLE:RING=FILE or ROLE:RING,RING=FILE, got {text!r}")
    return acl.Grant(role, tuple(rings.split(",")), Path(path).expanduser().absolute())


@checked
def url(text: str) -> str:
    """Take a URL without a password."""
    if "@" in text and re.match(r"[^/]+://[^@]*:[^@]+@", text):  # the text is not shown: it holds a password
        raise ValueError(
            "a password on the command line can be read by everybody on this machine (`ps`): "
            "set SYNTHBROKER_URL instead, or name an endpoint file, file:///path/broker.json"
        )
    return text


size = checked(units.parse_size)
