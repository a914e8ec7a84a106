"""What a reader does when nobody makes samples any more: that is decided, and said, never slipped into.

Producers live while their heartbeat, by the server's clock, is younger than `SILENT_AFTER_S` and they have not said
goodbye. While one lives, samples are given again as `reuse` allows, silently: that is what it is for. (A generator that
hangs still has a heart; so nothing fresh for `wait_s` is told, too, and again after twice, four times, … as long.) Once
none lives and the ring has not ended, `on_starve` decides:

| `on_starve` | |
| --- | --- |
| "wait" | only fresh samples count: none is given again; warns each minute, StarvedError after `wait_s` |
| "raise" | StarvedError as soon as nothing fresh came for `BEAT_S` (whoever closed may be about to end the ring) |
| "reuse" | goes on within `reuse`, and warns: at once, then after 1 min, 2, 4, …; with nothing left to reuse: "wait" |

Asking costs a reader one small command each few seconds, and only while nothing fresh comes. A server that was away
has heard nobody: after it came back, silence counts only when it has lasted for `SILENT_AFTER_S` anew.
"""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from synthbroker import ring as rings
from synthbroker import units
from synthbroker.errors import RingMissingError, StarvedError
from synthbroker.options import ReadOptions
from synthbroker.replies import Given, Reply
from synthbroker.ring import Ring

log = logging.getLogger("synthbroker")

SILENT_AFTER_S = 30.0
FIRST_AGAIN_S = 60.0
_MOST_NAMED = 8
_PROMPT_S = 1.0  # how often is looked where somebody waits for the answer


@dataclass(frozen=True)
class Maker:
    """A producer, as it was last heard of; `state` is "alive" unless it said goodbye."""

    name: str
    where: str
    state: str
    seen_s: float

    @property
    def lives(self) -> bool:
        """Whether samples may come from it."""
        return self.state == "alive" and self.seen_s < SILENT_AFTER_S

    def __str__(self) -> str:
        gone = f"{self.state}, " if self.state != "alive" else ""
        return f"producer {self.name}{self.where} {gone}last seen {units.format_duration(self.seen_s)} ago"


@dataclass(frozen=True)
class Life:
    """Who makes samples for a ring.

    Attributes:
        ended: The ring has ended: nobody needs to.
        live: Samples in it.
        newest_s: Age of the newest in seconds, None in an empty ring.
        known: How many producers are known.
        makers: Those who live, and some who do not, latest first.
    """

    ended: bool
    live: int
    newest_s: float | None
    known: int
    makers: tuple[Maker, ...]

    @property
    def lives(self) -> bool:
        """Whether samples may still come."""
        return any(maker.lives for maker in self.makers)

    @property
    def silent(self) -> bool:
        """Whether one is among them that went without a word."""
        return any(maker.state == "alive" for maker in self.makers)

    def __str__(self) -> str:
        named = [str(maker) for maker in self.makers[:_MOST_NAMED]]
        more = [f"and {self.known - len(named)} more"] if self.known > len(named) else []
        newest = [] if self.newest_s is None else [f"newest sample {units.format_duration(self.newest_s)} old"]
        done = not self.ended and self.makers and all(maker.state == "closed" for maker in self.makers)
        cure = ["if no more come, say so with `synthbroker end`, or `producers=` when the ring is made"] if done else []
        return "; ".join([*(named or ["no producer is known"]), *more, *newest, *cure])


def look(ring: Ring) -> Life:
    """Ask who makes samples.

    Raises:
        RingMissingError: There is no such ring any more.
    """
    key = ring.prefix + "meta"
    reply = ring.connection.script("life", key, ring.epoch, SILENT_AFTER_S, _MOST_NAMED)
    if reply[0] == b"NORING":
        raise RingMissingError(f"ring {ring.name!r} on {ring.connection.where} was made anew")
    now_s = float(reply[1])
    makers = [_maker(reply[i : i + 3], now_s) for i in range(6, len(reply), 3)]
    makers.sort(key=lambda maker: (not maker.lives, maker.seen_s))
    return Life(reply[2] == b"1", int(reply[3]), _age(reply[4], now_s), int(reply[5]), tuple(makers))


def _age(made: bytes, now_s: float) -> float | None:
    try:
        return max(now_s - float(made), 0.0)
    except ValueError:
        return None  # there is none, or it is none of ours


def _maker(told: Reply, now_s: float) -> Maker:
    name, seen, about = told
    try:
        said = json.loads(about)
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        said = {}  # whoever may write to the ring may write this
    where = f" on host {str(said['host'])[:100]} (pid {said.get('pid')})" if "host" in said else ""
    state = next((word for word in ("left", "closed") if said.get("state") == word), "alive")
    return Maker(name.decode(errors="replace"), where, state, max(now_s - float(seen), 0.0))


class Starving:
    """Decides for one reader; see the table above.

    Args:
        ring: The ring.
        options: How it is read.

    Attributes:
        fresh_only: Whether samples are not to be given again now.
    """

    def __init__(self, ring: Ring, options: ReadOptions) -> None:
        self._ring, self._options = ring, options
        self._what = f"ring {ring.name!r}, group {options.group!r}"
        self.fresh_only = False
        self.heard()
        self.fresh()

    def heard(self) -> None:
        """The server was away, or we were: nobody is dead for having been silent until now."""
        self._silence_counts_at = time.monotonic() + SILENT_AFTER_S

    def fresh(self) -> None:
        """Something came that was not given before."""
        self.fresh_only = False
        self._again = self._most_uses = 0
        self._fresh_at = time.monotonic()
        self._look_at = self._fresh_at + rings.BEAT_S
        self._warn_at, self._warn_after_s = 0.0, FIRST_AGAIN_S
        self._slow_after_s = self._options.wait_s

    def came(self, samples: Sequence[Given]) -> None:
        """Samples came.

        Raises:
            StarvedError: They were all given before, nobody makes new ones, and the user wants to know.
        """
        if not samples:
            return
        if any(sample.uses < 2 for sample in samples):
            self.fresh()
            return
        self._again += len(samples)
        self._most_uses = max(self._most_uses, *(sample.uses for sample in samples))
        if time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + rings.BEAT_S
            self._judge()

    def begun(self, holding: int) -> str:
        """Say that so many samples wait for the rest of their batch, and what would give them out; empty for none."""
        if not holding:
            return ""
        whole, ring = self._options.batch_size, self._ring.name
        return f"{holding} of the {whole} samples of a batch are here, which `synthbroker end {ring}` would give out; "

    def nothing(self) -> Life:
        """Look who is there, as nothing came at all.

        Raises:
            StarvedError: Nobody, and the user wants to know at once.
        """
        life = look(self._ring)
        if life.lives or life.ended:
            self.fresh_only = False
        elif self._options.on_starve == "raise" and life.known and self._is_certain(life):
            raise StarvedError(f"{self._what}: nobody makes samples any more; {life}")
        return life

    def look_again(self) -> bool:
        """Say whether it is time to look who is there, though nothing came a moment ago, too."""
        now = time.monotonic()
        due = now >= self._look_at and (self.fresh_only or self._options.on_starve == "raise")
        if due:
            self._look_at = now + _PROMPT_S
        return due

    def _is_certain(self, life: Life) -> bool:
        return not life.silent or time.monotonic() >= self._silence_counts_at

    def _judge(self) -> None:
        life = look(self._ring)
        if life.ended:
            return
        if life.lives or not self._is_certain(life):
            self._say_slow(life)
        elif self._options.on_starve == "raise":
            raise StarvedError(f"{self._what}: nobody makes samples any more; {life}; {self._reused(life)}")
        elif self._options.on_starve == "wait":
            self.fresh_only = True
            log.warning("%s: nobody makes samples any more, and on_starve='wait': waiting for fresh ones instead of "
                        "giving out the old ones again; %s; %s", self._what, life, self._reused(life))  # fmt: skip
        elif time.monotonic() >= self._warn_at:
            if self._warn_at:
                self._warn_after_s *= 2
            self._warn_at = time.monotonic() + self._warn_after_s
            log.warning("%s: nobody makes samples any more, going on with old ones; %s; %s", self._what, life,
                        self._reused(life))  # fmt: skip

    def _say_slow(self, life: Life) -> None:
        """Producers live, and nothing comes of it."""
        since_s = time.monotonic() - self._fresh_at
        if since_s >= self._slow_after_s:
            self._slow_after_s *= 2
            log.warning("%s: nothing fresh for %s, going on with old samples; %s; %s", self._what,
                        units.format_duration(since_s), life, self._reused(life))  # fmt: skip

    def _reused(self, life: Life) -> str:
        """Say how worn the samples are; with reuse "inf" nobody counts the uses of each."""
        uses = self._again / max(life.live, 1)
        most = "" if self._options.reuse_text() == "inf" else f", one of them has been used {self._most_uses} times"
        return (
            f"since the last fresh sample, {units.format_duration(time.monotonic() - self._fresh_at)} ago, this reader "
            f"was given {self._again} old ones: {uses:.3g} for each of the {life.live} in the ring{most}"
        )
