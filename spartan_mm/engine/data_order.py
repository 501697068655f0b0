"""Training batches whose random numbers depend on their place in the run alone.

A run that goes on in the middle of an epoch then sees the same pictures, changed in the same way,
as one that was never interrupted, and decodes none that it has seen.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from mmengine.dist import get_rank
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .random_state import own_random_numbers

# Index of an item, and its place: epoch, batch and position in the batch, all from 0.
PlacedIndex = tuple[int, tuple[int, int, int]]


class PlacedBatches:
    """Batches of indices from a batch sampler, each index with its place in the run.

    Args:
        batch_sampler: The batch sampler; attributes not found here are looked up in it.

    Attributes:
        epoch: The epoch that the next iteration is of, from 0.
        first: Number of its batches to leave out.
    """

    def __init__(self, batch_sampler: Any) -> None:
        self.batch_sampler = batch_sampler
        self.epoch = self.first = 0

    def __iter__(self) -> Iterator[list[PlacedIndex]]:
        """Iterate over the rest of the epoch."""
        epoch, first = self.epoch, self.first
        for number, batch in enumerate(islice(self.batch_sampler, first, None), first):
            yield [(index, (epoch, number, place)) for place, index in enumerate(batch)]

    def __len__(self) -> int:
        """Number of batches in a whole epoch."""
        return len(self.batch_sampler)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)['batch_sampler'], name)


class PlacedDataset(Dataset):
    """A dataset whose items draw random numbers that depend on the seed and their place alone.

    Python's, NumPy's and torch's generators are seeded for each item and put back afterwards, so
    that it makes no difference which worker makes an item, and what else is drawn in the process.

    All attributes but ``dataset`` are the wrapped dataset's, to be read and to be set.

    Args:
        dataset: The dataset.
        seed: Seed of the run.
        rank: Rank of the process.
    """

    def __init__(self, dataset: Any, seed: int, rank: int) -> None:
        vars(self).update(dataset=dataset, _entropy=(seed, rank))

    def __getitem__(self, placed: PlacedIndex) -> Any:
        """Make an item."""
        index, place = placed
        with own_random_numbers(*self._entropy, *place):
            return self.dataset[index]

    def __len__(self) -> int:
        """Number of items."""
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        # Unpickling asks for attributes before there are any.
        if 'dataset' not in vars(self):
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.dataset, name, value)


def place_batches(loader: DataLoader, seed: int) -> None:
    """Let the batches of a data loader be repeated from any batch of any epoch on.

    Its batch sampler becomes a :class:`PlacedBatches`, its dataset a :class:`PlacedDataset`. One
    without an order that could be repeated (an iterable dataset, no batches) stays as it is.

    Args:
        loader: A data loader that has not been used yet, changed in place.
        seed: Seed of the run.
    """
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        return
    keep_apart(loader)
    # Behind the back of a check: torch would have both set from the beginning.
    vars(loader).update(dataset=PlacedDataset(loader.dataset, seed, get_rank()),
                        batch_sampler=PlacedBatches(loader.batch_sampler))


def keep_apart(loader: DataLoader) -> None:
    """Let a data loader draw no numbers of the training's, as it does when its workers start."""
    if loader.generator is None:
        loader.generator = torch.Generator()
