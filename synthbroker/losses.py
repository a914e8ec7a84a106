"""What a server lost, and how all go on with what it kept.

A server that was killed and read its log (AOF) again, or a replica that took over, is as it was a moment ago: each
script is one step, so it knows a first part of all that was done. What it forgot was of three kinds, and each would be
a lie if all went on as before:

- Commits. Their numbers would be given a second time, and an acknowledgement of the lost sample would settle the new
  one. So the ring's epoch counts on before anything is committed: whoever connects says to which server process
  (`run_id` of INFO) it has come, first of all, and the first to come to another one than the ring knows counts on
  (`arrive.lua`). That costs little, so nobody has to prove a loss; where the server does not name its process, a
  producer whose samples the server does not know is the proof. An epoch's name is its history: `ab12.57-4f3a9c` began
  as `ab12` and arrived at another process when 57 was the next number. Up to where the histories of two epochs part,
  numbers mean the same samples in both, also where a server forgot one of them altogether, with what was settled in
  it: acknowledgements of those go on to count, all others count for nothing. A producer is told how far the server has
  its samples, counts those that are missing, and sends what it still has.
- Deliveries. The samples would be given a second time. So the group is given nothing until each of its registered
  members has said what it holds (`settle.lua`), for 15 s at most: nobody waits longer than 5 s between two tries.
- Acknowledgements. They are said again, as far back as `MOST_REMEMBERED` samples. A sample that came, whose commit the
  server forgot and whose producer never had an answer, is sent again: the reader that had it knows it by its
  sequence number, and passes over it.

A server that comes back empty knows none of it: rings and groups are made anew, under an epoch of their own.
"""

import secrets
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from threading import Lock, RLock

from synthbroker.connection import run_id
from synthbroker.errors import RingMissingError
from synthbroker.line import Line
from synthbroker.replies import Given, Incarnation
from synthbroker.ring import Ring

MOST_REMEMBERED = 20_000
_AT_ONCE = 2000


def watch(ring: Ring) -> None:
    """Have the ring's connection tell, on each new line, to which server process it has come."""
    ring.connection.greet = partial(_greet, ring)


def arrive(ring: Ring, *, proven: bool = False) -> None:
    """Say to which server process we have come.

    Args:
        ring: The ring, which need not be there.
        proven: We know of samples that this server does not: its epoch counts on whatever process it is.
    """
    with ring.connection.line() as line:
        _greet(ring, line, proven=proven)


def _greet(ring: Ring, line: Line, *, proven: bool = False) -> None:
    line.script("arrive", ring.prefix + "meta", ring.epoch, run_id(line), int(proven), secrets.token_hex(3))


def floor(ring: Ring) -> int:
    """Say from which number on some group has yet to finish with samples; in a ring without groups: the oldest."""
    reply = ring.connection.script("floor", ring.prefix + "meta", ring.epoch)
    return int(reply[1]) if reply[0] == b"OK" else 0


def taken_from(ring: Ring, who: Incarnation) -> int:
    """Say how far the server has the samples of a producer; 0 where it does not know this life of it."""
    line = ring.connection.call("HGET", ring.prefix + "seqs", who.name)
    word, _, last = (line or b"").decode().partition(" ")
    return int(last) if word == who.word else 0


class Committed:
    """What a producer committed and some group has yet to finish with, as far as it knows."""

    def __init__(self) -> None:
        self._runs: deque[tuple[int, int]] = deque()  # number of the last of so many

    def add(self, newest: int, count: int) -> None:
        """Note that the last of so many samples has this number."""
        self._runs.append((newest, count))

    def forget_below(self, number: int) -> None:
        """Note that all groups are done with what is below a number."""
        while self._runs and self._runs[0][0] < number:
            self._runs.popleft()
        if self._runs:
            newest, count = self._runs[0]
            self._runs[0] = newest, min(count, newest - number + 1)

    def clear(self) -> int:
        """Forget it all; returns how many samples it was."""
        total = sum(count for _, count in self._runs)
        self._runs.clear()
        return total


class Memory:
    """What a reader was given, and what it acknowledged, lately: for a server that forgot it."""

    def __init__(self) -> None:
        self._given: deque[tuple[int, bytes]] = deque(maxlen=MOST_REMEMBERED)
        self._done: deque[int] = deque(maxlen=MOST_REMEMBERED)
        self._missed: deque[bytes] = deque(maxlen=MOST_REMEMBERED)
        self._lost: set[bytes] = set()
        self._told = 0
        self._lock = Lock()  # the training loop acknowledges while the reader settles
        self.telling = RLock()  # the server is told of one thing after the other: what is settled is not doubled

    def note_given(self, samples: Sequence[Given]) -> None:
        """Note what came; what is given again by `reuse` is nothing to settle."""
        with self._lock:
            self._given.extend([(one.number, _origin(one)) for one in samples if one.uses < 2])

    def note_missed(self, sample: Given) -> None:
        """Note that a sample was given and its payload was gone: if its producer sends it again, it is a new one."""
        with self._lock:
            if _origin(sample) in self._lost:
                self._lost.discard(_origin(sample))
            else:
                self._missed.append(_origin(sample))

    def note_done(self, numbers: Iterable[int]) -> Callable[[], bool]:
        """Note what is acknowledged now; what is returned says whether the server was told of it by `settle` since."""
        with self._lock:
            self._done.extend(numbers)
            told = self._told
        return lambda: self._told != told

    def acknowledge(self, ring: Ring, group: str, numbers: Sequence[int], epoch: str) -> Callable[[bool], None]:
        """Give what says, and says again, that samples are done with; see `Connection.keep_telling`."""
        told = self.note_done(numbers)

        def tell(again: bool) -> None:
            with self.telling:
                ring.acknowledge(group, numbers, epoch, again=again or told())

        return tell

    def came_before(self, sample: Given) -> bool:
        """Say whether a sample came before, under a number that the server has forgotten."""
        return bool(self._lost) and _origin(sample) in self._lost

    def settle(self, ring: Ring, group: str, who: Incarnation | None, epoch: str) -> None:
        """Tell the server what we know, in numbers of this epoch; may be repeated.

        Args:
            ring: The ring.
            group: Whose samples these are.
            who: Who holds those that are not acknowledged; None where others do, who will say so.
            epoch: The one that they were given in.
        """
        with self.telling:
            with self._lock:
                self._told += 1
                done = set(self._done)
                held = [number for number, _ in self._given if number not in done]
            for some in _chunks(sorted(done)):
                _settle(ring, epoch, group, "", last=False, numbers=some)
            if who is not None:
                say(ring, epoch, group, str(who), held)

    def forget_from(self, bound: int) -> None:
        """Forget what the server has lost: all from this number on."""
        with self._lock:
            self._lost = {origin for number, origin in self._given if number >= bound}.difference(self._missed)
            self._missed.clear()
            self._given = deque([one for one in self._given if one[0] < bound], MOST_REMEMBERED)
            self._done = deque([number for number in self._done if number < bound], MOST_REMEMBERED)


def say(ring: Ring, epoch: str, group: str, who: str, held: Iterable[int] = ()) -> None:
    """Say what a member of a group holds, and that this is all: others need not wait for it, or for who is late."""
    for some in _chunks(held):
        _settle(ring, epoch, group, who, last=False, numbers=some)
    _settle(ring, epoch, group, who, last=True, numbers=())


def current_epoch(ring: Ring) -> str:
    """Read the ring's epoch, without believing in it yet; empty where there is no ring."""
    return (ring.connection.call("HGET", ring.prefix + "meta", "epoch") or b"").decode()


def _settle(ring: Ring, epoch: str, group: str, who: str, *, last: bool, numbers: Sequence[int]) -> None:
    reply = ring.connection.script("settle", ring.prefix + "meta", epoch, group, who, int(last), *numbers)
    if reply[0] == b"NORING":
        raise RingMissingError(f"ring {ring.name!r} on {ring.connection.where} was made anew")


def _origin(sample: Given) -> bytes:
    return sample.fields.get(b"from", b"") + b" " + sample.fields.get(b"seq", b"")


def _chunks(numbers: Iterable[int]) -> Iterator[list[int]]:
    rest = iter(numbers)
    while some := list(islice(rest, _AT_ONCE)):
        yield some
