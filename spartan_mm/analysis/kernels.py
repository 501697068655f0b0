"""What a step asks of a device, whichever it is: kernels, and the bytes that they read and write.

A kernel is a call of one of PyTorch's own operators that is neither a view nor a mere allocation.
Its bytes are those of all tensors that it reads or writes; each counts once, also one that is
changed in place, and an expanded one by all of its elements.
"""
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..text import markdown

aten = torch.ops.aten

# These only set memory aside, or look at it in another way.
NO_KERNELS = {'empty', 'empty_like', 'empty_strided', 'new_empty', 'new_empty_strided',
              '_unsafe_view', 'alias', 'detach', 'lift_fresh'}


# What kernels are counted as that have no formula of their own in PyTorch.
_SAME_FORMULA = {
    aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward:
        aten._scaled_dot_product_flash_attention_backward,
}


@dataclass(frozen=True)
class Kernel:
    """A kernel that ran.

    Args:
        name: Of PyTorch's operator.
        flops: Of convolutions and products of matrices, a multiply-add counted as two; 0 for
            others.
        bytes: What it reads and writes.
        given: Elements of its first tensor.
        made: Elements of what it returns.
        caller: The value of :attr:`KernelCounter.caller` at the time.
    """

    name: str
    flops: int
    bytes: int
    given: int
    made: int
    caller: str


@dataclass
class KernelCount:
    """What was counted.

    Attributes:
        kernels: Number of kernels.
        bytes: What they read and write.
        by_operation: Kernels and bytes of each operator by its name.
    """

    kernels: int = 0
    bytes: int = 0
    by_operation: dict[str, tuple[int, int]] = field(default_factory=dict)


def count_step(step: Callable[[], object], device: str = 'meta') -> KernelCount:
    """Count the kernels of whatever runs.

    NOTE: On the meta device there are no numbers. Where a step reads some, as the matching of a
    detector does, it reads zeros: every object is matched, whichever query it is matched with.

    NOTE: Attention that a model asks PyTorch for by ``scaled_dot_product_attention`` is a kernel,
    and another one in the backward pass, as CPUs and GPUs have it.

    Args:
        step: Is called once.
        device: Where the tensors lie whose kernels count; what else is computed does not.
    """
    with KernelCounter(device) as counter, _OneKernelAttention():
        step()
    count = KernelCount(len(counter.ran), sum(kernel.bytes for kernel in counter.ran))
    for kernel in counter.ran:
        kernels, size = count.by_operation.get(kernel.name, (0, 0))
        count.by_operation[kernel.name] = kernels + 1, size + kernel.bytes
    return count


def kernels_table(counts: Mapping[str, KernelCount], most: int = 20) -> str:
    """Lay out counts side by side in Markdown.

    Args:
        counts: By what stands above their columns.
        most: Number of operations to list, those with the most bytes.
    """
    columns = [{'total': (count.kernels, count.bytes), **count.by_operation}
               for count in counts.values()]
    names = sorted({name: None for column in columns for name in column}, reverse=True,
                   key=lambda name: sum(column.get(name, (0, 0))[1] for column in columns))
    rows = [['operation', *(f'{label}: {what}' for label in counts for what in ('kernels', 'GB'))]]
    for name in names[:1 + most]:
        found = [column.get(name, (0, 0)) for column in columns]
        rows.append([name, *(cell for kernels, size in found
                             for cell in (str(kernels), f'{size / 1e9:.2f}'))])
    return markdown(rows)


class KernelCounter(TorchDispatchMode):
    """Notes the kernels that run while it is entered.

    Args:
        device: Type of the device whose kernels count.

    Attributes:
        ran: The kernels, in order.
        caller: Is noted with each kernel; may be set at any time.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.ran: list[Kernel] = []
        self.caller = ''

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._overloadpacket.__name__
        out = self.read(name, *args, **kwargs)
        if out is None:
            out = func(*args, **kwargs)
        given, made = ([leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
                       for values in ((args, kwargs), out))
        # Sets know tensors by identity.
        tensors = {x for x in (*given, *made) if x.device.type == self.device}
        if tensors and not func.is_view and name not in NO_KERNELS:
            self.ran.append(Kernel(
                name, _flops(func, args, kwargs, out),
                sum(x.numel() * x.element_size() for x in tensors),
                given[0].numel() if given else 0, sum(x.numel() for x in made), self.caller))
        return out

    @staticmethod
    def read(name: str, x: Any = None, *args: Any, **kwargs: Any) -> Tensor | float | None:
        """What leaves the meta device; None for other operations."""
        if name == '_local_scalar_dense' and x.is_meta:
            return torch.zeros((), dtype=x.dtype).item()
        if name == '_to_copy' and x.is_meta and kwargs.get('device', x.device).type != 'meta':
            return torch.zeros(x.shape, dtype=kwargs.get('dtype', x.dtype))
        return None


class _OneKernelAttention(TorchFunctionMode):
    """The meta device itself knows no attention but the products and the softmax in it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            func = self.attend
        return func(*args, **(kwargs or {}))

    @staticmethod
    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
               dropout_p: float = 0., is_causal: bool = False, **kwargs: Any) -> Tensor:
        """What a CPU has, which takes any mask."""
        return aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=attn_mask,
            scale=kwargs.get('scale'))[0]


def _flops(func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> int:
    packet = func._overloadpacket
    # NOTE: PyTorch's own formula of the backward pass overlooks the groups.
    if packet is aten.convolution:
        return _convolution(args[0], args[1], out, transposed=args[6])
    if packet is aten.convolution_backward:
        grad, x, weight = args[:3]
        return sum(args[10][:2]) * _convolution(x, weight, grad, transposed=args[7])
    formula = flop_registry.get(_SAME_FORMULA.get(packet, packet))
    return formula(*args, **kwargs, out_val=out) if formula else 0


def _convolution(x: Tensor, weight: Tensor, out: Tensor, transposed: bool) -> int:
    return 2 * (x if transposed else out).numel() * prod(weight.shape[1:])
