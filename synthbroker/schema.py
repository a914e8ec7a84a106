"""What the samples of a ring look like: names, dtypes and shapes, as one line of text.

`image:f32[1,96,96,96] label:u8[96,96,96]` is a schema; `image:f32[1,*,*,*]` leaves three sizes free, `image:f32[...]`
the whole shape; `image:f32~12[...]` says that 12 bits of each mantissa were kept. The same text stands in the ring's
`meta`, in every entry's `spec` (there without such notes), and in error messages.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from synthbroker.errors import SchemaError

# Short name: what numpy (or ml_dtypes) and torch both call it.
DTYPES = {
    "bool": "bool",
    "i8": "int8",
    "i16": "int16",
    "i32": "int32",
    "i64": "int64",
    "u8": "uint8",
    "u16": "uint16",
    "u32": "uint32",
    "u64": "uint64",
    "f16": "float16",
    "f32": "float32",
    "f64": "float64",
    "bf16": "bfloat16",
    "f8e4m3fn": "float8_e4m3fn",
    "f8e4m3fnuz": "float8_e4m3fnuz",
    "f8e5m2": "float8_e5m2",
    "f8e5m2fnuz": "float8_e5m2fnuz",
    "f8e8m0fnu": "float8_e8m0fnu",
    "c64": "complex64",
    "c128": "complex128",
}
_BY_SHORT = {short: np.dtype(getattr(ml_dtypes, name, None) or name) for short, name in DTYPES.items()}
_BY_DTYPE = {dtype: short for short, dtype in _BY_SHORT.items()}

MOST_DIMENSIONS = 32
LARGEST_SIZE = 2**40
_NAME = re.compile(r"[A-Za-z0-9_.\-/]{1,64}", re.ASCII)
_FIELD = re.compile(r"([^:\s]+):([a-z0-9]+)(?:~([0-9]{1,2}))?\[([^\]\s]*)\]", re.ASCII)

Shape = tuple[int, ...]
Array = np.ndarray[Any, np.dtype[Any]]


class Shaped(Protocol):
    """What a schema looks at: an array, or a tensor that is somewhere else."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """As numpy (or ml_dtypes) calls it."""

    @property
    def shape(self) -> Shape:
        """Its sizes."""


@dataclass(frozen=True)
class Field:
    """One tensor of a sample.

    Attributes:
        name: Letters, digits and `_ . - /`, at most 64.
        dtype: A numpy dtype in native byte order, those of ml_dtypes included.
        shape: Sizes; None in place of a size leaves it free, None in place of all leaves the whole shape free.
        kept_bits: Bits of the mantissa that a producer's cast kept; None: all. A note: it is not checked on values.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...] | None
    kept_bits: int | None = None

    @property
    def fixed(self) -> bool:
        """Whether all samples have the same shape here."""
        return self.shape is not None and None not in self.shape

    def nbytes(self) -> int | None:
        """Bytes of one such tensor, None where the shape is free."""
        if self.shape is None or None in self.shape:
            return None
        return math.prod(size for size in self.shape if size is not None) * self.dtype.itemsize

    def takes(self, dtype: np.dtype[Any], shape: Shape) -> bool:
        """Say whether a tensor of this dtype and shape fits."""
        if dtype != self.dtype:
            return False
        if self.shape is None or shape == self.shape:
            return True
        return len(shape) == len(self.shape) and all(
            wanted is None or wanted == size for wanted, size in zip(self.shape, shape, strict=True)
        )

    def __str__(self) -> str:
        sizes = "..." if self.shape is None else ",".join("*" if size is None else str(size) for size in self.shape)
        kept = "" if self.kept_bits is None else f"~{self.kept_bits}"
        return f"{self.name}:{dtype_name(self.dtype)}{kept}[{sizes}]"


@dataclass(frozen=True)
class Schema:
    """The fields of a ring's samples, in the order in which the first producer gave them."""

    fields: tuple[Field, ...]

    def __str__(self) -> str:
        return " ".join(str(field) for field in self.fields)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all fields."""
        return tuple(field.name for field in self.fields)

    def check(self, sample: Mapping[str, Shaped]) -> None:
        """Raise SchemaError with both schemas if the sample does not fit; the order of fields does not matter."""
        if len(sample) == len(self.fields):
            for field in self.fields:
                array = sample.get(field.name)
                if array is None or not field.takes(array.dtype, array.shape):
                    break
            else:
                return
        raise SchemaError(
            f"this sample does not fit the ring: the ring takes [{self}], the sample is [{infer(sample)}] "
            "(sizes that vary are declared when a ring is made, like image:f32[1,*,*])"
        )


def dtype_of(short: str) -> np.dtype[Any] | None:
    """Look a dtype up by its short name."""
    return _BY_SHORT.get(short)


def dtype_named(name: str) -> np.dtype[Any] | None:
    """Look a dtype up by the name that numpy (or ml_dtypes) and torch use."""
    return next((_BY_SHORT[short] for short, full in DTYPES.items() if full == name), None)


def dtype_name(dtype: np.dtype[Any]) -> str:
    """Give the short name of a supported dtype in native byte order."""
    return _BY_DTYPE[dtype]


def mantissa_bits(dtype: np.dtype[Any]) -> int | None:
    """Count the stored bits of mantissa of float16, float32 and float64; None for others."""
    return np.finfo(dtype).nmant if dtype.kind == "f" and dtype.isbuiltin == 1 else None


def supports(dtype: np.dtype[Any]) -> bool:
    """Say whether tensors of this dtype can be sent."""
    return dtype in _BY_DTYPE


def infer(sample: Mapping[str, Shaped]) -> Schema:
    """Describe one sample, every size fixed."""
    return Schema(tuple(Field(name, array.dtype, array.shape) for name, array in sample.items()))


@lru_cache(maxsize=1024)
def check_name(name: object) -> str:
    """Check the name of a field.

    Raises:
        TypeError: Not a string.
        ValueError: A character that is not allowed, empty, or longer than 64.
    """
    if not isinstance(name, str):
        raise TypeError(f"names of fields must be strings, got {name!r}")
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} cannot name a field: 1 to 64 letters, digits and _ . - / are allowed")
    return name


def parse(text: str) -> Schema:
    """Read a schema.

    Raises:
        ValueError: Not a schema; says which part and what is wrong with it.
    """
    fields = tuple(_parse_field(part) for part in text.split())
    names = [field.name for field in fields]
    if len(set(names)) != len(names):
        raise ValueError(f"a field is named twice in the schema {text!r}")
    if not fields:
        raise ValueError("a schema needs at least one field, for example 'image:f32[1,96,96,96] label:u8[96,96,96]'")
    return Schema(fields)


def _parse_field(text: str) -> Field:
    match = _FIELD.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a field of a schema: write name:dtype[sizes], for example image:f32[1,*,96]")
    name, short, kept, sizes = match.groups()
    dtype = dtype_of(short)
    if dtype is None:
        raise ValueError(f"unknown dtype {short!r} in {text!r}: one of {', '.join(DTYPES)}")
    kept_bits = None if kept is None else int(kept)
    if kept_bits is not None and kept_bits > (most := mantissa_bits(dtype) or -1):
        has = f"has {most} bits of mantissa" if most > 0 else "cannot be rounded"
        raise ValueError(f"~{kept} in {text!r}: {short} {has}")
    return Field(check_name(name), dtype, None if sizes == "..." else _parse_sizes(sizes, text), kept_bits)


def _parse_sizes(sizes: str, text: str) -> tuple[int | None, ...]:
    parts = sizes.split(",") if sizes else []
    if len(parts) > MOST_DIMENSIONS:
        raise ValueError(f"{text!r} has {len(parts)} dimensions, at most {MOST_DIMENSIONS} are possible")
    shape: list[int | None] = []
    for part in parts:
        if part != "*" and not (part.isascii() and part.isdigit() and int(part) <= LARGEST_SIZE):
            raise ValueError(f"{part!r} is not a size in {text!r}: a whole number, or * to leave it free")
        shape.append(None if part == "*" else int(part))
    return tuple(shape)
