"""A thread that says every few seconds that its owner lives, whatever the owner is busy with."""

import logging
import time
from collections.abc import Callable
from threading import Event, Thread

from synthbroker.errors import SynthbrokerError

log = logging.getLogger("synthbroker")

REPORT_EVERY_S = 60.0


class Heart:
    """Beats until stopped.

    Args:
        beat: Tells the server; its errors are left to the owner's own calls, which meet them too.
        report: Gives one line about the last minute for the log.
        every_s: Seconds between beats.
        errand: Done behind each beat, and whenever `hurry` asks for it; its errors as for `beat`.
    """

    def __init__(
        self,
        beat: Callable[[], object],
        report: Callable[[], str],
        every_s: float,
        errand: Callable[[], object] = lambda: None,
    ) -> None:
        self._beat, self._errand = beat, errand
        self._report = report
        self._every_s = every_s
        self._stop, self._wake = Event(), Event()
        self._thread = Thread(target=self._run, name="synthbroker-heart", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def hurry(self) -> None:
        """Have the errand done now."""
        self._wake.set()

    def stop(self) -> None:
        """Stop, and wait until no beat is under way."""
        self._stop.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        next_report = time.monotonic() + REPORT_EVERY_S
        next_beat = time.monotonic() + self._every_s
        while True:
            hurried = self._wake.wait(max(next_beat - time.monotonic(), 0.0))
            self._wake.clear()
            if self._stop.is_set():
                return
            try:
                if not hurried:
                    next_beat = time.monotonic() + self._every_s
                    self._beat()
                self._errand()
            except SynthbrokerError as error:
                log.debug("no heartbeat: %s", error)
            if time.monotonic() >= next_report:
                next_report += REPORT_EVERY_S
                log.info("%s", self._report())
