"""What holds threads and connections ends with its owner, and with the process at the latest."""

from collections.abc import Callable
from multiprocessing.util import Finalize
from threading import Thread
from typing import Any
from weakref import finalize


def end_with(owner: object, end: Callable[[], object]) -> "Finalize[Any]":
    """Have something ended when the process ends, or when nobody holds its owner any more.

    A notebook makes its dataset anew and forgets the former one, which would otherwise live on and keep its samples.

    Args:
        owner: Whoever this belongs to.
        end: Called once; must not hold the owner.

    Returns:
        What ends it now, when called.
    """
    ending = Finalize(None, end, exitpriority=10)  # unlike atexit this also runs at the end of a forked worker
    finalize(owner, _end_soon, ending).atexit = False
    return ending


def _end_soon(ending: "Finalize[Any]") -> None:
    """End in a thread of its own: garbage is found in whatever thread allocates, be it one that is waited for here."""
    if ending.still_active():
        Thread(target=ending, name="synthbroker-ends", daemon=True).start()
