"""Waiting with an end: for a ring to be made, for samples to come, for room."""

import logging
import time
from collections.abc import Callable
from threading import Event

from synthbroker import units
from synthbroker.errors import RingMissingError, StarvedError, SynthbrokerError
from synthbroker.options import ReadOptions
from synthbroker.replies import Meta
from synthbroker.ring import Ring

log = logging.getLogger("synthbroker")

WARN_EVERY_S = 60.0
_FIRST_WARNING_S = 5.0  # a ring that is not there may be a misspelt one


class Waiting:
    """How long there has been nothing, and when to say so; `what` reads like "ring 'brains': no sample"."""

    def __init__(self, wait_s: float, what: str, first_warning_s: float | None = None) -> None:
        self._wait_s, self._what = wait_s, what
        self._since = time.monotonic()
        self._next_warning_s = WARN_EVERY_S if first_warning_s is None else first_warning_s

    def check(self, why: str | Callable[[], str], error: type[SynthbrokerError] = StarvedError) -> None:
        """Warn each minute; raise an error after `wait_s`."""
        waited_s = time.monotonic() - self._since
        if waited_s < min(self._wait_s, self._next_warning_s):
            return
        text = f"{self._what} for {units.format_duration(waited_s)}; {why if isinstance(why, str) else why()}"
        if waited_s >= self._wait_s:
            raise error(text)
        self._next_warning_s += WARN_EVERY_S
        log.warning("%s", text)


def wait_for_ring(ring: Ring, options: ReadOptions, stop: Event) -> Meta | None:
    """Block until the ring is there and knows its schema; None when told to stop."""
    waiting = Waiting(options.wait_s, f"ring {ring.name!r}: no sample", _FIRST_WARNING_S)
    while not stop.is_set():
        try:
            meta = ring.connection.keep_trying(ring.read_meta, options.reconnect_s, stop)
            if meta.schema or meta.ended:
                return meta
            why = "no producer has put a sample yet"
        except RingMissingError as error:
            why = str(error)
        waiting.check(why)
        ring.connection.keep_trying(lambda: ring.wait_for_sample("0-0"), options.reconnect_s, stop)
    return None
