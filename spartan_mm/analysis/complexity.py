"""Parameters and multiply-adds of models, and the table that compares them with a paper's."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import yaml
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

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

BEGIN, END = '<!-- table: begin -->\n', '<!-- table: end -->\n'


@dataclass(frozen=True)
class Complexity:
    """The size of a model.

    Args:
        parameters: Number of parameters.
        multiply_adds: Multiplications (each with an addition) of the convolutions and linear
            layers for one image: half of what PyTorch's flop counter says.
        operations: The same with norms and global pools, as fvcore counts.
    """

    parameters: int
    multiply_adds: int
    operations: int


def measure_complexity(model: nn.Module, height: int, width: int) -> Complexity:
    """Count parameters and multiply-adds in a pass over one image.

    Args:
        model: Takes images, (N, 3, H, W). It is left in evaluation mode.
        height: Height of the image, in pixels.
        width: Width of the image, in pixels.
    """
    image = next(model.parameters()).new_zeros(1, 3, height, width)
    formulas = {op: _per_element(count) for op, count in OPERATIONS_PER_ELEMENT.items()}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter, torch.no_grad():
        model.eval()(image)
    counts = counter.get_flop_counts()['Global']
    operations = counter.get_total_flops() // 2
    return Complexity(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        multiply_adds=operations - sum(counts.get(op, 0) for op in formulas) // 2,
        operations=operations)


def measure_config(path: str | Path) -> Complexity:
    """Count for the classifier of a config, at the size to which its test pipeline crops.

    Args:
        path: The config.
    """
    config = Config.fromfile(path)
    with DefaultScope.overwrite_default_scope(config.default_scope):
        model = MODELS.build(config.model)
    size = config.test_pipeline[1].transforms[-1].size
    return measure_complexity(model, size, size)


def comparison_table(metafile: str | Path) -> str:
    """Lay the counts of each classification config beside the figures of the paper.

    Args:
        metafile: ``configs/classification/metafile.yml``.

    Returns:
        A table in Markdown.
    """
    rows = [
        '| table | row | parameters, M | multiply-adds, M | with norms and pools, G | top-1, % '
        '(paper) |',
        '|---|---|---|---|---|---|',
    ]
    for model in yaml.safe_load(Path(metafile).read_text(encoding='utf-8'))['Models']:
        rows.append(_row(model, Path(metafile).parents[2]))
    return '\n'.join(rows) + '\n'


def insert_table(text: str, table: str) -> str:
    """Replace what stands between the marks for the table.

    Args:
        text: Text with both marks.
        table: The new table.

    Raises:
        ValueError: If there are no marks.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f'the text has no place for the table, marked by {BEGIN!r} and {END!r}')
    return f'{before}{begin}{table}{end}{after}'


def _per_element(count: int):
    # The flop counter counts a multiply-add twice.
    def formula(shape: Iterable[int], *args: Any, **kwargs: Any) -> int:
        return 2 * count * prod(getattr(shape, 'shape', shape))
    return formula


def _row(model: Mapping[str, Any], root: Path) -> str:
    paper = model.get('Metadata', {}).get('Paper', {})
    results = model.get('Results', [dict(Metrics={})])
    counted = measure_config(root / model['Config'])
    link = Path(model['Config']).relative_to('configs/classification').as_posix()
    cells = [
        paper.get('Table', '–'),
        f"[{paper.get('Row', model['Name'])}]({link})",
        _compare(counted.parameters / 1e6, 3, paper.get('Parameters (M)')),
        _compare(counted.multiply_adds / 1e6, 1, paper.get('MACs (M)')),
        _compare(counted.operations / 1e9, 3, paper.get('FLOPs (G)')),
        results[0]['Metrics'].get('Top 1 Accuracy', '–'),
    ]
    return f"| {' | '.join(cells)} |"


def _compare(counted: float, digits: int, printed: str | None) -> str:
    """Write a count, and beside it the paper's figure as it is printed and the difference."""
    text = f'{counted:.{digits}f}'
    if printed is None:
        return text
    percent = round(100 * (counted / float(printed) - 1), 1) + 0.  # no minus before a zero
    return f'{text} (paper {printed}, {percent:+.1f} %)'
