"""The training process's side of readers in worker processes."""

import contextlib
import logging
import secrets
from collections.abc import Iterable, Iterator
from multiprocessing.util import Finalize
from threading import Event
from typing import Any, TypeVar

from synthbroker import losses
from synthbroker import ring as rings
from synthbroker.batch import BatchInfo
from synthbroker.connection import Connection
from synthbroker.consumer import raise_if_drained, warn_of_nothing
from synthbroker.errors import RingMissingError, SynthbrokerError
from synthbroker.heart import Heart
from synthbroker.options import ReadOptions
from synthbroker.progress import Progress
from synthbroker.ring import Ring
from synthbroker.shares import Stopwatch

log = logging.getLogger("synthbroker")

T = TypeVar("T")


class Deputies:
    """Readers in worker processes, for which the training process acknowledges, keeps alive, and says goodbye.

    Only there is known what was trained on. A worker may be gone while its last batches wait in a queue; were it to
    leave the group by itself, they would be given to others.

    Args:
        options: How the ring is read.
        progress: Whose samples these are; where it keeps checkpoints, it acknowledges.
    """

    def __init__(self, options: ReadOptions, progress: Progress) -> None:
        self._options, self._progress = options, progress
        self._connection = Connection(options.url)
        self._ring = Ring(self._connection, options.ring)
        self._memory = losses.Memory()
        losses.watch(self._ring)
        self._words: list[str] = []  # of those that have not said goodbye
        self._trained_on: BatchInfo | None = None
        self._batches = 0
        self._ended = False
        # At exit after the workers were ended, which have priority 0.
        self._at_exit = Finalize(self, _say_goodbye, (options, self._words), exitpriority=-10)

    def begin(self, *, anew: bool, ranks: bool = False, left: bool = False) -> str:
        """Get ready for another iteration; returns the word by which its readers are known.

        A loop that was left with `break` has trained on the batch it had: asking again says so. What else its readers
        were given is for others now.

        Args:
            anew: With new workers, not with those that are there.
            ranks: This is one of several ranks.
            left: The iteration before was left by the training loop.
        """
        if self._ended:
            held = None if ranks else self._progress.unacknowledged()
            raise_if_drained(self._options.url, self._options.ring, self._options.group, held)
            self._ended = False
        self._acknowledge()
        self._progress.settle()
        if anew or not self._words:
            self.release()
            self._words.append(secrets.token_hex(4))
        elif ranks and left:  # before any worker of this rank asks for more: the others shall find what comes again
            _say_goodbye(self._options, list(self._words))
        return self._words[-1]

    def watch(
        self, pairs: Iterable[tuple[Any, BatchInfo]], *, expected: int | None, stay: bool, starved: Stopwatch
    ) -> Iterator[Any]:
        """Pass on the batches of one iteration, and acknowledge each when the next is asked for.

        Args:
            pairs: Batches with their info.
            expected: How many there are in an iteration, if that is set.
            stay: The workers go on in the next iteration.
            starved: Measures how long the training loop waits for batches.
        """
        pairs = _timed(pairs, starved)
        heart = Heart(self._beat, self._report, rings.BEAT_S)
        heart.start()
        count = 0
        try:
            for batch, info in pairs:
                self._trained_on = info
                if self._options.ack == "checkpoint":
                    self._progress.add(info)
                count += 1
                self._batches += 1
                if self._options.ack == "delivered":
                    self._acknowledge()
                yield batch
                self._acknowledge()  # before waiting for the next one: it may be this one that keeps it out of the ring
        finally:
            heart.stop()
            self._connection.close()
            self._progress.keep()
        self._progress.end()
        self._ended = expected is None or count < expected
        if not count:
            warn_of_nothing(self._options)
        if not stay:
            del pairs  # ends the workers: what they took after the goodbye would be nobody's for a while
            self.release()

    def release(self) -> None:
        """Say goodbye for all readers: what they were given and is not acknowledged is for others."""
        self._progress.keep()
        _say_goodbye(self._options, self._words)

    def _acknowledge(self) -> None:
        info, self._trained_on = self._trained_on, None
        if self._options.ack == "checkpoint" or info is None or info.group is None or not info.unacknowledged:
            return
        ring, group, numbers = self._ring, info.group, info.unacknowledged
        tell = self._memory.acknowledge(ring, group, numbers, info.epoch)
        with contextlib.suppress(RingMissingError):  # what the server lost needs no acknowledgement
            self._connection.keep_telling(tell, self._options.reconnect_s, Event())

    def _beat(self) -> None:
        ring, group = self._ring, self._options.group
        if group is not None:
            former, meta = ring.epoch, ring.read_meta()
            if former and former != meta.epoch:
                self._settle(group, former, meta.bound(former))
            if meta.ended:
                self._progress.keep()  # others wait at the end for what may come again
            for who in _known(ring, group, self._words):
                ring.beat("consumer", f"{group} {who}", None)

    def _settle(self, group: str, former: str, bound: int) -> None:
        """Tell a server that may have lost something what was trained on."""
        if bound:
            self._memory.settle(self._ring, group, None, former)
        self._memory.forget_from(bound)

    def _report(self) -> str:
        return f"ring {self._options.ring} group {self._options.group}: {self._batches} batches came from workers"


def _timed(pairs: Iterable[T], starved: Stopwatch) -> Iterator[T]:
    """Pass on what there is, and measure how long it takes to come."""
    coming = iter(pairs)
    del pairs  # whose workers end with it
    while True:
        starved.start()
        try:
            item = next(coming, None)
        finally:
            starved.stop()
        if item is None:
            return
        yield item


def _known(ring: Ring, group: str, words: list[str]) -> list[str]:
    """List the registered consumers that are known by one of these words."""
    return [who for who in ring.members(group) if any(f":{word}." in who for word in words)]


def _say_goodbye(options: ReadOptions, words: list[str]) -> None:
    connection, group = Connection(options.url), options.group
    try:
        if words and group is not None:
            ring = Ring(connection, options.ring)
            ring.read_meta()
            for who in _known(ring, group, words):
                ring.leave_group(who, group)
    except SynthbrokerError as error:
        log.debug("group %s: could not say goodbye: %s", group, error)
    finally:
        connection.close()
    words.clear()
