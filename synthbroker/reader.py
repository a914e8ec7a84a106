"""Makes batches ahead of the training loop, in a thread of its own."""

import contextlib
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from threading import Condition, Event, Thread
from typing import Any, TypeVar

from synthbroker import ring as rings
from synthbroker.assemble import Assembly, Finish, Plan
from synthbroker.batch import BatchInfo
from synthbroker.connection import Connection
from synthbroker.errors import DamagedSampleError, RingMissingError, SynthbrokerError
from synthbroker.head import recipe_in
from synthbroker.live import LiveSource
from synthbroker.options import ReadOptions
from synthbroker.payload import MissingPartError, fetch_shared
from synthbroker.pool import Pool
from synthbroker.reading import InHand, Read, read
from synthbroker.replies import Given
from synthbroker.ring import Ring
from synthbroker.rounds import RoundSource
from synthbroker.seats import Counts, Found, Seat, Source
from synthbroker.source import GroupSource
from synthbroker.telling import Teller

log = logging.getLogger("synthbroker")

T = TypeVar("T")

MOST_PREFETCHED_BYTES = 10**9
_OUTSIDE = 2  # batches in the hands of the training loop, while it takes the next one before it lets go of the last
_LAST_WORD_S = 5.0
_GLANCE_S = 0.2
_BYTES_AT_ONCE = 64 << 20
_MOST_AT_ONCE = 128  # objects of more live long enough to keep the garbage collector busy
_SMALL_BYTES = 1 << 18  # so much is made ready of what is in hand anyway
_LONGEST_NAME = 100  # of what somebody else may have written
_LONGEST_REASON = 300


@dataclass(frozen=True)
class Ready:
    """A batch that waits for the training loop."""

    batch: Any
    info: BatchInfo
    nbytes: int


class Reader:
    """Takes, receives and unpacks; at most `prefetch` batches or 1 GB lie ready.

    Args:
        options: How the ring is read.
        finish: What arrays become.
        seat: Which of several readers this is.
        drained: What to do where there is nothing left but what other readers hold.
    """

    def __init__(
        self, options: ReadOptions, finish: Finish, seat: Seat, drained: Callable[[], None] = lambda: None
    ) -> None:
        self.options, self.pid, self.counts = options, os.getpid(), Counts()
        self.leaves = seat.acknowledges
        self._measures = seat.starved is None  # whether whoever calls `next` is the training loop
        self.counts.starved = seat.starved or self.counts.starved
        self.sizes = options.sizes(seat.worker, seat.workers, seat.place.ranks if seat.place else 1)
        self._finish = finish
        self._stop = Event()
        self._ring = Ring(Connection(options.url), options.ring)
        self.source: Source = (
            LiveSource(self._ring, options, seat, self._stop)
            if options.group is None
            else (RoundSource if seat.place else GroupSource)(
                self._ring, options, seat, self.counts, self._stop, self._is_idle, drained
            )
        )
        self._ready: deque[Ready] = deque()
        self._ready_bytes = 0
        self._waiting = False
        self._ended = False
        self._error: BaseException | None = None
        self._changed = Condition()
        self._sample_bytes = _BYTES_AT_ONCE  # of the last one; the first may be large
        self._in_hand: deque[InHand] = deque()
        self._inflow = self._ring.inflow(between=self._look_ahead)  # of those
        self._shared = self._ring.inflow(connections=1)  # of parts that several of them share
        self._next: Read | None = None  # here before it is wanted
        self._plan: Plan | None = None
        self._pool = finish.memory or Pool(MOST_PREFETCHED_BYTES)
        self._reserved = seat.workers > 1  # a worker's batches leave it at once
        self._thread = Thread(target=self._run, name="synthbroker-reader", daemon=True)
        self._teller = Teller(self.source.acknowledge, self._is_much, self._end)

    def start(self) -> None:
        """Begin to read, if it has not begun."""
        if not self._thread.ident:
            self._thread.start()
            self._teller.start()

    def next(self, left: Callable[[], bool] | None = None) -> Ready | None:
        """Give the next batch; None at the end of the ring.

        Args:
            left: Says whether nobody waits for it any more; asked now and then, and then the answer is None, too.

        Raises:
            SynthbrokerError: What went wrong; likewise whatever a user's `transform` or `collate` raised, with its
                own traceback. Batches made before come first.
        """
        if self._measures:
            self.counts.starved.start()
        while not self._await_batch(None if left is None else _GLANCE_S):
            if left is not None and left():
                break
        if self._measures:
            self.counts.starved.stop()
        with self._changed:
            self._waiting = False
            if self._ready:
                ready = self._ready.popleft()
                self._ready_bytes -= ready.nbytes
                self._changed.notify_all()
                return ready
        if self._error is not None:
            raise self._error
        return None

    def _await_batch(self, glance_s: float | None) -> bool:
        """Wait until there is a batch, or none comes."""
        with self._changed:
            self._waiting = True
            self._changed.notify_all()
            return bool(self._changed.wait_for(lambda: self._ready or self._ended, glance_s))

    def acknowledge(self, epoch: str, numbers: Sequence[int]) -> None:
        """Say that samples are done with, soon: many batches are told of together."""
        self._teller.add(epoch, numbers, len(numbers) * self._sample_bytes)

    def _is_much(self, nbytes: int) -> bool:
        """Say whether being done with so many bytes wakes producers that wait for room."""
        return nbytes * rings.FEWEST_SHARE >= self.source.meta.capacity_bytes

    def flush(self) -> None:
        """Tell the ring what is done with, now."""
        self._teller.flush()

    def close(self) -> None:
        """Stop, and leave the group if `leaves` says so; not before, for what lies ready is not acknowledged yet."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        self._teller.stop(_LAST_WORD_S)  # first: what it is telling goes through
        if self._thread.is_alive():
            self._ring.connection.close()  # wakes the thread where it waits for the server
            self._thread.join(_LAST_WORD_S)
        with contextlib.suppress(SynthbrokerError):
            self.flush()
        self.source.close(leave=self.leaves)
        self._ring.connection.close()

    def _is_idle(self) -> bool:
        with self._changed:
            return self._waiting and not self._ready

    def _run(self) -> None:
        try:
            self.source.start()
            for size in cycle(self.sizes or [self.options.batch_size]):
                if not self._wait_for_demand() or not self._make(size):
                    break
        except BaseException as error:  # noqa: BLE001 - whatever it is belongs to the training loop
            self._end(error)
        else:
            self._end()
        finally:
            self._inflow.end()

    def _end(self, error: BaseException | None = None) -> None:
        """Give no more batches; closing takes the connection away from under whatever waits, which is no error."""
        with self._changed:
            if not self._stop.is_set():
                self._error = self._error or error
            self._ended = True
            self._changed.notify_all()

    def _wait_for_demand(self) -> bool:
        """Block until another batch is wanted; False when told to stop."""

        def wanted() -> bool:
            ahead = len(self._ready) < self.options.prefetch and self._ready_bytes < MOST_PREFETCHED_BYTES
            at_hand = self.options.prefetch and self._in_hand and self._ready_bytes < _SMALL_BYTES
            return bool(ahead or at_hand or (self._waiting and not self._ready))

        with self._changed:
            self._changed.wait_for(lambda: self._stop.is_set() or wanted())
        return not self._stop.is_set()

    def _make(self, size: int) -> bool:
        """Make one batch; False at the end."""
        assembly = Assembly(self._planned(), size)
        found, cut = Found(()), False
        self.source.begin()
        while assembly.missing and not (found.ended or found.drained or found.stuck or found.whole):
            if self._in_hand:
                self._look_ahead()
            else:
                some = self._next or self._take(assembly)
                found = some.found
                assembly.others += found.others
                assembly.round = assembly.round or found.round
                if not self._stop.is_set():
                    self._take_up(some)
            if self._stop.is_set():
                return False
            if assembly.epoch != self._ring.epoch:
                cut = not self._carry_over(assembly)
                if cut:
                    break
            self._receive(assembly)
        if found.stuck:
            log.warning("ring %s is full and waits for an incomplete batch: giving it out", self._ring.name)
        if assembly.placed:
            self._offer(assembly, full=found.stuck or found.whole or cut or not assembly.missing)
        return not found.ended

    def _carry_over(self, assembly: Assembly) -> bool:
        """Go on with a batch in the ring's new epoch; False where a server forgot some of its samples, or all."""
        bound = self.source.meta.bound(assembly.epoch)
        carried = all(placed.given.number < bound for placed in assembly.placed)
        if carried:
            assembly.move_to(self._planned())
        else:
            log.warning(
                "ring %s: the server lost samples of an incomplete batch: giving out the %d that came",
                self._ring.name,
                len(assembly.placed),
            )
        return carried

    def _planned(self) -> Plan:
        if self._plan is None or self._plan.epoch != self.source.meta.epoch:
            self._plan = Plan(self._ring.name, self.source.meta, self.options, self._finish, self._pool)
        return self._plan

    def _most(self) -> int:
        """Say how many samples to take where many are waiting: small ones many, large ones when there is a place."""
        return min(_MOST_AT_ONCE, _BYTES_AT_ONCE // max(self._sample_bytes, 1))

    def _take(self, assembly: Assembly) -> Read:
        found = self.source.take(assembly.missing, self._most(), assembly.holding)
        return read(found, self._planned())  # the source may have joined another ring

    def _take_up(self, some: Read) -> None:
        """Take samples in hand, with what lies in parts that they share; what cannot be used is counted and told."""
        self._next = None
        self.counts.overrun += some.found.gone
        bad = some.bad
        if some.plain:
            self._in_hand.extend(some.samples)
        else:
            entries = [one.entry for one in some.samples]
            whole = self._keep_trying(lambda: fetch_shared(self._shared, entries, self._planned().pool))
            for one, entry in zip(some.samples, whole, strict=True):
                if entry is None:
                    bad.append((one.given, MissingPartError("its part is gone")))
                else:
                    self._in_hand.append(one._replace(entry=entry))
        self._want(self._in_hand)
        self._set_aside(bad)
        if len(some.found.samples) > self.options.batch_size:  # so many are waiting that the next may be looked for
            self.source.ahead(1, self._most())

    def _want(self, samples: Iterable[InHand]) -> None:
        """Have all parts of these come, one sample behind the other, as the batches will ask for them."""
        names = self._planned().names
        for one in samples:
            self._inflow.want(one.entry.slices(names))

    def _receive(self, assembly: Assembly) -> None:
        """Receive what is in hand into a batch, as far as there is a place."""
        samples: deque[InHand] = deque()
        bad: list[tuple[Given, DamagedSampleError]] = []
        while self._in_hand and len(samples) < assembly.missing:
            samples.append(self._in_hand.popleft())
        again = False

        def attempt() -> None:
            nonlocal again
            if again:  # the connection is gone, and what was under way with it
                self._want([*samples, *self._in_hand])
            again = True
            self._receive_some(assembly, samples, bad)

        self._keep_trying(attempt)
        self._set_aside(bad)

    def _receive_some(
        self, assembly: Assembly, samples: deque[InHand], bad: list[tuple[Given, DamagedSampleError]]
    ) -> None:
        """Receive samples one by one; each leaves `samples` when it is settled, so that this can be repeated."""
        while samples:
            given, entry, now_s = samples[0]
            try:
                nbytes = assembly.add(given, entry, now_s, self._inflow.receive)
            except DamagedSampleError as error:
                bad.append((given, error))
            else:
                self._sample_bytes = nbytes
                self.counts.samples += 1
                self.counts.raw_bytes += nbytes
            samples.popleft()

    def _look_ahead(self) -> None:
        """See to it that what is wanted next is on its way, or in hand, before all that is in hand now has come.

        Waits for nothing, and raises nothing: it is called while a sample is received.
        """
        if self._next is None and (found := self.source.arrived()) is not None:
            self._next = read(found, self._planned())
        if self._in_hand:
            return
        if self._next is None:
            if self._goes_on():
                self.source.ahead(self.options.batch_size, self._most())
        elif self._next.plain:
            self._take_up(self._next)

    def _goes_on(self) -> bool:
        """Say whether another batch is wanted after the one in the making, as things are."""
        return len(self._ready) + 1 < self.options.prefetch and 2 * self._ready_bytes < MOST_PREFETCHED_BYTES

    def _set_aside(self, bad: Sequence[tuple[Given, DamagedSampleError]]) -> None:
        """Count and tell what cannot be used."""
        for given, why in bad:
            if isinstance(why, MissingPartError) and self._keep_trying(partial(self._is_gone, given)):
                self.counts.overrun += 1
                self.source.missed(given)
            else:
                self._quarantine(given, why)

    def _is_gone(self, given: Given) -> bool:
        """Say whether the ring has evicted a sample, or the server has lost the ring."""
        try:
            meta = self._ring.read_meta()
        except RingMissingError:
            return True
        return meta.epoch != self._planned().epoch or given.number < meta.first

    def _keep_trying(self, attempt: Callable[[], T]) -> T:
        return self._ring.connection.keep_trying(attempt, self.options.reconnect_s, self._stop)

    def _quarantine(self, given: Given, error: SynthbrokerError) -> None:
        self.counts.damaged += 1
        producer = given.fields.get(b"from", b"?").decode(errors="replace")
        producer = (producer.rpartition(":")[0] or producer)[:_LONGEST_NAME]  # without its incarnation
        spec = given.fields.get(b"spec", b"").decode(errors="replace")[:_LONGEST_REASON]
        recipe = recipe_in(given.fields.get(b"head", b"")) or {"spec": spec}
        reason = str(error)[:_LONGEST_REASON]
        note = partial(self._ring.quarantine, reason=reason, producer=producer, recipe=recipe, number=given.number)
        self._keep_trying(note)
        if given.uses < 2:
            self.source.acknowledge(self._ring.epoch, [given.number])

    def _offer(self, assembly: Assembly, *, full: bool) -> None:
        if self.options.drop_last and not full:
            self.source.acknowledge(assembly.epoch, assembly.holding)
            return
        batch, info = assembly.result()
        batch = self._finish.ship(batch)
        with self._changed:
            self._ready.append(Ready(batch, info, assembly.nbytes))
            self._ready_bytes += assembly.nbytes
            self._changed.notify_all()
        if full and not self._reserved:  # the first one is given out: what fits now shall fit at the end
            self._reserved = True
            assembly.reserve(self.options.prefetch + _OUTSIDE, MOST_PREFETCHED_BYTES)
