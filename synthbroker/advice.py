"""One plain sentence about a ring, from who waits for whom.

The policy (ours; nobody has written one down that we know of): a side waits where it spent a tenth of its time lately
(`shares`) on waiting. Generators wait while the ring has no room for what they have made; training waits while it has
no batch. Which of them waits says what is short, and two more shares say why:

| generators wait | training waits | and | what is short |
| --- | --- | --- | --- |
| no | no | | nothing |
| yes | no | | training: fewer generators would do |
| no | yes | its readers find nothing in the ring | generators |
| no | yes | the same, and generators spend half of their time sending | the way into the broker |
| no | yes | its readers find enough | the way out of the broker, or unpacking |
| yes | yes | its readers find nothing, another group has something left to read | that group |
| yes | yes | its readers find nothing, and no other group is behind | room: they wait in turn |
| yes | yes | its readers find enough | the way out of the broker, or the broker |

How many generators are needed is reckoned from the shares: of n that are blocked for a share b of their time, n (1 - b)
would make as much; training that starves for a share s takes n / (1 - s) such generators.

Shares are what a process said of itself with its last heartbeat. Who missed one may be dead, though it counts as alive
until `SILENT_AFTER_S`: what it said then is left out, and the advice says so; where nobody else is there, it says only
that. Nor does a process that has just begun know its shares.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

from synthbroker import units
from synthbroker.ring import BEAT_S
from synthbroker.starving import SILENT_AFTER_S
from synthbroker.states import ConsumerStatus, GroupStatus, ProducerStatus, RingStatus

WAITS = 0.1
SENDS = 0.5
_LOSES = 0.2
_KNOWS_ITSELF_S = 1.0
_MOST_STARVED = 0.9  # beyond it the number of generators that are needed is anybody's guess


@dataclass(frozen=True)
class Unheard:
    """Members that count as alive, and of which nothing was heard for longer than heartbeats take.

    Attributes:
        what: What each of them is.
        of_group: Of which group, as words; empty for generators.
        count, alive: So many of those that count as alive.
        since_s: For so long at least, in seconds.
    """

    what: str
    of_group: str
    count: int
    alive: int
    since_s: float

    def __str__(self) -> str:
        who = "the" if self.alive == 1 else f"{self.count} of {self.alive}"
        have = "has" if self.count == 1 else "have"
        noun, since = units.plural(self.what, self.alive), units.format_duration(self.since_s)
        return f"{who} {noun}{self.of_group} {have} not been heard of for {since}"


@dataclass(frozen=True)
class Signs:
    """What the advice is made of; shares are from 0 to 1, and lately.

    Attributes:
        ring: Its name.
        ended: Whether nothing more comes.
        live: Samples in the ring.
        generators: Producers that were heard of lately.
        blocked: Share of their time for which the ring had no room, on average.
        sending: Share of their time spent sending.
        group: The group that starves most, of those with readers that were heard of lately; None where there is none.
        starved: Share of the time that its training loops waited for a batch.
        dry: Share of the time that its readers waited for something in the ring.
        lost: Share of what this group should have been given that left the ring unseen, ever.
        behind: Another group that has something left to read, where this one has nothing.
        waits: The group with too little left to read for a batch; None where none is so.
        left: How many samples the group has left to read.
        begun: Whether its readers have been there for long enough to know their shares.
        generators_unheard, readers_unheard: Of whom nothing was heard lately.
        deserted: The group that has most left to read and no reader; None where there is none.
        deserted_left: So many samples it has left, those included that its former readers have not acknowledged.
    """

    ring: str
    ended: bool
    live: int
    generators: int
    blocked: float
    sending: float
    group: str | None
    starved: float
    dry: float
    lost: float
    behind: str | None
    waits: str | None = None
    left: int = 0
    begun: bool = True
    generators_unheard: Unheard | None = None
    readers_unheard: tuple[Unheard, ...] = ()
    deserted: str | None = None
    deserted_left: int = 0


def signs_of(status: RingStatus) -> Signs:
    """Pick out what the advice is made of: of the groups, the one that starves most."""
    reading = {name: group for name, group in status.groups.items() if group.starved_share is not None}
    name = _most_starved(reading)
    group = reading[name] if name is not None else None
    has_all = group is not None and not group.unread
    alone = {one: of.unread + of.pending for one, of in status.groups.items() if not _has_readers(of)}
    deserted = max((one for one, left in alone.items() if left), key=alone.__getitem__, default=None)
    behind = [other for other, one in status.groups.items() if has_all and other != name and one.unread]
    return Signs(
        ring=status.ring,
        ended=status.ended,
        live=status.live,
        generators=sum(one.heard for one in status.producers.values()),
        blocked=status.blocked_share,
        sending=status.sending_share,
        group=name,
        starved=group.starved_share or 0.0 if group else 0.0,
        dry=group.dry_share or 0.0 if group else 0.0,
        lost=group.lost / max(group.lost + group.delivered, 1) if group else 0.0,
        behind=max(behind, key=lambda one: status.groups[one].unread, default=None),
        waits=_most_starved({one: group for one, group in reading.items() if _waits(group)}),
        left=group.unread if group else 0,
        begun=group is None or any(one.age_s >= _KNOWS_ITSELF_S for one in group.consumers.values() if one.heard),
        generators_unheard=_unheard("generator", "", status.producers.values()),
        readers_unheard=tuple(_readers_unheard(status.groups)),
        deserted=deserted,
        deserted_left=alone.get(deserted or "", 0),
    )


def _most_starved(groups: dict[str, GroupStatus]) -> str | None:
    return max(groups, key=lambda one: groups[one].starved_share or 0.0, default=None)


def _has_readers(group: GroupStatus) -> bool:
    return any(one.state == "alive" for one in group.consumers.values())


def _waits(group: GroupStatus) -> bool:
    """Say whether it has too little left to read; while it reads again what it had, that is nothing to it."""
    needs = max((one.needs for one in group.consumers.values() if one.heard), default=1)
    return group.unread < needs and (group.reuse == "1" or (group.starved_share or 0.0) >= WAITS)


def _readers_unheard(groups: dict[str, GroupStatus]) -> Iterator[Unheard]:
    for name, group in groups.items():
        readers = [one for one in group.consumers.values() if one.starved_share is not None]
        if (unheard := _unheard("reader", f" of group {name}", readers)) is not None:
            yield unheard


def _unheard(what: str, of_group: str, members: Collection[ProducerStatus | ConsumerStatus]) -> Unheard | None:
    alive = [one for one in members if one.state == "alive"]
    since_s = [one.seen_s or 0.0 for one in alive if not one.heard]
    return Unheard(what, of_group, len(since_s), len(alive), min(since_s)) if since_s else None


def advise(signs: Signs) -> str:
    """Say what is short, and what to do about it."""
    for applies, words in _NO_RATES:
        if applies(signs):
            return words(signs)
    return next(words for applies, words in _RATES if applies(signs))(signs) + _left_out(signs)


def _blocked(signs: Signs) -> bool:
    return signs.blocked >= WAITS


def _starved(signs: Signs) -> bool:
    return signs.starved >= WAITS


def _dry(signs: Signs) -> bool:
    return signs.dry >= WAITS


def _whole(generators: float) -> int:
    return math.ceil(round(generators, 6))


def _nobody(signs: Signs) -> str:
    if signs.waits:
        state = f", and group {signs.waits} waits for it"
    elif signs.group and signs.left:
        state = f"; group {signs.group} has {signs.left} {units.plural('sample', signs.left)} left to read"
    else:
        state = f", and {_deserted(signs)}" if signs.deserted else ""
    return (
        f"no generator is alive{state}: start some with `synthbroker generate … --ring {signs.ring}`, or say that "
        f"nothing more comes: `synthbroker end {signs.ring}`"
    )


def _deserted(signs: Signs) -> str:
    samples = f"{signs.deserted_left} {units.plural('sample', signs.deserted_left)}"
    return f"group {signs.deserted} has {samples} left to read and no reader"


def _ended(signs: Signs) -> str:
    if signs.deserted is None:
        return "nothing to do: the ring has ended"
    drop = f"synthbroker drop {signs.ring} --group {signs.deserted}"
    return f"the ring has ended, but {_deserted(signs)}: start its training, or give them up with `{drop}`"


def _no_rates(signs: Signs) -> str:
    generators = None if signs.generators else signs.generators_unheard
    if generators is not None and signs.waits:
        since = units.format_duration(generators.since_s)
        silence = f"group {signs.waits} waits for a generator that has not been heard of for {since}"
    else:
        silence = f"no advice on rates: {_listed([generators] if generators else signs.readers_unheard)}"
    beat, gone = units.format_duration(BEAT_S), units.format_duration(SILENT_AFTER_S)
    return f"{silence}; see what became of it (heartbeats come every {beat}; who sends none for {gone} counts as gone)"


def _left_out(signs: Signs) -> str:
    generators = [signs.generators_unheard] if signs.generators_unheard else []
    unheard = [*generators, *signs.readers_unheard]
    return f"; not counted here: {_listed(unheard)}" if unheard else ""


def _listed(unheard: Iterable[Unheard]) -> str:
    return ", ".join(map(str, unheard))


def _too_early(signs: Signs) -> str:
    return f"nothing yet: group {signs.group} has just begun to read"


def _no_reader(signs: Signs) -> str:
    return f"nobody reads ring {signs.ring}: start the training, or let generators end by themselves (--idle-s)"


def _more(signs: Signs) -> str:
    if signs.starved > _MOST_STARVED:
        needed = f"more than {10 * signs.generators}"
    else:
        needed = f"about {_whole(signs.generators / (1 - signs.starved))}"
    return (
        f"more generators: {needed} instead of {signs.generators}, because group {signs.group} finds the ring empty; "
        "or a larger reuse"
    )


def _fewer(signs: Signs) -> str:
    needed = max(_whole(signs.generators * (1 - signs.blocked)), 1)
    fewer = f"fewer generators would do: about {needed} instead of {signs.generators}"
    if needed >= signs.generators:
        fewer = "generators are faster than the training, and slower ones would do"
    return f"{fewer}; or use more of what they make: a smaller reuse, more trainers (--idle-s gives idle nodes back)"


def _way_in(signs: Signs) -> str:
    return (
        f"broker- or network-bound: generators spend {signs.sending:.0%} of their time sending, so that more of them "
        'would not help; send less (codec="zstd", cast=), or give the broker a faster network'
    )


def _way_out(signs: Signs) -> str:
    return (
        f"broker- or network-bound, or busy unpacking: samples are there, and group {signs.group} gets them slowly; "
        'send less (codec="zstd", cast=), receive in more processes (num_workers), make transform cheaper'
    )


def _other_group(signs: Signs) -> str:
    return (
        f"group {signs.behind} holds the ring up, and group {signs.group} waits for it: make that one faster, let it "
        f"read with group=None, or drop it (`synthbroker drop {signs.ring} --group {signs.behind}`)"
    )


def _room(signs: Signs) -> str:
    return (
        f"a bigger ring: both sides wait in turn, because it holds too few samples (now {signs.live}) to even their "
        f"pace out; raise --capacity or --max-samples, or have group {signs.group} take smaller batches or acknowledge "
        "more often"
    )


def _losses(signs: Signs) -> str:
    return (
        f"group {signs.group} never saw {signs.lost:.0%} of what was made: fewer generators would do, or let them wait "
        "(when_full=block)"
    )


_Row = tuple[Callable[[Signs], bool], Callable[[Signs], str]]

_NO_RATES: tuple[_Row, ...] = (
    (lambda signs: signs.ended, _ended),
    (lambda signs: not signs.generators and signs.generators_unheard is None, _nobody),
    (lambda signs: not signs.generators, _no_rates),
    (lambda signs: signs.group is None and not signs.readers_unheard, _no_reader),
    (lambda signs: signs.group is None, _no_rates),
    (lambda signs: not signs.begun, _too_early),
)
_RATES: tuple[_Row, ...] = (
    (lambda signs: _blocked(signs) and _starved(signs) and not _dry(signs), _way_out),
    (lambda signs: _blocked(signs) and _starved(signs) and signs.behind is not None, _other_group),
    (lambda signs: _blocked(signs) and _starved(signs), _room),
    (lambda signs: _starved(signs) and not _dry(signs), _way_out),
    (lambda signs: _starved(signs) and signs.sending >= SENDS, _way_in),
    (_starved, _more),
    (_blocked, _fewer),
    (lambda signs: signs.lost >= _LOSES, _losses),
    (lambda _: True, lambda _: "nothing to do: neither side waits for the other"),
)
