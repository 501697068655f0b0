"""ONNX files for ONNX Runtime, in each of their precisions."""
import shutil
from typing import TYPE_CHECKING

from ..runtime import Runtime
from .metadata import as_properties
from .onnx import set_metadata
from .quantize import batches, quantize_onnx, to_float16

if TYPE_CHECKING:
    from .check import Run
    from .job import Job

__all__ = ['set_metadata', 'write']


def write(job: 'Job') -> 'Run':
    """Write the ONNX file of a job, see :class:`~.formats.Format`."""
    if job.precision == 'fp32':
        shutil.copy(job.onnx(), job.path)
    elif job.precision == 'fp16':
        to_float16(job.onnx(), job.path)
    else:
        quantize_onnx(job.onnx(), job.path, batches(job.pictures().images))
    set_metadata(job.path, as_properties(job.metadata))
    return Runtime(job.path).run
