"""Run a program that ends with the process that started it: `python tether.py PARENT_PID PROGRAM ARGUMENT…`.

A program of its own, because `preexec_fn` runs between fork and exec, where a process with threads may deadlock.
The kernel remembers the wish over exec, and sends the signal when the *thread* that started the program ends: so that
thread must live as long as the program does. Linux only; elsewhere the program is run as it is.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(parent: int, program: str, *arguments: str) -> None:
    """Become the program; does not return.

    Raises:
        SystemExit: The program cannot be run, or the parent is gone already.
    """
    try:
        if sys.platform == "linux":
            _die_with_parent(parent)
        os.execv(program, [program, *arguments])
    except OSError as error:
        sys.exit(f"cannot run {program}: {error}")


def _die_with_parent(parent: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        sys.exit("the process that asked for the server is gone")


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
