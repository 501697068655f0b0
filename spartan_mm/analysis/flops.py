"""Parameters and operations of any model that has a name, without data and without weights."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..weights.forms import is_deployed, switch_to_deploy
from .benchmark import first_line, markdown
from .complexity import Complexity, measure_modules
from .kernels import KernelCount, count_kernels
from .named_models import load_named_model

TRAINING_FORM, DEPLOY_FORM = 'training form', 'deploy form'

#: What is counted, for whoever reads the numbers.
COUNTED = ('Counted for one image: convolutions, linear layers and the products of attention. Not '
           'counted: norms, activation functions, bilinear sampling (in deformable attention), '
           'post-processing. Kernels, and the GB that they read and write, are of everything.')


class CountError(ValueError):
    """A model that cannot be counted as asked for."""


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
        CountError: If the size of the images is neither given nor known, or the model cannot be
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
            raise CountError(f'{name} does not say in its test pipeline how large the images are; '
                             'give a size with --shape H W')
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
                raise CountError(f'{name} cannot be run on images of {size[0]}x{size[1]}: '
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
