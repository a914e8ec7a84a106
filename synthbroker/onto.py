"""Batches to where the training loop wants them: into page-locked memory, or onto a GPU ahead of time.

A batch takes three steps, in two threads. Its memory is made by `Delivery.memory`, so that samples are received and
unpacked straight into what a GPU can read; `Delivery.ship`, in the thread that made the batch, starts the copy on a
stream of ours; `Delivery.receive`, in the training loop, tells the loop's current stream to wait for the copy, which by
then is usually done. The rules are those of `lanes`. No thread waits for a GPU.

Page-locked batches that are handed out as they are (`pin`) may be copied to a GPU by the loop, on streams that nobody
here knows, and let go of before the copy is done. Only torch's allocator hears of such copies (rule 2;
`CachingHostAllocator` in its sources): it must have the memory back, and find it by the tensor that is copied.
"""

import logging
from collections import deque
from collections.abc import Callable
from threading import Lock
from typing import Any, cast
from weakref import WeakSet, WeakValueDictionary, ref

import torch

from synthbroker import lanes
from synthbroker.batch import Batch, BatchInfo, TupleBatch
from synthbroker.lanes import Flight, Lane
from synthbroker.pool import Bytes, Pool

log = logging.getLogger("synthbroker")

KEEP_BYTES = 10**9  # of batch memory that lies free: as much as may be prefetched


class Shipped:
    """A batch on its way to a GPU, or one that has a place in the queue for it.

    Args:
        batch: Tensors in page-locked memory.
    """

    def __init__(self, batch: Any) -> None:
        self.batch = batch
        self.flight: Flight | None = None  # None: its copy has not begun


class Delivery:
    """Takes batches to where the training loop wants them. One for each reader of a ring in the training process.

    Args:
        device: "cuda", "cuda:1" or None; see `lanes.check_device`. "cuda" is the thread's current GPU.
        pin: Give batches in page-locked memory; a GPU implies it on the way. Without any GPU it is told and left.
        ahead: At most so many batches lie on the GPU, or are on their way there, before they are asked for.

    Attributes:
        memory: Where the memory of batches comes from.

    Raises:
        ValueError: The GPU is not there.
    """

    def __init__(self, device: str | None = None, *, pin: bool = False, ahead: int = 1) -> None:
        lanes.check_there(device)
        self._lane = _lane_to(device) if device else None
        self.memory = Pool(KEEP_BYTES, self._allocate)
        self._owners: WeakValueDictionary[int, torch.Tensor] = WeakValueDictionary()  # torch's own, by address
        self._pin = False
        if pin:
            self.pin()
        self._ahead = max(ahead, 1)
        # Weak: a training loop that was left does not ask for what it was sent.
        self._ashore: deque[ref[Shipped]] = deque()
        self._aboard: WeakSet[Shipped] = WeakSet()
        self._lock = Lock()

    def pin(self) -> None:
        """Give batches in page-locked memory from now on."""
        self._pin = torch.cuda.is_available()
        if not self._pin:
            log.warning("pin_memory=True: torch sees no GPU, batches stay in ordinary memory")
        elif self._lane is None:
            self.memory.keep_nothing()

    def ship(self, batch: Any) -> Any:
        """Start to bring a batch where it is wanted; for `receive`. Called by the thread that made it."""
        if self._pin or self._lane:
            batch = each_tensor(self._pinned, batch)
        if self._lane is None:
            return batch
        shipped = Shipped(batch)
        with self._lock:
            self._ashore.append(ref(shipped))
            self._board(self._lane)
        return shipped

    def receive(self, shipped: Any) -> Any:
        """Give the batch to the training loop. Called by its thread, whose current stream uses it from now on."""
        if not isinstance(shipped, Shipped):
            return each_tensor(self._pinned, shipped) if self._pin else shipped
        assert self._lane is not None
        with self._lock:
            flight = shipped.flight or self._copy(self._lane, shipped)
            self._aboard.discard(shipped)
            self._board(self._lane)
        stream = self._lane.current()
        stream.wait_event(flight.done)  # rule 1
        each_tensor(lambda tensor: tensor.record_stream(stream), shipped.batch)  # rule 3: it was made on our stream
        return shipped.batch

    def _board(self, lane: Lane) -> None:
        while self._ashore and len(self._aboard) < self._ahead:
            shipped = self._ashore.popleft()()
            if shipped is not None and shipped.flight is None:
                self._copy(lane, shipped)

    def _copy(self, lane: Lane, shipped: Shipped) -> Flight:
        host = shipped.batch
        try:
            with lane.work():
                shipped.batch = each_tensor(lambda tensor: tensor.to(lane.device, non_blocking=True), host)
        finally:  # rule 2: it holds `host`, so that its blocks do not go back to the pool yet
            flight = lane.take_off(host)
        shipped.flight = flight
        self._aboard.add(shipped)
        return flight

    def _allocate(self, nbytes: int) -> Bytes:
        if self._lane:
            return lanes.pinned(nbytes)
        if not self._pin:
            return lanes.plain(nbytes)
        block = lanes.pinned(nbytes)
        owner = cast("torch.Tensor", block.base)
        with self._lock:
            self._owners[owner.data_ptr()] = owner
        return block

    def _pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        """Give a tensor in page-locked memory that torch knows as its own."""
        if tensor.device.type != "cpu":
            return tensor
        if tensor.layout != torch.strided or not (tensor.numel() and tensor.is_pinned()):
            return tensor.pin_memory()
        owner = self._owner_of(tensor.data_ptr())
        if owner is None:
            return tensor
        offset, size = tensor.data_ptr() - owner.data_ptr(), tensor.element_size()
        if type(tensor) is not torch.Tensor or tensor.is_conj() or tensor.is_neg() or offset % size:
            return tensor.clone().pin_memory()
        typed = owner[: owner.nbytes // size * size].view(tensor.dtype)
        return typed.as_strided(tensor.shape, tensor.stride(), offset // size)

    def _owner_of(self, address: int) -> torch.Tensor | None:
        with self._lock:
            owners = list(self._owners.items())
        return next((owner for start, owner in owners if start <= address < start + owner.nbytes), None)


def _lane_to(device: str) -> Lane:
    there = torch.device(device)
    return lanes.lane(torch.device("cuda", torch.cuda.current_device() if there.index is None else there.index), "in")


def each_tensor(change: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """Put something in the place of each tensor in a batch; what is neither a tensor nor a container stays."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, Batch):
        return Batch.of({name: each_tensor(change, item) for name, item in value.items()}, value.info)
    if isinstance(value, TupleBatch):
        return TupleBatch.of(tuple(each_tensor(change, item) for item in value), value.names, value.info)
    if type(value) in (list, tuple):
        return type(value)(each_tensor(change, item) for item in value)
    if type(value) is dict:
        return {name: each_tensor(change, item) for name, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(each_tensor(change, item) for item in value))
    return value


# -- through worker processes, which leave GPUs alone

_harbours: WeakValueDictionary[str, Delivery] = WeakValueDictionary()


class Parcel:
    """A batch from a worker process, for the training process to ship.

    DataLoader's own thread for page-locked memory, which takes batches out of the workers' queue ahead of the training
    loop, calls `pin_memory` of what it does not know (torch.utils.data, "Memory Pinning"): there it is shipped.

    Args:
        batch: Tensors in ordinary memory.
        info: Where it came from.
        harbour: Word of the `Delivery` in the training process.
    """

    def __init__(self, batch: Any, info: BatchInfo, harbour: str) -> None:
        self.batch, self.info, self._harbour = batch, info, harbour

    def pin_memory(self) -> "tuple[Any, BatchInfo]":
        """Ship it; gives what `Delivery.receive` takes."""
        return _harbours[self._harbour].ship(self.batch), self.info


def open_harbour(word: str, delivery: Delivery) -> None:
    """Let parcels of this word come to a delivery, as long as somebody holds it."""
    _harbours[word] = delivery
