"""How much memory a step of a model takes at its peak."""

from collections.abc import Callable, Iterable
from itertools import accumulate

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def peak_of_step(step: Callable[[], object], device: torch.device) -> int:
    """Measure how much memory a step needs at its peak, beyond what was there before.

    Every tensor that the step makes counts from its allocation until it is freed, also those that
    operations make for themselves. What libraries beneath PyTorch allocate on their own does not.

    NOTE: On a CPU the profiler reports each allocation to the byte; memory that was there before
    is not known to it, neither is its end. So free in advance what the step frees first, such as
    the gradients of the step before.

    Args:
        step: Called once; what it returns is dropped.
        device: 'cuda' or 'cpu', where its tensors lie.

    Returns:
        Bytes.
    """
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before

    # Building the summary of events, which nobody reads, would take longer than the step.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [(event.start_ns(), event.nbytes())
              for event in profiler.profiler.kineto_results.events() if event.name() == '[memory]']
    events.sort(key=lambda event: event[0])
    return max(accumulate(change for _, change in events), default=0)


def size_of(tensors: Iterable[Tensor]) -> int:
    """Sum the memory of tensors in bytes, what they share once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
                for tensor in tensors}
    return sum(storages.values())
