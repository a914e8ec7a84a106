"""The background half of a producer: samples go out in order, none is lost between two tries, none is doubled."""

import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from threading import Condition, Event, Thread
from typing import Any

from synthbroker import units
from synthbroker.errors import (
    RingFullError,
    RingMissingError,
    ServerFullError,
    SynthbrokerError,
)
from synthbroker.replies import Answer, Incarnation
from synthbroker.ring import Ring
from synthbroker.wire import Encoded

log = logging.getLogger("synthbroker")

MOST_AT_ONCE = 256
MOST_BYTES_AT_ONCE = 16 * 2**20
WARN_EVERY_S = 60.0
_MOST_REJOINS = 5
_NOBODY_HOLDS = "no group reads it yet, or other producers have reserved what is left"


@dataclass
class Outgoing:
    """One sample on its way. `encode` gives what to send, or None where the sample went to quarantine."""

    encode: Callable[[], Encoded | None]
    nbytes: int
    future: "Future[Encoded | None] | None" = None

    def ready(self) -> bool:
        """Say whether `result` will not wait for another thread."""
        return self.future is None or self.future.done()

    def result(self) -> Encoded | None:
        """Give what to send; raises what encoding raised."""
        return self.encode() if self.future is None else self.future.result()


@dataclass
class Sent:
    """Running totals of one producer."""

    samples: int = 0
    payload_bytes: int = 0
    raw_bytes: int = 0
    blocked_s: float = 0.0
    quarantined: int = 0
    rejoined: int = 0
    started: float = field(default_factory=time.monotonic)


class Sender:
    """Takes samples in order, bounded in bytes, and commits them from a thread of its own.

    Args:
        ring: An open ring.
        name: The producer's name.
        reopen: Makes the ring again where the server lost it.
        about: The producer's record.
        in_flight_bytes: `put` waits while more than this is on its way; one larger sample may always go.
        wait_s: How long to wait for room in the ring.
        reconnect_s: How long to wait for the server.
    """

    def __init__(
        self,
        ring: Ring,
        name: str,
        reopen: Callable[[], None],
        about: Callable[[], Mapping[str, Any]],
        *,
        in_flight_bytes: int,
        wait_s: float,
        reconnect_s: float,
    ) -> None:
        self.ring = ring
        self.who = Incarnation(name, secrets.token_hex(4))
        self.sent = Sent()
        self.error: BaseException | None = None
        self._reopen, self._about = reopen, about
        self._in_flight_limit, self._wait_s, self._reconnect_s = in_flight_bytes, wait_s, reconnect_s
        self._queue: deque[Outgoing] = deque()
        self._in_flight = 0
        self._changed = Condition()
        self._stop = Event()
        self._committed = 0
        self._at_once = MOST_AT_ONCE
        self._lost = False  # whether the server does not know the ring, or us, any more
        self._thread = Thread(target=self._run, name="synthbroker-sender", daemon=True)

    def start(self) -> None:
        """Register with the ring and begin."""
        self.ring.join_producer(self.who, 0, self._about())
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it still takes samples."""
        return self._thread.is_alive() and self.error is None

    def reserve(self, nbytes: int) -> None:
        """Wait until so many bytes more may be on their way, then count them in.

        Raises:
            ValueError: Stopped by another thread meanwhile, as when a signal came. Errors of the background besides.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self.error
                    or self._stop.is_set()
                    or not self._in_flight
                    or self._in_flight + nbytes <= self._in_flight_limit
                )
            )
            self.check()
            if self._stop.is_set():
                raise ValueError(f"producer {self.who.name!r} of ring {self.ring.name!r} was closed meanwhile")
            self._in_flight += nbytes

    def give_back(self, nbytes: int) -> None:
        """Count bytes out again that were reserved for a sample that does not come."""
        with self._changed:
            self._in_flight -= nbytes
            self._changed.notify_all()

    def add(self, outgoing: Outgoing) -> None:
        """Take one sample, whose bytes were reserved."""
        with self._changed:
            self._queue.append(outgoing)
            self._changed.notify_all()

    def flush(self, wait_s: float | None = None) -> bool:
        """Wait until everything is committed; False if that took longer than `wait_s`."""
        with self._changed:
            self._changed.wait_for(
                lambda: self.error or self._stop.is_set() or not (self._queue or self._in_flight), wait_s
            )
            self.check()
            return not (self._queue or self._in_flight)

    def check(self) -> None:
        """Raise what went wrong in the background, with its cause."""
        if self.error is None:
            return
        if isinstance(self.error, SynthbrokerError):
            raise type(self.error)(*self.error.args) from self.error
        raise self.error

    def stop(self) -> int:
        """Stop at once; returns how many samples were on their way and are not committed."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        return len(self._queue)

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                batch = self._encode_some()
                if batch:
                    self._deliver(batch)
        except BaseException as error:  # noqa: BLE001 - whatever it is belongs to the user's next call
            with self._changed:
                self.error = error
                self._changed.notify_all()

    def _wait_for_work(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._stop.is_set())
        return not self._stop.is_set()

    def _encode_some(self) -> list[Encoded]:
        """Take what is ready from the front of the queue, at least one; what went to quarantine leaves it."""
        batch: list[Encoded] = []
        size = 0
        while len(batch) < len(self._queue) and len(batch) < MOST_AT_ONCE and size < MOST_BYTES_AT_ONCE:
            if batch and not self._queue[len(batch)].ready():
                break
            encoded = self._queue[len(batch)].result()
            if encoded is None:
                self._settle(len(batch))
                self.sent.quarantined += 1
            else:
                batch.append(encoded)
                size += encoded.cost_bytes
        return batch

    def _settle(self, index: int) -> None:
        with self._changed:
            self._in_flight -= self._queue[index].nbytes
            del self._queue[index]
            self._changed.notify_all()

    def _deliver(self, batch: list[Encoded]) -> None:
        waiting = _Waiting(self.ring.name, self._wait_s)
        rejoins = 0
        while batch and not self._stop.is_set():
            try:
                answer = self.ring.connection.keep_trying(lambda: self._attempt(batch), self._reconnect_s, self._stop)
            except RingMissingError:
                rejoins += 1
                if rejoins > _MOST_REJOINS:
                    raise
                self._lost = True
                continue
            if self._book(batch, answer):
                waiting = _Waiting(self.ring.name, self._wait_s)
            if answer.word in ("FULL", "TOOBIG"):
                self._refuse_too_big(answer, batch[0])
                self._wait(waiting, answer)

    def _attempt(self, batch: list[Encoded]) -> Answer:
        """Ask for room, send, commit. Safe to repeat: a lease replaces a lease, sequence numbers stay what they are."""
        if self._lost:
            self._rejoin()
        try:
            for count in (min(len(batch), self._at_once), 1):
                some = batch[:count]
                answer = self._room_for(some)
                if answer.word == "OK":
                    break
            if answer.word != "OK":
                return replace(answer, last=self._committed)
            answer = self.ring.commit(self.who, [(self._committed + 1 + i, sample) for i, sample in enumerate(some)])
        except ServerFullError as error:
            self._at_once = 1
            return self._make_server_room(batch[0], error)
        self._at_once = min(2 * self._at_once, MOST_AT_ONCE)
        return answer

    def _room_for(self, some: list[Encoded]) -> Answer:
        """Ask for a lease, which samples that ride in their entries need not."""
        if all(sample.inline for sample in some):
            return Answer("OK")
        return self.ring.room(self.who, sum(sample.cost_bytes for sample in some), len(some))

    def _refuse_too_big(self, answer: Answer, sample: Encoded) -> None:
        if sample.cost_bytes > answer.capacity_bytes:
            raise RingFullError(
                f"a sample that takes {units.format_size(sample.cost_bytes)} of server memory can never fit ring "
                f"{self.ring.name!r}, whose capacity is {units.format_size(answer.capacity_bytes)}"
            )

    def _make_server_room(self, sample: Encoded, error: ServerFullError) -> Answer:
        """Let the ring give back memory that the server lacks, if its policy allows; else wait as for a full ring."""
        answer = self.ring.room(self.who, sample.cost_bytes, 1, free_bytes=sample.cost_bytes)
        return replace(answer, last=self._committed, detail=f"; {error}")

    def _book(self, batch: list[Encoded], answer: Answer) -> int:
        done = max(answer.last - self._committed, 0)
        for sample in batch[:done]:
            self.sent.samples += 1
            self.sent.payload_bytes += sample.payload_bytes
            self.sent.raw_bytes += sample.raw_bytes
            self._settle(0)
        del batch[:done]
        self._committed += done
        return done

    def _wait(self, waiting: "_Waiting", answer: Answer) -> None:
        began = time.monotonic()
        waiting.check(answer)
        self.ring.connection.keep_trying(lambda: self.ring.wait_for_room(answer.room_id), self._reconnect_s, self._stop)
        self.sent.blocked_s += time.monotonic() - began

    def _rejoin(self) -> None:
        """The server lost the ring, or forgot us: make the ring again and go on counting where we are."""
        log.warning("ring %s: the server does not know the ring or producer %s any more; joining anew (%d samples were "
                    "committed before)", self.ring.name, self.who.name, self._committed)  # fmt: skip
        self._reopen()
        self.ring.join_producer(self.who, self._committed, self._about())
        self.sent.rejoined += 1
        self._lost = False


class _Waiting:
    """How long one sample has waited for room, and when to say so."""

    def __init__(self, ring: str, wait_s: float) -> None:
        self._ring, self._wait_s = ring, wait_s
        self._since: float | None = None
        self._next_warning_s = WARN_EVERY_S

    def check(self, answer: Answer) -> None:
        """Count from the first call; warn each minute; raise RingFullError after `wait_s`."""
        now = time.monotonic()
        self._since = self._since or now
        waited_s = now - self._since
        why = f"group {answer.holder!r} holds it up" if answer.holder else _NOBODY_HOLDS
        text = (
            f"no room in ring {self._ring!r} ({answer.live} samples, {units.format_size(answer.capacity_bytes)}): "
            f"{why}{answer.detail}"
        )
        if waited_s >= self._wait_s:
            raise RingFullError(f"{text}; waited {units.format_duration(waited_s)}")
        if waited_s >= self._next_warning_s:
            self._next_warning_s += WARN_EVERY_S
            log.warning("%s; waiting since %s", text, units.format_duration(waited_s))
