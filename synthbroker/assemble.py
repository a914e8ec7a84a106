"""From entries of the stream to a batch: payloads are received and unpacked where they stay."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from synthbroker import codec, cutting, schema, wire
from synthbroker.batch import Batch, BatchInfo, TupleBatch
from synthbroker.errors import DamagedSampleError
from synthbroker.options import ReadOptions
from synthbroker.replies import Given, Meta
from synthbroker.ring import Ring
from synthbroker.schema import Array, Schema

_FREE_SHAPE_SHARE = 4  # a tensor of free shape may unpack to so many times the ring's capacity


class MissingPartError(DamagedSampleError):
    """A part is not there: evicted while it was read, or never whole."""


@dataclass(frozen=True)
class Placed:
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
    """

    tensor: Callable[[Array], Any]
    collate: Callable[[list[Any]], Any]


def largest_free_bytes(meta: Meta) -> int:
    """Say how much memory a tensor may take whose shape the schema leaves free."""
    return _FREE_SHAPE_SHARE * meta.capacity_bytes


def receive(ring: Ring, entry: wire.Entry, targets: dict[str, Array]) -> None:
    """Bring the payload of one sample into memory.

    Args:
        ring: Where it is.
        entry: The sample, checked against the ring's schema.
        targets: For each wanted field C-contiguous memory of its dtype and shape.

    Raises:
        MissingPartError: A part is not there any more.
        DamagedSampleError: The payload is not what the head says.
    """
    head = entry.head
    blocks = [_block(tensor, targets) for tensor in head.tensors]
    pieces = cutting.scatter([size for size, _ in head.parts], blocks)
    wanted = wire.parts_of(head, list(targets))
    if entry.data is not None:
        _copy(entry.data, pieces)
    else:
        there = ring.fetch([(f"{entry.uid}:{i}", pieces[i]) for i in wanted])
        if not all(there):
            raise MissingPartError(f"{there.count(False)} of {len(head.parts)} parts are gone")
    for i in wanted:
        wire.check_part(i, head.parts[i], pieces[i])
    for tensor, block in zip(head.tensors, blocks, strict=True):
        if tensor.codec != codec.RAW and tensor.name in targets:
            codec.decode(block, tensor.codec, codec.as_bytes(targets[tensor.name]))


def _block(tensor: wire.Tensor, targets: dict[str, Array]) -> memoryview:
    """Give the memory that a tensor's packed bytes go to: raw ones to where the tensor shall be."""
    if tensor.codec == codec.RAW and tensor.name in targets:
        return codec.as_bytes(targets[tensor.name])
    return np.empty(tensor.packed_bytes, np.uint8).data


def _copy(data: bytes, parts: Sequence[Sequence[memoryview]]) -> None:
    source, offset = memoryview(data), 0
    for piece in (piece for part in parts for piece in part):
        piece[:] = source[offset : offset + piece.nbytes]
        offset += piece.nbytes


class Assembly:
    """One batch in the making.

    Args:
        ring: Where samples are received from.
        meta: The ring's record.
        options: How it is read.
        finish: What the arrays become.
        size: Samples in a full batch.
    """

    def __init__(self, ring: Ring, meta: Meta, options: ReadOptions, finish: Finish, size: int) -> None:
        self._ring, self._options, self._finish, self.size = ring, options, finish, size
        self.epoch = ring.epoch
        self._schema = schema.parse(meta.schema) if meta.schema else Schema(())
        self._limit = largest_free_bytes(meta)
        self._names = tuple(options.fields or self._schema.names)
        self._one_by_one = options.transform is not None or options.collate is not None
        self.placed: list[Placed] = []
        self.nbytes = 0
        self._samples: list[Any] = []
        self._arrays: dict[str, Array] = {}
        self._lists: dict[str, list[Array]] = {}
        self._check_fields()

    @property
    def missing(self) -> int:
        """How many samples are still needed."""
        return self.size - len(self.placed)

    @property
    def holding(self) -> list[int]:
        """Numbers of the samples that the group waits for."""
        return [placed.given.number for placed in self.placed if placed.given.uses < 2]

    def add(self, given: Given, now_s: float) -> int:
        """Receive one sample, given at `now_s` by the server's clock, into the next place; returns its bytes.

        Raises:
            DamagedSampleError: It cannot be; the place stays free.
        """
        entry = wire.read_entry(given.fields)
        wire.check_schema(entry.head, self._schema, self._limit)
        tensors = {tensor.name: tensor for tensor in entry.head.tensors}
        targets = {name: self._target(tensors[name]) for name in self._names}
        receive(self._ring, entry, targets)
        if self._one_by_one:
            self._samples.append(self._transformed(targets))
        else:
            for name, items in self._lists.items():
                items.append(targets[name])
        self.placed.append(Placed(given, entry, round(max(now_s - entry.made_s, 0.0), 3)))
        nbytes = sum(array.nbytes for array in targets.values())
        self.nbytes += nbytes
        return nbytes

    def result(self) -> tuple[Any, BatchInfo]:
        """Give the batch, full or not."""
        info = self._info()
        if self._one_by_one:
            collated = (self._options.collate or self._finish.collate)(self._samples)
            return self._dressed(collated, info), info
        n = len(self.placed)
        make = self._finish.tensor
        tensors: dict[str, Any] = {}
        for name in self._names:
            if name in self._lists:
                tensors[name] = [make(array) for array in self._lists[name]]
            else:
                tensors[name] = make(self._arrays[name][:n])
        whole = tuple(tensors.values()) if self._options.fields else tensors
        return self._dressed(whole, info), info

    def _check_fields(self) -> None:
        unknown = set(self._names) - set(self._schema.names)
        if unknown:
            raise ValueError(
                f"fields {sorted(unknown)} are not in ring {self._ring.name!r}, whose samples are [{self._schema}]"
            )

    def _target(self, tensor: wire.Tensor) -> Array:
        field = next(field for field in self._schema.fields if field.name == tensor.name)
        if self._one_by_one:
            return np.empty(tensor.shape, tensor.dtype)
        if not field.fixed:
            self._lists.setdefault(tensor.name, [])
            return np.empty(tensor.shape, tensor.dtype)
        if tensor.name not in self._arrays:
            self._arrays[tensor.name] = np.empty((self.size, *tensor.shape), tensor.dtype)
        # Not [i]: of one number that would be a value, not a view.
        i = len(self.placed)
        return self._arrays[tensor.name][i : i + 1].reshape(tensor.shape)

    def _transformed(self, targets: dict[str, Array]) -> Any:
        tensors = {name: self._finish.tensor(targets[name]) for name in self._names}
        sample: Any = tuple(tensors.values()) if self._options.fields else tensors
        return self._options.transform(sample) if self._options.transform else sample

    def _dressed(self, collated: Any, info: BatchInfo) -> Any:
        """Give a dict or a tuple its `info`; what else a user's `collate` makes stays what it is."""
        if type(collated) is dict:
            return Batch.of(collated, info)
        names = tuple(self._options.fields or ())
        if type(collated) in (tuple, list) and names and len(collated) == len(names):
            return TupleBatch.of(tuple(collated), names, info)
        return collated

    def _info(self) -> BatchInfo:
        entries = [placed.entry for placed in self.placed]
        return BatchInfo(
            ring=self._ring.name,
            group=self._options.group,
            epoch=self.epoch,
            ids=tuple(placed.given.number for placed in self.placed),
            producers=tuple(entry.producer for entry in entries),
            seqs=tuple(entry.seq for entry in entries),
            ages_s=tuple(placed.age_s for placed in self.placed),
            uses=tuple(placed.given.uses for placed in self.placed),
            recipes=tuple(entry.head.recipe for entry in entries),
            metadata=tuple(entry.head.metadata for entry in entries),
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
