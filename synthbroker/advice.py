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
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from synthbroker.states import RingStatus

WAITS = 0.1
SENDS = 0.5
_LOSES = 0.2
_MOST_STARVED = 0.9  # beyond it the number of generators that are needed is anybody's guess


@dataclass(frozen=True)
class Signs:
    """What the advice is made of; shares are from 0 to 1, and lately.

    Attributes:
        ring: Its name.
        ended: Whether nothing more comes.
        live: Samples in the ring.
        generators: Producers that are alive.
        blocked: Share of their time for which the ring had no room, on average.
        sending: Share of their time spent sending.
        group: The group that starves most, of those with living readers; None where there is none.
        starved: Share of the time that its training loops waited for a batch.
        dry: Share of the time that its readers waited for something in the ring.
        lost: Share of what this group should have been given that left the ring unseen, ever.
        behind: Another group that has something left to read, where this one has nothing.
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


def signs_of(status: RingStatus) -> Signs:
    """Pick out what the advice is made of: of the groups, the one that starves most."""
    reading = {name: group for name, group in status.groups.items() if group.starved_share is not None}
    name = max(reading, key=lambda one: reading[one].starved_share or 0.0, default=None)
    group = reading[name] if name is not None else None
    has_all = group is not None and not group.unread
    behind = [other for other, one in status.groups.items() if has_all and other != name and one.unread]
    return Signs(
        ring=status.ring,
        ended=status.ended,
        live=status.live,
        generators=sum(one.state == "alive" for one in status.producers.values()),
        blocked=status.blocked_share,
        sending=status.sending_share,
        group=name,
        starved=group.starved_share or 0.0 if group else 0.0,
        dry=group.dry_share or 0.0 if group else 0.0,
        lost=group.lost / max(group.lost + group.delivered, 1) if group else 0.0,
        behind=max(behind, key=lambda one: status.groups[one].unread, default=None),
    )


def advise(signs: Signs) -> str:
    """Say what is short, and what to do about it."""
    return next(words for applies, words in _TABLE if applies(signs))(signs)


def _blocked(signs: Signs) -> bool:
    return signs.blocked >= WAITS


def _starved(signs: Signs) -> bool:
    return signs.starved >= WAITS


def _dry(signs: Signs) -> bool:
    return signs.dry >= WAITS


def _whole(generators: float) -> int:
    return math.ceil(round(generators, 6))


def _nobody(signs: Signs) -> str:
    waits = f", and group {signs.group} waits for it" if signs.group else ""
    return f"no generator is alive{waits}: start some with `synthbroker generate … --ring {signs.ring}`"


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


_TABLE: tuple[tuple[Callable[[Signs], bool], Callable[[Signs], str]], ...] = (
    (lambda signs: signs.ended, lambda _: "nothing to do: the ring has ended"),
    (lambda signs: not signs.generators, _nobody),
    (lambda signs: signs.group is None, _no_reader),
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
