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

# Sent, and not answered yet; what is closed instead was given all the same, as where a connection breaks.
Asked = Generator[None, None, tuple[str, Taken | None]]


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
    asked = _giving(ring, script, told)
    try:
        next(asked)
    except SynthbrokerError as error:
        asked = _failed(error)
        next(asked)
    return asked


def answer(asked: Asked) -> tuple[str, Taken | None]:
    """Wait for what was asked for: the script's first word, and what it gave; None where the word is another.

    Another word than those of `Taken` is in the way: the consumer or its group must join first, say.
    """
    try:
        next(asked)
    except StopIteration as end:
        found: tuple[str, Taken | None] = end.value
        return found
    raise AssertionError("it was answered")


def _failed(error: SynthbrokerError) -> Asked:
    yield
    raise error


def _giving(ring: Ring, script: str, told: Sequence[Any]) -> Asked:
    with ring.connection.line() as line:
        key, arguments = ring.prefix + "meta", (ring.epoch, *told)
        line.send_script(script, key, *arguments)
        yield
        reply = ring.checked(line.script_reply(script, key, *arguments))
        word = reply[0].decode()
        if word not in ("OK", "EMPTY", "DRAINED", "END", "UNSETTLED"):
            return word, None
        runs = list(zip(reply[4::3], reply[5::3], reply[6::3], strict=True))
        own = [run for run in runs if run[2] >= 0]
        found = _read_entries(ring, line, own)
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


def _read_entries(ring: Ring, line: Line, runs: Sequence[tuple[int, int, int]]) -> dict[int, Reply]:
    """Read the entries of runs of samples, those that are there."""
    if not runs:
        return {}
    ranges = [("XRANGE", ring.prefix + "samples", f"{n}-0", f"{n + count - 1}-0") for n, count, _ in runs]
    line.send(*ranges, ("HGET", ring.prefix + "meta", "epoch"))
    entries = list(itertools.chain.from_iterable([line.reply() for _ in runs]))
    if line.reply() != ring.epoch.encode():
        raise RingMissingError(f"ring {ring.name!r} on {ring.connection.where} was made anew")
    return {replies.number_of(entry_id): fields for entry_id, fields in entries if entry_id.endswith(b"-0")}
