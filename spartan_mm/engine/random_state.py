"""The random number generators of a process: their states kept, put back, and set aside."""
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def get_random_state() -> dict[str, Any]:
    """Read the states of Python's, NumPy's and torch's generators, the GPU's if it is in use.

    They are tensors and numbers, which alone may stand in a file that is read safely.
    """
    kind, keys, *counters = np.random.get_state()
    state = dict(python=random.getstate(), numpy=[kind, keys.tolist(), *counters],
                 torch=torch.get_rng_state())
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state['cuda'] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what :func:`get_random_state` read, of older versions, too."""
    random.setstate(read_state(state['python']))
    kind, keys, *counters = state['numpy']
    np.random.set_state((kind, [*map(int, keys)], *counters))
    torch.set_rng_state(state['torch'].cpu())
    if 'cuda' in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'].cpu())


def read_state(kept: Sequence[Any]) -> tuple:
    """Read the state of a Python generator from a file, where some versions kept a tensor."""
    version, words, gauss = kept
    return version, tuple(map(int, words)), gauss


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
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    high, low = np.random.SeedSequence(entropy).generate_state(2).tolist()
    random.seed(high << 32 | low)
    np.random.seed(high)
    torch.random.default_generator.manual_seed(high << 32 | low)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
