"""Parts on their way to a reader: asked for ahead of receiving them, large samples over two connections at once."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Self

from synthbroker.connection import Connection
from synthbroker.hand import Hand
from synthbroker.line import Line
from synthbroker.wire import Slice

_AHEAD_BYTES = 2 * 2**20  # asked for and not yet here, by each connection: the server holds it all in memory besides
_SPLIT_BYTES = 4 * 2**20  # what is less, like most samples, comes over one connection: handing some over costs as much


class Inflow:
    """Receives parts in the order in which they were wanted.

    What has been asked for is under way on connections of their own, so that the server has the next sample's bytes
    ready while this one's are looked at, and while other commands are carried out. (Samples of 4 MiB, one by one:
    an eighth more than asking for each sample when its turn comes.)

    A server serves its connections in turn, and a socket holds less than a part: a reader with two gets as many turns
    as a producer beside it, and while one socket is filled the other is emptied. So every other part of a large sample
    comes over a second connection, which another thread reads.

    Args:
        connection: The way to the server.
        command: Writes the command that reads a slice.
        between: Called by the thread that receives, before each part of its own.
        connections: How many there are.
    """

    def __init__(
        self,
        connection: Connection,
        command: Callable[[Slice], Sequence[Any]],
        between: Callable[[], None] = lambda: None,
        connections: int = 2,
    ) -> None:
        self._flows = [_Flow(connection, command) for _ in range(connections)]
        self._between = between
        self._turns: deque[int] = deque()  # the connection of each part that is wanted
        self._hand = Hand("synthbroker-flow")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()
        self.end()

    def want(self, slices: Iterable[Slice]) -> None:
        """Say which parts of one sample are wanted, after all that was wanted before."""
        slices = list(slices)
        flows = len(self._flows) if sum([one.size for one in slices]) >= _SPLIT_BYTES else 1
        for i, one in enumerate(slices):
            self._turns.append(i % flows)
            self._flows[i % flows].want(one)

    def receive(
        self, parts: Sequence[Sequence[memoryview]], came: Callable[[int], None] = lambda _: None
    ) -> list[bool]:
        """Receive the next parts, of one sample, into memory.

        Args:
            parts: The memory of each, in pieces.
            came: Called with the place of each part in `parts` when it has come, by whatever thread received it.

        Returns:
            For each whether it was there, in that length.

        Raises:
            ServerError: As for `Connection.call`; then nothing is wanted any more.
        """
        turns = [self._turns.popleft() for _ in parts]
        there = [False] * len(parts)

        def receive_by(flow: int, between: Callable[[], None]) -> None:
            for i, turn in enumerate(turns):
                if turn == flow:
                    between()
                    there[i] = self._flows[flow].receive(parts[i])
                    if there[i]:
                        came(i)

        try:
            if any(turns):
                with self._hand.doing(partial(receive_by, 1, lambda: None), self._flows[1].cut):
                    receive_by(0, self._between)
            else:
                receive_by(0, self._between)
        except BaseException:
            self.clear()
            raise
        return there

    def end(self) -> None:
        """Receive nothing more."""
        self._hand.end()

    def clear(self) -> None:
        """Want nothing any more; what is under way is lost with its lines."""
        self._turns.clear()
        for flow in self._flows:
            flow.clear()


class _Flow:
    """Parts that come over one connection, one behind the other."""

    def __init__(self, connection: Connection, command: Callable[[Slice], Sequence[Any]]) -> None:
        self._connection, self._command = connection, command
        self._wanted: deque[Slice] = deque()
        self._asked: deque[Slice] = deque()
        self._ahead_bytes = 0
        self._line: Line | None = None

    def want(self, one: Slice) -> None:
        """Say what is wanted after all that was wanted before; also while another thread receives."""
        self._wanted.append(one)

    def receive(self, pieces: Sequence[memoryview]) -> bool:
        """Receive the next part; says whether it was there, in that length."""
        with self._connection.translating():
            line = self._line = self._line or self._connection.borrow()
            self._ask(line)
            there = line.receive(pieces, more=len(self._asked) > 1)
        self._ahead_bytes -= self._asked.popleft().size
        if not (self._asked or self._wanted):
            self._line = None
            self._connection.give_back(line)
        return there

    def cut(self) -> None:
        """Make whoever receives fail."""
        line = self._line
        if line is not None:
            line.cut()

    def clear(self) -> None:
        """Want nothing any more."""
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
