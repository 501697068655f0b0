"""The form of a model that exporters take: same function, in operations that runtimes have."""
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def export_form(model: nn.Module, form: str = 'gather') -> Iterator[nn.Module]:
    """Let a model's parts that have another form for exporters take it within this context.

    These are deformable attention (`embedding_bag` becomes a loop in ONNX, and `grid_sample` is
    read wrongly by some versions of TensorRT) and CMixers, with whose Split SpaRTAN-XT takes 1.4
    times as long in OpenVINO.

    Args:
        model: Any model.
        form: What :func:`~spartan_mm.detection.deformable_attention.sample_multi_scale` takes:
            'gather' for other runtimes, or 'bags' for what PyTorch compiles, where a CMixer stays
            as it is.
    """
    wanted = dict(form=form, separate=form == 'gather')
    before = [(module, name, getattr(module, name)) for module in model.modules()
              for name in wanted if hasattr(module, name)]
    try:
        for module, name, _ in before:
            setattr(module, name, wanted[name])
        yield model
    finally:
        for module, name, value in before:
            setattr(module, name, value)
