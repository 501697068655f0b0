"""The random number generators of a process: their states kept, put back, and set aside."""
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info


def get_random_state() -> dict[str, Any]:
    """Read the states of Python's, NumPy's and torch's generators, the GPU's if it is in use.

    They are tensors and numbers, which alone may stand in a file that is read safely.
    """
    kind, keys, *counters = np.random.get_state()
    state = dict(python=pack_state(random.getstate()),
                 numpy=[kind, torch.from_numpy(keys.astype(np.int64)), *counters],
                 torch=torch.get_rng_state())
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state['cuda'] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what :func:`get_random_state` read, wherever its tensors are by now."""
    random.setstate(unpack_state(state['python']))
    kind, keys, *counters = state['numpy']
    np.random.set_state((kind, np.array(_to_list(keys), np.uint32), *counters))
    torch.set_rng_state(state['torch'].cpu())
    if 'cuda' in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'].cpu())


def pack_state(state: tuple) -> list:
    """Make the state of a Python generator one of tensors and numbers."""
    version, words, gauss = state
    return [version, torch.tensor(words), gauss]


def unpack_state(packed: list) -> tuple:
    """Undo :func:`pack_state`."""
    version, words, gauss = packed
    return version, tuple(_to_list(words)), gauss


@contextmanager
def own_random_numbers(*entropy: int) -> Iterator[None]:
    """Draw random numbers that depend on some numbers alone, and leave the others as they were.

    Args:
        entropy: Numbers from 0 to seed Python's, NumPy's and torch's (CPU) generators with.

    Example:
        >>> with own_random_numbers(3, 1):
        ...     first = torch.rand(1)
        >>> with own_random_numbers(3, 1):
        ...     assert torch.equal(torch.rand(1), first)
    """
    # What a worker draws besides has no use.
    before = None if get_worker_info() else (
        random.getstate(), np.random.get_state(), torch.get_rng_state())
    high, low = np.random.SeedSequence(entropy).generate_state(2).tolist()
    random.seed(high << 32 | low)
    np.random.seed(high)
    torch.random.default_generator.manual_seed(high << 32 | low)
    try:
        yield
    finally:
        if before:
            random.setstate(before[0])
            np.random.set_state(before[1])
            torch.set_rng_state(before[2])


def _to_list(numbers: Any) -> list[int]:
    """Read integers; of older versions, files hold them as tuples and arrays, too."""
    return list(numbers) if isinstance(numbers, tuple) else numbers.tolist()
