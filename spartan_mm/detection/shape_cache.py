"""Tensors that follow from shapes alone, made once for each shape."""
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import TypeVar

import torch
from torch import Tensor

Made = TypeVar('Made', bound=Tensor | tuple[Tensor, ...])

MAX_SHAPES = 32
"""Shapes whose tensors are kept; multi-scale training draws from about a dozen."""


def cached_by_shape(function: Callable[..., Made]) -> Callable[..., Made]:
    """Keep what a function makes of its arguments, shapes above all.

    What is kept belongs to no model: no state dict has it, copies of a model share it, and a model
    that is moved finds another, since device and type are arguments. It can be part of a later
    training even if inference mode was on when it was made.

    NOTE: Nothing is looked up or kept where operations are recorded instead of run once:
    torch.compile then keeps the shapes symbolic, and the memory of a CUDA graph stays its own.

    Args:
        function: Makes tensors, which nobody may change, from arguments that can be hashed; the
            keyword `device` says where.
    """
    @lru_cache(MAX_SHAPES)
    def keep(*args, **kwargs) -> Made:
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    @wraps(function)
    def look_up(*args, device: torch.device | None = None, **kwargs) -> Made:
        recorded = torch.compiler.is_compiling() or torch.jit.is_tracing() or (
            device is not None and device.type == 'cuda'
            and torch.cuda.is_current_stream_capturing())
        # Fake tensors, which have no values, come out of any operation while their mode is on.
        if recorded or type(torch.empty(0)) is not Tensor:
            return function(*args, device=device, **kwargs)
        return keep(*args, device=device, **kwargs)

    return look_up
