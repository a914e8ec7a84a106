"""The training side without torch: batches of numpy arrays."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self
from weakref import WeakMethod

from synthbroker.assemble import Finish, stack
from synthbroker.batch import BatchInfo
from synthbroker.connection import Connection
from synthbroker.ends import end_with
from synthbroker.errors import RingEndedError
from synthbroker.options import ReadOptions
from synthbroker.orphan import watch_parent
from synthbroker.progress import Progress, run_of
from synthbroker.reader import Reader, Ready
from synthbroker.ring import Ring
from synthbroker.seats import Seat

log = logging.getLogger("synthbroker")

_MOST_ON_THEIR_WAY = 1000  # batches of one worker in the queues between it and the training loop

NUMPY = Finish(tensor=lambda array: array, collate=stack)


class Session:
    """Reads a ring over several iterations, in the process that made it.

    Args:
        options: How it is read.
        finish: What arrays become.
        seat: Which of several readers this is.
        lag: A batch is acknowledged when so many more were asked for.
        progress: What acknowledges instead, by checkpoints.
    """

    def __init__(
        self, options: ReadOptions, finish: Finish, seat: Seat, lag: int = 0, progress: Progress | None = None
    ) -> None:
        let_go = WeakMethod(self._let_go)
        self.reader = Reader(options, finish, seat, lambda: (settle := let_go()) and settle())
        self._options, self._seat, self._lag, self._progress = options, seat, lag, progress
        self._unacknowledged: list[BatchInfo] = []
        self._any = False
        self._end = end_with(self, self.reader.close)

    def batches(self, left: Callable[[], bool] | None = None) -> Iterator[Ready]:
        """Go on with the stream, for one iteration; asking for a batch says that those before were trained on.

        Args:
            left: Says whether the training loop was left, where that cannot be seen otherwise.
        """
        missing = None if self.reader.sizes is None else len(self.reader.sizes)
        if missing != 0:
            self.reader.start()
        while missing is None or missing > 0:
            self._acknowledge(self._lag)
            try:
                ready = self.reader.next(left)
            except BaseException:
                self._close_and_keep()  # iterating again begins anew
                raise
            if ready is None and left is not None and left():
                return
            if ready is None:
                if not self._any and self._seat.workers == 1:
                    warn_of_nothing(self._options)
                self._settle()
                if self._progress is not None:
                    self._progress.end()
                self._close_and_keep()
                return
            self._any = True
            if self._progress is None:
                self._unacknowledged.append(ready.info)
            else:
                self._progress.add(ready.info)
            if self._options.ack == "delivered":
                self._settle()
            missing = None if missing is None else missing - 1
            yield ready
        self._settle()

    @property
    def usable(self) -> bool:
        """Whether this process may go on with it; not after a fork, nor after its end; the live ring is read anew."""
        taking = self._options.group is not None
        return taking and bool(self._end.still_active()) and self.reader.pid == os.getpid()

    def begin_anew(self, moved: bool = False) -> bool:
        """Give the samples back that were handed out and never reached the training loop, because it was left.

        Args:
            moved: A worker's training process has begun another sitting: its former one is over anyway.

        Returns:
            Whether there were any; then this session is over.
        """
        if self.reader.pid != os.getpid():
            return True
        handed_out = {number for info in self._unacknowledged for number in info.unacknowledged}
        if self._seat.acknowledges or not (moved or self.reader.source.holds(handed_out)):
            return False
        if self._end.still_active():
            self.reader.leaves = True
            self.close()
        else:  # it came to its end, and left the goodbye to the training process
            self.reader.source.close(leave=True)
        return True

    def close(self) -> None:
        """Leave the group."""
        self._end()

    def _close_and_keep(self) -> None:
        if self._progress is not None:
            self._progress.keep()
        self.close()

    def _let_go(self) -> None:
        """Hold nobody up who waits at the end of the ring for what was trained on here."""
        if self._progress is not None:
            self._progress.keep()
        elif self._lag:
            self._settle()

    def _acknowledge(self, keep: int) -> None:
        if not self._seat.acknowledges:
            del self._unacknowledged[:-_MOST_ON_THEIR_WAY]
            return
        while len(self._unacknowledged) > keep:
            info = self._unacknowledged[0]
            self.reader.acknowledge(info.epoch, info.unacknowledged)
            del self._unacknowledged[0]

    def _settle(self) -> None:
        """Acknowledge all there is, now."""
        self._acknowledge(0)
        self.reader.flush()


def warn_of_nothing(options: ReadOptions) -> None:
    """Say that an iteration had nothing to give; a loop over nothing would end without a word."""
    whose = "" if options.group is None else f" and group {options.group!r} has read all of it"
    short = f", save less than a batch of {options.batch_size}, which drop_last leaves out" if options.drop_last else ""
    log.warning("ring %s has ended%s: there was nothing to read%s", options.ring, whose, short)


def raise_if_drained(url: str | None, ring: str, group: str | None, held: int | None = 0) -> None:
    """Raise RingEndedError if there is nothing more for a group; called where a reader has come to its end before.

    Args:
        url: The server's.
        ring: The ring's name.
        group: The group's.
        held: So many samples of the group wait only for the reader's own next checkpoint; None: any number, since
            other ranks, who came to the same end, may not have acknowledged their last batch yet.
    """
    connection = Connection(url)
    try:
        if group is not None and Ring(connection, ring).is_drained(group, held):
            raise RingEndedError(
                f"ring {ring!r} has ended and group {group!r} has read all of it: start generators with reopen=True, "
                "or read it again with another group"
            )
    finally:
        connection.close()


class Consumer:
    """Reads a ring in batches of numpy arrays (those of ml_dtypes included); see `ReadOptions` for the arguments.

    Iterating blocks until there are samples, and ends when the ring has ended and the group has had everything.
    Iterating again goes on with the stream. A batch is a dict of arrays of shape (batch_size, ...), which belong to the
    caller; its `info` says where the samples came from.

    Raises:
        StarvedError: There was no sample for `wait_s`, or nobody makes any and `on_starve` says "raise".
        RingEndedError: The ring has ended, and this consumer has come to its end before.
        RingMismatchError: The group is read with another `reuse`.
        ServerGoneError: The server did not answer for `reconnect_s`.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        ring: str,
        group: str | None,
        batch_size: int = 1,
        reuse: float | str = 1,
        ack: str = "next",
        prefetch: int = 2,
        wait_s: float = 600.0,
        on_starve: str = "wait",
        transform: Callable[[Any], Any] | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        drop_last: bool = False,
        fields: Sequence[str] | None = None,
        producers: Sequence[str] | None = None,
        min_fill: int = 1,
        epoch_size: int | None = None,
        reconnect_s: float = 300.0,
        claim_after_s: float = 30.0,
        name: str | None = None,
        on_gone: str = "raise",
    ) -> None:
        self.options = ReadOptions(
            url,
            ring,
            group,
            batch_size=batch_size,
            reuse=reuse,
            ack=ack,
            prefetch=prefetch,
            wait_s=wait_s,
            on_starve=on_starve,
            transform=transform,
            collate=collate,
            drop_last=drop_last,
            fields=fields,
            producers=producers,
            min_fill=min_fill,
            epoch_size=epoch_size,
            reconnect_s=reconnect_s,
            claim_after_s=claim_after_s,
            name=name,
            on_gone=on_gone,
        )
        self._run = run_of(self.options)
        self._progress = Progress(self.options, self._run)
        self._session: Session | None = None
        self._ended = False

    def __iter__(self) -> Iterator[Any]:
        watch_parent()
        if self._ended:
            held = self._progress.unacknowledged()
            raise_if_drained(self.options.url, self.options.ring, self.options.group, held)
        if self._session is None or not self._session.usable:
            seat = Seat(self._run.name, run=self._run)
            progress = self._progress if self._run.checkpoints else None
            self._session = Session(self.options, NUMPY, seat, progress=progress)
        session = self._session
        self._ended = False
        for ready in session.batches():
            yield ready.batch
        self._ended = not session.usable

    def state_dict(self, ahead: int = 0) -> dict[str, Any]:
        """Stage what was trained on, and give the state for a checkpoint; see `RingDataset.state_dict`."""
        return self._progress.state_dict(ahead)

    def acknowledge(self, state: Mapping[str, Any] | None = None) -> None:
        """Say that the checkpoint is safely written; see `RingDataset.acknowledge`."""
        self._progress.acknowledge(state)

    def load_state_dict(self, state: Mapping[str, Any], on_gone: str | None = None) -> None:
        """Go on from a checkpoint, before iterating; see `RingDataset.load_state_dict`."""
        self.close()
        self._progress.load_state_dict(state, on_gone)

    def close(self) -> None:
        """Leave the group; what was not acknowledged is given to others."""
        if self._session is not None:
            self._session.close()
        self._progress.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
