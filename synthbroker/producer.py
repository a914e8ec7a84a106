"""The generator's side: put samples into a ring."""

import atexit
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from threading import Event
from types import TracebackType
from typing import Any, Self, TypeVar

from synthbroker import books, losses, options, schema, settings, tensors, texts, units
from synthbroker import cast as casts
from synthbroker import checks as values
from synthbroker import ring as rings
from synthbroker.account import Account, ProducerStats
from synthbroker.connection import Connection
from synthbroker.errors import RingMismatchError, RingMissingError, RingTooLargeError, SynthbrokerError
from synthbroker.heart import Heart
from synthbroker.pace import Pace
from synthbroker.packing import Packer
from synthbroker.quality import Quality
from synthbroker.replies import Meta, Settings
from synthbroker.ring import Ring
from synthbroker.schema import Schema, Shaped
from synthbroker.sender import Sender
from synthbroker.twins import TwinWatch

log = logging.getLogger("synthbroker")

T = TypeVar("T")

DEFAULT_CAPACITY_BYTES = 2 * 10**9
LARGEST_SHARE = 0.9  # of the server's memory for one ring; the rest is for parts on their way, replies and bookkeeping
_LAST_FLUSH_S = 10.0


class Producer:
    """Puts samples into a ring; encoding and sending go on in the background.

    Nothing is opened before `with`, or the first `put`.

    Args:
        url: Redis URL, `file://` URL of an endpoint file, or None for SYNTHBROKER_URL.
        ring: Name of the ring; made if it is not there. What follows is the ring's and must agree with what it was
            made with; left out, it is taken from the ring.
        capacity: Server memory for the ring, in bytes or like "8GB". A new ring gets half of the server's maxmemory,
            or 2 GB where there is no limit.
        max_samples: Most samples in the ring; 0: no such limit.
        when_full: "block" (default): wait until every group has acknowledged the oldest sample. "drop-oldest": remove
            it and count who had not seen it.
        groups: Names of groups that get everything from now on, even before they first read.
        producers: The ring ends when so many producers have closed; 0: it ends by `synthbroker end`.
        schema: Like "image:f32[1,*,*,*] label:u8[...]"; else the first sample's fields, dtypes and shapes.
        info: What readers should know (number of classes, units); plain JSON.
        checks: What values must be like, for each field, "*" for all: {"image": "finite,range(0,1),varied"} (`checks`);
            samples that are not go to quarantine instead of the ring.
        finite: Short for checks={"*": "finite"}, besides what else is checked.
        reopen: Begin a new run on a ring that has ended.
        name: Who this is, at most 100 letters, digits, `_ . -`; a newer producer of the same name shuts this one out.
        fields: Names for samples that are tuples; samples that are dicts must have these.
        codec: "auto" (what the link and this machine are quickest with, for each field), "lz4", "zstd",
            "lz4-bitshuffle", "zstd-bitshuffle" or "raw", or a dict that names one for some fields (the others go raw).
        cast: Makes floats smaller, with a loss: {"image": "float16"}, "bfloat16", or "bitround:12", which keeps 12 bits
            of each mantissa. A sample in which a finite value would become infinite goes to quarantine.
        in_flight: `put` waits while more than this is on its way.
        wait_s: How long to wait for room in the ring, in seconds.
        reconnect_s: How long to try to reach a server that went away, in seconds.

    Raises:
        TypeError, ValueError: An argument that cannot be.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        ring: str,
        capacity: int | str | None = None,
        max_samples: int | None = None,
        when_full: str | None = None,
        groups: Sequence[str] = (),
        producers: int | None = None,
        schema: str | None = None,
        info: Mapping[str, Any] | None = None,
        checks: str | Mapping[str, str] | None = None,
        finite: bool | None = None,
        reopen: bool = False,
        name: str | None = None,
        fields: Sequence[str] | None = None,
        codec: str | Mapping[str, str] = "auto",
        cast: Mapping[str, str] | None = None,
        in_flight: int | str = "160MB",
        wait_s: float = 600.0,
        reconnect_s: float = 300.0,
    ) -> None:
        self._connection = Connection(url)
        self._ring = Ring(self._connection, ring)
        schema = casts.noted(schema, casts.parse(cast))
        self._settings = options.ring_settings(
            capacity, max_samples, when_full, groups, producers, schema, info, finite, checks
        )
        self._reopen = reopen
        self.name = options.producer_name(name)
        options.check_names("fields", fields)
        self._fields = fields
        self._in_flight_bytes = units.parse_size(in_flight)
        self._watch = TwinWatch(ring)
        self._packer = Packer(codec, cast, self._quarantine, self._in_flight_bytes, self._watch)
        options.check_seconds("wait_s", wait_s)
        options.check_seconds("reconnect_s", reconnect_s)
        self._wait_s, self._reconnect_s = wait_s, reconnect_s
        self._quality = Quality(ring, self.name)
        self._sender: Sender | None = None
        self._known: Settings | None = None  # how the ring was made, to make it again where the server lost it
        self._schema: Schema | None = None
        self._closed = False
        self._put_until: float | None = None  # when the last put returned: what passes from then on is generating

    # -- what users call

    def put(
        self,
        sample: object,
        *,
        recipe: Mapping[str, Any] | None = None,
        metadata: Mapping[str, str] | None = None,
        copy: bool = True,
    ) -> None:
        """Hand one sample over; it is sent in the background.

        Args:
            sample: Dict of numpy arrays, torch tensors (CPU or CUDA) or numbers, or a tuple where `fields` are named.
                Of any strides; values, dtype and shape come back exactly, in native byte order. CUDA tensors are copied
                on a stream of ours; put does not wait for the GPU, and what the current stream is given afterwards
                comes after the copy.
            recipe: What makes this sample again: plain JSON of at most 16 KiB.
            metadata: Text that travels along, at most 16 KiB.
            copy: False lends the arrays instead of copying them: leave them alone until `flush`.

        Raises:
            SchemaError: It does not fit the ring's schema; nothing is sent.
            TypeError, ValueError: Not a sample, recipe or metadata.
            BadSamplesError: Most of the latest samples went to quarantine (`quality`).
            RingFullError, RingEndedError, ServerGoneError, ...: Raised by an earlier sample in the background.
        """
        began = time.monotonic()
        self._put(sample, recipe, metadata, copy=copy)
        if self._put_until is not None:
            self._account.generated(began - self._put_until)
        self._put_until = time.monotonic()

    def _put(
        self, sample: object, recipe: Mapping[str, Any] | None, metadata: Mapping[str, str] | None, *, copy: bool
    ) -> None:
        given = tensors.as_sample(sample, self._fields)
        along = texts.pack_texts(metadata, recipe)
        sender = self._running()
        travels = casts.preview(given, self._packer.casts)
        self._pinned(travels).check(travels)
        nbytes = self._packer.cost(given)
        sender.reserve(nbytes)
        try:
            outgoing = self._packer.pack(given, along, nbytes, copy=copy)
        except BaseException:
            sender.give_back(nbytes)
            raise
        sender.add(outgoing)

    def put_batch(
        self,
        samples: Mapping[str, Any] | Sequence[Any],
        *,
        recipes: Sequence[Mapping[str, Any] | None] | None = None,
        metadata: Sequence[Mapping[str, str] | None] | None = None,
        copy: bool = True,
    ) -> None:
        """Hand many samples over.

        Args:
            samples: A dict of arrays or tensors of shape (N, ...), or a sequence of N samples.
            recipes, metadata: One for each, if any.
            copy: As for `put`.

        Raises:
            ValueError: The arrays, recipes or metadata are not all N long. Errors of `put` besides.
        """
        many = tensors.split(samples) if isinstance(samples, Mapping) else list(samples)
        for what, each in ("recipes", recipes), ("metadata", metadata):
            if each is not None and len(each) != len(many):
                raise ValueError(f"{len(each)} {what} for {len(many)} samples")
        for i, sample in enumerate(many):
            self.put(
                sample, recipe=recipes[i] if recipes else None, metadata=metadata[i] if metadata else None, copy=copy
            )

    def flush(self, wait_s: float | None = None) -> bool:
        """Wait until everything put so far is in the ring; False if that took longer than `wait_s` seconds."""
        done = self._sender.flush(wait_s) if self._sender else True
        self._quality.check()
        return done

    def close(self) -> None:
        """Flush, and say that this producer is done. Closing again does nothing."""
        self._close(done=True)

    def leave(self, flush_s: float = _LAST_FLUSH_S) -> int:
        """Stop without being done: flush for at most `flush_s` seconds, then go; returns how many were not sent."""
        return self._close(done=False, flush_s=flush_s)

    @property
    def stats(self) -> ProducerStats:
        """What this producer has done so far."""
        return self._sender.stats if self._sender else ProducerStats()

    @property
    def pace(self) -> Pace:
        """How its samples get through."""
        return self._sender.pace if self._sender else Pace()

    @property
    def info(self) -> dict[str, Any]:
        """The ring's `info`."""
        self._running()
        return self._meta.info

    def __enter__(self) -> Self:
        self._running()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self.leave()
        except SynthbrokerError as other:
            log.warning("ring %s: closing after %r failed too: %s", self._ring.name, error, other)

    # -- within

    def _running(self) -> Sender:
        """Give the sender, which is started when it is first needed."""
        if self._closed:
            raise ValueError(f"this producer of ring {self._ring.name!r} is closed")
        if self._sender is None:
            self._sender = self._start()
        self._sender.check()
        self._quality.check()
        return self._sender

    def _start(self) -> Sender:
        job = settings.job()
        self._keep_trying(self._open)
        sender = Sender(
            self._ring,
            self.name,
            self._open,
            self._about,
            self._packer.chooser.sent,
            lambda: (self._meta.capacity_bytes, self._meta.max_samples),
            self._quality,
            in_flight_bytes=self._in_flight_bytes,
            wait_s=self._wait_s,
            reconnect_s=self._reconnect_s,
        )
        self._heart = Heart(sender.beat, self._report, rings.BEAT_S, self._tell_digests)
        self._watch.hurry = self._heart.hurry
        self._account = Account(job, lambda: sender.stats, sender.pace, self._packer.chooser.described)
        self._sender = sender
        try:
            self._begin(sender)
        except BaseException:
            self._sender = None
            raise
        self._heart.start()
        atexit.register(self._at_exit)
        return sender

    def _begin(self, sender: Sender) -> None:
        while True:
            try:
                self._keep_trying(sender.start)
                return
            except RingMissingError:  # emptied between the two
                self._keep_trying(self._open)

    def _open(self) -> Meta:
        """Make the ring or check it; also called when the server lost it."""
        memory = books.server_memory(self._connection)
        limit = memory.limit_bytes if memory else 0
        wanted = self._settings.capacity_bytes
        # Later, of a ring that was made: less memory is waited for as any lack of it is.
        if self._known is None and limit and wanted and wanted > LARGEST_SHARE * limit:
            raise RingTooLargeError(
                f"ring {self._ring.name!r} asks for {units.format_size(wanted)}, but {self._connection.where} has "
                f"{units.format_size(limit)}, of which a ring may take {LARGEST_SHARE:.0%}: ask for less capacity, or "
                "give the server more (`synthbroker serve --maxmemory`)"
            )
        half = memory.maxmemory // 2 if memory and memory.maxmemory else DEFAULT_CAPACITY_BYTES
        default = min(half, int(LARGEST_SHARE * limit)) if limit else half
        open_ring = partial(self._ring.open, default_capacity_bytes=default, reopen=self._reopen)
        try:
            self._take_over(open_ring(self._known or self._settings))
        except RingMismatchError:
            if self._known is None:
                raise
            self._take_over(open_ring(self._settings))  # somebody has made the ring anew, otherwise than it was
        losses.arrive(self._ring)  # one that was just made knows its server now
        return self._meta

    def _take_over(self, meta: Meta) -> None:
        self._meta = meta
        self._known = replace(meta.settings, groups=self._settings.groups)
        self._schema = schema.parse(meta.schema) if meta.schema else None
        if self._schema is not None:
            casts.check(self._schema, self._packer.casts)
            self._packer.chooser.check_names([field.name for field in self._schema.fields])
        self._packer.checks = values.parse(meta.checks)
        if self._schema is not None:
            values.check_schema(self._packer.checks, self._schema)

    def _keep_trying(self, attempt: Callable[[], T]) -> T:
        return self._connection.keep_trying(attempt, self._reconnect_s, Event())

    def _pinned(self, arrays: Mapping[str, Shaped]) -> Schema:
        """Give the ring's schema; the first sample of a new ring makes it."""
        if self._schema is None:
            inferred = str(casts.note(schema.infer(arrays), self._packer.casts))
            values.check_schema(self._packer.checks, schema.parse(inferred))
            self._packer.chooser.check_names(arrays)
            self._known = replace(self._known or self._settings, schema=inferred)
            self._keep_trying(self._open)  # another producer may have been first; then its schema decides
        assert self._schema is not None
        if self._settings.schema is None:  # from now on samples are on their way that were checked against it
            self._settings = replace(self._settings, schema=self._meta.schema)
        return self._schema

    def _quarantine(self, reason: str, recipe: Mapping[str, Any]) -> None:
        self._quality.reason = reason
        self._keep_trying(lambda: self._ring.quarantine(reason=reason, producer=self.name, recipe=recipe))

    def _tell_digests(self) -> None:
        assert self._sender is not None
        self._watch.tell(partial(books.tell_digests, self._ring, self._sender.who))

    def _close(self, *, done: bool, flush_s: float | None = None) -> int:
        sender, already = self._sender, self._closed
        self._closed = True
        if sender is None or already:
            return 0
        try:
            sender.flush(flush_s)
            if done:
                self._quality.check()
        except BaseException:
            done = False
            raise
        finally:
            self._account.state = "closed" if done else "left"
            left = self._go(sender, done=done)
        return left

    def _go(self, sender: Sender, *, done: bool) -> int:
        left = sender.stop()
        self._heart.stop()
        self._packer.close()
        atexit.unregister(self._at_exit)
        if left:
            log.warning("ring %s: %d samples of producer %s were not sent", self._ring.name, left, self.name)
        try:
            with suppress(SynthbrokerError):  # twins may stay unknown; that this one is done must not
                self._tell_digests()
            sender.say_goodbye(closed=done)
        except SynthbrokerError as error:
            log.warning("ring %s: producer %s could not say goodbye: %s", self._ring.name, self.name, error)
        self._connection.close()
        return left

    def _at_exit(self) -> None:
        """The process ends and nobody closed: send what can be sent, and say what was not."""
        try:
            self.leave()
        except SynthbrokerError as error:
            log.warning("ring %s: at exit: %s", self._ring.name, error)

    def _about(self) -> dict[str, Any]:
        return self._account.record()

    def _report(self) -> str:
        return f"ring {self._ring.name} producer {self.name}{self._account.report()}"
