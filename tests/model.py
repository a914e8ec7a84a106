"""A ring as a plain Python object: what the scripts promise, written a second time and as plainly as possible."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from model_group import Drawn, Group, TrainingRun

NOBODY = frozenset({""})
Holders = frozenset[str]  # the groups that hold a full ring up, any of which may be named


@dataclass
class Lease:
    """Room that a producer has reserved."""

    cost: int
    count: int
    over: bool = False


class Model:
    """The ring."""

    def __init__(self, *, block: bool, capacity: int, max_samples: int, producers: int) -> None:
        self.block, self.capacity, self.max_samples, self.expected = block, capacity, max_samples, producers
        self.first, self.next = 1, 1
        self.live: dict[int, tuple[int, str]] = {}  # cost, and who made it
        self.leases: dict[str, Lease] = {}
        self.seqs: dict[str, tuple[str, int]] = {}
        self.groups: dict[str, Group] = {}
        self.ended = False
        self.closed: set[str] = set()
        self.closings = 0
        self.duplicates = 0
        self.waiting: tuple[int, int] | None = None

    # -- room

    @property
    def bytes(self) -> int:
        return sum(cost for cost, _ in self.live.values())

    def leased(self) -> tuple[int, int]:
        return sum(one.cost for one in self.leases.values()), sum(one.count for one in self.leases.values())

    def fits(self, cost: int, count: int, *, emptied: bool = False) -> bool:
        leased_cost, leased_count = self.leased()
        live_cost, live = (0, 0) if emptied else (self.bytes, len(self.live))
        by_samples = not self.max_samples or live + leased_count + count <= self.max_samples
        return live_cost + leased_cost + cost <= self.capacity and by_samples

    def floor(self) -> tuple[int, Holders]:
        if not self.block:
            return self.next, NOBODY
        lowest = min((group.keep() for group in self.groups.values()), default=self.first)
        holders = frozenset(name for name, group in self.groups.items() if group.keep() == lowest)
        return max(lowest, self.first), holders or NOBODY

    def make_room(self, cost: int, count: int, needed: int = 0, kept: int = 0) -> tuple[bool, Holders]:
        """Evict until there is room, but not the sample numbered `kept`, nor what is behind it."""
        if self.fits(cost, count) and not needed:
            return True, NOBODY
        self.leases = {name: lease for name, lease in self.leases.items() if not lease.over}
        if not self.fits(cost, count, emptied=True):
            return False, NOBODY
        (floor, holders), target = self.floor(), self.bytes - needed
        while not self.fits(cost, count) or self.bytes > target:
            if self.first >= floor or not self.live or self.first == kept:
                return self.fits(cost, count) and self.bytes <= target, holders
            self.evict()
        return True, NOBODY

    def evict(self) -> None:
        for group in self.groups.values():
            if self.first > group.reach:
                group.count("lost")
            holder = group.pending.pop(self.first, None)
            if holder is not None:
                group.count("evicted_pending")
                run = holder.partition("/")[0]
                group.evicted |= {(run, self.first)} if run in group.runs else set()
            group.uses.pop(self.first, None)
        del self.live[self.first]
        self.first += 1

    # -- producers

    def join_producer(self, name: str, word: str, last: int) -> None:
        if self.seqs.get(name, ("", 0))[0] != word:
            self.leases.pop(name, None)
            self.seqs[name] = (word, last)

    def leave_producer(self, name: str, word: str, *, closed: bool) -> None:
        if self.seqs[name][0] != word:
            return
        self.leases.pop(name, None)
        self.waiting = None
        if closed and not self.ended and (not self.expected or name not in self.closed):
            self.closed.add(name)
            self.closings += 1
            self.ended = 0 < self.expected <= self.closings

    def room(
        self, name: str, word: str, costs: Sequence[int], needed: int = 0, *, some: bool = False
    ) -> tuple[str, Holders, int]:
        """Grant room for all samples, or the longest prefix; answers the word, who holds the ring up, for how many."""
        least = 1 if some else len(costs)
        if self.seqs[name][0] != word:
            return "SHUT", NOBODY, 0
        if self.ended:
            return "ENDED", NOBODY, 0
        if sum(costs[:least]) > self.capacity:
            return "TOOBIG", NOBODY, 0
        self.leases.pop(name, None)
        holders = NOBODY
        for count in range(len(costs), least - 1, -1):
            cost = sum(costs[:count])
            if some and (cost > self.capacity or (self.max_samples and count > self.max_samples)):
                continue  # could not even fit alone
            granted, holders = self.make_room(cost, count, needed)
            if granted:
                self.leases[name] = Lease(cost, count)
                return "OK", NOBODY, count
        self.waiting = (sum(costs[:least]), least)
        return "FULL", holders, 0

    def commit(
        self,
        name: str,
        word: str,
        samples: Sequence[tuple[int, int]],
        sharers: Collection[int] = (),
        ahead: tuple[int, int] = (0, 0),
    ) -> tuple[str, int, Holders, int]:
        """Take samples, given as sequence number and cost.

        Answers the word, the last one taken, who holds the ring up, and for how many of those `ahead` there is a lease.

        Of those whose sequence numbers are in `sharers`, one that shares a part stays until the next one is taken.
        """
        if self.seqs[name][0] != word:
            return "SHUT", 0, NOBODY, 0
        before, stopped, holders = self.next, "OK", NOBODY
        fresh: list[tuple[int, int]] = []
        for seq, cost in samples:
            last = self.seqs[name][1]
            if seq <= last:
                self.duplicates += 1
                continue
            stopped = "ENDED" if self.ended else "GAP" if seq > last + len(fresh) + 1 else "OK"
            if stopped != "OK":
                break
            fresh.append((seq, cost))
        if fresh:
            total = sum(cost for _, cost in fresh)
            self._use_lease(name, total, len(fresh))
            self.make_room(total, len(fresh))
        kept = 0
        for seq, cost in fresh:
            granted, holders = self.make_room(cost, 1, kept=kept)
            if not granted:
                self.waiting, stopped = (cost, 1), "FULL"
                break
            self.live[self.next] = (cost, name)
            kept = self.next if seq in sharers else 0
            self.next += 1
            self.seqs[name] = (word, seq)
        leased = self._lease_ahead(name, *ahead) if stopped == "OK" else 0
        if self.next > before and not self.block:
            self.waiting = None
        return stopped, self.seqs[name][1], holders, leased

    def _lease_ahead(self, name: str, cost: int, count: int) -> int:
        if self.ended or not count:
            return 0
        self.leases.pop(name, None)
        if not self.fits(cost, count) and not (self.block and self.make_room(cost, count)[0]):
            return 0
        self.leases[name] = Lease(cost, count)
        return count

    def _use_lease(self, name: str, cost: int, count: int) -> None:
        lease = self.leases.get(name)
        if lease:
            lease.cost, lease.count = max(lease.cost - cost, 0), max(lease.count - count, 0)
            if not lease.cost and not lease.count:
                del self.leases[name]

    # -- readers

    def declare(self, name: str) -> None:
        self.groups[name] = Group("", self.first - 1, self.first - 1, self.first)

    def seats(self) -> list[tuple[str, str]]:
        """Give every group with each of its registered readers."""
        return [(name, reader) for name in sorted(self.groups) for reader in sorted(self.groups[name].registered)]

    def join_group(self, name: str, reader: str, reuse: str) -> bool:
        """Register a reader; False where the group is of another kind."""
        if name not in self.groups:
            self.declare(name)
        group = self.groups[name]
        group.reuse = group.reuse or reuse
        if group.reuse != reuse:
            return False
        group.registered[reader] = False
        group.consumers.add(reader)
        return True

    def take(
        self, name: str, reader: str, count: int, *, min_fill: int, claim: bool, only: str, given: list[Drawn]
    ) -> tuple[str, bool]:
        """Check what was given, and do likewise; answers the word, and whether the group holds its own ring up."""
        group = self.groups[name]
        if len(self.live) < min_fill and not self.ended:
            assert given == []
            return "EMPTY", self._held(group)
        expected = group.claim(reader, count, given) if claim else []
        if not self.block and not self.ended:
            self._step_forward(group, count)
        expected += self._fresh(group, reader, count - len(expected), only)
        drained = self.ended and max(group.reach, self.first - 1) >= self.next - 1
        assert given[: len(expected)] == expected
        again = given[len(expected) :]
        if group.limit > 1 and not (drained and group.limit == math.inf):
            group.draw_again(again, count - len(expected), range(self.first, self.next))
        else:
            assert again == []
        if given:
            return "OK", self._held(group)
        if drained:
            return "DRAINED" if group.awaited_by(reader) else "END", self._held(group)
        return "EMPTY", self._held(group)

    def _step_forward(self, group: Group, count: int) -> None:
        moved, live = self.first - group.front, len(self.live)
        unread = max(group.reach + 1, self.first)
        if moved > 0 and unread - self.first < max(math.ceil(live / 8), min(moved, count)):
            to = min(self.first + max(math.ceil(live / 4), min(count, live // 2)), self.next)
            group.count("lost", max(to - unread, 0))
            group.reach = max(group.reach, to - 1)
        group.front = max(group.front, self.first)

    def _fresh(self, group: Group, reader: str, count: int, only: str) -> list[Drawn]:
        fresh: list[Drawn] = []
        for number in range(max(group.reach + 1, self.first), self.next):
            if len(fresh) >= count:
                break
            group.reach = number
            group.count("delivered")
            if only and self.live[number][1] != only:
                group.count("acknowledged")
                group.count("skipped")
                self.waiting = None if self.block else self.waiting
                continue
            group.pending[number] = reader
            if 1 < group.limit < math.inf:
                group.uses[number] = 1
            fresh.append((number, 1))
        return fresh

    def _held(self, group: Group) -> bool:
        if not self.block or group.reach < self.next - 1 or not self.waiting or self.fits(*self.waiting):
            return False
        return bool(group.pending) and min(group.pending) <= self.first

    def acknowledge(self, name: str, numbers: Sequence[int], *, again: bool = False) -> tuple[int, int, int]:
        group = self.groups[name]
        acknowledged = doubled = late = 0
        for number in numbers:
            if group.pending.pop(number, None) is not None:
                acknowledged += 1
            elif number < self.first and not self.block:
                late += 1
            else:
                doubled += not again
        group.count("acknowledged", acknowledged)
        group.count("doubled", doubled)
        free = self.floor()[0] - self.first
        if self.block and free > 0 and (16 * free >= len(self.live) or group.reach >= self.next - 1):
            self.waiting = None
        return acknowledged, doubled, late

    # -- runs

    def finish(self, name: str, run: str, serial: float) -> tuple[int, int, int]:
        group = self.groups[name]
        known = group.runs[run].checkpoints
        settled: list[int] = []
        for one in known:
            if not one.done and one.serial <= serial:
                settled += one.numbers
                one.done = True
        for old in [one for one in known if one.done][:-16]:
            known.remove(old)
        group.evicted -= {(run, number) for number in settled}
        return self.acknowledge(name, settled)

    def resume(
        self, name: str, run: str, token: str, *, go_on: bool
    ) -> tuple[bool, bool, frozenset[int], frozenset[int]]:
        """Go on from a checkpoint; answers gone, known, what was acknowledged later, what was evicted."""
        group = self.groups[name]
        mine = group.runs.setdefault(run, TrainingRun())
        serial = int(token.partition(".")[0] or 0)
        known = not token or bool(mine.find(token))
        later = {n for one in mine.checkpoints if one.done and one.serial > serial for n in one.numbers}
        settled = {n for one in mine.checkpoints if not one.done and one.serial <= serial for n in one.numbers}
        evicted = {n for of, n in group.evicted if of == run} - (settled if known else set())
        said = (known, frozenset(later), frozenset(evicted))
        if not go_on and (later or evicted or not known):
            return True, *said
        if known:
            self.finish(name, run, serial)
        group.begin(run)
        return False, *said

    # -- the ring itself

    def end(self) -> None:
        self.ended, self.waiting = True, None

    def reopen(self) -> None:
        if self.ended:
            self.closed, self.closings = set(), 0
        self.ended = False

    def drop_group(self, name: str) -> None:
        del self.groups[name]
        self.waiting = None
