"""What users ask for, of a ring and of reading one: checked once, where they say it."""

import itertools
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from synthbroker import checks as values
from synthbroker import keys, schema, settings, units
from synthbroker.replies import Settings

POLICIES = ("block", "drop-oldest")
_PRODUCER = re.compile(r"[A-Za-z0-9_.\-]{1,100}", re.ASCII)
_instances = itertools.count()

ACKS = ("next", "delivered", "checkpoint")
ON_GONE = ("raise", "go-on")
ON_STARVE = ("wait", "raise", "reuse")


@dataclass(frozen=True)
class ReadOptions:
    """What `Consumer` and `RingDataset` have in common.

    Args:
        url: Redis URL, `file://` URL of an endpoint file, or None for SYNTHBROKER_URL.
        ring: Name of the ring; readers may start before it is made.
        group: Readers of one group share the samples; two groups get all of them each. None reads the live ring from
            front to back, anew in each iteration, and takes nothing.
        batch_size: Samples in a batch.
        reuse: How often one sample may be given to the group: 1, another whole number, or "inf" (or math.inf).
            Fresh ones always come first. A ring that has ended is read until all uses are used up; "inf" ends with
            the last fresh sample.
        ack: When a batch counts as trained on: "next": when the following one is asked for. "delivered": at once.
            "checkpoint": when a checkpoint with it is written, see `state_dict` and `acknowledge`.
        prefetch: Batches that are made ready ahead, at most 1 GB.
        wait_s: How long to wait for a sample before StarvedError, in seconds; math.inf: for ever, warning each minute.
        on_starve: What to do when no producer lives (each said goodbye, or was silent for 30 s) and the ring has not
            ended. "wait": for fresh samples, until `wait_s` is over; nothing is given again meanwhile, whatever `reuse`
            allows. "raise": StarvedError within seconds. "reuse": go on with old samples within `reuse`, and warn how
            old and how worn they are: at once, then after 1 min, 2, 4, …. While a producer lives, reuse is silent.
        transform: Called with each sample (a dict, or a tuple where `fields` are named) in the reading process.
        collate: Makes a batch of a list of samples.
        drop_last: Leave out a last batch that is not full.
        fields: Take only these, as tuples in this order.
        producers: Take only samples of producers with these names.
        min_fill: Begin when so many samples are in the ring.
        epoch_size: Samples in one iteration, of all ranks together; without it an iteration goes on until the ring
            ends.
        reconnect_s: How long to try to reach a server that went away, in seconds.
        claim_after_s: A reader silent for so long is dead, and its samples are given to others; what is less than two
            heartbeats, 10 s, counts as that.
        name: Who this is: a newer reader of the same name, in the same group, shuts this one out and takes its
            samples over at once, as a restarted run should. Without a name nobody is shut out.
        on_gone: What `load_state_dict` does where samples that it counts on are gone: "raise" StateGoneError, or
            "go-on" without them, with a warning that names them.

    Raises:
        TypeError, ValueError: An argument that cannot be.
    """

    url: str | None
    ring: str
    group: str | None
    batch_size: int = 1
    reuse: float | str = 1
    ack: str = "next"
    prefetch: int = 2
    wait_s: float = 600.0
    on_starve: str = "wait"
    transform: Callable[[Any], Any] | None = None
    collate: Callable[[list[Any]], Any] | None = None
    drop_last: bool = False
    fields: Sequence[str] | None = None
    producers: Sequence[str] | None = None
    min_fill: int = 1
    epoch_size: int | None = None
    reconnect_s: float = 300.0
    claim_after_s: float = 30.0
    name: str | None = None
    on_gone: str = "raise"

    def __post_init__(self) -> None:
        keys.check_name("ring", self.ring)
        if self.group is not None:
            keys.check_name("group", self.group)
        for what, least in ("batch_size", 1), ("prefetch", 0), ("min_fill", 1):
            _check_whole(what, getattr(self, what), least)
        if self.epoch_size is not None:
            _check_whole("epoch_size", self.epoch_size, 1)
        for what in "wait_s", "reconnect_s", "claim_after_s":
            check_seconds(what, getattr(self, what))
        for what, choices in ("ack", ACKS), ("on_gone", ON_GONE), ("on_starve", ON_STARVE):
            check_choice(what, getattr(self, what), choices)
        if self.on_starve == "reuse" and self.reuse_text() == "1":
            raise ValueError(
                "on_starve='reuse' needs a reuse of more than 1: say reuse='inf', or how often a sample may be given"
            )
        for what in "transform", "collate":
            _check_function(what, getattr(self, what))
        for what in "fields", "producers":
            check_names(what, getattr(self, what))
        if self.name is not None and (not self.name or any(c in self.name for c in " /:")):
            raise ValueError(f"{self.name!r} cannot name a reader: it must not be empty or have a space, / or :")
        self.reuse_text()

    def reuse_text(self) -> str:
        """Write `reuse` as the ring keeps it: a whole number or inf."""
        if self.reuse in ("inf", math.inf):
            return "inf"
        if isinstance(self.reuse, bool) or not isinstance(self.reuse, int) or self.reuse < 1:
            raise ValueError(f"reuse must be a whole number from 1, or 'inf', got {self.reuse!r}")
        return str(self.reuse)

    def sizes(self, worker: int, workers: int, ranks: int = 1) -> list[int] | None:
        """List the batch sizes of one iteration for one of several workers; None where it has no set length.

        An epoch's samples are those of all ranks; each has the same batches, if need be with a sample more.
        """
        if self.epoch_size is None:
            return None
        full, rest = divmod(self.epoch_size, self.batch_size * ranks)
        sizes = [self.batch_size] * full + ([-(-rest // ranks)] if rest and not self.drop_last else [])
        return sizes[worker::workers]


def ring_settings(
    capacity: int | str | None,
    max_samples: int | None,
    when_full: str | None,
    groups: Sequence[str],
    producers: int | None,
    schema_text: str | None,
    info: Mapping[str, Any] | None,
    finite: bool | None,
    checks: str | Mapping[str, str] | None,
) -> Settings:
    """Check what a producer asks of its ring; see `Producer` for the arguments.

    Raises:
        TypeError, ValueError: An argument that cannot be.
    """
    if when_full is not None and when_full not in POLICIES:
        raise ValueError(f"when_full must be one of {POLICIES}, got {when_full!r}")
    for what, value in ("max_samples", max_samples), ("producers", producers):
        if value is not None:
            _check_whole(what, value, 0)
    if isinstance(groups, str):
        raise TypeError(f"groups must be a sequence of names, got the text {groups!r}")
    capacity_bytes = None if capacity is None else units.parse_size(capacity)
    if capacity_bytes == 0:
        raise ValueError(f"capacity must be more than nothing, got {capacity!r}: say it like '8GB'")
    return Settings(
        when_full=when_full,
        capacity_bytes=capacity_bytes,
        max_samples=max_samples,
        schema=None if schema_text is None else str(schema.parse(schema_text)),
        info=None if info is None else json.dumps(dict(info), sort_keys=True, allow_nan=False),
        checks=_checks_text(finite, checks, schema_text),
        producers=producers,
        groups=tuple(keys.check_name("group", group) for group in groups),
    )


def _checks_text(finite: bool | None, checks: str | Mapping[str, str] | None, schema_text: str | None) -> str | None:
    """Write the checks that a producer asks for; None where it asks for none in particular."""
    if finite is None and checks is None:
        return None
    found = values.parse({} if checks is None else checks)
    if finite:
        every = found.get(values.EVERY, values.Check())
        found[values.EVERY] = replace(every, finite=True)
    if schema_text is not None:
        values.check_schema(found, schema.parse(schema_text))
    return values.text_of(found)


def producer_name(name: str | None) -> str:
    """Check a producer's name, or make one that no other has: of job, array task, restart, host and process.

    A job that was put into the queue again has another name than its former self, which may still run on a node that
    was lost: what both send is kept apart.

    Raises:
        ValueError: Not 1 to 100 letters, digits, `_ . -`.
    """
    if name is None:
        job = settings.job()
        where = f"{job.label}-" if job.label else ""
        return re.sub(r"[^A-Za-z0-9_.\-]", "_", f"{where}{job.host}-{os.getpid()}-{next(_instances)}")[:100]
    if not isinstance(name, str) or not _PRODUCER.fullmatch(name):
        raise ValueError(f"{name!r} cannot name a producer: 1 to 100 letters, digits, _ . and - are allowed")
    return name


def _check_function(what: str, value: object) -> None:
    if value is not None and not callable(value):
        raise TypeError(f"{what} must be a function, got {value!r}")


def _check_whole(what: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{what} must be a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{what} must be at least {least}, got {value}")


def check_choice(what: str, value: object, choices: Sequence[str]) -> None:
    """Check one of several words.

    Raises:
        ValueError: Another one.
    """
    if value not in choices:
        raise ValueError(f"{what} must be one of {choices}, got {value!r}")


def check_seconds(what: str, value: object) -> None:
    """Check a duration in seconds.

    Raises:
        TypeError, ValueError: Not a number, or negative.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{what} must be a number of seconds, got {value!r}")
    if not value >= 0:
        raise ValueError(f"{what} must not be negative, got {value}")


def check_names(what: str, value: object) -> None:
    """Check names of fields or producers, if there are any.

    Raises:
        TypeError: Not a sequence of texts.
        ValueError: A name that cannot be, or one that is there twice.
    """
    if value is None:
        return
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise TypeError(f"{what} must be a sequence of names, got {value!r}")
    for name in value:
        if what == "fields":
            schema.check_name(name)
        elif not isinstance(name, str) or not name:
            raise TypeError(f"{what} must be names, got {name!r}")
    if len(set(value)) != len(value):
        raise ValueError(f"{what} names one twice: {value!r}")
