"""Samples for tests, and the way back from bytes to arrays, written a second time and as plainly as possible."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from synthbroker import codec, texts, wire
from synthbroker.schema import Array
from synthbroker.wire import Encoded, Entry


def encode(sample: Mapping[str, Array], codec_name: str = "raw", recipe: Mapping[str, Any] | None = None) -> Encoded:
    """Encode a sample, every field with the same codec."""
    return wire.encode(sample, dict.fromkeys(sample, codec_name), texts.pack_texts({}, recipe))


def sample_of(nbytes: int, value: int = 0) -> Encoded:
    """Make a sample of one tensor of so many bytes. Its recipe and its first byte tell it apart, its cost does not."""
    array = np.zeros(nbytes, np.uint8)
    array[:1] = value % 256
    return encode({"x": array}, recipe={"value": f"{value:09d}"})


def entry_of(encoded: Encoded, uid: str = "0a1b", **changes: bytes | None) -> dict[bytes, bytes]:
    """Give the fields of the entry that the commit script writes; a change to None leaves a field out."""
    fields: dict[str, bytes | None] = {
        "from": b"gen-3:ab12",
        "seq": b"7",
        "t": b"1700000000.250",
        "spec": encoded.spec,
        "bytes": str(encoded.payload_bytes).encode(),
        "raw": str(encoded.raw_bytes).encode(),
        "parts": b"-:0" if encoded.inline else f"{uid}:{len(encoded.parts)}".encode(),
        "head": encoded.head,
        "data": encoded.data or None,
    }
    fields["from"] = changes.pop("from_", fields["from"])
    return {key.encode(): value for key, value in (fields | changes).items() if value is not None}


def decode(encoded: Encoded, entry: Entry) -> dict[str, Array]:
    """Turn an entry and the parts that were sent into arrays, each checked on the way."""
    parts = [b"".join(part) for part in encoded.parts] + ([entry.data] if entry.data else [])
    for i, (part, stated) in enumerate(zip(parts, entry.head.parts, strict=True)):
        wire.check_part(i, stated, [memoryview(part)])
    payload, start = b"".join(parts), 0
    arrays: dict[str, Array] = {}
    for tensor in entry.head.tensors:
        packed = memoryview(payload)[start : start + tensor.packed_bytes]
        start += tensor.packed_bytes
        raw = bytearray(packed) if tensor.codec == codec.RAW else bytearray(tensor.nbytes)
        if tensor.codec != codec.RAW:
            codec.decode(packed, tensor.codec, memoryview(raw))
        arrays[tensor.name] = np.frombuffer(raw, tensor.dtype).reshape(tensor.shape)
    return arrays
