"""How far a step is from the limit of the machine: work counted, bandwidth and rate measured."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import prod
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

_CONVOLUTIONS = (aten.convolution, aten._convolution)
# Has no formula of its own in PyTorch.
_SAME_FORMULA = {
    aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward:
        aten._scaled_dot_product_flash_attention_backward,
}

# Of a copy and of the matrices of a product: far beyond any cache, and soon done.
_COPIED = {'cpu': 256 * 2**20, 'cuda': 2 * 2**30}
_SIDE = {'cpu': 1536, 'cuda': 8192}


@dataclass(frozen=True)
class Limits:
    """What a machine does at best.

    Args:
        bandwidth: Bytes per second that a large copy reads and writes.
        rate: Operations per second of a product of large matrices, a multiply-add counted as two.
    """

    bandwidth: float
    rate: float


@dataclass(frozen=True)
class Work:
    """What a step has to do, operation by operation as PyTorch runs it without compiling.

    Args:
        operations: Of convolutions and products of matrices, a multiply-add counted as two.
        bytes: Read and written, if every operation reads its inputs and writes its outputs once.
        heavy_bytes: The same of the convolutions and products alone: what is left if everything
            between them were fused into them.
        seconds: The least time that the limits allow if every operation runs on its own: for each
            one what its bytes or its operations take, whichever is more.
        fused_seconds: The same for the convolutions and products alone.
    """

    operations: int
    bytes: int
    heavy_bytes: int
    seconds: float
    fused_seconds: float


class _WorkCounter(TorchDispatchMode):
    """Notes operations and bytes of everything that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        # These only look at memory in another way, or set it aside.
        if not (func.is_view or func is aten._unsafe_view.default
                or func._overloadpacket.__name__.startswith(('empty', 'new_empty'))):
            self.counts.append((_operations(func, args, kwargs or {}, out),
                                _traffic(args, kwargs, out)))
        return out


def count_work(step: Callable[[], object], limits: Limits, steps: int = 1) -> Work:
    """Count what a step has to do.

    Args:
        step: Must not be compiled.
        limits: Of the machine.
        steps: How many to take the average of.
    """
    with _WorkCounter() as counter:
        for _ in range(steps):
            step()
    least = [(max(operations / limits.rate, size / limits.bandwidth), operations, size)
             for operations, size in counter.counts]
    heavy = [item for item in least if item[1]]
    return Work(
        operations=sum(operations for _, operations, _ in heavy) // steps,
        bytes=sum(size for _, _, size in least) // steps,
        heavy_bytes=sum(size for _, _, size in heavy) // steps,
        seconds=sum(seconds for seconds, _, _ in least) / steps,
        fused_seconds=sum(seconds for seconds, _, _ in heavy) / steps)


def measure_limits(device: torch.device, dtype: torch.dtype = torch.float32) -> Limits:
    """Measure bandwidth and rate with the current number of threads, once in a process.

    Args:
        device: 'cpu' or 'cuda'.
        dtype: Of the matrices.
    """
    return _measure_limits(device, dtype, torch.get_num_threads())


@cache
def _measure_limits(device: torch.device, dtype: torch.dtype, threads: int) -> Limits:
    source = torch.zeros(_COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = _median_time(lambda: target.copy_(source), device)
    bandwidth = 2 * source.numel() / seconds

    side = _SIDE[device.type]
    matrix = torch.rand(side, side, device=device).to(dtype)
    seconds = _median_time(lambda: matrix @ matrix, device)
    return Limits(bandwidth=bandwidth, rate=2 * side**3 / seconds)


def time_step(step: Callable[[], object], device: torch.device) -> float:
    """Time a step in seconds, the device idle before and after."""
    wait_for(device)
    start = perf_counter()
    step()
    wait_for(device)
    return perf_counter() - start


def wait_for(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def _median_time(step: Callable[[], object], device: torch.device, repeats: int = 7) -> float:
    step()
    return median(time_step(step, device) for _ in range(repeats))


def _traffic(*values: Any) -> int:
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    # One that is expanded is read no further than its memory goes.
    return sum(min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
               for tensor in tensors)


def _operations(func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> int:
    packet = func._overloadpacket
    # NOTE: PyTorch's own formula of the backward pass overlooks the groups.
    if packet in _CONVOLUTIONS:
        return _convolution(args[0], args[1], out, transposed=args[6])
    if packet is aten.convolution_backward:
        grad, x, weight = args[:3]
        return sum(args[10][:2]) * _convolution(x, weight, grad, transposed=args[7])
    formula = flop_registry.get(_SAME_FORMULA.get(packet, packet))
    return formula(*args, **kwargs, out_val=out) if formula else 0


def _convolution(x: Tensor, weight: Tensor, out: Tensor, transposed: bool) -> int:
    return 2 * (x if transposed else out).numel() * prod(weight.shape[1:])
