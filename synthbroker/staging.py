"""Samples on their way from a GPU: seen at once, copied beside the generator, waited for where they are encoded.

The rules are those of `lanes`. The generator's thread waits for nothing; its stream, told so once per `put`, does its
later work after the copy, so that a tensor may be overwritten in place as soon as `put` returns. Tensors that were lent
(`copy=False`) are not waited for at all: the user leaves them alone until `flush`.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np

from synthbroker import lanes
from synthbroker.lanes import Flight
from synthbroker.pool import Bytes, Pool

Array = np.ndarray[Any, np.dtype[Any]]

KEEP_BYTES = 256 * 10**6  # of page-locked memory that lies free: as much as is in flight by default
_pool = Pool(KEEP_BYTES, lanes.pinned)


@dataclass(frozen=True)
class OnGpu:
    """A tensor that is on a GPU, seen from outside: nothing was copied, nothing waited for.

    Attributes:
        tensor: A detached torch tensor, of any strides, its conjugate or negative bit set or not.
        dtype: What numpy (or ml_dtypes) calls its dtype.
    """

    tensor: Any = field(repr=False)
    dtype: np.dtype[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return tuple(self.tensor.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of a contiguous copy."""
        return math.prod(self.shape) * self.dtype.itemsize


class Staged(NamedTuple):
    """One sample in host memory, or on its way there.

    Attributes:
        arrays: All fields, in their order. Those in `own` are filled only after `wait`.
        own: Names of the fields in memory of ours, C-contiguous; the others are the caller's arrays as they came.
    """

    arrays: Mapping[str, Array]
    own: frozenset[str] = frozenset()
    flights: tuple[Flight, ...] = ()

    def wait(self) -> None:
        """Hold this thread up until `arrays` may be read; may be called again."""
        for flight in self.flights:
            flight.wait()


def fetch(sample: Mapping[str, "Array | OnGpu"], *, lent: bool = False) -> Staged:
    """Start to copy what is on GPUs to page-locked memory.

    To be called in the thread whose current stream made the tensors. Does not wait for any GPU.

    Args:
        sample: Fields as `tensors.as_sample` gives them.
        lent: The tensors are left alone until they were sent: the caller's stream goes on beside the copy.

    Returns:
        The sample. If it is dropped without `wait`, its memory is still not used again before the copy is done.
    """
    own = frozenset([name for name, value in sample.items() if isinstance(value, OnGpu)])
    if not own:
        return Staged(cast("Mapping[str, Array]", sample))
    arrays: dict[str, Array] = {}
    waiting: dict[Any, list[tuple[Any, Bytes]]] = {}
    for name, value in sample.items():
        if isinstance(value, OnGpu):
            memory = _pool.take(value.nbytes) if value.nbytes else lanes.plain(0)
            arrays[name] = memory.view(value.dtype).reshape(value.shape)
            waiting.setdefault(value.tensor.device, []).append((value.tensor, memory))
        else:
            arrays[name] = value
    return Staged(arrays, own, tuple(_start(device, pairs, lent) for device, pairs in waiting.items()))


def _start(device: Any, pairs: list[tuple[Any, Bytes]], lent: bool) -> Flight:
    torch = sys.modules["torch"]
    lane = lanes.lane(device, "out")
    caller = lane.current()
    lane.after(caller)  # rule 1: the copy comes after what made the tensors
    try:
        with lane.work():
            for tensor, memory in pairs:
                tensor.record_stream(lane.stream)  # rule 3: the caller may let go of it at once
                # What is not plain is made so on the GPU: on the host it would have to wait for the copy.
                bare = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
                torch.from_numpy(memory).copy_(bare, non_blocking=True)
    finally:  # whatever was begun uses the memory
        flight = lane.take_off([memory for _, memory in pairs])
    if not lent:
        caller.wait_event(flight.done)  # rule 1: what overwrites the tensors comes after the copy
    return flight
