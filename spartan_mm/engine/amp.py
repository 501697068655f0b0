"""Mixed precision where there is no GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(AmpOptimWrapper):
    """Mixed precision on a CPU, to try out there what is to run on a GPU; hardly ever faster.

    NOTE: mmengine's ``AmpOptimWrapper`` refuses to run without an accelerator, and its autocast on
    a CPU knows bfloat16 alone.

    Args:
        dtype: 'float16', with dynamic loss scaling, or 'bfloat16', which needs none.
        kwargs: arguments of mmengine's ``OptimWrapper``.
    """

    def __init__(self, dtype: str = 'bfloat16', **kwargs: Any) -> None:
        OptimWrapper.__init__(self, **kwargs)
        self.cast_dtype = getattr(torch, dtype)
        self.loss_scaler = torch.amp.GradScaler('cpu', enabled=dtype == 'float16')
        self._scale_update_param = None

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Autocast, and leave out the synchronisation of gradients while they accumulate."""
        with OptimWrapper.optim_context(self, model), torch.autocast('cpu', self.cast_dtype):
            yield
