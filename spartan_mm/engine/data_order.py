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

# What a DataLoader is made of besides the dataset and the order; not all versions of torch have
# all of it.
_LOADER_SETTINGS = ('num_workers', 'collate_fn', 'pin_memory', 'timeout', 'worker_init_fn',
                    'multiprocessing_context', 'generator', 'prefetch_factor', 'persistent_workers',
                    'pin_memory_device', 'in_order')

# Index of an item, and its place: epoch, batch and position in the batch, all from 0.
PlacedIndex = tuple[int, tuple[int, int, int]]


class PlacedBatches:
    """Batches of indices from a batch sampler, each index with its place in the run.

    Args:
        batch_sampler: The batch sampler; attributes not found here are looked up in it.
    """

    def __init__(self, batch_sampler: Any) -> None:
        self.batch_sampler = batch_sampler
        self.epoch = self.first = 0

    def start(self, epoch: int, first: int = 0) -> None:
        """Say where the next iteration begins.

        Args:
            epoch: The epoch, from 0.
            first: Number of batches of the epoch to leave out.
        """
        self.epoch, self.first = epoch, first

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


def place_batches(loader: DataLoader, seed: int) -> DataLoader:
    """Make a data loader whose batches can be repeated from any batch of any epoch on.

    Its batch sampler is a :class:`PlacedBatches`, its dataset a :class:`PlacedDataset`.

    Args:
        loader: A data loader that has not been used yet.
        seed: Seed of the run.

    Returns:
        The new data loader; the same one if it has no order that could be repeated: one of an
        iterable dataset, or without batches.
    """
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        return loader
    keep_apart(loader)
    settings = {name: getattr(loader, name) for name in _LOADER_SETTINGS if hasattr(loader, name)}
    placed = DataLoader(PlacedDataset(loader.dataset, seed, get_rank()),
                        batch_sampler=PlacedBatches(loader.batch_sampler), **settings)
    # Hooks look for the sampler here, to tell it the epoch.
    vars(placed)['sampler'] = loader.sampler
    return placed


def keep_apart(loader: DataLoader) -> None:
    """Let a data loader draw no numbers of the training's, as it does when its workers start.

    Args:
        loader: A data loader that has not been used yet.
    """
    if loader.generator is None:
        loader.generator = torch.Generator()
