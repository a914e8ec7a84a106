"""Coverage-guided fuzzing of what comes from outside: `python -m fuzz TARGET SECONDS` (`scripts/fuzz` runs them all).

Only errors of our own may come out, whatever the bytes. What an input does that breaks this is kept beside as
`crash-…` (or `timeout-…`, `oom-…`), and `python -m fuzz TARGET 0 FILE` runs it again.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import atheris
import numpy as np

with atheris.instrument_imports(include=["synthbroker"]):
    from synthbroker import codec, endpoint, schema, wire
    from synthbroker import head as heads
    from synthbroker.errors import DamagedSampleError, EndpointError
    from wires import encode, entry_of

LARGEST_INPUT_BYTES = 4096
LARGEST_ROOM_BYTES = 100_000
_HEADER_BYTES = 16  # of Blosc: flags, then sizes of the raw bytes, of a block, and of the packed bytes
SAMPLES = (
    {"image": np.zeros((2, 30), np.float32), "label": np.ones(3, np.uint8)},
    {"x": np.arange(5), "y": np.array(True)},
)
PACKERS = sorted(set(codec.CODECS) - {codec.RAW})
ENCODED = [encode(sample, name, {"seed": 1}) for sample in SAMPLES for name in codec.CODECS]
WANTED = schema.parse("image:f32[2,*] label:u8[...]")
FILE = Path(tempfile.mkdtemp(prefix="fuzz-")) / "broker.json"
ENDPOINTS = (
    endpoint.Endpoint("node7", 1, None, True, "me", "p w", "id", 1, "node7", None, "now", "/ca.pem"),
    endpoint.Endpoint(None, None, "/run/s", False, "me", "", "id", 1, "node7", "9", "now"),
)


def head(data: bytes) -> None:
    """A head, read for the first time and as one of a kind that is known."""
    for _ in range(2):
        with suppress(DamagedSampleError):
            heads.read_head(data)


def entry(data: bytes) -> None:
    """An entry of the stream, some of whose fields are made up; then its payload, as its own head describes it."""
    made_up = atheris.FuzzedDataProvider(data)
    fields = entry_of(ENCODED[made_up.ConsumeIntInRange(0, len(ENCODED) - 1)])
    names = sorted(fields)
    for _ in range(made_up.ConsumeIntInRange(1, 3)):
        name = names[made_up.ConsumeIntInRange(0, len(names) - 1)]
        fields[name] = made_up.ConsumeBytes(made_up.ConsumeIntInRange(0, 300))
    with suppress(DamagedSampleError):
        read = wire.read_entry(fields)
        for i, part in enumerate(read.head.parts):
            wire.check_part(i, part, [memoryview(made_up.ConsumeBytes(50))])
        wire.check_schema(read.head, WANTED, 10**6)
        read.slices([tensor.name for tensor in read.head.tensors])


def payload(data: bytes) -> None:
    """Packed bytes of a tensor, whose sizes and checksums whoever lies has seen to."""
    if len(data) < _HEADER_BYTES + 1:
        return
    packed = bytearray(data[1:])
    room = bytearray(int.from_bytes(packed[4:8], "little") % LARGEST_ROOM_BYTES)
    packed[4:8], packed[12:16] = len(room).to_bytes(4, "little"), len(packed).to_bytes(4, "little")
    with suppress(DamagedSampleError):
        codec.decode(memoryview(packed), PACKERS[data[0] % len(PACKERS)], memoryview(room))


def file(data: bytes) -> None:
    """An endpoint file; what it names is a URL that is taken again."""
    FILE.write_bytes(data)
    try:
        url = endpoint.read(FILE).url()
    except EndpointError:
        return
    assert endpoint.resolve(url) == url


def url(data: bytes) -> None:
    """A URL that a user gives: what is wrong with it is a ValueError, or an endpoint file that is not there."""
    text = atheris.FuzzedDataProvider(data).ConsumeUnicodeNoSurrogates(LARGEST_INPUT_BYTES)
    endpoint.redact(text)
    with suppress(ValueError, EndpointError):
        endpoint.resolve(text)


def _packed() -> Iterable[bytes]:
    for size in (100, 3000, 90_000):
        for i, name in enumerate(PACKERS):
            yield bytes([i]) + bytes(codec.encode(np.arange(size, dtype=np.uint8) % 50, name)[1])


def _files() -> Iterable[bytes]:
    for one in ENDPOINTS:
        endpoint.write(FILE, one)
        yield FILE.read_bytes()
        yield json.dumps(json.loads(FILE.read_text()) | {"port": -1}).encode()


# For each target what it is fed with to begin with.
TARGETS: dict[str, tuple[Callable[[bytes], None], Callable[[], Iterable[bytes]]]] = {
    "head": (head, lambda: [one.head for one in ENCODED]),
    "entry": (entry, lambda: [bytes([i, 2, 3]) * 9 + one.head for i, one in enumerate(ENCODED)]),
    "payload": (payload, _packed),
    "file": (file, _files),
    "url": (url, lambda: [one.url().encode() for one in ENDPOINTS] + [b"file:///a%20b", b"unix:///s?password=x@y"]),
}


def main(target: str, seconds: int, *inputs: str) -> None:
    """Fuzz one target for so long; does not return."""
    run, seeds = TARGETS[target]
    corpus = Path(tempfile.mkdtemp(prefix=f"fuzz-{target}-"))
    for i, seed in enumerate(seeds()):
        (corpus / f"seed-{i}").write_bytes(seed)
    limits = [f"-max_total_time={seconds}", f"-max_len={LARGEST_INPUT_BYTES}", "-rss_limit_mb=2000", "-timeout=20"]
    atheris.Setup([sys.argv[0], *limits, "-print_final_stats=1", *(inputs or [str(corpus)])], run)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
