"""How the bytes of one tensor are packed. An entry states its codec; nobody guesses it.

| codec | what it is |
| --- | --- |
| raw | the bytes as they lie in memory, C order, little endian |
| lz4 | Blosc: bytes shuffled by item size, lz4 level 1 |
| zstd | Blosc: bytes shuffled by item size, zstd level 1 |
| lz4-bitshuffle, zstd-bitshuffle | likewise, with single bits shuffled |

Whole bytes suit smooth values and labels (a smooth float32 volume, packed ÷ unpacked: zstd 0.38, lz4 0.58; with bits
0.57 and 0.73), single bits suit noise and masks (the demo's image: lz4 0.82 at 1.9 GB/s, where zstd of whole bytes
makes 0.83 at 0.25 GB/s, and lz4 0.89).

What a codec does not make smaller is sent raw, so that a packed tensor is always shorter than the tensor itself: a
reader can refuse anything else before it takes memory.
"""

import struct
from typing import Any

import numpy as np
from numcodecs import Blosc

from synthbroker.errors import DamagedSampleError

Array = np.ndarray[Any, np.dtype[Any]]

RAW = "raw"
AUTO = "auto"  # no codec: `choose` names one for each tensor
CODECS: dict[str, Any] = {
    RAW: None,
    "lz4": Blosc(cname="lz4", clevel=1, shuffle=Blosc.SHUFFLE),
    "zstd": Blosc(cname="zstd", clevel=1, shuffle=Blosc.SHUFFLE),
    "lz4-bitshuffle": Blosc(cname="lz4", clevel=1, shuffle=Blosc.BITSHUFFLE),
    "zstd-bitshuffle": Blosc(cname="zstd", clevel=1, shuffle=Blosc.BITSHUFFLE),
}
# Blosc 1 chunk header: four bytes, then unpacked, block and packed size (c-blosc, README_CHUNK_FORMAT.rst).
_HEADER = struct.Struct("<4xIII")
SMALLEST_PACKED_BYTES = 256  # Blosc's own header is 16 bytes; below this nothing is gained
LARGEST_PACKED_BYTES = 2**31 - 17  # Blosc's limit; larger tensors go raw


def check(name: object) -> str:
    """Check what a user may name a codec.

    Raises:
        ValueError: Neither a codec nor "auto".
    """
    if not isinstance(name, str) or name not in (AUTO, *CODECS):
        raise ValueError(f"unknown codec {name!r}: {AUTO} or one of {', '.join(CODECS)}")
    return name


def encode(array: Array, name: str) -> tuple[str, memoryview]:
    """Pack one tensor.

    Args:
        array: C-contiguous.
        name: A codec.

    Returns:
        The codec that was used and the bytes. `raw` bytes are a view of the array, which must then stay as it is.
    """
    raw = as_bytes(array)
    if name != RAW and SMALLEST_PACKED_BYTES <= raw.nbytes <= LARGEST_PACKED_BYTES:
        packed = CODECS[name].encode(np.frombuffer(raw, _shuffle_dtype(array.dtype.itemsize)))
        if len(packed) < raw.nbytes:
            return name, memoryview(packed)
    return RAW, raw


def decode(packed: memoryview, name: str, out: memoryview) -> None:
    """Unpack one tensor into memory that is there.

    Args:
        packed: What `encode` gave.
        name: A codec other than raw.
        out: As many bytes as the tensor has.

    Raises:
        DamagedSampleError: These bytes do not unpack to as many bytes as `out` has.
    """
    if packed.nbytes < _HEADER.size:
        raise DamagedSampleError(f"{name}: {packed.nbytes} bytes are less than a header")
    nbytes, _, packed_nbytes = _HEADER.unpack_from(packed)
    if (nbytes, packed_nbytes) != (out.nbytes, packed.nbytes):
        raise DamagedSampleError(
            f"{name}: {packed.nbytes} bytes that claim {packed_nbytes} and to unpack to {nbytes}, not {out.nbytes}"
        )
    try:
        CODECS[name].decode(packed, out=out)
    except (RuntimeError, ValueError, TypeError) as error:
        raise DamagedSampleError(f"{name}: cannot be unpacked: {error}") from error


def as_bytes(array: Array) -> memoryview:
    """View a C-contiguous array as its bytes; also of dtypes that memoryview does not know, empty and 0-d."""
    if array.dtype.isbuiltin == 1 and array.size and array.ndim:
        return array.data.cast("B")
    return array.reshape(-1).view(np.uint8).data


def _shuffle_dtype(itemsize: int) -> np.dtype[Any]:
    """Blosc shuffles by the item size of what it is given; it knows no bfloat16."""
    return np.dtype(f"V{itemsize}") if itemsize not in (1, 2, 4, 8) else np.dtype(f"u{itemsize}")
