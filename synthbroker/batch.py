"""What a training loop gets: tensors by name, and where each sample came from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True)
class BatchInfo:
    """Where the samples of a batch came from; one item for each of them.

    Attributes:
        ring: Name of the ring.
        group: Group that was given them, None where nothing was taken.
        epoch: The ring's epoch; with it a number names a sample for good.
        ids: Their numbers in the ring.
        producers: Names of the producers' incarnations.
        seqs: Their producers' sequence numbers.
        ages_s: Seconds from their commit until they were given, by the server's clock.
        uses: How often the group has been given them, this time included; 0: given before to a reader that died.
            With reuse "inf" there is no count: 2 stands for again.
        recipes: What makes them again.
        metadata: Text that came along.
        others: Numbers of what the other ranks were dealt in the same round, where checkpoints are kept.
        round: Where ranks are dealt rounds: which life of the readers it is, and the number of the round.
    """

    ring: str
    group: str | None
    epoch: str
    ids: tuple[int, ...]
    producers: tuple[str, ...]
    seqs: tuple[int, ...]
    ages_s: tuple[float, ...]
    uses: tuple[int, ...]
    recipes: tuple[dict[str, Any], ...]
    metadata: tuple[dict[str, str], ...]
    others: tuple[int, ...] = ()
    round: tuple[int, int] | None = None

    @property
    def unacknowledged(self) -> tuple[int, ...]:
        """Numbers that the group waits for; samples that are given again have been acknowledged before."""
        return tuple(number for number, uses in zip(self.ids, self.uses, strict=True) if uses < 2)


class Batch(dict[str, Any]):
    """A dict of tensors with a first dimension of samples. Fields whose shape varies are lists of tensors.

    Attributes:
        info: Where the samples came from.
    """

    info: BatchInfo

    @classmethod
    def of(cls, tensors: dict[str, Any], info: BatchInfo) -> Self:
        """Make one."""
        batch = cls(tensors)
        batch.info = info
        return batch

    def to(self, device: Any, *, non_blocking: bool = False) -> "Batch":
        """Copy all tensors to a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """Copy all tensors to page-locked memory; DataLoader calls this."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Any], Any]) -> "Batch":
        return Batch.of({name: _apply(change, value) for name, value in self.items()}, self.info)


class TupleBatch(tuple[Any, ...]):
    """The tensors of the fields that were asked for, in that order; `batch["image"]` works as well.

    Attributes:
        names: The fields.
        info: Where the samples came from.
    """

    names: tuple[str, ...]
    info: BatchInfo

    @classmethod
    def of(cls, tensors: tuple[Any, ...], names: tuple[str, ...], info: BatchInfo) -> Self:
        """Make one."""
        batch = cls(tensors)
        batch.names, batch.info = names, info
        return batch

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(self.names.index(key) if isinstance(key, str) else key)

    def to(self, device: Any, *, non_blocking: bool = False) -> "TupleBatch":
        """Copy all tensors to a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "TupleBatch":
        """Copy all tensors to page-locked memory; DataLoader calls this."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Any], Any]) -> "TupleBatch":
        return TupleBatch.of(tuple(_apply(change, value) for value in self), self.names, self.info)


def _apply(change: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, list):
        return [_apply(change, item) for item in value]
    return change(value) if hasattr(value, "pin_memory") else value
