"""Count what the paper's Tables II, III, IV, V and VIII say of sizes, and write docs/tables.md.

The models come from this package, mmpretrain, mmdet and timm, without weights: nothing is
downloaded. It takes a minute or two, most of it for Deformable-DETR, the only model that has to
compute. With --check, nothing is written: the page is compared with the counts.

What the paper prints of this package's models is in the metafiles, what it prints of the others is
here, and so is how each of them is built and why a count is not the paper's.
"""

import argparse
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from math import nan, prod
from pathlib import Path
from typing import Any

import torch
from readme_tables import insert_tables
from rich.progress import track
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from spartan_mm import zoo
from spartan_mm.analysis.models import build_without_numbers, load_named_model
from spartan_mm.analysis.sizes import measure_modules
from spartan_mm.detection.hybrid_encoder import RepVGGBlock
from spartan_mm.files import write_whole
from spartan_mm.requirements import require

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / 'docs' / 'tables.md'

aten = torch.ops.aten

TABLES = ('II', 'III', 'IV', 'V', 'VIII')
NOWHERE = 'not in mmpretrain, mmdet or timm'

#: A difference from the paper that has to be explained, in percent.
TOLERANCE = 2

_NONE = '–'  # what the paper does not print, or nobody can count here
_MARKS = re.compile(r'<!-- table (\w+): begin -->\n(.*?)<!-- table \1: end -->\n', re.DOTALL)

Build = Callable[[], nn.Module]


class UnexplainedError(ValueError):
    """A count that is not the paper's, and nothing that says why."""


@dataclass(frozen=True)
class Count:
    """What is counted in a pass over one image.

    Args:
        parameters: Number of parameters, in millions.
        multiply_adds: Of convolutions and products of matrices, in G, as all that follows.
        in_training: The same with norms and global pools, as fvcore counts in a model in training
            mode: 5 for each element in a norm, 1 in a pool.
        without_products: With norms and pools as in evaluation mode (2 in a batch norm), but
            without the products of two matrices that are both computed, as in attentions.
    """

    parameters: float
    multiply_adds: float
    in_training: float
    without_products: float

    @property
    def flops(self) -> float:
        """Two for each multiply-add."""
        return 2 * self.multiply_adds


@dataclass(frozen=True)
class Recipe:
    """What to count.

    Args:
        build: Builds the model, on the meta device if it can run there.
        shape: (H, W) of the image, in pixels; None to count parameters alone.
    """

    build: Build
    shape: tuple[int, int] | None = (224, 224)


# How a row's operations are printed in the paper, and the count that is put beside them.
CONVENTIONS: dict[str, Callable[[Count], float]] = {
    'multiply-adds': lambda count: count.multiply_adds,
    'with norms': lambda count: count.in_training,
    '2 per multiply-add': lambda count: count.flops,
}


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Args:
        table: The table, such as 'II'.
        label: The model, as the paper calls it.
        source: Where the model that is counted comes from, in Markdown.
        recipe: How it is built; None if no library has it.
        convention: How the paper counts its operations, of :data:`CONVENTIONS`.
        printed: Figures as the paper prints them by their names: 'parameters', 'operations',
            'macs', and what was measured.
        why: For each of 'parameters', 'operations' and 'macs' that is not the paper's: why. What is
            in braces, such as ``{row.flops:.1f}``, is of the row's :class:`Count`, or of one of
            those `beside` it.
        remark: What else is to be said, with braces as in `why`.
        beside: Further counts for `why` and `remark` by their names.
    """

    table: str
    label: str
    source: str
    recipe: Recipe | None
    convention: str
    printed: Mapping[str, str]
    why: Mapping[str, str] = field(default_factory=dict)
    remark: str = ''
    beside: Mapping[str, Recipe] = field(default_factory=dict)


# ---- what is counted -----------------------------------------------------------------------------


def measure(recipe: Recipe) -> Count:
    """Build a model and count."""
    model = recipe.build().requires_grad_(False)
    if recipe.shape is None:
        return Count(sum(each.numel() for each in model.parameters()) / 1e6, nan, nan, nan)
    # What the counts of `complexity` leave apart: their kinds of operations.
    kinds = FlopCounterMode(display=False, custom_mapping={
        op: lambda shape, *_, **__: prod(getattr(shape, 'shape', shape))
        for op in (aten.native_batch_norm, aten._native_batch_norm_legit_no_training)})
    with kinds:
        complexity = measure_modules(model, *recipe.shape)['']
    counts = kinds.get_flop_counts()['Global']
    normalized = sum(counts.get(op, 0) for op in (
        aten.native_batch_norm, aten._native_batch_norm_legit_no_training))
    products = (counts.get(aten.bmm, 0) + counts.get(aten.baddbmm, 0)) // 2
    return Count(
        parameters=complexity.parameters / 1e6,
        multiply_adds=complexity.multiply_adds / 1e9,
        in_training=(complexity.operations + 3 * normalized) / 1e9,
        without_products=(complexity.operations - products) / 1e9)


def _named(name: str, change: Callable[[nn.Module], Any] | None = None, device: str = 'meta'
           ) -> Build:
    """A model by its name, changed in place or replaced by what `change` returns."""
    def build() -> nn.Module:
        model = load_named_model(name, device=device).model
        return (change and change(model)) or model
    return build


def _timm(name: str, **settings: Any) -> Build:
    """A model of timm's with other settings."""
    def build() -> nn.Module:
        timm = require('timm', '1.0.4', 'timm')
        return build_without_numbers(lambda: timm.create_model(name, **settings))
    return build


class _Classifier(nn.Module):
    """A backbone of mmdet's with the norm and the linear layer of a classifier on top.

    Args:
        backbone: Gives maps, the last of them (N, C, H, W).
        channels: C.
    """

    def __init__(self, backbone: nn.Module, channels: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.norm = nn.LayerNorm(channels, device='meta')
        self.fc = nn.Linear(channels, 1000, device='meta')

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) -> (N, 1000)."""
        return self.fc(self.norm(self.backbone(images)[-1].mean((2, 3))))


def _merge_branches(model: nn.Module) -> None:
    """Merge mmpretrain's MobileOne, whose classifier does not pass the request on."""
    model.backbone.switch_to_deploy()


def _fuse_repvgg(model: nn.Module) -> None:
    """Fuse RT-DETR's RepVGG blocks, and leave all else as it is trained."""
    for module in model.modules():
        if isinstance(module, RepVGGBlock):
            module.switch_to_deploy()


def _classify_200(model: nn.Module) -> None:
    model.head.fc = nn.Linear(model.head.fc.in_features, 200, device='meta')


class _AllBoxes(nn.Module):
    """RT-DETR with the boxes of all positions, where its own code computes those of the queries.

    Args:
        model: RT-DETR.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> Any:
        """(N, 3, H, W) -> what the model gives."""
        # Strides 8, 16 and 32.
        positions = sum(prod(images.shape[-2:]) // stride ** 2 for stride in (8, 16, 32))
        branch = self.model.bbox_head.reg_branches[-1]
        branch(images.new_zeros(positions - self.model.num_queries, branch[0].in_features))
        return self.model(images)


# ---- the rows ------------------------------------------------------------------------------------


def _peer(label: str, name: str | None, params: str, flops: str, top1: str, size: int = 224,
          source: str = '', build: Build | None = None, **rest: Any) -> Row:
    """A row of Table II that is not this package's."""
    package, _, own = (name or '').partition(':')
    return Row('II', label, source or (f'{package} `{own}`' if name else NOWHERE),
               Recipe(build or _named(name), (size, size)) if name else None, 'multiply-adds',
               dict(parameters=params, operations=flops, accuracy=top1, input=f'{size} x {size}'),
               **rest)


def _peers() -> list[Row]:
    pvt = 'mmdet:retinanet_pvt-t_fpn_1x_coco'
    mobile = 'mmpretrain:mobileone-s1_8xb32_in1k'
    return [
        _peer('ResNet-18', 'mmpretrain:resnet18_8xb32_in1k', '11.7', '1.80', '71.5'),
        _peer('DeiT-T', 'mmpretrain:deit-tiny_4xb256_in1k', '5.7', '1.08', '74.1', why=dict(
            operations='fvcore does not see the two products of an attention that is one fused '
                       'operation. Without them, and with the norms, as it counts, it is '
                       '{row.without_products:.2f} G.')),
        _peer('PVT-T', pvt, '13.2', '1.60', '75.1',
              source='mmdet `retinanet_pvt-t_fpn_1x_coco`, its backbone with a norm and a linear '
                     'layer',
              build=_named(pvt, lambda model: _Classifier(model.backbone, 512)),
              why=dict(operations='not explained. Other papers print 1.9 G for it, as counted. '
                                  'Tried: without the two products of each attention, '
                                  '{row.without_products:.2f} G; the class token that mmdet leaves '
                                  'out can only add.')),
        _peer('ViT-C', None, '4.6', '1.10', '75.3'),
        _peer('VAN-B0', 'mmpretrain:van-tiny_3rdparty_in1k', '4.1', '0.88', '75.4'),
        _peer('EfficientFormerV2-S0', 'timm:efficientformerv2_s0', '3.6', '0.42', '75.7', why=dict(
            operations='{row.in_training:.2f} G with norms and pools, as fvcore counts in a model '
                       "in training mode, which is how the authors' code counts.")),
        _peer('MobileOne-S1', mobile, '4.8', '0.83', '75.9',
              remark='in the form that is trained; with its branches merged '
                     '{merged.parameters:.2f} M and {merged.multiply_adds:.3f} G.',
              beside=dict(merged=Recipe(_named(mobile, _merge_branches, 'cpu')))),
        _peer('EfficientNet-B0', 'mmpretrain:efficientnet-b0_3rdparty_8xb32_in1k', '5.3', '0.39',
              '77.1'),
        _peer('MogaNet-XT', None, '3.0', '1.04', '77.2', 256),
        _peer('Swin-1G', None, '7.3', '1.00', '77.3',
              remark="timm's Swin-T at half its width has {half.parameters:.2f} M and "
                     '{half.multiply_adds:.2f} G ({half.without_products:.2f} G without the '
                     'products of its attentions); whether that is Swin-1G is not known here.',
              beside=dict(half=Recipe(_timm('swin_tiny_patch4_window7_224', embed_dim=48)))),
        _peer('ConvNeXt-XT', None, '7.4', '0.60', '77.5',
              remark="its name, 7.44 M and 0.6 G are ParC-Net's. timm's ConvNeXt-T at half its "
                     'width, 48 to 384 channels as there, has {half.parameters:.2f} M and '
                     '{half.multiply_adds:.2f} G. Why that is not 0.60 is not explained; at '
                     '160 x 160 it is {small.multiply_adds:.2f} G, and ParC-Net gives ResNet-50, '
                     'too, half of its 4.1 G.',
              beside=dict(half=Recipe(_timm('convnext_tiny', dims=(48, 96, 192, 384))),
                          small=Recipe(_timm('convnext_tiny', dims=(48, 96, 192, 384)),
                                       (160, 160)))),
    ]


def _detector(label: str, backbone: str, name: str | None, params: str, flops: str, epochs: str,
              precisions: str, size: tuple[int, int] = (640, 640), **rest: Any) -> Row:
    """A row of Table III whose figures the metafiles do not have.

    Args:
        precisions: AP, AP50, AP75, APs, APm and APl.
        rest: More of :class:`Row`.
    """
    return Row('III', f'{label}, {backbone}', rest.pop('source', NOWHERE),
               Recipe(_named(name, device=rest.pop('device', 'meta')), size) if name else None,
               rest.pop('convention', 'multiply-adds'),
               dict(parameters=params, operations=flops, epochs=epochs,
                    **dict(zip(_PRECISIONS, precisions.split(), strict=True))), **rest)


def _detectors() -> list[Row]:
    deformable = 'mmdet:deformable-detr_r50_16xb2-50e_coco'
    detr = 'mmdet::detr/detr_r50_8xb2-150e_coco.py'
    # A 3:4 picture, COCO's most frequent, at the size of DETR and what follows it; and a size of
    # image for which DETR-R50 has the 86 G that it is published with.
    size, mean = (800, 1066), (800, 1135)
    refine, stages = (deformable.replace('_r50', f'-{variant}_r50')
                      for variant in ('refine', 'refine-twostage'))
    ours = {row.label: row for row in _own_rows('III')}
    own = {name: dict(source=_link(name), convention='2 per multiply-add')
           for name in ('rtdetr_r18vd', 'rtdetr_r34vd')}
    return [
        _detector('Deformable-DETR', 'ResNet-50', deformable, '40.0', '173.00', '50',
                  '46.2 65.2 50.0 28.8 49.2 61.7', size, device='cpu',
                  source='mmdet `deformable-detr_r50_16xb2-50e_coco`',
                  why=dict(operations="the input: DETR's authors take the mean over COCO pictures "
                                      'of many shapes, this is one of 3:4. DETR-R50, published '
                                      'with 86 G, counts {detr.multiply_adds:.1f} G at this size '
                                      'and {detr_mean.multiply_adds:.1f} G at 800 x 1135, where '
                                      'Deformable-DETR counts {mean.multiply_adds:.1f} G.'),
                  remark='46.2 AP is not of this model, which its authors released with 44.5 AP, '
                         '40 M and 173 G, but of a variant that refines boxes: '
                         '{refine.parameters:.1f} M, or in two stages {stages.parameters:.1f} M. '
                         'The sampling of values, no product of matrices, is not counted.',
                  beside=dict(mean=Recipe(_named(deformable, device='cpu'), mean),
                              detr=Recipe(_named(detr), size),
                              detr_mean=Recipe(_named(detr), mean),
                              refine=Recipe(_named(refine), None),
                              stages=Recipe(_named(stages), None))),
        _detector('RT-DETR', 'ResNet-18', 'rtdetr_r18vd', '20.2', '61.20', '72',
                  '46.4 63.7 50.3 28.4 49.7 63.0', **own['rtdetr_r18vd'],
                  why=dict(operations='the official code computes a box for each of the 8400 '
                                      'positions, this one for the 300 that become queries. '
                                      'With the boxes of all positions {boxes.flops:.1f} G.'),
                  beside=dict(boxes=Recipe(_named('rtdetr_r18vd', _AllBoxes), (640, 640)))),
        _detector('DAB-Deformable-DETR', 'ResNet-50', None, '48.0', '195.00', '50',
                  '46.9 66.0 50.8 30.1 50.4 62.5',
                  remark="mmdet's DAB-DETR is another model, whose attention is not deformable: "
                         '{dab.parameters:.1f} M and {dab.multiply_adds:.1f} G at 800 x 1066.',
                  beside=dict(dab=Recipe(_named('mmdet:dab-detr_r50_8xb2-50e_coco'), size))),
        _detector('DN-Deformable-DETR', 'ResNet-50', None, '48.0', '195.00', '50',
                  '48.6 67.4 52.7 31.0 52.0 63.7'),
        _detector('RT-DETR', 'ResNet-34', 'rtdetr_r34vd', '31.4', '93.30', '72',
                  '48.8 66.7 52.6 30.5 52.2 66.0', **own['rtdetr_r34vd'],
                  remark='with the boxes of all positions {boxes.flops:.1f} G.',
                  beside=dict(boxes=Recipe(_named('rtdetr_r34vd', _AllBoxes), (640, 640)))),
        ours['RT-DETR, SpaRTAN-XT'], ours['RT-DETR, SpaRTAN-T'],
    ]


# Of this package's models, by their names: what cannot be in the metafiles.
_BETWEEN = (
    'not explained. Counted is the form that is trained, which is that of the ResNet rows. Tried: '
    'with the RepVGG blocks fused {fused.parameters:.2f} M and {fused.flops:.1f} G; all folded '
    '{deploy.parameters:.2f} M and {deploy.flops:.1f} G; with the boxes of all positions '
    '{boxes.flops:.1f} G. Both models have 0.6 to 0.7 M more than the paper prints; what has this '
    'size are the box branches of five decoder layers (0.66 M), which prediction needs.')
_HEAD = 'with a classifier of 200 classes instead of 1000 it is {head.parameters:.2f} M.'
_OWN: dict[str, dict[str, Any]] = {
    name: dict(why=dict(parameters=_BETWEEN), beside=dict(
        fused=Recipe(_named(name, _fuse_repvgg), (640, 640)),
        boxes=Recipe(_named(name, _AllBoxes), (640, 640)),
        deploy=Recipe(_named(name, lambda model: model.switch_to_deploy()), (640, 640))))
    for name in ('rtdetr_spartan_xt', 'rtdetr_spartan_t')
} | {
    name: dict(why=dict(parameters=_HEAD), beside=dict(head=Recipe(_named(name, _classify_200))))
    for name in ('table5_3x3', 'table5_5x5')
}

# Columns of Table III, and what the metafiles call them.
_PRECISIONS = {'AP': 'box AP', 'AP50': 'box AP50', 'AP75': 'box AP75', 'APs': 'box AP small',
               'APm': 'box AP medium', 'APl': 'box AP large'}


def _own_rows(table: str) -> list[Row]:
    """The rows that a metafile has: those of SpaRTAN."""
    rows = []
    for name, entry in zoo.read_metafiles().items():
        paper = entry['Metadata'].get('Paper', {})
        if paper.get('Table') != table:
            continue
        metrics = next(result['Metrics'] for result in entry['Results']
                       if result['Source'] == 'paper')
        keys = {'parameters': 'Parameters (M)', 'operations': 'FLOPs (G)', 'macs': 'MACs (M)'}
        printed = {key: paper[title] for key, title in keys.items() if title in paper}
        if table == 'III':
            printed |= {'epochs': str(entry['Metadata']['Epochs'])} | {
                title: metrics[key] for title, key in _PRECISIONS.items()}
        else:
            printed['accuracy'] = metrics['Top 1 Accuracy']
        label = paper.get('Row') or ', '.join(reversed(entry['Metadata']['Architecture']))
        rows.append(Row(
            table, f'SpaRTAN-{label}' if table == 'II' else label, _link(name),
            Recipe(_named(name), tuple(entry['Metadata']['Input Size'])),
            '2 per multiply-add' if table == 'III' else 'with norms', printed,
            **_OWN.get(name, {})))
    return rows


def _link(name: str) -> str:
    return f"[`{name}`](../{zoo.read_metafiles()[name]['Config']})"


def list_rows(table: str) -> list[Row]:
    """List the rows of a table, in the paper's order.

    Args:
        table: One of :data:`TABLES`.

    Raises:
        ValueError: If it is none of them.
    """
    if table not in TABLES:
        raise ValueError(f'there is no table {table!r}; choose from {", ".join(TABLES)}')
    if table == 'III':
        return _detectors()
    return (_peers() if table == 'II' else []) + _own_rows(table)


# ---- a table -------------------------------------------------------------------------------------


def count_row(row: Row) -> dict[str, Count]:
    """Count a row's model, as 'row', and what is beside it, by its name."""
    recipes = ({'row': row.recipe} if row.recipe else {}) | dict(row.beside)
    return {name: measure(recipe) for name, recipe in recipes.items()}


def find_differences(row: Row, count: Count) -> dict[str, float]:
    """Compare a count with what the paper prints.

    Returns:
        The difference in percent by 'parameters', 'operations' and 'macs', as far as the paper has
        them, for all that are not the same to the digits that it prints.
    """
    differences = {}
    for key, number in _numbers(row, count).items():
        printed = row.printed.get(key)
        if printed is not None and f'{number:.{_digits(printed)}f}' != printed:
            differences[key] = 100 * (number / float(printed) - 1)
    return differences


def make_table(table: str, rows: Iterable[Row] | None = None) -> str:
    """Lay out a table and its notes.

    Args:
        table: One of :data:`TABLES`.
        rows: Its rows, such as an iterable that shows progress; None for all.

    Raises:
        UnexplainedError: If a count is not the paper's and nothing says why.
        ImportError: If a package whose models are counted is not installed.
    """
    lines, notes = [], []
    for row in list_rows(table) if rows is None else rows:
        counts = count_row(row)
        lines.append(write_row(row, counts))
        notes += write_notes(row, counts)
    titles = [title for title, _ in _columns(table)]
    head = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    return '\n'.join([*head, *lines, *([''] if notes else []), *notes]) + '\n'


def write_row(row: Row, counts: Mapping[str, Count]) -> str:
    """Write the line of a row.

    Args:
        row: The row.
        counts: See :func:`count_row`.
    """
    cells = [cell(row, counts.get('row')) for _, cell in _columns(row.table)]
    return f"| {' | '.join(cells)} |"


def write_notes(row: Row, counts: Mapping[str, Count]) -> list[str]:
    """Write what is to be said of a row, a line for each difference and the remark.

    Args:
        row: The row.
        counts: See :func:`count_row`.

    Raises:
        UnexplainedError: If a count is not the paper's and nothing says why, or something is
            explained that needs it not.
    """
    notes = []
    beyond = {key: percent for key, percent in (
        find_differences(row, counts['row']) if 'row' in counts else {}).items()
        if abs(percent) > TOLERANCE}
    for key in beyond.keys() ^ row.why.keys():
        raise UnexplainedError(
            f'Table {row.table}, {row.label}: {key} ' + (
                f'differ by {beyond[key]:+.1f} % from the paper, and nothing says why'
                if key in beyond else f'are explained, but within {TOLERANCE} % of the paper'))
    for key, percent in beyond.items():
        notes.append(f'- **{row.label}**, {key} {percent:+.1f} %: {row.why[key].format(**counts)}')
    if row.remark:
        notes.append(f'- **{row.label}**: {row.remark.format(**counts)}')
    return notes


def read_tables(text: str) -> dict[str, str]:
    """Find the tables that a page has between its marks, by their names."""
    return dict(_MARKS.findall(text))


def fill_in(text: str, tables: Mapping[str, str]) -> str:
    """Replace tables of a page.

    Args:
        text: The page, with marks for all of :data:`TABLES`.
        tables: Some or all of them, by name.

    Raises:
        ValueError: If the page has no marks for one of them.
    """
    return insert_tables(text, read_tables(text) | dict(tables))


def _numbers(row: Row, count: Count) -> dict[str, float]:
    """Counts in the units of the paper's columns."""
    return dict(parameters=count.parameters, operations=CONVENTIONS[row.convention](count),
                macs=1e3 * count.multiply_adds)


def _digits(printed: str) -> int:
    return len(printed.partition('.')[2])


Cell = Callable[[Row, Count | None], str]


def _columns(table: str) -> list[tuple[str, Cell]]:
    """Titles, and what makes the cells."""
    def printed(key: str) -> Cell:
        return lambda row, count: row.printed.get(key, _NONE)

    def difference(key: str) -> Cell:
        def cell(row: Row, count: Count | None) -> str:
            if count is None or key not in row.printed:
                return _NONE
            percent = 100 * (_numbers(row, count)[key] / float(row.printed[key]) - 1)
            return f'{round(percent, 1) + 0.:+.1f}'  # no minus before a zero
        return cell

    def number(key: str, digits: int) -> Cell:
        return lambda row, count: (
            _NONE if count is None else f'{_numbers(row, count)[key]:.{digits}f}')

    def size(row: Row, count: Count | None) -> str:
        return (' x '.join(map(str, row.recipe.shape)) if row.recipe
                else row.printed.get('input', _NONE))

    detects = table == 'III'
    digits = 1 if detects else 3
    columns = [
        ('model', lambda row, count: row.label),
        ('counted', lambda row, count: row.source),
        ('input', size),
        ('parameters, M', number('parameters', 2 if detects else 3)),
        ('paper, M', printed('parameters')),
        ('%', difference('parameters')),
    ]
    if table == 'VIII':
        columns += [('multiply-adds, M', number('macs', 1)), ('paper, M', printed('macs')),
                    ('%', difference('macs'))]
    else:
        columns += [('multiply-adds, G', lambda row, count: (
            _NONE if count is None else f'{count.multiply_adds:.{digits}f}'))]
    columns += [
        ("the paper's FLOPs are", lambda row, count: row.convention),
        ('so counted, G', number('operations', digits)),
        ('paper, G', printed('operations')),
        ('%', difference('operations')),
    ]
    if detects:
        measured = {'epochs': 'epochs'} | {key: f'{key}, %' for key in _PRECISIONS}
    else:
        measured = {'accuracy': 'top-1, %'}
    return columns + [(f'{title} (paper)', printed(key)) for key, title in measured.items()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='+', choices=TABLES, default=TABLES, metavar='TABLE',
                        help=f'some of {", ".join(TABLES)}')
    parser.add_argument('--check', action='store_true', help='compare, and write nothing')
    args = parser.parse_args()
    # Of mmdet's models, once in the middle of a progress bar.
    warnings.filterwarnings('ignore', 'torch.meshgrid')
    try:
        old = PAGE.read_text(encoding='utf-8')
        tables = {table: make_table(table, track(list_rows(table), description=f'Table {table}'))
                  for table in args.only}
        new = fill_in(old, tables)
        if not args.check:
            with write_whole(PAGE) as file:
                file.write(new.encode())
            return
    except (ImportError, OSError, UnexplainedError, ValueError) as error:
        sys.exit(f'error: {error}')

    problems = [f'error: Table {table} of {PAGE.relative_to(ROOT)} is not what is counted:\n'
                f'  there:   {was}\n  counted: {is_}'
                for table, text in tables.items()
                for was, is_ in differing(read_tables(old)[table], text)]
    if problems:
        sys.exit('\n'.join([*problems, 'error: run make tables']))


def differing(old: str, new: str) -> list[tuple[str, str]]:
    """Pair the lines that are not the same."""
    pairs = zip_longest(old.splitlines(), new.splitlines(), fillvalue='')
    return [(was, is_) for was, is_ in pairs if was != is_]


if __name__ == '__main__':
    main()
