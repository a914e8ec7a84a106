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
    """

    def __init__(self, beat: Callable[[], object], report: Callable[[], str], every_s: float) -> None:
        self._beat = beat
        self._report = report
        self._every_s = every_s
        self._stop = Event()
        self._thread = Thread(target=self._run, name="synthbroker-heart", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Stop, and wait until no beat is under way."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        next_report = time.monotonic() + REPORT_EVERY_S
        while not self._stop.wait(self._every_s):
            try:
                self._beat()
            except SynthbrokerError as error:
                log.debug("no heartbeat: %s", error)
            if time.monotonic() >= next_report:
                next_report += REPORT_EVERY_S
                log.info("%s", self._report())
