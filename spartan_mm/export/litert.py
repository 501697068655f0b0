"""LiteRT (TensorFlow Lite), for phones and small devices."""
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ..runtime import Runtime
from .metadata import as_properties
from .programs import convert, set_metadata

if TYPE_CHECKING:
    from .check import Run
    from .job import Job

__all__ = ['set_metadata', 'write']


def write(job: 'Job') -> 'Run | None':
    """Write the file of a job, see :class:`~.formats.Format`, or a program to convert elsewhere.

    NOTE: litert-torch needs a version of transformers that mmpretrain cannot be imported with.
    """
    if convert(job, 'litert_torch', ['litert-torch']) and find_spec('ai_edge_litert'):
        set_metadata(job.path, as_properties(job.metadata))
        return Runtime(job.path).run
    return None
