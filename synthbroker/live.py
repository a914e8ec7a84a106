"""Reading the live ring from front to back, without a group: nothing is taken."""

import math
from collections.abc import Collection, Sequence
from threading import Event

from synthbroker.options import ReadOptions
from synthbroker.replies import Given, Meta
from synthbroker.ring import Ring
from synthbroker.seats import Found, Seat
from synthbroker.waiting import Waiting, wait_for_ring

_SCAN_AT_ONCE = 64


class LiveSource:
    """Reads what is in the ring now, oldest first, and takes nothing. Several workers share the numbers."""

    meta: Meta

    def __init__(self, ring: Ring, options: ReadOptions, seat: Seat, stop: Event) -> None:
        self._ring, self._options, self._seat, self._stop = ring, options, seat, stop
        self._next, self._last = 1, 0

    def start(self) -> None:
        """Wait until enough is in the ring, and note where it ends now."""
        waiting = Waiting(self._options.wait_s, f"ring {self._ring.name!r}: no sample")
        while (meta := wait_for_ring(self._ring, self._options, self._stop)) is not None:
            self.meta = meta
            if meta.live >= self._options.min_fill or meta.ended:
                self._next, self._last = meta.first, meta.next - 1
                return
            waiting.check(f"{meta.live} samples are in it, min_fill={self._options.min_fill} are asked for")
            newest = f"{meta.next - 1}-0"
            self._ring.connection.keep_trying(
                lambda after=newest: self._ring.wait_for_sample(after),  # type: ignore[misc]
                self._options.reconnect_s,
                self._stop,
            )

    def begin(self) -> None:
        """Batches are all the same here."""

    def take(self, count: int, most: int, holding: Sequence[int]) -> Found:  # noqa: ARG002 - nothing is held here
        """Read the next entries; fewer workers' numbers are passed over."""
        found: list[Given] = []
        while not found and self._next <= self._last and not self._stop.is_set():
            some = min(count, _SCAN_AT_ONCE) * self._seat.workers
            read = self._ring.connection.keep_trying(
                lambda n=some: self._ring.read(self._next, self._last, n),  # type: ignore[misc]
                self._options.reconnect_s,
                self._stop,
            )
            self._next = read[-1].number + 1 if read else math.inf  # type: ignore[assignment]
            found = [sample for sample in read if self._is_mine(sample)]
        return Found(found, self._ring.now_s(), ended=not found)

    def _is_mine(self, sample: Given) -> bool:
        producer = sample.fields.get(b"from", b"").decode(errors="replace").rpartition(":")[0]
        wanted = self._options.producers is None or producer in self._options.producers
        return wanted and sample.number % self._seat.workers == self._seat.worker

    def ahead(self, count: int, most: int) -> None:
        """Nothing is asked for ahead."""

    def arrived(self) -> Found | None:
        """Nothing was asked for ahead."""

    def acknowledge(self, epoch: str, numbers: Sequence[int]) -> None:
        """Nothing was taken, nothing is acknowledged."""

    def missed(self, sample: Given) -> None:
        """Nothing was taken, nothing is remembered."""

    def holds(self, numbers: Collection[int]) -> bool:  # noqa: ARG002
        """Nothing was taken, nothing is held."""
        return False

    def close(self, *, leave: bool) -> None:
        """Nobody knows that we were here."""
