"""From entries of the stream to a batch, whose memory their payloads are received into."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from synthbroker import codec, schema, wire
from synthbroker.batch import Batch, BatchInfo, TupleBatch
from synthbroker.head import Tensor
from synthbroker.options import ReadOptions
from synthbroker.payload import Get, receive
from synthbroker.pool import Pool, size_class
from synthbroker.replies import Given, Meta
from synthbroker.schema import Array, Schema

_FREE_SHAPE_SHARE = 4  # a tensor of free shape may unpack to so many times the ring's capacity


class Placed(NamedTuple):
    """A sample that has arrived."""

    given: Given
    entry: wire.Entry
    age_s: float


@dataclass(frozen=True)
class Finish:
    """How arrays become what the training loop gets.

    Attributes:
        tensor: Makes a tensor of an array; they may share memory.
        collate: Makes a batch of what `transform` gave, where the user names no `collate`.
        memory: Where the memory of batches comes from; None: numpy's.
        ship: Called with each whole batch, in the thread that made it; what it gives is handed out.
    """

    tensor: Callable[[Array], Any]
    collate: Callable[[list[Any]], Any]
    memory: Pool | None = None
    ship: Callable[[Any], Any] = lambda batch: batch


def largest_free_bytes(meta: Meta) -> int:
    """Say how much memory a tensor may take whose shape the schema leaves free."""
    return _FREE_SHAPE_SHARE * meta.capacity_bytes


class Span(NamedTuple):
    """Where in a payload a tensor lies that is not packed."""

    tensor: Tensor
    start: int
    stop: int


class Plan:
    """What all batches of a ring have in common.

    Args:
        ring: Name of the ring.
        meta: Its record.
        options: How it is read.
        finish: What the arrays become.
        pool: Where the batches' memory comes from.

    Raises:
        ValueError: Fields are asked for that the ring's samples do not have.
    """

    def __init__(self, ring: str, meta: Meta, options: ReadOptions, finish: Finish, pool: Pool) -> None:
        self.ring, self.epoch, self.options, self.finish, self.pool = ring, meta.epoch, options, finish, pool
        self._schema = schema.parse(meta.schema) if meta.schema else Schema(())
        self._limit = largest_free_bytes(meta)
        self.fixed = {field.name for field in self._schema.fields if field.fixed}
        self.names = tuple(options.fields or self._schema.names)
        self.one_by_one = options.transform is not None or options.collate is not None
        self._checked: object = None  # what the heads of the kind of samples that was read last describe
        self._spans: tuple[Span, ...] = ()
        unknown = set(self.names) - set(self._schema.names)
        if unknown:
            raise ValueError(f"fields {sorted(unknown)} are not in ring {ring!r}, whose samples are [{self._schema}]")

    def read(self, given: Given) -> wire.Entry:
        """Check an entry as far as it can be without its payload.

        Raises:
            DamagedSampleError: It is no sample of this ring.
        """
        entry = wire.read_entry(given.fields)
        if entry.head.tensors is not self._checked:  # the same object for all samples of a kind
            wire.check_schema(entry.head, self._schema, self._limit)
            self._checked, self._spans = entry.head.tensors, self._find_spans(entry.head.tensors)
        return entry

    def spans(self, entry: wire.Entry) -> tuple[Span, ...]:
        """Say what of an entry's data goes where, where nothing but copying is left to be done; else nothing."""
        plain = entry.head.tensors is self._checked and not entry.parts and len(entry.head.parts) == 1
        return self._spans if plain else ()

    def _find_spans(self, tensors: Sequence[Tensor]) -> tuple[Span, ...]:
        spans, start = [], 0
        for tensor in tensors:
            if tensor.name in self.names:
                if self.one_by_one or tensor.name not in self.fixed or tensor.codec != codec.RAW:
                    return ()
                spans.append(Span(tensor, start, start + tensor.nbytes))
            start += tensor.packed_bytes
        return tuple(spans)


class Assembly:
    """One batch in the making.

    Args:
        plan: What it has in common with others.
        size: Samples in a full batch.
    """

    def __init__(self, plan: Plan, size: int) -> None:
        self._plan, self.size, self.epoch = plan, size, plan.epoch
        self.placed: list[Placed] = []
        self.others: tuple[int, ...] = ()
        self.round: tuple[int, int] | None = None
        self.nbytes = 0
        self._samples: list[Any] = []
        self._arrays: dict[str, Array] = {}
        self._slots: dict[str, memoryview] = {}
        self._lists: dict[str, list[Array]] = {}

    @property
    def missing(self) -> int:
        """How many samples are still needed."""
        return self.size - len(self.placed)

    @property
    def holding(self) -> list[int]:
        """Numbers of the samples that the group waits for."""
        return [placed.given.number for placed in self.placed if placed.given.uses < 2]

    def move_to(self, plan: Plan) -> None:
        """Go on in another epoch of the ring, where all that is placed is still known."""
        self._plan, self.epoch = plan, plan.epoch

    def add(self, given: Given, entry: wire.Entry, now_s: float, get: Get) -> int:
        """Receive one sample, given at `now_s` by the server's clock, into the next place; returns its bytes.

        Raises:
            DamagedSampleError: It cannot be; the place stays free.
        """
        spans = self._plan.spans(entry)
        nbytes = self._copy(entry, spans) if spans else self._receive(entry, get)
        self.placed.append(Placed(given, entry, round(max(now_s - entry.made_s, 0.0), 3)))
        self.nbytes += nbytes
        return nbytes

    def _copy(self, entry: wire.Entry, spans: Sequence[Span]) -> int:
        """Copy a payload that is here already, and not packed, to the places of its tensors."""
        data, place, nbytes = entry.data, len(self.placed), 0
        wire.check_part(0, entry.head.parts[0], (memoryview(data),))
        for tensor, start, stop in spans:
            slot = self._slots.get(tensor.name)
            if slot is None:
                slot = self._make_slots(tensor)
            size = stop - start
            slot[place * size : (place + 1) * size] = data[start:stop]
            nbytes += size
        return nbytes

    def _receive(self, entry: wire.Entry, get: Get) -> int:
        own: dict[str, Array] = {}
        targets: dict[str, memoryview] = {}
        for tensor in entry.head.tensors:
            if tensor.name in self._plan.names:
                targets[tensor.name] = self._target(tensor, own)
        receive(entry, targets, self._plan.pool, get)
        if self._plan.one_by_one:
            self._samples.append(self._transformed(own, entry))
        else:
            for name, array in own.items():
                self._lists.setdefault(name, []).append(array)
        return sum([target.nbytes for target in targets.values()])

    def reserve(self, batches: int, most_bytes: int) -> None:
        """Have memory for so many batches like this one, if that is not too much; not for free shapes."""
        batches = min(batches, most_bytes // max(self.nbytes, 1))
        for nbytes, alike in Counter(size_class(array.nbytes) for array in self._arrays.values()).items():
            self._plan.pool.reserve(nbytes, batches * alike)

    def result(self) -> tuple[Any, BatchInfo]:
        """Give the batch, full or not."""
        info = self._info()
        plan = self._plan
        if plan.one_by_one:
            collated = (plan.options.collate or plan.finish.collate)(self._samples)
            return self._dressed(collated, info), info
        n = len(self.placed)
        make = plan.finish.tensor
        tensors: dict[str, Any] = {}
        for name in plan.names:
            if name in self._lists:
                tensors[name] = [make(array) for array in self._lists[name]]
            else:
                tensors[name] = make(self._arrays[name][:n])
        whole = tuple(tensors.values()) if plan.options.fields else tensors
        return self._dressed(whole, info), info

    def _target(self, tensor: Tensor, own: dict[str, Array]) -> memoryview:
        """Give the memory that a tensor goes to: its place in the batch, or where there is none an array in `own`."""
        name, nbytes = tensor.name, tensor.nbytes
        if self._plan.one_by_one or name not in self._plan.fixed:
            own[name] = self._array(tensor.shape, tensor.dtype)
            return codec.as_bytes(own[name])
        slots = self._slots[name] if name in self._slots else self._make_slots(tensor)
        start = len(self.placed) * nbytes
        return slots[start : start + nbytes]

    def _make_slots(self, tensor: Tensor) -> memoryview:
        """Take the memory for all tensors of this name in the batch."""
        array = self._arrays[tensor.name] = self._array((self.size, *tensor.shape), tensor.dtype)
        slots = self._slots[tensor.name] = codec.as_bytes(array)
        return slots

    def _array(self, shape: schema.Shape, dtype: np.dtype[Any]) -> Array:
        return self._plan.pool.take(math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)

    def _transformed(self, arrays: dict[str, Array], entry: wire.Entry) -> Any:
        options = self._plan.options
        tensors = {name: self._plan.finish.tensor(arrays[name]) for name in self._plan.names}
        sample: Any = tuple(tensors.values()) if options.fields else tensors
        try:
            return options.transform(sample) if options.transform else sample
        except Exception as error:
            recipe = f", {entry.head.recipe!r:.500}" if entry.head.recipe else ""
            error.add_note(f"in transform, of sample {entry.seq} of {entry.producer}{recipe}")
            raise

    def _dressed(self, collated: Any, info: BatchInfo) -> Any:
        """Give a dict or a tuple its `info`; what else a user's `collate` makes stays what it is."""
        if type(collated) is dict:
            return Batch.of(collated, info)
        names = tuple(self._plan.options.fields or ())
        if type(collated) in (tuple, list) and names and len(collated) == len(names):
            return TupleBatch.of(tuple(collated), names, info)
        return collated

    def _info(self) -> BatchInfo:
        entries = [placed.entry for placed in self.placed]
        return BatchInfo(
            ring=self._plan.ring,
            group=self._plan.options.group,
            epoch=self.epoch,
            ids=tuple([placed.given.number for placed in self.placed]),
            producers=tuple([entry.producer for entry in entries]),
            seqs=tuple([entry.seq for entry in entries]),
            ages_s=tuple([placed.age_s for placed in self.placed]),
            uses=tuple([placed.given.uses for placed in self.placed]),
            recipes=tuple([entry.head.recipe for entry in entries]),
            metadata=tuple([entry.head.metadata for entry in entries]),
            others=self.others,
            round=self.round,
        )


def stack(samples: list[Any]) -> Any:
    """Make a batch of samples without torch: equal shapes are stacked, others become lists."""
    first = samples[0]
    if isinstance(first, dict):
        return {name: stack([sample[name] for sample in samples]) for name in first}
    if isinstance(first, tuple):
        return tuple(stack(list(items)) for items in zip(*samples, strict=True))
    same = all(isinstance(s, np.ndarray | np.generic) and s.shape == first.shape for s in samples)
    return np.stack(samples) if same else samples
