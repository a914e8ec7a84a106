"""Where a reader's samples come from: a group of a ring (`live` has the other way, without one)."""

import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import Any, Protocol

from synthbroker import ring as rings
from synthbroker import runs, settings, units
from synthbroker.errors import (
    RingMissingError,
    ServerGoneError,
    SynthbrokerError,
    UnacknowledgedError,
)
from synthbroker.heart import Heart
from synthbroker.options import ReadOptions
from synthbroker.ranks import Place
from synthbroker.replies import Given, Incarnation, Meta, Taken
from synthbroker.ring import Ring
from synthbroker.runs import Run
from synthbroker.waiting import Waiting, end_orphan, wait_for_ring

log = logging.getLogger("synthbroker")

_MOST_RECOVERED = 10_000
_IDLE_CLAIM_S = 0.5  # who has nothing to do looks more often for what others have left
STUCK_AFTER_S = 1.0  # a producer that is refused room for many samples asks for one of them a moment later


@dataclass(frozen=True)
class Seat:
    """Which of several readers this is.

    Attributes:
        family: Readers that one training loop waits for together; none of them waits for what the others hold.
        worker: Number of this one.
        workers: How many there are.
        word: Where it is set, the training process acknowledges and says goodbye for this one, and knows it by this.
        run: Whose samples these are, and who may take this one's place.
        place: Which of several ranks that training process is.
    """

    family: str
    worker: int = 0
    workers: int = 1
    word: str = ""
    run: Run | None = None
    place: Place | None = None

    @property
    def acknowledges(self) -> bool:
        """Whether this one acknowledges, and says goodbye, itself."""
        return not self.word


@dataclass(frozen=True)
class Found:
    """Entries that were given, and the server's time then.

    Attributes:
        samples: The entries; there are none only with one of the following.
        now_s: The server's time.
        gone: How many had left the ring before they could be read.
        ended: Nothing comes any more.
        stuck: Nothing comes before the samples of the batch in the making are acknowledged: they are the oldest of a
            full ring, which cannot make room while they are held; as when a dead reader's samples were taken over.
        whole: The batch in the making gets no more; its round was small.
    """

    samples: Sequence[Given]
    now_s: float = 0.0
    gone: int = 0
    ended: bool = False
    stuck: bool = False
    whole: bool = False


@dataclass
class Counts:
    """Running totals of one reader."""

    samples: int = 0
    raw_bytes: int = 0
    damaged: int = 0
    overrun: int = 0
    waiting_s: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)


class Source(Protocol):
    """What a reader needs of where its samples come from."""

    meta: Meta

    def start(self) -> None:
        """Get ready; blocks until there is a ring."""

    def begin(self) -> None:
        """Get ready for another batch."""

    def take(self, count: int, most: int, holding: Sequence[int]) -> Found:
        """Give samples for a batch that has those in `holding` and needs `count`; blocks until there is one.

        Where many are waiting, it may be as many as `most`.
        """

    def acknowledge(self, epoch: str, numbers: Sequence[int]) -> None:
        """Say that samples are done with."""

    def holds(self, numbers: Collection[int]) -> bool:
        """Say whether any of these samples is held by this reader."""

    def close(self, *, leave: bool) -> None:
        """Stop, and say goodbye if asked to."""


class GroupSource:
    """Takes samples of a group, and says that this reader lives.

    Args:
        ring: The ring; it need not exist yet.
        options: How it is read.
        seat: Which reader this is.
        counts: Where to count.
        stop: Ends all waiting.
        idle: Says whether the training loop waits for this very reader, which has nothing ready for it.
        resting: Called with True before this waits for samples, and with False after.
    """

    meta: Meta

    def __init__(
        self,
        ring: Ring,
        options: ReadOptions,
        seat: Seat,
        counts: Counts,
        stop: Event,
        idle: Callable[[], bool],
        resting: Callable[[bool], None],
    ) -> None:
        assert options.group is not None
        self._ring, self._options, self._seat = ring, options, seat
        self._counts, self._stop, self._idle, self._resting = counts, stop, idle, resting
        self._group = options.group
        word = f"{seat.word}." if seat.word else ""
        self._who = Incarnation(f"{seat.family}/{seat.worker}", word + secrets.token_hex(4))
        self._next_claim = 0.0
        self._min_fill = options.min_fill
        self._epoch = ""  # in which the following were given
        self._newest = 0  # the highest number this reader has been given fresh
        self._claimed: set[int] = set()
        self._heart = Heart(self._beat, self._report, rings.BEAT_S)

    def start(self) -> None:
        """Join the group, waiting for the ring if need be."""
        self._join()
        self._heart.start()

    def begin(self) -> None:
        """Batches are all the same here."""

    def take(self, count: int, most: int, holding: Sequence[int]) -> Found:
        """Take samples; blocks until there is one.

        Args:
            count: So many are needed.
            most: So many may be taken where many are waiting; fewer than needed, where they are large.
            holding: Numbers of the samples that are already in the batch that these are for.

        Raises:
            StarvedError: There was none for `wait_s`.
            UnacknowledgedError: There cannot be one before this group acknowledges what it has.
        """
        waiting = Waiting(self._options.wait_s, f"ring {self._ring.name!r}, group {self._group!r}")
        held_since: float | None = None
        while not self._stop.is_set():
            taken = self._try_take(max(min(count, most), 1), most)
            if taken is None:
                continue
            held_since = (held_since or time.monotonic()) if taken.held else None
            if taken.samples or taken.gone:
                self._min_fill = 1
                return Found(taken.samples, taken.now_s, taken.gone)
            if taken.word == "END":
                return Found((), ended=True)
            if held_since and holding and time.monotonic() - held_since >= STUCK_AFTER_S and self._is_stuck(holding):
                return Found((), stuck=True)
            if held_since and not holding and time.monotonic() - held_since >= STUCK_AFTER_S:
                self._check_checkpoints()
            self._check(waiting, held=taken.held)
            self._next_claim = min(self._next_claim, time.monotonic() + _IDLE_CLAIM_S)
            self._wait(taken.wait_id)
        return Found((), ended=True)

    def acknowledge(self, epoch: str, numbers: Sequence[int]) -> None:
        """Say that the group is done with samples, which count only in the epoch they came from."""
        if numbers and epoch == self._ring.epoch:
            with contextlib.suppress(RingMissingError):  # what the server lost needs no acknowledgement
                try:
                    self._ring.connection.keep_telling(
                        lambda again: self._ring.acknowledge(self._group, numbers, again=again),
                        self._options.reconnect_s,
                        self._stop,
                    )
                except ServerGoneError:
                    if not self._stop.is_set():
                        raise
                    # Closing took the connection from under it.
                    self._ring.acknowledge(self._group, numbers, again=True)
            self._claimed.difference_update(numbers)

    def holds(self, numbers: Collection[int]) -> bool:
        """Say whether any of these samples was given to this reader and is not acknowledged."""
        try:
            held = self._keep_trying(lambda: self._ring.held_by(self._who, self._group, _MOST_RECOVERED))
        except SynthbrokerError:
            return False  # the group is gone with the ring
        return any(number in numbers for number, _ in held)

    def close(self, *, leave: bool) -> None:
        """Stop; with `leave`, what is not acknowledged is given to others."""
        self._heart.stop()
        if not leave:
            return
        try:
            self._ring.leave_group(self._who, self._group)
        except SynthbrokerError as error:
            log.debug("group %s: could not say goodbye: %s", self._group, error)

    def _keep_trying(self, attempt: Callable[[], Any]) -> Any:
        return self._ring.connection.keep_trying(attempt, self._options.reconnect_s, self._stop)

    def _join(self) -> None:
        while not self._stop.is_set():
            meta = wait_for_ring(self._ring, self._options, self._stop)
            if meta is None:
                return
            self.meta = meta
            try:
                self._keep_trying(self._register)
            except RingMissingError:
                continue  # made anew between the two
            self._next_claim = 0.0
            if meta.epoch != self._epoch:
                self._epoch, self._newest = meta.epoch, 0
                self._claimed.clear()
            return

    def _register(self) -> None:
        run = self._seat.run or Run(self._seat.family)
        if run.life and not run.settled:
            runs.shut_out(self._ring, self._group, run)
        self._ring.join_group(
            self._who,
            self._group,
            self._options.reuse_text(),
            self._about(),
            life=run.life,
            checkpoints=run.checkpoints,
        )

    def _try_take(self, count: int, most: int) -> Taken | None:
        """Take once; None where that must be done again, because the server was away or had lost the ring or us."""
        try:
            taken = self._ring.take(
                self._who,
                self._group,
                count,
                min_fill=self._min_fill,
                claim_after_s=self._claim_after_s(),
                producers=self._options.producers or (),
                most=most,
            )
        except ServerGoneError:
            return self._keep_trying(self._recover)  # type: ignore[no-any-return]
        except RingMissingError as error:
            log.warning("%s; waiting for it to be made anew", error)
            taken = None
        if taken is None:
            self._join()
        else:
            self._note(taken.samples)
        return taken

    def _recover(self) -> Taken | None:
        """After an answer that never came: what we were given by it is ours, and nobody else will be given it."""
        held = []
        try:
            for number, times in self._ring.held_by(self._who, self._group, _MOST_RECOVERED):
                if number not in self._claimed and (number > self._newest or times > 1):
                    held += self._ring.read(number, number, 1)
        except SynthbrokerError as error:
            if isinstance(error, ServerGoneError):
                raise
            return None  # the group is gone with the ring
        if not held:
            return None
        self._note(held)
        return Taken("OK", self._ring.now_s(), "0-0", held=False, samples=tuple(held))

    def _note(self, samples: Sequence[Given]) -> None:
        for sample in samples:
            if sample.uses == 0:
                self._claimed.add(sample.number)
                self._next_claim = 0.0  # there may be more of them
            elif sample.uses == 1:
                self._newest = max(self._newest, sample.number)

    def _claim_after_s(self) -> float:
        """Look for dead members at once, then now and then."""
        now = time.monotonic()
        if now < self._next_claim:
            return -1.0
        self._next_claim = now + max(self._options.claim_after_s / 4, 0.5)
        return max(self._options.claim_after_s, 2 * rings.BEAT_S)

    def _wait(self, wait_id: str) -> None:
        began = time.monotonic()
        self._resting(True)
        try:
            if not self._stop.is_set():  # closing may have come while it was told what is done with
                self._keep_trying(lambda: self._ring.wait_for_sample(wait_id))
        finally:
            self._resting(False)
        self._counts.waiting_s += time.monotonic() - began

    def _check(self, waiting: Waiting, *, held: bool) -> None:
        """Warn each minute and raise after `wait_s`, with what is likely the cause."""
        if held:
            waiting.check(self._crowded(), UnacknowledgedError)
        waiting.check("are the generators running? `synthbroker status` shows who was last seen, and when")

    def _crowded(self) -> str:
        """Say what it is that the ring is full of, and what helps."""
        try:
            meta = self._ring.read_meta()
        except SynthbrokerError:
            return "the ring is full of samples that this group was given and has not acknowledged"
        oftener = "acknowledge more often"
        if self._options.ack == "checkpoint":
            oftener = (
                f"make checkpoints more often (state_dict(), then acknowledge(), well before {meta.live} samples "
                "were trained on)"
            )
        return (
            f"the ring is full: of its {meta.live} samples ({units.format_size(meta.capacity_bytes)}) this group was "
            f"given the last, and has not acknowledged the first: {oftener}, take smaller batches, use fewer workers, "
            "or give the ring more capacity"
        )

    def _check_checkpoints(self) -> None:
        """Raise where the training loop waits for samples that only its own next checkpoint can make room for.

        Raises:
            UnacknowledgedError: The oldest sample is this reader's, and no checkpoint is on its way.
        """
        run = self._seat.run
        if run is None or not run.checkpoints or run.staged or not (self._seat.acknowledges and self._idle()):
            return
        held = self._ring.held_by(self._who, self._group, 1)
        if held and held[0][0] <= self._ring.read_meta().first:
            raise UnacknowledgedError(f"ring {self._ring.name!r}, group {self._group!r}: {self._crowded()}")

    def _is_stuck(self, holding: Sequence[int]) -> bool:
        """Say whether a full ring waits for the samples of an incomplete batch, and that batch for the ring.

        Raises:
            UnacknowledgedError: These are all samples that the ring can hold.
        """
        meta = self._ring.read_meta()
        if not self._idle() or min(holding) > meta.first or meta.leased_bytes:
            return False  # with a lease somebody is sending
        if len(holding) >= meta.live:
            raise UnacknowledgedError(
                f"ring {self._ring.name!r} ({units.format_size(meta.capacity_bytes)}) holds only {meta.live} samples, "
                f"and a batch of {self._options.batch_size} needs more: take smaller batches, or give it more room"
            )
        return True

    def _beat(self) -> None:
        end_orphan()
        self._ring.beat("consumer", f"{self._group} {self._who}", self._about())

    def _about(self) -> dict[str, Any]:
        job = settings.job()
        about: dict[str, Any] = {"host": job.host, "pid": job.pid, "samples": self._counts.samples}
        if job.job_id is not None:
            about["job_id"] = job.job_id
        return about | {"damaged": self._counts.damaged, "overrun": self._counts.overrun}

    def _report(self) -> str:
        counts = self._counts
        return (
            f"ring {self._ring.name} group {self._group} reader {self._who.name}: {counts.samples} samples, waited "
            f"{units.format_duration(counts.waiting_s)}, damaged {counts.damaged}, overrun {counts.overrun}"
        )
