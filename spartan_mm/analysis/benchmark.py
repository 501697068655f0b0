"""Time and memory of models, side by side in one run.

A model is measured in one or several forms (as it is built, deployed, compiled, as its authors
compute it) on the same work. The forms take turns, step by step, so that whatever else slows the
machine slows all of them: ratios are of steps that ran next to each other.
"""

import gc
import math
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.optim import build_optim_wrapper
from torch import Tensor, nn

from ..backbones import SpaRTAN
from ..engine.compile import compile_model
from ..engine.launch import choose_device
from ..errors import UsageError
from ..text import first_line, markdown
from ..version import __version__
from .authors_form import to_authors_form
from .kernels import KernelCount, count_step
from .models import CannotRunError, describe_images, load_named_model
from .roofline import count_work, measure_limits, time_step, wait_for
from .sizes import peak_of_step, size_of

DTYPES = ('float16', 'bfloat16')

# A detector's images in training have as many objects as COCO's have on average.
_NUM_OBJECTS = 7
_MIN_ROUNDS, _MAX_ROUNDS = 5, 200

Report = Callable[[str], None]


@dataclass(frozen=True)
class Workload:
    """What a step consists of.

    Args:
        train: Forward and backward pass in training mode, else inference.
        device: Such as 'cpu' or 'cuda:0'; 'meta' where nothing is timed but kernels are counted.
        amp: 'float16' or 'bfloat16' for automatic mixed precision, None for float32.
        batch: Images in a step; None for what the config trains with, or 1 in inference.
        sizes: (height, width) of the images, for one step after the other in turn; None for the
            size of the config's test pipeline.
        multi_scale: Whether to take the sizes that the config's ``BatchRandomResize`` draws from.

    Raises:
        UsageError: If a value is not among the legal ones.
    """

    train: bool = False
    device: str = 'cpu'
    amp: str | None = None
    batch: int | None = None
    sizes: tuple[tuple[int, int], ...] | None = None
    multi_scale: bool = False

    def __post_init__(self) -> None:
        if self.batch is not None and self.batch < 1:
            raise UsageError(f'batch {self.batch} must be at least 1')
        if self.amp not in (None, *DTYPES):
            raise UsageError(f'amp {self.amp!r} must be one of {", ".join(DTYPES)}')
        if self.sizes is not None:
            # From JSON they come as lists.
            object.__setattr__(self, 'sizes', tuple(tuple(size) for size in self.sizes))
            if not self.sizes or min(min(size) for size in self.sizes) < 1:
                raise UsageError(f'sizes {self.sizes} must be pairs of positive numbers')
        if self.sizes is not None and self.multi_scale:
            raise UsageError('sizes are given, and those of multi-scale training asked for: '
                             'choose one of the two')
        if self.device.partition(':')[0] not in ('cpu', 'cuda', 'meta'):
            raise UsageError(f'device {self.device!r} must be cpu or cuda, or one such as '
                             'cuda:1')


@dataclass(frozen=True)
class Form:
    """A model and the form in which it runs.

    Args:
        model: Its name, see :func:`load_named_model`; of another package's model, too.
        authors: Turn the SpaRTAN backbone into its authors' form, see ``authors_form.py``.
        deploy: Switch to the inference form.
        compile: A mode of ``torch.compile``; None for not compiled. 'reduce-overhead' and
            'max-autotune' run CUDA graphs.
        channels_last: Lay weights and images out with the channels last.
        fused: Give the SpaRTAN backbone the blocks that are faster on a CPU, see
            ``backbones/fused.py``.
    """

    model: str
    authors: bool = False
    deploy: bool = False
    compile: str | None = None
    channels_last: bool = False
    fused: bool = False

    @property
    def label(self) -> str:
        """The form in words, without the model."""
        compiled = 'compiled' if self.compile == 'default' else f'compiled ({self.compile})'
        words = {"authors' code": self.authors, 'deploy': self.deploy, 'fused': self.fused,
                 compiled: self.compile, 'channels last': self.channels_last}
        return ', '.join(word for word, said in words.items() if said) or 'eager'


class StepError(CannotRunError):
    """A model that fails in its step.

    Args:
        form: Its form.
        message: What went wrong.
    """

    def __init__(self, form: Form, message: str) -> None:
        super().__init__(message)
        self.form = form


@dataclass(frozen=True)
class Group:
    """Forms that are measured side by side on the same work.

    Args:
        workload: The work.
        forms: The forms; ratios are against the others.
        rounds: Steps of each form; None for as many as take `seconds` in all.
        seconds: See `rounds`; there are at least 5 rounds, and at most 200.
        warm_up: Steps of each form, and each size, before anything is measured.
        parts: Whether to measure the parts of a training step, too, with the optimizer's, for the
            forms that are not compiled.
    """

    workload: Workload
    forms: tuple[Form, ...]
    rounds: int | None = None
    seconds: float = 20.
    warm_up: int = 3
    parts: bool = False

    def __post_init__(self) -> None:
        if self.rounds is not None and self.rounds < 1:
            raise UsageError(f'{self.rounds} rounds: must be at least 1')
        for form in self.forms:
            if form.deploy and self.workload.train:
                raise UsageError('the deploy form cannot be trained: measure one of the two')
            if form.authors and (form.deploy or form.fused):
                raise UsageError("the authors' code has neither a deploy form nor a fused one")
            if form.fused and self.workload.device != 'cpu':
                raise UsageError('the fused form is for a CPU: measure it with --device cpu')
        if self.parts and not self.workload.train:
            raise UsageError('parts are those of a training step')
        if self.parts and all(form.compile for form in self.forms):
            raise UsageError('a compiled step has no parts: measure them without compiling')


class Subject:
    """A model built in one form, and its step.

    Args:
        form: The form.
        workload: The work; the same random images for every subject.

    Raises:
        UsageError: If the form or the work does not go with the model.
        UnknownModelError: If the form's name stands for no model.
    """

    def __init__(self, form: Form, workload: Workload):
        self.form = form
        self.device = torch.device(workload.device)
        self.before = _held_by_gpu(self.device)
        torch.manual_seed(0)
        named = load_named_model(form.model)
        self.task, self.config = named.task, named.config
        self.train = workload.train
        self.amp = workload.amp and getattr(torch, workload.amp)
        self.batch = workload.batch or self._default_batch()

        self.model = self._prepare(named.model)
        self.sizes = workload.sizes or (
            self._training_sizes() if workload.multi_scale else (named.shape, ))
        if None in self.sizes:
            raise UsageError(f'{form.model} does not say in its test pipeline how large the '
                             'images are; give a size')
        inputs = {size: self._make_inputs(size) for size in self.sizes}
        self.inputs = [inputs[size] for size in self.sizes]
        self.step_index = 0

    def step(self) -> None:
        """Run the next step; in training, the gradients stay until the step after."""
        images, samples = self.inputs[self.step_index % len(self.inputs)]
        self.step_index += 1
        if self.form.compile and self.device.type == 'cuda':
            # The outputs of the step before may be overwritten by a CUDA graph.
            torch.compiler.cudagraph_mark_step_begin()
        if not self.train:
            with torch.no_grad(), self.autocast():
                if self.task == 'detection':
                    self.model(images, samples, mode='predict')
                else:
                    self.model(images)
            return
        self.model.zero_grad()
        self.loss(images, samples).backward()

    def loss(self, images: Tensor, samples: Any) -> Tensor:
        """The loss of a batch; of a backbone, the sum of its outputs."""
        with self.autocast():
            if self.task == 'detection':
                return self.model.parse_losses(self.model(images, samples, mode='loss'))[0]
            outputs = self.model(images)
            if self.task == 'classification':
                return F.cross_entropy(outputs, samples)
            return sum(output.float().sum() for output in outputs)

    def autocast(self):
        """Mixed precision, if it is asked for."""
        return torch.autocast(self.device.type, self.amp) if self.amp else nullcontext()

    def measure_memory(self) -> tuple[int, int]:
        """Measure the peak of a step on the largest images.

        Returns:
            Bytes at the peak with weights and images, and those of weights and images.
        """
        self.model.zero_grad()
        self.step_index = max(range(len(self.sizes)), key=lambda i: math.prod(self.sizes[i]))
        peak = peak_of_step(self.step, self.device)
        tensors = [*self.model.parameters(), *self.model.buffers()]
        held = size_of([*tensors, *(images for images, _ in self.inputs)])
        if self.device.type == 'cuda':
            # What a CUDA graph needs is allocated before the step that replays it.
            self.model.zero_grad()
            return max(peak + held, _held_by_gpu(self.device) - self.before), held
        return peak + held, held

    def _prepare(self, model: nn.Module) -> nn.Module:
        if self.form.authors or self.form.fused:
            backbone = self._find_spartan(model)
        if self.form.authors:
            try:
                to_authors_form(backbone)
            except ValueError as error:
                raise UsageError(f'{self.form.model}: {error}') from error
        model.train(self.train).to(self.device)
        if self.form.deploy:
            from ..weights.forms import switch_to_deploy
            model = switch_to_deploy(model)
        if self.form.fused:
            from ..backbones.fused import fuse
            fuse(backbone)
        if self.form.channels_last:
            model.to(memory_format=torch.channels_last)
        return model

    def _find_spartan(self, model: nn.Module) -> SpaRTAN:
        backbone = getattr(model, 'backbone', model)
        if not isinstance(backbone, SpaRTAN):
            raise UsageError(f'{self.form.model} has no SpaRTAN backbone, which alone has the '
                             f'form "{self.form.label}"')
        return backbone

    def _make_inputs(self, size: tuple[int, int]) -> tuple[Tensor, Any]:
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(self.batch, 3, *size, generator=generator).to(self.device)
        if self.form.channels_last:
            images = images.to(memory_format=torch.channels_last)
        if self.task == 'backbone':
            return images, None
        num_classes = next((module.num_classes for module in self.model.modules()
                            if isinstance(getattr(module, 'num_classes', None), int)), 1)
        if self.task == 'classification':
            labels = torch.randint(num_classes, (self.batch, ), generator=generator)
            return images, labels.to(self.device)
        return images, _make_samples(images, num_classes, generator)

    def _default_batch(self) -> int:
        if not self.train:
            return 1
        return self.config.train_dataloader.batch_size if self.config else 16

    def _training_sizes(self) -> tuple[tuple[int, int], ...]:
        augments = getattr(getattr(self.model, 'data_preprocessor', None), 'batch_augments', None)
        sizes = [tuple(size) for augment in augments or ()
                 for size in getattr(augment, 'sizes', ())]
        if not sizes:
            raise UsageError(f'{self.form.model} does not train at several scales: it has no '
                             'BatchRandomResize')
        return tuple(sizes)


class PartTimer:
    """Shares out the time of a step to the parts that it consists of.

    Time within a part that is in another part counts for the inner one alone.

    Args:
        device: Of the model.
    """

    def __init__(self, device: torch.device):
        self.seconds: dict[str, float] = {}
        self._device = device
        self._open: list[str] = []
        self._last = 0.

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what runs within for a part."""
        self._note()
        self._open.append(name)
        try:
            yield
        finally:
            self._note()
            self._open.pop()

    def wrap(self, owner: object, method: str, name: str) -> None:
        """Count a method of an object for a part, from now on."""
        function = getattr(owner, method)

        def timed(*args, **kwargs):
            with self.part(name):
                return function(*args, **kwargs)
        setattr(owner, method, timed)

    def _note(self) -> None:
        wait_for(self._device)
        now = perf_counter()
        if self._open:
            name = self._open[-1]
            self.seconds[name] = self.seconds.get(name, 0.) + now - self._last
        self._last = now


def default_device() -> str:
    """A GPU if there is one."""
    return 'cuda' if torch.cuda.is_available() else 'cpu'


@contextmanager
def measuring(threads: int | None = None) -> Iterator[None]:
    """Measure with so many threads of the CPU; say it in a line if memory runs out."""
    if threads:
        torch.set_num_threads(threads)
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise UsageError('out of memory, give a smaller --batch-size or --size '
                         f'({error})') from error


def run_group(group: Group, report: Report = lambda text: None) -> dict[str, Any]:
    """Measure forms side by side.

    Args:
        group: What to measure.
        report: Is told what is being done.

    Returns:
        A dict fit for JSON: 'machine', 'workload', 'limits' (see :class:`Limits`) and 'results',
        one for each form, with 'form' and 'model', its 'times' (seconds, round by round), 'pixels'
        and 'batch' of a step, 'peak_memory' and 'held_memory' (bytes; the latter of weights and
        images), 'first_step' (seconds, with compiling), 'work' (see :class:`Work`), and 'parts'.

    Raises:
        UsageError: If a form or the work does not go with the model.
        StepError: If a model fails in its first step.
        UnknownModelError: If a form's name stands for no model.
    """
    workload = group.workload
    if workload.device == 'meta':
        raise UsageError('on the meta device nothing is computed that could be timed')
    device = torch.device(choose_device(workload.device))
    report('the limits of the machine')
    limits = measure_limits(device, getattr(torch, workload.amp or 'float32'),
                            torch.get_num_threads())

    subjects, results = [], []
    for form in group.forms:
        name = f'{form.model}, {form.label}'
        report(f'{name}: building')
        subject = Subject(form, workload)
        try:
            work = count_work(subject.step, limits, device.type, len(subject.sizes))
        except torch.cuda.OutOfMemoryError:
            raise
        # Whatever a model's code says to images of a size that it does not take.
        except Exception as error:
            raise StepError(form, f'{name} cannot run: {first_line(error)}') from error
        if form.compile:
            report(f'{name}: compiling')
            compile_model(subject.model, mode=form.compile,
                          dynamic=True if len(set(subject.sizes)) > 1 else None)
        seconds = time_step(subject.step, device)
        for _ in range(group.warm_up * len(subject.sizes)):
            subject.step()
        report(f'{name}: memory')
        peak, held = subject.measure_memory()
        subjects.append(subject)
        results.append(dict(
            form=asdict(form), label=form.label, batch=subject.batch, sizes=subject.sizes,
            peak_memory=peak, held_memory=held, first_step=seconds, work=asdict(work), times=[]))

    for index, times in _take_turns(subjects, group, report):
        results[index]['times'] = times
    if group.parts:
        for subject, result in zip(subjects, results, strict=True):
            if not subject.form.compile:
                report(f'{subject.form.model}, {subject.form.label}: parts')
                result['parts'] = measure_parts(subject, group.rounds or _MIN_ROUNDS)
    return dict(machine=describe_machine(device), workload=asdict(workload),
                limits=asdict(limits), results=results)


def count_group(group: Group) -> dict[str, KernelCount]:
    """Count the kernels of a step of each form that a benchmark would time.

    A training step is that of a detector's or classifier's loss, with seven objects in an image, or
    of the sum of a backbone's outputs; without the optimizer's.

    Args:
        group: Of its work, the device does not matter.

    Returns:
        By model and form, in words.

    Raises:
        UsageError: If a form is compiled or the work in mixed precision, or as by ``Subject``.
    """
    if group.workload.amp or any(form.compile for form in group.forms):
        raise UsageError('kernels are counted in float32, as PyTorch runs them without compiling')
    counts = {}
    for form in group.forms:
        subject = Subject(form, replace(group.workload, device='meta'))
        count_step(subject.step)  # What it makes and keeps does not count.
        counts[f'{Path(form.model).stem}, {form.label}'] = count_step(subject.step)
    return counts


def measure_parts(subject: Subject, rounds: int) -> dict[str, float]:
    """Share out the time of a training step, the optimizer's included, to the parts of the model.

    Args:
        subject: A classifier or a detector in training. Its weights change, and its methods are
            wrapped: it is good for nothing else afterwards.
        rounds: Steps to take the median of, for each size of the images at least one.

    Returns:
        Seconds of each part, as medians over the steps.
    """
    if subject.config is None:
        raise UsageError(f'{subject.form.model} has no config, which says how it is optimized: '
                         'measure the parts of a model that has one')
    model, timer = subject.model, PartTimer(subject.device)
    for name in ('backbone', 'neck', 'decoder', 'head'):
        if isinstance(getattr(model, name, None), nn.Module):
            timer.wrap(getattr(model, name), 'forward', name)
    head = getattr(model, 'bbox_head', None)
    if head is not None:
        timer.wrap(head, 'loss', 'head and losses')
        if hasattr(head, 'match'):
            timer.wrap(head, 'match', 'matching')
    optimizer = build_optim_wrapper(model, subject.config.optim_wrapper)

    steps = []
    for index in range(1 + max(rounds, len(subject.inputs))):
        timer.seconds = {}
        images, samples = subject.inputs[index % len(subject.inputs)]
        with timer.part('rest of the forward pass'):
            loss = subject.loss(images, samples)
        with timer.part('backward'):
            loss.backward()
        with timer.part('optimizer'):
            optimizer.step()
            optimizer.zero_grad()
        steps.append(timer.seconds)
    steps = steps[1:]  # the first one allocates the optimizer's state
    return {part: median(step.get(part, 0.) for step in steps) for part in steps[0]}


@dataclass(frozen=True)
class Summary:
    """A median with its spread.

    Args:
        median: The median.
        low: The first quartile.
        high: The third quartile.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> 'Summary':
        """Summarise some values."""
        low, middle, high = np.percentile(values, [25, 50, 75]).tolist()
        return cls(middle, low, high)

    def write(self, scale: float = 1., digits: int = 1) -> str:
        """Write the median and, in brackets, the quartiles."""
        middle, low, high = (f'{scale * value:.{digits}f}'
                             for value in (self.median, self.low, self.high))
        return f'{middle} ({low}–{high})'


def speedup(result: Mapping[str, Any], reference: Mapping[str, Any]) -> Summary:
    """How many times as fast as the reference, from the steps that ran next to each other."""
    return Summary.of([theirs / ours for ours, theirs in
                       zip(result['times'], reference['times'], strict=True)])


def throughput(result: Mapping[str, Any]) -> float:
    """Images per second: at the median time, or at the average of several sizes."""
    times = result['times']
    typical = median(times) if len(result['sizes']) == 1 else sum(times) / len(times)
    return result['batch'] / typical


def table(group: Mapping[str, Any]) -> str:
    """Lay out what :func:`run_group` measured.

    Args:
        group: What it returned. The last of its results is what the others are compared with.

    Returns:
        A table in Markdown.
    """
    workload, results = group['workload'], group['results']
    rows = [['model', 'form', 'step', 'batch', 'size', 'dtype', 'ms (quartiles)', 'p90, ms',
             'images/s', 'peak, MiB', 'of which weights and images', 'first step, s',
             'of the limit, %']]
    compared = len(results) > 1
    if compared:
        rows[0] += ['times as fast (quartiles)', 'of the memory, %']
    for result in results:
        cells = [
            Path(result['form']['model']).stem, result['label'],
            'training' if workload['train'] else 'inference', str(result['batch']),
            write_sizes(result['sizes']), workload['amp'] or 'float32',
            Summary.of(result['times']).write(1e3),
            f"{1e3 * np.percentile(result['times'], 90):.1f}", f'{throughput(result):.1f}',
            f"{result['peak_memory'] / 2**20:.0f}", f"{result['held_memory'] / 2**20:.0f}",
            f"{result['first_step']:.1f}",
            f"{100 * result['work']['fused_seconds'] / median(result['times']):.0f}"]
        if compared:
            reference = results[-1]
            cells += [speedup(result, reference).write(digits=2),
                      f"{100 * result['peak_memory'] / reference['peak_memory']:.0f}"]
        rows.append(cells)
    text = markdown(rows)
    for result in results:
        if 'parts' in result:
            text += f"\n{result['label']}\n\n{parts_table(result['parts'])}"
    return text


def parts_table(parts: Mapping[str, float]) -> str:
    """Lay out the parts of a step in Markdown."""
    total = sum(parts.values())
    rows = [[name, f'{1e3 * seconds:.1f}', f'{100 * seconds / total:.1f}']
            for name, seconds in parts.items()]
    return markdown([['part', 'ms', '%'], *rows, ['all', f'{1e3 * total:.1f}', '100']])


def write_sizes(sizes: Sequence[Sequence[int]]) -> str:
    """Write one size, or the range of several."""
    texts = [f'{height}×{width}' for height, width in sorted(map(tuple, sizes))]
    return texts[0] if len(set(texts)) == 1 else f'{texts[0]} to {texts[-1]}'


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Say what is measured on and with, and when."""
    machine = dict(
        date=datetime.now(timezone.utc).date().isoformat(),
        cpu=_cpu_name(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count(),
        threads=torch.get_num_threads(),
        gpu=None,
        python=platform.python_version(),
        torch=torch.__version__,
        spartan_mm=__version__)
    if device.type == 'cuda':
        properties = torch.cuda.get_device_properties(device)
        machine.update(
            gpu=properties.name, gpu_memory=properties.total_memory, cuda=torch.version.cuda,
            cudnn=torch.backends.cudnn.version(),
            # Of convolutions and of products of matrices in float32.
            tf32=[torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32])
    return machine


def machine_line(machine: Mapping[str, Any]) -> str:
    """Describe in one line what :func:`describe_machine` found."""
    gpu = f"{machine['gpu']}, CUDA {machine['cuda']}, " if machine['gpu'] else ''
    cores, threads = (f'{machine[name]} {name[:-1] if machine[name] == 1 else name}'
                      for name in ('cores', 'threads'))
    return (f"{gpu}{machine['cpu']}, {cores}, {threads}; "
            f"Python {machine['python']}, torch {machine['torch']}, spartan_mm "
            f"{machine['spartan_mm']}; {machine['date']}")


def _take_turns(subjects: Sequence[Subject], group: Group,
                report: Report) -> Iterator[tuple[int, list[float]]]:
    """Time the steps of all subjects round by round; give the times of each."""
    def run_round() -> list[float]:
        return [time_step(subject.step, subject.device) for subject in subjects]

    for subject in subjects:
        subject.step_index = 0
    cycle = max(len(subject.sizes) for subject in subjects)
    rounds = group.rounds
    if rounds is None:
        fitting = round(group.seconds / sum(run_round()))
        rounds = min(max(fitting, _MIN_ROUNDS), _MAX_ROUNDS)
    # Each size as often as the others.
    rounds = cycle * math.ceil(rounds / cycle)

    gc.collect()
    gc.disable()
    try:
        times = []
        for index in range(rounds):
            report(f'round {index + 1} of {rounds}')
            times.append(run_round())
    finally:
        gc.enable()
    return enumerate(map(list, zip(*times, strict=True)))


def _make_samples(images: Tensor, num_classes: int, generator: torch.Generator) -> list:
    """Samples of a detector with random objects."""
    from mmengine.structures import InstanceData

    height, width = images.shape[-2:]
    scale = torch.tensor([width, height] * 2)
    samples = describe_images(images)
    for sample in samples:
        center = torch.rand(_NUM_OBJECTS, 2, generator=generator)
        side = 0.05 + 0.4 * torch.rand(_NUM_OBJECTS, 2, generator=generator)
        corners = torch.cat([center - side / 2, center + side / 2], 1).clamp(0, 1) * scale
        labels = torch.randint(num_classes, (_NUM_OBJECTS, ), generator=generator)
        sample.gt_instances = InstanceData(bboxes=corners, labels=labels)
    return [sample.to(images.device) for sample in samples]


def _held_by_gpu(device: torch.device) -> int:
    """Bytes that cannot be given back, those of CUDA graphs included; 0 for a CPU."""
    if device.type != 'cuda':
        return 0
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


def _cpu_name() -> str:
    info = Path('/proc/cpuinfo')
    lines = info.read_text(encoding='utf-8').splitlines() if info.is_file() else []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor() or platform.machine()
