"""A torch dataset that generates: imported in the process that needs it only, for it loads torch."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.functional import avg_pool3d
from torch.utils.data import DataLoader, IterableDataset

SIDE = 64  # of the volumes that are smoothed
_PASSES = 3


class Endless(IterableDataset[Any]):
    """Yields what `make` makes, as tensors: once and again and again, or anew each time.

    Args:
        make: Makes a sample of numpy arrays.
        anew: Whether it is called for each sample.
        transform: Called with each sample.
    """

    def __init__(
        self, make: Callable[[], Any], *, anew: bool = False, transform: Callable[[Any], Any] | None = None
    ) -> None:
        self._make, self._anew, self._transform = make, anew, transform

    def __iter__(self) -> Iterator[Any]:
        sample = self._sample()
        while True:
            yield sample if self._transform is None else self._transform(sample)
            if self._anew:
                sample = self._sample()

    def _sample(self) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(array) for name, array in self._make().items()}


def loader(dataset: Endless, *, batch_size: int, num_workers: int) -> DataLoader[Any]:
    """Make the DataLoader as one usually does."""
    return DataLoader(dataset, batch_size=batch_size, num_workers=num_workers)


def standardised(sample: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Do what costs little: mean 0, deviation 1."""
    return {name: (tensor - tensor.mean()) / tensor.std() for name, tensor in sample.items()}


def smoothed(sample: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Do what costs much: smooth a volume again and again."""
    volume = sample["x"].reshape(1, 1, SIDE, SIDE, SIDE)
    for _ in range(_PASSES):
        volume = avg_pool3d(volume, kernel_size=3, stride=1, padding=1)
    return {"x": volume.reshape(-1)}


TRANSFORMS = {"cheap": standardised, "costly": smoothed}
