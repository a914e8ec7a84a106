"""The commands with which ranks are dealt whole rounds (`lua/seat.lua`, `lua/deal.lua`)."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from synthbroker import taking
from synthbroker.errors import RingMismatchError, ShutOutError
from synthbroker.replies import Incarnation, Reply, Taken
from synthbroker.ring import Ring


@dataclass(frozen=True)
class Rules:
    """What all ranks of a run must agree on.

    Attributes:
        ranks: How many there are.
        share: Samples of one rank in a round.
        rounds: So many in an epoch; 0: no epochs.
        last_share: Samples of one rank in an epoch's last round.
        drop_last: An incomplete last round is for nobody.
        epoch_size: As the user said it.
    """

    ranks: int
    share: int
    rounds: int
    last_share: int
    drop_last: bool
    epoch_size: int | None

    def __str__(self) -> str:
        return (
            f"world_size={self.ranks}, batch_size={self.share}, epoch_size={self.epoch_size}, "
            f"drop_last={self.drop_last}"
        )


@dataclass(frozen=True)
class Busy:
    """Another run has the group's table, or this one with other rules.

    One of its readers was last seen at `seen_s`, by the server's clock; it may be dead.
    """

    run: str
    attempt: str
    seen_s: float
    rules: str


def sit(
    ring: Ring,
    group: str,
    reader: Incarnation,
    *,
    run: str,
    attempt: str,
    rules: Rules,
    rank: int,
    word: str,
    claim_after_s: float,
    had: str,
) -> str | Busy:
    """Take a rank's seat; gives the table's generation.

    Args:
        ring: The ring.
        group: The group; the reader has joined it.
        reader: Who asks.
        run: The run, the same for all ranks.
        attempt: Which attempt at it.
        rules: What all ranks must agree on.
        rank: Which rank.
        word: This life of its process.
        claim_after_s: A run whose readers are silent for so long is dead.
        had: The generation that this reader had a seat in, if any.

    Raises:
        ShutOutError: A newer life of this run has the table.
    """
    told = (run, attempt, str(rules), rank, word, claim_after_s, had, secrets.token_hex(4), reader)
    reply = _seat(ring, group, *told)
    if reply[0] == b"SHUT":
        raise shut_out(ring, group, rank, reply[1].decode())
    if reply[0] == b"BUSY":
        return Busy(reply[1].decode(), reply[2].decode(), float(reply[3]), reply[4].decode())
    generation: str = reply[1].decode()
    return generation


def rise(ring: Ring, group: str, reader: Incarnation, *, run: str, rank: int, had: str) -> None:
    """Say that a reader, which has left the group, has left the table; the last one clears it."""
    _seat(ring, group, run, "", "", rank, "", 0, had, "", reader)


def shut_out(ring: Ring, group: str, rank: int, run: str) -> ShutOutError:
    """Make the error for a rank whose run was begun anew by others."""
    return ShutOutError(
        f"a newer life of run {run!r} reads group {group!r} of ring {ring.name!r} in this one's place (rank {rank}): "
        "start all ranks of a run together, give runs at the same time a name= and a group of their own"
    )


def taken(ring: Ring, group: str, busy: Busy, *, run: str, rank: int, rules: Rules) -> RingMismatchError:
    """Make the error for a rank whose table others have, who live."""
    if busy.run == run:
        return RingMismatchError(
            f"ranks of run {run!r} differ in how they read group {group!r} of ring {ring.name!r}: others say "
            f"{busy.rules}; rank {rank} says {rules}. All must say the same"
        )
    return RingMismatchError(
        f"group {group!r} of ring {ring.name!r} is being read by the ranks of run {busy.run!r}, and run {run!r} "
        f"(rank {rank}) wants it, too: end one of them, or take another group; a run that shall take the place of a "
        "former one has the same name="
    )


def deal(
    ring: Ring,
    group: str,
    reader: Incarnation,
    order: str,
    *,
    count: int = 0,
    min_fill: int = 1,
    claim_after_s: float = -1.0,
    producers: Sequence[str] = (),
) -> tuple[str, Taken | None]:
    """Ask for a round, or for a spare sample.

    Args:
        ring: The ring.
        group: The group.
        reader: Who asks.
        order: What for, as `deal.lua` says it.
        count: So many spare samples.
        min_fill: As for `taking.ask`.
        claim_after_s: As for `taking.ask`.
        producers: As for `taking.ask`.

    Returns:
        The script's first word, and what was taken with OK, EMPTY and END.
    """
    told = (group, reader, count, min_fill, claim_after_s, secrets.randbits(31), 0, *producers, order)
    return taking.begin(ring, "deal", told).answer()


def _seat(ring: Ring, group: str, *told: object) -> Reply:
    return ring.script("seat", group, *told)
