"""One process of `generate`: runs the user's generator, puts what it yields, and ends as it is told.

Whoever ends it - a signal, the parent's word (SIGTERM), the parent's death, or the end of its job (`limits`) - it
finishes the sample in hand, sends what is on its way, and says goodbye, all within `grace_s`, or what is left of the
job. A thread watches the time, because the user's code, or a put into a full ring, may take longer than that.
"""

import itertools
import logging
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import connection
from threading import Event, Lock, Thread
from types import FrameType
from typing import Any

from synthbroker import lanes
from synthbroker.account import ProducerStats
from synthbroker.errors import RingEndedError, SchemaError, SynthbrokerError
from synthbroker.limits import Clock, Limits
from synthbroker.producer import Producer
from synthbroker.sample import Sample
from synthbroker.units import format_duration

log = logging.getLogger("synthbroker")

SIGNALS = (signal.SIGINT, signal.SIGTERM)
TELL_EVERY_S = 1.0  # the parent, whether there is room
_UNWIND_S = 2.0  # what the user's code may still take to let go, when its time is over
_GLANCE_S = 0.2
_LONGEST_WAIT_S = 3600.0  # poll() takes milliseconds up to 24 days
_NO_MORE = object()
Target = str | Callable[["WorkerInfo"], Iterable[Any]]


@dataclass(frozen=True)
class WorkerInfo:
    """What a generator is called with.

    Attributes:
        index: Which worker this is, from 0.
        count: How many there are in this `generate`.
        seed: 63 bits, different for every worker, array task and restart.
        array_task_id: The SLURM array task, None outside of one.
        device: Where to compute, as `--device` said; of several GPUs this worker's own.
    """

    index: int
    count: int
    seed: int
    array_task_id: int | None
    device: str | None


@dataclass(frozen=True)
class Order:
    """What one worker is to do; `options` are for its `Producer`, `signals` stop it."""

    target: Target
    info: WorkerInfo
    options: dict[str, Any] = field(repr=False)
    grace_s: float
    log_level: int
    limits: Limits
    signals: tuple[int, ...]


@dataclass(frozen=True)
class LogLine:
    """A line for the parent's log."""

    level: int
    text: str


@dataclass(frozen=True)
class Blocked:
    """How long a worker has had no room, in seconds without a break; 0 where it has."""

    seconds: float


@dataclass(frozen=True)
class Result:
    """How a worker ended.

    Attributes:
        state: "closed" (its generator has no more), "left" (was stopped), "ended" (the ring has), or "failed".
        stats: What it committed.
        unsent: Samples that were made, or half made, and not sent.
        error: What went wrong, if it says all by itself: a mistake in the arguments, or one of our errors.
        trace: Else the traceback of the user's code.
        in_time: Whether it stopped by itself, before its job ends.
    """

    state: str
    stats: ProducerStats | None = None
    unsent: int = 0
    error: Exception | None = None
    trace: str = ""
    in_time: bool = False


def work(order: Order, pipe: "connection.Connection[Any, Any]") -> None:
    """Be a worker; the result goes through the pipe."""
    worker = _Worker(order, pipe)
    with suppress(_TooLate):  # also before anything was begun: a job may start when its time is nearly over
        worker.prepare()
        worker.report(worker.run())


def name_of(target: Target) -> str:
    """Name a generator as the command line does."""
    if isinstance(target, str):
        return target
    return f"{target.__module__}:{getattr(target, '__qualname__', type(target).__name__)}"


class _UserCodeError(Exception):
    """Carries, as its cause, what the user's code raised."""


class _TooLate(BaseException):
    """Raised wherever the main thread is, when all has been said without it."""


class _Worker:
    def __init__(self, order: Order, pipe: "connection.Connection[Any, Any]") -> None:
        self._order = order
        self._pipe = pipe
        self._pipe_lock = Lock()
        self._producer: Producer | None = None
        self._clock = Clock(order.limits)
        self._made = 0
        self._in_hand = 0  # 1 while a sample is made or put
        self._stop_at: float | None = None  # when all must be over; None: nobody asked us to stop
        self._stopped_at = 0.0  # when that was decided
        self._in_time = False  # whether we did it ourselves
        self._wake_read, self._wake_write = os.pipe()
        self._goodbye = Lock()  # whoever has it ends this process: the main thread, or the watch
        self._over = Event()
        self._too_late = False

    def prepare(self) -> None:
        """Send logs to the parent, watch it, and take the signals that the parent blocked until now."""
        log.setLevel(self._order.log_level)
        log.addHandler(_ToParent(self.report))
        log.propagate = False
        for number in self._order.signals:
            signal.signal(number, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._order.signals)
        Thread(target=self._watch, name="synthbroker-watch", daemon=True).start()

    def report(self, message: LogLine | Blocked | Result) -> None:
        """Tell the parent; nobody listens where it is gone."""
        with self._pipe_lock, suppress(OSError):
            self._pipe.send(message)

    def run(self) -> Result:
        """Put all that the generator yields; what goes wrong is in the result."""
        opened = False
        try:
            self._producer = Producer(**self._order.options)
            self._producer.__enter__()  # opens the ring now: better than after the first sample took a minute to make
            opened = True
            self._put_all(self._producer)
            return self._end(self._producer)
        except _UserCodeError as error:
            return self._broken_off("failed", trace=_user_trace(error.__cause__))
        except (SynthbrokerError, TypeError, ValueError) as error:
            log.debug("stopped by", exc_info=True)
            if opened and isinstance(error, RingEndedError):  # somebody has had enough: nothing is wrong here
                return self._broken_off("ended")
            return self._broken_off("failed", error=_plain(error))
        finally:
            self._over.set()

    def _put_all(self, producer: Producer) -> None:
        recipe = {"generator": name_of(self._order.target)}
        seed, worker = self._order.info.seed, self._order.info.index
        samples = self._samples(recipe)
        for n in itertools.count():
            if not self._may_begin(producer):
                return
            began, self._in_hand = time.monotonic(), 1
            item = next(samples, _NO_MORE)
            if item is _NO_MORE:
                self._in_hand = 0
                break
            self._made += 1
            sample = item if isinstance(item, Sample) else Sample(item)
            made_by = recipe | {"seed": seed, "worker": worker, "n": n} | dict(sample.recipe or {})
            try:
                producer.put(sample.fields, recipe=made_by, metadata=sample.metadata)
            except (SchemaError, TypeError, ValueError) as error:  # this sample's, not an earlier one's
                raise type(plain := _plain(error))(f"{plain}; its recipe is {made_by}") from error
            self._clock.made(time.monotonic() - began)
            self._in_hand = 0
        producer.flush()

    def _may_begin(self, producer: Producer) -> bool:
        """Say whether to make another sample; waits for room first where what does not fit would be given up."""
        waits = self._order.limits.idle_s is not None
        while waits and self._stop_at is None and not producer.pace.wait_for_room(_GLANCE_S):
            pass
        if self._stop_at is None and not self._clock.fits(producer.pace):
            need, left = self._clock.need_s(producer.pace), max(self._clock.left_s() or 0.0, 0.0)
            log.info("no other sample: it usually takes %s, %s are left before the margin of %s",
                     *map(format_duration, (need, left, self._order.limits.margin_s)))  # fmt: skip
            self._stop_in_time()
        return self._stop_at is None

    def _samples(self, recipe: dict[str, Any]) -> Iterator[Any]:
        """Run the user's code, and nothing else."""
        try:
            generator = load(self._order.target)
            _check_device(self._order.info.device)
            version = getattr(sys.modules.get(generator.__module__), "__version__", None)
            if isinstance(version, str):
                recipe["version"] = version
            samples = generator(self._order.info)
            if not isinstance(samples, Iterable) or isinstance(samples, Mapping | str):
                raise TypeError(f"{name_of(self._order.target)} must yield samples, it returned {type(samples)}")
            yield from samples
        except _CannotStartError:
            raise
        except (Exception, SystemExit) as error:
            raise _UserCodeError from error

    def _end(self, producer: Producer) -> Result:
        with self._goodbye:
            if self._stop_at is None:
                producer.close()
                return Result("closed", producer.stats)
            unsent = producer.leave(flush_s=max(self._stop_at - time.monotonic(), 0.0))
            return Result("left", producer.stats, unsent, in_time=self._in_time)

    def _broken_off(self, state: str, *, error: Exception | None = None, trace: str = "") -> Result:
        if self._producer is None:
            return Result(state, error=error)
        with self._goodbye:
            with suppress(SynthbrokerError):  # it is this very error, or a second one that the first has caused
                self._producer.leave()
            stats = self._producer.stats
            return Result(state, stats, self._made - stats.samples - stats.quarantined, error, trace)

    # A handler may be interrupted by another one: no locks here.
    def _on_signal(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - as the signal module calls it
        if self._too_late:
            raise _TooLate
        self._stop(self._order.grace_s)

    def _stop(self, after_s: float) -> None:
        """Be over in so many seconds; the first word counts, and the end of the job."""
        if self._stop_at is None:
            self._stopped_at = time.monotonic()
            give_up_at = math.inf if self._clock.give_up_at is None else self._clock.give_up_at
            self._stop_at = min(self._stopped_at + after_s, give_up_at)
        os.write(self._wake_write, b"!")

    def _stop_in_time(self) -> None:
        self._in_time = self._stop_at is None
        self._stop(math.inf)

    def _watch(self) -> None:
        self._await_stop()
        assert self._stop_at is not None
        if self._over.wait(max(self._stop_at - time.monotonic(), 0.0)) or not self._goodbye.acquire(blocking=False):
            return
        unsent, stats = self._in_hand, None
        if unsent:
            log.warning("gave the sample in hand up: not done %.3g s after it was told to stop",
                        time.monotonic() - self._stopped_at)  # fmt: skip
        if self._producer is not None:
            with suppress(SynthbrokerError):
                unsent += self._producer.leave(flush_s=0.0)
            stats = self._producer.stats
        self.report(Result("left", stats, unsent, in_time=self._in_time))
        self._too_late = True
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        Event().wait(_UNWIND_S)  # this thread ends with the process
        os._exit(0)

    def _await_stop(self) -> None:
        """Block until something stops us: a signal, the parent's death, the end of the job; tell of room meanwhile."""
        parent = multiprocessing.parent_process()
        told = [self._wake_read, *([parent.sentinel] if parent else [])]
        tells = self._order.limits.idle_s is not None
        while True:
            left_s = self._clock.left_s()
            if left_s is not None and left_s <= 0:
                return self._stop_in_time()
            wait_s = TELL_EVERY_S if tells else _LONGEST_WAIT_S
            if connection.wait(told, wait_s if left_s is None else min(wait_s, left_s)):
                return self._stop(self._order.grace_s)
            if tells and self._producer is not None:
                self.report(Blocked(self._producer.pace.blocked_for_s))


class _ToParent(logging.Handler):
    """Sends log lines to the parent, whose logging is the one that the user has set up."""

    def __init__(self, send: Callable[[LogLine], None]) -> None:
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        self._send(LogLine(record.levelno, self.format(record)))


class _CannotStartError(ValueError):
    """The target names no generator, or the device is not there."""


def load(target: Target) -> Callable[[WorkerInfo], Iterable[Any]]:
    """Find the generator, with the current directory on `sys.path`.

    Raises:
        ValueError: It names none; says what is missing.
        Exception: Whatever importing the user's module raises.
    """
    if not isinstance(target, str):
        return target
    module_name, _, path = target.partition(":")
    if os.getcwd() not in sys.path:  # noqa: PTH109 - sys.path holds text
        sys.path.insert(0, os.getcwd())  # noqa: PTH109
    try:
        __import__(module_name)  # unlike importlib's, it leaves its own frames out of the user's traceback
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise _CannotStartError(f"there is no module {error.name!r} in {os.getcwd()} or on sys.path") from error  # noqa: PTH109
    found: Any = sys.modules[module_name]
    for name in path.split("."):
        found = getattr(found, name, None)
    if not callable(found):
        raise _CannotStartError(f"module {module_name!r} has no function {path!r}")
    generator: Callable[[WorkerInfo], Iterable[Any]] = found
    return generator


def _check_device(device: str | None) -> None:
    """Refuse a GPU that is not there; known only where the user's module has imported torch."""
    try:
        lanes.check_there(device)
    except ValueError as error:
        raise _CannotStartError(str(error)) from error


def _plain(error: Exception) -> Exception:
    """Make an error that can be pickled, whatever else it carries."""
    kinds: tuple[type[Exception], ...] = (
        (type(error),) if isinstance(error, SynthbrokerError) else (TypeError, ValueError)
    )
    return next(kind for kind in kinds if isinstance(error, kind))(str(error))


def _user_trace(error: BaseException | None) -> str:
    """Write the user's own traceback: without our frame, which comes first."""
    if error is None or error.__traceback__ is None:
        return repr(error)
    return "".join(traceback.format_exception(error.with_traceback(error.__traceback__.tb_next)))
