"""Copies between a GPU and page-locked memory, on streams of our own. torch is looked at only where it is imported.

The rules that are kept, from torch's documentation ("CUDA semantics", `torch.cuda.Stream.wait_event`,
`torch.cuda.Event`, `torch.Tensor.record_stream`):

1. *Order.* Streams run independently of each other. What one does comes after what another did only by an event that
   was recorded there and is waited for here; `Stream.wait_event` holds up the stream, not the calling thread.
2. *Host memory.* A copy runs beside the host only if it is `non_blocking` and the host's side is page-locked. Until an
   event behind it has happened, that memory is neither read nor used for anything else: `Event.synchronize`.
3. *GPU memory.* The allocator knows only the stream that a tensor was made on. Whoever uses it on another one says so
   by `Tensor.record_stream`, else its memory may be given away while it is read.
"""

import os
import re
import sys
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from synthbroker import settings
from synthbroker.pool import Bytes

_DEVICE = re.compile(r"cpu|cuda(:[0-9]+)?")


class Flight:
    """Copies that were started together and may be under way.

    Holds the host memory that they use until they are known to be done, also if everybody else has let go of it.

    Args:
        lane: Whose stream they are on.
        held: The memory.
    """

    def __init__(self, lane: "Lane", held: object) -> None:
        self._lane, self._held = lane, held
        # Blocking: a thread that waits sleeps instead of spinning.
        self.done: Any = lane.torch.cuda.Event(blocking=True)
        self.done.record(lane.stream)

    def wait(self) -> None:
        """Hold this thread up until the copies are done (rule 2); other threads go on."""
        self.done.synchronize()
        self._land()

    def land(self) -> None:
        """Let go of the memory if the copies are done; does not wait."""
        if self.done.query():
            self._land()

    def _land(self) -> None:
        self._held = None
        self._lane.flying.pop(id(self), None)


class Lane:
    """Our stream for one direction on one GPU of this process.

    Args:
        torch: The module.
        device: The GPU, with its index.

    Attributes:
        flying: What may be under way; keeps the memory of flights that nobody waits for.
    """

    def __init__(self, torch: Any, device: Any) -> None:
        self.torch, self.device = torch, device
        self.stream: Any = torch.cuda.Stream(device)
        self.flying: dict[int, Flight] = {}

    def current(self) -> Any:
        """Give the stream that the calling thread's work on this GPU goes to."""
        return self.torch.cuda.current_stream(self.device)

    def after(self, stream: Any) -> None:
        """Let all later work here come after what the other stream was given so far (rule 1)."""
        event = self.torch.cuda.Event()
        event.record(stream)
        self.stream.wait_event(event)

    def work(self) -> AbstractContextManager[None]:
        """Give work to this lane while it lasts, in the calling thread only."""
        context: AbstractContextManager[None] = self.torch.cuda.stream(self.stream)
        return context

    def take_off(self, held: object) -> Flight:
        """Mark the end of what this lane was given so far, which uses `held`."""
        for flight in list(self.flying.values()):
            flight.land()
        flight = Flight(self, held)
        self.flying[id(flight)] = flight
        return flight


_lanes: dict[tuple[int, str, str], Lane] = {}


def lane(device: Any, way: str) -> Lane:
    """Give the lane of a GPU.

    Args:
        device: A torch device with its index.
        way: "out" from the GPU, "in" to it: copies of both directions may run at once.
    """
    key = (os.getpid(), str(device), way)
    found = _lanes.get(key)
    return _lanes.setdefault(key, Lane(sys.modules["torch"], device)) if found is None else found


def pinned(nbytes: int) -> Bytes:
    """Make page-locked memory, as blocks for a `Pool`; the array holds the tensor that it is a view of.

    This may wait for the GPU, which is why blocks are used again. torch takes a power of two from the system.
    """
    torch = sys.modules["torch"]
    block: Bytes = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()
    return block


def check_device(device: object) -> str | None:
    """Check the word for a device; that it is there is checked where it is first used.

    Args:
        device: None, text, or a torch device.

    Raises:
        TypeError, ValueError: Not "cpu", "cuda" or "cuda:0", "cuda:1", ...
    """
    torch = sys.modules.get("torch")
    if device is None:
        return None
    if torch is not None and isinstance(device, torch.device):
        device = str(device)
    if not isinstance(device, str):
        raise TypeError(f"device must be a text like 'cuda:0' or a torch device, got {device!r}")
    if not _DEVICE.fullmatch(device):
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {device!r}; for others call batch.to(...)")
    return device


def check_there(device: str | None) -> None:
    """Refuse a GPU that torch does not see; says nothing of other devices, or where torch is not imported.

    Raises:
        ValueError: It is not there; says how many are, and why they may be fewer than thought.
    """
    torch = sys.modules.get("torch")
    if torch is None or device is None or not device.startswith("cuda"):
        return
    if not _DEVICE.fullmatch(device):
        raise ValueError(f"device must be cuda or cuda:N, got {device!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(device.partition(":")[2] or 0) < count:
        return
    visible = settings.visible_gpus()
    why = "" if visible is None else f"; CUDA_VISIBLE_DEVICES names {visible}"
    if torch.version.cuda is None and torch.version.hip is None:
        why = ": it was built without CUDA"
    raise ValueError(f"device {device!r} is not there: torch {torch.__version__} sees {count} GPUs{why}")


def plain(nbytes: int) -> Bytes:
    """Make memory that is not page-locked, with the signature of `pinned`."""
    return np.empty(nbytes, np.uint8)
