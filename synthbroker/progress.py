"""What a training run has trained on, and its checkpoints: `ack="checkpoint"`.

A batch counts as trained on from when the training loop has it: `state_dict()` is called after the step. Samples stay
pending on the server until the checkpoint they are in is written; a restarted run is given the others again.
"""

import logging
import secrets
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from itertools import chain
from threading import Event, RLock
from typing import Any

from synthbroker import losses, ranges, runs, settings
from synthbroker import ring as rings
from synthbroker.batch import BatchInfo
from synthbroker.connection import Connection
from synthbroker.ends import end_with
from synthbroker.errors import RingMissingError, StateGoneError, SynthbrokerError
from synthbroker.heart import Heart
from synthbroker.options import ON_GONE, ReadOptions, check_choice
from synthbroker.ranges import Numbers, Range
from synthbroker.replies import Meta
from synthbroker.ring import Ring
from synthbroker.runs import Resumed, Run

log = logging.getLogger("synthbroker")

_VERSION = 1
_FIELDS = {"version": int, "ring": str, "group": str, "run": str, "epoch": str, "token": str, "samples": int}
_MOST_AHEAD = 16


def run_of(options: ReadOptions) -> Run:
    """Name the run of a training process; without a name it is known by its states only."""
    job = settings.job()
    checkpoints = options.ack == "checkpoint"
    name = options.name or f"{job.host}-{job.pid}" + (f"-{secrets.token_hex(3)}" if checkpoints else "")
    life = secrets.token_hex(4) if options.name or checkpoints else ""
    return Run(name, life, checkpoints)


class Progress:
    """Of one training process. Its methods may be called from any thread.

    Args:
        options: How the ring is read.
        run: The run.
    """

    def __init__(self, options: ReadOptions, run: Run) -> None:
        self._options, self._run, self._lock = options, run, RLock()
        self._connection = Connection(options.url)
        self._ring = Ring(self._connection, options.ring)
        losses.watch(self._ring)
        self._memory = losses.Memory()
        self._memory_epoch = ""  # in which that is true
        self._finished = 0  # serial of the newest checkpoint that is written
        self._recent: deque[BatchInfo] = deque()
        self._batches = 0  # trained on since the last token
        self._rounds: dict[int, int] = {}  # where ranks are dealt rounds: for each sitting the last one, likewise
        self._over = False  # whoever fetches ahead has found the end
        self._trained_on: dict[str, Numbers] = {}  # by epoch, since the last token
        self._staged: dict[str, list[tuple[int, list[Range]]]] = {}  # by epoch: serial, and what is not acknowledged
        self._word = secrets.token_hex(4)
        self._epoch, self._token, self._samples = "", "", 0  # of the newest checkpoint
        self._keeper = _Keeper(options, f"{run.name}/kept:{self._word}")
        self._end = end_with(self, self._keeper.close)

    def add(self, info: BatchInfo) -> None:
        """Count a batch that the training loop is given now."""
        if info.group is None:
            return
        with self._lock:
            self._recent.append(info)
            self._over = False
            if len(self._recent) > _MOST_AHEAD:
                self._settle(_MOST_AHEAD)

    def state_dict(self, ahead: int = 0) -> dict[str, Any]:
        """Stage what was trained on, and name it; see `RingDataset.state_dict`."""
        if isinstance(ahead, bool) or not isinstance(ahead, int) or not 0 <= ahead <= _MOST_AHEAD:
            raise ValueError(f"ahead must be a whole number of batches from 0 to {_MOST_AHEAD}, got {ahead!r}")
        with self._lock:
            if self._run.checkpoints and self._options.group is not None:
                self._settle(max(ahead - self._over, 0))
                self._keep_trying(self._stage)
            return {
                "version": _VERSION,
                "ring": self._options.ring,
                "group": self._options.group or "",
                "run": self._run.known_as,
                "epoch": self._epoch,
                "token": self._token,
                "samples": self._samples,
            }

    def acknowledge(self, state: Mapping[str, Any] | None = None) -> None:
        """Finish what a state holds; see `RingDataset.acknowledge`."""
        if not self._run.checkpoints:
            raise ValueError(
                f"acknowledge() is for ack='checkpoint'; with ack={self._options.ack!r} it is done for you"
            )
        with self._lock:
            token = self._token
            if state is not None:
                checked = self._checked(state)
                if checked["run"] != self._run.known_as:
                    raise ValueError(f"the state is of run {checked['run']!r}, this is run {self._run.known_as!r}")
                token = checked["token"]
            serial = _serial_of(token)
            if any(one <= serial for some in self._staged.values() for one, _ in some):
                self._keep_trying(lambda: self._finish(serial))

    def load_state_dict(self, state: Mapping[str, Any], on_gone: str | None = None) -> None:
        """Go on from a state; see `RingDataset.load_state_dict`."""
        checked = self._checked(state)
        check_choice("on_gone", on_gone or self._options.on_gone, ON_GONE)
        go_on = (on_gone or self._options.on_gone) == "go-on"
        if not checked["group"]:
            return
        with self._lock:
            self._keeper.close()
            name, life = self._run.known_as, self._run.life
            self._run.become(checked["run"])
            self._run.life = life or secrets.token_hex(4)
            try:
                self._keep_trying(lambda: self._resume(checked, go_on))
            except BaseException:
                self._run.become(name)
                self._run.life = life
                raise
            self._recent.clear()
            self._batches = 0
            self._rounds.clear()
            self._trained_on.clear()
            self._staged.clear()
            self._run.staged = 0
            self._run.serial = max(self._run.serial, _serial_of(checked["token"]))
            self._epoch, self._token, self._samples = checked["epoch"], checked["token"], checked["samples"]
            self._keeper = _Keeper(self._options, f"{self._run.name}/kept:{self._word}")
            self._end = end_with(self, self._keeper.close)

    def end(self) -> None:
        """Say that an iteration came to its end: nothing is fetched ahead of the last batch."""
        with self._lock:
            self._over = True

    def settle(self) -> None:
        """Shut former selves out, if the ring is there; else the first reader does."""
        group = self._options.group
        if self._run.life and not self._run.settled and group is not None:

            def attempt() -> None:
                try:
                    self._ring.read_meta()
                    runs.shut_out(self._ring, group, self._run)
                except RingMissingError:
                    pass  # nobody can have been there

            self._keep_trying(attempt)

    def keep(self) -> None:
        """Hold on to what is not acknowledged, because the reader that has it goes; or else it would come again."""
        with self._lock:
            held = self._held()
            if any(held.values()):
                self._keeper.keep(held)

    def unacknowledged(self) -> int:
        """Count what was trained on and is not acknowledged."""
        with self._lock:
            return sum(map(ranges.count, self._held().values()))

    def close(self) -> None:
        """Let go of what is not acknowledged: it is given to others."""
        self._keeper.close()
        self._connection.close()

    # -- within; the lock is held

    def _held(self) -> dict[str, list[Range]]:
        """Give what the training loop has had and is not acknowledged, by epoch."""
        held = {epoch: numbers.ranges() for epoch, numbers in self._trained_on.items()}
        for info in self._recent:
            held.setdefault(info.epoch, []).extend(ranges.of(info.unacknowledged))
        for epoch, staged in self._staged.items():
            held.setdefault(epoch, []).extend(one for _, numbers in staged for one in numbers)
        return {epoch: ranges.merge(some) for epoch, some in held.items()}

    def _settle(self, ahead: int) -> None:
        """Count all batches but the last few as trained on."""
        while len(self._recent) > ahead:
            info = self._recent.popleft()
            self._trained_on.setdefault(info.epoch, Numbers()).add(info.unacknowledged + info.others)
            self._batches += 1
            if info.round is not None:
                self._rounds[info.round[0]] = info.round[1]

    def _learn(self) -> Meta:
        """Read the ring's record; what was trained on in a former epoch counts on, as far as the server has it."""
        meta = self._ring.read_meta()
        for former in {*self._trained_on, *self._staged, self._memory_epoch} - {meta.epoch, ""}:
            bound = meta.bound(former)
            if bound:
                self._carry_over(former, meta.epoch, bound)
            elif former == self._memory_epoch:
                self._memory.forget_from(0)  # in a ring that was made anew those numbers mean other samples
        self._memory_epoch = meta.epoch
        return meta

    def _carry_over(self, former: str, epoch: str, bound: int) -> None:
        """Tell a server that may have forgotten something what was staged and finished."""
        group = str(self._options.group)
        trained_on = self._trained_on.pop(former, Numbers()).ranges()
        self._trained_on.setdefault(epoch, Numbers()).extend(ranges.below(trained_on, bound))
        staged = [(serial, ranges.below(numbers, bound)) for serial, numbers in self._staged.get(former, [])]
        for serial, numbers in staged:
            runs.stage(self._ring, group, self._run, f"{serial}.{self._word}", numbers)
        self._staged.pop(former, None)
        if staged:
            self._staged[epoch] = [*self._staged.get(epoch, []), *staged]
        if self._finished:
            self._say_finished()
            self._memory.settle(self._ring, group, None, former)
            self._memory.forget_from(bound)

    def _stage(self) -> None:
        """Stage what was trained on in the epoch that the ring is in; with the ring, the server lost the rest."""
        assert self._options.group is not None
        try:
            epoch = self._learn().epoch
            trained_on = self._trained_on.get(epoch, Numbers()).ranges()
            if trained_on:
                serial = self._run.serial + self._batches  # the same for all ranks after a step
                token = f"{serial}.{self._word}"
                trained_on = runs.stage(self._ring, self._options.group, self._run, token, trained_on, self._rounds)
            else:
                self._say_finished()  # it may be another process's run now, also where nothing was trained on since
        except RingMissingError as error:
            log.warning("%s: the state says nothing about what was trained on", error)
            return
        if not trained_on:
            return
        self._trained_on.clear()
        self._rounds.clear()
        self._run.serial, self._batches = serial, 0
        self._epoch, self._token = epoch, token
        self._samples += ranges.count(trained_on)
        self._staged = {epoch: [*self._staged.get(epoch, []), (self._run.serial, trained_on)]}
        self._run.staged = len(self._staged[epoch])

    def _say_finished(self) -> None:
        """Say once more which checkpoint was acknowledged last, if one was."""
        runs.finish(self._ring, str(self._options.group), self._run, f"{self._finished}.{self._word}")

    def _finish(self, serial: int) -> None:
        assert self._options.group is not None
        with suppress(RingMissingError):
            self._learn()
        for epoch in list(self._staged):
            self._ring.epoch = epoch
            try:
                runs.finish(self._ring, self._options.group, self._run, f"{serial}.{self._word}")
            except RingMissingError as error:
                log.debug("nothing to acknowledge: %s", error)  # what the server lost needs no acknowledgement
            for one, numbers in self._staged[epoch]:
                if one <= serial:
                    self._memory.note_done(ranges.numbers(numbers))
            left = [(one, numbers) for one, numbers in self._staged.pop(epoch) if one > serial]
            if left:
                self._staged[epoch] = left
        self._finished = max(self._finished, serial)
        self._run.staged = sum(map(len, self._staged.values()))
        if not self._staged and not self._trained_on and not self._recent:
            self._keeper.close()

    def _resume(self, state: Mapping[str, Any], go_on: bool) -> None:
        """Resume on the server; raise where samples are gone, and that is not to be passed over."""
        group, token = state["group"], state["token"]
        gone: list[str] = []
        try:
            meta = self._ring.read_meta()
        except RingMissingError as error:
            if token:
                gone.append(f"{error}: all that it held is gone")
        else:
            if token and not meta.bound(state["epoch"]):
                gone.append(
                    f"the ring was made anew since (its epoch was {state['epoch']}, and is {meta.epoch}): all that it "
                    "held then is gone"
                )
                token = ""
            if go_on or not gone:
                gone += _what_is_gone(runs.resume(self._ring, group, self._run, token, go_on=go_on), token, group)
        if not gone:
            return
        text = (
            f"the state of run {state['run']!r} on ring {self._ring.name!r}, made after {state['samples']} samples, "
            f"cannot be resumed as it was: {'; '.join(gone)}"
        )
        if not go_on:
            raise StateGoneError(f"{text}. Load a newer state, or go on without them: on_gone='go-on'")
        log.warning("%s; going on without them", text)

    def _checked(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Check that it is a state, and one of this ring and group."""
        if not isinstance(state, Mapping) or any(not isinstance(state.get(k), kind) for k, kind in _FIELDS.items()):
            raise ValueError(f"this is no state of a reader, which has {', '.join(_FIELDS)}: {str(state)[:200]}")
        if state["version"] != _VERSION:
            raise ValueError(f"the state has version {state['version']}; this synthbroker reads {_VERSION}")
        for what, ours in ("ring", self._options.ring), ("group", self._options.group or ""):
            if state[what] != ours:
                raise ValueError(f"the state is of {what} {state[what]!r}, this reader's {what} is {ours!r}")
        return dict(state)

    def _keep_trying(self, attempt: Any) -> Any:
        return self._connection.keep_trying(attempt, self._options.reconnect_s, Event())


class _Keeper:
    """A consumer that holds what was trained on while no reader does, and lives as long as the training process."""

    def __init__(self, options: ReadOptions, who: str) -> None:
        self._options, self._who = options, who
        self._connection = Connection(options.url)
        self._ring = Ring(self._connection, options.ring)
        losses.watch(self._ring)
        self._heart: Heart | None = None
        self._numbers: list[Range] = []

    def keep(self, held: Mapping[str, list[Range]]) -> None:
        group = self._options.group
        assert group is not None
        job = settings.job()
        try:
            meta = self._ring.read_meta()
            known = [ranges.below(some, meta.bound(epoch)) for epoch, some in held.items()]
            numbers = self._numbers = ranges.merge(chain.from_iterable(known))
            if numbers:
                runs.keep(self._ring, group, self._who, {"host": job.host, "pid": job.pid, "kept": True}, numbers)
        except SynthbrokerError as error:
            log.warning("what was trained on and is not acknowledged may come again: %s", error)
            return
        if numbers and self._heart is None:
            self._heart = Heart(
                self._beat, lambda: f"{self._who} keeps samples until they are acknowledged", rings.BEAT_S
            )
            self._heart.start()

    def close(self) -> None:
        heart, self._heart = self._heart, None
        if heart is None:
            return
        heart.stop()
        try:
            self._ring.leave_group(self._who, str(self._options.group))
        except SynthbrokerError as error:
            log.debug("group %s: could not say goodbye: %s", self._options.group, error)
        self._connection.close()

    def _beat(self) -> None:
        known, group = self._ring.epoch, str(self._options.group)
        self._ring.beat("consumer", f"{group} {self._who}", None)
        if losses.current_epoch(self._ring) != known:
            losses.say(self._ring, known, group, self._who, ranges.numbers(self._numbers))
            self.keep({known: self._numbers})


def _serial_of(token: str) -> int:
    serial = token.partition(".")[0]
    return int(serial) if serial.isdigit() else 0


def _what_is_gone(found: Resumed | None, token: str, group: str) -> list[str]:
    if found is None:
        return [f"there is no group {group!r} any more"] if token else []
    gone = []
    if not found.known:
        gone.append(
            f"group {group!r} does not know this checkpoint (any more): an older state was loaded since, so that its "
            "samples came again, or the group was made anew"
        )
    if found.later:
        gone.append(
            f"later checkpoints have acknowledged samples: {ranges.shown(found.later)}, which will not come again"
        )
    if found.evicted:
        gone.append(f"samples were evicted before they were trained on: {ranges.shown(found.evicted)}")
    return gone
