"""A server's process, which ends with ours."""

import os
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

from synthbroker import tether
from synthbroker.errors import ServerStartError

LOG_TAIL_BYTES = 2000


class Child:
    """A server's process, kept by a thread that lives as long as it does, as `tether` needs it.

    Attributes:
        ended: Set when it has ended, for whatever reason.
        program: What is run.
        log_path: Where its output goes, behind what is there already.
    """

    def __init__(self, program: Path, config_path: Path, log_path: Path) -> None:
        self.ended = threading.Event()
        self.program = program
        self._command = [sys.executable, "-P", "-S", tether.__file__, str(os.getpid()), str(program), str(config_path)]
        self.log_path, self._log_from = log_path, 0
        self._launched = threading.Event()
        self._process: subprocess.Popen[bytes]
        self._error: OSError | None = None
        threading.Thread(target=self._keep, name="synthbroker-server", daemon=True).start()
        self._launched.wait()
        if self._error is not None:
            raise ServerStartError(f"cannot run {self._command[0]}: {self._error}") from self._error

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def status(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        return self._process.returncode

    def stop(self, wait_s: float) -> None:
        """End it: first by asking, after so many seconds by force."""
        self._process.terminate()
        if not self.ended.wait(wait_s):
            self._process.kill()
            self.ended.wait()

    def said(self) -> str:
        """Return what it has written since it was started."""
        with suppress(OSError), self.log_path.open("rb") as log:
            log.seek(self._log_from)
            return log.read().decode(errors="replace")
        return ""

    def log_tail(self) -> str:
        """Return the last of what is in its log."""
        with suppress(OSError), self.log_path.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
            return log.read().decode(errors="replace").strip() or "(nothing)"
        return "(its log is gone)"

    def _keep(self) -> None:
        try:
            with self.log_path.open("ab") as log:
                self._log_from = log.tell()
                # A session of its own: Ctrl-C in the terminal is for the command line, which then stops the server.
                self._process = subprocess.Popen(
                    self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
        except OSError as error:
            self._error = error
        finally:
            self._launched.set()
        if self._error is None:
            self._process.wait()
        self.ended.set()
