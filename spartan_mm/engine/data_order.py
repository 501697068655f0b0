"""Training batches whose random numbers depend on their place in the run alone.

A run that goes on in the middle of an epoch then sees the same pictures, changed in the same way,
as one that was never interrupted, and decodes none that it has seen.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.dist import get_rank
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .random_state import own_random_numbers

#: How many items a worker had last are told to those that it makes.
RECENT = 50

# Index of an item; its place: epoch, batch and position in the batch, all from 0; and the indices
# of the last items that its worker has had, those of its batch among them.
PlacedIndex = tuple[int, tuple[int, int, int], tuple[int, ...]]

# What an item that is being made may take others from.
_surroundings: list[tuple[Any, Sequence[int]]] = []


@contextmanager
def surrounded(dataset: Any, indices: Sequence[int]) -> Iterator[None]:
    """Tell the transforms of an item which others there are; what is told first counts."""
    _surroundings.append((dataset, indices))
    try:
        yield
    finally:
        _surroundings.pop()


def surroundings() -> tuple[Any, Sequence[int]]:
    """The dataset of the item that is being made, and the indices in it to draw others from.

    None and no indices if nobody has told.
    """
    return _surroundings[0] if _surroundings else (None, ())


class PlacedBatches:
    """Batches of indices from a batch sampler, each index with its place in the run.

    Args:
        batch_sampler: The batch sampler; attributes not found here are looked up in it.
        num_workers: Number of workers, which take turns at the batches.

    Attributes:
        epoch: The epoch that the next iteration is of, from 0.
        first: Number of its batches to leave out.
    """

    def __init__(self, batch_sampler: Any, num_workers: int = 0) -> None:
        self.batch_sampler = batch_sampler
        self.num_workers = num_workers
        self.epoch = self.first = 0

    def __iter__(self) -> Iterator[list[PlacedIndex]]:
        """Iterate over the rest of the epoch."""
        epoch, first = self.epoch, self.first
        recent = [deque(maxlen=RECENT) for _ in range(max(1, self.num_workers))]
        for number, batch in enumerate(self.batch_sampler):
            of_worker = recent[number % len(recent)]
            of_worker.extend(batch)
            if number >= first:
                nearby = tuple(of_worker)
                yield [(index, (epoch, number, place), nearby)
                       for place, index in enumerate(batch)]

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
        index, place, nearby = placed
        with own_random_numbers(*self._entropy, *place), surrounded(self.dataset, nearby):
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
                        batch_sampler=PlacedBatches(loader.batch_sampler, loader.num_workers))


def keep_apart(loader: DataLoader) -> None:
    """Let a data loader draw no numbers of the training's, as it does when its workers start."""
    if loader.generator is None:
        loader.generator = torch.Generator()
