"""AOTInductor: a model compiled for this machine, which PyTorch alone loads and runs."""
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from .programs import by_name, explain, make_program, set_metadata

if TYPE_CHECKING:
    from .check import Run
    from .job import Job

__all__ = ['load', 'set_metadata', 'write']


def write(job: 'Job') -> 'Run':
    """Write the file of a job, see :class:`~.formats.Format`; it takes a C++ compiler, and minutes.

    NOTE: Here attention samples as in training, by `embedding_bag`, which is faster in this form
    than what other formats need.
    """
    program = make_program(job, 'bags')
    try:
        torch._inductor.aoti_compile_and_package(program, package_path=str(job.path))
    except RuntimeError as error:  # the compiler's errors, and those of not having one
        raise explain('AOTInductor', job, error) from error
    return load(job.path, job.graph)


def load(path: str | Path, graph: torch.nn.Module) -> 'Run':
    """Load a file for comparisons.

    Args:
        path: The file.
        graph: What it was made of, which names inputs and outputs.
    """
    model = torch._inductor.aoti_load_package(str(path))

    def run(images: np.ndarray, sizes: np.ndarray | None = None) -> dict[str, np.ndarray]:
        given = (images, sizes)[:len(graph.input_names)]
        return by_name(graph.output_names, model(*(
            torch.from_numpy(np.ascontiguousarray(x)) for x in given)))
    return run
