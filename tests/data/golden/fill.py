"""Stand-in weights of the golden files: each tensor follows from its name and shape alone.

The outputs stored here are those of the original authors' models with their state dict filled by
``fill_state_dict``. A right converter and model give the same outputs from the same stand-ins.
"""
import zlib

import numpy as np


def fill(name, shape):
    """The array that stands for the parameter or buffer `name`: float32, counters int64."""
    shape = tuple(shape)
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    last = name.rsplit('.', 1)[-1]
    if last == 'num_batches_tracked':
        return np.zeros(shape, np.int64)
    if last == 'running_var' or (last == 'weight' and len(shape) == 1):
        value = rng.uniform(0.5, 1.5, shape)
    elif last == 'running_mean' or last.endswith('bias'):
        value = 0.1 * rng.standard_normal(shape)
    elif last in ('gamma', 'scale_1', 'scale_2'):
        value = rng.uniform(0.1, 0.5, shape)
    elif last == 'complex':
        value = rng.standard_normal(shape)
    else:
        value = rng.standard_normal(shape) / np.sqrt(max(1, int(np.prod(shape[1:]))))
    return np.asarray(value, np.float32)


def fill_state_dict(shapes):
    """A stand-in for each name of `shapes`, the manifest of a golden file."""
    return {name: fill(name, shape) for name, shape in shapes.items()}


def image(shape, seed):
    """The image batch that a golden file was computed from: standard normal, float32."""
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)
