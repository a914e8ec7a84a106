"""Where one of several ranks has its samples from: its share of whole rounds, dealt to all ranks of a run alike."""

import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from synthbroker import deadlock, dealing, losses
from synthbroker import ring as rings
from synthbroker.dealing import Busy, Rules
from synthbroker.errors import (
    DamagedSampleError,
    RingMissingError,
    ServerGoneError,
    ShutOutError,
    SynthbrokerError,
)
from synthbroker.options import ReadOptions
from synthbroker.ranks import Place
from synthbroker.replies import Given, Taken
from synthbroker.seats import Found, Seat
from synthbroker.source import GroupSource
from synthbroker.waiting import Waiting

log = logging.getLogger("synthbroker")

_GLANCE_S = 0.2


def rules_of(options: ReadOptions, ranks: int) -> Rules:
    """Say what all ranks must agree on."""
    sizes = options.sizes(0, 1, ranks)
    last = sizes[-1] if sizes else options.batch_size
    return Rules(ranks, options.batch_size, len(sizes or ()), last, options.drop_last, options.epoch_size)


def numbers_of(seat: Seat, rules: Rules) -> Iterator[int]:
    """Count the rounds of one of several workers; in each epoch the first worker has the first one."""
    if not rules.rounds:
        yield from itertools.count(seat.worker, seat.workers)
    for epoch in itertools.count():
        for i in range(seat.worker, rules.rounds, seat.workers):
            yield epoch * rules.rounds + i


class RoundSource(GroupSource):
    """Gives a rank its share of one round after the other.

    A share may be smaller than a batch in the last round, for all ranks alike. In place of a sample that cannot be
    used another one is taken; where nothing comes any more, or the ring is full of what ranks wait for, one of the
    batch is repeated, or else the newest in the ring that can be used.
    """

    _place: Place
    _rules: Rules
    _rounds: Iterator[int]
    _round = -1
    _received = -1  # the round whose answer came last
    _short_by = 0  # places of the batch that this round has no samples for
    _fetched = False
    _generation = ""
    _had = ""  # the epoch in which that was
    _told_lost = False
    _tried: set[int]
    _others: Iterator[Given] | None = None

    def start(self) -> None:
        """Join the group and the other ranks, waiting for the ring if need be."""
        assert self._seat.place is not None
        self._place = self._seat.place
        self._rules = rules_of(self._options, self._place.ranks)
        self._rounds = numbers_of(self._seat, self._rules)
        super().start()

    def begin(self) -> None:
        """Go on to the next round."""
        if self._fetched:
            self._received = self._round
        self._round, self._fetched = next(self._rounds), False
        self._short_by, self._tried, self._others = 0, set(), None

    def take(self, count: int, most: int, holding: Sequence[int]) -> Found:  # noqa: ARG002 - a round is taken whole
        """Give this rank's share of the round, then spares for those of it that could not be used.

        Args:
            count: So many are needed.
            most: Not used.
            holding: Numbers of the samples that are already in the batch.

        Raises:
            StarvedError: The round did not come for `wait_s`.
            UnacknowledgedError: It cannot come before this group acknowledges what it has.
            ShutOutError: A newer life of the run has taken this one's place.
            DamagedSampleError: None of the round's samples can be used, and there is no other one in the ring.
        """
        if not self._fetched:
            return self._take_share(count)
        if count <= self._short_by:
            return Found((), whole=True)
        return self._take_spares(count - self._short_by, holding)

    def ahead(self, count: int, most: int) -> None:
        """Nothing is asked for ahead: rounds are dealt to all ranks at the same time."""

    def close(self, *, leave: bool) -> None:
        """Stop; with `leave`, what is not acknowledged is given to others."""
        super().close(leave=leave)
        if leave and self._generation:
            place = self._place
            try:
                dealing.rise(self._ring, self._group, self._who, run=place.run, rank=place.rank, had=self._generation)
            except RingMissingError:
                self._lost()
            except SynthbrokerError as error:
                log.debug("group %s: could not leave the table: %s", self._group, error)

    def _take_share(self, count: int) -> Found:
        waiting = Waiting(self._options.wait_s, f"ring {self._ring.name!r}, group {self._group!r}: no sample")
        held_since, short = None, False
        while not self._stop.is_set():
            taken = self._try_order(self._round_order(short=short), 0)
            if taken is None:
                continue
            if taken.word == "END":
                return Found((), ended=True)
            if taken.word == "OK":
                self._min_fill, self._fetched = 1, True
                self._short_by = count - len(taken.samples) - taken.gone
                at = (self._place.sitting, self._round)
                return Found(taken.samples, taken.now_s, taken.gone, others=taken.others, round=at)
            held_since = (held_since or time.monotonic()) if taken.held else None
            short = self._is_full_of_too_few(held_since)
            self._rest(waiting, taken)
        return Found((), ended=True)

    def _take_spares(self, count: int, holding: Sequence[int]) -> Found:
        waiting = Waiting(self._options.wait_s, f"ring {self._ring.name!r}, group {self._group!r}: no sample")
        held_since = None
        while not self._stop.is_set():
            taken = self._try_order(self._spare_order(), count)
            if taken is None and not self._fetched:
                return Found((), now_s=0.0)  # the ring was made anew, and so will be the batch
            if taken is None:
                continue
            if taken.samples or taken.gone:
                return Found(taken.samples, taken.now_s, taken.gone)
            held_since = (held_since or time.monotonic()) if taken.held else None
            if taken.word == "END" or (held_since and deadlock.lasts(held_since)):
                return self._repeat(count, holding, taken.now_s)
            self._rest(waiting, taken)
        return Found((), ended=True)

    def _repeat(self, count: int, holding: Sequence[int], now_s: float) -> Found:
        """Give samples again: one of this batch, or where it has none, others of the ring, each once."""
        found = [again for number in holding[:1] for again in self._read_again(number)] * count
        if not found:
            self._others = self._others or self._newest_first()
            found = list(itertools.islice(self._others, count))
        if not found:
            raise DamagedSampleError(
                f"ring {self._ring.name!r}, group {self._group!r}: no sample of round {self._round} for rank "
                f"{self._place.rank} can be used, and no other one is in the ring: `synthbroker status` counts them"
            )
        self._try_order(f"REPEAT {self._generation}", len(found))
        return Found(found, now_s)

    def _newest_first(self) -> Iterator[Given]:
        """Read what is in the ring; last what was given for this batch, of which some may be good after all."""
        meta, tried = self._keep_trying(self._ring.read_meta), set(self._tried)
        for number in sorted(range(meta.first, meta.next), key=lambda one: (one in tried, -one)):
            yield from self._read_again(number)

    def _read_again(self, number: int) -> list[Given]:
        read = self._keep_trying(lambda: self._ring.read(number, number, 1))
        return [given._replace(uses=2) for given in read]

    def _is_full_of_too_few(self, held_since: float | None) -> bool:
        """Say whether a full ring holds less than a round: it can make no room before that is dealt short."""
        if not (held_since and deadlock.lasts(held_since) and self._idle()):
            return False
        return not deadlock.is_sending(self._keep_trying(self._ring.read_meta), held_since)

    def _rest(self, waiting: Waiting, taken: Taken) -> None:
        self._check(waiting, held=taken.held)
        self._next_claim = min(self._next_claim, time.monotonic() + 0.5)
        self._wait(taken.wait_id)

    def _round_order(self, *, short: bool) -> str:
        place, rules = self._place, self._rules
        told = (place.rank, place.ranks, place.sitting, self._round, rules.share, rules.rounds, rules.last_share)
        marks = (self._received, int(rules.drop_last), int(short), int(self._keeps_checkpoints()))
        return " ".join(["ROUND", self._generation, *map(str, told + marks)])

    def _spare_order(self) -> str:
        told = (self._place.rank, self._place.sitting, self._round, int(self._keeps_checkpoints()))
        return " ".join(["SPARE", self._generation, *map(str, told)])

    def _about(self) -> dict[str, Any]:
        return super()._about() | {"needs": max(self._min_fill, self._rules.ranks * self._rules.share)}

    def _keeps_checkpoints(self) -> bool:
        return self._seat.run is not None and self._seat.run.checkpoints

    def _try_order(self, order: str, count: int) -> Taken | None:
        """Ask once; None where that must be done again, because the server was away, or does not know us."""
        if self._ring.epoch != self._epoch:  # somebody has looked at the ring, and it is another one
            self._join()
        try:
            word, taken = dealing.deal(
                self._ring,
                self._group,
                self._who,
                order,
                count=count,
                min_fill=self._min_fill,
                claim_after_s=self._claim_after_s(),
                producers=self._options.producers or (),
            )
        except ServerGoneError:
            with suppress(RingMissingError):  # the next order will find out
                self._keep_trying(self._ring.read_meta)  # asking again gives the same round
            return None
        except RingMissingError:
            word, taken = "NORING", None
        if word == "UNSETTLED":
            self._await_others(self._dealer())  # it knows nothing
            return None
        if taken is not None:
            self._memory.note_given(taken.samples)
            self._tried.update(given.number for given in taken.samples)
            if any(given.uses == 0 for given in taken.samples):
                self._next_claim = 0.0  # a dead reader left them: there may be more, older than what is fresh
            return taken
        if word == "SHUT":
            raise dealing.shut_out(self._ring, self._group, self._place.rank, self._place.run)
        if word == "LEFT":
            raise ShutOutError(
                f"rank {self._place.rank} of run {self._place.run!r} reads group {self._group!r} of ring "
                f"{self._ring.name!r} elsewhere by now: one iteration at a time"
            )
        self._join()
        return None

    def _join(self) -> None:
        self._check_known()
        super()._join()
        self._check_known()
        if not self._stop.is_set():
            self._sit()

    def _check_known(self) -> None:
        """Raise where the server has lost the ring, and with it what the ranks were dealt."""
        if not self._generation or self._stop.is_set():
            return
        now = self._keep_trying(lambda: losses.current_epoch(self._ring))
        if now.partition(".")[0] != self._had.partition(".")[0]:
            raise self._lost()

    def _lost(self) -> RingMissingError:
        """Make the error of a ring that is gone, and log it at once.

        A rank that waits for another one in torch does not ask for its next batch: it fails with torch's error.
        """
        text = (
            f"{self._ring.connection.where} lost ring {self._ring.name!r} while the ranks of run "
            f"{self._place.run!r} were reading it (rank {self._place.rank}, round {self._round}): they cannot go "
            "on in step; start all of them again"
        )
        if not self._told_lost:
            self._told_lost = True
            log.error("%s", text)
        return RingMissingError(text)

    def _dealer(self) -> str:
        return f"{self._place.run}.deal/{self._place.sitting}:{self._generation}"

    def _sit(self) -> None:
        """Take this rank's seat; waits until others that read this group turn out to be dead."""
        place, first = self._place, None
        while not self._stop.is_set():
            try:
                answer = self._keep_trying(self._ask_for_seat)
            except RingMissingError:
                return  # the next order will find out
            if isinstance(answer, str):
                self._generation, self._had = answer, self._ring.epoch
                return
            first = first or answer
            if answer.run == first.run and answer.seen_s > first.seen_s:
                raise dealing.taken(self._ring, self._group, answer, run=place.run, rank=place.rank, rules=self._rules)
            self._stop.wait(_GLANCE_S)

    def _ask_for_seat(self) -> str | Busy:
        place = self._place
        return dealing.sit(
            self._ring,
            self._group,
            self._who,
            run=place.run,
            attempt=place.attempt,
            rules=self._rules,
            rank=place.rank,
            word=place.word,
            claim_after_s=max(self._options.claim_after_s, 2 * rings.BEAT_S),
            had=self._generation,
        )

    def _beat(self) -> None:
        try:
            super()._beat()
        except RingMissingError:
            self._lost()
            raise
        self._ring.beat("consumer", f"{self._group} {self._dealer()}", None)
