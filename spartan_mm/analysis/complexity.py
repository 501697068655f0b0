"""Parameters and multiply-adds of models, as a whole and module by module."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ..zoo import without_pretrained

aten = torch.ops.aten

# What fvcore counts for each element that goes into an operation, besides convolutions and products
# of matrices.
OPERATIONS_PER_ELEMENT = {
    aten.native_group_norm: 5,
    aten.native_layer_norm: 5,
    aten.native_batch_norm: 2,
    aten._native_batch_norm_legit_no_training: 2,  # the same in newer versions of PyTorch
    aten.mean: 1,  # global pools
}


@dataclass(frozen=True)
class Complexity:
    """The size of a model or of a part of one.

    Args:
        parameters: Number of parameters.
        multiply_adds: Multiplications (each with an addition) of the convolutions, linear layers
            and attentions for one image, as the code computes them: half of what PyTorch's flop
            counter says.
        operations: The same with norms and global pools, as fvcore counts.
        activations: Elements of what convolutions and products of matrices give, as fvcore counts.
    """

    parameters: int
    multiply_adds: int
    operations: int
    activations: int

    @property
    def flops(self) -> int:
        """The multiply-adds in the other convention, a multiplication and an addition counted."""
        return 2 * self.multiply_adds


def measure_complexity(model: nn.Module, height: int, width: int) -> Complexity:
    """Count parameters and multiply-adds in a pass over one image.

    Args:
        model: Takes images, (N, 3, H, W). It is left in evaluation mode. On the meta device nothing
            is computed.
        height: Height of the image, in pixels.
        width: Width of the image, in pixels.
    """
    return measure_modules(model, height, width)['']


def measure_modules(model: nn.Module, height: int, width: int) -> dict[str, Complexity]:
    """Count parameters and multiply-adds in a pass over one image, module by module.

    What is computed counts for the innermost module that runs, and so for all that it is a part of
    by its name, whichever module has called it: a module's numbers are the sum of its own and of
    its parts'. Parameters that several modules share count in each of them, and once in the whole.

    Args:
        model: See :func:`measure_complexity`.
        height: Height of the image, in pixels.
        width: Width of the image, in pixels.

    Returns:
        By the name of the module, '' for the whole model, which comes first.
    """
    image = next(model.parameters()).new_zeros(1, 3, height, width)
    per_element = {op: _per_element(count) for op, count in OPERATIONS_PER_ELEMENT.items()}
    counter = FlopCounterMode(display=False, custom_mapping=per_element)
    outputs = _OutputCounter()

    def read() -> Counter:
        counts = counter.flop_counts['Global']
        beside = sum(counts.get(op, 0) for op in per_element)
        flops = sum(counts.values())
        return Counter(multiply_adds=(flops - beside) // 2, operations=flops // 2,
                       activations=outputs.elements)

    # The counter does not know the attention that PyTorch would choose on a CPU.
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (counter, outputs, torch.no_grad(), sdpa_kernel(SDPBackend.MATH),
              _attribution(model.eval(), read) as own):
            model(image)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    totals: dict[str, Counter] = defaultdict(Counter)
    for name, counts in own.items():
        totals[''] += counts
        parts = name.split('.') if name else []
        for length in range(1, len(parts) + 1):
            totals['.'.join(parts[:length])] += counts
    return {name: Complexity(
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        multiply_adds=totals[name]['multiply_adds'], operations=totals[name]['operations'],
        activations=totals[name]['activations']) for name, module in model.named_modules()}


@contextmanager
def _attribution(model: nn.Module, read: Callable[[], Counter]) -> Iterator[dict[str, Counter]]:
    """Find what each module computes itself, outside of the modules that it calls.

    Args:
        model: The model.
        read: Reads the counts so far.

    Yields:
        Counts by the name of the module, complete when the block is left.
    """
    own: dict[str, Counter] = defaultdict(Counter)
    running: list[str] = []
    last = read()

    def note() -> None:
        nonlocal last
        now = read()
        if running:
            own[running[-1]] += now - last
        last = now

    def enter(name: str) -> None:
        note()
        running.append(name)

    def leave(*_: Any) -> None:
        note()
        running.pop()

    hooks = []
    for name, module in model.named_modules():
        # Before the model's own hooks, and after them.
        hooks.append(module.register_forward_pre_hook(
            lambda *_, name=name: enter(name), prepend=True))
        hooks.append(module.register_forward_hook(leave))
    try:
        yield own
    finally:
        for hook in hooks:
            hook.remove()


class _OutputCounter(TorchDispatchMode):
    """Counts the elements that convolutions and products of matrices give."""

    OPS = (aten.convolution, aten.mm, aten.addmm, aten.bmm, aten.baddbmm)

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in self.OPS:
            self.elements += out.numel()
        return out


def build_without_weights(config: Config) -> nn.Module:
    """Build the model of a config on the meta device: shapes, and no numbers.

    Args:
        config: One whose ``custom_imports`` have been made.
    """
    with DefaultScope.overwrite_default_scope(config.default_scope):
        return build_without_numbers(lambda: MODELS.build(without_pretrained(config.model)))


def build_without_numbers(build: Callable[[], nn.Module]) -> nn.Module:
    """Call what builds a model, and have it on the meta device.

    Args:
        build: Builds the model where torch's default device is.
    """
    try:
        with torch.device('meta'):
            # Not everything heeds torch's default device: torch.Tensor(...) does not.
            model = build().to('meta')
    except (NotImplementedError, RuntimeError):
        # It computes something while it is built, such as the rate of drop path block by block.
        model = build().to('meta')
    # PyTorch's flop counter stumbles over views of parameters with gradients.
    return model.requires_grad_(False)


def _per_element(count: int):
    # The flop counter counts a multiply-add twice.
    def formula(shape: Iterable[int], *args: Any, **kwargs: Any) -> int:
        return 2 * count * prod(getattr(shape, 'shape', shape))
    return formula
