"""Modules that torch.compile calls as one operator instead of compiling what they do."""
from itertools import count
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from .functional import has_fast_kernels

_modules: 'WeakValueDictionary[int, nn.Module]' = WeakValueDictionary()
_numbers = count()

# Of PyTorch 2.7.
_is_exporting = getattr(torch.compiler, 'is_exporting', lambda: False)


class Opaque(nn.Module):
    """A module that compiled inference runs as it is on a CPU.

    There Inductor works on whole batches, which don't fit the cache, and joins no activation with
    the convolution before it. Subclasses do both in :meth:`run`.
    """

    def __init__(self, *args: nn.Module) -> None:
        super().__init__(*args)
        self._register()

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._register()  # A copy is another module.

    def _register(self) -> None:
        self._number = next(_numbers)
        _modules[self._number] = self

    def run(self, x: Tensor) -> Tensor:
        """What the module computes: a map (N, C, H, W) to a new one of the same kind."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        if (torch.compiler.is_compiling() and not _is_exporting() and not self.training
                and not torch.is_grad_enabled() and has_fast_kernels(x)):
            return _run(x, self._number)
        return self.run(x)


@torch.library.custom_op('spartan_mm::run', mutates_args=())
def _run(x: Tensor, number: int) -> Tensor:
    with torch.no_grad():
        y = _modules[number].run(x)
    # Compiled code counts on the strides that it was told, of an axis with one element, too.
    return y if y.stride() == x.stride() else torch.empty_like(x).copy_(y)


@_run.register_fake
def _(x: Tensor, number: int) -> Tensor:
    return torch.empty_like(x)
