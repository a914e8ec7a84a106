"""The background half of a producer: samples go out in order, none is lost between two tries, none is doubled."""

import itertools
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from threading import Condition, Event, Lock, Thread
from typing import Any

from synthbroker import losses, sharing, units
from synthbroker import ring as rings
from synthbroker.account import ProducerStats
from synthbroker.errors import (
    RingFullError,
    RingMissingError,
    ServerFullError,
    ServerRefusedError,
    SynthbrokerError,
)
from synthbroker.pace import Pace
from synthbroker.packing import Outgoing
from synthbroker.quality import Quality
from synthbroker.replies import Answer, Incarnation, Meta
from synthbroker.ring import Ring
from synthbroker.room import NO_LEASE, Lease, why_none
from synthbroker.sharing import Shared
from synthbroker.waiting import Waiting
from synthbroker.wire import Encoded

log = logging.getLogger("synthbroker")

MOST_AT_ONCE = 256
MOST_BYTES_AT_ONCE = 16 * 2**20
ENCODE_AHEAD_BYTES = 64 * 2**20  # no further, so that a codec that is chosen anew soon takes effect
_MOST_REJOINS = 5
_RING_SHARE = 16  # at most this part of a ring is kept for what comes next


class Sender:
    """Takes samples in order, bounded in bytes, and commits them from a thread of its own.

    Args:
        ring: An open ring.
        name: The producer's name.
        reopen: Opens the ring; makes it again where the server lost it.
        about: The producer's record.
        told: Hears of each delivery: bytes of parts, and seconds that it took.
        limits: Gives the ring's capacity in bytes and in samples.
        quality: Hears of each sample whether it was fit for the ring.
        in_flight_bytes: `put` waits while more than this is on its way; one larger sample may always go.
        wait_s: How long to wait for room in the ring.
        reconnect_s: How long to wait for the server.
    """

    def __init__(
        self,
        ring: Ring,
        name: str,
        reopen: Callable[[], Meta],
        about: Callable[[], Mapping[str, Any]],
        told: Callable[[int, float], None],
        limits: Callable[[], tuple[int, int]],
        quality: Quality,
        *,
        in_flight_bytes: int,
        wait_s: float,
        reconnect_s: float,
    ) -> None:
        self.ring = ring
        self.who = Incarnation(name, secrets.token_hex(4))
        self.stats = ProducerStats()
        self.pace = Pace()
        self.error: BaseException | None = None
        self._reopen, self._about, self._told, self._limits = reopen, about, told, limits
        self._quality = quality
        self._in_flight_limit, self._wait_s, self._reconnect_s = in_flight_bytes, wait_s, reconnect_s
        self._queue: deque[Outgoing] = deque()
        self._later: deque[Outgoing] = deque()  # those in it whose encoding has not begun
        self._begun_bytes = 0
        self._in_flight = 0
        self._lock = Lock()  # the bare one is entered in a tenth of the time
        self._changed = Condition(self._lock)
        self._stop = Event()
        self._committed = 0
        self._at_once = 1  # doubled with each commit: the first ones are soon over, and say how fast the link is
        self._lost = False  # whether the server does not know the ring, or us, any more
        self._proven = False  # whether it does not know what it committed, under the epoch that we know
        self._missing = 0  # what it does not know, until that is counted
        self._lease = NO_LEASE
        self._live = losses.Committed()
        losses.watch(ring)
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
        with self._lock:
            if self._in_flight and (
                self._in_flight + nbytes > self._in_flight_limit or len(self._queue) >= 2 * MOST_AT_ONCE
            ):
                self._changed.wait_for(lambda: self.error or self._stop.is_set() or self._has_space(nbytes))
            self.check()
            if self._stop.is_set():
                raise ValueError(f"producer {self.who.name!r} of ring {self.ring.name!r} was closed meanwhile")
            self._in_flight += nbytes

    def _has_space(self, nbytes: int) -> bool:
        """Say whether more may be on its way: of many small ones half must be gone, so that they go many at a time."""
        return not self._in_flight or (
            self._in_flight + nbytes <= self._in_flight_limit and len(self._queue) <= MOST_AT_ONCE
        )

    def give_back(self, nbytes: int) -> None:
        """Count bytes out again that were reserved for a sample that does not come."""
        with self._changed:
            self._in_flight -= nbytes
            self._changed.notify_all()

    def add(self, outgoing: Outgoing) -> None:
        """Take one sample, whose bytes were reserved."""
        outgoing.added_s = time.monotonic()
        with self._lock:
            self._queue.append(outgoing)
            if outgoing.is_later:
                self._later.append(outgoing)
                self._start_some()
            if len(self._queue) == 1:
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
            self.pace.moved()

    def _wait_for_work(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._stop.is_set())
        return not self._stop.is_set()

    def _encode_some(self) -> list[Encoded]:
        """Take what is ready from the front of the queue, at least one; what went to quarantine leaves it."""
        batch: list[Encoded] = []
        size = 0
        for outgoing in list(itertools.islice(self._queue, MOST_AT_ONCE)):
            if size >= MOST_BYTES_AT_ONCE or (batch and not outgoing.ready()):
                break
            encoded = outgoing.result()
            if encoded is None:
                if batch:
                    break
                self._quality.add(good=False)
                self._settle(1)
                self._count(quarantined=1)
            else:
                self._quality.add(good=True)
                batch.append(encoded)
                size += encoded.cost_bytes
        return batch

    def _settle(self, count: int) -> None:
        """Take samples off the front of the queue."""
        if count:
            self.pace.on_way.add(time.monotonic() - self._queue[0].added_s)
            self.pace.moved()
        with self._changed:
            gone = [self._queue.popleft() for _ in range(count)]
            self._in_flight -= sum([outgoing.nbytes for outgoing in gone])
            self._begun_bytes -= sum([outgoing.nbytes for outgoing in gone if outgoing.is_later])
            gone.clear()  # its memory is free before `put` takes some for what comes next
            self._start_some()
            self._changed.notify_all()

    def _start_some(self) -> None:
        """Have the samples next in line encoded, those on their way included at least one and `ENCODE_AHEAD_BYTES`."""
        while self._later and self._begun_bytes < ENCODE_AHEAD_BYTES:
            outgoing = self._later.popleft()
            outgoing.start()
            self._begun_bytes += outgoing.nbytes

    def _deliver(self, batch: list[Encoded]) -> None:
        waiting: Waiting | None = None
        rejoins = 0
        while batch and not self._stop.is_set():
            began = time.monotonic()
            try:
                answer = self.ring.connection.keep_trying(lambda: self._attempt(batch), self._reconnect_s, self._stop)
            except RingMissingError:
                rejoins += 1
                if rejoins > _MOST_REJOINS:
                    raise
                self._lost = True
                continue
            self.pace.sending_s += time.monotonic() - began
            if self._book(batch, answer):
                waiting = None
            if answer.word != "GAP":
                rejoins = 0
            else:
                self._lost = self._proven = True
                rejoins += 1
                if rejoins > _MOST_REJOINS:
                    raise ServerRefusedError(
                        f"{self.ring.connection.where} keeps forgetting samples of {self.who.name!r}"
                    )
            if answer.word in ("FULL", "TOOBIG"):
                self._refuse_too_big(answer, batch[0])
                waiting = waiting or Waiting(self._wait_s, f"no room in ring {self.ring.name!r}")
                self._wait(waiting, answer)

    def _attempt(self, batch: list[Encoded]) -> Answer:
        """Ask for room, send, commit. Safe to repeat: a lease replaces a lease, sequence numbers stay what they are."""
        if self._lost:
            self._rejoin()
        try:
            some = self._placed(batch[: self._at_once])
            answer = self._room_for(some)
            if answer.word != "OK":
                return replace(answer, last=self._committed)
            if answer.granted < len(some):
                some = self._placed(batch[: answer.granted])
            began = time.monotonic()
            ahead, self._lease = self._ahead(some), NO_LEASE
            numbered = [(self._committed + 1 + i, one) for i, one in enumerate(some)]
            answer = self.ring.commit(
                self.who, numbered, (ahead.cost_bytes, ahead.samples), generation_s=self.pace.generation_s
            )
            now = time.monotonic()
            if answer.granted:
                self._lease = replace(ahead, until_s=now + rings.LEASE_S / 2)
            beside = [one.sample.payload_bytes for one in some if one.part is not None or one.sample.parts]
            self._told(sum(beside), now - began)
        except ServerFullError as error:
            self._at_once = 1
            return self._make_server_room(batch[0], error)
        self._at_once = min(2 * self._at_once, MOST_AT_ONCE)
        return answer

    def _placed(self, batch: Sequence[Encoded]) -> list[Shared]:
        return sharing.share(batch, *self._limits())

    def _room_for(self, some: Sequence[Shared]) -> Answer:
        """Ask for a lease, which samples that ride in their entries need not."""
        if all(one.part is None and one.sample.inline for one in some):
            return Answer("OK", granted=len(some))
        costs = [one.cost_bytes for one in some]
        covered = self._lease.covers(costs)
        if 2 * covered >= len(costs):
            return Answer("OK", granted=covered)
        return self.ring.room(self.who, sum(costs), len(some), costs=costs)

    def _ahead(self, some: Sequence[Shared]) -> Lease:
        """Say what room to ask for with a commit: for as much again, if it seems to come, but for little of a ring."""
        capacity_bytes, max_samples = self._limits()
        largest = max(one.cost_bytes for one in some)
        count = min(2 * self._at_once, MOST_AT_ONCE, min(MOST_BYTES_AT_ONCE, capacity_bytes // _RING_SHARE) // largest)
        count = min(count, max_samples // _RING_SHARE) if max_samples else count
        more_comes = len(self._queue) > len(some) or len(some) == MOST_AT_ONCE
        return Lease(count * largest, count) if more_comes else NO_LEASE

    def _refuse_too_big(self, answer: Answer, sample: Encoded) -> None:
        if sample.cost_bytes > answer.capacity_bytes:
            raise RingFullError(
                f"a sample that takes {units.format_size(sample.cost_bytes)} of server memory can never fit ring "
                f"{self.ring.name!r}, whose capacity is {units.format_size(answer.capacity_bytes)}: "
                f"make the ring anew with more, after `synthbroker drop {self.ring.name}`"
            )

    def _make_server_room(self, sample: Encoded, error: ServerFullError) -> Answer:
        """Let the ring give back memory that the server lacks, if its policy allows; else wait as for a full ring."""
        answer = self.ring.room(self.who, sample.cost_bytes, 1, free_bytes=sample.cost_bytes)
        return replace(answer, last=self._committed, detail=str(error))

    def _book(self, batch: list[Encoded], answer: Answer) -> int:
        done = max(answer.last - self._committed, 0)
        self._count(
            samples=done,
            payload_bytes=sum([sample.payload_bytes for sample in batch[:done]]),
            raw_bytes=sum([sample.raw_bytes for sample in batch[:done]]),
        )
        del batch[:done]
        self._committed += done
        if done:
            self._live.add(answer.newest, done)
        self._settle(done)
        return done

    def _count(self, **more: Any) -> None:
        """Add to the totals, which only this thread changes."""
        self.stats = replace(self.stats, **{name: getattr(self.stats, name) + n for name, n in more.items()})

    def _wait(self, waiting: Waiting, answer: Answer) -> None:
        began = time.monotonic()
        self.pace.blocked()
        waiting.check(partial(why_none, answer), RingFullError)
        self.ring.connection.keep_trying(lambda: self.ring.wait_for_room(answer.room_id), self._reconnect_s, self._stop)
        self._count(blocked_s=time.monotonic() - began)

    def beat(self) -> None:
        """Say that we live, and learn what all groups are done with."""
        if self.ring.beat("producer", self.who.name, self._about(), self.who.word):
            self._live.forget_below(losses.floor(self.ring))

    def say_goodbye(self, *, closed: bool) -> None:
        """Leave; that we are done is said also to a server that is away just now, or has lost the ring."""

        def attempt() -> None:
            if self._lost:
                self._rejoin()
            try:
                self.ring.leave_producer(self.who, self._about(), closed=closed)
            except RingMissingError:
                if self._lost or not closed:
                    raise
                self._lost = True
                attempt()

        if closed:
            self.ring.connection.keep_trying(attempt, self._reconnect_s, Event())
        else:
            attempt()

    def _rejoin(self) -> None:
        """The server lost the ring, forgot us, or is another one: learn what it has, and go on counting."""
        former = self.ring.epoch
        if self._proven:
            losses.arrive(self.ring, proven=True)
        meta = self._reopen()
        again = meta.bound(former)
        if again and former != meta.epoch:  # else it only folded us away
            self._missing = self._missing or max(self._committed - losses.taken_from(self.ring, self.who), 0)
        self.ring.join_producer(self.who, self._committed, self._about())
        if again:
            lost, self._missing = self._missing, 0
            log.warning("ring %s: the server is another one than before, or came back; of %d samples that producer %s "
                        "had committed it lost %d", self.ring.name, self._committed, self.who.name, lost)  # fmt: skip
        else:
            lost = self._live.clear()
            log.warning("ring %s: the server does not know the ring any more; making it anew (%d samples were committed"
                        " before; %d of them, which some group had not used by the last heartbeat, are lost)",
                        self.ring.name, self._committed, lost)  # fmt: skip
        self._count(rejoined=1, lost_by_server=lost)
        self._lost = self._proven = False
