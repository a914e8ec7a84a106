"""What `status` says of a ring, its groups and who is at it, as values."""

from dataclasses import dataclass, field
from typing import Any

from synthbroker.ledger import Ledger
from synthbroker.ring import BEAT_S

HEARD_WITHIN_S = 1.5 * BEAT_S  # a heartbeat that is late is not missed yet


@dataclass(frozen=True)
class ProducerStatus:
    """One producer, as its last heartbeat described it.

    Attributes:
        state: "alive", "silent" (no heartbeat for 30 s), "left" (stopped) or "closed" (done).
        seen_s: Seconds since its last heartbeat.
        committed: Samples taken from its latest incarnation.
        host, pid, job_id: Where it runs; None where it did not say.
        samples_per_s, bytes_per_s: Its latest rates; 0 unless alive.
        blocked_share: Share of its time that it lately (`shares`) spent waiting for room; 0 unless alive.
        generation_s: Mean time from the end of one put to the beginning of the next; None before the second.
        quarantined: Its samples that failed the ring's checks.
        codec: What codec="auto" chose for each field, with packed ÷ unpacked: {"image": "zstd 0.74"}.
        lost_by_server: Committed samples that a server lost, as `ProducerStats` counts them.
        blocked_ever_share: The same over all its time.
        sending_share: Share of its time that it lately spent sending; 0 unless alive.
        age_s: How long it has been there, as it last said.
    """

    state: str
    seen_s: float
    committed: int
    host: str | None
    pid: int | None
    job_id: str | None
    samples_per_s: float
    bytes_per_s: float
    blocked_share: float
    codec: dict[str, str] = field(default_factory=dict)
    generation_s: float | None = None
    quarantined: int = 0
    lost_by_server: int = 0
    blocked_ever_share: float = 0.0
    sending_share: float = 0.0
    age_s: float = 0.0

    @property
    def heard(self) -> bool:
        """Whether it was heard of lately: else what it said of its rates tells of a time that may be over."""
        return self.state == "alive" and self.seen_s <= HEARD_WITHIN_S


@dataclass(frozen=True)
class ConsumerStatus:
    """One member of a group.

    Attributes:
        state: "alive", "silent", or "left": said goodbye or was taken over, and its pending samples wait for others.
        seen_s: Seconds since its last heartbeat, None where it left.
        pending: Samples that it was given and has not acknowledged.
        host, pid, job_id: Where it runs; None where it did not say.
        starved_share: Share of its time for which its training loop lately waited for a batch; None where it does not
            say, because it only holds samples. A plain DataLoader's worker counts the time it had none ready.
        starved_ever_share: The same over all its time.
        dry_share: Share of its time that it lately waited for something in the ring.
        age_s: How long it has been there, as it last said.
        needs: So many samples must be unread before it is given any: those of a whole round where ranks share one.
    """

    state: str
    seen_s: float | None
    pending: int
    host: str | None
    pid: int | None
    job_id: str | None
    starved_share: float | None = None
    starved_ever_share: float = 0.0
    dry_share: float = 0.0
    age_s: float = 0.0
    needs: int = 1

    @property
    def heard(self) -> bool:
        """Whether it was heard of lately, as for a producer."""
        return self.state == "alive" and self.seen_s is not None and self.seen_s <= HEARD_WITHIN_S


@dataclass(frozen=True)
class GroupStatus:
    """One group; counters since it was made.

    Attributes:
        since: Samples up to this number were gone before the group began.
        reuse: "1", a number, "inf"; None: declared, nobody has joined yet.
        delivered: Samples given for the first time.
        acknowledged: Samples that it is done with.
        pending: Given, not acknowledged, still in the ring.
        unread: In the ring, not given yet.
        lost: Evicted or stepped over unseen.
        evicted_pending: Evicted while given and not acknowledged.
        reused: Given again, as `reuse` allows.
        redelivered: Given again because a member died.
        doubled: Acknowledged twice.
        skipped: Passed over, because the reader wants other producers' samples.
        wasted_s: Generator time that went into what was lost: for each sample the mean of its producer when it was
            committed; a producer's first sample counts for nothing.
        uses: How many live samples were given to it how often: {"0": 3, "1": 20, "2": 7}. From 9 uses on by powers of
            two: "16" means 9 to 16. With reuse="inf" uses are not counted: "1" means at least once.
        consumers: Its members by name.
        starved_share, dry_share: As for its members, the mean of those that were heard of lately (`heard`); None where
            none was.
        starved_ever_share: The mean of all that are there, each as much as it is old.
    """

    since: int
    reuse: str | None
    delivered: int
    acknowledged: int
    pending: int
    unread: int
    lost: int
    evicted_pending: int
    reused: int
    redelivered: int
    doubled: int
    skipped: int
    consumers: dict[str, ConsumerStatus]
    wasted_s: float = 0.0
    uses: dict[str, int] = field(default_factory=dict)
    starved_share: float | None = None
    starved_ever_share: float = 0.0
    dry_share: float | None = None


@dataclass(frozen=True)
class Twins:
    """Two producers that send the same: `second` sent `samples` of those that were looked at after `first` did.

    The same name twice: what it sends now it sent in a former life. `noticed_s`: when, by the server's clock.
    """

    first: str
    second: str
    samples: int
    noticed_s: float


@dataclass(frozen=True)
class RingStatus:
    """A ring at one instant of the server's clock.

    Attributes:
        ring, where: Its name, and its server without the password.
        now_s: The server's time, seconds since 1970.
        epoch, when_full, capacity_bytes, schema, info: As its first producer set them.
        max_samples: Cap in samples, 0 for none.
        checks: What values are kept out, like "image:finite,range(0,1)"; "none".
        ended: Whether nothing more comes.
        first, next: Number of the oldest live sample, and of the one that comes next.
        live, bytes: Samples in the ring and the server memory that they take.
        fill: Share of its capacity that is taken: in bytes or in samples, whichever is more.
        committed, evicted: Samples that ever came in, and that left again.
        duplicates, foreign, quarantined: Samples sent again and refused, entries that are none of ours, bad samples.
        waiting: Whether producers wait for room.
        leased_bytes, leased_samples: Room promised to samples under way.
        expected_producers, closed_producers: The ring ends when so many have closed (0: it does not), and so many have.
        folded_producers, folded_samples: Producers that are no longer named, and what they committed.
        samples_per_s, bytes_per_s: Rates of all producers that were heard of lately (`heard`).
        generation_s: Generator time of a sample, mean over the producers, each as much as it has committed; None where
            none of them has said.
        wasted_s: Generator time of what was evicted while no group read the ring.
        twins: Producers that send the same.
        blocked_share, sending_share: As for its producers, the mean of those that were heard of lately.
        blocked_ever_share: The mean of all that are named, each as much as it is old.
        advice: What is short, if anything, and what to do about it (`advice`).
        oldest_age_s, newest_age_s: Ages of the oldest and newest live sample; None in an empty ring.
        groups, producers: By name.
        ledger: Whether everything adds up.
    """

    ring: str
    where: str
    now_s: float
    epoch: str
    when_full: str
    capacity_bytes: int
    max_samples: int
    schema: str
    info: dict[str, Any]
    checks: str
    ended: bool
    first: int
    next: int
    live: int
    bytes: int
    fill: float
    committed: int
    evicted: int
    duplicates: int
    foreign: int
    quarantined: int
    waiting: bool
    leased_bytes: int
    leased_samples: int
    expected_producers: int
    closed_producers: int
    folded_producers: int
    folded_samples: int
    samples_per_s: float
    bytes_per_s: float
    oldest_age_s: float | None
    newest_age_s: float | None
    groups: dict[str, GroupStatus]
    producers: dict[str, ProducerStatus]
    ledger: Ledger
    generation_s: float | None = None
    wasted_s: float = 0.0
    twins: tuple[Twins, ...] = ()
    blocked_share: float = 0.0
    blocked_ever_share: float = 0.0
    sending_share: float = 0.0
    advice: str = ""
