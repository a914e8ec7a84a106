"""Samples for a reader: a script says which ones are its own, the stream has their entries.

What is wanted next may be asked for before what came last is worked on; the server looks for it meanwhile.
"""

import itertools
import secrets
from collections.abc import Generator, Sequence
from typing import Any

from synthbroker import replies
from synthbroker.errors import RingMissingError, SynthbrokerError
from synthbroker.line import Line
from synthbroker.replies import Given, Incarnation, Reply, Taken
from synthbroker.ring import Ring


class Asked:
    """What was asked for: step by step its answers come in. What is dropped instead was given all the same.

    Args:
        steps: Each gives the line on which the next answer comes; in the end the script's first word, and what it gave.
    """

    def __init__(self, steps: Generator[Line, None, tuple[str, Taken | None]]) -> None:
        self._steps = steps
        self._line: Line | None = None
        self._found: tuple[str, Taken | None] = "", None
        self._error: SynthbrokerError | None = None
        self._step()

    def is_here(self) -> bool:
        """Go on as far as nobody has to wait for it; says whether everything has come, or gone wrong."""
        while self._line is not None and self._line.has_come():
            self._step()
        return self._line is None

    @property
    def in_order(self) -> Taken | None:
        """Samples that have come, with nothing in the way."""
        word, taken = self._found
        return taken if self._line is None and word == "OK" and taken is not None and taken.samples else None

    def answer(self) -> tuple[str, Taken | None]:
        """Wait for it: the script's first word, and what it gave; None where the word is another than those of `Taken`.

        Such a word is in the way: the consumer or its group must join first, say.

        Raises:
            SynthbrokerError: What went wrong.
        """
        while self._line is not None:
            self._step()
        if self._error is not None:
            raise self._error
        return self._found

    def _step(self) -> None:
        try:
            self._line = next(self._steps)
        except StopIteration as end:
            self._line, self._found = None, end.value
        except SynthbrokerError as error:
            self._line, self._error = None, error


def ask(
    ring: Ring,
    who: Incarnation,
    group: str,
    count: int,
    *,
    min_fill: int,
    claim_after_s: float,
    producers: Sequence[str],
    most: int = 0,
    fresh_only: bool = False,
) -> Asked:
    """Ask for up to `count` samples for a group.

    Args:
        ring: The ring.
        who: The consumer.
        group: Its group.
        count: So many are wanted.
        min_fill: Nothing is given before so many samples are in the ring.
        claim_after_s: Members silent for longer are dead, and theirs is given first; negative: do not look now.
        producers: Take only from these, if any are named.
        most: So many may be given where many more are waiting: a share of the backlog at a time.
        fresh_only: Nothing that was given before, whatever `reuse` allows.
    """
    seed, most = secrets.randbits(31), max(count, most)
    told = (group, who, count, min_fill, claim_after_s, seed, -most if fresh_only else most, *producers)
    return begin(ring, "take", told)


def begin(ring: Ring, script: str, told: Sequence[Any]) -> Asked:
    """Send a script that gives samples; what goes wrong shows when its answer is waited for."""
    return Asked(_giving(ring, script, told))


def _giving(ring: Ring, script: str, told: Sequence[Any]) -> Generator[Line, None, tuple[str, Taken | None]]:
    epoch = ring.epoch
    with ring.connection.line() as line:
        key, arguments = ring.prefix + "meta", (epoch, *told)
        line.send_script(script, key, *arguments)
        yield line
        reply = ring.checked(line.script_reply(script, key, *arguments))
        word = reply[0].decode()
        if word not in ("OK", "EMPTY", "DRAINED", "END", "UNSETTLED"):
            return word, None
        runs = list(zip(reply[4::3], reply[5::3], reply[6::3], strict=True))
        own = [run for run in runs if run[2] >= 0]
        found: dict[int, Reply] = {}
        if own:
            _ask_for_entries(ring, line, own)
            yield line
            found = _read_entries(ring, line, len(own), epoch)
    samples = tuple(
        [
            Given(number, uses, replies.fields_of(found[number]))
            for first, count, uses in own
            for number in range(first, first + count)
            if number in found
        ]
    )
    gone = sum([count for _, count, _ in own]) - len(samples)
    others = tuple([number for n, count, uses in runs if uses < 0 for number in range(n, n + count)])
    return word, Taken(word, float(reply[1]), reply[2].decode(), reply[3] == b"1", samples, gone, others)


def _ask_for_entries(ring: Ring, line: Line, runs: Sequence[tuple[int, int, int]]) -> None:
    ranges = [("XRANGE", ring.prefix + "samples", f"{n}-0", f"{n + count - 1}-0") for n, count, _ in runs]
    line.send(*ranges, ("HGET", ring.prefix + "meta", "epoch"))


def _read_entries(ring: Ring, line: Line, runs: int, epoch: str) -> dict[int, Reply]:
    """Read the entries of so many runs of samples, those that are there."""
    entries = list(itertools.chain.from_iterable([line.reply() for _ in range(runs)]))
    if line.reply() != epoch.encode():
        raise RingMissingError(f"ring {ring.name!r} on {ring.connection.where} was made anew")
    return {replies.number_of(entry_id): fields for entry_id, fields in entries if entry_id.endswith(b"-0")}
