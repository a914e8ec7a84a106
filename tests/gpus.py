"""Pretended GPUs, for the order of things on machines that have none.

Work that a stream is given is not done when it is given, but as late as CUDA may do it: when somebody waits for it. A
host that reads too early finds `POISON`, memory that was used again too early is written over, and so on: what is
wrong in the order becomes wrong in the values. There are two schedules: "lazy" does only what is waited for, "eager"
first does whatever else may be done. Copies go by address, as they do on a GPU: they keep no memory alive.

Page-locked memory is used again as torch's CachingHostAllocator does: when nobody holds it and the copies are done that
it knows of, which it finds by the storage of the tensor that is copied, or by the address where a block begins.
"""

import ctypes
import os
import threading
import weakref
from collections import deque
from contextlib import contextmanager

import numpy as np
import torch

POISON = 0xA5


class Event:
    """In the place of torch.cuda.Event."""

    gpus: "Gpus"

    def __init__(self, *, blocking=False):
        self.happened, self.stream, self.blocking = False, None, blocking

    def record(self, stream):
        assert self.stream is None, "recorded twice"
        self.stream = stream
        stream.add(self._happen)

    def query(self):
        self.gpus.check()
        return self.happened

    def synchronize(self):
        assert self.blocking, "a thread that waits would spin"
        self.gpus.waited_in.add(threading.current_thread().name)
        self.gpus.finish(self)

    def _happen(self):
        self.happened = True


class Stream:
    """In the place of torch.cuda.Stream: a queue of functions, and of events to wait for."""

    gpus: "Gpus"

    def __init__(self, device=None):
        self.device = torch.device("cuda", 0) if device is None else torch.device(device)
        self.queue = deque()
        self.waited_for = []
        self.gpus.streams.append(self)

    def add(self, work):
        self.gpus.check()
        with self.gpus.lock:
            self.queue.append(work)

    def wait_event(self, event):
        assert event.stream is not None, "waited for before it was recorded"
        self.waited_for.append(event)
        self.add(event)


class Block:
    """Page-locked memory of torch's."""

    def __init__(self, nbytes):
        self.memory = np.empty(nbytes, np.uint8)
        self.nbytes, self.start = nbytes, self.memory.ctypes.data
        self.storage, self.lent, self.copies = None, False, 0

    def lend(self, like):
        """Give it as a tensor; it is back when nobody holds that, or a view of it."""
        self.memory[:] = POISON
        lent = self.memory[: like.nbytes]
        weakref.finalize(lent, self.back).atexit = False
        self.lent = True
        plain = torch.from_numpy(lent)
        self.storage = plain.untyped_storage()._cdata
        return plain.view(like.dtype).view(like.shape)

    def back(self):
        self.lent = False


class Gpus:
    """Two of them, in place of torch's; `patch` is pytest's."""

    def __init__(self, patch, schedule):
        self.lock, self.schedule, self.pid = threading.RLock(), schedule, os.getpid()
        self.streams, self.memory, self.pinned, self.recorded = [], [], [], []
        self.blocks = []  # all page-locked memory; `pinned` is emptied by tests
        self.waited_in = set()  # names of the threads that waited for a GPU
        self._threads = threading.local()
        self.Event, self.Stream = type("Event", (Event,), {"gpus": self}), type("Stream", (Stream,), {"gpus": self})
        self.default = [self.Stream(torch.device("cuda", i)) for i in range(2)]
        self.kinds = [type(f"OnGpu{i}", (_OnGpu,), {"gpus": self, "index": i}) for i in range(2)]
        for name in "Event", "Stream", "stream", "current_stream":
            patch.setattr(torch.cuda, name, getattr(self, name))
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 2)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "set_device", lambda device: None)  # by DataLoader's thread that pins
        if hasattr(torch, "accelerator"):  # a torch for CUDA would ask the driver
            patch.setattr(torch.accelerator, "current_device_index", lambda: 0)
            patch.setattr(torch.accelerator, "set_device_index", lambda device: None)
        self._really = {name: getattr(torch.Tensor, name) for name in ("copy_", "to")} | {"empty": torch.empty}
        patch.setattr(torch, "empty", self._empty)
        for name in "copy_", "to", "is_pinned", "pin_memory":
            patch.setattr(torch.Tensor, name, _method(getattr(self, f"_{name.rstrip('_')}")))

    def check(self):
        assert os.getpid() == self.pid, "a worker process touched the GPU"

    # -- what tests call

    def tensor(self, values, index=0):
        """Put values on a GPU."""
        plain = values.resolve_conj().resolve_neg().clone(memory_format=torch.preserve_format)
        self.memory.append(plain)
        there = plain.as_subclass(self.kinds[index])
        if values.is_conj():
            there = plain.conj_physical().as_subclass(self.kinds[index]).conj()
            self.memory.append(there)
        return there

    def seen(self, tensor):
        """Give the values that work on the current stream would see."""
        found = []
        stream = self.current_stream(tensor.device)
        stream.add(lambda: found.append(bare(tensor).clone()))
        event = self.Event(blocking=True)
        event.record(stream)
        self.finish(event)
        return found[0]

    # -- in the place of torch

    def current_stream(self, device=None):
        self.check()
        index = torch.device("cuda:0" if device is None else device).index
        return getattr(self._threads, "streams", {}).get(index, self.default[index])

    @contextmanager
    def stream(self, stream):
        before = dict(getattr(self._threads, "streams", {}))
        self._threads.streams = before | {stream.device.index: stream}
        yield
        self._threads.streams = before

    def _empty(self, *size, pin_memory=False, **how):
        plain = self._really["empty"](*size, **how)
        if not pin_memory or not plain.nbytes:
            return plain
        self.check()
        with self.lock:
            free = [block for block in self.blocks if not (block.lent or block.copies)]
            block = next((block for block in free if block.nbytes == plain.nbytes), None)
            if block is None:
                block = Block(plain.nbytes)
                self.blocks.append(block)
                self.pinned.append(block)
            return block.lend(plain)

    def _is_pinned(self, tensor):
        return not tensor.numel() or any(
            block.start <= tensor.data_ptr() < block.start + block.nbytes for block in self.blocks
        )

    def _pin_memory(self, tensor):
        if self._is_pinned(tensor):
            return tensor
        block = self._empty(tensor.nbytes, dtype=torch.uint8, pin_memory=True)
        there = self._really["copy_"](block.view(tensor.dtype).reshape(tensor.shape), tensor)
        return there.as_subclass(type(tensor))

    def _copy(self, to, source, non_blocking=False):
        if not isinstance(source, _OnGpu):
            return self._really["copy_"](to, source)
        assert non_blocking, "the host would wait"
        assert self._is_pinned(to), "the host would wait: its memory is not page-locked"
        assert (to.is_contiguous(), source.is_contiguous(), to.dtype) == (True, True, source.dtype), "it would wait"
        self._move(to, source, source.device)
        return to

    def _to(self, tensor, *where, non_blocking=False, **how):
        device = torch.device(where[0]) if where and isinstance(where[0], str | torch.device) else None
        if device is None or device.type != "cuda":
            return self._really["to"](tensor, *where, **how)
        assert non_blocking, "the host would wait"
        assert self._is_pinned(tensor), "the host would wait: its memory is not page-locked"
        there = self._really["empty"](tensor.shape, dtype=tensor.dtype)
        there.reshape(-1).view(torch.uint8).fill_(POISON)
        self.memory.append(there)
        self._move(there, tensor, device, self._known(tensor))
        return there.as_subclass(self.kinds[device.index])

    def _known(self, tensor):
        """Find what torch's allocator would know to be copied."""
        storage, start = tensor.untyped_storage()._cdata, tensor.data_ptr()
        return next((block for block in self.blocks if block.lent and storage == block.storage), None) or next(
            (block for block in self.blocks if block.lent and start == block.start), None
        )

    def _move(self, to, source, device, block=None):
        where = to.data_ptr(), source.data_ptr(), to.nbytes

        def move():
            ctypes.memmove(*where)
            if block is not None:
                block.copies -= 1

        if block is not None:
            block.copies += 1
        self.current_stream(device).add(move)

    # -- doing the work

    def finish(self, event):
        """Do what must be done before an event happens."""
        self.check()
        with self.lock:
            while not event.happened:
                if self.schedule == "eager":
                    self._do_all_but(event.stream)
                work = event.stream.queue.popleft()
                if isinstance(work, Event):
                    self.finish(work)
                else:
                    work()

    def _do_all_but(self, stream):
        going = True
        while going:
            going = False
            for other in self.streams:
                while other is not stream and other.queue:
                    work = other.queue[0]
                    if isinstance(work, Event) and not work.happened:
                        break
                    other.queue.popleft()
                    going = True
                    if not isinstance(work, Event):
                        work()


class _OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU."""

    gpus: Gpus
    index: int

    @property
    def device(self):
        return torch.device("cuda", self.index)

    def record_stream(self, stream):
        self.gpus.recorded.append((self.untyped_storage().data_ptr(), stream))

    def fill_(self, value):
        self.gpus.current_stream(self.device).add(lambda: bare(self).fill_(value))
        return self

    def contiguous(self):
        return self if self.is_contiguous() else self._later_copy()

    def resolve_conj(self):
        return self._later_copy() if self.is_conj() else self

    def resolve_neg(self):
        return self._later_copy() if self.is_neg() else self

    def _later_copy(self):
        copy = torch.zeros(self.shape, dtype=self.dtype)
        self.gpus.memory.append(copy)
        self.gpus.current_stream(self.device).add(lambda: self.gpus._really["copy_"](copy, bare(self)))
        return copy.as_subclass(type(self))

    def __del__(self):
        if os.getpid() != self.gpus.pid:
            os._exit(1)  # as a process ends that frees GPU memory without CUDA

    def cpu(self):
        raise AssertionError("the host would wait")

    numpy = tolist = item = cpu


def _method(function):
    """Make a function that a class may have as a method."""

    def method(tensor, *args, **how):
        return function(tensor, *args, **how)

    return method


def bare(tensor):
    """See a pretended tensor as what it is."""
    return tensor.as_subclass(torch.Tensor)
