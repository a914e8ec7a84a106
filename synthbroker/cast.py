"""Casts that a user asks for: tensors that travel with fewer bits than they were made with.

| cast | what it does | of | the ring's schema says |
| --- | --- | --- | --- |
| float16, bfloat16 | converts, to the nearest value, even of two | float32, float64 | what travels: `image:f16[...]` |
| bitround:N | keeps N bits of each mantissa (numcodecs.BitRound) | float16, 32, 64 | `image:f32~N[...]` |

NaN, infinity and zero stay what they are; what is too small to be told from zero becomes zero. A finite value that
would become infinite spoils its sample: it goes to quarantine, counted and with its recipe, as one with NaN does in a
ring that is made with `finite=True`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
from numcodecs import BitRound

from synthbroker import schema
from synthbroker.errors import SchemaError
from synthbroker.schema import Array, Schema, Shaped

_DTYPES: dict[str, np.dtype[Any]] = {"float16": np.dtype("float16"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_SOURCES = {"float32", "float64"}
_MOST_BITS = 52  # of float64
_BITROUND = re.compile(r"bitround:([0-9]{1,2})", re.ASCII)


@dataclass(frozen=True)
class Cast:
    """What is done to one field: another dtype, or so many bits of the mantissa kept."""

    dtype: np.dtype[Any] | None = None
    kept_bits: int | None = None


Casts = Mapping[str, Cast]


def parse(wanted: Mapping[str, str] | None) -> dict[str, Cast]:
    """Read what a user asks for, by field.

    Raises:
        TypeError: Not a mapping of texts.
        ValueError: No such cast, or a name that no field can have.
    """
    if wanted is None:
        return {}
    if not isinstance(wanted, Mapping):
        raise TypeError(f"cast must be a dict like {{'image': 'float16'}}, got {wanted!r}")
    return {schema.check_name(name): _parse(text) for name, text in wanted.items()}


def _parse(text: object) -> Cast:
    if not isinstance(text, str):
        raise TypeError(f"a cast must be a text, got {text!r}")
    if text in _DTYPES:
        return Cast(dtype=_DTYPES[text])
    match = _BITROUND.fullmatch(text)
    if match is None or int(match[1]) > _MOST_BITS:
        raise ValueError(f"unknown cast {text!r}: {', '.join(_DTYPES)}, or bitround:N with N from 0 to {_MOST_BITS}")
    return Cast(kept_bits=int(match[1]))


def preview(arrays: Mapping[str, Shaped], casts: Casts) -> Mapping[str, Shaped]:
    """Give arrays of the dtypes and shapes that will travel; what is cast takes no memory and has no values.

    Raises:
        ValueError: A field that is not there, or more bits to keep than it has.
        TypeError: A field that cannot be cast so.
    """
    if not casts:
        return arrays
    missing = sorted(set(casts) - set(arrays))
    if missing:
        raise ValueError(f"cast names {', '.join(missing)}, but the sample has only {', '.join(arrays)}")
    return {name: _preview(name, array, casts[name]) if name in casts else array for name, array in arrays.items()}


def _preview(name: str, array: Shaped, cast: Cast) -> Shaped:
    if cast.dtype is not None:
        if array.dtype != cast.dtype and array.dtype.name not in _SOURCES:
            raise TypeError(f"field {name!r} is {array.dtype}: only float32 and float64 can be cast to {cast.dtype}")
        return np.broadcast_to(np.empty((), cast.dtype), array.shape)
    most = schema.mantissa_bits(array.dtype)
    if most is None:
        raise TypeError(f"field {name!r} is {array.dtype}: only float16, float32 and float64 can be bitrounded")
    assert cast.kept_bits is not None
    if cast.kept_bits > most:
        raise ValueError(f"bitround:{cast.kept_bits} for field {name!r}: {array.dtype} has {most} bits of mantissa")
    return array


def apply(arrays: Mapping[str, Array], casts: Casts) -> tuple[Mapping[str, Array], str | None]:
    """Cast a sample that `preview` found fit.

    Returns:
        The arrays, none changed in place; and what is wrong with them, if anything.
    """
    if not casts:
        return arrays, None
    done = {name: _apply(array, casts[name]) if name in casts else array for name, array in arrays.items()}
    for name in casts:
        infinite = np.count_nonzero(np.isinf(done[name]))
        overflown = infinite - np.count_nonzero(np.isinf(arrays[name])) if infinite else 0
        if overflown:
            return done, f"{name} has {overflown} finite values that {_named(casts[name])} makes infinite"
    return done, None


def _apply(array: Array, cast: Cast) -> Array:
    if cast.dtype is not None:
        with np.errstate(all="ignore"):  # overflow is looked for in the result: not every dtype warns of it
            return array.astype(cast.dtype)
    if cast.kept_bits == schema.mantissa_bits(array.dtype):
        return array
    rounded: Array = np.asarray(BitRound(cast.kept_bits).encode(array)).view(array.dtype)
    # Rounding up the mantissa of a NaN would carry into its exponent and sign.
    np.copyto(rounded, array, where=np.isnan(array))
    return rounded


def _named(cast: Cast) -> str:
    return f"bitround:{cast.kept_bits}" if cast.dtype is None else cast.dtype.name


def note(wanted: Schema, casts: Casts) -> Schema:
    """Write into a schema how many bits are kept.

    Raises:
        ValueError: It says another number.
    """
    return Schema(tuple(_note(field, casts.get(field.name, Cast())) for field in wanted.fields))


def _note(field: schema.Field, cast: Cast) -> schema.Field:
    if cast.kept_bits is None or field.kept_bits == cast.kept_bits:
        return field
    if field.kept_bits is not None:
        raise ValueError(f"the schema has {field}, but cast says {_named(cast)}")
    return replace(field, kept_bits=cast.kept_bits)


def noted(text: str | None, casts: Casts) -> str | None:
    """Write into a schema's text how many bits are kept; errors of `note` and of `schema.parse`."""
    return None if text is None else str(note(schema.parse(text), casts))


def check(ring: Schema, casts: Casts) -> None:
    """Check that a ring's samples are rounded as these are.

    Raises:
        SchemaError: They are not.
    """
    for field in ring.fields:
        kept_bits = casts.get(field.name, Cast()).kept_bits
        if field.kept_bits != kept_bits:
            ours = "no bitround" if kept_bits is None else f"bitround:{kept_bits}"
            cure = f"cast={{{field.name!r}: 'bitround:{field.kept_bits}'}}" if field.kept_bits is not None else "none"
            raise SchemaError(
                f"the ring takes [{ring}], and this producer's cast for {field.name} is {ours}: say {cure}"
            )
