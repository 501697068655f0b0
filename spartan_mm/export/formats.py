"""The formats by name: what each needs, what its files are called, and who writes them."""
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ..errors import UsageError


@dataclass(frozen=True)
class Format:
    """A format of files.

    Args:
        suffix: Of the file's name.
        module: Has ``write(job)``, which writes the file of a :class:`~.job.Job` and gives a
            :data:`~.check.Run` of it, or None if it cannot run here; and ``set_metadata(path,
            properties)``.
        precisions: What it can be written in.
        dynamic: Whether batch and sides may be free.
    """

    suffix: str
    module: str
    precisions: tuple[str, ...] = ('fp32', )
    dynamic: tuple[str, ...] = ('batch', 'size')

    def load(self, function: str) -> Callable[..., Any]:
        """Import a function of its module."""
        return getattr(import_module(f'.{self.module}', __package__), function)


FORMATS = {
    'onnx': Format('.onnx', 'onnx_runtime', ('fp32', 'fp16', 'int8')),
    'openvino': Format('.xml', 'openvino', ('fp32', 'fp16', 'bf16', 'int8')),
    'tensorrt': Format('.onnx', 'tensorrt', ('fp32', 'fp16'), ('batch', )),
    'pt2': Format('.pt2', 'pt2'),
    'coreml': Format('.mlpackage', 'coreml', ('fp32', 'fp16'), ()),
    'litert': Format('.tflite', 'litert', ('fp32', ), ()),
}


def find_format(name: str, precision: str, dynamic: Iterable[str] | None
                ) -> tuple[Format, tuple[str, ...]]:
    """Find a format, if it has what is asked of it, and the axes that are to stay free.

    Raises:
        UsageError: There is no such format, or not in this precision, or with these free axes.
    """
    if name not in FORMATS:
        raise UsageError(f'--to {name}: no such format; there are {", ".join(FORMATS)}')
    found = FORMATS[name]
    if precision not in found.precisions:
        raise UsageError(f'--to {name} --precision {precision}: it is written in '
                         f'{" or ".join(found.precisions)}')
    if dynamic is None:
        return found, found.dynamic[:1]
    missing = [axis for axis in dynamic if axis not in found.dynamic]
    if missing:
        others = ','.join(found.dynamic) or 'none'
        raise UsageError(f'--to {name} --dynamic {missing[0]}: its {missing[0]} is fixed; give '
                         f'--dynamic {others}')
    return found, tuple(dynamic)
