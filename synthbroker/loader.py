"""The DataLoader of a `RingDataset`, which acknowledges for its workers."""

from collections.abc import Iterator, Mapping
from ctypes import c_double, c_long
from dataclasses import replace
from inspect import signature
from multiprocessing import RawArray, RawValue
from secrets import token_hex
from traceback import clear_frames
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader, IterableDataset

from synthbroker import ranks
from synthbroker.batch import BatchInfo
from synthbroker.onto import Delivery, Parcel, open_harbour
from synthbroker.ranks import Place
from synthbroker.shares import Stopwatch

if TYPE_CHECKING:
    from synthbroker.dataset import RingDataset


class _WithInfo(IterableDataset[Any]):
    """What the loader's workers iterate: each batch with its info beside it, whatever `collate` made of the batch."""

    def __init__(self, dataset: "RingDataset") -> None:
        self.dataset = dataset
        self.word = ""  # set before the workers are started, which get a copy
        self.harbour = token_hex(8)  # where the training process takes parcels, if it does
        self.place: Place | None = None
        self.sitting = RawValue(c_long, 0)  # of the place; the processes that stay have another one in each iteration
        self.starved = RawArray(c_double, 2)
        self.turn = RawValue(c_long, 0)  # counts iterations, for all processes: a worker must not wait in a former one

    def __iter__(self) -> Iterator[Any]:
        mine = self.turn.value
        place = self.place and replace(self.place, sitting=self.sitting.value)
        starved = Stopwatch(self.starved)
        pairs = self.dataset.read(word=self.word, left=lambda: self.turn.value != mine, place=place, starved=starved)
        return pairs if self.dataset.device is None else (Parcel(*pair, self.harbour) for pair in pairs)

    def __len__(self) -> int:
        return len(self.dataset)


class RingLoader(DataLoader[Any]):
    """A DataLoader that acknowledges in the training process: there, and only there, is known what was trained on.

    Made by `RingDataset.loader`.
    """

    def __init__(
        self, dataset: "RingDataset", *, num_workers: int, pin_memory: bool = False, ahead: int = 0, **options: Any
    ) -> None:
        self._ahead = ahead
        for name in "batch_size", "shuffle", "sampler", "batch_sampler", "collate_fn", "drop_last":
            if name in options:
                raise TypeError(
                    f"loader() takes no {name}: RingDataset says what a batch is (batch_size, collate, drop_last), and "
                    "samples come in the order of the ring"
                )
        self._chose_order, self._left = "in_order" in options, False
        if num_workers and "in_order" in signature(DataLoader.__init__).parameters:  # since torch 2.6
            # Taken in turn, a worker that waits for samples stalls all that have some (pytorch#135409).
            options.setdefault("in_order", False)
        self._with_info = _WithInfo(dataset)
        self._delivery: Delivery | None = None
        if pin_memory and not num_workers:
            dataset.pin()  # DataLoader would copy each batch in the training loop's thread
        options["pin_memory"] = bool(num_workers) and (pin_memory or dataset.pin_memory or dataset.device is not None)
        read = self._with_info if num_workers else dataset
        super().__init__(read, batch_size=None, num_workers=num_workers, collate_fn=_as_it_is, **options)

    def state_dict(self) -> dict[str, Any]:
        """Stage what was trained on; see `RingDataset.state_dict`."""
        return self._with_info.dataset.state_dict(self._ahead)

    def acknowledge(self, state: Mapping[str, Any] | None = None) -> None:
        """Say that the checkpoint is safely written; see `RingDataset.acknowledge`."""
        self._with_info.dataset.acknowledge(state)

    def load_state_dict(self, state: Mapping[str, Any], on_gone: str | None = None) -> None:
        """Go on from a checkpoint, before iterating; see `RingDataset.load_state_dict`."""
        self._with_info.dataset.load_state_dict(state, on_gone)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if not self.num_workers:
            yield from self._with_info.dataset  # DataLoader's own loop would only cost time
            return
        dataset = self._with_info.dataset
        if dataset.device is not None and self._delivery is None:
            self._delivery = Delivery(dataset.device, ahead=dataset.options.prefetch)
            open_harbour(self._with_info.harbour, self._delivery)
        anew = not self.persistent_workers or self._iterator is None
        place = dataset.find_place()
        left, self._left = self._left, True
        self._with_info.word = dataset.deputies.begin(anew=anew, ranks=place is not None, left=left)
        self._sit_down(place, anew=anew or left)
        expected = None if dataset.options.epoch_size is None else len(dataset)
        stay, starved = self.persistent_workers, Stopwatch(self._with_info.starved)
        yield from dataset.deputies.watch(self._pairs(), expected=expected, stay=stay, starved=starved)
        self._left = False

    def _pairs(self) -> Iterator[Any]:
        pairs = super().__iter__()
        return self._until_left(pairs if self._delivery is None else _unpacked(pairs, self._delivery))

    def _until_left(self, pairs: Iterator[Any]) -> Iterator[Any]:
        try:
            yield from pairs
        except Exception as error:
            # They hold torch's iterator, which shall end its workers now: found by the garbage collector together with
            # the queues that it tells them through, it would wait five seconds for each of them.
            clear_frames(error.__traceback__)
            raise
        finally:
            self._with_info.turn.value += 1  # torch gives a worker that waits for a sample five seconds, too
            del pairs

    def _sit_down(self, place: Place | None, *, anew: bool) -> None:
        """Tell the workers their training process's place among several ranks, if there are such."""
        if place is None:
            return
        if anew:
            self._with_info.place = ranks.seated(place, self._with_info.dataset.options)
            self._with_info.sitting.value = self._with_info.place.sitting
        if not self._chose_order:
            self.in_order = True  # a step of one rank is then that of the others


def _unpacked(parcels: Iterator[Any], delivery: Delivery) -> Iterator[tuple[Any, BatchInfo]]:
    """Receive what workers sent, shipped by DataLoader's thread for page-locked memory, or here if it runs none."""
    for parcel in parcels:
        shipped, info = parcel.pin_memory() if isinstance(parcel, Parcel) else parcel
        yield delivery.receive(shipped), info


def _as_it_is(batch: Any) -> Any:
    """Leave a batch alone: what DataLoader does else would make a list of a tuple."""
    return batch
