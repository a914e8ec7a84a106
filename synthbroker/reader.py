"""Makes batches ahead of the training loop, in a thread of its own."""

import logging
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from threading import Condition, Event, Thread
from typing import Any, TypeVar

from synthbroker.assemble import Assembly, Finish, MissingPartError
from synthbroker.batch import BatchInfo
from synthbroker.connection import Connection
from synthbroker.errors import DamagedSampleError, RingMissingError, SynthbrokerError
from synthbroker.options import ReadOptions
from synthbroker.replies import Given
from synthbroker.ring import Ring
from synthbroker.source import Counts, Found, GroupSource, LiveSource, Seat, Source

log = logging.getLogger("synthbroker")

T = TypeVar("T")

MOST_PREFETCHED_BYTES = 10**9
_LAST_WORD_S = 5.0
_GLANCE_S = 0.2
_ONE_BY_ONE_BYTES = 1 << 20  # samples from this size on are taken when there is a place for their payload


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
    """

    def __init__(self, options: ReadOptions, finish: Finish, seat: Seat) -> None:
        self.options, self.pid, self.counts = options, os.getpid(), Counts()
        self.leaves = seat.acknowledges
        self.sizes = options.sizes(seat.worker, seat.workers)
        self._finish = finish
        self._stop = Event()
        self._ring = Ring(Connection(options.url), options.ring)
        self.source: Source = (
            LiveSource(self._ring, options, seat, self._stop)
            if options.group is None
            else GroupSource(self._ring, options, seat, self.counts, self._stop, self._is_idle)
        )
        self._ready: deque[Ready] = deque()
        self._ready_bytes = 0
        self._waiting = False
        self._ended = False
        self._error: BaseException | None = None
        self._changed = Condition()
        self._sample_bytes = 0
        self._thread = Thread(target=self._run, name="synthbroker-reader", daemon=True)

    def start(self) -> None:
        """Begin to read, if it has not begun."""
        if not self._thread.ident:
            self._thread.start()

    def next(self, left: Callable[[], bool] | None = None) -> Ready | None:
        """Give the next batch; None at the end of the ring.

        Args:
            left: Says whether nobody waits for it any more; asked now and then, and then the answer is None, too.

        Raises:
            SynthbrokerError: What went wrong; likewise whatever a user's `transform` or `collate` raised, with its
                own traceback. Batches made before come first.
        """
        with self._changed:
            self._waiting = True
            self._changed.notify_all()
            while not self._changed.wait_for(lambda: self._ready or self._ended, None if left is None else _GLANCE_S):
                if left is not None and left():
                    break
            self._waiting = False
            if self._ready:
                ready = self._ready.popleft()
                self._ready_bytes -= ready.nbytes
                self._changed.notify_all()
                return ready
        if self._error is not None:
            raise self._error
        return None

    def close(self) -> None:
        """Stop, and leave the group if `leaves` says so; not before, for what lies ready is not acknowledged yet."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        if self._thread.is_alive():
            self._ring.connection.close()  # wakes the thread where it waits for the server
            self._thread.join(_LAST_WORD_S)
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
            if not self._stop.is_set():  # closing takes the connection away from under whatever waits
                self._error = error
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _wait_for_demand(self) -> bool:
        """Block until another batch is wanted; False when told to stop."""

        def wanted() -> bool:
            ahead = len(self._ready) < self.options.prefetch and self._ready_bytes < MOST_PREFETCHED_BYTES
            return ahead or (self._waiting and not self._ready)

        with self._changed:
            self._changed.wait_for(lambda: self._stop.is_set() or wanted())
        return not self._stop.is_set()

    def _make(self, size: int) -> bool:
        """Make one batch; False at the end."""
        assembly = self._new_assembly(size)
        found = Found(())
        while assembly.missing and not found.ended and not found.stuck:
            found = self.source.take(self._how_many(assembly.missing), assembly.holding)
            if self._stop.is_set():
                return False
            if assembly.epoch != self._ring.epoch:
                if assembly.placed:
                    log.warning("ring %s was made anew: %d samples are lost", self._ring.name, len(assembly.placed))
                assembly = self._new_assembly(size)
            for given in found.samples:
                self._add(assembly, given, found.now_s)
        if found.stuck:
            log.warning("ring %s is full and waits for an incomplete batch: giving it out", self._ring.name)
        if assembly.placed:
            self._offer(assembly, full=found.stuck or not assembly.missing)
        return not found.ended

    def _new_assembly(self, size: int) -> Assembly:
        return Assembly(self._ring, self.source.meta, self.options, self._finish, size)

    def _how_many(self, missing: int) -> int:
        return 1 if self._sample_bytes >= _ONE_BY_ONE_BYTES else missing

    def _add(self, assembly: Assembly, given: Given, now_s: float) -> None:
        """Receive a sample; one that cannot be used is counted and told."""
        try:
            self._sample_bytes = self._keep_trying(lambda: assembly.add(given, now_s))
        except DamagedSampleError as error:
            if isinstance(error, MissingPartError) and self._keep_trying(lambda: self._is_gone(assembly, given)):
                self.counts.overrun += 1
            else:
                self._quarantine(given, error)
        else:
            self.counts.samples += 1
            self.counts.raw_bytes += self._sample_bytes

    def _is_gone(self, assembly: Assembly, given: Given) -> bool:
        """Say whether the ring has evicted a sample, or the server has lost the ring."""
        try:
            meta = self._ring.read_meta()
        except RingMissingError:
            return True
        return meta.epoch != assembly.epoch or given.number < meta.first

    def _keep_trying(self, attempt: Callable[[], T]) -> T:
        return self._ring.connection.keep_trying(attempt, self.options.reconnect_s, self._stop)

    def _quarantine(self, given: Given, error: SynthbrokerError) -> None:
        self.counts.damaged += 1
        producer = given.fields.get(b"from", b"?").decode(errors="replace")
        recipe = {"spec": given.fields.get(b"spec", b"").decode(errors="replace")[:200]}
        note = partial(self._ring.quarantine, reason=str(error), producer=producer, recipe=recipe, number=given.number)
        self._keep_trying(note)
        if given.uses < 2:
            self.source.acknowledge(self._ring.epoch, [given.number])

    def _offer(self, assembly: Assembly, *, full: bool) -> None:
        if self.options.drop_last and not full:
            self.source.acknowledge(assembly.epoch, assembly.holding)
            return
        batch, info = assembly.result()
        with self._changed:
            self._ready.append(Ready(batch, info, assembly.nbytes))
            self._ready_bytes += assembly.nbytes
            self._changed.notify_all()
