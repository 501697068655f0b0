"""How far a step is from the limit of the machine: work counted, bandwidth and rate measured."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from statistics import median
from time import perf_counter

import torch

from .kernels import Kernel, KernelCounter

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
    """What a step has to do, kernel by kernel as PyTorch runs it without compiling.

    Args:
        operations: Of convolutions and products of matrices, a multiply-add counted as two.
        bytes: What the kernels read and write, see ``kernels.py``.
        seconds: The least time that the limits allow if every kernel runs on its own: for each one
            what its bytes or its operations take, whichever is more.
        fused_seconds: The same for the convolutions and products alone, as if everything between
            them were fused into them.
    """

    operations: int
    bytes: int
    seconds: float
    fused_seconds: float


def count_work(step: Callable[[], object], limits: Limits, device: str = 'cpu',
               steps: int = 1) -> Work:
    """Count what a step has to do.

    Args:
        step: Must not be compiled.
        limits: Of the machine.
        device: Type of the device whose work counts.
        steps: How many to take the average of.
    """
    with KernelCounter(device) as counter:
        for _ in range(steps):
            step()
    everything = counter.ran
    heavy = [kernel for kernel in everything if kernel.flops]

    def least(kernels: list[Kernel]) -> float:
        return sum(max(kernel.flops / limits.rate, kernel.bytes / limits.bandwidth)
                   for kernel in kernels) / steps
    return Work(operations=sum(kernel.flops for kernel in heavy) // steps,
                bytes=sum(kernel.bytes for kernel in everything) // steps,
                seconds=least(everything), fused_seconds=least(heavy))


@cache
def measure_limits(device: torch.device, dtype: torch.dtype, threads: int) -> Limits:
    """Measure bandwidth and rate, once in a process.

    Args:
        device: 'cpu' or 'cuda'.
        dtype: Of the matrices.
        threads: How many PyTorch uses; with others, it is to be measured anew.
    """
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
