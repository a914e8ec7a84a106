"""Processes that play a scene together: fresh interpreters, begun at one moment, none left behind.

A part is a function of a module; it is called with a `Stage`, gets everything ready, waits in `Stage.begin` until all
parts are, and returns its figures.
"""

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from ctypes import c_long
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import RawArray
from threading import Thread
from typing import Any

from synthbroker.errors import SynthbrokerError

_Pipe = connection.Connection
_GOODBYE_S = 15.0  # how long a process may take to exit by itself


class Stage:
    """What a part sees of the others; `shared` is what it could not be sent."""

    MOST_VOICES = 8

    def __init__(self, pipe: "_Pipe[Any, Any]", flags: Any, shared: Any = None) -> None:
        self._pipe = pipe
        self._flags = flags  # plain shared memory: looking at it costs a loop nothing
        self.shared = shared

    def begin(self) -> None:
        """Wait until all parts are ready."""
        self._pipe.send(("ready", None))
        self._pipe.recv()

    def stop(self, voice: int = 0, voices: int = 1) -> None:
        """Tell all parts that the scene is over, as soon as all who have a voice say so; again is fine."""
        self._flags[2 + voice] = 1
        if all(self._flags[2 : 2 + voices]):
            self._flags[0] = 1

    @property
    def over(self) -> bool:
        """Whether somebody said so."""
        return bool(self._flags[0])

    @property
    def turn(self) -> int:
        """A number that one part sets and another one waits for."""
        turn: int = self._flags[1]
        return turn

    @turn.setter
    def turn(self, turn: int) -> None:
        self._flags[1] = turn


@dataclass(frozen=True)
class Part:
    """A function that is called with a `Stage` and these arguments; others are called when an `early` one is ready."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    early: bool = False


@dataclass(frozen=True)
class _Failure:
    said: str
    trace: str


@dataclass(frozen=True)
class _Actor:
    process: BaseProcess
    pipe: "_Pipe[Any, Any]"


class Troupe:
    """Plays scenes.

    Args:
        keep: Let processes play the next scene too, instead of starting fresh ones: quicker, less pure.
    """

    def __init__(self, *, keep: bool = False) -> None:
        self._keep = keep
        self._context = multiprocessing.get_context("spawn")
        self._flags = RawArray(c_long, 2 + Stage.MOST_VOICES)
        self._actors: list[_Actor] = []

    def play(self, *parts: Part, patience_s: float, shared: Any = None) -> list[Any]:
        """Play one scene and return what each part returned.

        Args:
            parts: All that run at the same time.
            patience_s: After so many seconds it is given up.
            shared: For `Stage.shared`: queues and locks, which only a process's birth can hand over.

        Raises:
            SynthbrokerError: A part failed, or took too long; its traceback is a note of it.
        """
        if shared is not None:
            self.close()
        self._flags[:] = [0] * len(self._flags)
        while len(self._actors) < len(parts):
            self._actors.append(self._start(shared))
        try:
            actors = self._actors[: len(parts)]
            ready = _call(actors, parts)
            results = _listen(actors, ready, time.monotonic() + patience_s)
        except BaseException:
            self.kill()
            raise
        if shared is not None or not self._keep:
            self.close()
        return results

    def close(self) -> None:
        """Let all processes end."""
        for actor in self._actors:
            actor.pipe.close()
        for actor in self._actors:
            actor.process.join(_GOODBYE_S)
        self.kill()

    def kill(self) -> None:
        """End all processes at once."""
        for actor in self._actors:
            if actor.process.exitcode is None:
                _kill_group(actor.process)
        self._actors.clear()

    def _start(self, shared: Any) -> _Actor:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_act, args=(theirs, self._flags, shared), name="synthbroker-bench")
        process.start()
        theirs.close()
        return _Actor(process, ours)


def _kill_group(process: BaseProcess) -> None:
    with suppress(ProcessLookupError):  # it may have no group of its own yet
        if process.pid is not None:
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def _call(actors: Sequence[_Actor], parts: Sequence[Part]) -> int:
    """Call all parts; returns how many of them are ready already."""
    ready = 0
    for early in True, False:
        for index, part in enumerate(parts):
            if part.early == early:
                actors[index].pipe.send(part)
                ready += early and _hear(actors[index].pipe, index, actors)[0] == "ready"
    return ready


def _listen(actors: Sequence[_Actor], ready: int, deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    by_pipe = {actor.pipe: index for index, actor in enumerate(actors)}
    while len(results) < len(actors):
        spoke = connection.wait(by_pipe, max(deadline - time.monotonic(), 0.0))
        if not spoke:
            raise SynthbrokerError("a process of the bench did not come to its end in time")
        for pipe in spoke:
            word, value = _hear(pipe, by_pipe[pipe], actors)  # type: ignore[index,arg-type]
            if word == "done":
                results[by_pipe[pipe]] = value  # type: ignore[index]
            ready += word == "ready"
        if ready == len(actors):
            ready = 0
            for actor in actors:
                actor.pipe.send("go")
    return [results[index] for index in range(len(actors))]


def _hear(pipe: "_Pipe[Any, Any]", index: int, actors: Sequence[_Actor]) -> tuple[str, Any]:
    try:
        word, value = pipe.recv()
    except (EOFError, ConnectionResetError):
        actors[index].process.join()
        code = actors[index].process.exitcode
        raise SynthbrokerError(f"a process of the bench ended by itself with status {code}") from None
    if word == "failed":
        failure = SynthbrokerError(value.said)
        failure.add_note(value.trace)
        raise failure
    return word, value


def _act(pipe: "_Pipe[Any, Any]", flags: Any, shared: Any) -> None:
    """Be a process: play part after part until the pipe is closed."""
    os.setsid()  # Ctrl-C is for the parent, which then ends us and all that we started, like a DataLoader's workers
    Thread(target=_end_with_parent, name="synthbroker-watch", daemon=True).start()
    # A DataLoader's workers start as they do in any training. Spawned, as we were, they may abort at their end: torch's
    # queue lets go of tensors in a thread that the interpreter does not wait for.
    multiprocessing.set_start_method(None, force=True)
    with suppress(EOFError, OSError):
        while True:
            part: Part = pipe.recv()
            try:
                answer = "done", part.function(Stage(pipe, flags, shared), *part.arguments)
            except Exception as error:  # noqa: BLE001 - told to the parent, whatever it is
                answer = "failed", _Failure(_in_a_line(error), traceback.format_exc())
            pipe.send(answer)


def _in_a_line(error: Exception) -> str:
    return str(error) if isinstance(error, SynthbrokerError | ValueError) else f"{type(error).__name__}: {error}"


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os.killpg(0, signal.SIGKILL)
