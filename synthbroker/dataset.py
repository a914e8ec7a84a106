"""The training side with torch: an IterableDataset that reads a ring (`loader` has its DataLoader)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import IterableDataset, default_collate, get_worker_info
from torch.utils.data._utils.collate import default_collate_fn_map

from synthbroker import lanes, ranks, tensors
from synthbroker.assemble import Finish
from synthbroker.batch import Batch, BatchInfo, TupleBatch
from synthbroker.connection import Connection
from synthbroker.consumer import Session, raise_if_drained
from synthbroker.loader import RingLoader
from synthbroker.loading import Deputies
from synthbroker.onto import Delivery
from synthbroker.options import ReadOptions
from synthbroker.orphan import watch_parent
from synthbroker.progress import Progress, run_of
from synthbroker.ranks import Place
from synthbroker.ring import Ring
from synthbroker.seats import Seat
from synthbroker.shares import Stopwatch


def collate(samples: list[Any]) -> Any:
    """Make a batch of samples as torch does it, save that tensors of different shapes become a list."""
    first = samples[0]
    if type(first) is dict:
        return {name: collate([sample[name] for sample in samples]) for name in first}
    if type(first) is tuple:
        return tuple(collate(list(items)) for items in zip(*samples, strict=True))
    if isinstance(first, torch.Tensor) and any(sample.shape != first.shape for sample in samples):
        return samples
    return default_collate(samples)


def _refuse_batches(*_: Any, **__: Any) -> Any:
    raise TypeError(
        "a RingDataset makes batches itself, and DataLoader would make batches of batches: say "
        "DataLoader(dataset, batch_size=None, ...) or dataset.loader(num_workers=N), and RingDataset(batch_size=...)"
    )


# A plain DataLoader's own batch_size is 1: batches would get one dimension too many, and lose their info, silently.
default_collate_fn_map.update({Batch: _refuse_batches, TupleBatch: _refuse_batches})

TORCH = Finish(tensor=tensors.to_torch, collate=collate)

# A worker is asked for a batch ahead of the training loop, `prefetch_factor` of them (DataLoader's default is 2); when
# it is asked for the next but that many, the one before was trained on (torch.utils.data.dataloader, _try_put_index).
_WORKER_LAG = 3


class RingDataset(IterableDataset[Any]):
    """Reads a ring in batches of torch tensors; see `ReadOptions` for the arguments.

    `for batch in dataset.loader()` is the usual way; `DataLoader(dataset, batch_size=None, num_workers=N)` works too.
    A batch is a dict of tensors of shape (batch_size, ...), which belong to the caller. Making a dataset opens nothing,
    and it may be pickled; each process that iterates it is a reader of its own.

    Args:
        pin_memory: Give batches in page-locked memory, received and unpacked straight into it; with worker processes
            `loader()` lets torch's DataLoader copy them there.
        rank: Number of this process among those that train together, from 0; without it torch.distributed says so where
            it is initialised when an iteration begins, else the environment does (RANK and WORLD_SIZE, as torchrun sets
            them). Several ranks are dealt whole rounds: each gets the same number of batches.
        world_size: How many ranks there are; 1: this process reads on its own account, whatever the environment says.
        device: A GPU, like "cuda:0", or "cpu". Batches are copied there ahead of the training loop, and the stream that
            is current where a batch is asked for waits for its copy. Of what a user's `collate` makes, tensors in
            dicts, lists and tuples are copied. With worker processes use `loader()`: it copies in the training process.

    Raises (while iterating):
        ValueError: The device is not there.
        StarvedError: There was no sample for `wait_s`, or nobody makes any and `on_starve` says "raise".
        RingEndedError: The ring has ended, and this dataset has come to its end before.
        RingMismatchError: The group is read with another `reuse`, or the ranks differ in how they read it.
        ShutOutError: A newer life of this training reads with the same ranks.
        ServerGoneError: The server did not answer for `reconnect_s`.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        ring: str,
        group: str | None,
        batch_size: int = 1,
        reuse: float | str = 1,
        ack: str = "next",
        prefetch: int = 2,
        wait_s: float = 600.0,
        on_starve: str = "wait",
        transform: Callable[[Any], Any] | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        drop_last: bool = False,
        fields: Sequence[str] | None = None,
        producers: Sequence[str] | None = None,
        min_fill: int = 1,
        epoch_size: int | None = None,
        reconnect_s: float = 300.0,
        claim_after_s: float = 30.0,
        name: str | None = None,
        on_gone: str = "raise",
        pin_memory: bool = False,
        device: Any = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        ranks.check_rank(rank, world_size)
        self._rank = rank, world_size
        device = lanes.check_device(device)
        self.device = None if device == "cpu" else device
        self.pin_memory = pin_memory
        self._delivery = Delivery()
        self.options = ReadOptions(
            url,
            ring,
            group,
            batch_size=batch_size,
            reuse=reuse,
            ack=ack,
            prefetch=prefetch,
            wait_s=wait_s,
            on_starve=on_starve,
            transform=transform,
            collate=collate,
            drop_last=drop_last,
            fields=fields,
            producers=producers,
            min_fill=min_fill,
            epoch_size=epoch_size,
            reconnect_s=reconnect_s,
            claim_after_s=claim_after_s,
            name=name,
            on_gone=on_gone,
        )
        self._run = run_of(self.options)
        self._progress: Progress | None = None
        self._place: Place | None = None  # of the session
        self._outside: Place | None = None  # in a worker process: the training process's
        self._session: Session | None = None
        self._deputies: Deputies | None = None
        self._ended = False

    def loader(self, *, num_workers: int = 0, pin_memory: bool = False, ahead: int = 0, **options: Any) -> RingLoader:
        """Make the DataLoader for this dataset.

        Args:
            num_workers: Processes that receive and unpack; 0: threads of this process.
            pin_memory: Give batches in page-locked memory; without workers the dataset does, from now on.
            ahead: For `state_dict`: so many batches does something between this and the training loop fetch before they
                are trained on. Lightning: 1, without `epoch_size`; accelerate: 1.
            **options: Further arguments of DataLoader, save those that `RingDataset` takes itself.
        """
        return RingLoader(self, num_workers=num_workers, pin_memory=pin_memory, ahead=ahead, **options)

    @property
    def info(self) -> dict[str, Any]:
        """The ring's `info`; asks the server.

        Raises:
            RingMissingError: There is no such ring yet.
        """
        connection = Connection(self.options.url)
        try:
            return Ring(connection, self.options.ring).read_meta().info
        finally:
            connection.close()

    def pin(self) -> None:
        """Give batches in page-locked memory from now on."""
        if not self.pin_memory:
            self.pin_memory = True
            if self._session is not None:
                self._delivery.pin()

    def close(self) -> None:
        """Leave the group; what was not acknowledged is given to others."""
        if self._session is not None:
            self._session.close()
        if self._progress is not None:
            self._progress.close()

    def state_dict(self, ahead: int = 0) -> dict[str, Any]:
        """Stage what was trained on, and give the state that belongs into the checkpoint.

        With `ack="checkpoint"`; call it after the step: the batch that the loop was given last counts as trained on.
        What is prefetched, or waits in the queue of a worker, does not. Staged samples stay pending until
        `acknowledge()` says that the checkpoint is safely written, or a restarted run loads it. With another `ack` the
        state only names the run.

        Args:
            ahead: So many batches were given out and not yet trained on, where something between fetches ahead.

        Returns:
            A few short texts and numbers, whatever the number of samples: for torch.save, JSON, and what calls
            `state_dict` by itself (torchdata's StatefulDataLoader without workers, Lightning).

        Raises:
            RuntimeError: In a worker process, which cannot know what was trained on: use `loader()`.
            ShutOutError: A newer process of this run took over; do not write this checkpoint.
            UnacknowledgedError: A thousand checkpoints were staged and none acknowledged.
        """
        _refuse_worker("state_dict")
        return self.progress.state_dict(ahead)

    def acknowledge(self, state: Mapping[str, Any] | None = None) -> None:
        """Say that the checkpoint is safely written: its samples are done with, and do not come again.

        Args:
            state: The checkpoint's, where it is not the newest; older ones are finished with it.

        Raises:
            ValueError: Without `ack="checkpoint"`, or a state of another run.
            ShutOutError: A newer process of this run took over.
        """
        self.progress.acknowledge(state)

    def load_state_dict(self, state: Mapping[str, Any], on_gone: str | None = None) -> None:
        """Go on from a checkpoint; call it before iterating.

        Its samples are acknowledged, if they are not. All that former processes of this run were given besides comes
        again at once, and they are shut out. Without `name=`, this process is of the state's run from now on.

        Args:
            state: What `state_dict` gave.
            on_gone: Instead of the dataset's own.

        Raises:
            StateGoneError: Samples that should come again will not: they were acknowledged by a later checkpoint, or
                evicted, or the ring was made anew; says which. Nothing was done, and it may be called again.
            ValueError: It is not a state of this ring and group.
        """
        _refuse_worker("load_state_dict")
        if self._session is not None:
            self._session.close()
        if self._deputies is not None:
            self._deputies.release()
        self.progress.load_state_dict(state, on_gone)
        self._ended = False

    @property
    def progress(self) -> Progress:
        """What this process has trained on."""
        if self._progress is None:
            place = self.find_place()
            if place is not None and get_worker_info() is None:
                self._run.rank, self._run.ranks = place.rank, place.ranks
                self._run.become(place.run)
            self._progress = Progress(self.options, self._run)
        return self._progress

    def __iter__(self) -> Iterator[Any]:
        return (batch for batch, _ in self.read())

    def __len__(self) -> int:
        """Batches in one iteration, if `epoch_size` sets that."""
        place = self.find_place()
        sizes = self.options.sizes(0, 1, place.ranks if place else 1)
        if sizes is None:
            raise TypeError("a ring has no length; say epoch_size=N for iterations of N samples")
        return len(sizes)

    def __getstate__(self) -> dict[str, Any]:
        own = dict.fromkeys(("_session", "_deputies", "_delivery", "_progress"))
        return self.__dict__ | own | {"_outside": self.find_place()}

    @property
    def deputies(self) -> Deputies:
        """The readers in worker processes of this dataset's loaders."""
        self._deputies = self._deputies or Deputies(self.options, self.progress)
        return self._deputies

    def find_place(self) -> Place | None:
        """Say which of several ranks this process is; None where it reads on its own account."""
        rank, count = self._rank
        if self.options.group is None:
            return None
        if rank is None and torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
        place = ranks.find(rank, count, self.options.name)
        return replace(place, run=self._run.whole) if place and self._run.whole else place  # of a state that was loaded

    def read(
        self,
        *,
        word: str = "",
        left: Callable[[], bool] | None = None,
        place: Place | None = None,
        starved: Stopwatch | None = None,
    ) -> Iterator[tuple[Any, BatchInfo]]:
        """Iterate batches with their info beside them.

        Args:
            word: Where there is one, `Deputies` acknowledges.
            left: Says whether the training loop was left.
            place: In a worker of `loader()`: which rank the training process is, and its sitting.
            starved: In such a worker: where the training process measures how long its loop waits.
        """
        watch_parent()  # now: a worker whose parent is gone is not asked for a batch
        return self._read(word, left, place, starved)

    def _read(
        self, word: str, left: Callable[[], bool] | None, place: Place | None, starved: Stopwatch | None
    ) -> Iterator[tuple[Any, BatchInfo]]:
        if self._ended and _alone(word):
            held = 0 if word else self.progress.unacknowledged()
            many = self.find_place() is not None
            raise_if_drained(self.options.url, self.options.ring, self.options.group, None if many else held)
        if self._session is None or self._session.begin_anew(place != self._place) or not self._session.usable:
            self._place = place if word else self._place_alone()
            self._session = self._make_session(word, starved)
        session = self._session
        self._ended = False
        for ready in session.batches(left):
            yield self._delivery.receive(ready.batch), ready.info
        self._ended = not session.usable

    def _make_session(self, word: str, starved: Stopwatch | None) -> Session:
        worker, place = get_worker_info(), self._place
        if worker and not word and self._run.checkpoints:
            _refuse_worker("ack='checkpoint'")
        progress = self.progress if self._run.checkpoints and not word else None
        self._delivery = self._delivery_here(by_loader=bool(word))
        finish = replace(TORCH, memory=self._delivery.memory, ship=self._delivery.ship)
        run = replace(self._run, name=place.family) if place and progress is None else self._run
        which = (worker.id, worker.num_workers) if worker else (0, 1)
        seat = Seat(run.name, *which, word, run, place, starved)
        return Session(self.options, finish, seat, lag=_WORKER_LAG if worker else 0, progress=progress)

    def _place_alone(self) -> Place | None:
        """Find the place of a reader that is not a worker of `loader()`, and begin a sitting."""
        place = self.find_place()
        if get_worker_info() is not None and (place or self._outside):
            raise ValueError(
                "several ranks with worker processes: iterate dataset.loader(num_workers=N) instead of a DataLoader, "
                "because the workers of all ranks must agree on who reads what"
            )
        return ranks.seated(place, self.options) if place else None

    def _delivery_here(self, *, by_loader: bool) -> Delivery:
        """Make the delivery of this process; workers, who may have been forked, leave GPUs alone."""
        if get_worker_info() is None:
            return Delivery(self.device, pin=self.pin_memory, ahead=self.options.prefetch)
        if self.device is not None and not by_loader:
            raise ValueError(
                f"device={self.device!r} with worker processes: iterate dataset.loader(num_workers=N) instead of a "
                "DataLoader, because only the training process may use a GPU"
            )
        return Delivery()


def _refuse_worker(what: str) -> None:
    if get_worker_info() is not None:
        raise RuntimeError(
            f"{what} in a worker process, which cannot know what was trained on: iterate "
            "dataset.loader(num_workers=N), which has state_dict, acknowledge and load_state_dict of its own"
        )


def _alone(word: str) -> bool:
    """Say whether one reader may end an iteration with an error: with others beside it, their batches would be lost.

    The training process tells when the ring is read (`Deputies`, known by their word); between workers of a plain
    DataLoader nobody can.
    """
    worker = get_worker_info()
    return not word and (worker is None or worker.num_workers == 1)
