"""Which codec each field of a ring's samples gets where the user left it to us: `codec="auto"`.

Encoding, sending and decoding are stages of one pipeline: its pace is that of the slowest. For one byte of a field,

    seconds = max(link · ratio, encode / encoders, decode + move · ratio, (encode + decode + 4 · move · ratio) / cores)

where link is what a byte takes on its way to the server, as the producer's own sends show it, ratio is packed ÷
unpacked, and move is the part of link that is processor time: all of it, up to half a nanosecond. The reader receives
and decodes one after the other. The last term holds where generator, server and reader share one machine, and is the
safe guess where they do not: a byte is sent and received twice. `raw` takes link seconds and nothing else, which is
less than the truth: a codec must beat the link alone. Fields are judged one by one; as the sum of slowest stages is
never less than the slowest sum of stages, what is better for each is not worse for all.

Rules:

- Everything goes raw, and nothing is probed, before the link is known; while it passes 400 MB/s, or lately passed a
  send at 250 MB/s, as sockets within one machine do even while that is busy and the server's memory is fresh; and while
  sending takes less than half of the time: then the generator, or a full ring, is what all wait for, and nothing is
  gained by taking processors away from it.
- A codec comes in if it saves an eighth of raw's seconds. It goes out when it takes more than 0.98 of them, or when the
  link passes 500 MB/s; one codec follows another at 0.9 of its seconds.
- A field is probed on a sample, then after 2 more, 4, 8, … up to 65,536; the median of the latest 5 counts. It is
  judged when it was probed, and, at most once in 16 samples, when the link's speed is another by half since.
- A probe packs and unpacks at most 1 MiB of a sample with each codec, in slices from its whole length: some
  milliseconds. Times are by the clock, not of the processor: on a busy machine the link is slow for the same reason as
  the codecs, and is no reason to pack.
- Tensors of less than 16 KiB go raw: what they cost is not their bytes.
"""

import dataclasses
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from synthbroker import codec as codecs
from synthbroker.codec import RAW, Array

SMALLEST_BYTES = 16 * 1024
PROBE_BYTES = 2**20
_SLICES = 8
_LATEST_PROBES = 5
_FIRST_INTERVAL = 2
_LONGEST_INTERVAL = 65536
_LINK_GAP = 16
_LINK_CHANGE = 1.5

_MOST_MOVE_S = 0.5e-9  # sockets within one machine pass 2 GB/s
_MOVES = 4
_COMES_IN, _GOES_OUT, _FOLLOWS = 0.875, 0.98, 0.9
_COMES_IN_S, _GOES_OUT_S = 2.5e-9, 2e-9  # links that are faster than that
_QUICKEST_S = 4e-9
_BUSY = 0.5

_LEAST_SEND_BYTES = 512 * 1024
_LEAST_SENDS = 3
_KNOWN_BYTES = 48 * 2**20
_WINDOW_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Work:
    """What one codec makes of a field.

    Attributes:
        ratio: Packed ÷ unpacked bytes.
        encode_s, decode_s: Seconds for one unpacked byte, on one thread.
    """

    ratio: float
    encode_s: float
    decode_s: float


Probe = Callable[[Array], Mapping[str, Work]]


@dataclass(frozen=True)
class Machine:
    """What encoding may count on: so many encoders, so many cores for all stages together."""

    encoders: int
    cores: int


def seconds_per_byte(work: Work, link_s: float, machine: Machine) -> float:
    """Say what a byte takes in the slowest stage, see above.

    Args:
        work: Of a codec other than raw.
        link_s: Seconds for one byte on its way to the server.
        machine: Who shares the work.
    """
    move_s = min(link_s, _MOST_MOVE_S) * work.ratio
    return max(
        link_s * work.ratio,
        work.encode_s / min(machine.encoders, machine.cores),
        work.decode_s + move_s,
        (work.encode_s + work.decode_s + _MOVES * move_s) / machine.cores,
    )


def choose(now: str, works: Mapping[str, Work], link_s: float, machine: Machine) -> str:
    """Choose a codec, given the one that is used now."""
    if link_s < (_COMES_IN_S if now == RAW else _GOES_OUT_S):
        return RAW
    took = {name: seconds_per_byte(work, link_s, machine) for name, work in works.items()}
    best = min(took, key=lambda name: took[name])
    if now == RAW or took[now] > _GOES_OUT * link_s:
        return best if took[best] <= _COMES_IN * link_s else RAW
    return best if took[best] <= _FOLLOWS * took[now] else now


def probe(array: Array) -> dict[str, Work]:
    """Try every codec on at most `PROBE_BYTES` of an array."""
    piece = _piece(array)
    return {name: _try(piece, name) for name in codecs.CODECS if name != RAW}


def _piece(array: Array) -> Array:
    flat = array.reshape(-1)
    if flat.nbytes <= PROBE_BYTES:
        return flat
    length = max(PROBE_BYTES // _SLICES // flat.itemsize, 1)
    last = flat.size - length
    starts = [last * i // (_SLICES - 1) for i in range(_SLICES)]
    return np.concatenate([flat[start : start + length] for start in starts])


def _try(piece: Array, name: str) -> Work:
    began = time.perf_counter()
    used, packed = codecs.encode(piece, name)
    encoded = time.perf_counter()
    if used != RAW:
        codecs.decode(packed, used, codecs.as_bytes(np.empty_like(piece)))
    decoded = time.perf_counter()
    return Work(packed.nbytes / piece.nbytes, (encoded - began) / piece.nbytes, (decoded - encoded) / piece.nbytes)


class Link:
    """The speed of the way to the server, over the latest 64 MiB, as far as single sends can show it.

    A send of less than 512 KiB says more about round trips than about bytes and is left out; below 48 MiB and
    three sends in all nothing is known: what buffers and shapers let through at once is not the link's pace.
    """

    def __init__(self) -> None:
        # Bytes, nanoseconds that they took, and when they were through: whole numbers, whose sums stay exact.
        self._sends: deque[tuple[int, int, int]] = deque()
        self._nbytes, self._ns = 0, 0

    def add(self, nbytes: int, seconds: float) -> None:
        """Count one send."""
        ns = round(seconds * 1e9)
        if nbytes < _LEAST_SEND_BYTES or ns <= 0:
            return
        self._sends.append((nbytes, ns, time.monotonic_ns()))
        self._nbytes, self._ns = self._nbytes + nbytes, self._ns + ns
        while self._nbytes - self._sends[0][0] >= _WINDOW_BYTES and len(self._sends) > _LEAST_SENDS:
            old_bytes, old_ns, _ = self._sends.popleft()
            self._nbytes, self._ns = self._nbytes - old_bytes, self._ns - old_ns

    @property
    def known(self) -> bool:
        """Whether enough was sent to say."""
        return self._nbytes >= _KNOWN_BYTES and len(self._sends) >= _LEAST_SENDS

    @property
    def s_per_byte(self) -> float:
        """Seconds for one byte, where it is known."""
        return 1e-9 * self._ns / self._nbytes

    @property
    def busy(self) -> float:
        """Share of the time that went into sending."""
        _, first_ns, first_at = self._sends[0]
        return self._ns / (first_ns + self._sends[-1][2] - first_at)

    @property
    def holds_up(self) -> bool:
        """Whether it is the link that all wait for, as far as anybody can tell: it is slow, always, and busy."""
        quickest_s = min(1e-9 * ns / nbytes for nbytes, ns, _ in self._sends)
        return self.busy >= _BUSY and self.s_per_byte >= _COMES_IN_S and quickest_s >= _QUICKEST_S

    def __str__(self) -> str:
        return f"{1e-6 / self.s_per_byte:.0f} MB/s" if self.known else "not known yet"


@dataclass
class _Field:
    """What is known of one field, and when it is probed and judged next."""

    codec: str = RAW
    latest: "deque[Mapping[str, Work]]" = field(default_factory=lambda: deque(maxlen=_LATEST_PROBES))
    samples: int = 0
    probes: int = 0
    judged_at: int = 0  # which sample it was
    due_at: int = 1
    interval: int = _FIRST_INTERVAL
    link_s: float = 1.0  # what the link was then

    def is_due(self, link: Link) -> bool:
        """Say whether this sample is to be probed."""
        if self.samples < self.due_at or not link.known:
            return False
        return self.codec != RAW or link.holds_up

    def claim(self) -> None:
        """Plan the next probe, so that another thread does not probe for the same reason."""
        self.probes += 1
        self.due_at = self.samples + self.interval
        self.interval = min(2 * self.interval, _LONGEST_INTERVAL)

    def link_changed(self, link: Link) -> bool:
        """Say whether the choice was made for another link."""
        if not self.latest or self.samples < self.judged_at + _LINK_GAP or (self.codec == RAW and not link.holds_up):
            return False
        change = link.s_per_byte / self.link_s
        return max(change, 1 / change) >= _LINK_CHANGE

    def judge(self, link: Link, machine: Machine) -> None:
        """Choose."""
        self.judged_at, self.link_s = self.samples, link.s_per_byte
        self.codec = choose(self.codec, self.works(), self.link_s, machine)

    def works(self) -> dict[str, Work]:
        """Give the median of the latest probes."""
        return {name: _median([found[name] for found in self.latest]) for name in self.latest[0]}

    def words(self) -> str:
        """Say what was chosen."""
        return RAW if self.codec == RAW else f"{self.codec} {self.works()[self.codec].ratio:.2f}"


def _median(works: Sequence[Work]) -> Work:
    ratio, encode_s, decode_s = (
        statistics.median(column) for column in zip(*(dataclasses.astuple(work) for work in works), strict=True)
    )
    return Work(ratio, encode_s, decode_s)


class Chooser:
    """Says for each tensor of a producer how it is packed; encoders and sender may call it at the same time.

    Args:
        codec: What the user said: one codec or "auto" for all, or some fields' (the others go raw).
        encoders: Threads that encode.
        cores: Processors of this machine that may be used; None: ask the system.
        probe: What tries the codecs on an array.

    Raises:
        ValueError: No such codec.
    """

    def __init__(
        self, codec: str | Mapping[str, str], *, encoders: int, cores: int | None = None, probe: Probe = probe
    ) -> None:
        by_field = codec if isinstance(codec, Mapping) else {}
        self._by_field = {name: codecs.check(one) for name, one in by_field.items()}
        self._other = RAW if isinstance(codec, Mapping) else codecs.check(codec)
        self._machine = Machine(encoders, cores or usable_cores())
        self._probe = probe
        self._link = Link()
        self._fields: dict[str, _Field] = {}
        self._lock = threading.Lock()

    def is_plain(self, sample: Mapping[str, Array]) -> bool:
        """Say whether all tensors of a sample go raw and nothing is to be found out: the link is fast enough."""
        fast = None
        for name, array in sample.items():
            wanted = self._by_field.get(name, self._other)
            if wanted == RAW or (wanted == codecs.AUTO and array.nbytes < SMALLEST_BYTES):
                continue
            fast = self._is_fast() if fast is None else fast
            if wanted != codecs.AUTO or not fast:
                return False
        return True

    def _is_fast(self) -> bool:
        with self._lock:
            raw = all(state.codec == RAW for state in self._fields.values())
            return raw and self._link.known and self._link.s_per_byte < _GOES_OUT_S

    def check_names(self, fields: Collection[str]) -> None:
        """Check that the fields that the user named are there.

        Raises:
            ValueError: One is not.
        """
        missing = [name for name in self._by_field if name not in fields]
        if missing:
            raise ValueError(f"codec names {', '.join(missing)}, but the sample has only {', '.join(fields)}")

    def codecs_for(self, sample: Mapping[str, Array]) -> dict[str, str]:
        """Say which codec each tensor of a sample gets; contiguous arrays."""
        wanted = {name: self._by_field.get(name, self._other) for name in sample}
        return {
            name: self.codec_for(name, array) if wanted[name] == codecs.AUTO else wanted[name]
            for name, array in sample.items()
        }

    def codec_for(self, name: str, array: Array) -> str:
        """Choose for one tensor, and try the codecs on it if it is time."""
        if not SMALLEST_BYTES <= array.nbytes <= codecs.LARGEST_PACKED_BYTES:
            return RAW
        with self._lock:
            state = self._fields.setdefault(name, _Field())
            state.samples += 1
            if not state.is_due(self._link):
                if state.link_changed(self._link):
                    state.judge(self._link, self._machine)
                return state.codec
            state.claim()
        found = self._probe(array)
        with self._lock:
            state.latest.append(found)
            state.judge(self._link, self._machine)
            return state.codec

    def sent(self, nbytes: int, seconds: float) -> None:
        """Hear of one delivery.

        Args:
            nbytes: Bytes of payload parts that went out; not of what rides in entries.
            seconds: From the first of them handed to the socket to the server's answer to the last; without any wait
                for room, for a connection or for an encoder. With several under way, the time in which these came
                through, so that the seconds of all deliveries never add up to more than has passed.
        """
        with self._lock:
            self._link.add(nbytes, seconds)

    def described(self) -> dict[str, str]:
        """Say what was chosen, with packed ÷ unpacked: {"image": "zstd 0.74", "seed": "raw"}."""
        with self._lock:
            return {name: state.words() for name, state in self._fields.items()}

    def probes(self) -> dict[str, int]:
        """Count the probes of each field."""
        with self._lock:
            return {name: state.probes for name, state in self._fields.items()}


def usable_cores() -> int:
    """Count the processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
