"""Tells a ring what the training loop is done with, while batches go on being made: nobody waits for the answers."""

import time
from collections.abc import Callable, Sequence
from itertools import groupby
from operator import itemgetter
from threading import Condition, Lock, Thread

TELL_AFTER_S = 0.005
_LATEST_S = 0.02  # where the thread does not come to it, the training loop tells by itself


class Teller:
    """Gathers acknowledgements, and tells of many together in a thread of its own.

    Args:
        tell: Tells of the numbers of one epoch of the ring.
        is_much: Says whether so many bytes of samples are worth telling of at once, as they may wake a producer that
            waits for room; else they wait until `TELL_AFTER_S` after the last telling.
        failed: Hears of an error in the thread, after which it is over.
    """

    def __init__(
        self,
        tell: Callable[[str, Sequence[int]], None],
        is_much: Callable[[int], bool],
        failed: Callable[[BaseException], None],
    ) -> None:
        self._tell, self._is_much, self._failed = tell, is_much, failed
        self._due: list[tuple[str, Sequence[int]]] = []
        self._due_bytes = 0
        self._due_since = 0.0
        self._told_s = 0.0
        self._stopped = False
        self._changed = Condition(Lock())
        self._telling = Lock()
        self._thread = Thread(target=self._run, name="synthbroker-teller", daemon=True)

    def start(self) -> None:
        """Begin to tell."""
        self._thread.start()

    def add(self, epoch: str, numbers: Sequence[int], nbytes: int) -> None:
        """Take numbers of samples that are done with, and their size.

        Called by the training loop, which is held up where it is so far ahead of what was told that a crash would have
        much of it come again.
        """
        now = time.monotonic()
        with self._changed:
            first = not self._due
            self._due_since = now if first else self._due_since
            self._due.append((epoch, numbers))
            self._due_bytes += nbytes
            if first or self._is_much(self._due_bytes):
                self._changed.notify()
            late = now - self._due_since > _LATEST_S
        if late:
            self.flush()

    def flush(self) -> None:
        """Return when everything is told."""
        with self._telling:
            with self._changed:
                due, self._due, self._due_bytes = self._due, [], 0
                self._told_s = time.monotonic()
            for epoch, some in groupby(due, key=itemgetter(0)):
                self._tell(epoch, [number for _, numbers in some for number in numbers])

    def stop(self, wait_s: float) -> None:
        """End the thread; what is not told yet stays for `flush`."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(wait_s)

    def _run(self) -> None:
        try:
            while self._wait():
                self.flush()
        except BaseException as error:  # noqa: BLE001 - whatever it is belongs to the training loop
            self._failed(error)

    def _wait(self) -> bool:
        """Wait until there is something to tell that should not wait longer; False when stopped."""
        with self._changed:
            self._changed.wait_for(lambda: self._due or self._stopped)
            left_s = self._told_s + TELL_AFTER_S - time.monotonic()
            self._changed.wait_for(lambda: self._stopped or self._is_much(self._due_bytes), max(left_s, 0.0))
            return not self._stopped
