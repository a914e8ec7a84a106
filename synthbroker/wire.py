"""The format of a sample, version 1.

A sample's *payload* is its packed tensors one behind the other. It is cut into *parts*, each a Redis string of at most
1 MiB less 4 KiB. A last part of at most `INLINE_BYTES` is no string of its own but rides in the entry: a tiny payload
does so as a whole. The *entry* in the stream is

| field | what it holds |
| --- | --- |
| from, seq, t | producer:incarnation, its sequence number, the server's time in seconds |
| spec | names, dtypes and shapes, for people (`schema.Schema`), at most 200 characters |
| bytes, raw | bytes of the payload, and of the tensors when unpacked |
| parts | uid of the send attempt, a colon, number of parts beside the stream; `-:0` where there are none; `uid@start:1`
where the whole payload lies from byte `start` on in a part that several samples share (`sharing`) |
| head | msgpack map, see below |
| data | the last part, if it is small |

and its head is a msgpack map with exactly these keys:

| key | value |
| --- | --- |
| v | 1 |
| f | bytes: a msgpack list with, for each tensor, [name, short dtype, [sizes], codec] |
| s | for each tensor: packed bytes |
| p | for each part, one that rides in the entry included: [bytes, xxh3-64 of them]; an empty payload has none |
| m | metadata: map of text to text |
| r | recipe: JSON text of an object |

`f` is bytes within bytes because it is the same for most samples of a ring: both sides work it out once.

A reader trusts nothing before it is checked: first the head's own size, then shapes and sums, then the schema of the
ring, then a checksum over every part. Nothing is ever unpickled.
"""

import itertools
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import msgpack
import numpy as np

from synthbroker import codec, cutting, schema, texts
from synthbroker import head as heads
from synthbroker.errors import DamagedSampleError
from synthbroker.head import LARGEST_HEAD_BYTES, Head, read_head
from synthbroker.pool import SMALLEST_BYTES, Pool
from synthbroker.schema import Array, Schema
from synthbroker.texts import Texts

INLINE_BYTES = 6 * 1024
SPEC_CHARACTERS = 200


class Encoded(NamedTuple):
    """A sample ready to be sent.

    Attributes:
        spec: Its schema as text.
        begin: How its head begins: the same for all samples of a kind and size.
        ends: How its head goes on, with what is its own.
        raw_bytes: Bytes of all tensors.
        parts: For each part that goes beside the stream the pieces it is made of; raw ones are views of the arrays.
        data: What rides in the entry.
        payload_bytes: Bytes of the payload.
        cost_bytes: Server memory that the sample takes.
    """

    spec: bytes
    begin: bytes
    ends: bytes
    raw_bytes: int
    parts: Sequence[Sequence[memoryview]]
    data: bytes
    payload_bytes: int
    cost_bytes: int

    @property
    def head(self) -> bytes:
        """The msgpack map."""
        return self.begin + self.ends

    @property
    def inline(self) -> bool:
        """Whether all of it rides in the entry."""
        return not self.parts


class Slice(NamedTuple):
    """Some of a string beside the stream: uid and number of the part, where it starts (None: all of it), how long."""

    name: str
    start: int | None
    size: int


class Entry(NamedTuple):
    """What stands in the stream for one sample; `start` is where its payload begins in a part that is shared."""

    producer: str
    seq: int
    made_s: float
    uid: str
    start: int | None
    parts: int
    head: Head
    data: bytes | memoryview

    def with_data(self, data: memoryview) -> "Entry":
        """Make one that brings its payload along."""
        return Entry(self.producer, self.seq, self.made_s, self.uid, None, 0, self.head, data)

    def slices(self, names: Sequence[str]) -> list[Slice]:
        """List the parts beside the stream that hold anything of these fields, in the order of `parts_of`."""
        if not self.parts:
            return []
        wanted = parts_of(self.head, names)
        return [Slice(f"{self.uid}:{i}", None, self.head.parts[i][0]) for i in wanted if i < self.parts]


def encode(sample: Mapping[str, Array], codecs: Mapping[str, str], along: Texts, pool: Pool | None = None) -> Encoded:
    """Pack a sample.

    Args:
        sample: C-contiguous arrays of supported dtypes.
        codecs: For each field the codec to try.
        along: From `texts.pack_texts`.
        pool: Where raw ones are copied to; without it leave them alone until the sample is sent. (Small payloads are
            always copied.)

    Raises:
        ValueError: Too many fields.
    """
    kinds, packed = [], []
    raw_bytes = 0
    for name, array in sample.items():
        used, data = codec.encode(array, codecs[name])
        kinds.append((name, array.dtype, array.shape, used))
        packed.append(data)
        raw_bytes += array.nbytes
    like = _like(tuple(kinds), tuple([data.nbytes for data in packed]))
    rider = b""
    parts: list[list[memoryview]] = []
    if like.size <= INLINE_BYTES:
        rider = b"".join(packed)
        digests = [(like.size, cutting.checksum((rider,)))] if rider else []
    else:
        lent = [kind[3] == codec.RAW for kind in kinds]
        parts, digests = _cut(like.cut, packed, lent, pool)
        if like.cut[-1] <= INLINE_BYTES:
            rider = b"".join(parts.pop())
    ends = heads.pack_parts(digests) + texts.write_texts(along)
    if len(like.begin) + len(ends) > LARGEST_HEAD_BYTES:
        raise ValueError(f"this sample's head takes more than {LARGEST_HEAD_BYTES} bytes: too many fields")
    cost = cutting.cost(like.cut[: len(parts)], len(like.begin) + len(ends) + len(like.spec) + len(rider))
    return Encoded(like.spec, like.begin, ends, raw_bytes, parts, rider, like.size, cost)


class _Like(NamedTuple):
    """What samples of one kind and one size have in common: the entry's `spec`, the head's beginning, the parts."""

    spec: bytes
    begin: bytes
    size: int
    cut: tuple[int, ...]


_Kinds = tuple[tuple[str, np.dtype[Any], schema.Shape, str], ...]


def _like(kinds: _Kinds, packed_sizes: tuple[int, ...]) -> _Like:
    """Describe samples; the next one mostly is like the last one, which takes less time to see than to look up."""
    global _latest
    latest = _latest
    if latest is None or latest[0] != kinds or latest[1] != packed_sizes:
        latest = _latest = (kinds, packed_sizes, _describe(kinds, packed_sizes))
    return latest[2]


_latest: tuple[_Kinds, tuple[int, ...], _Like] | None = None


@lru_cache(maxsize=256)
def _describe(kinds: _Kinds, packed_sizes: tuple[int, ...]) -> _Like:
    fields = [[name, schema.dtype_name(dtype), list(shape), used] for name, dtype, shape, used in kinds]
    text = str(Schema(tuple(schema.Field(name, dtype, shape) for name, dtype, shape, _ in kinds)))
    spec = text if len(text) <= SPEC_CHARACTERS else text[: SPEC_CHARACTERS - 1] + "…"
    begin = heads.pack_begin(msgpack.packb(fields), packed_sizes)
    size = sum(packed_sizes)
    return _Like(spec.encode(), begin, size, cutting.cut(size) if size > INLINE_BYTES else ())


def _cut(
    sizes: Sequence[int], packed: Sequence[memoryview], lent: Sequence[bool], pool: Pool | None
) -> tuple[list[list[memoryview]], list[tuple[int, int]]]:
    """Cut a payload into parts, with size and checksum of each."""
    if pool is not None and sum(sizes) >= SMALLEST_BYTES:
        return _taken_over(sizes, packed, lent, pool)
    parts = cutting.scatter(sizes, packed if pool is None else [memoryview(b"".join(packed))])
    return parts, [(n, cutting.checksum(part)) for n, part in zip(sizes, parts, strict=True)]


def _taken_over(
    sizes: Sequence[int], packed: Sequence[memoryview], lent: Sequence[bool], pool: Pool
) -> tuple[list[list[memoryview]], list[tuple[int, int]]]:
    """Copy what is lent into memory of our own, and take checksums on the way."""
    own = [pool.take(len(data)).data if is_lent else data for data, is_lent in zip(packed, lent, strict=True)]
    parts = cutting.scatter(sizes, own)
    digests = []
    for size, source, part in zip(sizes, cutting.scatter(sizes, packed), parts, strict=True):
        digests.append((size, cutting.copy(source, part)))
    return parts, digests


def parts_of(head: Head, names: Sequence[str]) -> list[int]:
    """List the parts that hold anything of these tensors."""
    if len(names) == len(head.tensors):
        return list(range(len(head.parts)))
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
        where, _, parts = fields[b"parts"].decode("ascii").rpartition(":")
        uid, shared, start = where.partition("@")
        head = read_head(fields[b"head"])
        entry = Entry(
            fields[b"from"].decode(),
            int(fields[b"seq"]),
            float(fields[b"t"]),
            uid,
            _read_start(start) if shared else None,
            int(parts),
            head,
            fields.get(b"data", b""),
        )
    except KeyError as error:
        raise DamagedSampleError(f"not a sample: the field {error.args[0].decode()} is missing") from error
    except ValueError as error:
        raise DamagedSampleError(f"not a sample: {error}") from error
    rides = 1 if entry.data else 0
    if entry.start is not None:
        if entry.parts != 1 or rides or not head.parts:
            raise DamagedSampleError(
                f"a part that is shared, and {entry.parts} parts and {len(entry.data)} bytes besides"
            )
        if entry.start + head.payload_bytes > cutting.LARGEST_PART_BYTES:
            raise DamagedSampleError(f"{head.payload_bytes} bytes from {entry.start} on in a part that is shared")
    elif not 0 <= entry.parts == len(head.parts) - rides or (rides and head.parts[-1][0] != len(entry.data)):
        raise DamagedSampleError(
            f"{entry.parts} parts and {len(entry.data)} bytes in the entry, where the head says "
            f"{[size for size, _ in head.parts[:9]]}"
        )
    return entry


def _read_start(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise DamagedSampleError(f"a part that is shared from byte {text!r:.40} on")
    return int(text)


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
