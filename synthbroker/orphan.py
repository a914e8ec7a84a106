"""Ends a worker process whose training process was killed: else its heartbeat would keep its samples from all others.

A process that is killed cannot end its workers (multiprocessing's daemons, DataLoader's among them). DataLoader's own
look at the parent (torch.utils.data._utils.worker, ManagerWatchdog) is taken between two batches, never while a worker
waits for samples; and it goes by a change of the parent's number, which does not come where the parent was killed
before the first look. So a thread looks here, whatever the worker itself waits for, a lock that a fork left taken
included. It goes by three signs:

| sign | alone it would not do, because |
| --- | --- |
| the pipe from the parent is closed | workers that are forked later inherit its other end, and may hang |
| another process is the parent | it may be already, before the first look; and is, where a fork server starts workers |
| no process has the parent's number | one that nobody has waited for keeps it, and it is given again |

The kernel could do it (PR_SET_PDEATHSIG), but does so when the *thread* that started the worker ends, and a training
may well go on without that one.
"""

import multiprocessing
import os
import signal
import time
from threading import Thread
from typing import Any

_GLANCE_S = 1.0
_GRACE_S = 5.0  # for a handler of SIGTERM, which a worker may have inherited; some do nothing
_watching = 0  # the process whose parent is watched


def watch_parent() -> None:
    """End this process soon after its parent, if it is a worker; call it before anything that may block."""
    global _watching
    parent = multiprocessing.parent_process()
    if parent is None or not multiprocessing.current_process().daemon or _watching == os.getpid():
        return
    _watching = os.getpid()
    Thread(target=_watch, args=(parent,), name="synthbroker-watch", daemon=True).start()


def _watch(parent: Any) -> None:
    started_us = os.getppid() == parent.pid
    while parent.is_alive() and _exists(parent.pid) and not (started_us and os.getppid() != parent.pid):
        parent.join(_GLANCE_S)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_S)
    os.kill(os.getpid(), signal.SIGKILL)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's by now: the other signs will tell
    return True
