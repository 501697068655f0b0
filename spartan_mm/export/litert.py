"""LiteRT (TensorFlow Lite), for phones and small devices."""
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from .programs import by_name, convert, set_metadata

if TYPE_CHECKING:
    from .check import Run
    from .job import Job

__all__ = ['load', 'set_metadata', 'write']


def write(job: 'Job') -> 'Run | None':
    """Write the file of a job, see :class:`~.formats.Format`, or a program to convert elsewhere.

    NOTE: litert-torch needs a version of transformers that mmpretrain cannot be imported with.
    """
    if convert(job, 'litert_torch', ['litert-torch']) and find_spec('ai_edge_litert'):
        return load(job.path, job.graph)
    return None


def load(path: str | Path, graph: nn.Module, threads: int = 1) -> 'Run':
    """Load a file for comparisons, see :func:`~.pt2.load`."""
    from ai_edge_litert.interpreter import Interpreter
    runner = Interpreter(str(path), num_threads=threads).get_signature_runner()
    types = runner.get_input_details()

    def run(images: np.ndarray, sizes: np.ndarray | None = None) -> dict[str, np.ndarray]:
        inputs = (images, sizes)[:len(graph.input_names)]
        # Whole numbers of 64 bits became such of 32.
        outputs = runner(**{name: x.astype(types[name]['dtype']) for name, x in zip(
            sorted(types), inputs, strict=True)})
        return by_name(graph.output_names, [
            outputs[f'output_{place}'] for place in range(len(graph.output_names))])
    return run
