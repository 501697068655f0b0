"""The form of a model that exporters take: same function, in operations that runtimes have."""
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def export_form(model: nn.Module, form: str = 'gather') -> Iterator[nn.Module]:
    """Let a model's parts that have another form for exporters take it within this context.

    That is deformable attention: `embedding_bag` becomes a loop in ONNX, and `grid_sample` is read
    wrongly by some versions of TensorRT.

    Args:
        model: Any model.
        form: What :func:`~spartan_mm.detection.deformable_attention.sample_multi_scale` takes.
    """
    parts = [(module, module.form) for module in model.modules() if hasattr(module, 'form')]
    try:
        for module, _ in parts:
            module.form = form
        yield model
    finally:
        for module, before in parts:
            module.form = before
