"""What the values of a ring's samples must be like; a sample that is not goes to quarantine at its producer.

| check | what passes | of |
| --- | --- | --- |
| finite | no NaN, no infinity | what can have them |
| range(low,high) | values from low to high, both included, one may be left out; NaN is in no range | not complex |
| varied | not all values the same; a tensor of fewer than two values passes | all |

They are written by field, `*` for all fields, as text like a schema's: `image:finite,range(0,1),varied *:finite`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from synthbroker import schema
from synthbroker.errors import SchemaError
from synthbroker.schema import Array, Schema

NONE = "none"
EVERY = "*"
_EXAMPLE = "write for example {'image': 'finite,range(0,1),varied'}"
_CHECK = re.compile(r"finite|varied|range\(([^,()]*),([^,()]*)\)")
_LIST = re.compile(rf"(?:{_CHECK.pattern})(?:,(?:{_CHECK.pattern}))*")


@dataclass(frozen=True)
class Check:
    """What is asked of one field; `low` and `high` are None where they are left out."""

    finite: bool = False
    varied: bool = False
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        names = [name for name in ("finite", "varied") if getattr(self, name)]
        bounds = ",".join("" if bound is None else f"{bound!r}".removesuffix(".0") for bound in (self.low, self.high))
        return ",".join([*names, *([] if bounds == "," else [f"range({bounds})"])])


Checks = Mapping[str, Check]


def parse(wanted: str | Mapping[str, str]) -> dict[str, Check]:
    """Read what a user, or a ring's record, asks for, by field.

    Raises:
        TypeError: Neither a text nor a mapping of texts.
        ValueError: No such check, or a name that no field can have.
    """
    if isinstance(wanted, str):
        words = [] if wanted == NONE else [word.rpartition(":") for word in wanted.split()]
        wanted = {name: checks for name, _, checks in words}
        if len(words) != len(wanted) or "" in wanted:
            text = " ".join(map("".join, words))
            raise ValueError(
                "checks are one word for each field, like 'image:finite,range(0,1)', or '*:finite' for all of them: "
                f"got {text!r}"
            )
    if not isinstance(wanted, Mapping):
        raise TypeError(f"checks must be a dict of texts, got {wanted!r}: {_EXAMPLE}")
    return {name if name == EVERY else schema.check_name(name): _parse(text) for name, text in wanted.items()}


def _parse(text: object) -> Check:
    if not isinstance(text, str):
        raise TypeError(f"a check must be a text, got {text!r}: {_EXAMPLE}")
    text = "".join(text.split())
    if not _LIST.fullmatch(text):
        raise ValueError(f"unknown check {text!r}: finite, varied and range(low,high), with commas; {_EXAMPLE}")
    found = [(match[0], *match.groups()) for match in _CHECK.finditer(text)]
    words = [word.partition("(")[0] for word, *_ in found]
    if len(set(words)) != len(words):
        raise ValueError(f"a check is named twice in {text!r}")
    bounds = [(_bound(low, text), _bound(high, text)) for word, low, high in found if word.startswith("range")]
    low, high = bounds[0] if bounds else (None, None)
    if bounds and ((low is None and high is None) or (low is not None and high is not None and low > high)):
        raise ValueError(f"{text!r} lets everything pass, or nothing: a range is like range(0,1) or range(0,)")
    return Check("finite" in words, "varied" in words, low, high)


def _bound(text: str, of: str) -> float | None:
    try:
        bound = float(text) if text else None
    except ValueError:
        raise ValueError(f"{text!r} is not a number in {of!r}") from None
    if bound is not None and not np.isfinite(bound):
        raise ValueError(f"{text!r} is no bound in {of!r}: leave it out")
    return bound


def text_of(checks: Checks) -> str:
    """Write checks as the ring keeps them: `none`, or by name."""
    return " ".join(f"{name}:{checks[name]}" for name in sorted(checks)) or NONE


def check_schema(checks: Checks, wanted: Schema) -> None:
    """See that every check has its field, of a dtype that it can be asked of.

    Raises:
        SchemaError: It has not.
    """
    missing = sorted(set(checks) - {EVERY} - set(wanted.names))
    if missing:
        raise SchemaError(f"checks name {', '.join(missing)}, but the ring's samples are [{wanted}]")
    for field in wanted.fields:
        for check in _of(checks, field.name):
            if field.dtype.kind == "c" and (check.low is not None or check.high is not None):
                raise SchemaError(f"complex numbers have no order: {field} cannot be checked for {check}")


def _of(checks: Checks, name: str) -> list[Check]:
    return [checks[key] for key in (EVERY, name) if key in checks]


def failed(arrays: Mapping[str, Array], checks: Checks) -> str | None:
    """Say what is wrong with a sample: the first field that fails, and why; None where all is well."""
    for name, array in arrays.items():
        for check in _of(checks, name):
            reason = _failed(array, check)
            if reason is not None:
                return f"{name} {reason}"
    return None


def _failed(array: Array, check: Check) -> str | None:
    if check.finite and array.dtype.kind not in "biu" and not np.isfinite(array).all():
        return "has NaN or infinity"
    if array.size and (check.low is not None or check.high is not None):
        with np.errstate(invalid="ignore"):  # NaN is its own minimum
            least, most = _numbers(array.min()), _numbers(array.max())
        if not ((check.low is None or least >= check.low) and (check.high is None or most <= check.high)):
            return f"has values from {least:.6g} to {most:.6g}, which is not in {check}"
    if check.varied and array.size > 1 and _is_constant(array.reshape(-1)):
        return f"is constant: all its {array.size} values are {array.reshape(-1)[0]}"
    return None


def _numbers(value: Any) -> float | int:
    """See a number of any dtype as Python's own; whole ones stay exact."""
    number: float | int = int(value) if value.dtype.kind in "biu" else float(value)
    return number


def _is_constant(flat: Array) -> bool:
    first = flat[:1]
    if not _equal(flat[:64], first):  # as a rule the beginning tells
        return False
    return _equal(flat, first)


def _equal(flat: Array, first: Array) -> bool:
    """Say whether all values are the first one; NaN is like NaN."""
    return bool(((flat == first) | ((flat != flat) & (first != first))).all())
