"""Parts on their way to a reader: asked for ahead of receiving them, one behind the other."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

from synthbroker.connection import Connection
from synthbroker.line import Line
from synthbroker.wire import Slice

_AHEAD_BYTES = 2 * 2**20  # asked for and not yet here: the server holds it all in memory besides


class Inflow:
    """Receives parts in the order in which they were wanted.

    What has been asked for is under way on a connection of its own, so that the server has the next sample's bytes
    ready while this one's are looked at, and while other commands are carried out. (Samples of 4 MiB, one by one:
    an eighth more than asking for each sample when its turn comes.)

    Args:
        connection: The way to the server.
        command: Writes the command that reads a slice.
    """

    def __init__(self, connection: Connection, command: Callable[[Slice], Sequence[Any]]) -> None:
        self._connection, self._command = connection, command
        self._wanted: deque[Slice] = deque()
        self._asked: deque[Slice] = deque()
        self._ahead_bytes = 0
        self._line: Line | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def want(self, slices: Iterable[Slice]) -> None:
        """Say what is wanted after all that was wanted before."""
        self._wanted.extend(slices)

    def receive(self, pieces: Sequence[memoryview]) -> bool:
        """Receive the next part into memory; says whether it was there, in that length.

        Raises:
            ServerError: As for `Connection.call`; then nothing is wanted any more.
        """
        try:
            with self._connection.translating():
                line = self._line = self._line or self._connection.borrow()
                self._ask(line)
                there = line.receive(pieces, more=len(self._asked) > 1)
        except BaseException:
            self.clear()
            raise
        self._ahead_bytes -= self._asked.popleft().size
        if not (self._asked or self._wanted):
            self._connection.give_back(line)
            self._line = None
        return there

    def clear(self) -> None:
        """Want nothing any more; what is under way is lost with its line."""
        self._wanted.clear()
        self._asked.clear()
        self._ahead_bytes = 0
        if self._line is not None:
            self._line.drop()
            self._line = None

    def _ask(self, line: Line) -> None:
        """Ask for what comes next, half a window at a time."""
        if self._ahead_bytes > _AHEAD_BYTES // 2:
            return
        commands = []
        while self._wanted and (not self._asked or self._ahead_bytes + self._wanted[0].size <= _AHEAD_BYTES):
            one = self._wanted.popleft()
            self._asked.append(one)
            self._ahead_bytes += one.size
            commands.append(self._command(one))
        if commands:
            line.send(*commands)
