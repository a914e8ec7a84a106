"""The format of a sample, version 1.

A sample's *payload* is its packed tensors one behind the other. It is cut into *parts*, each a Redis string of at most
4 MiB less 64 KiB; a payload of at most `INLINE_BYTES` is not cut and rides in the entry. The *entry* in the stream is

| field | what it holds |
| --- | --- |
| from, seq, t | producer:incarnation, its sequence number, the server's time in seconds |
| spec | names, dtypes and shapes, for people (`schema.Schema`), at most 200 characters |
| bytes, raw | bytes of the payload, and of the tensors when unpacked |
| parts | uid of the send attempt, a colon, number of parts; `-:0` for an inline payload |
| head | msgpack map, see below |
| data | the payload, if it is inline |

and its head is a msgpack map with exactly these keys:

| key | value |
| --- | --- |
| v | 1 |
| f | for each tensor: [name, short dtype, [sizes], codec, packed bytes] |
| p | for each part: [bytes, xxh3-64 of them]; an inline payload is one part; an empty payload none |
| m | metadata: map of text to text |
| r | recipe: JSON text of an object |

A reader trusts nothing before it is checked: first the head's own size, then shapes and sums, then the schema of the
ring, then a checksum over every part. Nothing is ever unpickled.
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np

from synthbroker import codec, cutting, schema
from synthbroker.errors import DamagedSampleError
from synthbroker.schema import Array, Schema

VERSION = 1
INLINE_BYTES = 6 * 1024
LARGEST_HEAD_BYTES = 1 << 20
LARGEST_TEXT_BYTES = 16 * 1024
SPEC_CHARACTERS = 200


@dataclass(frozen=True)
class Encoded:
    """A sample ready to be sent.

    Attributes:
        spec: Its schema as text.
        head: The msgpack map.
        raw_bytes: Bytes of all tensors.
        payload: The packed tensors; raw ones are views of the caller's memory.
        part_sizes: Where the payload is cut.
        inline: Whether the payload rides in the entry.
        cost_bytes: Server memory that the sample takes.
    """

    spec: str
    head: bytes
    raw_bytes: int
    payload: tuple[memoryview, ...]
    part_sizes: tuple[int, ...]
    inline: bool
    cost_bytes: int

    @property
    def payload_bytes(self) -> int:
        """Bytes of the payload."""
        return sum(self.part_sizes)

    def parts(self) -> list[list[memoryview]]:
        """Cut the payload: for each part the pieces it is made of."""
        return cutting.scatter(self.part_sizes, self.payload)


@dataclass(frozen=True)
class Tensor:
    """One tensor as a head describes it."""

    name: str
    dtype: np.dtype[Any]
    shape: schema.Shape
    codec: str
    packed_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes when unpacked."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Head:
    """A head whose sizes agree with each other."""

    tensors: tuple[Tensor, ...]
    parts: tuple[tuple[int, int], ...]
    metadata: dict[str, str]
    recipe: dict[str, Any]

    @property
    def payload_bytes(self) -> int:
        """Bytes of the payload."""
        return sum(size for size, _ in self.parts)


@dataclass(frozen=True)
class Entry:
    """What stands in the stream for one sample."""

    producer: str
    seq: int
    made_s: float
    uid: str
    parts: int
    head: Head
    data: bytes | None


def encode(
    sample: Mapping[str, Array], codecs: Mapping[str, str], metadata: Mapping[str, str], recipe: Mapping[str, Any]
) -> Encoded:
    """Pack a sample.

    Args:
        sample: C-contiguous arrays of supported dtypes. Raw ones are not copied: leave them alone until it is sent.
        codecs: For each field the codec to try.
        metadata, recipe: Checked by `pack_texts`.

    Raises:
        ValueError: Metadata or recipe are too long, or cannot be written as JSON.
    """
    packed = {name: codec.encode(array, codecs[name]) for name, array in sample.items()}
    payload = tuple(data for _, data in packed.values() if data.nbytes)
    size = sum(data.nbytes for data in payload)
    inline = size <= INLINE_BYTES
    sizes = ((size,) if size else ()) if inline else cutting.cut(size)
    pieces = cutting.scatter(sizes, payload)
    head = msgpack.packb(
        {
            "v": VERSION,
            "f": [
                [name, schema.dtype_name(array.dtype), list(array.shape), packed[name][0], packed[name][1].nbytes]
                for name, array in sample.items()
            ],
            "p": [[size, cutting.checksum(part)] for size, part in zip(sizes, pieces, strict=True)],
            **pack_texts(metadata, recipe),
        }
    )
    if len(head) > LARGEST_HEAD_BYTES:
        raise ValueError(
            f"this sample's head takes {len(head)} bytes, at most {LARGEST_HEAD_BYTES} fit: too many fields"
        )
    text = str(schema.infer(sample))
    spec = text if len(text) <= SPEC_CHARACTERS else text[: SPEC_CHARACTERS - 1] + "…"
    text_bytes = len(head) + len(spec.encode()) + (size if inline else 0)
    return Encoded(
        spec=spec,
        head=head,
        raw_bytes=sum(array.nbytes for array in sample.values()),
        payload=payload,
        part_sizes=sizes,
        inline=inline,
        cost_bytes=cutting.cost(() if inline else sizes, text_bytes),
    )


def pack_texts(metadata: Mapping[str, str], recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Check and pack what travels along with the tensors.

    Raises:
        TypeError: Metadata that is not text to text; a recipe that JSON does not know.
        ValueError: More than 16 KiB of either.
    """
    if not isinstance(metadata, Mapping) or not isinstance(recipe, Mapping):
        raise TypeError(f"metadata and recipe must be dicts, got {metadata!r:.80} and {recipe!r:.80}")
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"metadata must map text to text, got {key!r}: {value!r}")
    try:
        text = json.dumps(dict(recipe), separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"a recipe must be plain JSON (numbers, text, lists, objects): {error}") from error
    for what, size in ("recipe", len(text)), ("metadata", sum(len(k) + len(v) for k, v in metadata.items())):
        if size > LARGEST_TEXT_BYTES:
            raise ValueError(f"a {what} may have {LARGEST_TEXT_BYTES} characters, this one has {size}")
    return {"m": dict(metadata), "r": text}


def parts_of(head: Head, names: Sequence[str]) -> list[int]:
    """List the parts that hold anything of these tensors."""
    ends = list(itertools.accumulate(tensor.packed_bytes for tensor in head.tensors))
    spans = [
        (end - tensor.packed_bytes, end)
        for tensor, end in zip(head.tensors, ends, strict=True)
        if tensor.name in names and tensor.packed_bytes
    ]
    found, start = [], 0
    for index, (size, _) in enumerate(head.parts):
        if any(begin < start + size and end > start for begin, end in spans):
            found.append(index)
        start += size
    return found


def read_entry(fields: Mapping[bytes, bytes]) -> Entry:
    """Check one entry of the stream as far as it can be without the payload and the ring's schema.

    Raises:
        DamagedSampleError: Not an entry of this format, or one that contradicts itself.
    """
    try:
        uid, _, parts = fields[b"parts"].decode("ascii").rpartition(":")
        head = read_head(fields[b"head"])
        entry = Entry(
            producer=fields[b"from"].decode(),
            seq=int(fields[b"seq"]),
            made_s=float(fields[b"t"]),
            uid=uid,
            parts=int(parts),
            head=head,
            data=None if uid != "-" else fields.get(b"data", b""),
        )
    except KeyError as error:
        raise DamagedSampleError(f"not a sample: the field {error.args[0].decode()} is missing") from error
    except ValueError as error:
        raise DamagedSampleError(f"not a sample: {error}") from error
    if entry.data is not None and len(entry.data) != head.payload_bytes:
        raise DamagedSampleError(f"{len(entry.data)} bytes of data where the head says {head.payload_bytes}")
    if entry.data is None and entry.parts != len(head.parts):
        raise DamagedSampleError(f"{entry.parts} parts where the head says {len(head.parts)}")
    return entry


def read_head(data: bytes) -> Head:
    """Check a head: its size, its keys, the sums of its sizes.

    Raises:
        DamagedSampleError: It is not one.
    """
    if len(data) > LARGEST_HEAD_BYTES:
        raise DamagedSampleError(f"a head of {len(data)} bytes, at most {LARGEST_HEAD_BYTES} are possible")
    try:
        content = msgpack.unpackb(data, max_ext_len=0)
        if not isinstance(content, dict) or content.get("v") != VERSION:
            raise DamagedSampleError(f"not a head of version {VERSION}")
        head = Head(
            tensors=tuple(_read_tensor(*item) for item in content["f"]),
            parts=tuple(_read_part(*item) for item in content["p"]),
            metadata=_read_metadata(content["m"]),
            recipe=_read_recipe(content["r"]),
        )
    except DamagedSampleError:
        raise
    except (ValueError, TypeError, KeyError, RecursionError, msgpack.UnpackException) as error:
        raise DamagedSampleError(f"a head that cannot be read: {error}") from error
    if sum(tensor.packed_bytes for tensor in head.tensors) != head.payload_bytes:
        raise DamagedSampleError("the sizes of tensors and of parts do not add up")
    return head


def _read_tensor(name: str, short: str, sizes: list[int], codec_name: str, packed_bytes: int) -> Tensor:
    dtype = schema.dtype_of(short)
    if dtype is None or codec_name not in codec.CODECS:
        raise DamagedSampleError(f"unknown dtype {short!r:.40} or codec {codec_name!r:.40}")
    if len(sizes) > schema.MOST_DIMENSIONS or not all(_is_size(size) for size in [*sizes, packed_bytes]):
        raise DamagedSampleError(f"absurd shape {sizes!s:.80} or size {packed_bytes!r:.40}")
    tensor = Tensor(schema.check_name(name), dtype, tuple(sizes), codec_name, packed_bytes)
    fits = packed_bytes == tensor.nbytes if codec_name == codec.RAW else packed_bytes < tensor.nbytes
    if not fits:
        raise DamagedSampleError(f"{packed_bytes} {codec_name} bytes cannot be a tensor of {tensor.nbytes} bytes")
    return tensor


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= schema.LARGEST_SIZE


def _read_part(size: int, digest: int) -> tuple[int, int]:
    if type(size) is not int or type(digest) is not int or not 0 < size <= cutting.LARGEST_PART_BYTES:
        raise DamagedSampleError(f"a part of {size!r:.40} bytes")
    return size, digest


def _read_metadata(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(k, str) and isinstance(v, str) for k, v in value.items()):
        raise DamagedSampleError("metadata that are not text to text")
    return value


def _read_recipe(text: object) -> dict[str, Any]:
    recipe = json.loads(text) if isinstance(text, str) else None
    if not isinstance(recipe, dict):
        raise DamagedSampleError("a recipe that is not a JSON object")
    return recipe


def check_schema(head: Head, wanted: Schema, largest_free_bytes: int) -> None:
    """Check a head against the schema of its ring, before any memory is taken for it.

    Args:
        head: From `read_head`.
        wanted: The ring's schema.
        largest_free_bytes: What a tensor whose shape is free may take.

    Raises:
        DamagedSampleError: A field more or less, another dtype or shape, or a free shape beyond the limit.
    """
    tensors = {tensor.name: tensor for tensor in head.tensors}
    if len(tensors) != len(head.tensors) or len(tensors) != len(wanted.fields):
        raise DamagedSampleError(f"has {len(head.tensors)} fields, the ring's schema is [{wanted}]")
    for field in wanted.fields:
        tensor = tensors.get(field.name)
        if tensor is None or not field.takes(tensor.dtype, tensor.shape):
            raise DamagedSampleError(f"does not fit the ring's schema [{wanted}]: {field.name} is {tensor}")
        if not field.fixed and tensor.nbytes > largest_free_bytes:
            raise DamagedSampleError(f"{field.name} would take {tensor.nbytes} bytes, more than {largest_free_bytes}")


def check_part(index: int, part: tuple[int, int], pieces: Sequence[memoryview]) -> None:
    """Check a part that has arrived.

    Raises:
        DamagedSampleError: Its checksum is not the one in the head.
    """
    if cutting.checksum(pieces) != part[1]:
        raise DamagedSampleError(f"part {index} ({part[0]} bytes) is damaged: its checksum differs from the head's")
