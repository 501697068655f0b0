"""How large models are: parameters, operations and kernels by module, memory of a step."""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ..errors import CheckpointError
from ..text import first_line, markdown
from ..weights.forms import is_deployed, switch_to_deploy
from .kernels import KernelCount, count_kernels
from .models import CannotRunError, load_named_model

# What PyTorch's profiler, which measures memory on a CPU, says about itself.
os.environ.setdefault('KINETO_LOG_LEVEL', '6')

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


TRAINING_FORM, DEPLOY_FORM = 'training form', 'deploy form'

#: What is counted, for whoever reads the numbers.
COUNTED = ('Counted for one image: convolutions, linear layers and the products of attention. Not '
           'counted: norms, activation functions, bilinear sampling (in deformable attention), '
           'post-processing. Kernels, and the GB that they read and write, are of everything.')


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


def _per_element(count: int):
    # The flop counter counts a multiply-add twice.
    def formula(shape: Iterable[int], *args: Any, **kwargs: Any) -> int:
        return 2 * count * prod(getattr(shape, 'shape', shape))
    return formula


@dataclass(frozen=True)
class Count:
    """The size of a model, module by module.

    Args:
        name: What to call the model.
        source: Where it comes from, see :class:`NamedModel`.
        form: 'training form' or 'deploy form'.
        shape: (H, W) of the image.
        modules: By the name of the module, '' for the whole model, which comes first.
        kinds: The class of each module.
        kernels: Of the inference of an image.
    """

    name: str
    source: str
    form: str
    shape: tuple[int, int]
    modules: dict[str, Complexity]
    kinds: dict[str, str]
    kernels: KernelCount

    @property
    def total(self) -> Complexity:
        """The size of the whole model."""
        return self.modules['']

    def to_dict(self) -> dict[str, Any]:
        """Make a dict fit for JSON."""
        content = asdict(self)
        for name, sizes in content['modules'].items():
            sizes.update(flops=self.modules[name].flops, kind=content['kinds'][name])
        del content['kinds']
        return content


def count_model(name: str | Path, shape: tuple[int, int] | None = None,
                deploy: bool = False) -> Count:
    """Count a model's parameters and operations.

    Nothing is computed where shapes are enough. A model that looks at numbers on its way runs once
    on the CPU, with random weights.

    Args:
        name: See :func:`load_named_model`.
        shape: (H, W) of the image; None for what the model's test pipeline makes.
        deploy: Switch to the inference form. A checkpoint of that form is in it anyway.

    Raises:
        CannotRunError: If the size of the images is neither given nor known, or the model cannot be
            run on them.
        CheckpointError: If the model has no deploy form.
        UnknownModelError: And what else :func:`load_named_model` raises.
    """
    for device in ('meta', 'cpu'):
        named = load_named_model(name, device=device)
        # PyTorch's flop counter stumbles over views of parameters with gradients.
        named.model.requires_grad_(False)
        size = shape or named.shape
        if size is None:
            raise CannotRunError(f'{name} does not say in its test pipeline how large the images '
                                 'are; give a size with --size H W')
        try:
            if deploy and not is_deployed(named.model):
                switch_to_deploy(named.model)
            modules = measure_modules(named.model, *size)
            kernels = count_kernels(named.model, size, device=device)
        except CheckpointError:
            raise
        # Whatever a model's code says to shapes without numbers, or to images of this size.
        except Exception as error:
            if device == 'cpu':
                raise CannotRunError(f'{name} cannot be run on images of {size[0]}x{size[1]}: '
                                     f'{first_line(error)}') from error
        else:
            break
    form = DEPLOY_FORM if deploy or is_deployed(named.model) else TRAINING_FORM
    kinds = {part: type(module).__name__ for part, module in named.model.named_modules()}
    return Count(named.name, named.source, form, size, modules, kinds, kernels)


def forms_table(counts: Sequence[Count]) -> str:
    """Lay out the sizes of one or several forms of a model in Markdown.

    Args:
        counts: One for each form.
    """
    rows = [['form', 'input', 'parameters', 'multiply-adds', 'FLOPs, 2 per multiply-add',
             'activations', 'kernels', 'GB']]
    for count in counts:
        total = count.total
        rows.append([count.form, '{} x {}'.format(*count.shape), f'{total.parameters:,}',
                     f'{total.multiply_adds:,}', f'{total.flops:,}', f'{total.activations:,}',
                     f'{count.kernels.kernels:,}', f'{count.kernels.bytes / 1e9:.3f}'])
    return markdown(rows)


def tree(count: Count, depth: int | None = 2) -> str:
    """Lay out the sizes of a model's modules, each below the one that it is a part of.

    Modules that have no parameters and compute nothing that counts are left out.

    Args:
        count: The model.
        depth: How far down; 0 for the model alone, None for all of it.
    """
    rows = [('module', 'parameters', 'multiply-adds', 'FLOPs', 'share, %')]
    total = count.total
    for name, size in count.modules.items():
        level = name.count('.') + 1 if name else 0
        if depth is not None and level > depth or not (size.parameters or size.multiply_adds):
            continue
        title = name.rpartition('.')[2] or count.name
        share = 100 * size.multiply_adds / total.multiply_adds if total.multiply_adds else 0.
        rows.append((f"{'  ' * level}{title} ({count.kinds[name]})", _short(size.parameters),
                     _short(size.multiply_adds), _short(size.flops), f'{share:.1f}'))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ''.join(
        '  '.join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + '\n'
        for row in rows)


def _short(number: int) -> str:
    """Write a large number with four digits or so, and its unit."""
    for unit, letter in ((1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
        if number >= unit:
            return f'{number / unit:.2f} {letter}'
    return str(number)


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
