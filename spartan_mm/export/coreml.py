"""Core ML, for Apple's devices."""
from typing import TYPE_CHECKING

import torch

from .programs import convert, set_metadata

if TYPE_CHECKING:
    from .job import Job

__all__ = ['set_metadata', 'write']


def write(job: 'Job') -> None:
    """Write the package of a job, see :class:`~.formats.Format`, or a program to convert elsewhere.

    NOTE: Core ML takes no bytes: images are float32, of 0 to 255. It runs on Apple's systems only.
    """
    convert(job, 'coremltools', ['coremltools'], torch.float32)
