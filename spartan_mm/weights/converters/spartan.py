"""The authors' SpaRTAN checkpoints in this package's names, and back.

Each function takes tensors by name, all of them and nothing else. If keys are missing or left over,
or shapes do not fit together, it raises a CheckpointError that lists them.
"""
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from ...backbones import SpaRTAN
from ...backbones.arch import find_low_freq_kernels
from ...errors import CheckpointError
from .names import (
    Names,
    StateDict,
    check_shapes,
    rename,
    rename_back,
    shapes_of,
    strip_prefix,
)

# What the parts of a block are called here and there, where the two differ.
_BLOCK_NAMES = (
    ('norm1.', 'norm_1.'),
    ('norm2.', 'norm_2.'),
    ('layer_scale1', 'scale_1'),
    ('layer_scale2', 'scale_2'),
    ('smixer.high_freq.', 'smixer.h_conv.'),
    ('smixer.high_se.', 'smixer.h_attn.'),
    ('smixer.low_freq.0.', 'smixer.l_conv.0.conv.'),
    ('smixer.low_freq.1.', 'smixer.l_conv.1.'),
    ('smixer.low_se.', 'smixer.l_attn.'),
    ('cmixer.complex_weight', 'cmixer.complex'),
    ('cmixer.refine.', 'cmixer.conv.'),
    ('cmixer.se.', 'cmixer.attn.'),
)
_NOT_WHOLE = 'not a whole SpaRTAN checkpoint'
_HEAD_NAMES: Names = {'head.fc.weight': ['linear.weight'], 'head.fc.bias': ['linear.bias']}


def convert_spartan(state_dict: Mapping[str, Tensor]) -> tuple[StateDict, dict]:
    """Convert a classifier of the authors into an ``ImageClassifier`` of mmpretrain.

    Returns:
        The weights, under ``backbone.`` and ``head.fc.`` (a ``LinearClsHead``; its pooling neck
        has none), and the backbone's `arch`.
    """
    head = {name: value for name, value in state_dict.items() if [name] in _HEAD_NAMES.values()}
    backbone, arch = convert_spartan_backbone(
        {name: value for name, value in state_dict.items() if name not in head})
    converted = {f'backbone.{name}': value for name, value in backbone.items()}
    converted |= rename(head, _HEAD_NAMES)
    _check_head(converted, arch)
    return converted, arch


def export_spartan(state_dict: Mapping[str, Tensor]) -> tuple[StateDict, dict]:
    """Convert an ``ImageClassifier`` of mmpretrain into a classifier of the authors.

    Returns:
        The weights, as the authors name them, and the backbone's `arch`.
    """
    head = {name: value for name, value in state_dict.items() if not name.startswith('backbone.')}
    exported, arch = export_spartan_backbone(strip_prefix(state_dict, 'backbone.'))
    exported |= rename_back(head, _HEAD_NAMES)
    _check_head(head, arch)
    return exported, arch


def _check_head(state_dict: Mapping[str, Tensor], arch: dict) -> None:
    num_classes = state_dict['head.fc.bias'].numel()
    check_shapes(state_dict, {'head.fc.weight': (num_classes, arch['channels'][-1]),
                              'head.fc.bias': (num_classes, )})


def convert_spartan_backbone(state_dict: Mapping[str, Tensor],
                             prefix: str = '') -> tuple[StateDict, dict]:
    """Convert a backbone of the authors, alone or inside a larger model.

    Args:
        state_dict: Weights. Names that do not begin with `prefix` are not looked at.
        prefix: What stands before the backbone's names, as 'backbone.net.' in a detector. It is
            taken off.

    Returns:
        The weights as ``SpaRTAN`` names them, and its `arch`.
    """
    state_dict = {name: value for name, value in state_dict.items() if name.startswith(prefix)}
    layers = _read_layers(state_dict, prefix)

    def shape(name: str) -> torch.Size:
        return _shape(state_dict, prefix + _official_names(name, layers)[0])

    depths = [len(members) - (stage > 0) for stage, members in enumerate(layers)]
    arch, expected = _read_arch(depths, shape)
    converted = rename(state_dict, _names(expected, layers, prefix))
    for name, value in converted.items():
        if name.endswith('.complex_weight'):
            # The released (1, 1, 1, pairs, 2) holds the same numbers in the same order.
            converted[name] = value.flatten(0, -2)
    check_shapes(converted, expected)
    return converted, arch


def export_spartan_backbone(state_dict: Mapping[str, Tensor],
                            prefix: str = '') -> tuple[StateDict, dict]:
    """Convert a ``SpaRTAN`` into a backbone of the authors, alone or for a larger model.

    Args:
        state_dict: The backbone's weights.
        prefix: What to put before the backbone's new names, as 'backbone.net.' in a detector.

    Returns:
        The weights, as the authors name them, and the backbone's `arch`.
    """
    depths: dict[int, int] = {}
    for name in state_dict:
        match = re.match(r'stages\.(\d)\.blocks\.(\d{1,3})\.', name)
        if match:
            stage, block = map(int, match.groups())
            depths[stage] = max(depths.get(stage, 0), block + 1)
    depths = [depths.get(stage, 0) for stage in range(max(depths, default=-1) + 1)]
    for stage, kernel in find_low_freq_kernels(
            {name: value.shape for name, value in state_dict.items()}).items():
        if kernel != 3:
            raise CheckpointError(f'stage {stage + 1} has low_freq_kernel={kernel!r}; the layout '
                                  'of the authors has names for 3, the stacked pair, alone')
    arch, expected = _read_arch(depths, partial(_shape, state_dict))

    numbers = itertools.count()
    layers = [[next(numbers) for _ in range(depth + (stage > 0))]
              for stage, depth in enumerate(depths)]
    names = _names(expected, layers, prefix)
    exported = rename_back(state_dict, names)
    check_shapes(state_dict, expected)
    for name, (theirs, *_) in names.items():
        if name.endswith('.complex_weight'):
            exported[theirs] = exported[theirs][None, None, None]
    return exported, arch


def _read_layers(state_dict: Mapping[str, Tensor], prefix: str) -> list[list[int]]:
    """For each stage the numbers of its layers.

    The authors number all layers in one running list. Each stage has its blocks there, and before
    these, except in the first stage, its embedding.
    """
    is_block: dict[int, bool] = {}
    for name in state_dict:
        match = re.match(re.escape(prefix) + r'layers\.(\d{1,3})\.(smixer|cmixer)?', name)
        if match:
            number = int(match[1])
            is_block[number] = bool(match[2]) or is_block.get(number, False)
    gaps = {*range(max(is_block, default=0) + 1)} - {*is_block}
    if gaps:
        raise CheckpointError(f'{_NOT_WHOLE}; missing keys:',
                              *(f'{prefix}layers.{number}.*' for number in sorted(gaps)))
    layers: list[list[int]] = [[]]
    for number in sorted(is_block):
        if not is_block[number]:
            layers.append([])
        layers[-1].append(number)
    return layers


def _read_arch(depths: Sequence[int], shape: Callable[[str], torch.Size]
               ) -> tuple[dict, dict[str, torch.Size]]:
    """The architecture, by the shapes of some weights, and the shapes of all that it has."""
    for stage, depth in enumerate(depths, start=1):
        if depth < 1:
            raise CheckpointError(f'{_NOT_WHOLE}: stage {stage} has no block')

    def last_block(name: str) -> list[torch.Size]:
        return [shape(f'stages.{stage}.blocks.{depth - 1}.{name}')
                for stage, depth in enumerate(depths)]

    first = shape('stem.0.conv.weight')
    hidden = last_block('cmixer.proj_out.weight')
    high_freq = last_block('smixer.high_freq.conv.weight')
    try:
        arch = dict(
            stem_channels=first[0], depths=tuple(depths), channels=tuple(out for out, *_ in hidden),
            expand_ratios=tuple(wide // out for out, wide, *_ in hidden),
            conv_types=tuple('depthwise' if inner == 1 else 'full' for _, inner, *_ in high_freq))
        return arch, shapes_of(lambda: SpaRTAN(arch, first[1], out_indices=-1))
    except (ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f'the shapes are not those of a SpaRTAN: {error}') from error


def _names(ours: Iterable[str], layers: list[list[int]], prefix: str) -> Names:
    return {name: [prefix + theirs for theirs in _official_names(name, layers)] for name in ours}


def _shape(state_dict: Mapping[str, Tensor], name: str) -> torch.Size:
    """The shape of a convolution's weight."""
    if name not in state_dict:
        raise CheckpointError(f'{_NOT_WHOLE}; missing keys:', name)
    if state_dict[name].ndim != 4:
        raise CheckpointError(f'{name} of shape {tuple(state_dict[name].shape)} is not the weight '
                              'of a two-dimensional convolution')
    return state_dict[name].shape


def _official_names(name: str, layers: list[list[int]]) -> list[str]:
    """What the authors call the tensor `name`; two names where theirs are concatenated here."""
    part, *rest = name.split('.', 3)
    if part == 'stem':
        return [f'conv.{".".join(rest)}']

    stage, kind, rest = int(rest[0]), rest[1], rest[2]
    if kind == 'embedding':
        return [f'layers.{layers[stage][0]}.{rest}']

    block, rest = rest.split('.', 1)
    for ours, theirs in _BLOCK_NAMES:
        if rest.startswith(ours):
            rest = theirs + rest[len(ours):]
    layer = f'layers.{layers[stage][int(block) + (stage > 0)]}'
    if rest.startswith('cmixer.proj_in.'):
        return [f'{layer}.cmixer.{half}.{rest.rsplit(".", 1)[1]}' for half in ('theta', 'proj')]
    return [f'{layer}.{rest}']
