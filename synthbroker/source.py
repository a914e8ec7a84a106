"""Where a reader's samples come from: a group of a ring (`live` has the other way, without one)."""

import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from threading import Event
from typing import Any

from synthbroker import deadlock, losses, runs, settings, taking, units
from synthbroker import ring as rings
from synthbroker.errors import (
    RingMissingError,
    ServerGoneError,
    SynthbrokerError,
    UnacknowledgedError,
)
from synthbroker.heart import Heart
from synthbroker.options import ReadOptions
from synthbroker.replies import Given, Incarnation, Meta, Taken
from synthbroker.ring import Ring
from synthbroker.runs import Run
from synthbroker.seats import Counts, Found, Seat
from synthbroker.shares import Share
from synthbroker.starving import Starving
from synthbroker.waiting import Waiting, wait_for_ring

log = logging.getLogger("synthbroker")

_MOST_RECOVERED = 10_000
_IDLE_CLAIM_S = 0.5  # who has nothing to do looks more often for what others have left
_SETTLING_S = 0.05


class GroupSource:
    """Takes samples of a group, and says that this reader lives.

    Args:
        ring: The ring; it need not exist yet.
        options: How it is read.
        seat: Which reader this is.
        counts: Where to count.
        stop: Ends all waiting.
        idle: Says whether the training loop waits for this very reader, which has nothing ready for it.
        drained: Called where the training loop waits and there is nothing but what other readers hold, who may wait for
            what this one has not acknowledged.
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
        drained: Callable[[], None],
    ) -> None:
        assert options.group is not None
        self._ring, self._options, self._seat = ring, options, seat
        self._counts, self._stop, self._idle, self._drained = counts, stop, idle, drained
        self._group = options.group
        word = f"{seat.word}." if seat.word else ""
        self._who = Incarnation(f"{seat.family}/{seat.worker}", word + secrets.token_hex(4))
        self._next_claim = 0.0
        self._min_fill = options.min_fill
        self._newest = 0  # the highest number this reader has been given fresh
        self._claimed: set[int] = set()
        self._coming: taking.Asked | None = None  # what was asked for ahead
        self._memory = losses.Memory()
        self._epoch = ""  # in which this reader was given what it remembers
        losses.watch(ring)
        self._starving = Starving(ring, options)
        self._starved, self._dry = Share(), Share()
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
        waiting = Waiting(self._options.wait_s, f"ring {self._ring.name!r}, group {self._group!r}: no sample")
        held_since: float | None = None
        while not self._stop.is_set():
            taken = self._try_take(max(min(count, most), 1), most)
            if taken is None:
                continue
            if taken.word == "UNSETTLED":
                self._check(waiting, held=False)
                self._await_others()
                continue
            held_since = (held_since or time.monotonic()) if taken.held else None
            if taken.samples or taken.gone:
                return self._give(taken)
            if (last := self._last(taken.word, holding, held_since)) is not None:
                return last
            self._check(waiting, held=taken.held, holding=len(holding))
            self._next_claim = min(self._next_claim, time.monotonic() + _IDLE_CLAIM_S)
            self._wait(taken.wait_id)
        return Found((), ended=True)

    def _last(self, word: str, holding: Sequence[int], held_since: float | None) -> Found | None:
        """Say how the batch in the making ends, if it gets no more."""
        if word == "END":
            return Found((), ended=True)
        if word == "DRAINED" and holding:
            return Found((), drained=True)
        if word == "DRAINED" and self._idle():
            self._drained()
        if held_since and deadlock.lasts(held_since):
            if holding and self._is_stuck(holding, held_since):
                return Found((), stuck=True)
            if not holding:
                self._check_checkpoints()
        return None

    def ahead(self, count: int, most: int) -> None:
        """Ask for what the next batch will want, if nothing is under way; the numbers as for `take`."""
        if self._coming is None and self._ring.epoch == self._epoch:
            self._coming = self._ask(max(min(count, most), 1), most)

    def arrived(self) -> Found | None:
        """Give what was asked for ahead, if it is here and nothing but fresh; else `take` will see to it."""
        coming = self._coming
        if coming is None or not coming.is_here() or self._ring.epoch != self._epoch:
            return None
        taken = coming.in_order
        if taken is None or any(one.uses > 1 or self._memory.came_before(one) for one in taken.samples):
            return None
        self._coming = None
        self._remember(taken)
        return self._give(taken)

    def _give(self, taken: Taken) -> Found:
        self._min_fill = 1
        self._asked(partial(self._starving.came, taken.samples))
        return Found(taken.samples, taken.now_s, taken.gone)

    def acknowledge(self, epoch: str, numbers: Sequence[int]) -> None:
        """Say that the group is done with samples, which count only in the epoch they came from."""
        if numbers:
            tell = self._memory.acknowledge(self._ring, self._group, numbers, epoch)
            with contextlib.suppress(RingMissingError):  # what the server lost needs no acknowledgement
                try:
                    self._ring.connection.keep_telling(tell, self._options.reconnect_s, self._stop)
                except ServerGoneError:
                    if not self._stop.is_set():
                        raise
                    # Closing took the connection from under it.
                    tell(True)
            self._claimed.difference_update(numbers)

    def missed(self, sample: Given) -> None:
        """Hear of a sample that is gone and was not received."""
        self._memory.note_missed(sample)

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
            if not self._epoch:  # only from here on is waiting something that more generators, or more room, could help
                self._starved, self._dry = Share(self._counts.starved.total_s), Share(self._counts.waiting_s)
            try:
                self._keep_trying(self._register)
                self._keep_trying(partial(self._settle, meta.epoch))
            except RingMissingError:
                continue  # made anew between the two
            self._next_claim = 0.0
            self._starving.heard()
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

    def _settle(self, epoch: str) -> None:
        """Where the server may have lost something, tell it what we know, and forget what it does not know any more."""
        former = self._epoch
        if former and former != epoch:
            bound = self.meta.bound(former)
            if bound:
                self._memory.settle(self._ring, self._group, self._who, former)
            self._memory.forget_from(bound)
            self._claimed = {number for number in self._claimed if number < bound}
            self._newest = min(self._newest, bound - 1)
        self._epoch = epoch

    def _await_others(self, *also: str) -> None:
        """Say that we, and others in our care, know no more; wait a moment for what other members know."""
        with contextlib.suppress(RingMissingError):
            for who in (*also, str(self._who)):
                self._keep_trying(partial(losses.say, self._ring, self._epoch, self._group, who))
        self._stop.wait(_SETTLING_S)

    def _try_take(self, count: int, most: int) -> Taken | None:
        """Take once; None where that must be done again, because the server was away or had lost the ring or us."""
        coming, self._coming = self._coming, None
        if coming is None and self._ring.epoch != self._epoch:  # somebody has looked at the ring, and it is another one
            self._join()
        try:
            _, taken = (coming or self._ask(count, most)).answer()
        except ServerGoneError:
            self._starving.heard()
            return self._keep_trying(self._recover)  # type: ignore[no-any-return]
        except RingMissingError as error:
            self._say_missing(error)
            taken = None
        if taken is None:
            self._join()
        else:
            taken = self._noted(taken)
        return taken

    def _ask(self, count: int, most: int) -> taking.Asked:
        return taking.ask(
            self._ring,
            self._who,
            self._group,
            count,
            min_fill=self._min_fill,
            claim_after_s=self._claim_after_s(),
            producers=self._options.producers or (),
            most=most,
            fresh_only=self._starving.fresh_only,
        )

    def _say_missing(self, error: RingMissingError) -> None:
        now = self._keep_trying(lambda: losses.current_epoch(self._ring))
        if now and now.partition(".")[0] == self._ring.epoch.partition(".")[0]:
            log.warning("ring %s: the server came back, or another one took over; settling with it what is whose",
                        self._ring.name)  # fmt: skip
        else:
            log.warning("%s; waiting for it to be made anew", error)

    def _noted(self, taken: Taken) -> Taken:
        """Remember what came, without what came before a server forgot it and its producer sent it again."""
        again = [one.number for one in taken.samples if self._memory.came_before(one)]
        if again:
            self.acknowledge(self._ring.epoch, again)
            taken = replace(taken, samples=tuple([one for one in taken.samples if one.number not in again]))
        self._remember(taken)
        return taken

    def _remember(self, taken: Taken) -> None:
        self._note(taken.samples)
        self._memory.note_given(taken.samples)

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
        return self._noted(Taken("OK", self._ring.now_s(), "0-0", held=False, samples=tuple(held)))

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
        self._keep_trying(lambda: self._ring.wait_for_sample(wait_id))
        self._counts.waiting_s += time.monotonic() - began

    def _check(self, waiting: Waiting, *, held: bool, holding: int = 0) -> None:
        """Warn each minute and raise after `wait_s`, with what is likely the cause."""
        if held:
            waiting.check(partial(deadlock.why_full, self._ring, self._options), UnacknowledgedError)
        if self._starving.look_again():
            self._asked(self._starving.nothing)
        begun = self._starving.begun(holding)
        waiting.check(lambda: f"{begun}are the generators running? {self._asked(self._starving.nothing)}")

    def _asked(self, look: Callable[[], object]) -> object:
        """Look who makes samples; where the ring is gone, taking will find that out."""
        try:
            return self._keep_trying(look)
        except RingMissingError:
            return "the ring is gone"

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
            why = deadlock.why_full(self._ring, self._options)
            raise UnacknowledgedError(f"ring {self._ring.name!r}, group {self._group!r}: {why}")

    def _is_stuck(self, holding: Sequence[int], held_since: float) -> bool:
        return self._idle() and deadlock.waits_for_batch(self._ring, self._options, holding, held_since)

    def _beat(self) -> None:
        self._ring.beat("consumer", f"{self._group} {self._who}", self._about())
        known = self._epoch
        if known and losses.current_epoch(self._ring) != known:  # the reading thread may wait for a long validation
            self._register()
            self._memory.settle(self._ring, self._group, self._who, known)

    def _about(self) -> dict[str, Any]:
        job = settings.job()
        about: dict[str, Any] = {"host": job.host, "pid": job.pid, "samples": self._counts.samples}
        if job.job_id is not None:
            about["job_id"] = job.job_id
        self._starved.update(self._counts.starved.total_s)
        self._dry.update(self._counts.waiting_s)
        return about | {
            "damaged": self._counts.damaged,
            "overrun": self._counts.overrun,
            "starved_share": round(self._starved.lately, 3),
            "starved_ever_share": round(self._starved.ever, 3),
            "dry_share": round(self._dry.lately, 3),
            "age_s": round(self._starved.age_s, 1),
            "needs": self._min_fill,
        }

    def _report(self) -> str:
        counts = self._counts
        return (
            f"ring {self._ring.name} group {self._group} reader {self._who.name}: {counts.samples} samples, waited "
            f"{units.format_duration(counts.waiting_s)}, damaged {counts.damaged}, overrun {counts.overrun}"
        )
