"""Samples of which several share a part: made, put, and read again with every value looked at."""

import hashlib
from typing import Any

import numpy as np

import synthbroker as sb
from tools import key


def made(i: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Make a sample of 7 to 90 KB, and what tells that it is right."""
    bits = np.random.default_rng(i)
    x = np.repeat(bits.integers(0, 256, int(bits.integers(3_500, 45_000)), np.uint8), 2)
    y = bits.integers(0, 256, 40, np.uint8)
    return {"x": x, "y": y, "n": i}, {"x": md5(x), "y": md5(y)}


def md5(array: Any) -> str:
    return hashlib.md5(np.asarray(array).tobytes()).hexdigest()


def put_all(server: Any, ring: str, count: int, **options: Any) -> None:
    """Put samples as fast as they can be made, and end."""
    samples = [made(i) for i in range(count)]
    defaults = {"schema": "x:u8[*] y:u8[40] n:i64[]", "capacity": "8MB", "producers": 1, "codec": "raw"}
    with sb.Producer(server.url, ring=ring, **defaults | options) as out:
        for sample, metadata in samples:
            out.put(sample, metadata=metadata)


def right(batches: Any) -> list[int]:
    """Read to the end; every value must be what was put."""
    numbers = []
    for batch in batches:
        for i, metadata in enumerate(batch.info.metadata):
            assert md5(batch["x"][i]) == metadata["x"]
            if "y" in batch:
                assert md5(batch["y"][i]) == metadata["y"]
            numbers.append(batch.info.seqs[i] - 1)
            assert "n" not in batch or int(batch["n"][i]) == numbers[-1]
    return numbers


def shares(server: Any, ring: str) -> bool:
    """Say whether any live sample shares a part."""
    return any(b"@" in entry[b"parts"] for _, entry in server.client().xrange(key(ring, "samples")))
