"""The worker processes of `generate`, seen from their parent: started, listened to, stopped, and never left behind."""

import logging
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection, resource_tracker
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

from synthbroker.errors import GeneratorError
from synthbroker.units import format_duration
from synthbroker.worker import Blocked, LogLine, Order, Result, name_of, work

log = logging.getLogger("synthbroker")

_KILL_AFTER_S = 5.0  # beyond the grace, for workers that do not even see the signal; SLURM kills after 30 s
_SECOND_SIGNAL_AFTER_S = 0.5  # `timeout` and SLURM may send the same one twice in a row
_LOOK_EVERY_S = 1.0  # at processes whose end was not told, because their own children hold the pipe open


class Crew:
    """Workers, one for each order.

    Args:
        orders: What they are to do; limits and signals of all are those of the first.
        grace_s: How long they may take to finish when they are stopped, in seconds.

    Attributes:
        results: How those that have ended and could say so did.
        signal: What stopped them, if a signal did.
        idle_for_s: How long none of them had had room, if they were stopped for that.
    """

    def __init__(self, orders: Sequence[Order], *, grace_s: float) -> None:
        self._orders = orders
        self._grace_s = grace_s
        self._workers: list[tuple[BaseProcess, connection.Connection[Any, Any]]] = []
        self._running: set[int] = set()
        self._told: set[int] = set()
        self._stopping_since: float | None = None
        self._failure: Exception | None = None
        self._signals, self._idle_s = orders[0].signals, orders[0].limits.idle_s
        self._blocked: dict[int, float] = {}  # since when those have had no room that have none
        self.results: list[Result] = []
        self.signal: int | None = None
        self.idle_for_s: float | None = None

    @property
    def stopped(self) -> str | None:
        """Why they stopped: "signal", "idle", "time" (their job ends), "ended" (the ring); None: nothing more came."""
        if self.signal is not None:
            return "signal"
        if self.idle_for_s is not None:
            return "idle"
        if any(result.state == "ended" for result in self.results):
            return "ended"
        return "time" if any(result.in_time for result in self.results) else None

    def run(self) -> None:
        """Start all, and come back when all have ended.

        Raises:
            GeneratorError: A worker's generator raised, or a worker died.
            SynthbrokerError, TypeError, ValueError: What else the first worker to fail met.
        """
        try:
            with _taken_signals(self._signals) as signals:
                self._start()
                while self._running:
                    watched = [
                        item for i in self._running for item in (self._workers[i][0].sentinel, self._workers[i][1])
                    ]
                    if signals in connection.wait([signals, *watched], _LOOK_EVERY_S):
                        self._on_signal(os.read(signals, 1)[0])
                    for index in list(self._running):
                        self._look_after(index)
                    self._stop_idle()
                    self._kill_overdue()
        finally:
            self._kill()
        if self._failure is not None:
            raise self._failure

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        # A worker is born with them blocked, and takes them when it can handle them. So is the tracker, which SLURM may
        # send them, too; starting it unblocks some.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)
        try:
            for index, order in enumerate(self._orders):
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=work, args=(order, theirs), name=f"synthbroker-w{index}")
                process.start()
                theirs.close()
                self._workers.append((process, ours))
                self._running.add(index)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _look_after(self, index: int) -> None:
        process, pipe = self._workers[index]
        exited = process.exitcode is not None  # asked first: what it said before is in the pipe then
        with suppress(EOFError):
            while pipe.poll():
                self._hear(index, pipe.recv())
        if not exited:
            return
        self._running.discard(index)
        pipe.close()
        if index not in self._told and self._stopping_since is None:
            self._fail(GeneratorError(f"worker {index} {_how(process.exitcode)}"))

    def _hear(self, index: int, message: LogLine | Blocked | Result) -> None:
        if isinstance(message, LogLine):
            log.log(message.level, "worker %d: %s", index, message.text)
            return
        if isinstance(message, Blocked):
            self._blocked.pop(index, None)
            if message.seconds:
                self._blocked[index] = time.monotonic() - message.seconds
            return
        self._told.add(index)
        self.results.append(message)
        if message.state == "ended" and self._stopping_since is None:
            self._stop()  # the others make samples that nobody takes
        if message.state == "failed":
            self._fail(_failure_of(index, name_of(self._orders[index].target), message))

    def _fail(self, failure: Exception) -> None:
        if self._failure is not None:
            return  # the others mostly fail for the same reason
        self._failure = failure
        for note in getattr(failure, "__notes__", ()):
            log.error("%s\n%s", failure, note)
        self._stop()

    def _on_signal(self, number: int) -> None:
        name = signal.Signals(number).name
        if self._stopping_since is None:
            self.signal = number
            log.warning("%s: finishing the samples in hand; a second one ends at once", name)
            self._stop()
        elif time.monotonic() - self._stopping_since > _SECOND_SIGNAL_AFTER_S:
            log.warning("%s again: ending at once, what is on its way is lost", name)
            self._kill()

    def _stop_idle(self) -> None:
        """Stop where none of those that run has had room for `idle_s`; one that makes its sample has not asked yet."""
        if self._idle_s is None or self._stopping_since is not None or not self._running <= self._blocked.keys():
            return
        since = max((self._blocked[index] for index in self._running), default=math.inf)
        if time.monotonic() - since >= self._idle_s:
            self.idle_for_s = time.monotonic() - since
            self._stop()

    def _stop(self) -> None:
        self._stopping_since = time.monotonic()
        for index in self._running:
            self._workers[index][0].terminate()

    def _kill_overdue(self) -> None:
        overdue_s = self._grace_s + _KILL_AFTER_S
        if self._running and self._stopping_since and time.monotonic() - self._stopping_since > overdue_s:
            late = len(self._running - self._told)  # the others have said all, and only do not end
            if late:
                log.warning("%d workers did not stop within %s: killed", late, format_duration(overdue_s))
            self._kill()

    def _kill(self) -> None:
        for process, _ in self._workers:
            if process.exitcode is None:
                process.kill()
                process.join()


@contextmanager
def _taken_signals(numbers: Sequence[int]) -> Iterator[int]:
    """Take signals meanwhile; give the end of a pipe from which their numbers come, a byte each."""
    read, write = os.pipe()

    def handler(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - as the signal module calls it
        os.write(write, bytes([number]))

    before = {}
    try:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            before = {number: signal.signal(number, handler) for number in numbers}
        yield read
    finally:
        for number, old in before.items():
            signal.signal(number, old)
        os.close(read)
        os.close(write)


def _failure_of(index: int, target: str, result: Result) -> Exception:
    """Make the error that the caller gets; where a line does not say all, the traceback is a note of it."""
    if result.error is not None:
        return type(result.error)(f"worker {index} of {target}: {result.error}")
    last_line = result.trace.strip().rpartition("\n")[2]
    failure = GeneratorError(f"worker {index} of {target} failed: {last_line}")
    failure.add_note(result.trace)
    return failure


def _how(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        hint = " (out of memory?)" if exit_code == -signal.SIGKILL else ""
        return f"was ended by {signal.Signals(-exit_code).name}{hint}"
    return f"ended by itself with status {exit_code}"
