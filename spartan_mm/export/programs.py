"""Programs of torch.export: for AOTInductor, and for the converters of LiteRT and Core ML."""
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import ExplainedError
from ..files import write_json
from ..text import first_line
from . import convert_program
from .form import export_form
from .metadata import as_properties
from .onnx import dynamic_shapes, make_inputs

if TYPE_CHECKING:
    from .job import Job


class ConversionError(ExplainedError, RuntimeError):
    """A model that a compiler or converter of other people does not take."""


def make_program(job: 'Job', form: str, dtype: torch.dtype = torch.uint8
                 ) -> torch.export.ExportedProgram:
    """Trace the graph of a job.

    Args:
        job: With the graph.
        form: How deformable attention samples, see :func:`~.form.export_form`.
        dtype: Of the images.
    """
    inputs = make_inputs(job.graph, job.size, 2 if 'batch' in job.dynamic else 1, dtype)
    with export_form(job.graph, form), torch.no_grad():
        return torch.export.export(
            job.graph, inputs, dynamic_shapes=dynamic_shapes(job.graph, job.dynamic), strict=False)


def convert(job: 'Job', package: str, requirements: Sequence[str],
            dtype: torch.dtype = torch.uint8) -> bool:
    """Convert a job's graph in a process of its own, or leave what is needed to do it elsewhere.

    What converters print is shown only if they fail, and what they import stays out of this
    process. One that is not installed here may not be able to live beside mmpretrain at all: the
    program and the script that converts it then take the file's place.

    Args:
        job: `path` becomes the program's if nothing was converted.
        package: What the converter is imported as.
        requirements: What to install for it, beside the same PyTorch.
        dtype: Of the images.

    Returns:
        Whether it was converted.

    Raises:
        ConversionError: The converter fails.
    """
    program = convert_program.program_of(job.path)
    torch.export.save(make_program(job, 'gather', dtype), program)
    set_metadata(job.path, as_properties(job.metadata))
    script = Path(convert_program.__file__)
    if find_spec(package) is None:
        shutil.copy(script, program.with_name(script.name))
        version = torch.__version__.partition('+')[0]
        print(f'{package} is not installed here. In an environment with it\n'
              f"    pip install {shlex.join([f'torch=={version}', *requirements])}\n"
              f'this makes {job.path.name} of {program.name}:\n'
              f'    python {script.name} {shlex.quote(program.name)}')
        job.path = program
        return False
    done = subprocess.run([sys.executable, str(script), str(program)], capture_output=True,
                          text=True, errors='replace')
    if done.returncode:
        last = (done.stderr.strip() or f'status {done.returncode}').splitlines()[-1]
        raise ConversionError(f'{package} cannot convert {job.path.stem}: {last}')
    program.unlink()
    return True


def set_metadata(path: str | Path, properties: Mapping[str, str]) -> None:
    """Write what a file says of itself beside it, FILE.json."""
    write_json(convert_program.metadata_of(path),
               {name: json.loads(text) for name, text in properties.items()})


def by_name(names: Sequence[str], outputs: Any) -> dict[str, np.ndarray]:
    """What a program gives, tensors or one tensor, as arrays with names."""
    outputs = outputs if isinstance(outputs, list | tuple) else [outputs]
    return {name: np.asarray(x) for name, x in zip(names, outputs, strict=True)}


def explain(package: str, job: 'Job', error: Exception) -> ConversionError:
    """Say in a line why a model is not taken."""
    return ConversionError(f'{package} cannot take {job.path.stem}: {first_line(error)}')
