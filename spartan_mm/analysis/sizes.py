"""How large models are: parameters, operations and kernels by module, memory of a step."""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from ..errors import CheckpointError
from ..text import first_line, markdown
from ..weights.forms import is_deployed, switch_to_deploy
from .kernels import KernelCount, KernelCounter, count_step
from .models import CannotRunError, load_named_model

# What PyTorch's profiler, which measures memory on a CPU, says about itself.
os.environ.setdefault('KINETO_LOG_LEVEL', '6')

# What fvcore counts: for each element that goes into one of these, and the elements that come out
# of those.
OPERATIONS_PER_ELEMENT = {
    'native_group_norm': 5,
    'native_layer_norm': 5,
    'native_batch_norm': 2,
    '_native_batch_norm_legit_no_training': 2,  # the same in newer versions of PyTorch
    'mean': 1,  # global pools
}
ACTIVATIONS_OF = ('convolution', 'mm', 'addmm', 'bmm', 'baddbmm')

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
            and attentions for one image, as the code computes them.
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


def measure_modules(model: nn.Module, height: int, width: int) -> dict[str, Complexity]:
    """Count parameters and multiply-adds in a pass over one image, module by module.

    What is computed counts for the innermost module that runs, and so for all that it is a part of
    by its name, whichever module has called it: a module's numbers are the sum of its own and of
    its parts'. Parameters that several modules share count in each of them, and once in the whole.

    Args:
        model: Takes images, (N, 3, H, W). It is left in evaluation mode. On the meta device nothing
            is computed.
        height: Height of the image, in pixels.
        width: Width of the image, in pixels.

    Returns:
        By the name of the module, '' for the whole model, which comes first.
    """
    image = next(model.parameters()).new_zeros(1, 3, height, width)
    # These know kernels that do all of an attention, or of a layer of it, at once.
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (KernelCounter(image.device.type) as counter, torch.no_grad(),
              sdpa_kernel(SDPBackend.MATH), _callers(model.eval(), counter)):
            model(image)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)

    totals: dict[str, Counter] = defaultdict(Counter)
    for kernel in counter.ran:
        beside = OPERATIONS_PER_ELEMENT.get(kernel.name, 0) * kernel.given
        counts = Counter(
            multiply_adds=kernel.flops // 2, operations=kernel.flops // 2 + beside,
            activations=kernel.made if kernel.name in ACTIVATIONS_OF else 0)
        parts = kernel.caller.split('.')
        for name in {'', *('.'.join(parts[:length + 1]) for length in range(len(parts)))}:
            totals[name] += counts
    return {name: Complexity(
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        multiply_adds=totals[name]['multiply_adds'], operations=totals[name]['operations'],
        activations=totals[name]['activations']) for name, module in model.named_modules()}


@contextmanager
def _callers(model: nn.Module, counter: KernelCounter) -> Iterator[None]:
    """Let a counter know the innermost module that runs."""
    running = ['']

    def enter(name: str) -> None:
        running.append(name)
        counter.caller = name

    def leave(*_: Any) -> None:
        running.pop()
        counter.caller = running[-1]

    hooks = []
    for name, module in model.named_modules():
        # Before the model's own hooks, and after them.
        hooks.append(module.register_forward_pre_hook(
            lambda *_, name=name: enter(name), prepend=True))
        hooks.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


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
        size = shape or named.shape
        if size is None:
            raise CannotRunError(f'{name} does not say in its test pipeline how large the images '
                                 'are; give a size with --size H W')
        try:
            if deploy and not is_deployed(named.model):
                switch_to_deploy(named.model)
            modules = measure_modules(named.model, *size)
            image = torch.zeros(1, 3, *size, device=device)
            with torch.no_grad():
                kernels = count_step(partial(named.model, image), device)
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
