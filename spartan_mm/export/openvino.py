"""OpenVINO files, made of the ONNX file: there is one graph to get right."""
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..requirements import require
from ..runtime import Runtime
from .metadata import as_properties

if TYPE_CHECKING:
    from .check import Run
    from .job import Job


def write(job: 'Job') -> 'Run':
    """Write the two files of a job, .xml and .bin, see :class:`~.formats.Format`.

    In fp16 the weights are stored in half the bytes; in bf16 as they are. That is what the metadata
    ask the runtime to compute in, and it does on processors that can.
    """
    openvino = require('openvino', '2024.4', 'openvino')
    if job.precision == 'int8':
        from .quantize import batches, quantize_openvino
        model = quantize_openvino(job.onnx(), batches(job.pictures().images))
    else:
        model = openvino.convert_model(job.onnx())
    openvino.save_model(model, job.path, compress_to_fp16=job.precision == 'fp16')
    set_metadata(job.path, as_properties(job.metadata))
    return Runtime(job.path).run


def set_metadata(path: str | Path, metadata: Mapping[str, str]) -> None:
    """Give an OpenVINO file properties; those of other names stay."""
    import openvino
    core = openvino.Core()
    # NOTE: Written over while they are mapped into memory, the weights end the process.
    core.set_property({'ENABLE_MMAP': False})
    model = core.read_model(path)
    for key, value in metadata.items():
        model.set_rt_info(value, ['model_info', key])
    openvino.save_model(model, path, compress_to_fp16=False)
